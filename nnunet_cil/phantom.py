"""A small labelled phantom of the abdomen: a raw nnU-Net dataset for the demo and the tests, made in seconds.

Liver, spleen and kidneys lie in a body with fat, muscle, spine, vessels, stomach, bowel and gas. All shapes are written
in coordinates that run from -1 to 1 across the volume, (x: right to left, y: front to back, z: feet to head), and are
evaluated where a smooth random displacement sends each voxel, so that no two subjects are alike.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK
from numpy.typing import NDArray
from scipy import ndimage

LABELS = {"background": 0, "liver": 1, "spleen": 2, "right_kidney": 3, "left_kidney": 4}

_Field = NDArray[np.float64]
_Mask = NDArray[np.bool_]
_Grid = tuple[_Field, _Field, _Field]


def _smooth_noise(rng: np.random.Generator, shape: Sequence[int], sigma: float) -> _Field:
    """Gaussian-filtered noise of mean 0 and standard deviation 1; ``sigma`` as a share of each axis."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), [sigma * n for n in shape], mode="reflect")
    return (noise - noise.mean()) / noise.std()


def _ellipsoid(grid: _Grid, centre: Sequence[float], radii: Sequence[float], tilt: Sequence[float] = (0, 0)) -> _Field:
    """Squared radius in units of the ellipsoid's: below 1 inside. ``tilt`` shifts x and y along z."""
    x, y, z = (g - c for g, c in zip(grid, centre, strict=True))
    return ((x - tilt[0] * z) / radii[0]) ** 2 + ((y - tilt[1] * z) / radii[1]) ** 2 + (z / radii[2]) ** 2


def _union(a: _Field, b: _Field, softness: float) -> _Field:
    """The smaller of two fields, blended where they meet, so that lobes flow into each other."""
    return -softness * np.logaddexp(-a / softness, -b / softness)


class _Painter:
    """Writes structures into one image and one label map; what is painted first is never painted over."""

    def __init__(self, shape: Sequence[int], air: float):
        self.image = np.full(shape, air)
        self.labels = np.zeros(shape, dtype=np.uint8)
        self.free = np.ones(shape, dtype=bool)

    def paint(self, mask: _Mask, intensity: float | _Field, label: int = 0) -> _Mask:
        mask = mask & self.free
        self.image[mask] = np.broadcast_to(intensity, mask.shape)[mask]
        self.labels[mask] = label
        self.free &= ~mask
        return mask


def _paint_spine_and_vessels(painter: _Painter, grid: _Grid, grain: _Field, rng: np.random.Generator) -> None:
    x, y, z = grid
    column = (x / 0.15) ** 2 + ((y - 0.42) / 0.15) ** 2 < 1
    between_vertebrae = np.abs(np.sin(np.pi * (z * 1.6 + rng.uniform(0, 1)))) < 0.28
    painter.paint((x / 0.035) ** 2 + ((y - 0.64) / 0.035) ** 2 < 1, 0.42)
    painter.paint((x / 0.075) ** 2 + ((y - 0.64) / 0.065) ** 2 < 1, 0.1)
    painter.paint(column & between_vertebrae, 0.22)
    painter.paint(column, 0.56 + 0.05 * grain)
    arch = ((np.abs(x) - 0.13) / 0.13) ** 2 + ((y - 0.62) / 0.06) ** 2 < 1
    process = (x / 0.03) ** 2 + ((y - 0.72) / 0.09) ** 2 < 1
    painter.paint((arch | process) & ~between_vertebrae, 0.5)
    flow = rng.uniform(0.05, 0.2)
    painter.paint(((x - 0.08) / 0.065) ** 2 + ((y - 0.2) / 0.075) ** 2 < 1, flow)
    painter.paint(((x + 0.12 - 0.03 * z) / 0.085) ** 2 + ((y - 0.17) / 0.06) ** 2 < 1, flow + 0.15)


