from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

from nnunet_cil.chain import FIRST_FREE_ID, JOINT, Chain, Variant, method_of, resolve_method
from nnunet_cil.schedule import Schedule, load_schedule
from nnunet_cil.step_files import STEP_FILE, write_json
from tests.conftest import write_schedule, write_tiny_dataset

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("chain") / "source", n_cases=2)


@pytest.fixture
def schedule(nnunet_folders, tmp_path, source) -> Schedule:
    return load_schedule(write_schedule(tmp_path / "schedule.yaml", source))


@pytest.fixture
def chain(schedule) -> Chain:
    """A chain of two steps that has its plans' name, as after planning."""
    chain = Chain.open(schedule)
    chain.content["plans_name"] = "nnUNetPlans"
    return chain


def numbers(chain: Chain) -> list[int]:
    return [*chain.content["datasets"], chain.content[JOINT]]


def start(chain: Chain, planned: bool = True, begun: bool = True) -> None:
    """What matters to a later opening: chain.json, the raw datasets of the steps, and a training of the first one."""
    chain.content["plans_name"] = "nnUNetPlans" if planned else None
    chain.save()
    for step in range(1, chain.n_steps + 1):
        write_json(chain.raw(step) / STEP_FILE, {"chain": chain.schedule.name, "step": step, "n_cases": 1})
    if planned and begun:
        write_json(chain.results(1) / "model" / "plans.json", {})


def test_new_chain_has_consecutive_numbers_and_one_for_joint(schedule):
    chain = Chain.open(schedule)
    assert numbers(chain) == [FIRST_FREE_ID, FIRST_FREE_ID + 1, FIRST_FREE_ID + 2]
    assert chain.dataset_name(1) == f"Dataset{FIRST_FREE_ID}_tiny_step1"
    assert chain.dataset_name(JOINT) == f"Dataset{FIRST_FREE_ID + 2}_tiny_joint"
    assert [chain.dataset_id(step) for step in (1, 2, JOINT)] == numbers(chain)


def test_opening_writes_nothing(schedule, nnunet_folders):
    Chain.open(schedule)
    assert all(not list(folder.iterdir()) for folder in nnunet_folders.values())


@pytest.mark.parametrize("place", FOLDERS)
def test_taken_numbers_are_skipped(schedule, nnunet_folders, place):
    for number in (FIRST_FREE_ID, FIRST_FREE_ID + 3):
        (nnunet_folders[place] / f"Dataset{number}_theirs").mkdir()
    assert numbers(Chain.open(schedule)) == [FIRST_FREE_ID + n for n in (4, 5, 6)]


def test_a_gap_that_is_just_wide_enough_is_taken(schedule, nnunet_folders):
    (nnunet_folders["nnUNet_raw"] / f"Dataset{FIRST_FREE_ID + 3}_theirs").mkdir()
    assert numbers(Chain.open(schedule))[0] == FIRST_FREE_ID


def test_no_free_numbers_are_refused(schedule, nnunet_folders):
    for number in range(FIRST_FREE_ID, 1000, 3):
        (nnunet_folders["nnUNet_raw"] / f"Dataset{number}_theirs").mkdir()
    with pytest.raises(ValueError, match=r"schedule.yaml: got no 3 free dataset numbers from 500 to 999"):
        Chain.open(schedule)


def test_numbers_stay_on_reopening(schedule):
    start(Chain.open(schedule))
    again = Chain.open(schedule)
    assert numbers(again) == [FIRST_FREE_ID, FIRST_FREE_ID + 1, FIRST_FREE_ID + 2]


def test_two_chains_have_different_numbers(schedule, tmp_path, source):
    first = Chain.open(schedule)
    start(first)
    second = Chain.open(load_schedule(write_schedule(tmp_path / "other.yaml", source, name="other")))
    assert not set(first.content["datasets"]) & set(numbers(second))


def test_two_chains_that_start_at_once_have_different_numbers(schedule, tmp_path, source):
    first = Chain.open(schedule)
    second = Chain.open(load_schedule(write_schedule(tmp_path / "other.yaml", source, name="other")))
    first.claim_numbers()
    second.claim_numbers()
    assert not set(numbers(first)) & set(numbers(second))
    for chain in (first, second):
        before = numbers(chain)
        chain.claim_numbers()  # the numbers are its own now
        assert numbers(chain) == numbers(Chain.open(chain.schedule)) == before


