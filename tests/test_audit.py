"""The audit shows what a chain has of each step's data; forgotten data are gone, and the chain goes on without them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from nnunet_cil import driver
from nnunet_cil.audit import _named, audit_chain, audit_text, check_forget, forget
from nnunet_cil.chain import Chain, is_finished
from nnunet_cil.cli.main import main
from nnunet_cil.dataset import prepare_chain
from nnunet_cil.driver import variants_of
from nnunet_cil.lineage import Files, verify_chain
from nnunet_cil.prototypes import PrototypeStore
from nnunet_cil.pseudo_labels import kept_cases_of
from nnunet_cil.schedule import ScheduleError, load_schedule
from nnunet_cil.step_files import check_step_files, write_json
from tests.conftest import write_schedule, write_tiny_dataset
from tests.test_given_model import write_model
from tests.test_trainer import fold_of, module_patch, train  # noqa: F401  (a fixture)

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
DATA = ("raw images", "raw labels", "preprocessed", "gt_segmentations", "pseudo-labels", "predicted masks")
MODEL = "nnUNetTrainerPGCD__nnUNetPlans__3d_fullres"
SCHEDULE = """
name: tiny
test: {dataset: tests}
device: cpu
plans: {patch_size: [16, 16, 16], batch_size: 2, features_per_stage: [4, 8, 8]}
training: {epochs: 1, iterations_per_epoch: 2, val_iterations_per_epoch: 1, seed: 0}
steps:
  - {dataset: old, classes: {1: ball}, joint: [ball, blob]}
  - {dataset: new, classes: [blob], joint: [ball, blob]}
