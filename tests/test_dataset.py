"""A schedule becomes datasets of nnU-Net: images linked, labels renumbered, plans of step 1, and nothing done twice."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from itertools import combinations
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
import SimpleITK
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from nnunet_cil import dataset, driver, nnunet_api
from nnunet_cil.block import BLOCK_KEY, StepBlock
from nnunet_cil.cases import step_cases
from nnunet_cil.chain import JOINT, Chain
from nnunet_cil.dataset import prepare_chain, write_test_set
from nnunet_cil.evaluate import evaluation_file, scored_as
from nnunet_cil.schedule import load_schedule
from nnunet_cil.step_files import STEP_FILE, check_step_files, read_step_file, write_json
from tests.conftest import write_schedule, write_tiny_dataset
from tests.datasets import (
    IDENTIFIER,
    VANISHED,
    as_tiff,
    copied,
    cut,
    lacking,
    read_json,
    refusal,
    relabelling,
    rewrite,
    set_voxel,
    write_own_datasets,
    write_reversed,
)

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
STEPS = (1, 2, JOINT)


def set_folders(root: Path, patch: pytest.MonkeyPatch) -> None:
    for name in FOLDERS:
        (root / name).mkdir()
        patch.setenv(name, str(root / name))
    patch.setenv("nnUNet_n_proc_DA", "0")
    patch.setenv("nnUNet_def_n_proc", "2")


def variants_of(chain: Chain):
    return [chain.variant("pgcd", 0), chain.variant("finetune", 0), chain.variant("pgcd", 1), chain.variant(JOINT, 0)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, source):
    """Two steps cut out of one dataset, blob first, and four variants; tests leave it as it is."""
    root = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        set_folders(root, patch)
        chain = Chain.open(load_schedule(write_reversed(root / "schedule.yaml", source)))
        prepare_chain(chain, variants_of(chain))
        yield chain


@pytest.fixture(scope="module")
def own_datasets(tmp_path_factory, prepared):
    """Two steps with datasets of their own and given plans, prepared; tests leave it as it is."""
    root = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        set_folders(root, patch)
        chain = Chain.open(write_own_datasets(root, plans_of(prepared, 2, "nnUNetPlans_finetune")))
        prepare_chain(chain, [chain.variant("pgcd", 0)])
        yield chain


def voxels(path: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


def plans_of(chain: Chain, step: int | str, name: str = "nnUNetPlans"):
    return read_json(chain.preprocessed(step) / f"{name}.json")


# a prepared chain


@pytest.mark.parametrize("place", ["raw", "preprocessed"])
def test_labels_are_cumulative_in_the_order_learned(prepared, place):
    expected = ([("blob", 1)], [("blob", 1), ("ball", 2)], [("blob", 1), ("ball", 2)])
    for step, labels in zip(STEPS, expected, strict=True):
        content = read_json(getattr(prepared, place)(step) / "dataset.json")
        assert list(content["labels"].items()) == [("background", 0), *labels]
        assert content["numTraining"] == 3
        assert content["channel_names"] == {"0": "MR"}


@pytest.mark.parametrize(
    ("step", "numbers"), [(1, {0: 0, 1: 0, 2: 1}), (2, {0: 0, 1: 2, 2: 0}), (JOINT, {0: 0, 1: 2, 2: 1})]
)
def test_labels_are_those_of_the_step_and_other_organs_are_background(prepared, source, step, numbers):
    for case in ("case_0", "case_1", "case_2"):
        own = voxels(source / "labelsTr" / f"{case}.nii.gz")
        expected = np.select([own == value for value in numbers], list(numbers.values()))
        np.testing.assert_array_equal(voxels(prepared.raw(step) / "labelsTr" / f"{case}.nii.gz"), expected)


@pytest.mark.parametrize("step", STEPS)
def test_images_of_the_training_cases_are_linked_not_copied(prepared, source, step):
    images = sorted((prepared.raw(step) / "imagesTr").iterdir())
    assert [path.name for path in images] == [f"case_{i}_0000.nii.gz" for i in range(3)]
    assert all(path.samefile(source / "imagesTr" / path.name) for path in images)


def test_plans_of_all_steps_and_variants_are_those_of_step_1(prepared):
    base = plans_of(prepared, 1)
    for step, name in [
        (2, "nnUNetPlans"),
        (JOINT, "nnUNetPlans"),
        (2, "nnUNetPlans_finetune"),
        (1, "nnUNetPlans_seed1"),
        (2, "nnUNetPlans_seed1"),
    ]:
        plans = plans_of(prepared, step, name)
        differing = {key for key in {*base, *plans} if base.get(key) != plans.get(key)}
        assert differing <= {"dataset_name", "plans_name", BLOCK_KEY}
        assert plans["dataset_name"] == prepared.dataset_name(step)
        assert plans["plans_name"] == name


def test_step_1_has_no_plans_of_methods_that_share_it(prepared):
    assert not (prepared.preprocessed(1) / "nnUNetPlans_finetune.json").exists()


@pytest.mark.parametrize("step", STEPS)
def test_folder_is_what_nnunet_trains_on(prepared, step):
    folder = prepared.preprocessed(step)
    cases = ["case_0", "case_1", "case_2"]
    splits = read_json(folder / "splits_final.json")
    assert len(splits) == 3
    assert all(sorted(fold["train"] + fold["val"]) == cases for fold in splits)
    assert len(read_json(folder / "dataset_fingerprint.json")["spacings"]) == 3
    labels = sorted((folder / "gt_segmentations").iterdir())
    assert [path.name for path in labels] == [f"{case}.nii.gz" for case in cases]
    assert all(path.read_bytes() == (prepared.raw(step) / "labelsTr" / path.name).read_bytes() for path in labels)
    assert sorted(path.stem for path in (folder / IDENTIFIER).glob("*.pkl")) == cases
    check_step_files(folder, IDENTIFIER)


@pytest.mark.parametrize("step", STEPS)
def test_step_file_says_whose_the_folders_are(prepared, step):
    own = {"chain": "tiny", "step": step, "n_cases": 3}
    assert read_step_file(prepared.raw(step)) == own
    finished = {"complete": [IDENTIFIER], "configurations": ["3d_fullres"]}
    assert read_step_file(prepared.preprocessed(step)) == {**own, **finished}


def block_in(chain: Chain, step: int | str, name: str = "nnUNetPlans") -> StepBlock:
    return StepBlock.from_plans(plans_of(chain, step, name), read_json(chain.preprocessed(step) / "dataset.json"))


def test_blocks_say_what_each_step_learns(prepared):
    first, second = block_in(prepared, 1), block_in(prepared, 2)
    assert (first.chain, first.step, first.classes, first.teacher) == ("tiny", 1, (("blob",),), None)
    assert (second.step, second.classes) == (2, (("blob",), ("ball",)))
    assert second.settings == prepared.schedule.method
    assert second.training == prepared.schedule.training


@pytest.mark.parametrize(
    ("name", "method", "seed"),
    [("nnUNetPlans", "pgcd", 0), ("nnUNetPlans_finetune", "finetune", 0), ("nnUNetPlans_seed1", "pgcd", 1)],
)
def test_block_names_its_variant_and_the_teacher_relative_to_the_results(prepared, name, method, seed):
    block = block_in(prepared, 2, name)
    assert (block.method, block.training.seed) == (method, seed)
    assert not Path(block.teacher).is_absolute()
    assert prepared.paths["nnUNet_results"] / block.teacher == prepared.model_folder(prepared.variant("pgcd", seed), 1)
    assert block.teacher == f"{prepared.dataset_name(1)}/nnUNetTrainerPGCD__nnUNetPlans{'_seed1' * seed}__3d_fullres"


def test_joint_learns_all_classes_in_one_step_for_as_long_as_all_steps(prepared):
    block = block_in(prepared, JOINT)
    assert (block.method, block.step, block.classes, block.teacher) == (JOINT, 1, (("blob", "ball"),), None)
    assert block.training.epochs == 2 * prepared.schedule.training.epochs


def test_variants_share_preprocessed_data_and_never_an_output_folder(prepared):
    variants = variants_of(prepared)[:3]
    for step in (1, 2):
        names = {prepared.plans_name(prepared.owner(v, step)) for v in variants}
        plans = [plans_of(prepared, step, name) for name in names]
        assert {p["configurations"]["3d_fullres"]["data_identifier"] for p in plans} == {IDENTIFIER}
        folders = [path.name for path in prepared.preprocessed(step).iterdir() if path.is_dir()]
        assert sorted(folders) == ["gt_segmentations", IDENTIFIER]
    for a, b in combinations(variants, 2):
        assert prepared.model_folder(a, 2) != prepared.model_folder(b, 2)


def test_block_holds_no_path_of_this_machine(prepared):
    text = json.dumps(plans_of(prepared, 2)[BLOCK_KEY])
    assert str(prepared.paths["nnUNet_results"].parent) not in text


def test_test_set_has_the_final_numbers(prepared, source):
    folder = prepared.folder / "test"
    own = voxels(source / "labelsTr" / "case_3.nii.gz")
    np.testing.assert_array_equal(voxels(folder / "labels" / "case_3.nii.gz"), np.select([own == 1, own == 2], [2, 1]))
    assert (folder / "images" / "case_3_0000.nii.gz").samefile(source / "imagesTr" / "case_3_0000.nii.gz")
    content = read_json(folder / "test.json")
    assert content["cases"] == {"case_3": {"labelled": [1, 2], "set": 0, "sha256": ANY}}
    assert content["ignore"] == 3
    assert [path.name for path in (folder / "images").iterdir()] == ["case_3_0000.nii.gz"]


def test_source_is_not_touched(prepared, source, tmp_path):
    fresh = write_tiny_dataset(tmp_path / "fresh", n_cases=4)
    for path in source.rglob("*.nii.gz"):
        np.testing.assert_array_equal(voxels(path), voxels(fresh / path.relative_to(source)))
    assert len(list(source.rglob("*"))) == len(list(fresh.rglob("*")))


def test_own_datasets_are_merged_and_numbered(own_datasets):
    root = own_datasets.schedule.file.parent
    for step, name, expected in ((1, "one", lambda own: own > 0), (2, "two", lambda own: 2 * (own == 2))):
        for case in ("case_0", "case_1"):
            own = voxels(root / name / "labelsTr" / f"{case}.nii.gz")
            label = own_datasets.raw(step) / "labelsTr" / f"{case}.nii.gz"
            np.testing.assert_array_equal(voxels(label), expected(own))
    labels = read_json(own_datasets.preprocessed(2) / "dataset.json")["labels"]
    assert list(labels.items()) == [("background", 0), ("lump", 1), ("blob", 2)]


def test_equal_case_names_of_own_datasets_are_different_images(own_datasets):
    first, second = (own_datasets.preprocessed(step) / IDENTIFIER / "case_0.b2nd" for step in (1, 2))
    assert not first.samefile(second)
    assert first.read_bytes() != second.read_bytes()


def test_test_cases_say_which_classes_are_labelled_in_them(own_datasets):
    cases = read_json(own_datasets.folder / "test" / "test.json")["cases"]
    assert cases == {
        "case_2": {"labelled": [1], "set": 0, "sha256": ANY},
        "set1_case_2": {"labelled": [2], "set": 1, "sha256": ANY},
    }
    own = voxels(own_datasets.schedule.file.parent / "two" / "labelsTr" / "case_2.nii.gz")
    label = own_datasets.folder / "test" / "labels" / "set1_case_2.nii.gz"
    np.testing.assert_array_equal(voxels(label), 2 * (own == 2))


def test_an_ignore_label_of_one_dataset_alone_is_the_last_of_its_step_and_of_joint(nnunet_folders, tmp_path):
    schedule = relabelling(tmp_path, ignore=True)
    assert step_cases(schedule, 1)[0].table == {0: 0, 1: 1, 2: 0}
    second = step_cases(schedule, 2)[0]
    assert (second.table, second.labelled) == ({0: 0, 1: 1, 2: 2, 3: 3}, (1, 2))
    chain = Chain.open(schedule)
    prepare_chain(chain, [chain.variant("pgcd", 0), chain.variant(JOINT, 0)])
    for step, labels in ((1, {}), (2, {"blob": 2, "ignore": 3}), (JOINT, {"blob": 2, "ignore": 3})):
        assert read_json(chain.raw(step) / "dataset.json")["labels"] == {"background": 0, "lump": 1, **labels}
    assert 3 in voxels(chain.raw(JOINT) / "labelsTr" / "step2_case_0.nii.gz")


def test_the_step_file_says_what_is_labelled_where_it_is_not_the_new_classes_alone(nnunet_folders, tmp_path, caplog):
    schedule = relabelling(tmp_path, "case_1,ball\n")
    chain = Chain.open(schedule)
    with caplog.at_level("INFO"):
        prepare_chain(chain, [chain.variant("pgcd", 0)])
    assert "labelled" not in read_step_file(chain.preprocessed(1))
    expected = {"case_0": [1, 2], "case_1": [2], "case_2": [1, 2]}
    assert read_step_file(chain.preprocessed(2))["labelled"] == expected
    assert 1 not in voxels(chain.raw(2) / "labelsTr" / "case_1.nii.gz")
    assert "steps[1]: labels of classes learned before are used: lump" in caplog.text
    assert (
        "steps[1]: unlabelled: 1 cases have voxels of 'lump', which they are declared not to label: case_1."
        in caplog.text
    )
    (tmp_path / "two" / "unlabelled.csv").write_text("case,class\ncase_0,ball\n")
    with pytest.raises(ValueError, match=r"got another schedule.*\n.*1 cases, sha256 .*1 cases, sha256 "):
        Chain.open(load_schedule(schedule.file))


# preparing again, interruptions


def content_of(path: Path) -> bytes:
    """Bytes of a file; of an array its values, as blosc2 does not write the same bytes each time."""
    return nnunet_api.open_segmentation(path)[:].tobytes() if path.suffix == ".b2nd" else path.read_bytes()


def snapshot(chain: Chain) -> dict[Path, tuple[int, bytes]]:
    files = [p for name in FOLDERS for p in chain.paths[name].rglob("*") if p.is_file()]
    return {path: (path.stat().st_mtime_ns, content_of(path)) for path in files}


def contents(files: dict[Path, tuple[int, bytes]]) -> dict[Path, bytes]:
    return {path: content for path, (_, content) in files.items()}


@pytest.fixture
def folders_of_prepared(prepared, monkeypatch):
    """nnU-Net's variables at the folders of ``prepared``, whatever other module fixtures have set."""
    for name in FOLDERS:
        monkeypatch.setenv(name, str(prepared.paths[name]))