def test_locks_in_a_folder_that_users_share_are_for_all_of_them(schedule, nnunet_folders):
    before = os.umask(0o022)
    try:
        chain = Chain.open(schedule)
        chain.claim_numbers()
        with chain.locked(), chain.locked("part"):
            pass
    finally:
        os.umask(before)
    locks = {path.name: path.stat().st_mode & 0o777 for path in nnunet_folders["nnUNet_results"].rglob("*.lock")}
    assert locks == dict.fromkeys((".nnunet_cil.lock", ".lock", "part.lock"), 0o666)


def test_no_other_chain_gets_the_number_kept_for_joint(schedule, tmp_path, source):
    first = Chain.open(schedule)
    start(first)
    second = Chain.open(load_schedule(write_schedule(tmp_path / "other.yaml", source, name="other")))
    assert first.content[JOINT] not in numbers(second)


def test_given_numbers_are_used(nnunet_folders, tmp_path, source):
    path = write_schedule(tmp_path / "schedule.yaml", source, extra="dataset_id: 42")
    chain = Chain.open(load_schedule(path))
    assert numbers(chain) == [42, 43, 44]
    assert chain.dataset_name(1) == "Dataset042_tiny_step1"
    assert chain.dataset_id(1) == 42


@pytest.mark.parametrize("place", FOLDERS)
@pytest.mark.parametrize("taken", [42, 44])
def test_given_numbers_that_are_taken_are_refused(nnunet_folders, tmp_path, source, taken, place):
    theirs = nnunet_folders[place] / f"Dataset0{taken}_Theirs"
    theirs.mkdir()
    path = write_schedule(tmp_path / "schedule.yaml", source, extra="dataset_id: 42")
    with pytest.raises(ValueError, match=rf"schedule.yaml: dataset_id: got 42, .*\['Dataset0{taken}_Theirs'\]"):
        Chain.open(load_schedule(path))
    assert [path for folder in nnunet_folders.values() for path in folder.rglob("*")] == [theirs]


def test_given_numbers_end_at_999(nnunet_folders, tmp_path):
    names = [f"organ_{i}" for i in range(10)]
    for name in ("imagesTr", "labelsTr"):
        (tmp_path / "ten" / name).mkdir(parents=True)
    labels = {"background": 0, **{name: value for value, name in enumerate(names, 1)}}
    write_json(
        tmp_path / "ten" / "dataset.json",
        {"channel_names": {"0": "MR"}, "labels": labels, "file_ending": ".nii.gz", "numTraining": 0},
    )
    content = {"name": "ten", "source": "ten", "dataset_id": 990, "steps": [[name] for name in names]}
    (tmp_path / "ten.yaml").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"ten.yaml: dataset_id: got 990, expected at most 989"):
        Chain.open(load_schedule(tmp_path / "ten.yaml"))
    (tmp_path / "ten.yaml").write_text(json.dumps({**content, "dataset_id": 989}))
    assert Chain.open(load_schedule(tmp_path / "ten.yaml")).dataset_id(JOINT) == 999


def test_hyphens_become_underscores_in_dataset_names_only(nnunet_folders, tmp_path, source):
    chain = Chain.open(load_schedule(write_schedule(tmp_path / "schedule.yaml", source, name="organs_1-1")))
    assert chain.dataset_name(2) == f"Dataset{FIRST_FREE_ID + 1}_organs_1_1_step2"
    assert chain.folder == nnunet_folders["nnUNet_results"] / "chain_organs_1-1"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"images": "disjoint"}, "images"),
        ({"fold": "0"}, "folds"),
        ({"configuration": "3d_lowres"}, "configuration"),
        ({"plans": "{patch_size: [16, 16, 8]}"}, "plans"),
        ({"training": ", later_lr: 0.001"}, "training"),
        ({"extra": "method: {lambda_dapd: 0.5}"}, "method"),
        ({"extra": "mirror_axes: [0]"}, "mirror_axes"),
        ({"extra": "intensity: whole_image"}, "intensity"),
        ({"extra": "trainer: nnUNetTrainerFinetune"}, "trainer"),
    ],
)
def test_changed_schedule_of_the_same_name_is_refused(schedule, tmp_path, source, changes, key):
    start(Chain.open(schedule))
    kept = tmp_path / "nnUNet_results" / "chain_tiny" / "chain.json"
    before = kept.read_bytes()
    changed = load_schedule(write_schedule(tmp_path / "changed.yaml", source, **changes))
    with pytest.raises(
        ValueError, match=r"changed.yaml: got another schedule than the chain in .*chain_tiny"
    ) as caught:
        Chain.open(changed)
    lines = [line.strip() for line in str(caught.value).splitlines() if line.startswith("  ")]
    folders = [f"{tmp_path}/nnUNet_results/chain_tiny", f"{tmp_path}/nnUNet_results/Dataset{FIRST_FREE_ID}_tiny_step1"]
    folders = [folders[0], *sorted([folders[1], *map(str, (tmp_path / "nnUNet_raw").iterdir())])]
    differences, rest = lines[: -len(folders)], lines[-len(folders) :]
    assert differences
    assert all(re.fullmatch(rf"{key}: (\w+: )?chain \S.*, schedule \S.*", line) for line in differences)
    assert [rest[0], *sorted(rest[1:])] == folders, "what to remove to start anew"
    assert kept.read_bytes() == before


