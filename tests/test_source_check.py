"""Images and labels that do not fit a schedule are refused before anything is written, all problems at once."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from PIL import Image

from nnunet_cil import nnunet_api
from nnunet_cil.cases import step_cases
from nnunet_cil.chain import Chain
from nnunet_cil.dataset import prepare_chain, write_test_set
from nnunet_cil.schedule import Schedule, load_schedule
from nnunet_cil.source_check import check_sources, scan_test_set, tell_of_labels
from nnunet_cil.step_files import write_json
from tests.conftest import write_schedule, write_tiny_dataset
from tests.datasets import (
    IDENTIFIER,
    VANISHED,
    copied,
    cut,
    lacking,
    read_json,
    refusal,
    relabelling,
    rewrite,
    set_voxel,
    write_own_datasets,
)

OTHER_GRID = pytest.mark.faults("label on another grid", "refused by name before anything is written", "nothing")


def as_nrrd(folder: Path) -> Path:
    for path in list(folder.glob("*Tr/*.nii.gz")):
        SimpleITK.WriteImage(SimpleITK.ReadImage(str(path)), str(path).replace(".nii.gz", ".nrrd"))
        path.unlink()
    write_json(folder / "dataset.json", {**read_json(folder / "dataset.json"), "file_ending": ".nrrd"})
    return folder


def no_label(folder: Path) -> None:
    (folder / "labelsTr" / "case_1.nii.gz").unlink()


def unknown_value(folder: Path) -> None:
    rewrite(folder / "labelsTr" / "case_0.nii.gz", set_voxel(7))


def check(schedule: Schedule) -> None:
    check_sources(schedule, {step: step_cases(schedule, step) for step in (1, 2)})


def test_a_class_that_only_some_cases_lack_without_being_declared_is_warned_of(tmp_path, caplog):
    folder = write_tiny_dataset(tmp_path / "source", n_cases=6)

    def warnings(**changes) -> str:
        schedule = load_schedule(write_schedule(tmp_path / "schedule.yaml", folder, **changes))
        cases = {step: step_cases(schedule, step) for step in (1, 2)}
        caplog.clear()
        tell_of_labels(schedule, cases, check_sources(schedule, cases))
        return caplog.text

    assert warnings() == ""
    for case in (0, 3):
        rewrite(folder / "labelsTr" / f"case_{case}.nii.gz", lambda array: array * (array != 2))
    found = warnings()
    assert "steps[1]: 2 of 5 cases have no voxel of 'blob': case_0, case_3. Where" in found
    assert "`unlabelled`" in found
    assert "steps[0]" not in found
    assert warnings(extra=lacking("case_0,blob\ncase_3,blob\n", tmp_path / "a.csv")) == ""
    rewrite(folder / "labelsTr" / "case_1.nii.gz", lambda array: array * (array != 2))
    assert warnings() == "", "most cases lack it: it is a rare organ"


def test_an_old_class_without_any_voxel_is_refused(tmp_path):
    schedule = relabelling(tmp_path)
    for path in (tmp_path / "two" / "labelsTr").iterdir():
        rewrite(path, lambda array: array * (array != 1))
    with pytest.raises(ValueError, match=r"steps\[1\]: got no voxel of 'lump' in the labels of its 3 cases"):
        check(schedule)


def respace(path: Path) -> None:
    volume = SimpleITK.ReadImage(str(path))
    volume.SetSpacing((1.5, 1.5, 2.5))
    SimpleITK.WriteImage(volume, str(path))


def no_image(folder: Path) -> None:
    (folder / "imagesTr" / "case_1_0000.nii.gz").unlink()


def other_size(folder: Path) -> None:
    rewrite(folder / "labelsTr" / "case_0.nii.gz", lambda array: array[:-1])


def other_spacing(folder: Path) -> None:
    respace(folder / "labelsTr" / "case_0.nii.gz")


def mirrored_label(folder: Path) -> None:
    path = folder / "labelsTr" / "case_0.nii.gz"
    SimpleITK.WriteImage(SimpleITK.Flip(SimpleITK.ReadImage(str(path)), (True, False, False)), str(path))


def no_voxel_of_blob(folder: Path) -> None:
    for path in (folder / "labelsTr").iterdir():
        rewrite(path, lambda array: array * (array != 2))


def missing_channel(folder: Path) -> None:
    content = read_json(folder / "dataset.json")
    write_json(folder / "dataset.json", {**content, "channel_names": {"0": "MR", "1": "CT"}})
    shutil.copyfile(folder / "imagesTr" / "case_3_0000.nii.gz", folder / "imagesTr" / "case_3_0001.nii.gz")


def excess_channel(folder: Path) -> None:
    shutil.copyfile(folder / "imagesTr" / "case_1_0000.nii.gz", folder / "imagesTr" / "case_1_0001.nii.gz")


def unreadable_image(folder: Path) -> None:
    (folder / "imagesTr" / "case_0_0000.nii.gz").write_bytes(b"no volume")


def unreadable_label(folder: Path) -> None:
    (folder / "labelsTr" / "case_0.nii.gz").write_bytes(b"no volume")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_label, r"labelsTr/case_1.nii.gz: got no file, expected the label of image case_1_0000.nii.gz"),
        pytest.param(
            no_image,
            r"labelsTr/case_1.nii.gz: got a label without an image, expected case_1_0000.nii.gz in imagesTr",
            marks=VANISHED,
        ),
        (
            unknown_value,
            r"labelsTr/case_0.nii.gz: got label values \[7(\.0)?\], expected only \[0, 1, 2\] of dataset.json",
        ),
        pytest.param(
            other_size,
            r"case_0.nii.gz: got size \(24, 24, 15\), expected \(24, 24, 16\) as case_0_0000.nii.gz",
            marks=OTHER_GRID,
        ),
        pytest.param(
            other_spacing,
            r"case_0.nii.gz: got spacing \(1.5, 1.5, 2.5\) mm, expected \(1.5, 1.5, 2.0\) mm as case_0_0000.nii.gz",
            marks=OTHER_GRID,
        ),
        (no_voxel_of_blob, r"schedule.yaml: steps\[1\]: got no voxel of 'blob' in the labels of its 3 cases"),
        (missing_channel, r"case_0: got 1 images, expected one for each of the 2 channel_names"),
        (excess_channel, r"case_1: got 2 images, expected one for each of the 1 channel_names"),
        (unreadable_image, r"labelsTr/case_0.nii.gz: got an unreadable image or label"),
        (unreadable_label, r"labelsTr/case_0.nii.gz: got an unreadable image or label"),
    ],
)
def test_data_that_do_not_fit_are_named_and_nothing_is_written(source, nnunet_folders, tmp_path, damage, message):
    folder = copied(source, tmp_path)
    damage(folder)
    found = refusal(load_schedule(write_schedule(tmp_path / "schedule.yaml", folder)), nnunet_folders)
    assert re.search(message, found)
    expected = 3 if damage is missing_channel else 1
    assert len(re.findall(r"^  \S", found, re.MULTILINE)) == expected, (
        "each problem is told once, though both steps have the case"
    )


@pytest.mark.parametrize("kind", ["rgb", "rgb as one channel", "4d", "4d test subject"])
def test_files_that_hold_several_channels_are_refused_as_such(source, nnunet_folders, tmp_path, kind):
    folder = copied(source, tmp_path)
    described = read_json(folder / "dataset.json")
    names = {str(number): "MR" for number in range(1 if kind == "rgb as one channel" else 3)}
    if "rgb" in kind:
        for path in list(folder.glob("*Tr/*.nii.gz")):
            voxels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))[8].astype(np.uint8)
            image = np.stack([voxels] * 3, -1) if path.parent.name == "imagesTr" else voxels
            Image.fromarray(image).save(str(path).replace(".nii.gz", ".png"))
            path.unlink()
        described["file_ending"] = ".png"
    else:
        for path in (folder / "imagesTr").iterdir():
            SimpleITK.WriteImage(SimpleITK.JoinSeries([SimpleITK.ReadImage(str(path))] * 3), str(path))
    write_json(folder / "dataset.json", {**described, "channel_names": names})
    plans = "{patch_size: [16, 16], features_per_stage: [4, 8, 8]}"
    test = "test: [case_3]" if kind == "4d test subject" else ""
    schedule = cut(folder, tmp_path, test, configuration="2d", plans=plans)
    with pytest.raises(ValueError, match="with several channels in each, as RGB or NIfTI of four dimensions, are not"):
        prepare_chain(Chain.open(schedule), [])
    assert not list(nnunet_folders["nnUNet_raw"].iterdir())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(other_size, r"labelsTr/case_0.nii.gz: got size \(24, 24, 15\), expected", marks=OTHER_GRID),
        pytest.param(other_spacing, r"labelsTr/case_0.nii.gz: got spacing", marks=OTHER_GRID),
        pytest.param(mirrored_label, r"labelsTr/case_0.nii.gz: got axes along", marks=OTHER_GRID),
        (unknown_value, r"labelsTr/case_0.nii.gz: got label values \[7(\.0)?\], expected only \[0, 1, 2\]"),
        (unreadable_image, r"labelsTr/case_0.nii.gz: got an unreadable image or label"),
        (unreadable_label, r"labelsTr/case_0.nii.gz: got an unreadable image or label"),
    ],
)
def test_test_subjects_that_do_not_fit_are_named_with_the_rest(source, nnunet_folders, tmp_path, damage, message):
    folder = copied(source, tmp_path)
    write_json(folder / "split.json", {"test": ["case_0"]})
    no_label(folder)
    damage(folder)
    found = refusal(load_schedule(write_schedule(tmp_path / "schedule.yaml", folder)), nnunet_folders)
    assert re.search(message, found)
    assert "labelsTr/case_1.nii.gz: got no file" in found
    assert len(re.findall(r"^  \S", found, re.MULTILINE)) == 2


def stored_along(folder: Path, case: str, axes: str) -> None:
    for path in (folder / "imagesTr" / f"{case}_0000.nii.gz", folder / "labelsTr" / f"{case}.nii.gz"):
        SimpleITK.WriteImage(SimpleITK.DICOMOrient(SimpleITK.ReadImage(str(path)), axes), str(path))


def voxels_of_preprocessed(chain: Chain, case: str) -> np.ndarray:
    return np.asarray(nnunet_api.preprocessed_dataset(chain.preprocessed(1) / IDENTIFIER).load_case(case)[0][:])


@pytest.mark.parametrize("of_test", [False, True])
def test_images_along_different_axes_are_warned_of(source, nnunet_folders, tmp_path, caplog, of_test):
    folder = copied(source, tmp_path)
    stored_along(folder, "case_3" if of_test else "case_1", "RPS")
    chain = Chain.open(load_schedule(write_schedule(tmp_path / "schedule.yaml", folder)))
    prepare_chain(chain, [chain.variant("pgcd", 0)])
    (warning,) = [message for message in caplog.messages if "along different axes" in message]
    other = "1 along RPS: " + ("case_3" if of_test else "case_1.nii.gz")
    assert "3 along LPS: case_" in warning
    assert other in warning


def test_a_reader_that_turns_images_makes_their_axes_of_no_account(source, nnunet_folders, tmp_path, caplog):
    folder = copied(source, tmp_path)
    described = read_json(folder / "dataset.json")
    write_json(folder / "dataset.json", {**described, "overwrite_image_reader_writer": "NibabelIOWithReorient"})
    chain = Chain.open(load_schedule(write_schedule(tmp_path / "schedule.yaml", folder)))
    prepare_chain(chain, [chain.variant("pgcd", 0)])
    before = [voxels_of_preprocessed(chain, case) for case in ("case_0", "case_1")]
    stored_along(folder, "case_1", "RPS")
    again = Chain.open(load_schedule(write_schedule(tmp_path / "again.yaml", folder, name="again")))
    prepare_chain(again, [again.variant("pgcd", 0)])
    assert not any("along different axes" in message for message in caplog.messages)
    for case, expected in zip(("case_0", "case_1"), before, strict=True):
        np.testing.assert_allclose(voxels_of_preprocessed(again, case), expected, atol=1e-4)


def shear(path: Path) -> None:
    """Axes that are not perpendicular, which ITK refuses."""
    image = nibabel.load(path)
    voxels = np.asanyarray(image.dataobj).copy()
    sheared = nibabel.Nifti1Image(voxels, image.affine @ [[1, 0.05, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    sheared.to_filename(path)


@pytest.mark.parametrize("reader", ["NibabelIO", "NibabelIOWithReorient", "that of .nii"])
def test_axes_that_itk_refuses_are_compared_where_the_reader_is_nibabel(source, nnunet_folders, tmp_path, reader):
    folder = copied(source, tmp_path)
    described = read_json(folder / "dataset.json")
    if reader == "that of .nii":
        for path in list(folder.glob("*Tr/*.nii.gz")):
            SimpleITK.WriteImage(SimpleITK.ReadImage(str(path)), str(path).removesuffix(".gz"))
            path.unlink()
        described["file_ending"] = ".nii"
    else:
        described["overwrite_image_reader_writer"] = reader
    write_json(folder / "dataset.json", described)
    for path in folder.glob("*Tr/case_[13]*"):
        shear(path)
    schedule = load_schedule(write_schedule(tmp_path / "schedule.yaml", folder))
    check(schedule)
    assert {scan.problem for scan in scan_test_set(schedule).values()} == {None}
    label = folder / "labelsTr" / f"case_0{described['file_ending']}"
    SimpleITK.WriteImage(SimpleITK.Flip(SimpleITK.ReadImage(str(label)), (True, False, False)), str(label))
    assert f"{label}: got axes along" in refusal(schedule, nnunet_folders)


def test_folds_that_lack_cases_or_a_class_are_told_before_anything_is_written(nnunet_folders, tmp_path):
    folder = write_tiny_dataset(tmp_path / "source", n_cases=7)
    splits = nnunet_api.crossval_splits([f"case_{number}" for number in range(6)])
    kept = splits[0]["val"]
    for number in range(6):
        if f"case_{number}" not in kept:
            rewrite(folder / "labelsTr" / f"case_{number}.nii.gz", lambda array: array * (array != 2))
    schedule = load_schedule(write_schedule(tmp_path / "schedule.yaml", folder, fold="[0, 1]"))
    found = refusal(schedule, nnunet_folders)
    assert f"fold 0: got no voxel of ['blob'] in the labels of its {len(splits[0]['train'])} training cases" in found
    assert "fold 1" not in found

    few = write_tiny_dataset(tmp_path / "few", n_cases=2)
    found = refusal(load_schedule(write_schedule(tmp_path / "few.yaml", few, fold="[0, 1]")), nnunet_folders)
    assert re.findall(r"steps\[(\d)\]: fold (\d): got no training case, as the step has 1", found) == [
        ("0", "1"),
        ("1", "1"),
    ]


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.faults("NaN image", "refused by name before anything is written, also where SimpleITK hides it", "nothing")
def test_voxels_that_are_not_finite_are_refused(nnunet_folders, tmp_path, value):
    folder = as_nrrd(write_tiny_dataset(tmp_path / "source", n_cases=2))
    rewrite(folder / "imagesTr" / "case_0_0000.nrrd", set_voxel(value))
    found = refusal(load_schedule(write_schedule(tmp_path / "schedule.yaml", folder)), nnunet_folders)
    assert "imagesTr/case_0_0000.nrrd: got voxels that are not finite (NaN or infinite), expected numbers" in found


@pytest.mark.parametrize("ending", [".nrrd", ".nii.gz"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.faults("NaN label", "refused by name before anything is written, also where SimpleITK hides it", "nothing")
def test_labels_that_are_not_finite_are_refused(nnunet_folders, tmp_path, ending, value):
    folder = write_tiny_dataset(tmp_path / "source", n_cases=2)
    if ending == ".nrrd":
        as_nrrd(folder)
    rewrite(folder / "labelsTr" / f"case_0{ending}", lambda array: set_voxel(value)(array.astype(np.float32)))
    found = refusal(load_schedule(write_schedule(tmp_path / "schedule.yaml", folder)), nnunet_folders)
    assert f"labelsTr/case_0{ending}: got voxels that are not finite (NaN or infinite), expected numbers" in found


def test_a_class_that_no_test_subject_has_is_warned_of(source, nnunet_folders, tmp_path, caplog):
    folder = copied(source, tmp_path)
    rewrite(folder / "labelsTr" / "case_3.nii.gz", lambda array: array * (array != 2))
    chain = Chain.open(load_schedule(write_schedule(tmp_path / "schedule.yaml", folder)))
    write_test_set(chain)
    (warning,) = [message for message in caplog.messages if "test: got no voxel" in message]
    assert "got no voxel of 'blob' in the labels of its 1 subjects, so it is not scored" in warning


@pytest.mark.parametrize("name", ["imagesTr/case_0_0000.nii.gz", "labelsTr/case_0.nii.gz"])
def test_truncated_file_is_refused(tmp_path, name):
    folder = write_tiny_dataset(tmp_path / "source", n_cases=3)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="case_0"):
        check(load_schedule(write_schedule(tmp_path / "schedule.yaml", folder)))


def test_sizes_of_2d_pictures_are_compared(tmp_path):
    folder = tmp_path / "source"
    labels = {"background": 0, "ball": 1, "blob": 2}
    content = {"channel_names": {"0": "R"}, "labels": labels, "file_ending": ".png", "numTraining": 2}
    write_json(folder / "dataset.json", content)
    write_json(folder / "split.json", {"test": ["case_1"]})
    for case, height in (("case_0", 20), ("case_1", 24)):
        for name, shape in ((f"imagesTr/{case}_0000.png", (24, 24)), (f"labelsTr/{case}.png", (height, 24))):
            (folder / name).parent.mkdir(exist_ok=True)
            Image.fromarray(np.eye(*shape, dtype=np.uint8)).save(folder / name)
    path = write_schedule(tmp_path / "schedule.yaml", folder, configuration="2d", plans="{patch_size: [16, 16]}")
    with pytest.raises(ValueError, match=r"case_0\.png"):
        check(load_schedule(path))


def test_all_problems_are_named_at_once(nnunet_folders, tmp_path):
    source = write_tiny_dataset(tmp_path / "source", n_cases=6)
    unknown_value(source)
    no_label(source)
    shutil.copyfile(source / "imagesTr" / "case_2_0000.nii.gz", source / "imagesTr" / "case_2_0001.nii.gz")
    (source / "imagesTr" / "case_3_0000.nii.gz").unlink()
    rewrite(source / "labelsTr" / "case_4.nii.gz", lambda array: array[:, 1:])
    write_json(source / "split.json", {"test": ["case_5"]})
    found = refusal(load_schedule(write_schedule(tmp_path / "schedule.yaml", source)), nnunet_folders)
    for name, problem in [
        ("labelsTr/case_0.nii.gz", "label values"),
        ("labelsTr/case_1.nii.gz", "no file"),
        ("case_2", "2 images"),
        ("labelsTr/case_3.nii.gz", "a label without an image"),
        ("labelsTr/case_4.nii.gz", "size"),
    ]:
        assert f"{name}: got {problem}" in found
    assert len(found.splitlines()) == 6


def test_problems_of_all_own_datasets_are_named(nnunet_folders, tmp_path):
    schedule = write_own_datasets(tmp_path)
    unknown_value(tmp_path / "one")
    no_label(tmp_path / "two")
    found = refusal(schedule, nnunet_folders)
    assert f"{tmp_path}/one/labelsTr/case_0.nii.gz: got label values" in found
    assert f"{tmp_path}/two/labelsTr/case_1.nii.gz: got no file" in found


def test_own_datasets_with_different_channels_are_refused(tmp_path):
    schedule = write_own_datasets(tmp_path).file
    schedule.write_text(
        schedule.read_text(encoding="utf-8").replace("  - {dataset: two, subjects: [case_2], classes: [blob]}\n", "")
    )
    folder = tmp_path / "two"
    for path in list((folder / "imagesTr").iterdir()):
        shutil.copyfile(path, path.with_name(path.name.replace("_0000", "_0001")))
    content = read_json(folder / "dataset.json")
    write_json(folder / "dataset.json", {**content, "channel_names": {"0": "MR", "1": "CT"}})
    with pytest.raises(ValueError, match=r"two/dataset.json: channel_names: got .*, expected .*'MR'} as in step 1"):
        check(load_schedule(schedule))


def test_step_whose_cases_are_all_for_test_is_refused(nnunet_folders, tmp_path):
    schedule = write_own_datasets(tmp_path)
    schedule.file.write_text(
        schedule.file.read_text(encoding="utf-8").replace("dataset: two, subjects: [case_2]", "dataset: two")
    )
    found = refusal(load_schedule(schedule.file), nnunet_folders)
    assert re.search(r"own.yaml: steps\[1\]: got no training case in .*two, .*not a test subject", found)


def test_more_disjoint_steps_than_cases_are_refused(source, nnunet_folders, tmp_path):
    write_json(tmp_path / "split.json", {"train": ["case_0"], "test": ["case_3"]})
    schedule = cut(source, tmp_path, test=f"test: {tmp_path}/split.json", images="disjoint")
    shown = refusal(schedule, nnunet_folders)
    assert "steps[1]: got no training case, as `images: disjoint` deals 1 training subjects to 2 steps" in shown
    assert "Set `images: shared`, or take fewer steps." in shown


def test_unknown_value_in_a_test_label_is_named_with_its_file(source, nnunet_folders, tmp_path):
    folder = copied(source, tmp_path)
    rewrite(folder / "labelsTr" / "case_3.nii.gz", set_voxel(7))
    chain = Chain.open(load_schedule(write_schedule(tmp_path / "schedule.yaml", folder)))
    with pytest.raises(ValueError, match=r"labelsTr/case_3.nii.gz: got label values \[7(\.0)?\], expected"):
        prepare_chain(chain, [chain.variant("pgcd", 0)])
    assert list(nnunet_folders["nnUNet_raw"].iterdir()) == []
    assert not (chain.folder / "test").exists()


def test_test_image_without_label_is_refused(source, nnunet_folders, tmp_path):
    folder = copied(source, tmp_path)
    (folder / "labelsTr" / "case_3.nii.gz").unlink()
    chain = Chain.open(load_schedule(write_schedule(tmp_path / "schedule.yaml", folder)))
    with pytest.raises(
        FileNotFoundError, match=r"labelsTr/case_3.nii.gz: got no file, .* test image case_3_0000.nii.gz"
    ):
        prepare_chain(chain, [chain.variant("pgcd", 0)])
    assert list(nnunet_folders["nnUNet_raw"].iterdir()) == []
    assert not (chain.folder / "test").exists()


def test_test_set_of_another_file_type_is_refused(source, nnunet_folders, tmp_path):
    other = as_nrrd(write_tiny_dataset(tmp_path / "other", n_cases=1))
    chain = Chain.open(cut(source, tmp_path, test=f"test: {{dataset: {other}}}"))
    with pytest.raises(ValueError, match=r"other: got files of type .nrrd, expected .nii.gz"):
        write_test_set(chain)