def test_preparing_again_changes_no_file(prepared, folders_of_prepared):
    before = snapshot(prepared)
    again = Chain.open(prepared.schedule)
    prepare_chain(again, variants_of(again))
    after = snapshot(prepared)
    assert contents(after) == contents(before)
    rewritten = {path.name for path in before if before[path][0] != after[path][0]}
    assert all(re.fullmatch(r"chain\.json|nnUNetPlans.*\.json", name) for name in rewritten)


def test_a_new_variant_adds_plans_and_nothing_else(prepared, folders_of_prepared):
    before = snapshot(prepared)
    prepare_chain(prepared, [prepared.variant("finetune", 5)])
    after = contents(snapshot(prepared))
    added = [
        prepared.preprocessed(step) / name
        for step, name in ((1, "nnUNetPlans_seed5.json"), (2, "nnUNetPlans_finetune_seed5.json"))
    ]
    try:
        assert after.keys() - before.keys() == set(added)
        assert contents(before).items() <= after.items()
    finally:
        for path in added:
            path.unlink()


@pytest.mark.parametrize("step", STEPS)
def test_unfinished_step_is_prepared_anew(prepared, folders_of_prepared, step):
    before = snapshot(prepared)
    folder = prepared.preprocessed(step)
    (folder / IDENTIFIER / "case_1.pkl").unlink()
    marker = read_step_file(folder)
    write_json(folder / STEP_FILE, {**marker, "complete": [], "configurations": []})
    again = Chain.open(prepared.schedule)
    prepare_chain(again, variants_of(again))
    check_step_files(folder, IDENTIFIER)
    after = snapshot(prepared)
    assert contents(after) == contents(before)
    others = [path for path in before if path.suffix in (".pkl", ".b2nd") and not path.is_relative_to(folder)]
    assert all(after[path][0] == before[path][0] for path in others)