def test_who_adds_a_step_is_told_how_to_go_on_from_the_last_model(nnunet_folders, tmp_path, source):
    path = write_schedule(tmp_path / "schedule.yaml", source)
    longer = path.read_text(encoding="utf-8")
    path.write_text(longer.replace("\n  - [blob]", ""), encoding="utf-8")
    chain = Chain.open(load_schedule(path))
    start(chain)
    path.write_text(longer, encoding="utf-8")
    with pytest.raises(ValueError, match="got another schedule") as caught:
        Chain.open(load_schedule(path))
    assert f"give {chain.model_folder(chain.variant('pgcd', 0), 1)} to `nnunet-cil extend`" in str(caught.value)


def test_changed_steps_are_named_with_both_values(schedule, tmp_path, source):
    start(Chain.open(schedule))
    path = write_schedule(tmp_path / "changed.yaml", source)
    path.write_text(path.read_text(encoding="utf-8").replace("- [ball]\n  - [blob]", "- [blob]\n  - [ball]"))
    with pytest.raises(
        ValueError, match=r"\n  steps\[0\]: classes: chain \['ball'\], schedule \['blob'\]\n  steps\[1\]: "
    ) as caught:
        Chain.open(load_schedule(path))
    assert "extend" not in str(caught.value)


def test_every_difference_is_named(schedule, tmp_path, source):
    start(Chain.open(schedule))
    path = write_schedule(tmp_path / "changed.yaml", source, images="disjoint", training=", warmup_epochs: 1")
    with pytest.raises(ValueError, match=r"\n  images: .*\n  training: warmup_epochs: chain 0, schedule 1\n"):
        Chain.open(load_schedule(path))


def test_changed_schedule_starts_anew_where_nothing_was_planned(schedule, tmp_path, source):
    first = Chain.open(schedule)
    start(first, planned=False)
    shutil.rmtree(first.raw(2))
    theirs = [tmp_path / "nnUNet_raw" / f"Dataset{FIRST_FREE_ID + 1}_tiny_{name}" for name in ("step2", "theirs")]
    for folder in theirs:
        folder.mkdir()
    changed = load_schedule(write_schedule(tmp_path / "changed.yaml", source, images="disjoint"))
    chain = Chain.open(changed)
    assert chain.content["schedule"]["images"] == "disjoint"
    assert numbers(chain)[0] == FIRST_FREE_ID + 2
    assert first.raw(1).is_dir(), "to look at a chain removes nothing"
    chain.discard_abandoned()
    assert sorted((tmp_path / "nnUNet_raw").iterdir()) == theirs


