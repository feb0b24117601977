"""CHAOS, abdominal CT and MR as DICOM with PNG masks (Kavur et al. 2021; Zenodo 3431873)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import SimpleITK
from numpy.typing import NDArray
from PIL import Image

from nnunet_cil.convert.dicom import in_order_of_numbers, read_series
from nnunet_cil.convert.nifti import TOLERANCE_VOXELS, image_target, label_target
from nnunet_cil.convert.source import (
    SEEDED,
    Case,
    PublicSet,
    Written,
    check_choice,
    check_layout,
    numbered,
    root_of,
    seeded_test,
    shown,
    visible,
)

# Grey values of the MR masks as chaos.grand-challenge.org states them: 63 (55 to 70), 126 (110 to 135), 189 (175 to
# 200), 252 (240 to 255). The same ranges stand in nnU-Net's first version, Task037_038_Chaos_Challenge.py.
GREYS = {1: (55, 70), 2: (110, 135), 3: (175, 200), 4: (240, 255)}
MR_ORGANS = ("liver", "right_kidney", "left_kidney", "spleen")
CHANNELS = {"ct": ("CT",), "t2spir": ("MR",), "t1dual": ("MR in phase", "MR out of phase")}


def find(source: Path, modality: str) -> PublicSet:
    """Read the layout ``CT/N/DICOM_anon``, ``MR/N/T2SPIR/DICOM_anon``, ``MR/N/T1DUAL/DICOM_anon/InPhase`` and
    ``OutPhase``, each with PNG masks in ``Ground``.

    An MR mask belongs to the slice of the same file name; that of T1DUAL to the one in phase, and it holds for both
    phases. A CT mask (``liver_GT_000.png``) belongs to the slice of the same rank by the numbers in the names.

    Args:
        modality: ``ct`` (liver only), ``t2spir``, or ``t1dual`` with both phases as channels.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: another layout; all problems at once.
    """
    check_choice("--modality", modality, CHANNELS)
    branch = "CT" if modality == "ct" else "MR"
    root = root_of(source, branch, "Train_Sets, which holds CT and MR")
    problems: list[str] = []
    cases = []
    for name in visible(root / branch):
        if not name.isdecimal():
            problems.append(f"{root / branch}: got {name!r}, expected folders with the numbers of subjects.")
            continue
        folder = root / branch / name if modality == "ct" else root / branch / name / modality.upper()
        phases = ("InPhase", "OutPhase") if modality == "t1dual" else ("",)
        images = tuple(folder / "DICOM_anon" / phase for phase in phases)
        masks = _masks(images, folder / "Ground", modality, problems)
        cases.append(Case(f"chaos_{branch.lower()}_{int(name):02d}", branch, images, tuple(masks)))
    if not cases and not problems:
        problems.append(f"{root / branch}: got an empty folder, expected a folder a subject.")
    check_layout(root, "CHAOS", problems)
    return PublicSet(
        name=f"CHAOS_{modality.upper()}",
        channels=CHANNELS[modality],
        labels=numbered(MR_ORGANS if branch == "MR" else ("liver",)),
        cases=tuple(sorted(cases, key=lambda case: case.name)),
        test=seeded_test([case.name for case in cases]),
        split_origin=SEEDED,
        terms="Creative Commons, share-alike (Zenodo 3431873); copies of the set differ on whether CC BY-NC-SA 4.0 or "
        "CC BY-SA 4.0: see the record",
        reference="Kavur et al.: CHAOS challenge: combined (CT-MR) healthy abdominal organ segmentation. Medical Image "
        "Analysis 69, 101950, 2021. Data: doi.org/10.5281/zenodo.3431873",
        write=write_ct if modality == "ct" else write_mr,
        sizes={branch: 20},
    )


def _masks(images: tuple[Path, ...], ground: Path, modality: str, problems: list[str]) -> list[Path]:
    """Masks in the order of the numbers in the names of the first channel's slices."""
    if missing := [folder for folder in images if not folder.is_dir()]:
        problems += [f"{folder}: got no folder, expected DICOM slices." for folder in missing]
        return []
    if not ground.is_dir():
        problems.append(f"{ground}: got no folder, expected masks. CHAOS' test sets have none: give Train_Sets.")
        return []
    slices, masks = files_of(images[0], ".dcm"), files_of(ground, ".png")
    if modality == "ct":
        if len(masks) != len(slices):
            problems.append(f"{ground}: got {len(masks)} masks, expected {len(slices)}, one of each slice.")
        return masks
    by_name = {path.stem: path for path in masks}
    names = [path.stem for path in slices]
    if lacking := [name for name in names if name not in by_name]:
        problems.append(f"{ground}: got no masks {shown(lacking)}, expected one of each slice in {images[0]}.")
    if others := sorted(set(by_name) - set(names)):
        problems.append(f"{ground}: got masks {shown(others)}, expected one of each slice in {images[0]} only.")
    return [by_name[name] for name in names if name in by_name]