@VANISHED
def test_removed_file_is_restored_as_the_message_of_check_step_files_promises(prepared, folders_of_prepared):
    folder = prepared.preprocessed(2)
    victim = folder / IDENTIFIER / "case_1.pkl"
    content = victim.read_bytes()
    victim.unlink()
    try:
        again = Chain.open(prepared.schedule)
        prepare_chain(again, variants_of(again))
        check_step_files(folder, IDENTIFIER)
    finally:
        victim.write_bytes(content)


def test_images_that_were_moved_are_linked_anew(source, nnunet_folders, tmp_path, monkeypatch):
    """As on another disk, or of a chain that was copied to another machine: links there are symbolic."""

    def no_hard_links(*_):
        raise OSError

    monkeypatch.setattr(os, "link", no_hard_links)
    (tmp_path / "here").mkdir()
    copied(source, tmp_path / "here")
    write_schedule(tmp_path / "here" / "schedule.yaml", Path("source"))
    chain = Chain.open(load_schedule(tmp_path / "here" / "schedule.yaml"))
    prepare_chain(chain, variants_of(chain))
    linked = [*nnunet_folders["nnUNet_raw"].glob("*/imagesTr/*"), *chain.folder.glob("test/images/*")]
    assert len(linked) == 3 * 3 + 1
    (tmp_path / "here").rename(tmp_path / "there")
    assert not any(path.exists() for path in linked)
    moved = Chain.open(load_schedule(tmp_path / "there" / "schedule.yaml"))
    prepare_chain(moved, variants_of(moved))
    assert all(path.resolve().is_relative_to(tmp_path / "there") and path.is_file() for path in linked)