def test_how_to_train_may_change_until_a_training_has_begun_but_not_the_seed(schedule, tmp_path, source):
    start(Chain.open(schedule), begun=False)
    how = {"training": ", later_lr: 0.001", "extra": "method: {lambda_dapd: 0.5}"}
    path = write_schedule(tmp_path / "changed.yaml", source, **how)
    chain = Chain.open(load_schedule(path))
    assert numbers(chain)[0] == FIRST_FREE_ID
    assert chain.content["schedule"]["training"]["later_lr"] == 0.001
    assert chain.content["schedule"]["method"]["lambda_dapd"] == 0.5
    path.write_text(path.read_text(encoding="utf-8").replace("seed: 0", "seed: 1"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"\n  training: seed: chain 0, schedule 1\n"):
        Chain.open(load_schedule(path))


def test_how_to_train_may_not_change_once_models_are_scored_that_were_trained_elsewhere(schedule, tmp_path, source):
    chain = Chain.open(schedule)
    start(chain, begun=False)
    write_json(chain.folder / "predictions" / "nnUNetPlans" / "step1_fold_all" / "scores.json", {})
    path = write_schedule(tmp_path / "changed.yaml", source, training=", later_lr: 0.001")
    with pytest.raises(ValueError, match=r"\n  training: later_lr: chain 0.01, schedule 0.001\n"):
        Chain.open(load_schedule(path))


def test_device_guard_and_test_may_change(schedule, tmp_path, source):
    start(Chain.open(schedule))
    path = write_schedule(tmp_path / "changed.yaml", source, extra="guard: {on_forgetting: stop}")
    text = path.read_text(encoding="utf-8").replace("device: cpu", "device: auto")
    path.write_text(text.replace(f"test: {source}/split.json", "test: [case_0]"))
    chain = Chain.open(load_schedule(path))
    assert numbers(chain)[0] == FIRST_FREE_ID
    assert chain.content["schedule"]["device"] == "auto"
    assert chain.content["schedule"]["test"] == ["case_0"]


def test_the_same_schedule_in_another_file_is_the_same_chain(schedule, tmp_path):
    start(Chain.open(schedule))
    (tmp_path / "elsewhere").mkdir()
    path = Path(shutil.copy(schedule.file, tmp_path / "elsewhere" / "copy.yaml"))
    assert numbers(Chain.open(load_schedule(path)))[0] == FIRST_FREE_ID


def test_chain_json_holds_no_path_of_this_machine_but_the_written_ones(nnunet_folders, tmp_path):
    write_tiny_dataset(tmp_path / "source", n_cases=2)
    chain = Chain.open(load_schedule(write_schedule(tmp_path / "schedule.yaml", Path("source"))))
    chain.save()
    assert str(tmp_path) not in (chain.folder / "chain.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("trainer", "method"),
    [("nnUNetTrainerPGCD", "pgcd"), ("nnUNetTrainerFinetune", "finetune"), ("MyTrainer", "mytrainer")],
)
def test_method_is_the_end_of_the_trainers_name(trainer, method):
    assert method_of(trainer) == method


@pytest.mark.parametrize(
    ("method", "trainer"),
    [("pgcd", "nnUNetTrainerPGCD"), ("finetune", "nnUNetTrainerFinetune"), (JOINT, "nnUNetTrainerJoint")],
)
def test_own_trainers_are_found_by_their_method(schedule, method, trainer):
    assert resolve_method(method, schedule) == (trainer, {})


def test_the_schedules_trainer_is_found_though_it_is_not_ours(nnunet_folders, tmp_path, source):
    path = write_schedule(tmp_path / "schedule.yaml", source, extra="trainer: nnUNetTrainerMyLwF")
    schedule = load_schedule(path)
    assert resolve_method("mylwf", schedule)[0] == "nnUNetTrainerMyLwF"
    assert resolve_method("pgcd", schedule)[0] == "nnUNetTrainerPGCD"


@pytest.mark.parametrize(
    "method",
    ["no_such", "PGCD", "nnUNetTrainerPGCD", "", "joint-no_channel", "mib-no_dapd", "pgcd-mu"],
)
def test_unknown_method_is_refused_with_the_known_ones(schedule, method):
    with pytest.raises(ValueError, match=rf"--methods: got '{method}', expected some of \[.*'pgcd'"):
        resolve_method(method, schedule)


@pytest.mark.parametrize(
    ("method", "seed", "expected"),
    [
        ("pgcd", 0, "nnUNetPlans"),
        (JOINT, 0, "nnUNetPlans"),
        ("finetune", 0, "nnUNetPlans_finetune"),
        ("pgcd", 1, "nnUNetPlans_seed1"),
        ("finetune", 1, "nnUNetPlans_finetune_seed1"),
        (JOINT, 1, "nnUNetPlans_seed1"),
        ("pgcd", None, "nnUNetPlans_seedNone"),
    ],
)
def test_plans_name_differs_where_method_or_seed_are_not_the_schedules(chain, method, seed, expected):
    assert chain.plans_name(chain.variant(method, seed)) == expected


@pytest.mark.parametrize(
    ("method", "seed", "step", "expected"),
    [
        ("pgcd", 0, 1, "Dataset500_tiny_step1/nnUNetTrainerPGCD__nnUNetPlans__3d_fullres"),
        ("pgcd", 0, 2, "Dataset501_tiny_step2/nnUNetTrainerPGCD__nnUNetPlans__3d_fullres"),
        ("finetune", 0, 2, "Dataset501_tiny_step2/nnUNetTrainerFinetune__nnUNetPlans_finetune__3d_fullres"),
        ("finetune", 3, 2, "Dataset501_tiny_step2/nnUNetTrainerFinetune__nnUNetPlans_finetune_seed3__3d_fullres"),
        ("finetune", 3, 1, "Dataset500_tiny_step1/nnUNetTrainerPGCD__nnUNetPlans_seed3__3d_fullres"),
        (JOINT, 0, JOINT, "Dataset502_tiny_joint/nnUNetTrainerJoint__nnUNetPlans__3d_fullres"),
    ],
)
def test_model_folder_is_where_nnunet_puts_the_model(chain, nnunet_folders, method, seed, step, expected):
    folder = chain.model_folder(chain.variant(method, seed), step)
    assert folder == nnunet_folders["nnUNet_results"] / expected


def test_step_1_is_shared_by_the_methods_of_a_seed_and_nothing_else_is(chain):
    variants = [chain.variant(method, seed) for seed in (0, 1) for method in ("pgcd", "finetune")]
    for a, b in combinations(variants, 2):
        assert (chain.model_folder(a, 1) == chain.model_folder(b, 1)) == (a.seed == b.seed)
        assert chain.model_folder(a, 2) != chain.model_folder(b, 2)


def test_first_step_has_the_schedules_trainer(chain):
    assert chain.first_step(4) == Variant("pgcd", "nnUNetTrainerPGCD", 4)


def write_training(chain: Chain, variant: Variant, step: int | str) -> list[Path]:
    folder = chain.model_folder(variant, step) / "fold_all"
    files = [folder / name for name in ("checkpoint_final.pth", "prototypes.npz", "validation/summary.json")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    return files


def test_training_has_ended_with_checkpoint_prototypes_and_validation(chain):
    variant = chain.variant("finetune", 0)
    assert not chain.trained(variant, 2, "all")
    files = write_training(chain, variant, 2)
    assert chain.trained(variant, 2, "all")
    assert not chain.trained(variant, 2, 0)
    assert not chain.trained(chain.variant("pgcd", 0), 2, "all")
    for file in files:
        file.unlink()
        assert not chain.trained(variant, 2, "all")
        file.touch()


def test_shared_step_1_is_trained_for_all_methods_of_its_seed(chain):
    write_training(chain, chain.first_step(1), 1)
    assert chain.trained(chain.variant("finetune", 1), 1, "all")
    assert not chain.trained(chain.variant("finetune", 0), 1, "all")


def test_free_place_and_own_dataset_are_not_foreign(chain):
    chain.check_not_foreign(chain.raw(1))
    write_json(chain.raw(1) / STEP_FILE, {"chain": "tiny", "step": 1, "n_cases": 1})
    chain.check_not_foreign(chain.raw(1))


@pytest.mark.parametrize(("owner", "named"), [(None, "no chain"), ("other", "chain 'other'")])
def test_dataset_of_somebody_else_is_refused(chain, owner, named):
    (chain.raw(1) / "imagesTr").mkdir(parents=True)
    if owner:
        write_json(chain.raw(1) / STEP_FILE, {"chain": owner, "step": 1, "n_cases": 1})
    with pytest.raises(FileExistsError, match=rf"Dataset500_tiny_step1: got a dataset of {named}.*chain 'tiny'"):
        chain.check_not_foreign(chain.raw(1))


def test_write_json_makes_folders_and_leaves_no_partial_file(tmp_path):
    path = tmp_path / "a" / "b" / "content.json"
    content = {"z": [1, None], "a": "ä"}
    write_json(path, content)
    assert json.loads(path.read_text(encoding="utf-8")) == content
    assert list(json.loads(path.read_text(encoding="utf-8"))) == ["z", "a"]
    assert list(path.parent.iterdir()) == [path]


def test_write_json_keeps_the_old_file_if_the_content_cannot_be_written(tmp_path):
    path = tmp_path / "content.json"
    write_json(path, 1)
    with pytest.raises(TypeError):
        write_json(path, {"good": 1, "bad": object()})
    assert path.read_text(encoding="utf-8") == "1\n"


@pytest.mark.parametrize("point", ["write_text", "replace"])
def test_write_json_keeps_the_old_file_if_it_is_interrupted(tmp_path, monkeypatch, point):
    path = tmp_path / "content.json"
    write_json(path, 1)

    def stop(target, *args):
        if point == "write_text":
            target.write_bytes(b'{"half": ')
        raise KeyboardInterrupt

    monkeypatch.setattr(*((Path, "write_text") if point == "write_text" else (os, "replace")), stop)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"half": 2})
    assert path.read_text(encoding="utf-8") == "1\n"


