"""Writing a dataset: whole or not at all, never over another one, and all problems at once."""

import gzip
import os
from dataclasses import replace

import nibabel
import numpy as np
import pytest

from nnunet_cil.convert import word
from nnunet_cil.convert.write import write_dataset
from tests.convert.made_up import make_word, oblique, volumes, write_nifti


@pytest.fixture
def source(tmp_path):
    return make_word(tmp_path)


def entries(nnunet_folders):
    return sorted(path.name for path in nnunet_folders["nnUNet_raw"].iterdir())


def test_name_and_number(source, nnunet_folders):
    converted = write_dataset(word.find(source), 7, "my-WORD_1")
    assert converted.folder == nnunet_folders["nnUNet_raw"] / "Dataset007_my-WORD_1"
    assert entries(nnunet_folders) == ["Dataset007_my-WORD_1"]


def test_fewer_subjects_than_published_are_told_before_any_is_read(source, nnunet_folders, caplog):
    found = word.find(source)

    def unread(case, folder, known):
        assert "WORD: got 3 labelled subjects in imagesTr, expected 100 as published." in caplog.text
        return found.write(case, folder, known)

    write_dataset(replace(found, write=unread), 7)
    assert "got 1 labelled subjects in imagesTs, expected 30" in caplog.text
    caplog.clear()
    write_dataset(replace(found, sizes={"imagesTr": 3, "imagesVal": 2, "imagesTs": 1}), 8)
    assert not caplog.text


def test_images_are_links(source, nnunet_folders):
    folder = write_dataset(word.find(source), 7).folder
    copy = folder / "imagesTr" / "word_0002_0000.nii.gz"
    assert os.path.samefile(copy, source / "imagesTr" / "word_0002.nii.gz")


def test_an_existing_dataset_is_not_touched(source, nnunet_folders):
    folder = nnunet_folders["nnUNet_raw"] / "Dataset007_WORD"
    folder.mkdir()
    with pytest.raises(FileExistsError, match="not touched"):
        write_dataset(word.find(source), 7)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("where", ["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"])
def test_a_number_in_use_is_refused(source, nnunet_folders, where):
    (nnunet_folders[where] / "Dataset007_Other").mkdir()
    with pytest.raises(ValueError, match="got 7, expected a number that is free: Dataset007_Other has it"):
        write_dataset(word.find(source), 7)


@pytest.mark.parametrize("number", [0, 1000, -3])
def test_a_number_out_of_range_is_refused(source, nnunet_folders, number):
    with pytest.raises(ValueError, match=f"--dataset-id: got {number}, expected a number from 1 to 999"):
        write_dataset(word.find(source), number)


@pytest.mark.parametrize("name", ["a b", "../x", "_x", "ä"])
def test_a_name_that_is_no_folder_name_is_refused(source, nnunet_folders, name):
    with pytest.raises(ValueError, match="--name: got"):
        write_dataset(word.find(source), 7, name)
    assert entries(nnunet_folders) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_write_leaves_nothing(source, nnunet_folders, error):
    found = word.find(source)

    def interrupted(case, folder, known):
        if case.name == "word_0003":
            raise error
        return found.write(case, folder, known)

    with pytest.raises(error):
        write_dataset(replace(found, write=interrupted), 7)
    assert entries(nnunet_folders) == []
    assert write_dataset(found, 7).folder.is_dir()


def test_what_a_killed_run_left_is_replaced(source, nnunet_folders):
    left = nnunet_folders["nnUNet_raw"] / ".Dataset007_WORD.part" / "imagesTr"
    left.mkdir(parents=True)
    (left / "word_9999_0000.nii.gz").write_bytes(b"")
    folder = write_dataset(word.find(source), 7).folder
    assert not (folder / "imagesTr" / "word_9999_0000.nii.gz").exists()
    assert entries(nnunet_folders) == ["Dataset007_WORD"]