def test_a_variant_that_was_changed_is_neither_trained_nor_shown(source, nnunet_folders, tmp_path):
    def opened(strength: float) -> Chain:
        extra = f"variants: {{strong: {{trainer: nnUNetTrainerPGCD, lambda_pgcd: {strength}}}}}"
        return Chain.open(load_schedule(write_schedule(tmp_path / "schedule.yaml", source, extra=extra)))

    chain = opened(3.0)
    variant = chain.variant("strong", 0)
    prepare_chain(chain, [variant])
    model = chain.model_folder(variant, 2)
    plans = read_json(chain.preprocessed(2) / f"{chain.plans_name(variant)}.json")
    for name, content in (("plans", plans), ("dataset", read_json(chain.preprocessed(2) / "dataset.json"))):
        write_json(model / f"{name}.json", content)
    write_json(evaluation_file(chain, variant, 2, "all"), {**scored_as(chain), "scores": {}})
    same, other = (opened(strength).schedule for strength in (3.0, 30.0))
    assert driver.write_report(same, ["strong"], []).is_file()
    for go_on in (driver.prepare, driver.write_report):
        with pytest.raises(ValueError, match=r"strong: got other settings .*\n  lambda_pgcd: 3.0 then, 30.0 now\nGive"):
            go_on(other, ["strong"], [])


