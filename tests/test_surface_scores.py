from __future__ import annotations

import numpy as np
import pytest
import SimpleITK
from scipy import ndimage
from scipy.spatial.distance import cdist

from nnunet_cil.nnunet_api import case_metrics
from nnunet_cil.surface_scores import absence, surface_scores

SPACING_MM = (3.0, 1.0, 0.5)
SHAPE = (20, 40, 60)
BOX = (slice(4, 12), slice(10, 25), slice(20, 40))  # 24 x 15 x 10 mm


def box(shift=(0, 0, 0), cut=BOX) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[tuple(slice(part.start + n, part.stop + n) for part, n in zip(cut, shift, strict=True))] = True
    return mask


def scores(reference, prediction, spacing_mm=SPACING_MM, tolerance_mm=2.0):
    found = surface_scores(reference, prediction, spacing_mm, tolerance_mm)
    assert surface_scores(prediction, reference, spacing_mm, tolerance_mm) == pytest.approx(found, nan_ok=True)
    return found["hd95_mm"], found["nsd"]


@pytest.mark.parametrize(("axis", "voxels"), [(0, 2), (1, 4), (2, 6)])
def test_a_shifted_box_is_as_far_away_as_it_was_shifted_in_mm(axis, voxels):
    shift = [voxels if a == axis else 0 for a in range(3)]
    shifted_mm = voxels * SPACING_MM[axis]
    assert scores(box(), box(shift))[0] == pytest.approx(shifted_mm)
    assert scores(box(), box(shift), tolerance_mm=shifted_mm)[1] == 1.0
    assert scores(box(), box(shift), tolerance_mm=shifted_mm - 0.1)[1] < 1.0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_nsd_of_a_shifted_box_is_the_share_of_its_area(axis):
    """Of each box: the walls along the shift agree up to the tolerance beyond the overlap; of the ends, one's rim."""
    spacing_mm, sides, tolerance_mm, shifted_mm = np.array([0.75, 0.5, 0.25]), np.array([24.0, 15.0, 10.0]), 2.1, 4.5
    voxels = (sides / spacing_mm).astype(int)
    reference = np.zeros(voxels + 20, bool)
    reference[tuple(slice(1, 1 + n) for n in voxels)] = True
    prediction = np.roll(reference, round(shifted_mm / spacing_mm[axis]), axis)
    along, (a, b) = sides[axis], np.delete(sides, axis)
    rim = a * b - (a - 2 * tolerance_mm) * (b - 2 * tolerance_mm)
    expected = (2 * (a + b) * (along - shifted_mm + tolerance_mm) + rim) / (2 * (a + b) * along + 2 * a * b)
    assert scores(reference, prediction, spacing_mm, tolerance_mm)[1] == pytest.approx(expected, abs=0.02)


def test_equal_masks():
    assert scores(box(), box(), tolerance_mm=0.0) == (0.0, 1.0)


def test_concentric_balls():
    distance = np.linalg.norm(np.stack(np.indices((33, 33, 33)), -1) - 16.0, axis=-1)
    inner, outer = distance < 9, distance < 13
    assert scores(inner, outer, (1.0, 1.0, 1.0))[0] == pytest.approx(4.0, abs=0.8)
    assert scores(inner, outer, (1.0, 1.0, 1.0), tolerance_mm=2.0)[1] == 0.0
    assert scores(inner, outer, (1.0, 1.0, 1.0), tolerance_mm=6.0)[1] == 1.0
    assert scores(inner, outer, (2.0, 2.0, 2.0))[0] == pytest.approx(8.0, abs=1.6)


def test_one_voxel_far_away_is_beyond_the_95th_percentile_but_counts_in_the_nsd():
    stray = box()
    stray[18, 38, 58] = True
    hd95, nsd = scores(box(), stray)
    assert hd95 == 0.0
    assert 0.9 < nsd < 1.0


def test_hd95_agrees_with_all_distances_between_all_surface_voxels():
    rng = np.random.default_rng(0)
    reference, prediction = (ndimage.gaussian_filter(rng.normal(size=(14, 18, 20)), 2) > 0.02 for _ in range(2))
    edges = [
        np.argwhere(mask & ~ndimage.binary_erosion(mask)) * np.array(SPACING_MM) for mask in (reference, prediction)
    ]
    distances = cdist(*edges)
    expected = max(np.percentile(distances.min(0), 95), np.percentile(distances.min(1), 95))
    assert scores(reference, prediction)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("room", [0, 1, 7])
def test_the_image_around_the_masks_does_not_matter(room):
    reference, prediction = np.ones((8, 15, 20), bool), np.ones((8, 15, 20), bool)
    prediction[:2] = False
    padded = [np.pad(mask, room) for mask in (reference, prediction)]
    assert scores(*padded) == pytest.approx(scores(box(), box(cut=(slice(6, 12), *BOX[1:]))))


def test_empty_masks():
    nothing = np.zeros(SHAPE, bool)
    assert all(np.isnan(value) for value in scores(nothing, nothing))
    hd95, nsd = scores(box(), nothing)
    assert np.isnan(hd95)
    assert nsd == 0.0


