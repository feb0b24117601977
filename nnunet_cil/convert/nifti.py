"""Cases of NIfTI files: images linked, labels checked and written with exactly the grid of their image."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Collection, Sequence
from itertools import product
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import ArrayLike, NDArray

from nnunet_cil.convert.source import ENDING, SHOWN, Case, Written
from nnunet_cil.nnunet_api import link_or_copy, read_to_the_end

UNREADABLE = (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, zlib.error)
"""What nibabel raises for a file that is truncated or of another format."""
TOLERANCE_VOXELS = 0.1  # what a header rounded to three decimals costs at the far corner of a large volume
WHOLE_NUMBER_TOLERANCE = 1e-3  # of label values that are stored as scaled or floating numbers


def corner_distance_mm(first: NDArray, second: NDArray, shape: Sequence[int]) -> float:
    """Largest distance between where two affines put a corner of the volume, in mm.

    Args:
        first, second: 4 x 4, from voxel indices to mm.
        shape: voxels along the three axes.
    """
    corners = np.array([[*corner, 1] for corner in product(*((0, n - 1) for n in shape))]).T
    return float(np.linalg.norm(((first - second) @ corners)[:3], axis=0).max())


def spacing_mm(affine: NDArray) -> NDArray:
    """Distances between neighbouring voxels along the three axes."""
    return np.linalg.norm(affine[:3, :3], axis=0)


def describe(affine: NDArray, shape: Sequence[int]) -> str:
    """A grid in words: size, spacing, origin and direction of each axis in RAS+ mm."""
    spacing = spacing_mm(affine)
    axes = (affine[:3, :3] / spacing).T
    return (
        f"size {tuple(map(int, shape))}, spacing {_rounded(spacing)} mm, origin {_rounded(affine[:3, 3])} mm, "
        f"axes {', '.join(map(_rounded, axes))}"
    )


def _rounded(values: ArrayLike) -> str:
    return f"({', '.join(f'{v:.6g}' for v in np.round(values, 6) + 0.0)})"


def perpendicular(affine: NDArray, shape: Sequence[int]) -> NDArray:
    """The affine with perpendicular axes that is nearest: same spacing, same centre of the volume.

    The axes become the nearest rotation (or reflected rotation), by the polar decomposition.
    """
    spacing = spacing_mm(affine)
    left, _, right = np.linalg.svd(affine[:3, :3] / spacing)
    centre = (np.array(shape) - 1) / 2
    result = np.eye(4)
    result[:3, :3] = left @ right * spacing
    result[:3, 3] = affine[:3, :3] @ centre + affine[:3, 3] - result[:3, :3] @ centre
    return result


def is_readable_by_itk(path: Path) -> bool:
    """Whether ITK, which nnU-Net reads NIfTI files with, takes the header; axes have to be perpendicular."""
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return False
    return True


def load(path: Path, n_dimensions: int = 3) -> nibabel.Nifti1Image:
    """Open a NIfTI file; voxels are read when they are used.

    Raises:
        ValueError: it cannot be read, or has another number of dimensions.
    """
    try:
        image = nibabel.load(path)
    except UNREADABLE as error:
        raise ValueError(f"{path}: got an unreadable file ({error}), expected NIfTI.") from error
    if len(image.shape) != n_dimensions:
        raise ValueError(f"{path}: got {len(image.shape)} dimensions {image.shape}, expected {n_dimensions}.")
    return image


def check_whole(path: Path) -> None:
    """Read a file to its end, which nibabel and ITK do not: gzip's checksum stands there.

    Raises:
        ValueError: its download was cut off, or bytes of it have changed.
    """
    try:
        read_to_the_end(path)
    except UNREADABLE as error:
        raise ValueError(f"{path}: got a damaged file ({error}), expected it whole. Download it again.") from error


def check_same_grid(path: Path, image: nibabel.Nifti1Image, reference: Path, grid: nibabel.Nifti1Image) -> float:
    """How far the corners of an image are off those of a reference, in mm; up to a tenth of a voxel is rounding.

    Raises:
        ValueError: another size, or further off.
    """
    shape = grid.shape[:3]
    if image.shape[:3] == shape:
        distance = corner_distance_mm(image.affine, grid.affine, shape)
        if distance <= TOLERANCE_VOXELS * spacing_mm(grid.affine).min():
            return distance
    raise ValueError(
        f"{path}: got {describe(image.affine, image.shape[:3])}; expected the grid of {reference}, "
        f"{describe(grid.affine, shape)}."
    )


def place_image(source: Path, target: Path) -> float:
    """Put an image where nnU-Net looks for it: a link, or a copy with perpendicular axes where ITK would refuse it.

    The voxels stay what they are, bit for bit; nnU-Net works on the grid of voxels and their spacing.

    Returns:
        How far a corner of the volume moved, in mm; 0 where the image is linked.

    Raises:
        ValueError: ITK refuses the image for another reason.
    """
    if is_readable_by_itk(source):
        link_or_copy(source, target)
        return 0.0
    image = load(source)
    affine = perpendicular(image.affine, image.shape)
    with gzip.open(source) as file:
        header = type(image.header).from_fileobj(file)  # the header of a loaded image has lost its scaling
        file.seek(0)
        content = file.read()
    header.set_qform(affine, code=1)
    header.set_sform(affine, code=1)
    with gzip.open(target, "wb", compresslevel=1) as file:
        file.write(header.binaryblock + content[len(header.binaryblock) :])
    if not is_readable_by_itk(target):
        raise ValueError(
            f"{source}: got an image that ITK cannot read, expected NIfTI with {describe(affine, image.shape)}."
        )
    return corner_distance_mm(image.affine, affine, image.shape)


def as_labels(values: NDArray, known: Collection[int]) -> NDArray[np.uint8]:
    """Voxel values as label values.

    Args:
        values: whole numbers, maybe stored as floating numbers.
        known: values that may occur, from 0 to 255.

    Raises:
        ValueError: naming the values that are none of these.
    """
    with np.errstate(invalid="ignore"):  # an infinite value less itself
        wrong = ~(np.abs(values - np.rint(values)) <= WHOLE_NUMBER_TOLERANCE)
    small = np.clip(np.nan_to_num(np.rint(values), nan=-1), -1, 256).astype(np.int16)
    is_known = np.zeros(258, bool)
    is_known[[value + 1 for value in known]] = True
    wrong |= ~is_known[small + 1]
    if wrong.any():
        got = [int(v) if float(v).is_integer() else v for v in np.unique(values[wrong])[:SHOWN].tolist()]
        raise ValueError(f"got label values {got}, expected only {sorted(known)}")
    return small.astype(np.uint8)


def write_labels(path: Path, labels: NDArray[np.uint8], image: Path) -> None:
    """Write labels with the grid of an image, bit for bit.

    Args:
        labels: axes as nibabel reads them.
        image: NIfTI file whose qform, sform and voxel sizes are taken.
    """
    like = nibabel.load(image)
    header = like.header.copy()
    header.set_data_dtype(np.uint8)
    header.extensions.clear()
    nibabel.Nifti1Image(labels, like.affine, header).to_filename(path)


def write_case(case: Case, folder: Path, known: Collection[int]) -> Written:
    """Convert a case with one NIfTI file a channel and one of labels."""
    first, moved = place_channels(case, folder)
    labels, distance = read_labels(case.labels[0], known, case.images[0], first)
    write_labels(label_target(case, folder), labels, image_target(case, folder))
    return Written(label_moved_mm=distance, image_moved_mm=moved)


def read_labels(
    path: Path, known: Collection[int], reference: Path, grid: nibabel.Nifti1Image
) -> tuple[NDArray[np.uint8], float]:
    """Labels of a file, and how far its corners are off those of the reference image, in mm.

    Raises:
        ValueError: it cannot be read, is damaged, has another grid, or values that are not known.
    """
    image = load(path)
    distance = check_same_grid(path, image, reference, grid)
    check_whole(path)
    try:
        return as_labels(np.asanyarray(image.dataobj), known), distance
    except UNREADABLE as error:
        raise ValueError(f"{path}: {error}.") from error


def place_channels(case: Case, folder: Path) -> tuple[nibabel.Nifti1Image, float]:
    """Place all channels of a case; returns the first one's source image, and how far a corner moved at most, in mm.

    Raises:
        ValueError: a channel cannot be read, is damaged, or has another grid than the first.
    """
    first = load(case.images[0])
    moved = 0.0
    for channel, path in enumerate(case.images):
        check_same_grid(path, load(path), case.images[0], first)
        check_whole(path)
        moved = max(moved, place_image(path, image_target(case, folder, channel)))
    return first, moved


def image_target(case: Case, folder: Path, channel: int = 0) -> Path:
    """Where nnU-Net looks for a channel of a case."""
    return folder / "imagesTr" / f"{case.name}_{channel:04d}{ENDING}"


def label_target(case: Case, folder: Path) -> Path:
    """Where nnU-Net looks for the labels of a case."""
    return folder / "labelsTr" / f"{case.name}{ENDING}"