def _paint_kidney(
    painter: _Painter, grid: _Grid, side: int, label: int, intensity: float, rng: np.random.Generator
) -> None:
    """``side`` is -1 for the right kidney, which lies lower under the liver, and 1 for the left one."""
    centre = rng.normal((side * 0.43, 0.38, -0.36 if side < 0 else -0.22), 0.025)
    size = rng.uniform(0.9, 1.12)
    x, y, z = ((g - c) / size for g, c in zip(grid, centre, strict=True))
    outward = side * x + 0.14 * z - 0.22 * z**2 + 0.03
    across = (outward / 0.16) ** 2 + ((y + 0.12 * z) / 0.2) ** 2
    depth = across + (z / 0.54) ** 2
    sinus = ((outward + 0.15) / 0.13) ** 2 + (y / 0.09) ** 2 + (z / 0.24) ** 2
    kidney = (depth < 1) & (((outward + 0.17) / 0.07) ** 2 + (y / 0.07) ** 2 + (z / 0.14) ** 2 > 1)
    angle = np.arctan2(z / 0.54, outward / 0.16 + 0.4) + 0.6 * np.arctan2(y, outward + 0.2)
    pyramids = (depth < 0.52) & (np.cos(9 * angle + rng.uniform(0, 2 * np.pi)) > -0.45)
    look = np.where(pyramids, intensity - 0.16, intensity)
    look = np.where(sinus < 1, intensity - 0.27, look)
    painter.paint(kidney, look, label)
    painter.paint((depth < 1.25 + 0.25 * z) & (y > -0.15), 0.76)


def _paint_spleen(
    painter: _Painter, grid: _Grid, cavity: _Mask, texture: _Field, intensity: float, rng: np.random.Generator
) -> None:
    centre = rng.normal((0.51, 0.26, 0.42), 0.025)
    size = rng.uniform(0.9, 1.12)
    outer = _ellipsoid(grid, centre, size * np.array((0.34, 0.42, 0.56)), tilt=(0.1, -0.25))
    inner = _ellipsoid(grid, centre - (0.36, 0.2, 0.05), size * np.array((0.34, 0.38, 0.62)), tilt=(0.1, -0.25))
    painter.paint((outer < 1) & (inner > 1) & cavity, intensity + 0.02 * texture, LABELS["spleen"])


def _paint_liver(
    painter: _Painter,
    grid: _Grid,
    cavity: _Mask,
    texture: _Field,
    vessels: _Mask,
    intensity: float,
    rng: np.random.Generator,
) -> None:
    moved = x, y, z = tuple(g - s for g, s in zip(grid, rng.normal(0, 0.03, 3), strict=True))
    size = rng.uniform(0.92, 1.08)
    right = _ellipsoid(moved, (-0.47, -0.02, 0.35), size * np.array((0.5, 0.68, 0.85)))
    left = _ellipsoid(moved, (0.0, -0.38, 0.5), size * np.array((0.46, 0.26, 0.36)), tilt=(0.2, 0.0))
    hilum = _ellipsoid(moved, (-0.02, 0.22, 0.2), (0.3, 0.36, 0.5))
    underside = -0.5 + 0.85 * (x + 0.72) + 0.25 * (y + 0.2)
    gallbladder = _ellipsoid(moved, (-0.3, -0.3, 0.02), (0.09, 0.13, 0.2), tilt=(0.2, 0.3))
    painter.paint(gallbladder < 1, rng.uniform(0.15, 0.75))
    liver = (_union(right, left, 0.15) < 1) & (hilum > 1) & (z > underside) & cavity
    painter.paint(liver, np.where(vessels, intensity - 0.3, intensity + 0.03 * texture), LABELS["liver"])