def test_variants_and_ablations_change_the_settings_and_have_plans_of_their_own(nnunet_folders, tmp_path, source):
    extra = (
        "method: {eta: 0.5}\nvariants: {strong: {lambda_pgcd: 3.0}, fused: {trainer: nnUNetTrainerPLOP, fusion: auto}}"
    )
    chain = Chain.open(load_schedule(write_schedule(tmp_path / "schedule.yaml", source, extra=extra)))
    chain.content["plans_name"] = "nnUNetPlans"
    plain, strong, fused, ablated = (chain.variant(m, 0) for m in ("pgcd", "strong", "fused", "strong-no_channel"))
    assert (strong.trainer, fused.trainer) == ("nnUNetTrainerPGCD", "nnUNetTrainerPLOP")
    values = [(chain.settings(v)["lambda_pgcd"], chain.settings(v)["eta"]) for v in (plain, strong, fused, ablated)]
    assert values == [(1.0, 0.5), (3.0, 0.5), (1.0, 0.5), (3.0, 0.0)]
    assert chain.settings(fused)["fusion"] == "auto"
    assert len({chain.model_folder(v, 2) for v in (plain, strong, fused, ablated)}) == 4
    assert len({chain.model_folder(v, 1) for v in (plain, strong, fused, ablated)}) == 1


