"""Lineage: what it says, that it holds wherever a chain lies, and that whatever is changed is found and named."""

from __future__ import annotations

import getpass
import json
import platform
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from nnunet_cil.chain import Chain, is_finished
from nnunet_cil.cli.main import main
from nnunet_cil.export import CARD_FILE, export_model
from nnunet_cil.lineage import (
    CHAIN_FILE,
    GIVEN,
    LINEAGE_FILE,
    Files,
    check_fold,
    read_sealed,
    sealed,
    teacher_link,
)
from nnunet_cil.schedule import load_schedule
from nnunet_cil.step_files import STEP_FILE, write_json
from nnunet_cil.teacher import sha256_of
from tests.test_trainer import fold_of, make_chain, module_patch, train, trainer_of  # noqa: F401  (a fixture)

MODEL = "nnUNetTrainerPGCD__nnUNetPlans__3d_fullres"
FOLDS = [f"Dataset50{step - 1}_tiny_step{step}/{MODEL}/fold_all" for step in (1, 2)]
ROOTS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
BOTH_SIDES = r"got sha256 [0-9a-f]{64}, expected sha256 [0-9a-f]{64} as \S+lineage.json says"


@pytest.fixture(scope="module")
def chain(tmp_path_factory, module_patch) -> Chain:  # noqa: F811
    """Two trained steps; tests leave it as it is."""
    chain = make_chain(tmp_path_factory.mktemp("lineage"), module_patch, ("pgcd",))
    for step in (1, 2):
        train(chain, step)
    return chain


@pytest.fixture
def copy(chain, tmp_path) -> Path:
    """The three folders of the chain elsewhere, while the environment names the original."""
    for name, folder in chain.paths.items():
        shutil.copytree(folder, tmp_path / name)
    return tmp_path


@pytest.fixture
def copied_chain(chain, copy, monkeypatch) -> Chain:
    """The chain elsewhere, and the environment with it."""
    for name in ROOTS:
        monkeypatch.setenv(name, str(copy / name))
    return Chain.open(load_schedule(chain.schedule.file))


@pytest.fixture
def verify(capsys):
    """Runs ``nnunet-cil verify``; returns its status, and what it printed or the error."""

    def run(target: Path) -> tuple[int, str]:
        status = main(["verify", str(target)])
        shown = capsys.readouterr()
        return status, shown.err if status else shown.out

    return run