def _paint_stomach_and_bowel(
    painter: _Painter, grid: _Grid, cavity: _Mask, folds: _Field, contents: _Field, rng: np.random.Generator
) -> None:
    x, y, z = grid
    stomach = _ellipsoid(grid, rng.normal((0.3, -0.18, 0.45), 0.03), (0.34, 0.4, 0.42), tilt=(0.3, 0.1))
    gas_level = rng.uniform(-0.35, -0.15)
    lumen = np.where(y < gas_level, 0.03, rng.uniform(0.25, 0.7) + 0.06 * contents)
    painter.paint((stomach < 0.72) & cavity, lumen)
    painter.paint((stomach < 1) & cavity, 0.4)

    pancreas = ((x - 0.1) / 0.42) ** 2 + ((y - 0.02 + 0.25 * x**2 + 0.05 * folds) / 0.07) ** 2 + ((z - 0.1) / 0.16) ** 2
    painter.paint(pancreas < 1, 0.52 + 0.05 * contents)

    bulge = 0.1 * (1 + 0.18 * np.sin(18 * z + 3 * folds))
    colon = np.minimum(np.hypot(x + 0.58, y + 0.08), np.hypot(x - 0.64, y - 0.12)) / bulge + 4 * np.maximum(z + 0.15, 0)
    transverse = np.hypot(y + 0.5 - 0.2 * x**2, (z + 0.15 - 0.25 * x**2) * 1.2) / 0.12
    colon = np.minimum(colon, transverse + 6 * np.maximum(np.abs(x) - 0.5, 0))
    painter.paint((colon < 0.78) & cavity, np.where(contents > 0.1, 0.03, 0.42 + 0.1 * contents))
    painter.paint((colon < 1) & cavity, 0.38)

    bowel = cavity & (z < 0.35 + 0.1 * contents) & (y < 0.2)
    painter.paint(bowel & (folds > 0.45), np.where(contents > 1.2, 0.03, 0.42 + 0.14 * contents))
    painter.paint(bowel & (folds > 0.05), 0.36)


def _paint_body_wall(painter: _Painter, grid: _Grid, radius: _Field, grain: _Field, mottle: _Field) -> None:
    x, y, z = grid
    ribs = (np.sin(14 * np.arctan2(y, x) + 5 * z) > 0.75) & (np.abs(radius - 0.81) < 0.03) & (z > -0.2)
    painter.paint(ribs, 0.15)
    painter.paint(radius < 0.86, 0.32 + 0.04 * grain)
    painter.paint(radius < 0.985, 0.86 + 0.03 * mottle)
    painter.paint(radius < 1, 0.45)


