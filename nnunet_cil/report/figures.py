"""Figures of an experiment, as PNG and PDF."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from nnunet_cil import metrics
from nnunet_cil.report.table import Row

# Okabe and Ito's colours, which colour-blind readers tell apart; a known method keeps its style in every figure.
_STYLES = {
    "pgcd": ("#0072B2", "o"),
    "finetune": ("#D55E00", "s"),
    "joint": ("#000000", "*"),
    "pseudo": ("#009E73", "^"),
    "mib": ("#E69F00", "D"),
    "plop": ("#CC79A7", "v"),
}
_FURTHER_STYLES = (("#56B4E9", "P"), ("#999999", "X"), ("#F0E442", "h"))


def _styles(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    unknown = sorted({method for method in methods if method.lower() not in _STYLES})
    further = {method: _FURTHER_STYLES[i % len(_FURTHER_STYLES)] for i, method in enumerate(unknown)}
    return {method: _STYLES.get(method.lower()) or further[method] for method in methods}


def _save(figure: Figure, path: Path, **options: object) -> None:
    """Whole or not at all: a reader never meets half a file."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        figure.savefig(unfinished, format=path.suffix[1:], **options)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def plot_mean_dice(rows: Sequence[Row], learned_at: Sequence[int], path_png: Path) -> None:
    """Mean Dice (%) over the classes learned so far, after each step, one line per method; PNG and a PDF beside it.

    A step without score is left out. A model trained on all classes together (scores in the last row only) is a star
    at the last step with a dashed line across. Methods are listed by their last value.

    Args:
        rows: one per method; R ``(T, K)`` in [0, 1].
        learned_at: the K steps, from 1, that learn the classes.
        path_png: where to write, ending in ``.png``; its folder is made if missing.

    Raises:
        ValueError: ``path_png`` does not end in ``.png``, no row has a score, or ``learned_at`` does not fit.
    """
    path_png = Path(path_png)
    if path_png.suffix != ".png":
        raise ValueError(f"path_png: got {path_png.name}, expected a name that ends in .png.")
    means = {
        row.method: 100 * np.array([metrics.mean(row.R, learned_at, t) for t in range(1, len(row.R) + 1)])
        for row in rows
    }
    means = {method: values for method, values in means.items() if not np.isnan(values).all()}
    if not means:
        raise ValueError("rows: got no score at all, expected at least one method with a scored step.")
    last_step = max(map(len, means.values()))
    styles = _styles([row.method for row in rows])

    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 9, "pdf.fonttype": 42}):
        figure = Figure(figsize=(5.6, 3.3), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        lines = []
        for method, values in means.items():
            colour, marker = styles[method]
            steps = np.flatnonzero(~np.isnan(values)) + 1
            label = f"{method}  {values[steps[-1] - 1]:.1f}"
            shared = {"color": colour, "marker": marker, "markeredgecolor": "white", "markeredgewidth": 0.7}
            if len(values) > 1 and steps.tolist() == [len(values)]:
                ends = [1, len(values)]
                y = [values[-1]] * 2
                look = {"linestyle": (0, (4, 3)), "linewidth": 1.0, "markersize": 11, "markevery": [1], "zorder": 2.5}
            else:
                ends, y = steps, values[steps - 1]
                look = {"linewidth": 1.8, "markersize": 6.5, "zorder": 3}
            (line,) = axes.plot(ends, y, label=label, clip_on=False, **shared, **look)
            lines.append((y[-1], line))
        lowest = min(np.nanmin(values) for values in means.values())
        axes.set_ylim(0 if lowest < 50 else 10 * (lowest // 10), 100)
        axes.set_xlim(0.85, last_step + 0.15)
        axes.yaxis.set_major_locator(MultipleLocator(20 if lowest < 50 else 10))
        ticks = range(1, last_step + 1)
        axes.set_xticks(ticks, [f"{t}\n({np.sum(np.asarray(learned_at) <= t)})" for t in ticks])
        axes.set_xlabel("Step (classes learned so far)")
        axes.set_ylabel("Mean Dice (%)")
        axes.grid(color="#E3E3E3", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#555555")
        axes.tick_params(color="#555555")
        lines.sort(key=lambda pair: -pair[0])
        figure.legend(
            handles=[line for _, line in lines],
            title="Final mean (%)",
            alignment="left",
            loc="outside right upper",
            frameon=False,
        )
        path_png.parent.mkdir(parents=True, exist_ok=True)
        _save(figure, path_png, dpi=200)
        _save(figure, path_png.with_suffix(".pdf"), metadata={"CreationDate": None})
