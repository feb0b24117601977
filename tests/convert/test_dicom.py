import locale

import numpy as np
import pytest
import SimpleITK

from nnunet_cil.convert.dicom import in_order_of_numbers, read_series
from tests.convert.made_up import DICOM_SPACING_MM, dicom_axes, write_series, write_slice

VOXELS = np.arange(5 * 4 * 6, dtype=np.uint16).reshape(5, 4, 6)
NAMES = ("c", "e", "a", "b", "d")


@pytest.fixture
def folder(tmp_path):
    """A series whose names do not follow position."""
    write_series(tmp_path, VOXELS, NAMES, "MR")
    return tmp_path


def test_slices_are_sorted_by_position_not_by_name(folder):
    volume, order = read_series(sorted(folder.iterdir()))
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(volume), VOXELS)
    assert [sorted(NAMES)[index] for index in order] == list(NAMES)


def test_geometry_is_that_of_itks_own_series_reader(folder):
    volume, _ = read_series(sorted(folder.iterdir()))
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames([str(folder / f"{name}.dcm") for name in NAMES])
    expected = reader.Execute()
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(volume), SimpleITK.GetArrayFromImage(expected))
    for got, wanted in (
        (volume.GetSpacing(), expected.GetSpacing()),
        (volume.GetOrigin(), expected.GetOrigin()),
        (volume.GetDirection(), expected.GetDirection()),
    ):
        np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_place_of_a_voxel_by_hand(folder):
    volume, _ = read_series(list(folder.iterdir()))
    row, column, normal = dicom_axes()
    x, y, z = DICOM_SPACING_MM
    place = np.array((10, -20, 30)) + 5 * x * row + 2 * y * column + 3 * z * normal
    np.testing.assert_allclose(volume.TransformIndexToPhysicalPoint((5, 2, 3)), place, atol=1e-5)


@pytest.mark.parametrize(("dtype", "value"), [(np.int16, -1024), (np.uint16, 40000)])
def test_values_are_kept(tmp_path, dtype, value):
    voxels = VOXELS.astype(dtype)
    voxels[0, 0, 0] = value
    write_series(tmp_path, voxels, NAMES, "CT")
    volume, _ = read_series(list(tmp_path.iterdir()))
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(volume), voxels)
    assert volume.GetPixelID() in (SimpleITK.sitkInt16, SimpleITK.sitkFloat32)


def test_a_missing_slice_is_noticed(folder):
    (folder / "a.dcm").unlink()
    with pytest.raises(ValueError, match=r"distances from 7\.5 to 15 mm.*missing"):
        read_series(list(folder.iterdir()))


def test_a_slice_that_stands_there_twice_is_noticed(folder):
    (folder / "f.dcm").write_bytes((folder / "a.dcm").read_bytes())
    with pytest.raises(ValueError, match="twice"):
        read_series(list(folder.iterdir()))


def test_slices_all_at_one_place_are_noticed(tmp_path):
    for name in "ab":
        write_slice(tmp_path / f"{name}.dcm", VOXELS[0], (0, 0, 0), dicom_axes(), "MR")
    with pytest.raises(ValueError, match="distances from 0 to 0 mm"):
        read_series(list(tmp_path.iterdir()))


def test_shifted_slices_are_refused(tmp_path):
    axes = np.eye(3)
    for z in range(4):
        write_slice(tmp_path / f"{z}.dcm", VOXELS[z], (0, 0.5 * z, 7.5 * z), axes, "CT")
    with pytest.raises(ValueError, match=r"shifted against each other by up to 1\.5 mm.*gantry"):
        read_series(list(tmp_path.iterdir()))


@pytest.mark.parametrize("what", ["size", "orientation"])
def test_slices_that_do_not_fit_are_refused(folder, what):
    pixels = VOXELS[0, :3] if what == "size" else VOXELS[0]
    axes = dicom_axes() if what == "size" else np.eye(3)
    write_slice(folder / "z.dcm", pixels, (0, 0, 90), axes, "MR")
    with pytest.raises(ValueError, match=rf"z\.dcm: got {what} .*expected .*as a\.dcm"):
        read_series(sorted(folder.iterdir()))


def test_one_slice_is_no_volume(folder):
    with pytest.raises(ValueError, match="got 1 DICOM slices, expected at least 2"):
        read_series([folder / "a.dcm"])


def test_order_of_numbers(tmp_path):
    names = ["IMG-0004-00010.dcm", "IMG-0004-00009.dcm", "i0002,0000b.dcm", "i0010,0000b.dcm", "i9,0000b.dcm"]
    assert [path.name for path in in_order_of_numbers([tmp_path / name for name in names])] == [
        "i0002,0000b.dcm",
        "IMG-0004-00009.dcm",
        "IMG-0004-00010.dcm",
        "i9,0000b.dcm",
        "i0010,0000b.dcm",
    ]


def test_reading_keeps_the_locale(folder):
    before = locale.setlocale(locale.LC_ALL, "")
    read_series(list(folder.iterdir()))
    assert locale.setlocale(locale.LC_ALL) == before