def test_all_problems_of_the_cases_come_at_once_and_nothing_is_written(source, nnunet_folders):
    labels = source / "labelsTr"
    write_nifti(labels / "word_0002.nii.gz", np.full((4, 5, 6), 17, np.uint8))
    write_nifti(labels / "word_0003.nii.gz", volumes(3)[1], oblique(spacing_mm=(0.7, 0.9, 3.0)))
    write_nifti(labels / "word_0005.nii.gz", volumes(3, (4, 5, 7))[1])
    damaged = source / "labelsVal" / "word_0009.nii.gz"
    damaged.write_bytes(gzip.compress(gzip.decompress(damaged.read_bytes())[:400]))
    (source / "imagesTs" / "word_0014.nii.gz").write_bytes(b"junk")
    with pytest.raises(ValueError, match="5 of 6 cases cannot be converted; nothing was written") as error:
        write_dataset(word.find(source), 7)
    text = str(error.value)
    for part in (
        "word_0002.nii.gz: got label values [17], expected only [0, 1, 2",
        "spacing (0.7, 0.9, 3) mm",
        "spacing (0.7, 0.9, 3.3) mm",
        "got size (4, 5, 7)",
        "size (4, 5, 6)",
        "word_0009",
        "word_0014.nii.gz: got an unreadable file",
    ):
        assert part in text
    assert entries(nnunet_folders) == []


def test_damaged_files_are_named(source, nnunet_folders):
    """An image that is cut off within its voxels, and a label one bit of which has changed: both can be opened."""
    voxels = np.random.default_rng(0).integers(-1000, 1000, (20, 20, 20), np.int16)
    image, label = source / "imagesTr" / "word_0002.nii.gz", source / "labelsTr" / "word_0003.nii.gz"
    for name in (image.name, label.name):
        write_nifti(source / "imagesTr" / name, voxels)
        write_nifti(source / "labelsTr" / name, np.zeros((20, 20, 20), np.uint8))
    image.write_bytes(image.read_bytes()[:-1000])
    stored = bytearray(gzip.compress(gzip.decompress(label.read_bytes()), 0))
    stored[-9] ^= 1  # the last voxel; checksum and length stand behind it
    label.write_bytes(stored)
    with pytest.raises(ValueError, match="2 of 6 cases cannot be converted; nothing was written") as error:
        write_dataset(word.find(source), 7)
    for path in (image, label):
        assert f"{path}: got a damaged file (" in str(error.value)


@pytest.mark.parametrize("name", ["origin", "direction", "flip"])
def test_a_label_elsewhere_is_refused(source, nnunet_folders, name):
    affine = {
        "origin": oblique(origin=(-12.5, 33.25, -400.0)),
        "direction": np.diag([0.7, -0.9, 3.3, 1.0]),
        "flip": oblique(flip=(1, 1, 1)),
    }[name]
    write_nifti(source / "labelsTr" / "word_0003.nii.gz", volumes(3)[1], affine)
    with pytest.raises(ValueError, match=r"word_0003\.nii\.gz: got size .* expected the grid of .*word_0003\.nii\.gz"):
        write_dataset(word.find(source), 7)


def test_a_label_off_by_rounding_takes_the_grid_of_its_image(source, nnunet_folders, caplog):
    affine = np.round(oblique(), 3)
    assert 0.001 < np.abs(affine - oblique()).max() * 5 < 0.07
    write_nifti(source / "labelsTr" / "word_0003.nii.gz", volumes(16)[1], affine, with_qform=False)
    with caplog.at_level("INFO", "nnunet_cil"):
        folder = write_dataset(word.find(source), 7).folder
    image, label = (
        nibabel.load(folder / part) for part in ("imagesTr/word_0003_0000.nii.gz", "labelsTr/word_0003.nii.gz")
    )
    np.testing.assert_array_equal(image.affine, label.affine)
    np.testing.assert_array_equal(np.asanyarray(label.dataobj), volumes(16)[1])
    assert "1 labels took the grid of their image" in caplog.text


def test_images_whose_axes_are_not_perpendicular_are_told(source, nnunet_folders, caplog):
    affine = oblique()
    affine[:3, 2] += 0.01 * affine[:3, 0]
    for part in ("images", "labels"):
        write_nifti(source / f"{part}Tr" / "word_0005.nii.gz", volumes(16)[part == "labels"], affine, with_qform=False)
    folder = write_dataset(word.find(source), 7).folder
    image, label = (
        nibabel.load(folder / part) for part in ("imagesTr/word_0005_0000.nii.gz", "labelsTr/word_0005.nii.gz")
    )
    np.testing.assert_array_equal(image.affine, label.affine)
    assert "1 images have axes that are not perpendicular" in caplog.text
    assert "word_0005" in caplog.text