def test_tiffs_keep_the_spacing_that_stands_beside_them(source, nnunet_folders, tmp_path):
    spacing = [4.0, 1.0, 1.0]
    folder = as_tiff(copied(source, tmp_path), spacing)
    (folder / "labelsTr" / "case_2.json").unlink()
    (folder / "labelsTr" / "case_3.json").unlink()
    chain = Chain.open(load_schedule(write_schedule(tmp_path / "tiff.yaml", folder)))
    prepare_chain(chain, [chain.variant("pgcd", 0)])
    places = [chain.raw(step) / name for step in (1, 2) for name in ("imagesTr", "labelsTr")]
    places += [chain.preprocessed(step) / "gt_segmentations" for step in (1, 2)]
    places += [chain.folder / "test" / name for name in ("images", "labels")]
    reader = Tiff3DIO()
    for place in places:
        read = reader.read_images if "images" in place.name else lambda files: reader.read_seg(*files)
        files = sorted(place.glob("*.tif"))
        assert len(files) == (1 if place.parent.name == "test" else 3)
        assert [read([str(path)])[1]["spacing"] for path in files] == [spacing] * len(files)
    for step in (1, 2):
        data = nnunet_api.preprocessed_dataset(chain.preprocessed(step) / IDENTIFIER)
        assert [list(data.load_case(case)[3]["spacing"]) for case in data.identifiers] == [spacing] * 3
    prepare_chain(chain, [chain.variant("pgcd", 0)])  # the files with spacings are no cases
    before = scored_as(chain)
    write_json(folder / "imagesTr" / "case_3.json", {"spacing": [2.0, 1.0, 1.0]})
    prepare_chain(chain, [chain.variant("pgcd", 0)])
    assert scored_as(chain)["test_sha256"] != before["test_sha256"]
    assert read_json(chain.folder / "test" / "labels" / "case_3.json") == {"spacing": [2.0, 1.0, 1.0]}


def test_a_tiff_label_of_another_spacing_than_its_image_is_refused(source, nnunet_folders, tmp_path):
    folder = as_tiff(copied(source, tmp_path), (4.0, 1.0, 1.0))
    write_json(folder / "labelsTr" / "case_1.json", {"spacing": [1.0, 1.0, 4.0]})
    said = refusal(load_schedule(write_schedule(tmp_path / "tiff.yaml", folder)), nnunet_folders)
    assert "case_1.tif: got spacing (1.0, 1.0, 4.0) mm, expected (4.0, 1.0, 1.0) mm as case_1_0000.tif." in said


def test_changed_test_set_is_written_anew(source, nnunet_folders, tmp_path):
    write_test_set(Chain.open(cut(source, tmp_path, test="test: [case_3]")))
    chain = Chain.open(cut(source, tmp_path, test="test: [case_2]"))
    write_test_set(chain)
    assert list(read_json(chain.folder / "test" / "test.json")["cases"]) == ["case_2"]


