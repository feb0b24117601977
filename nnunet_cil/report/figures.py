"""Figures of an experiment, as PNG and PDF."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from matplotlib import font_manager
from matplotlib import style as mpl_style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, MultipleLocator
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray

from nnunet_cil import metrics
from nnunet_cil.report.colours import BACKGROUND_COLOUR, TERM_COLOURS, OrganStyle, method_styles, organ_styles
from nnunet_cil.report.table import Row, marked, named_seeds

DPI = 200
WIDTH_INCHES = 7.0

_GREY = "#555555"
_LOOK = {
    "font.size": 9,
    "pdf.fonttype": 42,
    "axes.axisbelow": True,
    "axes.edgecolor": _GREY,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "xtick.color": _GREY,
    "xtick.labelcolor": "black",
    "ytick.color": _GREY,
    "ytick.labelcolor": "black",
}
# taken, where they are installed, for the characters of class names that matplotlib's own font lacks
_OTHER_FONTS = (
    *(f"Noto Sans CJK {region}" for region in ("SC", "TC", "JP", "KR")),
    *("Source Han Sans SC", "Source Han Sans", "WenQuanYi Zen Hei", "IPAexGothic", "NanumGothic"),
    *("Microsoft YaHei", "SimHei", "Yu Gothic", "Malgun Gothic"),
    *("PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Arial Unicode MS"),
)
_BOXES_PER_LINE = 36
_MAX_LOLLIPOPS = 40
_CELL_INCHES = 0.42
_LEGEND_LINE_INCHES = 0.19
_MAX_NUMBERED = 12  # a similarity matrix of more classes has no room for numbers


@contextmanager
def drawing(path_png: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure (inches) in our look, written as PNG and as a PDF beside it once it is drawn; its folder is made.

    Raises:
        ValueError: ``path_png`` does not end in ``.png``.
    """
    path_png = Path(path_png)
    if path_png.suffix != ".png":
        raise ValueError(f"path_png: got {path_png.name}, expected a name that ends in .png.")
    installed = set(font_manager.get_font_names())
    fonts = {"font.family": ["DejaVu Sans", *(font for font in _OTHER_FONTS if font in installed)]}
    with mpl_style.context(["default", _LOOK, fonts]):  # nnU-Net's plots leave seaborn's settings behind
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        figure.draw_without_rendering()  # lays it out
        figure.set_layout_engine(None)  # for both files at once, which else do it twice each
        path_png.parent.mkdir(parents=True, exist_ok=True)
        _save(figure, path_png)
        _save(figure, path_png.with_suffix(".pdf"), metadata={"CreationDate": None})


