"""Ground truth and predictions side by side: which subjects, which slice, and how it is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from nnunet_cil.nnunet_api import TIFF
from nnunet_cil.report.colours import PLAIN_ORGANS, OrganStyle, organ_styles
from nnunet_cil.report.figures import WIDTH_INCHES, drawing, legend, shown
from nnunet_cil.report.table import marked

CT_WINDOW_HU = (-160.0, 240.0)  # soft tissue: level 40, width 400
MARGIN = 0.3
_MAX_COLUMNS = 4
_SHOWN_SHARE = 0.1  # of an organ's largest area; a smaller one is a crumb
_TITLE_SHARE = 0.92  # of a tile's width


@dataclass(frozen=True, eq=False)
class Slice:
    """One axial slice, its rows from front to back and its columns from the patient's right to left.

    Attributes:
        image: (H, W) intensities.
        truth: (H, W) expert labels.
        predictions: method -> (H, W) labels.
        window: intensities that are drawn black and white.
        pixel_height: of a pixel, in units of its width.
        position: number of the slice, from 1 at the feet, and the number of slices.
        oriented: whether left and right are known; not in a two-dimensional image or a TIFF.
    """

    image: NDArray[np.floating]
    truth: NDArray[np.integer]
    predictions: Mapping[str, NDArray[np.integer]]
    window: tuple[float, float]
    pixel_height: float
    position: tuple[int, int]
    oriented: bool


def typical_and_worst(cases: Sequence[str], scores: NDArray[np.floating]) -> dict[str, str]:
    """The subject whose mean score is the median (the lower of two), and the one with the lowest.

    Args:
        cases: N subjects.
        scores: (N, K); NaN where absent. A subject without any score is left out.

    Returns:
        ``typical`` and ``worst`` -> subject; only ``typical`` where both are the same one, nothing without subjects.
    """
    present = ~np.isnan(scores)
    means = np.where(present, scores, 0).sum(1) / np.maximum(present.sum(1), 1)
    ranked = sorted((mean, case) for mean, case, some in zip(means, cases, present.any(1), strict=True) if some)
    if not ranked:
        return {}
    typical, worst = ranked[(len(ranked) - 1) // 2][1], ranked[0][1]
    return {"typical": typical} if typical == worst else {"typical": typical, "worst": worst}


def best_slice(truth: NDArray[np.integer], n_classes: int) -> int:
    """Index along axis 0 that shows most classes; of several, that with most of them. 0 without foreground.

    A class is shown where its area is a tenth of its own largest one or more. How much of all classes there is, is the
    sum of each one's area over its own largest, so that a large organ does not hide a small one.
    """
    axes = tuple(range(1, truth.ndim))
    areas = np.stack([(truth == value).sum(axes) for value in range(1, n_classes + 1)]).astype(float)
    shares = areas / np.maximum(areas.max(1, keepdims=True), 1)
    return int(np.lexsort((-shares.sum(0), -(shares >= _SHOWN_SHARE).sum(0)))[0])


def crop_around(masks: Sequence[NDArray[np.bool_]], margin: float = MARGIN) -> tuple[slice, slice]:
    """Rows and columns around all masks (H, W), with a margin in parts of the larger side; all without foreground."""
    found = np.argwhere(np.any(masks, axis=0))
    if not len(found):
        return slice(None), slice(None)
    low, high = found.min(0), found.max(0) + 1
    room = max(2, math.ceil(margin * (high - low).max()))
    rows, columns = (slice(max(0, a - room), b + room) for a, b in zip(low.tolist(), high.tolist(), strict=True))
    return rows, columns


def read_volume(path: Path) -> tuple[NDArray, tuple[float, ...], bool]:
    """Array (Z, Y, X), spacing (z, y, x) in mm, and whether its orientation is known.

    A volume is turned so that axes run from feet to head, front to back, and the patient's right to left: shown row by
    row, that is an axial slice as radiologists look at it. A two-dimensional image is one slice, as it lies. A TIFF
    does not say where its axes lead, and stays as it lies, too.

    Raises:
        ValueError: no scalar image in two or three dimensions.
    """
    image = SimpleITK.ReadImage(str(path))
    if image.GetDimension() not in (2, 3) or image.GetNumberOfComponentsPerPixel() != 1:
        raise ValueError(f"{path}: got {image.GetDimension()} dimensions, expected a scalar image in two or three.")
    oriented = image.GetDimension() == 3 and image.GetSize()[2] > 1 and path.suffix.lower() not in TIFF
    if oriented:
        image = SimpleITK.DICOMOrient(image, "LPS")
    array = SimpleITK.GetArrayFromImage(image)
    spacing = tuple(reversed(image.GetSpacing()))
    return (array, spacing, oriented) if array.ndim == 3 else (array[None], (1.0, *spacing), False)


def read_slice(
    image_path: Path, truth_path: Path, predictions: Mapping[str, Path], n_classes: int, channel: str
) -> Slice:
    """The best slice of a subject, cropped around what is labelled or predicted there.

    Args:
        image_path: the image whose intensities are shown.
        truth_path: expert labels.
        predictions: method -> predicted labels.
        n_classes: K.
        channel: name of the image's channel; ``CT`` is shown in a soft tissue window, all else between percentiles.

    Raises:
        ValueError: the files do not fit each other, or are no images.
        RuntimeError: a file cannot be read.
    """
    volume, spacing, oriented = read_volume(image_path)
    whole = _mask_like(volume, truth_path, "expert label")
    z = best_slice(whole, n_classes)
    truth = whole[z]
    masks = {name: _mask_like(volume, path, f"prediction of {name}")[z] for name, path in predictions.items()}
    where = crop_around([(mask > 0) & (mask <= n_classes) for mask in (truth, *masks.values())])
    return Slice(
        image=volume[z][where].astype(np.float64),
        truth=truth[where],
        predictions={name: mask[where] for name, mask in masks.items()},
        window=_window(volume, channel),
        pixel_height=spacing[1] / spacing[2],
        position=(z + 1, len(volume)),
        oriented=oriented,
    )


def _mask_like(volume: NDArray, path: Path, what: str) -> NDArray:
    mask, _, _ = read_volume(path)
    if mask.shape != volume.shape:
        raise ValueError(f"{path}: got a {what} of shape {mask.shape}, expected {volume.shape} as its image.")
    return mask


def _window(volume: NDArray, channel: str) -> tuple[float, float]:
    if channel.upper() == "CT":
        return CT_WINDOW_HU
    finite = volume[np.isfinite(volume)]
    if not finite.size:
        return 0.0, 1.0
    inside = finite[finite > finite.min()]
    low, high = np.percentile(inside if inside.size else finite, (0.5, 99.5))
    return float(low), float(max(high, low + 1e-6))


def plot_panel(
    slices: Mapping[str, Slice], scores: Mapping[str, Mapping[str, float]], classes: Sequence[str], path_png: Path
) -> None:
    """A block of tiles per subject: the image, the expert's outlines, and those of each method with its mean Dice.

    Organs are filled and outlined in their colours, the same as in every other figure; where there are more than
    colour alone tells apart, they are numbered too.

    Args:
        slices: title of a subject -> its slice.
        scores: title -> method -> mean Dice in [0, 1] over the subject's organs; NaN is not shown.
        classes: K names in the order learned; class i has the value i + 1.
        path_png: as for `figures.plot_mean_dice`.
    """
    n_tiles = 2 + max(len(found.predictions) for found in slices.values())
    columns = math.ceil(n_tiles / math.ceil(n_tiles / _MAX_COLUMNS))
    lines = math.ceil(n_tiles / columns)
    by_name = organ_styles(classes)
    styles = [by_name[name] for name in classes]
    shapes = [found.image.shape[0] * found.pixel_height / found.image.shape[1] for found in slices.values()]
    tile = WIDTH_INCHES / columns
    heights = [lines * (tile * shape + 0.25) + 0.25 for shape in shapes]
    with drawing(path_png, WIDTH_INCHES, sum(heights)) as figure:
        blocks = figure.subfigures(len(slices), 1, height_ratios=heights, squeeze=False)
        for block, (title, found) in zip(blocks.flat, slices.items(), strict=True):
            block.suptitle(shown(title), x=0.005, ha="left", fontsize=9, fontweight="bold")
            grid = block.subplots(lines, columns, squeeze=False)
            for axes in grid.flat:
                axes.set_axis_off()
            tiles = {"Image": np.zeros_like(found.truth), "Expert": found.truth, **found.predictions}
            for axes, (name, mask) in zip(grid.flat, tiles.items(), strict=False):
                _draw_tile(axes, found, mask, styles)
                dice = scores.get(title, {}).get(name, math.nan)
                text = shown(marked(name)) + ("" if math.isnan(dice) else f", Dice {100 * dice:.0f} %")
                written = axes.set_title(text, fontweight="normal")
                needed = written.get_window_extent().width / figure.dpi
                written.set_fontsize(written.get_fontsize() * min(1, _TITLE_SHARE * tile / needed))
            if found.oriented:
                _mark_sides(grid[0, 0])
        numbered = len(classes) > PLAIN_ORGANS
        handles = [
            Line2D(
                [],
                [],
                color=style.colour,
                linestyle=style.line,
                linewidth=3,
                label=shown(f"{c + 1} {name}" if numbered else name),
            )
            for c, (name, style) in enumerate(zip(classes, styles, strict=True))
        ]
        legend(figure, handles, "outside lower left")


def _draw_tile(axes: Axes, found: Slice, mask: NDArray[np.integer], styles: Sequence[OrganStyle]) -> None:
    low, high = found.window
    axes.imshow(found.image, cmap="gray", vmin=low, vmax=high, aspect=found.pixel_height, interpolation="nearest")
    for c, style in enumerate(styles):
        organ = (mask == c + 1).astype(float)
        if not organ.any():
            continue
        # A border of background closes the outline of an organ that touches the edge of the tile.
        around = np.pad(organ, 1)
        grid = np.arange(-1.0, organ.shape[1] + 1), np.arange(-1.0, organ.shape[0] + 1)
        axes.contourf(*grid, around, levels=[0.5, 2], colors=[style.colour], alpha=0.3)
        axes.contour(*grid, around, levels=[0.5], colors=[style.colour], linewidths=1.3, linestyles=[style.line])
        if len(styles) > PLAIN_ORGANS:
            rows, columns = np.nonzero(organ)
            nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
            axes.text(
                columns[nearest],
                rows[nearest],
                str(c + 1),
                color="white",
                fontsize=6.5,
                ha="center",
                va="center",
                path_effects=[withStroke(linewidth=1.5, foreground="black")],
            )
    axes.set_xlim(-0.5, found.image.shape[1] - 0.5)
    axes.set_ylim(found.image.shape[0] - 0.5, -0.5)


def _mark_sides(axes: Axes) -> None:
    look = {"transform": axes.transAxes, "color": "white", "fontsize": 8, "fontweight": "bold"}
    look["path_effects"] = [withStroke(linewidth=2, foreground="black")]
    for x, y, text in ((0.04, 0.5, "R"), (0.96, 0.5, "L")):
        axes.text(x, y, text, ha="left" if x < 0.5 else "right", va="center", **look)