def test_labels_that_were_mended_after_they_were_copied_are_told_until_the_step_is_made_anew(
    source, nnunet_folders, tmp_path, caplog
):
    folder = copied(source, tmp_path)
    schedule = load_schedule(write_schedule(tmp_path / "schedule.yaml", folder))

    def told() -> list[str]:
        caplog.clear()
        chain = Chain.open(schedule)
        prepare_chain(chain, [chain.variant("pgcd", 0)])
        return [record.getMessage() for record in caplog.records if "have changed since" in record.getMessage()]

    assert told() == []
    chain = Chain.open(schedule)
    chain.results(1).mkdir()  # a training has begun, and goes on with what it has
    mended = folder / "labelsTr" / "case_0.nii.gz"
    os.utime(mended, ns=(0, 0))
    assert told() == [], "it holds the same"
    rewrite(mended, set_voxel(2))
    (warning,) = told()
    folders = [chain.raw(2), chain.preprocessed(2)]
    assert "step 2: case_0.nii.gz. The next trainings learn from them as they were" in warning
    assert [Path(line.strip()) for line in warning.splitlines()[1:]] == folders
    assert voxels(chain.raw(2) / "labelsTr" / "case_0.nii.gz")[0, 0, 0] == 0
    for each in folders:
        shutil.rmtree(each)
    assert told() == []
    assert voxels(chain.raw(2) / "labelsTr" / "case_0.nii.gz")[0, 0, 0] == 2


def copied_and_tested(source: Path, tmp_path: Path) -> tuple[Path, Chain]:
    """A copy of a source whose case_3 is the test set of a chain, written."""
    folder = copied(source, tmp_path)
    chain = Chain.open(load_schedule(write_schedule(tmp_path / "schedule.yaml", folder)))
    write_test_set(chain)
    return folder, chain


@pytest.mark.parametrize("changed", ["labelsTr/case_3.nii.gz", "imagesTr/case_3_0000.nii.gz"])
def test_a_test_subject_that_was_mended_is_written_and_scored_anew(source, nnunet_folders, tmp_path, changed):
    folder, chain = copied_and_tested(source, tmp_path)
    (chain.folder / "test" / "preprocessed").mkdir()
    before = scored_as(chain)
    rewrite(folder / changed, set_voxel(2))
    write_test_set(chain)
    assert scored_as(chain)["test_sha256"] != before["test_sha256"]
    (mine,) = (chain.folder / "test" / Path(changed).parts[0].removesuffix("Tr")).iterdir()
    assert voxels(mine)[0, 0, 0] == 2
    assert not (chain.folder / "test" / "preprocessed").exists()
    assert dataset.test_set_is_written(chain)


@pytest.mark.parametrize("how", ["touched", "compressed in another way", "files.json lost"])
def test_a_test_subject_that_holds_the_same_stays_and_with_it_its_scores(source, nnunet_folders, tmp_path, how):
    folder, chain = copied_and_tested(source, tmp_path)
    before, written = scored_as(chain), (chain.folder / "test" / "labels" / "case_3.nii.gz").stat()
    path = folder / "labelsTr" / "case_3.nii.gz"
    if how == "touched":
        os.utime(path, ns=(0, 0))
    elif how == "files.json lost":
        (chain.folder / "test" / "files.json").unlink()
    else:
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 1))
    assert not dataset.test_set_is_written(chain)
    write_test_set(chain)
    assert dataset.test_set_is_written(chain)
    assert scored_as(chain) == before
    assert (chain.folder / "test" / "labels" / "case_3.nii.gz").stat() == written


def test_a_damaged_test_set_of_a_chain_that_is_prepared_is_refused_too(source, nnunet_folders, tmp_path):
    folder, chain = copied_and_tested(source, tmp_path)
    unknown = folder / "labelsTr" / "case_3.nii.gz"
    rewrite(unknown, set_voxel(7))
    with pytest.raises(ValueError, match=r"case_3.nii.gz: got label values \[7(\.0)?\]"):
        write_test_set(chain)
    assert (chain.folder / "test" / "test.json").is_file(), "what was there stays"