def flip(path: Path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.unlink()  # a hard link would change, too
    path.write_bytes(content)


def rewrite(path: Path, change) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    write_json(path, sealed(content) if "digest" in content else content)


def lineage_of(results: Path, step: int) -> dict:
    return json.loads((results / FOLDS[step - 1] / LINEAGE_FILE).read_text(encoding="utf-8"))


def test_lineage_says_what_a_training_was_made_of(chain):
    results = chain.paths["nnUNet_results"]
    first, second = (lineage_of(results, step) for step in (1, 2))
    for step, lineage in ((1, first), (2, second)):
        fold = results / FOLDS[step - 1]
        plans = json.loads((fold.parent / "plans.json").read_text(encoding="utf-8"))
        assert lineage["folder"] == FOLDS[step - 1]
        assert lineage["trainer"] == "nnUNetTrainerPGCD"
        assert lineage["cil"] == plans["cil"]
        assert lineage["cil"]["training"]["seed"] == 0
        assert set(lineage["versions"]) == {"python", "nnunet-cil", "nnunetv2", "torch", "numpy"}
        assert set(lineage["files"]) == {"plans.json", "dataset.json", "checkpoint_final.pth", "prototypes.npz"}
        for name in ("checkpoint_final.pth", "prototypes.npz"):
            assert lineage["files"][name] == sha256_of(fold / name)
        labels = chain.raw(step) / "labelsTr"
        assert lineage["labels"]["files"] == {path.name: sha256_of(path) for path in labels.iterdir()}
        assert list(fold.glob(".*")) == []
    assert first["teacher"] is None
    assert second["teacher"] == {
        "folder": FOLDS[0],
        "lineage": first["digest"],
        "files": {name: first["files"][name] for name in ("checkpoint_final.pth", "prototypes.npz")},
    }
    assert first["chain"] == second["chain"]


def test_nothing_of_a_machine_or_a_person_is_in_it(chain):
    for path in chain.paths["nnUNet_results"].rglob(LINEAGE_FILE):
        text = path.read_text(encoding="utf-8")
        assert str(chain.paths["nnUNet_results"].parent) not in text
        for word in (platform.node(), getpass.getuser()):
            assert not re.search(rf"\b{re.escape(word)}\b", text)


def test_a_chain_verifies_by_folder_and_by_schedule(chain, verify):
    status, shown = verify(chain.folder)
    assert status == 0
    assert shown.splitlines() == [
        f"{FOLDS[0]}: 4 files, 5 label files",
        f"{FOLDS[1]}: 4 files, 5 label files; teacher {FOLDS[0]}",
        "all 35 files fit",  # for each step: 4, its lineage, 5 labels in two places and 2 on how they count; chain.json
    ]
    assert verify(chain.schedule.file) == (0, shown)


@pytest.mark.parametrize("where", [("folder",), ("exported_from", "lineage")])
def test_codes_for_a_terminal_in_the_lineage_of_an_export_are_not_printed(chain, tmp_path, verify, where):
    export_model(chain, chain.variant("pgcd", 0), 2, ["all"], tmp_path / "out", None)
    (lineage,), (card,) = ((tmp_path / "out").rglob(name) for name in (LINEAGE_FILE, CARD_FILE))

    def write_code(content: dict) -> None:
        for key in where[:-1]:
            content = content[key]
        content[where[-1]] = "Dataset501\x1b[2Jall files fit"

    rewrite(lineage, write_code)
    rewrite(card, lambda content: content["sha256"].update({f"fold_all/{LINEAGE_FILE}": sha256_of(lineage)}))
    status, shown = verify(tmp_path / "out")
    assert "\x1b" not in shown
    assert status == 1
    assert "got content or names that are none of a lineage" in shown


def test_a_schedule_whose_data_are_gone_still_finds_its_chain(chain, tmp_path, verify):
    path = tmp_path / "schedule.yml"
    path.write_text("name: tiny\nsource: /nowhere\n")
    assert verify(path)[0] == 0
    for text, message in (
        ("name: other", "got no file, expected"),
        ("steps: []", "got no name"),
        ("name: [", "got no valid YAML"),
    ):
        path.write_text(text)
        status, shown = verify(path)
        assert status == 1
        assert message in shown


def test_a_moved_chain_is_verified_where_it_is(copy, verify):
    folder = copy / "nnUNet_results" / "chain_tiny"
    assert verify(folder)[0] == 0
    damaged = copy / "nnUNet_raw" / "Dataset501_tiny_step2" / "labelsTr" / "case_2.nii.gz"
    flip(damaged)
    status, shown = verify(folder)
    assert status == 1
    assert f"{damaged}: got sha256" in shown, "not the labels that the environment leads to"


ARTEFACTS = {
    "checkpoint": ("nnUNet_results", f"{FOLDS[1]}/checkpoint_final.pth"),
    "prototypes": ("nnUNet_results", f"{FOLDS[0]}/prototypes.npz"),
    "plans": ("nnUNet_results", f"Dataset501_tiny_step2/{MODEL}/plans.json"),
    "dataset.json": ("nnUNet_results", f"Dataset500_tiny_step1/{MODEL}/dataset.json"),
    "lineage": ("nnUNet_results", f"{FOLDS[1]}/{LINEAGE_FILE}"),
    "lineage of the teacher": ("nnUNet_results", f"{FOLDS[0]}/{LINEAGE_FILE}"),
    "chain.json": ("nnUNet_results", "chain_tiny/chain.json"),
    "raw label": ("nnUNet_raw", "Dataset500_tiny_step1/labelsTr/case_0.nii.gz"),
    "folds": ("nnUNet_preprocessed", "Dataset501_tiny_step2/splits_final.json"),
    "preprocessed label": ("nnUNet_preprocessed", "Dataset501_tiny_step2/gt_segmentations/case_3.nii.gz"),
}


@pytest.mark.parametrize("at", [0, 0.3, 0.7, 1])
@pytest.mark.parametrize("name", ARTEFACTS)
def test_a_flipped_byte_is_found_and_named(copy, verify, name, at):
    path = copy / Path(*ARTEFACTS[name])
    flip(path, at)
    status, shown = verify(copy / "nnUNet_results" / "chain_tiny")
    assert status == 1
    assert shown.startswith(f"nnunet-cil: error: {path}: got ")
    assert "expected" in shown


@pytest.mark.parametrize("name", ARTEFACTS)
def test_a_missing_file_is_named(copy, verify, name):
    path = copy / Path(*ARTEFACTS[name])
    path.unlink()
    status, shown = verify(copy / "nnUNet_results" / "chain_tiny")
    if name == "chain.json":
        assert "got no model_card.json" in shown
    else:
        assert f"{path}: got no file" in shown
    assert status == 1


def test_every_flipped_byte_of_a_sealed_file_is_found(tmp_path):
    path = tmp_path / "sealed.json"
    content = {"text": "ä", "numbers": [1, 1.0, 0.30000000000000004, 5e-324], "nothing": None, "deep": {"yes": True}}
    write_json(path, sealed(content))
    assert read_sealed(path) == sealed(content)
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(ValueError, match=r"sealed\.json: got"):
            read_sealed(path)


def change_schedule(content):
    content["schedule"]["method"]["eta"] = 0.5


def change_number(content):
    content["datasets"][1] = content["joint"]


def change_teacher(content):
    content["versions"]["torch"] = "0.0"


def change_plans(content):
    content["cil"]["settings"]["eta"] = 0.5


@pytest.mark.parametrize(
    ("name", "change", "named_by"),
    [
        ("chain.json", change_schedule, FOLDS[0]),
        ("chain.json", change_number, FOLDS[0]),
        ("lineage of the teacher", change_teacher, FOLDS[1]),
        ("plans", change_plans, FOLDS[1]),
    ],
)
def test_what_is_changed_and_sealed_again_does_not_fit_the_next_link(copy, verify, name, change, named_by):
    path = copy / Path(*ARTEFACTS[name])
    rewrite(path, change)
    status, shown = verify(copy / "nnUNet_results" / "chain_tiny")
    assert status == 1
    assert re.search(f"{re.escape(str(path))}: {BOTH_SIDES}", shown)
    assert f"{named_by}/{LINEAGE_FILE} says" in shown


def test_other_cases_that_lack_labels_are_found(copy, verify):
    """An organ that nobody outlined leaves no trace in the labels."""
    path = copy / "nnUNet_preprocessed" / "Dataset501_tiny_step2" / STEP_FILE
    rewrite(path, lambda content: content.update(n_cases=5.0))
    assert verify(copy / "nnUNet_results" / "chain_tiny")[0] == 0
    rewrite(path, lambda content: content.update(labelled={"case_0": []}))
    status, shown = verify(copy / "nnUNet_results" / "chain_tiny")
    assert status == 1
    assert re.search(f"{re.escape(str(path))}: {BOTH_SIDES}", shown)


def test_a_lineage_of_an_earlier_version_without_them_is_verified(copy, verify):
    rewrite(copy / "nnUNet_results" / FOLDS[1] / LINEAGE_FILE, lambda content: content["labels"].pop("counted_by"))
    assert verify(copy / "nnUNet_results" / "chain_tiny")[0] == 0


def test_a_training_that_lacks_its_validation_alone_makes_nothing_else_anew(copied_chain, verify):
    fold = fold_of(copied_chain, 1)
    shutil.rmtree(fold / "validation")
    assert not is_finished(fold)
    names = ("checkpoint_final.pth", "prototypes.npz", "cost.json", LINEAGE_FILE)
    before = {name: (fold / name).read_bytes() for name in names}
    train(copied_chain, 1, resume=True)
    assert is_finished(fold)
    assert {name: (fold / name).read_bytes() for name in names} == before
    assert verify(copied_chain.folder)[0] == 0


def test_settings_of_a_later_version_and_what_may_change_do_not_matter(copy, verify):
    def grow_chain(content):
        content["forgotten"] = [1]
        content["schedule"] |= {"device": "cuda", "test": None, "new_key": None}
        content["schedule"]["method"]["new_setting"] = 3
        content["schedule"]["training"] |= {"new_setting": 3, "initial_lr": 0.01, "epochs": 1.0}

    def grow_plans(content):
        content["cil"]["new_key"] = None
        content["cil"]["settings"]["new_setting"] = 3

    rewrite(copy / Path(*ARTEFACTS["chain.json"]), grow_chain)
    rewrite(copy / Path(*ARTEFACTS["plans"]), grow_plans)
    assert verify(copy / "nnUNet_results" / "chain_tiny")[0] == 0


def test_labels_that_were_removed_are_not_checked_but_strange_ones_are_found(copy, verify):
    folder = copy / "nnUNet_results" / "chain_tiny"
    raw, preprocessed = (copy / root / "Dataset500_tiny_step1" for root in ROOTS[:2])
    shutil.rmtree(raw / "labelsTr")
    assert f"{FOLDS[0]}: 4 files, 5 label files\n" in verify(folder)[1]
    shutil.rmtree(preprocessed / "gt_segmentations")
    status, shown = verify(folder)
    assert status == 0
    assert f"{FOLDS[0]}: 4 files, label files are gone: not checked\n" in shown
    strange = copy / "nnUNet_raw" / "Dataset501_tiny_step2" / "labelsTr" / "case_9.nii.gz"
    strange.write_bytes(b"new")
    status, shown = verify(folder)
    assert status == 1
    assert f"{strange}: got a label file that" in shown


def test_trainings_that_are_not_finished_or_not_ours_are_no_links(copy, verify):
    results = copy / "nnUNet_results"
    for name in (
        f"Dataset501_tiny_step2/{MODEL}/fold_0",
        "Dataset501_tiny_step2/nnUNetTrainer__nnUNetPlans__2d/fold_0",
    ):
        (results / name).mkdir(parents=True)
        (results / name / "checkpoint_latest.pth").write_bytes(b"")
    assert verify(results / "chain_tiny")[0] == 0
    for fold in FOLDS:
        shutil.rmtree(results / fold)
    assert "got no lineage.json, expected a chain with a finished training" in verify(results / "chain_tiny")[1]


def test_a_copied_fold_is_neither_verified_nor_a_teacher(copy, verify):
    fold = copy / "nnUNet_results" / FOLDS[1]
    other = shutil.copytree(fold, fold.with_name("fold_0"))
    status, shown = verify(copy / "nnUNet_results" / "chain_tiny")
    assert status == 1
    assert f"{other / LINEAGE_FILE}: got the lineage of {FOLDS[1]}" in shown
    sha256 = sha256_of(other / "checkpoint_final.pth")
    with pytest.raises(ValueError, match=f"teacher: .*got the lineage of {FOLDS[1]}"):
        teacher_link(other, "checkpoint_final.pth", sha256, "tiny")
    assert teacher_link(other, "checkpoint_final.pth", sha256, "another")["folder"].endswith("fold_0"), "given to it"


def test_a_model_without_lineage_is_named_by_its_files(copy):
    fold = copy / "nnUNet_results" / FOLDS[0]
    (fold / LINEAGE_FILE).unlink()
    sha256 = sha256_of(fold / "checkpoint_final.pth")
    link = teacher_link(fold, "checkpoint_final.pth", sha256, "tiny")
    assert link["lineage"] == GIVEN
    assert list(link["files"]) == ["plans.json", "dataset.json", "checkpoint_final.pth", "prototypes.npz"]
    assert link["files"]["checkpoint_final.pth"] == sha256


def test_an_exchanged_teacher_is_refused_with_both_hashes(copied_chain):
    path = fold_of(copied_chain, 1) / "checkpoint_final.pth"
    before = sha256_of(path)
    checkpoint = torch.load(path, weights_only=False)
    for weight in checkpoint["network_weights"].values():
        weight += 1e-3
    torch.save(checkpoint, path)
    trainer = trainer_of(copied_chain, 2)
    with pytest.raises(ValueError, match="teacher: ") as caught:
        trainer.on_train_start()
    assert f"{path}: got sha256 {sha256_of(path)}, expected sha256 {before}" in str(caught.value)


def test_a_teacher_with_other_plans_than_its_lineage_is_refused(copied_chain):
    """Other plans than the network's: what differs would not be found by comparing with the step's own."""
    path = fold_of(copied_chain, 1).parent / "plans.json"
    rewrite(path, lambda content: content["cil"]["training"].update(epochs=7))
    with pytest.raises(ValueError, match=f"teacher: {re.escape(str(path))}: {BOTH_SIDES}"):
        trainer_of(copied_chain, 2).on_train_start()


def test_a_training_does_not_go_on_with_a_teacher_that_was_trained_anew(copied_chain):
    fold = fold_of(copied_chain, 2)
    (fold / "checkpoint_final.pth").rename(fold / "checkpoint_latest.pth")
    before = sha256_of(fold_of(copied_chain, 1) / "checkpoint_final.pth")
    trainer_of(copied_chain, 2, resume=True).on_train_start()
    train(copied_chain, 1)
    after = sha256_of(fold_of(copied_chain, 1) / "checkpoint_final.pth")
    with pytest.raises(ValueError, match=f"got a checkpoint of sha256 {after} .* expected {before}"):
        trainer_of(copied_chain, 2, resume=True).on_train_start()


@pytest.mark.faults("kill -9", "the same command goes on, and ends as if nothing had been", "unfinished epoch")
def test_a_training_has_not_ended_before_its_lineage_is_written(copied_chain, monkeypatch):
    fold = fold_of(copied_chain, 1)
    for name in ("prototypes.npz", LINEAGE_FILE):
        (fold / name).unlink()
    with monkeypatch.context() as patch:
        patch.setattr("nnunet_cil.lineage.write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(copied_chain, 1, resume=True)
    assert not copied_chain.trained(copied_chain.variant("pgcd", 0), 1, "all")
    train(copied_chain, 1, resume=True)
    assert copied_chain.trained(copied_chain.variant("pgcd", 0), 1, "all")
    check_fold(fold, Files())


@pytest.fixture(scope="module")
def exported_zip(chain, tmp_path_factory) -> Path:
    return export_model(chain, chain.variant("pgcd", 0), 2, ["all"], tmp_path_factory.mktemp("out") / "tiny", None)


INNER = "Dataset501_tiny_step2/nnUNetTrainer__nnUNetPlans__3d_fullres"


def test_an_export_carries_its_lineage_without_names_and_verifies(chain, exported_zip, verify):
    folder = exported_zip.with_suffix("")
    lineage = json.loads((folder / INNER / "fold_all" / LINEAGE_FILE).read_text(encoding="utf-8"))
    own = lineage_of(chain.paths["nnUNet_results"], 2)
    assert lineage["labels"] == {"sha256": own["labels"]["sha256"], "n_files": 5}
    assert "case_" not in json.dumps(lineage)
    assert lineage["teacher"] == own["teacher"]
    assert lineage["exported_from"] == {
        "lineage": own["digest"],
        "checkpoint_final.pth": own["files"]["checkpoint_final.pth"],
    }
    for target in (folder, exported_zip):
        status, shown = verify(target)
        assert status == 0
        assert own["digest"] in shown
        assert shown.endswith("all 7 files fit\n")


def test_an_export_of_an_exchanged_model_is_refused(copied_chain, tmp_path):
    flip(fold_of(copied_chain, 2) / "prototypes.npz")
    with pytest.raises(ValueError, match=f"prototypes.npz: {BOTH_SIDES}"):
        export_model(copied_chain, copied_chain.variant("pgcd", 0), 2, ["all"], tmp_path / "out", None)
    assert not list(tmp_path.glob("out*"))


def members() -> list[str]:
    names = ("plans.json", "dataset.json", "dataset_fingerprint.json", CARD_FILE)
    return [*names, *(f"fold_all/{name}" for name in ("checkpoint_final.pth", "prototypes.npz", LINEAGE_FILE))]


@pytest.mark.parametrize("name", members())
def test_a_flipped_byte_of_an_export_is_found_and_named(exported_zip, tmp_path, verify, name):
    folder = shutil.copytree(exported_zip.with_suffix(""), tmp_path / "tiny")
    flip(folder / INNER / name)
    status, shown = verify(folder)
    assert status == 1
    assert f"{folder / INNER / name}: got " in shown or f"{folder / INNER / CARD_FILE}: got " in shown
    path = Path(shutil.copy(exported_zip, tmp_path / "copy.zip"))
    with zipfile.ZipFile(path) as zipped:
        entry = zipped.getinfo(f"{INNER}/{name}")
    content = bytearray(path.read_bytes())
    start = entry.header_offset + 30 + len(entry.filename)
    content[start + entry.compress_size // 2] ^= 1
    path.write_bytes(content)
    status, shown = verify(path)
    assert status == 1
    assert name in shown


def test_an_export_with_a_file_too_many_or_few_does_not_verify(exported_zip, tmp_path, verify):
    folder = shutil.copytree(exported_zip.with_suffix(""), tmp_path / "tiny")
    (folder / INNER / ".DS_Store").write_bytes(b"of a file manager")
    assert verify(folder)[0] == 0
    (folder / INNER / "fold_0").mkdir()
    (folder / INNER / "fold_0" / "checkpoint_final.pth").write_bytes(b"")
    assert "fold_0/checkpoint_final.pth: got a file, expected none" in verify(folder)[1]
    shutil.rmtree(folder / INNER / "fold_0")
    (folder / INNER / "fold_all" / LINEAGE_FILE).unlink()
    assert f"{LINEAGE_FILE}: got no file, expected one" in verify(folder)[1]


def test_an_export_of_an_earlier_version_is_compared_with_its_card(exported_zip, tmp_path, verify):
    folder = shutil.copytree(exported_zip.with_suffix(""), tmp_path / "tiny")
    (folder / INNER / "fold_all" / LINEAGE_FILE).unlink()
    card = json.loads((folder / INNER / CARD_FILE).read_text(encoding="utf-8"))
    del card["digest"], card["sha256"][f"fold_all/{LINEAGE_FILE}"]
    write_json(folder / INNER / CARD_FILE, card)
    status, shown = verify(folder)
    assert status == 0
    assert "no lineage.json: exported by an earlier version" in shown


def test_a_chain_of_an_earlier_version_says_what_it_lacks(copy, verify):
    folder = copy / "nnUNet_results" / "chain_tiny"
    (copy / "nnUNet_results" / FOLDS[1] / LINEAGE_FILE).unlink()
    assert f"{FOLDS[1]}/{LINEAGE_FILE}: got no file, expected the lineage of this training" in verify(folder)[1]
    rewrite(folder / CHAIN_FILE, lambda content: content.pop("digest"))
    status, shown = verify(folder)
    assert status == 1
    assert f"{folder / CHAIN_FILE}: got content without a digest" in shown