@pytest.mark.parametrize("method", ["strong-no_such", "pgcd-", "no_such-no_channel"])
def test_unknown_ablation_is_refused(schedule, method):
    with pytest.raises(ValueError, match=rf"--methods: got '{method}', expected .*no_spatial"):
        resolve_method(method, schedule)


def test_a_variant_named_as_a_method_is_refused(nnunet_folders, tmp_path, source):
    path = write_schedule(tmp_path / "schedule.yaml", source, extra="variants: {plop: {lambda_pgcd: 3.0}}")
    with pytest.raises(ValueError, match=r"variants: got \['plop'\], which are methods"):
        resolve_method("pgcd", load_schedule(path))


def test_variants_may_be_added_to_a_chain_and_settings_of_an_older_version_may_lack(nnunet_folders, tmp_path, source):
    chain = Chain.open(load_schedule(write_schedule(tmp_path / "schedule.yaml", source)))
    chain.content["plans_name"] = "nnUNetPlans"
    del chain.content["schedule"]["method"]["lambda_pod"], chain.content["schedule"]["training"]["amp"]
    start(chain)
    extra = "variants: {strong: {lambda_pgcd: 3.0}}"
    Chain.open(load_schedule(write_schedule(tmp_path / "schedule.yaml", source, extra=extra)))
    with pytest.raises(ValueError, match="another schedule"):
        Chain.open(load_schedule(write_schedule(tmp_path / "schedule.yaml", source, extra="method: {lambda_pod: 1}")))


@pytest.mark.faults("two runs at once", "the second is refused; the first ends as if alone", "nothing")
def test_a_chain_that_another_process_works_on_is_refused(schedule):
    chain = Chain.open(schedule)
    code = "import sys, time, filelock\nwith filelock.FileLock(sys.argv[1]):\n print(1, flush=True)\n time.sleep(60)"
    chain.folder.mkdir(parents=True)
    other = subprocess.Popen([sys.executable, "-c", code, str(chain.folder / ".lock")], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(RuntimeError, match="another nnunet-cil is working on"), chain.locked():
            pass
    finally:
        other.kill()
        other.communicate()
    with chain.locked():
        pass


def test_a_variant_of_replay_says_so_in_its_name(nnunet_folders, tmp_path, source):
    extra = (
        "variants: {hidden: {trainer: nnUNetTrainerReplay}, replay_8: {trainer: nnUNetTrainerReplay, replay_cases: 8}}"
    )
    schedule = load_schedule(write_schedule(tmp_path / "schedule.yaml", source, extra=extra))
    assert resolve_method("replay_8", schedule) == ("nnUNetTrainerReplay", {"replay_cases": 8})
    with pytest.raises(ValueError, match="'hidden' for a method that keeps scans"):
        resolve_method("hidden", schedule)
