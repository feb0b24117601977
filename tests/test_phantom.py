from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest
import SimpleITK
from scipy import ndimage

from nnunet_cil.phantom import LABELS, make_subject, write_phantom


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw") / "Dataset999_Phantom"
    write_phantom(folder, n_train=4, n_test=2)
    return folder


def _read(path):
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path))


def _subjects(folder):
    return [
        (_read(folder / "imagesTr" / f"{path.name[:-7]}_0000.nii.gz"), _read(path))
        for path in sorted((folder / "labelsTr").iterdir())
    ]


def test_is_a_raw_dataset(dataset):
    description = json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))
    assert description["channel_names"] == {"0": "MR"}
    assert description["labels"] == LABELS
    assert list(LABELS) == ["background", "liver", "spleen", "right_kidney", "left_kidney"]
    assert description["numTraining"] == len(list((dataset / "imagesTr").iterdir())) == 6
    split = json.loads((dataset / "split.json").read_text(encoding="utf-8"))
    assert len(split["train"]) == 4
    assert len(split["test"]) == 2
    assert sorted(f"{s}.nii.gz" for s in split["train"] + split["test"]) == sorted(
        p.name for p in (dataset / "labelsTr").iterdir()
    )


def test_image_and_label_share_their_geometry(dataset):
    for path in (dataset / "labelsTr").iterdir():
        label = SimpleITK.ReadImage(path)
        image = SimpleITK.ReadImage(dataset / "imagesTr" / path.name.replace(".nii.gz", "_0000.nii.gz"))
        assert image.GetSize() == label.GetSize() == (80, 64, 32)
        assert image.GetSpacing() == pytest.approx((2.5, 2.5, 3.0))
        assert label.GetSpacing() == pytest.approx(image.GetSpacing())
        assert label.GetOrigin() == image.GetOrigin()
        assert label.GetDirection() == image.GetDirection()


def test_every_subject_has_four_whole_organs(dataset):
    for image, labels in _subjects(dataset):
        assert np.isfinite(image).all()
        assert image.min() >= 0
        assert set(np.unique(labels)) == set(range(5))
        for value in range(1, 5):
            sizes = np.bincount(ndimage.label(labels == value)[0].ravel())[1:]
            assert sizes.max() > 500
            assert sizes.max() > 0.95 * sizes.sum()


def test_organs_lie_where_they_do_in_the_body(dataset):
    for _, labels in _subjects(dataset):
        z, y, x = np.array(ndimage.center_of_mass(labels > 0, labels, [1, 2, 3, 4])).T
        liver, spleen, right, left = range(4)
        assert max(x[liver], x[right]) < 40 < min(x[spleen], x[left])
        assert max(z[right], z[left]) < min(z[liver], z[spleen])
        assert y[liver] < min(y[right], y[left])


def test_subjects_differ_in_size_place_and_image(dataset):
    subjects = _subjects(dataset)
    for (image_a, labels_a), (image_b, labels_b) in combinations(subjects, 2):
        assert not np.array_equal(image_a, image_b)
        for value in range(1, 5):
            a, b = labels_a == value, labels_b == value
            dice = 2 * (a & b).sum() / (a.sum() + b.sum())
            assert dice < 0.95
    sizes = np.array([np.bincount(labels.ravel()) for _, labels in subjects])
    assert (sizes[:, 1:].std(axis=0) / sizes[:, 1:].mean(axis=0) > 0.03).all()


def test_the_same_seed_writes_the_same_voxels(dataset, tmp_path):
    write_phantom(tmp_path / "again", n_train=1, n_test=1)
    for (image, labels), (image_again, labels_again) in zip(
        _subjects(dataset)[:2], _subjects(tmp_path / "again"), strict=True
    ):
        np.testing.assert_array_equal(image, image_again)
        np.testing.assert_array_equal(labels, labels_again)


def test_another_seed_writes_other_subjects(dataset, tmp_path):
    write_phantom(tmp_path / "other", n_train=1, n_test=0, seed=1)
    ((_, labels),) = _subjects(tmp_path / "other")
    assert all(not np.array_equal(labels, known) for _, known in _subjects(dataset))


def test_intensity_alone_does_not_tell_organs_apart(dataset):
    images, labels = (np.stack(arrays) for arrays in zip(*_subjects(dataset), strict=True))
    bins = np.linspace(0, images.max(), 60)
    shares = [np.histogram(images[labels == value], bins)[0] / (labels == value).sum() for value in range(5)]
    overlap = {(a, b): np.minimum(shares[a], shares[b]).sum() for a, b in combinations(range(1, 5), 2)}
    assert min(overlap.values()) > 0.35
    assert overlap[3, 4] > 0.7
    counts = np.array([np.histogram(images[labels == value], bins)[0] for value in range(5)])
    decided = counts.argmax(axis=0)
    for value in range(1, 5):
        hit = counts[value, decided == value].sum()
        dice = 2 * hit / (counts[:, decided == value].sum() + counts[value].sum())
        assert dice < 0.5


def test_a_finished_dataset_is_not_overwritten_and_an_interrupted_one_is_finished(tmp_path):
    write_phantom(tmp_path, n_train=1, n_test=0, shape=(16, 24, 24))
    with pytest.raises(FileExistsError, match="already holds a dataset"):
        write_phantom(tmp_path, n_train=1, n_test=0, shape=(16, 24, 24))
    (tmp_path / "dataset.json").unlink()
    write_phantom(tmp_path, n_train=1, n_test=0, shape=(16, 24, 24))
    assert (tmp_path / "dataset.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_train": 0}, "n_train"),
        ({"n_test": -1}, "n_test"),
        ({"shape": (8, 64, 80)}, "shape"),
        ({"shape": (64, 80)}, "shape"),
        ({"spacing_mm": (3.0, 0.0, 2.5)}, "spacing_mm"),
    ],
)
def test_wrong_arguments_write_nothing(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_phantom(tmp_path / "set", **arguments)
    assert not (tmp_path / "set").exists()


def test_a_subject_depends_on_its_generator_only():
    first, again = (make_subject(np.random.default_rng(7), (16, 24, 24)) for _ in range(2))
    assert first[0].dtype == np.float32
    assert first[1].dtype == np.uint8
    np.testing.assert_array_equal(first[0], again[0])
