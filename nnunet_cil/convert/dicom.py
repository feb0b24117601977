"""A folder of DICOM slices as one volume, sorted by position."""

from __future__ import annotations

import locale
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import SimpleITK
from numpy.typing import NDArray

POSITION, ORIENTATION = "0020|0032", "0020|0037"
HEADER_TOLERANCE = 1e-3  # between slices: of mm of pixel spacing, and of direction cosines
GAP_TOLERANCE = 0.05  # of the mean distance between slices
SHIFT_TOLERANCE = 0.1  # of a pixel, across the normal


def in_order_of_numbers(paths: Sequence[Path]) -> list[Path]:
    """Files sorted by the numbers in their names, so that 10 comes after 9."""
    return sorted(paths, key=lambda path: ([int(n) for n in re.findall(r"\d+", path.stem)], path.name))


@contextmanager
def own_locale() -> Iterator[None]:
    """Keep the locale of the process: reading DICOM sets it to "C", and files and output are ASCII from then on."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


@own_locale()
def read_series(paths: Sequence[Path]) -> tuple[SimpleITK.Image, list[int]]:
    """Read slices as a volume. The series' identifiers are not used, as anonymised files may have one each.

    Args:
        paths: DICOM files of one slice each, in any order.

    Returns:
        The volume, its third axis along the normal of the slices (rows cross columns), and the index into ``paths`` of
        each of its slices.

    Raises:
        ValueError: slices of different size, orientation or pixel spacing, at the same place, at uneven distances, or
            shifted against each other; a file that cannot be read.
    """
    if len(paths) < 2:
        raise ValueError(f"got {len(paths)} DICOM slices, expected at least 2.")
    slices, positions, orientations = [], [], []
    for path in paths:
        reader = SimpleITK.ImageFileReader()
        reader.SetFileName(str(path))
        try:
            slices.append(reader.Execute())
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"{path}: got a damaged file ({reason}), expected a DICOM slice. Download it again."
            ) from error
        if missing := [tag for tag in (POSITION, ORIENTATION) if not reader.HasMetaDataKey(tag)]:
            raise ValueError(f"{path}: got no {missing} in the header, expected position and orientation.")
        positions.append(_numbers(reader.GetMetaData(POSITION)))
        orientations.append(_numbers(reader.GetMetaData(ORIENTATION)))
    _check_alike(paths, "size", [image.GetSize()[:2] for image in slices])
    _check_alike(paths, "pixel spacing", [image.GetSpacing()[:2] for image in slices])
    _check_alike(paths, "orientation", orientations)
    pixel = slices[0].GetSpacing()[:2]
    row, column = np.array(orientations[0]).reshape(2, 3)
    normal = np.cross(row, column)
    order = np.argsort(np.array(positions) @ normal, kind="stable").tolist()
    places = np.array(positions)[order]
    gap = _even_gap(paths[0].parent, places, normal, min(pixel))
    voxels = np.concatenate([SimpleITK.GetArrayFromImage(slices[index]) for index in order])
    volume = SimpleITK.GetImageFromArray(_compact(voxels))
    volume.SetSpacing((*pixel, gap))
    volume.SetOrigin(places[0].tolist())
    volume.SetDirection(np.stack([row, column, normal], axis=1).ravel().tolist())
    return volume, order


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split("\\")]


def _check_alike(paths: Sequence[Path], what: str, values: Sequence[Sequence[float]]) -> None:
    for path, value in zip(paths, values, strict=True):
        if not np.allclose(value, values[0], rtol=0, atol=HEADER_TOLERANCE):
            raise ValueError(f"{path}: got {what} {value}, expected {values[0]} as {paths[0].name}.")


def _even_gap(folder: Path, places: NDArray, normal: NDArray, pixel_mm: float) -> float:
    """Distance between neighbouring slices, in mm.

    Args:
        places: origins of the slices, sorted along the normal.

    Raises:
        ValueError: slices at uneven distances, or shifted against each other.
    """
    gaps = np.diff(places @ normal)
    gap = float(gaps.mean())
    if gap <= 0 or np.abs(gaps - gap).max() > GAP_TOLERANCE * gap:
        raise ValueError(
            f"{folder}: got distances from {gaps.min():.4g} to {gaps.max():.4g} mm between neighbouring slices, "
            "expected equal ones. A slice is missing, or stands there twice."
        )
    offsets = places - places[0]
    shift = float(np.linalg.norm(offsets - np.outer(offsets @ normal, normal), axis=1).max())
    if shift > SHIFT_TOLERANCE * pixel_mm:
        raise ValueError(
            f"{folder}: got slices that are shifted against each other by up to {shift:.4g} mm, expected them one "
            "above the other. A tilted gantry is not supported."
        )
    return gap


def _compact(voxels: NDArray) -> NDArray:
    """int16 where that holds all values, else float32."""
    limits = np.iinfo(np.int16)
    if voxels.dtype.kind in "iu" and limits.min <= voxels.min() and voxels.max() <= limits.max:
        return voxels.astype(np.int16)
    return voxels.astype(np.float32)