"""


def open_chain(root: Path, patch: pytest.MonkeyPatch) -> Chain:
    for name in FOLDERS:
        patch.setenv(name, str(root / name))
    return Chain.open(load_schedule(root / "schedule.yaml"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, module_patch) -> Path:  # noqa: F811
    """A chain of two hospitals whose step 1 is trained; it left a mask, a log and labels kept by replay as well."""
    root = tmp_path_factory.mktemp("audit")
    for seed, (name, n_cases) in enumerate({"old": 3, "new": 2, "tests": 1}.items()):
        write_tiny_dataset(root / name, n_cases=n_cases, seed=seed)
    for part in ("imagesTr", "labelsTr"):  # another name than in the other hospital
        for path in (root / "old" / part).iterdir():
            path.rename(path.with_name(path.name.replace("case", "Müller")))
    for name in FOLDERS:
        (root / name).mkdir()
    (root / "schedule.yaml").write_text(SCHEDULE, encoding="utf-8")
    module_patch.setenv("nnUNet_n_proc_DA", "0")
    module_patch.setenv("nnUNet_def_n_proc", "2")
    module_patch.setenv("nnUNet_extTrainer", driver.trainer_path_variable())
    chain = open_chain(root, module_patch)
    prepare_chain(chain, variants_of(chain, ["pgcd", "replay"], []))
    train(chain, 1)
    (fold_of(chain, 1) / "validation" / "Müller_0.nii.gz").write_bytes(b"mask")
    (chain.folder / "logs").mkdir()
    (chain.folder / "logs" / "step1.log").write_text("predicting Müller_1\npredicting Müller_2\n", encoding="utf-8")
    for number, of in enumerate((None, kept_cases_of(1))):
        cache = chain.preprocessed(2) / "pseudo_labels" / str(number)
        write_json(cache / "key.json", {} if of is None else {"of": of})
        (cache / "case_seg.b2nd").write_bytes(b"labels")
    return root


@pytest.fixture
def chain(trained, tmp_path, monkeypatch) -> Chain:
    """A copy of that chain."""
    root = tmp_path / "copy"
    shutil.copytree(trained, root)
    return open_chain(root, monkeypatch)


def root_of(chain: Chain) -> Path:
    return chain.schedule.file.parent


def files_of(*folders: Path) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*") if path.is_file()}


def counts(holdings) -> dict[str, int]:
    return {holding.what: len(holding.files) for holding in holdings}


def test_an_audit_shows_data_what_is_kept_and_where_cases_are_named(chain):
    first, second = audit_chain(chain)
    assert (first.n_cases, first.source, first.forgotten) == (3, ("old", 3), False)
    assert first.names == ("Müller_0", "Müller_1", "Müller_2")
    assert counts(first.data) == dict(zip(DATA, (3, 3, 9, 3, 2, 1), strict=True)), "with what replay has in step 2"
    assert counts(second.data) == dict(zip(DATA, (2, 2, 6, 2, 2, 0), strict=True))
    weights, prototypes, scores, rest = first.kept
    assert {path.name for path in weights.files} >= {"checkpoint_final.pth"}
    assert weights.n_bytes == sum(path.stat().st_size for path in weights.files) > 1e4
    assert (len(prototypes.files), prototypes.note) == (1, "2 x 4 floats, 2 counts")
    assert scores.files == ()
    assert {"plans.json", "debug.json", "summary.json", "dataset_fingerprint.json"} <= {p.name for p in rest.files}
    named = {path.name: names for path, names in first.ids.items()}
    whole = {name: first.names for name in ("splits_final.json", "lineage.json")}
    assert named == {**whole, "step1.log": ("Müller_1", "Müller_2")}
    assert [counts(second.kept)[what] for what in ("weights", "prototypes")] == [0, 0]


def test_each_file_of_a_trained_step_is_either_data_or_kept(chain):
    first = audit_chain(chain)[0]
    listed = {path for holding in (*first.data, *first.kept) for path in holding.files}
    own = files_of(chain.raw(1), chain.preprocessed(1), chain.paths["nnUNet_results"] / chain.dataset_name(1))
    beside = {chain.raw(1) / name for name in ("dataset.json", "cil_step.json", "files.json")}
    assert own - listed == beside
    assert listed - own == files_of(chain.preprocessed(2) / "pseudo_labels" / "1")


def test_names_of_cases_are_shown_on_request_only(chain, capsys):
    schedule = str(chain.schedule.file)
    assert main(["audit", schedule]) == 0
    shown = capsys.readouterr().out
    assert "3 cases of this step" in shown
    assert "nnUNet_preprocessed/Dataset500_tiny_step1/splits_final.json: 3" in shown
    assert "Müller" not in shown
    assert "NOT privacy-safe" not in shown
    assert main(["audit", schedule, "--names"]) == 0
    assert "logs/step1.log: Müller_1, Müller_2" in capsys.readouterr().out


def test_no_name_of_a_case_is_in_a_checkpoint(chain):
    first = audit_chain(chain)[0]
    for holding in first.kept[:2]:
        for path in holding.files:
            content = path.read_bytes()
            assert not [name for name in first.names if name.encode() in content], path


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("predicting case_1", ("case_1",)),
        ("case_10, case_11", ()),
        ("showcase_1", ()),
        ('"case_1_0000.nii.gz"', ("case_1",)),
        ("/a/case_1.pkl", ("case_1",)),
        ('["M\\u00fcller"]', ("Müller",)),
        ("Müller und case_1", ("Müller", "case_1")),
    ],
)
def test_names_are_found_as_whole_words(text, found):
    assert _named(text, {"case_1", "Müller"}) == tuple(sorted(found))


def test_without_yes_nothing_is_removed(chain, capsys):
    before = files_of(root_of(chain))
    assert main(["audit", str(chain.schedule.file), "--forget", "1"]) == 0
    shown = capsys.readouterr().out
    assert "Nothing was removed" in shown
    assert "preprocessed          9 files" in shown
    assert "replay, seed 0, step 2" in shown, "it would keep scans of this step, but was never trained"
    assert files_of(root_of(chain)) == before
    assert chain.folder / ".lock" not in before
    assert "forgotten" not in json.loads((chain.folder / "chain.json").read_text(encoding="utf-8"))


def test_what_cannot_be_forgotten_is_refused_at_once_and_nothing_is_removed(chain):
    unfinished = fold_of(chain, 1).parent / "fold_3"
    unfinished.mkdir()
    before = files_of(root_of(chain))
    with pytest.raises(ValueError, match="nothing was removed") as caught:
        forget(chain, [1, 2, 3, "joint"])
    lines = str(caught.value).splitlines()
    assert "got 3, expected some of [1, 2]" in lines[1]
    assert "got 'joint', expected some of [1, 2]" in lines[2]
    assert f"{unfinished}: got a training that has not ended" in lines[3]
    assert "step 2: got no training" in lines[4]
    assert files_of(root_of(chain)) == before


def test_data_that_later_steps_wait_for_are_not_removed(chain):
    next((chain.preprocessed(2) / "nnUNetPlans_3d_fullres").glob("*.pkl")).unlink()
    with pytest.raises(ValueError, match="step 2: got data that are not prepared"):
        check_forget(chain, [1])


def test_a_chain_without_data_has_nothing_to_audit(nnunet_folders, tmp_path, capsys):
    path = write_schedule(tmp_path / "schedule.yaml", write_tiny_dataset(tmp_path / "source", n_cases=2))
    assert main(["audit", str(path)]) == 1
    assert "got a chain without data" in capsys.readouterr().err


def test_forgotten_data_are_gone_and_all_else_stays(chain, capsys):
    first, second = audit_chain(chain)
    kept = {path for holding in (*first.kept, *second.kept) for path in holding.files}
    kept |= {path for holding in second.data for path in holding.files}
    kept |= files_of(root_of(chain) / "old", root_of(chain) / "new", root_of(chain) / "tests", chain.folder)
    before = {path: path.read_bytes() for path in kept if path.name not in ("cil_step.json", "chain.json")}
    assert main(["audit", str(chain.schedule.file), "--forget", "1", "--yes"]) == 0
    assert "DATA REMOVED" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in before}
    assert not chain.raw(1).exists()
    assert not [path for path in chain.preprocessed(1).iterdir() if path.is_dir()]
    assert not list(fold_of(chain, 1).rglob("*.nii.gz"))
    first, second = audit_chain(open_chain_again(chain))
    assert set(counts(first.data).values()) == {0}
    assert (first.forgotten, first.n_cases, first.source) == (True, 3, ("old", 3))
    assert first.ids, "names of cases are still known, and shown"
    assert "cil_step.json" not in {path.name for path in first.ids}
    assert counts(second.data)["pseudo-labels"] == 2
    shown = driver.status(chain.schedule, ["pgcd"], [])
    assert [line.split("  ")[-1].strip() for line in shown.splitlines()[1:]] == ["done, data removed", "waiting"]
    assert "label files are gone: not checked" in next(verify_chain(chain.folder, Files()))
    forget(open_chain_again(chain), [1])  # again, with nothing left to do


@pytest.mark.parametrize("moved", ["model", "fold", "validation"])
def test_what_lies_on_another_disk_behind_a_link_is_seen_and_removed(chain, tmp_path, moved):
    fold = fold_of(chain, 1)
    folder = {"model": fold.parent, "fold": fold, "validation": fold / "validation"}[moved]
    elsewhere = tmp_path / "disk" / folder.name
    elsewhere.parent.mkdir()
    shutil.move(folder, elsewhere)
    folder.symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "back").symlink_to(folder, target_is_directory=True)
    first, _ = audit_chain(chain)
    assert counts(first.data)["predicted masks"] == 1
    assert any(path.name == "checkpoint_final.pth" for path in first.kept[0].files)
    assert "lineage.json" in {path.name for path in first.ids}
    forget(chain, [1])
    assert not list(elsewhere.rglob("*.nii.gz"))


def test_masks_of_nnunets_ensembles_are_data_too(chain):
    folder = fold_of(chain, 1).parents[1] / "ensembles" / "ensemble___a__b__2d___a__b__3d_fullres___all"
    folder.mkdir(parents=True)
    for name in ("Müller_0.nii.gz", "plans.json", "postprocessing.pkl"):
        (folder / name).write_bytes(b"{}")
    assert counts(audit_chain(chain)[0].data)["predicted masks"] == 2
    forget(chain, [1])
    assert sorted(path.name for path in folder.iterdir()) == ["plans.json", "postprocessing.pkl"]


@pytest.mark.parametrize("name", ["7_0_log.out", "7_0_log.err", "7_0_result.pkl"])
def test_logs_of_jobs_that_name_a_case_are_shown(chain, name):
    (chain.folder / "jobs").mkdir()
    (chain.folder / "jobs" / name).write_bytes(b"\x80\x04 predicting " + "Müller_2".encode())
    (first, _) = audit_chain(chain)
    assert first.ids[chain.folder / "jobs" / name] == ("Müller_2",)


def open_chain_again(chain: Chain) -> Chain:
    return Chain.open(load_schedule(chain.schedule.file))


def test_an_interrupted_removal_goes_on(chain, monkeypatch):
    removed, unlink = [], Path.unlink

    def stop_at_the_fifth(path, *args, **kwargs):
        removed.append(path)
        if len(removed) == 5:
            raise KeyboardInterrupt
        unlink(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stop_at_the_fifth)
        with pytest.raises(KeyboardInterrupt):
            forget(chain, [1])
    again = open_chain_again(chain)
    left = audit_chain(again)[0]
    assert left.forgotten
    assert sum(counts(left.data).values()) == 21 - 4
    forget(again, [1])
    assert sum(counts(audit_chain(again)[0].data).values()) == 0
    assert not chain.raw(1).exists()


def test_a_later_step_trains_after_all_earlier_data_and_their_source_are_deleted(chain):
    forget(chain, [1])
    shutil.rmtree(root_of(chain) / "old")
    assert not [path for path in files_of(root_of(chain)) if "Müller" in path.name]
    chain = open_chain_again(chain)
    assert driver.prepare(chain.schedule, [], []) == [
        "nnUNetv2_train Dataset501_tiny_step2 3d_fullres all -tr nnUNetTrainerPGCD -device cpu"
    ]
    train(chain, 2)
    assert is_finished(fold_of(chain, 2))
    store = PrototypeStore.load(fold_of(chain, 2) / "prototypes.npz")
    assert store.class_names == ("background", "ball", "blob")
    assert audit_chain(chain)[0].source == ("old", 0)
    forget(chain, [2])
    assert driver.prepare(open_chain_again(chain).schedule, [], []) == []


@pytest.mark.parametrize(
    ("methods", "seeds", "message"),
    [
        (["replay"], [], "replay (not privacy-safe), seed 0, step 2 of 2, fold all: needs the data of 1"),
        (["joint"], [], "joint, seed 0, all classes, fold all: needs the data of 1"),
        ([], [1], "pgcd, seed 1, step 1 of 2, fold all: needs the data of 1"),
    ],
)
def test_what_needs_forgotten_data_is_refused_before_anything_starts(chain, methods, seeds, message):
    forget(chain, [1])
    before = files_of(root_of(chain))
    with pytest.raises(ValueError, match="--forget") as caught:
        driver.run(chain.schedule, methods, seeds)
    assert message in str(caught.value)
    assert files_of(root_of(chain)) - before <= {chain.folder / ".lock"}


def test_a_forgotten_step_cannot_be_trained_by_hand(chain):
    forget(chain, [1])
    with pytest.raises(ValueError, match="a step whose data were removed"):
        check_step_files(chain.preprocessed(1), "nnUNetPlans_3d_fullres")


def test_a_source_that_is_gone_while_the_chain_has_its_data_is_told(chain):
    shutil.rmtree(root_of(chain) / "old")
    schedule = load_schedule(chain.schedule.file)
    with pytest.raises(ValueError, match=r"step 1: got a dataset that is gone, .*--forget 1"):
        driver.prepare(schedule, [], [])
    shutil.rmtree(chain.folder / "sources")
    with pytest.raises(ScheduleError, match=r"got no folder .*old, expected a raw dataset"):
        load_schedule(chain.schedule.file)


def test_what_is_kept_of_a_source_is_that_of_its_step_behind_a_given_model_too(nnunet_folders, tmp_path):
    write_model(tmp_path / MODEL, labels={"background": 0, "ball": 1})
    path = tmp_path / "schedule.yaml"
    path.write_text(f"name: longer\nmodel: {MODEL}\nsteps: [{{dataset: new, classes: {{2: blob}}}}]\n")
    labels = {"background": 0, "ball": 1, "blob": 2}
    kept = {"channel_names": {"0": "MR"}, "file_ending": ".nii.gz", "labels": labels, "dataset": {}}
    sources = nnunet_folders["nnUNet_results"] / "chain_longer" / "sources"
    write_json(sources / "step1" / "dataset.json", kept)
    with pytest.raises(ScheduleError, match=r"got no folder .*new, expected a raw dataset"):
        load_schedule(path)
    write_json(sources / "step2" / "dataset.json", kept)
    schedule = load_schedule(path)
    assert schedule.steps[1].dataset == sources / "step2"
    assert schedule.steps[1].class_map == {"blob": "blob"}


def finish(chain: Chain, step: int | str, method: str = "pgcd") -> Path:
    """As if a step were trained."""
    fold = fold_of(chain, step, method)
    write_json(fold / "validation" / "summary.json", {})
    (fold / "checkpoint_final.pth").write_bytes(b"weights")
    n, d = 2, 3
    values = {"counts": np.ones(n), "spread": np.ones(n), "centre": np.ones(d), "tau": 0.1, "stale": np.zeros(n, bool)}
    names = {"class_names": ("background", "ball"), "checkpoint_sha256": "", "feature_path": "decoder"}
    PrototypeStore(**values, **names, means=np.ones((n, d)), step=1).save(fold / "prototypes.npz")
    return fold


@pytest.fixture
def cut_up(nnunet_folders, tmp_path) -> Chain:
    """One dataset, cut up: both steps and joint have the same images, as hard links."""
    path = write_schedule(tmp_path / "schedule.yaml", write_tiny_dataset(tmp_path / "source", n_cases=3))
    chain = Chain.open(load_schedule(path))
    prepare_chain(chain, variants_of(chain, ["pgcd", "joint", "replay"], []))
    return chain


def test_shared_images_stay_with_the_steps_that_share_them(cut_up):
    finish(cut_up, 1)
    first = audit_chain(cut_up)[0]
    notes = {holding.what: holding.note for holding in first.data}
    assert notes["raw images"] == "2 also in joint, 2 also in step 2, 2 also in your source"
    assert notes["preprocessed"] == "2 also in joint, 2 also in step 2"
    assert notes["raw labels"] == notes["gt_segmentations"] == ""
    assert "cut up" in audit_text(cut_up, [first])
    later = {path: path.read_bytes() for step in (2, "joint") for path in files_of(cut_up.raw(step))}
    later |= {path: path.read_bytes() for path in files_of(cut_up.preprocessed(2), cut_up.schedule.source)}
    forget(cut_up, [1])
    assert later == {path: path.read_bytes() for path in later}
    assert not cut_up.raw(1).exists()
    prepare_chain(cut_up, variants_of(cut_up, ["pgcd", "joint"], []))
    assert not cut_up.raw(1).exists(), "it is not made again"


def test_replay_and_joint_are_shown_as_what_they_are(cut_up):
    finish(cut_up, 1)
    finish(cut_up, "joint", "joint")
    listing = {"bytes": 12_345_678, "cases": {"step1": ["case_0", "case_1"]}}
    write_json(finish(cut_up, 2, "replay") / "replay.json", listing)
    finish(cut_up, 2)
    second, joint = audit_chain(cut_up)[1:]
    replay = "nnUNetTrainerReplay__nnUNetPlans_replay__3d_fullres"
    assert second.beyond == {replay: "2 scans of earlier steps, 12.3 MB, which replay keeps: NOT privacy-safe"}
    (told,) = joint.beyond.values()
    assert "NOT privacy-safe" in told
    assert cut_up.raw("joint") / "imagesTr" / "case_0_0000.nii.gz" in joint.data[0].files
    assert replay in audit_text(cut_up, [second])
    forget(cut_up, [1, "joint"])
    assert cut_up.forgotten == (1, "joint")
    assert not cut_up.raw("joint").exists()
    prepare_chain(cut_up, variants_of(cut_up, ["joint"], []))
    assert not cut_up.raw("joint").exists()


def test_data_that_a_training_of_a_later_step_has_begun_with_are_not_removed(cut_up):
    finish(cut_up, 1)
    begun = fold_of(cut_up, 2, "replay")
    begun.mkdir(parents=True)
    with pytest.raises(ValueError, match="got a training that has not ended, expected it to") as caught:
        check_forget(cut_up, [1])
    assert str(begun) in str(caught.value)
    finish(cut_up, 2, "replay")
    assert check_forget(cut_up, [1]).lost == ()


def test_own_data_that_joint_has_begun_with_are_not_removed(chain):
    prepare_chain(chain, variants_of(chain, ["joint"], []))
    begun = fold_of(chain, "joint", "joint")
    begun.mkdir(parents=True)
    with pytest.raises(ValueError, match="got a training that has not ended, expected it to") as caught:
        check_forget(chain, [1])
    assert str(begun) in str(caught.value)
    finish(chain, "joint", "joint")
    check_forget(chain, [1])


def test_what_a_forgotten_step_was_trained_on_is_not_scored(cut_up):
    finish(cut_up, 1)
    finish(cut_up, 2)
    forget(cut_up, [1, 2])
    path = cut_up.schedule.file
    path.write_text(path.read_text(encoding="utf-8").replace(f"{cut_up.schedule.source}/split.json", "[case_0]"))
    chain = open_chain_again(cut_up)
    with pytest.raises(ValueError, match=r"test: got \['case_0'\], which step 1 was trained on"):
        prepare_chain(chain, variants_of(chain, [], []))


def test_a_dataset_of_somebody_else_is_not_touched(cut_up):
    finish(cut_up, 1)
    write_json(cut_up.raw(1) / "cil_step.json", {"chain": "other", "step": 1, "n_cases": 2})
    before = files_of(cut_up.raw(1))
    with pytest.raises(FileExistsError, match="not touched"):
        forget(cut_up, [1])
    assert files_of(cut_up.raw(1)) == before


def test_a_link_into_the_users_data_is_removed_and_not_followed(cut_up):
    """Where hard links are impossible, images are symbolic links."""
    finish(cut_up, 1)
    for path in list((cut_up.raw(1) / "imagesTr").iterdir()):
        path.unlink()
        os.symlink(cut_up.schedule.source / "imagesTr" / path.name, path)
    assert "2 also in your source" in audit_chain(cut_up)[0].data[0].note
    (cut_up.schedule.source / "imagesTr" / "case_0_0000.nii.gz").unlink()
    found = audit_chain(cut_up)
    assert len(found[0].data[0].files) == 2, "a link that leads nowhere is shown, and removed"
    assert "1 also in your source" in audit_text(cut_up, found)
    theirs = files_of(cut_up.schedule.source)
    forget(cut_up, [1])
    assert files_of(cut_up.schedule.source) == theirs
    assert not cut_up.raw(1).exists()