def make_subject(
    rng: np.random.Generator, shape: Sequence[int] = (32, 64, 80)
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """One subject: a T1-like magnitude image and its labels.

    Size, place, shape and intensity of the organs, fat, gas and vessels, the bias field and the noise all come from
    ``rng``. Spleen, kidneys, muscle and bowel share intensities, so place, shape and texture have to be learned.

    Args:
        rng: the only source of randomness; equal generators give equal subjects.
        shape: voxels along (z, y, x), at least 16 each; z runs to the head, y to the back, x to the patient's left.

    Returns:
        ``(image, labels)`` of ``shape``: float32 of about 0 to 1400 in arbitrary units, and uint8 as in `LABELS`.

    Raises:
        ValueError: ``shape`` is not three numbers of at least 16.
    """
    shape = tuple(int(n) for n in shape)
    if len(shape) != 3 or min(shape) < 16:
        raise ValueError(f"shape: got {shape}, expected three numbers (z, y, x) of at least 16 voxels each.")
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    stretch = rng.uniform(0.94, 1.06, 3)
    x, y, z = (g * s + 0.035 * _smooth_noise(rng, shape, 0.15) for g, s in zip((x, y, z), stretch, strict=True))
    grid = (x, y, z)

    grain = _smooth_noise(rng, shape, 0.012)
    mottle = _smooth_noise(rng, shape, 0.025)
    folds = _smooth_noise(rng, shape, 0.045)
    contents = _smooth_noise(rng, shape, 0.07)
    vessels = np.hypot(_smooth_noise(rng, shape, 0.06), _smooth_noise(rng, shape, 0.06)) < 0.35

    radius = np.sqrt(np.abs(x / 0.88) ** 2.2 + np.abs(y / 0.84) ** 2.2)
    cavity = radius < 0.77
    liver, spleen, kidney = np.array((0.57, 0.66, 0.78)) + rng.normal(0, 0.035, 3)

    painter = _Painter(shape, air=0.0)
    _paint_spine_and_vessels(painter, grid, grain, rng)
    _paint_kidney(painter, grid, -1, LABELS["right_kidney"], kidney, rng)
    _paint_kidney(painter, grid, 1, LABELS["left_kidney"], kidney, rng)
    _paint_spleen(painter, grid, cavity, mottle, spleen, rng)
    _paint_liver(painter, grid, cavity, grain, vessels, liver, rng)
    _paint_stomach_and_bowel(painter, grid, cavity, folds, contents, rng)
    psoas = ((np.abs(x) - 0.22) / 0.08) ** 2 + ((y - 0.42) / 0.13) ** 2 + 0.25 * (z + 1)
    painter.paint(psoas < 1, 0.33 + 0.02 * grain)
    painter.paint(((np.abs(x) - 0.2) / 0.17) ** 2 + ((y - 0.68) / 0.1) ** 2 < 1, 0.33 + 0.04 * grain)
    painter.paint(cavity, 0.78 + 0.06 * mottle)
    _paint_body_wall(painter, grid, radius, grain, mottle)

    image = ndimage.gaussian_filter(painter.image, 0.5)
    image *= np.exp(0.15 * _smooth_noise(rng, shape, 0.3)) * rng.uniform(0.85, 1.15)
    noise = rng.uniform(0.02, 0.035)
    image = np.hypot(image + noise * rng.standard_normal(shape), noise * rng.standard_normal(shape))
    return (1000 * image).astype(np.float32), painter.labels


def _write(path: Path, voxels: NDArray, spacing_mm: Sequence[float]) -> None:
    image = SimpleITK.GetImageFromArray(voxels)
    image.SetSpacing([float(s) for s in reversed(spacing_mm)])
    SimpleITK.WriteImage(image, path, useCompression=True)


def write_phantom(
    folder: Path,
    n_train: int = 12,
    n_test: int = 6,
    seed: int = 0,
    shape: Sequence[int] = (32, 64, 80),
    spacing_mm: Sequence[float] = (3.0, 2.5, 2.5),
) -> None:
    """Write a raw nnU-Net dataset of phantoms: ``imagesTr``, ``labelsTr``, ``split.json`` and ``dataset.json``.

    Test subjects lie beside the training subjects; ``split.json`` tells them apart under ``train`` and ``test``. A
    subject depends on ``seed``, its number and ``shape`` only. ``dataset.json`` comes last: a folder without it is
    an interrupted one and is written again.

    Args:
        folder: where to write; made if missing.
        n_train: training subjects, at least 1.
        n_test: further subjects, held out for scores; may be 0.
        seed: not negative.
        shape: voxels along (z, y, x), see `make_subject`.
        spacing_mm: millimetres between voxels along (z, y, x).

    Raises:
        FileExistsError: ``folder`` already holds a dataset.
        ValueError: a number, ``shape`` or ``spacing_mm`` is out of its range.
    """
    folder = Path(folder)
    if (folder / "dataset.json").exists():
        raise FileExistsError(f"{folder}: already holds a dataset. Remove it or give another folder.")
    if n_train < 1 or n_test < 0:
        raise ValueError(f"n_train, n_test: got {n_train} and {n_test}, expected at least 1 and at least 0.")
    if len(spacing_mm) != 3 or min(spacing_mm) <= 0:
        raise ValueError(f"spacing_mm: got {spacing_mm}, expected three positive numbers (z, y, x).")
    names = [f"phantom_{i:03d}" for i in range(1, n_train + n_test + 1)]
    subjects = [make_subject(np.random.default_rng([seed, i]), shape) for i in range(len(names))]
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name, (image, labels) in zip(names, subjects, strict=True):
        _write(folder / "imagesTr" / f"{name}_0000.nii.gz", image, spacing_mm)
        _write(folder / "labelsTr" / f"{name}.nii.gz", labels, spacing_mm)
    split = {"train": names[:n_train], "test": names[n_train:]}
    (folder / "split.json").write_text(json.dumps(split, indent=1))
    description = {
        "channel_names": {"0": "MR"},
        "labels": LABELS,
        "numTraining": len(names),
        "file_ending": ".nii.gz",
        "description": f"Abdomen phantom, seed {seed}: made by nnunet-cil, not measured on anyone.",
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=1))