def test_a_test_image_that_is_gone_is_named(source, nnunet_folders, tmp_path):
    folder = copied(source, tmp_path)
    listing = read_json(folder / "dataset.json")
    files = {f"case_{n}": (f"imagesTr/case_{n}_0000.nii.gz", f"labelsTr/case_{n}.nii.gz") for n in range(4)}
    listing["dataset"] = {case: {"images": [image], "label": label} for case, (image, label) in files.items()}
    (folder / "dataset.json").write_text(json.dumps(listing))
    chain = Chain.open(load_schedule(write_schedule(tmp_path / "schedule.yaml", folder)))
    (folder / "imagesTr" / "case_3_0000.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"case_3_0000.nii.gz: got no file, expected the image of test subject"):
        prepare_chain(chain, [chain.variant("pgcd", 0)])


def test_test_images_of_another_kind_are_warned_of(source, nnunet_folders, tmp_path, caplog):
    other = write_tiny_dataset(tmp_path / "other", n_cases=1, channel="CT")
    write_test_set(Chain.open(cut(source, tmp_path, test=f"test: {{dataset: {other}}}")))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith(f"{other}/dataset.json: channel_names: got {{'0': 'CT'}}, expected {{'0': 'MR'}}")


def test_test_set_is_written_anew_if_a_subject_turns_out_to_lack_a_label(source, nnunet_folders, tmp_path):
    for text, labelled in (("", [1, 2]), ("case_2,ball\n", [2])):
        lacking(text, tmp_path / "a.csv")
        test = f"test: [{{dataset: {source}, subjects: [case_2], unlabelled: {tmp_path}/a.csv}}]"
        chain = Chain.open(cut(source, tmp_path, test=test))
        write_test_set(chain)
        assert read_json(chain.folder / "test" / "test.json")["cases"]["case_2"]["labelled"] == labelled
        assert np.isin([1, 2], voxels(chain.folder / "test" / "labels" / "case_2.nii.gz")).sum() == len(labelled)


def test_test_set_follows_a_changed_split_file(source, nnunet_folders, tmp_path):
    for test in (["case_2", "case_3"], ["case_3"]):
        write_json(tmp_path / "split.json", {"train": ["case_0", "case_1"], "test": test})
        chain = Chain.open(cut(source, tmp_path, test=f"test: {tmp_path}/split.json"))
        write_test_set(chain)
    assert list(read_json(chain.folder / "test" / "test.json")["cases"]) == ["case_3"]


def test_test_subject_that_was_trained_on_is_refused(prepared, folders_of_prepared, source, tmp_path):
    path = write_reversed(tmp_path / "changed.yaml", source)
    path.write_text(path.read_text(encoding="utf-8").replace(f"test: {source}/split.json", "test: [case_2]"))
    before = snapshot(prepared)
    chain = Chain.open(load_schedule(path))
    with pytest.raises(ValueError, match=r"_step1: got a dataset that trains on \['case_2'\] and not on \['case_3'\]"):
        prepare_chain(chain, [chain.variant("pgcd", 0)])
    assert snapshot(prepared) == before


class Interrupted(BaseException):
    pass


@pytest.mark.faults("kill -9", "the same command goes on, and ends as if nothing had been", "unfinished epoch")
def test_interrupted_preparation_is_finished_by_preparing_again(source, nnunet_folders, tmp_path, monkeypatch):
    schedule = load_schedule(write_schedule(tmp_path / "schedule.yaml", source))
    for module, name, last in [
        (nnunet_api, "link_or_copy", 3),
        (nnunet_api, "write_fingerprint", 1),
        (nnunet_api, "plan", 1),
        (nnunet_api, "preprocess_case", 2),
        (nnunet_api, "derive_case", 2),
    ]:
        calls, function = [], getattr(module, name)

        def stop_at_the_last_call(*args, calls=calls, function=function, last=last, **options):
            calls.append(1)
            if len(calls) == last:
                raise Interrupted
            return function(*args, **options)

        chain = Chain.open(schedule)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, stop_at_the_last_call)
            with pytest.raises(Interrupted):
                prepare_chain(chain, [chain.variant("pgcd", 0)])
        if name in ("preprocess_case", "derive_case"):
            step = 1 if name == "preprocess_case" else 2
            with pytest.raises(ValueError, match="got 1 complete cases, expected 3"):
                check_step_files(chain.preprocessed(step), IDENTIFIER)
    chain = Chain.open(schedule)
    prepare_chain(chain, [chain.variant("pgcd", 0)])
    for step in (1, 2):
        assert len(list((chain.raw(step) / "labelsTr").iterdir())) == 3
        check_step_files(chain.preprocessed(step), IDENTIFIER)
        assert len(list((chain.preprocessed(step) / "gt_segmentations").iterdir())) == 3
        assert block_in(chain, step).step == step
    assert (chain.folder / "test" / "test.json").is_file()
    leftover = [path for folder in nnunet_folders.values() for path in folder.rglob("*.part*")]
    assert leftover == []


