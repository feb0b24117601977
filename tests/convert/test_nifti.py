import nibabel
import numpy as np
import pytest
import SimpleITK

from nnunet_cil.convert import nifti
from tests.convert.made_up import oblique, volumes, write_nifti

SHAPE = (4, 5, 6)


def sheared(by: float) -> np.ndarray:
    affine = oblique()
    affine[:3, 2] += by * np.linalg.norm(affine[:3, 2]) * affine[:3, 0] / np.linalg.norm(affine[:3, 0])
    return affine


def test_corner_distance_by_hand():
    first = np.diag([1.0, 1, 1, 1])
    second = np.diag([1.0, 1, 1.1, 1])
    assert nifti.corner_distance_mm(first, second, (3, 3, 11)) == pytest.approx(1.0)
    second[:3, 3] = (3, 4, 0)
    assert nifti.corner_distance_mm(first, second, (3, 3, 1)) == pytest.approx(5.0)


def test_perpendicular_keeps_what_is_so_already():
    np.testing.assert_allclose(nifti.perpendicular(oblique(), SHAPE), oblique(), atol=1e-12)


def test_perpendicular_keeps_spacing_centre_and_handedness():
    affine = sheared(0.05)
    result = nifti.perpendicular(affine, SHAPE)
    axes = result[:3, :3] / nifti.spacing_mm(result)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(nifti.spacing_mm(result), nifti.spacing_mm(affine))
    centre = [*((np.array(SHAPE) - 1) / 2), 1]
    np.testing.assert_allclose(result @ centre, affine @ centre)
    assert np.linalg.det(axes) == pytest.approx(np.sign(np.linalg.det(affine[:3, :3])))


def test_image_is_hard_linked(tmp_path):
    source = write_nifti(tmp_path / "a.nii.gz", volumes(3)[0])
    assert nifti.place_image(source, tmp_path / "b.nii.gz") == 0
    assert (tmp_path / "b.nii.gz").stat().st_ino == source.stat().st_ino


@pytest.mark.parametrize("shear", [1e-3, 0.1])
def test_image_that_itk_refuses_gets_perpendicular_axes_and_keeps_its_voxels(tmp_path, shear):
    voxels = volumes(3)[0]
    affine = sheared(shear)
    source = write_nifti(tmp_path / "a.nii.gz", voxels, affine, with_qform=False)
    image = nibabel.load(source)  # scaled, as CT from some tools is
    image.header.set_slope_inter(2, -1000)
    nibabel.save(nibabel.Nifti1Image(voxels, affine, image.header), source)
    with pytest.raises(RuntimeError, match="orthonormal"):
        SimpleITK.ReadImage(str(source))
    target = tmp_path / "b.nii.gz"
    moved = nifti.place_image(source, target)
    written = SimpleITK.ReadImage(str(target))
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(written).T, np.asanyarray(nibabel.load(source).dataobj))
    assert moved == pytest.approx(nifti.corner_distance_mm(affine, nibabel.load(target).affine, SHAPE), abs=1e-5)
    assert 0 < moved < 20 * shear
    np.testing.assert_allclose(written.GetSpacing(), nifti.spacing_mm(affine), rtol=1e-6)


def test_labels_have_the_header_of_the_image_bit_for_bit(tmp_path):
    image, labels = volumes(3)
    source = write_nifti(tmp_path / "image.nii.gz", image)
    nifti.write_labels(tmp_path / "labels.nii.gz", labels, source)
    first, second = (nibabel.load(path).header for path in (source, tmp_path / "labels.nii.gz"))
    for field in ("pixdim", "qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "qoffset_x", "dim"):
        np.testing.assert_array_equal(first[field], second[field])
    assert second.get_data_dtype() == np.uint8
    first, second = (SimpleITK.ReadImage(str(path)) for path in (source, tmp_path / "labels.nii.gz"))
    assert (first.GetOrigin(), first.GetSpacing(), first.GetDirection()) == (
        second.GetOrigin(),
        second.GetSpacing(),
        second.GetDirection(),
    )
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(second).T, labels)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.float32, np.float64])
def test_labels_of_any_type(dtype):
    labels = nifti.as_labels(np.array([[[0, 3, 1]]], dtype), {0, 1, 3})
    assert labels.dtype == np.uint8
    assert labels.tolist() == [[[0, 3, 1]]]


def test_scaled_whole_numbers_are_whole():
    assert nifti.as_labels(np.array([0.0, 1.0000000591]), {0, 1}).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (np.array([0, 1, 14, 99], np.int16), "[14, 99]"),
        (np.array([0, -1], np.int16), "[-1]"),
        (np.array([0, 300], np.int32), "[300]"),
        (np.array([0, 0.5]), "[0.5]"),
        (np.array([0, np.nan]), "[nan]"),
        (np.array([0, np.inf]), "[inf]"),
        (np.arange(10, 30), "[10, 11, 12, 13, 14]"),
    ],
)
def test_values_that_are_no_labels_are_named(values, named):
    with pytest.raises(ValueError, match="got label values") as error:
        nifti.as_labels(values, range(14) if values.max() != 29 else {0})
    assert named in str(error.value)
    assert "expected only [0, " in str(error.value) or "expected only [0]" in str(error.value)


def test_another_number_of_dimensions_is_refused(tmp_path):
    path = write_nifti(tmp_path / "a.nii.gz", np.zeros((2, 3, 4, 2), np.int16))
    with pytest.raises(ValueError, match=r"got 4 dimensions \(2, 3, 4, 2\), expected 3"):
        nifti.load(path)


def test_what_is_no_nifti_is_refused(tmp_path):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="unreadable"):
        nifti.load(path)