def test_why_a_score_is_absent():
    assert [absence(*counts) for counts in ((0, 0), (5, 0), (0, 5), (5, 5))] == [
        "both_empty",
        "missed",
        "invented",
        None,
    ]


def test_a_single_slice_is_scored_in_its_plane():
    """nnU-Net reads a 2D image as one slice with a made-up spacing of 999."""
    reference = np.zeros((1, 40, 40), bool)
    reference[0, 5:25, 5:25] = True
    prediction = np.roll(reference, 6, axis=1)
    found = surface_scores(reference, prediction, (999.0, 0.5, 2.0), 1.0)
    assert found == surface_scores(reference[0], prediction[0], (0.5, 2.0), 1.0)
    assert found["hd95_mm"] == pytest.approx(3.0)
    # sides of 10 and 40 mm, shifted along the first: 2 * (10 - 3 + 1) of the walls, 2 * 1 of one end
    assert found["nsd"] == pytest.approx((2 * (10 - 3 + 1) + 2 * 1) / (2 * 10 + 2 * 40), abs=0.03)


@pytest.mark.parametrize(
    ("reference", "prediction", "spacing_mm", "message"),
    [
        (box(), box()[1:], SPACING_MM, "boolean masks of one shape"),
        (box().astype(np.uint8), box(), SPACING_MM, "boolean masks of one shape"),
        (box(), box(), (1.0, 1.0), "3 positive numbers"),
        (box(), box(), (1.0, 0.0, 1.0), "3 positive numbers"),
    ],
)
def test_wrong_arguments(reference, prediction, spacing_mm, message):
    with pytest.raises(ValueError, match=message):
        surface_scores(reference, prediction, spacing_mm, 2.0)


@pytest.fixture
def write(tmp_path):
    def write(name, labels):
        volume = SimpleITK.GetImageFromArray(labels.astype(np.uint8))
        volume.SetSpacing(SPACING_MM[::-1])
        SimpleITK.WriteImage(volume, str(tmp_path / name))
        return tmp_path / name

    return write


def test_a_case_is_scored_by_nnunets_dice_and_in_mm_of_its_own_axes(write):
    reference, prediction = 1 * box(), 1 * box((2, 0, 0))
    reference[0, 0, :5] = 2
    prediction[0, 0, 10:15] = 3
    files = write("r.nii.gz", reference), write("p.nii.gz", prediction)
    found = case_metrics(*files, {"file_ending": ".nii.gz"}, [1, 2, 3, 4], 9, 6.0)
    assert found[1]["Dice"] == pytest.approx(6 / 8)
    assert (found[1]["hd95_mm"], found[1]["nsd"]) == pytest.approx((6.0, 1.0))
    for label, n_ref, n_pred in ((2, 5, 0), (3, 0, 5)):
        assert [found[label][key] for key in ("Dice", "nsd", "n_ref", "n_pred")] == [0, 0, n_ref, n_pred]
        assert np.isnan(found[label]["hd95_mm"])
    assert all(np.isnan(found[4][key]) for key in ("Dice", "hd95_mm", "nsd"))


def test_a_case_is_scored_around_each_organ_as_in_the_whole_image(write, monkeypatch):
    reference, prediction = 1 * box(), 1 * box((2, 3, 1))
    reference[13, 2:9, 2:9] = prediction[13, 3:9, 2:8] = 2  # in a single slice of many
    reference[15:, 35:, 40:] = prediction[:2, :5, :7] = 3  # apart, each in a corner
    reference[19, 0, 0], prediction[17, 20:, 5] = 4, 5
    looked_at = []

    def seen(reference, prediction, *others):
        looked_at.append(max(reference.size, prediction.size))
        return surface_scores(reference, prediction, *others)

    monkeypatch.setattr("nnunet_cil.nnunet_api.surface_scores", seen)
    files = write("r.nii.gz", reference), write("p.nii.gz", prediction)
    found = case_metrics(*files, {"file_ending": ".nii.gz"}, [1, 2, 3, 4, 5, 6], None, 2.0)
    for label in found:
        whole = surface_scores(reference == label, prediction == label, SPACING_MM, 2.0)
        assert {key: found[label][key] for key in whole} == pytest.approx(whole, nan_ok=True)
    assert looked_at[0] < reference.size / 3, "an abdominal CT has 80 million voxels, an organ far fewer"


def test_ignored_voxels_take_part_in_no_score(write):
    reference, prediction = 1 * box(), 1 * box()
    reference[15:], prediction[16:18, 10:25, 20:40] = 9, 1  # an island, where nobody knows what is there
    files = write("r.nii.gz", reference), write("p.nii.gz", prediction)
    ignoring = case_metrics(*files, {"file_ending": ".nii.gz"}, [1], 9, 2.0)[1]
    assert (ignoring["Dice"], ignoring["hd95_mm"], ignoring["nsd"]) == (1.0, 0.0, 1.0)
    knowing = case_metrics(*files, {"file_ending": ".nii.gz"}, [1], None, 2.0)[1]
    assert knowing["Dice"] < 1
    assert knowing["hd95_mm"] > 10
    assert knowing["nsd"] < 1