def _save(figure: Figure, path: Path, **options: object) -> None:
    """Whole or not at all: a reader never meets half a file."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        figure.savefig(unfinished, format=path.suffix[1:], **options)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def shown(name: str) -> str:
    """A name as a label: matplotlib leaves ``_x`` out of a legend, and takes what lies between ``$`` for a formula."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def legend(figure: Figure, handles: Sequence[Line2D], place: str) -> None:
    """A legend above or below all panels, in as many columns as there is room for; the figure grows by its height."""
    longest = max((len(str(handle.get_label())) for handle in handles), default=0)
    columns = max(1, int(figure.get_figwidth() // (0.5 + 0.07 * longest)))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + _LEGEND_LINE_INCHES * math.ceil(len(handles) / columns) + 0.1)
    figure.legend(handles=handles, loc=place, ncols=min(columns, max(1, len(handles))))


def plot_mean_dice(rows: Sequence[Row], learned_at: Sequence[int], path_png: Path, among: Sequence[str] = ()) -> None:
    """Mean Dice (%) over the classes learned so far, after each step, one line per method; PNG and a PDF beside it.

    A step without score is left out. The model trained on all classes together is a star at the last step with a
    dashed line across. Methods are listed by their last value, with its standard deviation over seeds, and these seeds
    where not all methods have the same; of one that has not come to the last step, the label says which step it is of.
    Small dots are single seeds.

    Args:
        rows: one per method; R ``(T, K)`` in [0, 1].
        learned_at: the K steps, from 1, that learn the classes.
        path_png: where to write, ending in ``.png``; its folder is made if missing.
        among: further methods of the same report, so that each keeps its colour in all of its figures.

    Raises:
        ValueError: ``path_png`` does not end in ``.png``, no row has a score, or ``learned_at`` does not fit.
    """
    means = {row.method: _means_by_step(row.dice, learned_at) for row in rows}
    by_seed = {row.method: np.array([_means_by_step(dice, learned_at) for dice in row.by_seed]) for row in rows}
    same_seeds = len({frozenset(row.seeds) for row in rows}) == 1
    seeds = {row.method: row.seeds for row in rows}
    means = {method: values for method, values in means.items() if not np.isnan(values).all()}
    styles, joint = method_styles([*among, *(row.method for row in rows)]), {r.method for r in rows if r.is_joint}

    with drawing(path_png, 5.6, max(3.3, _LEGEND_LINE_INCHES * (len(means) + 2))) as figure:
        if not means:
            raise ValueError("rows: got no score at all, expected at least one method with a scored step.")
        last_step = max(map(len, means.values()))
        axes = figure.add_subplot()
        lines = []
        for method, values in means.items():
            colour, marker = styles[method]
            steps = np.flatnonzero(~np.isnan(values)) + 1
            is_final = steps[-1] == len(values)
            label = f"{shown(marked(method))}  {'' if is_final else f'step {steps[-1]}: '}{values[steps[-1] - 1]:.1f}"
            if len(by_seed[method]) > 1:
                label += f" ±{metrics.over_seeds(by_seed[method])[1][steps[-1] - 1]:.1f}"
                for each in by_seed[method]:
                    axes.plot(range(1, len(each) + 1), each, ".", color=colour, markersize=4, alpha=0.7, clip_on=False)
            if not same_seeds:
                label += f", {named_seeds(seeds[method])}"
            shared = {"color": colour, "marker": marker, "markeredgecolor": "white", "markeredgewidth": 0.7}
            if method in joint and len(values) > 1:
                ends = [1, len(values)]
                y = [values[-1]] * 2
                look = {"linestyle": (0, (4, 3)), "linewidth": 1.0, "markersize": 11, "markevery": [1], "zorder": 2.5}
            else:
                ends, y = steps, values[steps - 1]
                look = {"linewidth": 1.8, "markersize": 6.5, "zorder": 3}
            (line,) = axes.plot(ends, y, label=label, clip_on=False, **shared, **look)
            lines.append((is_final, y[-1], line))
        lowest = min(np.nanmin(by_seed[method]) for method in means)
        axes.set_ylim(0 if lowest < 50 else 10 * (lowest // 10), 100)
        axes.set_xlim(0.85, last_step + 0.15)
        axes.yaxis.set_major_locator(MultipleLocator(20 if lowest < 50 else 10))
        ticks = range(1, last_step + 1)
        axes.set_xticks(ticks, [f"{t}\n({np.sum(np.asarray(learned_at) <= t)})" for t in ticks])
        axes.set_xlabel("Step (classes learned so far)")
        axes.set_ylabel("Mean Dice (%)")
        lines.sort(key=lambda entry: entry[:2], reverse=True)
        figure.legend(
            handles=[line for *_, line in lines],
            title="Final mean (%)",
            alignment="left",
            loc="outside right upper",
        )


def _means_by_step(dice: NDArray[np.floating], learned_at: Sequence[int]) -> NDArray[np.float64]:
    """(T,) mean Dice (%) over the classes learned so far, after each step."""
    return 100 * np.array([metrics.mean(dice, learned_at, t) for t in range(1, len(dice) + 1)])


def plot_score_matrix(rows: Sequence[Row], classes: Sequence[str], learned_at: Sequence[int], path_png: Path) -> None:
    """Heat map of R: Dice (%) of each class after each step, one panel per method. Dark is low.

    A cell before its class is learned is empty, a missing score is hatched; a step without any score has no row.

    Args:
        rows: one per method, each with a score; R ``(T, K)`` in [0, 1].
        classes: K names.
        learned_at: the K steps, from 1, that learn them.
        path_png: as for `plot_mean_dice`.
    """
    columns, styles = _per_line(len(rows), 0.9 + _CELL_INCHES * len(classes)), organ_styles(classes)
    steps = [np.flatnonzero(~np.isnan(row.dice).all(1)) for row in rows]
    lines = math.ceil(len(rows) / columns)
    in_line = [max(map(len, steps[line * columns : (line + 1) * columns])) for line in range(lines)]
    width = WIDTH_INCHES / columns - 0.8
    height = 0.3 * sum(in_line) + lines * (0.4 + _room_below(classes, width)) + 0.6
    with drawing(path_png, WIDTH_INCHES, height) as figure:
        grid = figure.subplots(lines, columns, squeeze=False, height_ratios=in_line)
        scale = Normalize(0, 100)
        for axes, row, scored in zip(grid.flat, rows, steps, strict=False):
            values = 100 * row.dice[scored]
            image = axes.pcolormesh(values, cmap="viridis", norm=scale, edgecolors="white", linewidth=1.5)
            for (r, c), value in np.ndenumerate(values):
                if not np.isnan(value):
                    _number(axes, c + 0.5, r + 0.5, f"{value:.0f}", "white" if value < 45 else "black")
                elif scored[r] + 1 >= learned_at[c]:
                    missing = {"facecolor": "#EEEEEE", "edgecolor": "#999999", "hatch": "////", "linewidth": 0}
                    axes.add_patch(Rectangle((c, r), 1, 1, **missing))
            axes.set_title(shown(marked(row.method)))
            axes.set_yticks(np.arange(len(scored)) + 0.5, [f"step {t + 1}" for t in scored])
            axes.invert_yaxis()
            _bare(axes)
            _organs_along_x(axes, classes, np.arange(len(classes)) + 0.5, width)
            axes.tick_params(axis="x", pad=11)
            for c, name in enumerate(classes):
                _swatch(axes, styles[name], c + 0.5, 0, axes.get_xaxis_transform(), (0, -7))
        for axes in grid.flat[len(rows) :]:
            axes.set_visible(False)
        _colorbar_above(figure, image, grid, "Dice (%)")


def forgetting_of_runs(runs: Sequence[NDArray[np.floating]], learned_at: Sequence[int]) -> list[NDArray[np.floating]]:
    """Forgetting (points of 100 Dice) of each class ``(K,)`` in single runs, if several have come to their end."""
    found = [100 * metrics.forgetting_per_class(R, learned_at) for R in runs]
    found = [values for values in found if not np.isnan(values).all()]
    return found if len(found) > 1 else []


def plot_forgetting(
    rows: Sequence[Row],
    dice_by_run: Mapping[str, Sequence[NDArray[np.floating]]],
    classes: Sequence[str],
    learned_at: Sequence[int],
    path_png: Path,
    among: Sequence[str] = (),
) -> None:
    """Forgetting (points of 100 Dice) of each class that the last step did not learn, by method.

    A large marker is the mean over seeds, as in the table; small ones are single runs, if there are several. Where
    `forgetting_is_matrix` says that there are too many of them, a heat map of the means takes their place.

    Args:
        rows: one per method; R ``(T, K)`` in [0, 1]. One without forgetting, such as joint, is left out.
        dice_by_run: method -> R of each of its runs.
        classes: K names.
        learned_at: the K steps, from 1, that learn them.
        path_png, among: as for `plot_mean_dice`.

    Raises:
        ValueError: no row has a forgetting.
    """
    lost = {row.method: 100 * row.forgetting(learned_at) for row in rows}
    lost = {method: values for method, values in lost.items() if not np.isnan(values).all()}
    if not lost:
        raise ValueError("rows: got no forgetting, expected a method with scores after two steps.")
    organs = [c for c in range(len(classes)) if any(not np.isnan(values[c]) for values in lost.values())]
    if forgetting_is_matrix(len(lost), len(organs)):
        _plot_forgetting_matrix({method: values[organs] for method, values in lost.items()}, organs, classes, path_png)
        return
    styles = method_styles([*among, *(row.method for row in rows)])
    with drawing(path_png, WIDTH_INCHES, 0.6 + len(organs) * (0.2 * len(lost) + 0.22)) as figure:
        axes = figure.add_subplot()
        pitch = len(lost) + 1.1
        for m, (method, values) in enumerate(lost.items()):
            colour, marker = styles[method]
            y = np.array([pitch * i + m for i in range(len(organs))])
            axes.hlines(y, 0, values[organs], color=colour, linewidth=2.2)
            axes.plot(values[organs], y, marker, color=colour, markersize=7.5, markeredgecolor="white", zorder=3)
            for found in forgetting_of_runs(dice_by_run.get(method, ()), learned_at):
                axes.plot(found[organs], y + 0.32, ".", color=colour, markersize=4, alpha=0.8)
        axes.axvline(0, color=_GREY, linewidth=1)
        centres = pitch * np.arange(len(organs)) + (len(lost) - 1) / 2
        axes.set_yticks(centres, [shown(classes[c]) for c in organs])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(pitch * len(organs) - 1, -1)
        axes.grid(axis="y", visible=False)
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, -2), max(high, 10))
        axes.set_xlabel("Forgetting (points of 100 Dice): better to the left")
        legend(figure, _method_handles(lost, styles), "outside upper left")


def forgetting_is_matrix(n_methods: int, n_organs: int) -> bool:
    """Whether `plot_forgetting` draws a heat map."""
    return n_methods * n_organs > _MAX_LOLLIPOPS


def _plot_forgetting_matrix(
    lost: Mapping[str, NDArray[np.floating]], organs: Sequence[int], classes: Sequence[str], path_png: Path
) -> None:
    values = np.array(list(lost.values()))
    width = WIDTH_INCHES - 1.2
    with drawing(
        path_png, WIDTH_INCHES, 0.3 * len(lost) + 0.6 + _room_below([classes[c] for c in organs], width)
    ) as figure:
        axes = figure.add_subplot()
        scale = Normalize(0, max(10.0, float(np.nanmax(values))))
        image = axes.pcolormesh(values, cmap="Oranges", norm=scale, edgecolors="white", linewidth=1.5)
        for (r, c), value in np.ndenumerate(values):
            if not np.isnan(value):
                _number(axes, c + 0.5, r + 0.5, f"{round(value)}", "white" if value > 0.65 * scale.vmax else "black")
        axes.set_yticks(np.arange(len(lost)) + 0.5, [shown(marked(method)) for method in lost])
        axes.invert_yaxis()
        _bare(axes)
        _organs_along_x(axes, [classes[c] for c in organs], np.arange(len(organs)) + 0.5, width)
        _colorbar_above(figure, image, axes, "Forgetting (points of 100 Dice)")


def plot_subjects(
    scores: Mapping[str, NDArray[np.floating]],
    classes: Sequence[str],
    label: str,
    path_png: Path,
    among: Sequence[str] = (),
) -> None:
    """Box plots over the test subjects, one box per class and method: quartiles, 1.5 times their distance, all points.

    A label that ends in ``(%)`` has an axis from 0 to 100.

    Args:
        scores: method -> (N, K) scores in the unit of ``label``; NaN where absent.
        classes: K names.
        label: of the axis.
        path_png, among: as for `plot_mean_dice`.

    Raises:
        ValueError: there is no method.
    """
    organs_per_line = min(len(classes), max(1, _BOXES_PER_LINE // max(1, len(scores))))
    lines = math.ceil(len(classes) / organs_per_line)
    organs_per_line = math.ceil(len(classes) / lines)
    in_lines = [range(c, min(len(classes), c + organs_per_line)) for c in range(0, len(classes), organs_per_line)]
    lines = len(in_lines)
    styles = method_styles([*among, *scores])
    rng = np.random.default_rng(0)
    width = WIDTH_INCHES - 0.8
    room = max(_room_below([classes[c] for c in organs], width) for organs in in_lines)
    with drawing(path_png, WIDTH_INCHES, 0.2 + lines * ((2.3 if lines == 1 else 1.8) + room)) as figure:
        if not scores:
            raise ValueError("scores: got no method, expected at least one.")
        pitch = len(scores) + 1.0
        for organs, axes in zip(in_lines, figure.subplots(lines, 1, squeeze=False, sharey=True).flat, strict=True):
            for m, (method, values) in enumerate(scores.items()):
                colour, marker = styles[method]
                for i, c in enumerate(organs):
                    present = values[~np.isnan(values[:, c]), c]
                    if present.size:
                        _box(axes, present, pitch * i + m, colour, marker, rng)
            centres = pitch * np.arange(len(organs)) + (len(scores) - 1) / 2
            axes.set_xlim(-1, pitch * organs_per_line - 1)
            axes.grid(axis="x", visible=False)
            axes.set_ylabel(label)
            if label.endswith("(%)"):
                axes.set_ylim(-4, 104)
            _organs_along_x(axes, [classes[c] for c in organs], centres, width)
        legend(figure, _method_handles(scores, styles), "outside upper left")


def _box(
    axes: Axes, values: NDArray[np.floating], x: float, colour: str, marker: str, rng: np.random.Generator
) -> None:
    size, alpha = (3.2, 0.55) if len(values) <= 100 else (2.2, 0.3)
    jitter = rng.uniform(-0.22, 0.22, len(values))
    axes.plot(x + jitter, values, marker, color=colour, markersize=size, alpha=alpha, markeredgewidth=0, zorder=2)
    is_flat = np.ptp(np.percentile(values, (25, 75))) == 0  # such a box is no more than its median
    axes.boxplot(
        values,
        positions=[x],
        widths=0.72,
        showfliers=False,
        patch_artist=True,
        manage_ticks=False,
        zorder=3,
        boxprops={"facecolor": (*to_rgb(colour), 0.18), "edgecolor": colour, "linewidth": 1.1},
        medianprops={"color": colour if is_flat else "black", "linewidth": 1.6},
        whiskerprops={"color": colour},
        capprops={"color": colour},
    )


def plot_loss_terms(terms: Mapping[str, Mapping[str, NDArray[np.floating]]], path_png: Path) -> None:
    """Loss terms of one method by epoch, a column per training: the segmentation term, and all others below it.

    The others are drawn on a logarithmic axis, for their sizes differ by orders; values that are not positive are left
    out there. Terms are weighted as in the sum that is minimised. A single training has the two side by side.

    Args:
        terms: title of a training -> term -> (epochs,) values; at least one training.
        path_png: as for `plot_mean_dice`.
    """
    others = sorted({name for found in terms.values() for name in found if name != "segmentation"})
    colours = {name: TERM_COLOURS[i % len(TERM_COLOURS)] for i, name in enumerate(others)}
    kinds = 2 if others else 1
    columns = min(len(terms), 4)
    blocks = math.ceil(len(terms) / columns)
    width, height = (WIDTH_INCHES, blocks * (0.6 + 1.6 * kinds)) if len(terms) > 1 else (3.6 * kinds, 2.6)
    with drawing(path_png, width, height) as figure:
        if len(terms) == 1:
            grid = figure.subplots(1, kinds, squeeze=False).T
        else:
            grid = figure.subplots(blocks * kinds, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_visible(False)
        for i, (title, found) in enumerate(terms.items()):
            block, column = divmod(i, columns)
            panels = grid[kinds * block : kinds * (block + 1), column]
            _draw_terms(panels, found, colours)
            panels[0].set_title(shown(title))
            for axes, label in zip(panels, ("Segmentation loss", "Other terms"), strict=False):
                axes.set_ylabel(label if column == 0 else "")
            for axes in panels if len(terms) == 1 else panels[-1:]:
                axes.set_xlabel("Epoch")
        for panels in grid:
            _share_y([axes for axes in panels if axes.get_visible()])
        handles = [Line2D([], [], color=colours[name], label=shown(name.replace("_", " "))) for name in others]
        if handles:
            legend(figure, handles, "outside lower left")


def _draw_terms(panels: Sequence[Axes], found: Mapping[str, NDArray[np.floating]], colours: Mapping[str, str]) -> None:
    epochs = max(map(len, found.values()))
    panels[0].plot(found.get("segmentation", []), color=_GREY, linewidth=1.5)
    for name, colour in colours.items():
        values = np.asarray(found.get(name, []), dtype=float)
        panels[1].plot(np.where(values > 0, values, np.nan), color=colour, linewidth=1.5)
    if colours:
        panels[1].set_yscale("log")
    for axes in panels:
        axes.set_visible(True)
        axes.set_xlim(-0.5, max(epochs - 0.5, 1))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _share_y(panels: Sequence[Axes]) -> None:
    if not panels:
        return
    limits = [axes.get_ylim() for axes in panels]
    for axes in panels:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def plot_similarity(
    similarities: Mapping[str, tuple[Sequence[str], NDArray[np.floating]]], classes: Sequence[str], path_png: Path
) -> None:
    """Cosine similarity between the prototypes of all classes, a panel per method; red is alike, blue opposite.

    Args:
        similarities: method -> names of its n classes (background among them; `` *`` may follow a name) and (n, n)
            cosines; NaN is left blank.
        classes: the chain's classes, for their colours.
        path_png: as for `plot_mean_dice`.
    """
    n, styles = max(len(names) for names, _ in similarities.values()), organ_styles(classes)
    side = 1.1 + (0.42 if n <= _MAX_NUMBERED else 0.3) * n
    columns = _per_line(len(similarities), side)
    lines = math.ceil(len(similarities) / columns)
    with drawing(path_png, min(WIDTH_INCHES, columns * side + 0.8), lines * (side + 0.2)) as figure:
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes, (method, (names, matrix)) in zip(grid.flat, similarities.items(), strict=False):
            image = axes.pcolormesh(
                matrix, cmap="RdBu_r", norm=Normalize(-1, 1), edgecolors="white", linewidth=1, rasterized=False
            )
            for (r, c), value in np.ndenumerate(matrix if n <= _MAX_NUMBERED else np.zeros((0, 0))):
                if not np.isnan(value):
                    number = f"{value + 0.0:.1f}".replace("-0.0", "0.0")
                    _number(axes, c + 0.5, r + 0.5, number, "white" if abs(value) > 0.6 else "black")
            places = np.arange(len(names)) + 0.5
            axes.set_title(shown(marked(method)))
            axes.set_aspect("equal")
            axes.set_yticks(places, [shown(name) for name in names])
            axes.set_xticks(places, [shown(name) for name in names], rotation=45, ha="right", rotation_mode="anchor")
            axes.invert_yaxis()
            _bare(axes)
            axes.tick_params(pad=10)
            for name, place in zip(names, places, strict=True):
                style = next((style for known, style in styles.items() if name in (known, f"{known} *")), None)
                _swatch(axes, style, place, 0, axes.get_xaxis_transform(), (0, -6))
                _swatch(axes, style, 0, place, axes.get_yaxis_transform(), (-6, 0))
        for axes in grid.flat[len(similarities) :]:
            axes.set_visible(False)
        figure.colorbar(image, ax=grid, label="Cosine similarity", shrink=min(1.0, 2.0 / (lines * side)), pad=0.02)


def plot_drift(
    drifts: Mapping[str, Mapping[str, NDArray[np.floating]]], classes: Sequence[str], path_png: Path
) -> None:
    """How far each class's prototype has moved since it was first extracted, by step; a panel per method.

    A class with fewer than two measured steps is left out.

    Args:
        drifts: method -> class -> (T,) distances in units of the class's spread, NaN where not measured.
        classes: the chain's classes, for their colours; any other name is drawn as background.
        path_png: as for `plot_mean_dice`.
    """
    columns, styles = min(len(drifts), 3), organ_styles(classes)
    lines = math.ceil(len(drifts) / columns)
    with drawing(path_png, max(4.2, WIDTH_INCHES * columns / 3), 0.3 + 2.0 * lines) as figure:
        grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        handles = {}
        for axes, (method, found) in zip(grid.flat, drifts.items(), strict=False):
            for name, distances in found.items():
                measured = np.flatnonzero(~np.isnan(distances))
                if len(measured) < 2:
                    continue
                style = styles.get(name)
                colour, kind = (style.colour, style.line) if style else (BACKGROUND_COLOUR, (0, (1, 1)))
                handles[name], *_ = axes.plot(
                    measured + 1,
                    distances[measured],
                    color=colour,
                    linestyle=kind,
                    marker="o",
                    clip_on=False,
                    label=shown(name),
                )
            n_steps = max(map(len, found.values()))
            axes.set_title(shown(marked(method)))
            axes.set_xlim(0.85, n_steps + 0.15)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.xaxis.set_tick_params(labelbottom=True)
        grid[0, 0].set_ylim(bottom=0)
        for axes in grid.flat[len(drifts) :]:
            axes.set_visible(False)
        figure.supxlabel("Step", fontsize=9)
        figure.supylabel("Distance moved (spreads)", fontsize=9)
        ordered = [handles[name] for name in ("background", *classes) if name in handles]
        legend(figure, ordered, "outside upper left")


def _per_line(n: int, width: float) -> int:
    """How many of n panels of this width (inches) stand side by side, at least one; lines are filled evenly."""
    most = max(1, min(n, int((WIDTH_INCHES - 0.6) // width)))
    return math.ceil(n / math.ceil(n / most))


def _method_handles(methods: Sequence[str] | Mapping, styles: Mapping[str, tuple[str, str]]) -> list[Line2D]:
    return [
        Line2D([], [], color=styles[method][0], marker=styles[method][1], linestyle="", label=shown(marked(method)))
        for method in methods
    ]


def _colorbar_above(figure: Figure, image: QuadMesh, panels: Axes | NDArray, label: str) -> None:
    room = 0.15 / figure.get_figheight()
    look = {"location": "top", "shrink": 0.4, "aspect": 30, "anchor": (0, 0)}
    figure.colorbar(image, ax=panels, label=label, pad=room, **look)


def _bare(axes: Axes) -> None:
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _number(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    axes.text(x, y, text, ha="center", va="center", fontsize=8, color=colour)


def _swatch(
    axes: Axes, style: OrganStyle | None, x: float, y: float, transform: object, points: tuple[float, float]
) -> None:
    """The square in a class's colour that stands by its name, moved by ``points``; None is background."""
    moved = transform + ScaledTranslation(points[0] / 72, points[1] / 72, axes.figure.dpi_scale_trans)
    axes.plot(
        [x],
        [y],
        "s",
        color=style.colour if style else BACKGROUND_COLOUR,
        markersize=6,
        markeredgecolor=_GREY,
        markeredgewidth=0.4,
        fillstyle="left" if style and style.hatch else "full",
        markerfacecoloralt="white",
        transform=moved,
        clip_on=False,
        scalex=False,
        scaley=False,
    )


def _slanted(names: Sequence[str], width: float) -> bool:
    return len(names) * (max(map(len, names)) + 1) * 0.085 > width


def _room_below(names: Sequence[str], width: float) -> float:
    """Inches that the names need below an axis of this width."""
    return 0.4 + 0.05 * max(map(len, names)) if _slanted(names, width) else 0.4


def _organs_along_x(axes: Axes, classes: Sequence[str], places: NDArray[np.floating], width: float) -> None:
    """Names of classes below the axis; slanted where ``width`` inches have no room for them."""
    names = [shown(name) for name in classes]
    look = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if _slanted(names, width) else {}
    axes.set_xticks(places, names, **look)
    axes.tick_params(axis="x", length=0)