def files_of(folder: Path, ending: str) -> list[Path]:
    """Files of a folder with this ending, in the order of the numbers in their names."""
    return in_order_of_numbers([folder / name for name in visible(folder) if name.endswith(ending)])


def write_mr(case: Case, folder: Path, known: Collection[int]) -> Written:
    """Convert an MR case, whose masks have the names of the first channel's slices."""
    return _write(case, folder, _mr_labels)


def write_ct(case: Case, folder: Path, known: Collection[int]) -> Written:
    """Convert a CT case, whose masks are assigned to slices by rank.

    Raises:
        ValueError: the slices' names do not run along the body, so that ranks say nothing.
    """
    return _write(case, folder, _ct_labels, by_rank=True)


def _write(
    case: Case, folder: Path, to_labels: Callable[[NDArray[np.uint8]], NDArray[np.uint8]], by_rank: bool = False
) -> Written:
    volume, order = read_series(files_of(case.images[0], ".dcm"))
    if by_rank and order not in (sorted(order), sorted(order, reverse=True)):
        raise ValueError(
            f"{case.images[0]}: got slices whose names do not run along the body, expected this, as masks are assigned "
            "by rank."
        )
    channels = [volume, *(read_series(files_of(path, ".dcm"))[0] for path in case.images[1:])]
    for path, channel in zip(case.images, channels, strict=True):
        _check_same_grid(path, channel, case.images[0], volume)
        channel.CopyInformation(volume)
    labels = SimpleITK.GetImageFromArray(
        np.stack([_read_mask(case.labels[index], volume.GetSize()[:2], to_labels) for index in order])
    )
    labels.CopyInformation(volume)
    for number, channel in enumerate(channels):
        SimpleITK.WriteImage(channel, str(image_target(case, folder, number)), useCompression=True)
    SimpleITK.WriteImage(labels, str(label_target(case, folder)), useCompression=True)
    return Written()


def _read_mask(
    path: Path, size: tuple[int, int], to_labels: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            grey = np.array(image.convert("L"))
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises
        raise ValueError(f"{path}: got a damaged file ({error}), expected a PNG mask. Download it again.") from error
    if grey.shape != size[::-1]:
        raise ValueError(f"{path}: got {grey.shape[::-1]} pixels, expected {size} as the slice.")
    try:
        return to_labels(grey)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_same_grid(path: Path, image: SimpleITK.Image, reference: Path, grid: SimpleITK.Image) -> None:
    """Refuse a channel that is more than a tenth of a voxel off the first one.

    Raises:
        ValueError: another size or place; both grids are told.
    """
    if image.GetSize() == grid.GetSize():
        far = [n - 1 for n in grid.GetSize()]
        corners = [[n * bit for n, bit in zip(far, bits, strict=True)] for bits in np.ndindex(2, 2, 2)]
        places = [[i.TransformIndexToPhysicalPoint(corner) for corner in corners] for i in (image, grid)]
        if np.linalg.norm(np.subtract(*places), axis=1).max() <= TOLERANCE_VOXELS * min(grid.GetSpacing()):
            return
    got, expected = (
        f"size {i.GetSize()}, spacing {i.GetSpacing()} mm, origin {i.GetOrigin()} mm, direction {i.GetDirection()}"
        for i in (image, grid)
    )
    raise ValueError(f"{path}: got {got}; expected the grid of {reference}, {expected}.")


def _mr_labels(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    labels = np.zeros_like(grey)
    for value, (low, high) in GREYS.items():
        labels[(grey >= low) & (grey <= high)] = value
    if wrong := np.unique(grey[(labels == 0) & (grey != 0)]).tolist():
        raise ValueError(f"got grey values {wrong}, expected 0 and the ranges {sorted(GREYS.values())}.")
    return labels


def _ct_labels(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if wrong := sorted(set(np.unique(grey).tolist()) - {0, 1, 255}):
        raise ValueError(f"got grey values {wrong}, expected 0 and one of 1 and 255.")
    return (grey > 0).astype(np.uint8)