def test_interruption_before_the_first_step_file_is_no_foreign_dataset(source, nnunet_folders, tmp_path, monkeypatch):
    chain = Chain.open(load_schedule(write_schedule(tmp_path / "schedule.yaml", source)))

    def stop_at_the_step_file(path, content):
        if path.parent == chain.preprocessed(1):
            raise Interrupted
        write_json(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "write_json", stop_at_the_step_file)
        with pytest.raises(Interrupted):
            prepare_chain(chain, [chain.variant("pgcd", 0)])
    prepare_chain(chain, [chain.variant("pgcd", 0)])


# what is in the way


@pytest.mark.parametrize("place", ["raw", "preprocessed"])
@pytest.mark.parametrize("step", [1, 2])
def test_foreign_dataset_in_the_way_is_not_touched(source, nnunet_folders, tmp_path, place, step):
    chain = Chain.open(load_schedule(write_schedule(tmp_path / "schedule.yaml", source)))
    theirs = getattr(chain, place)(step)
    (theirs / "imagesTr").mkdir(parents=True)
    (theirs / "dataset.json").write_text("theirs")
    before = {path: path.stat().st_mtime_ns for path in [theirs, *theirs.rglob("*")]}
    with pytest.raises(FileExistsError, match=rf"{theirs.name}: got a dataset of no chain, .*not touched"):
        prepare_chain(chain, [chain.variant("pgcd", 0)])
    found = [path for folder in nnunet_folders.values() for path in folder.rglob("*")]
    assert {path: path.stat().st_mtime_ns for path in found} == before
    assert (theirs / "dataset.json").read_text(encoding="utf-8") == "theirs"


def test_dataset_of_another_chain_in_the_way_is_not_touched(source, nnunet_folders, tmp_path):
    chain = Chain.open(load_schedule(write_schedule(tmp_path / "schedule.yaml", source)))
    marker = chain.raw(1) / STEP_FILE
    write_json(marker, {"chain": "other", "step": 1, "n_cases": 1})
    with pytest.raises(FileExistsError, match="got a dataset of chain 'other', expected a free place for chain 'tiny'"):
        prepare_chain(chain, [chain.variant("pgcd", 0)])
    assert [path for folder in nnunet_folders.values() for path in folder.rglob("*") if path.is_file()] == [marker]


@pytest.mark.parametrize("unset", [("nnUNet_raw",), ("nnUNet_preprocessed", "nnUNet_results"), FOLDERS])
def test_unset_folders_of_nnunet_are_all_named(nnunet_folders, monkeypatch, unset):
    monkeypatch.delenv(unset[0])
    for name in unset[1:]:
        monkeypatch.setenv(name, "")
    with pytest.raises(ValueError, match=rf"^{', '.join(unset)}: got nothing, expected a folder") as caught:
        nnunet_api.nnunet_paths()
    assert re.findall(r"export (\w+)=", str(caught.value)) == list(unset)


def test_folders_of_nnunet_are_created(nnunet_folders, monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "new" / "results"))
    assert nnunet_api.nnunet_paths()["nnUNet_results"].is_dir()


@pytest.mark.parametrize(
    ("intensity", "clipped", "upper"),
    [
        ("step1", ["blob"], 170),
        ("whole_image", [], 170),
        ("{given: {0: {mean: 0, std: 9, percentile_00_5: 0, percentile_99_5: 130}}}", ["ball"], 130),
    ],
)
def test_a_ct_chain_warns_of_organs_beyond_its_window(tmp_path, nnunet_folders, caplog, intensity, clipped, upper):
    """The ball has values around 160 and the blob, which the first twelve cases lack, around 50."""
    source = write_tiny_dataset(tmp_path / "source", n_cases=15, channel="CT")
    for case in sorted(f"case_{number}" for number in range(14))[:12]:
        rewrite(source / "labelsTr" / f"{case}.nii.gz", lambda labels: labels * (labels != 2))
    schedule = write_schedule(tmp_path / "schedule.yaml", source, extra=f"intensity: {intensity}")
    chain = Chain.open(load_schedule(schedule))
    with caplog.at_level("WARNING", "nnunet_cil.intensity"):
        prepare_chain(chain, [chain.variant("pgcd", 0)])
    assert re.findall(r"100% of all (\w+) voxels", caplog.text) == clipped
    for step in (1, 2):
        window = plans_of(chain, step)["foreground_intensity_properties_per_channel"]["0"]
        assert window["percentile_99_5"] == pytest.approx(upper, abs=8)
        assert (window["percentile_00_5"] < 60) == (intensity != "step1")
