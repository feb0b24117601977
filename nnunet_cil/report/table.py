"""Tables of an experiment: one line per method, and each method's scores step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nnunet_cil import metrics

_SUMMARY_COLUMNS = {
    "old_mean": ("old", "%"),
    "new_mean": ("new", "%"),
    "mean": ("mean", "%"),
    "average_incremental_mean": ("avg inc mean", "%"),
    "forgetting": ("forgetting", "points"),
    "backward_transfer": ("BWT", "points"),
    "plasticity": ("plasticity", "%"),
}


@dataclass(frozen=True, eq=False)
class Row:
    """Scores of one method.

    Attributes:
        method: name to show.
        R: ``(T, K)`` Dice in [0, 1] after each step, the mean over seeds; NaN where there is none. A model trained on
            all classes together has scores in its last row only.
        seeds: number of seeds behind ``R``, at least 1.
        R_std: ``(T, K)`` standard deviation over seeds, or None.

    Raises:
        ValueError: ``R`` is not a matrix of numbers in [0, 1], ``R_std`` has another shape, or ``seeds`` is below 1.
    """

    method: str
    R: NDArray[np.floating]
    seeds: int = 1
    R_std: NDArray[np.floating] | None = None

    def __post_init__(self) -> None:
        if self.R.ndim != 2 or not self.R.size:
            raise ValueError(f"R of {self.method}: got shape {self.R.shape}, expected (steps, classes).")
        scored = self.R[~np.isnan(self.R)]
        if ((scored < 0) | (scored > 1)).any():
            raise ValueError(
                f"R of {self.method}: got values from {scored.min()} to {scored.max()}, expected Dice in [0, 1], not %."
            )
        if self.R_std is not None and self.R_std.shape != self.R.shape:
            raise ValueError(f"R_std of {self.method}: got shape {self.R_std.shape}, expected {self.R.shape} as R.")
        if self.seeds < 1:
            raise ValueError(f"seeds of {self.method}: got {self.seeds}, expected at least 1.")


def _hundredths(value: float, sign: str = "") -> str:
    return "n/a" if math.isnan(value) else f"{round(100 * value, 1) + 0.0:{sign}.1f}"


def _cell(row: Row, t: int, c: int, learned_at: Sequence[int]) -> str:
    if learned_at[c] > t:
        return ""
    text = _hundredths(row.R[t - 1, c])
    spread = math.nan if row.R_std is None else row.R_std[t - 1, c]
    return text if math.isnan(spread) or text == "n/a" else f"{text} ±{_hundredths(spread)}"


def _final_scores(rows: Sequence[Row], classes: Sequence[str], learned_at: Sequence[int]) -> list[list[str]]:
    """Two lines of header (names, units), then one line per method."""
    if len(classes) != len(learned_at):
        raise ValueError(f"classes, learned_at: got {len(classes)} and {len(learned_at)} entries, expected as many.")
    names, units = zip(*_SUMMARY_COLUMNS.values(), strict=True)
    lines = [["method", "seeds", *classes, *names], ["", "", *["%"] * len(classes), *units]]
    for row in rows:
        scores = metrics.summary(row.R, learned_at)
        final = [_cell(row, len(row.R), c, learned_at) for c in range(len(classes))]
        summary = [_hundredths(scores[key], "+" if key == "backward_transfer" else "") for key in _SUMMARY_COLUMNS]
        lines.append([row.method, str(row.seeds), *final, *summary])
    return lines


def _scores_by_step(row: Row, classes: Sequence[str], learned_at: Sequence[int]) -> list[list[str]]:
    lines = [["step", *classes, "mean"]]
    for t, scores in enumerate(row.R, start=1):
        if not np.isnan(scores).all():
            cells = [_cell(row, t, c, learned_at) for c in range(len(classes))]
            lines.append([str(t), *cells, _hundredths(metrics.mean(row.R, learned_at, t))])
    return lines


def _aligned(lines: Sequence[Sequence[str]], header: int) -> list[str]:
    """First column flush left, the others flush right, and a rule below the ``header`` lines."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return [text.rstrip() for text in [*texts[:header], "-" * len(texts[0]), *texts[header:]]]


def score_table(rows: Sequence[Row], classes: Sequence[str], learned_at: Sequence[int]) -> str:
    """Plain-text table for the terminal: scores after the last step, then each method's scores step by step.

    Dice, means and plasticity are in %, forgetting and backward transfer (BWT) in points of 100 Dice; ``±`` is the
    standard deviation over seeds. A class not yet learned is an empty cell, a missing score ``n/a``; a step without
    any score is left out of the second part. Forgetting and the like are those of the mean matrix over seeds.

    Args:
        rows: one per method, in the order to show.
        classes: K class names, in the order of the columns of ``R``.
        learned_at: the K steps, from 1, that learn them.

    Raises:
        ValueError: the numbers of classes do not agree.
    """
    parts = [["Dice after the last step", *_aligned(_final_scores(rows, classes, learned_at), header=2)]]
    for row in rows:
        steps = _aligned(_scores_by_step(row, classes, learned_at), header=1)
        parts.append([f"{row.method}: Dice (%) by step", *steps])
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def markdown_table(rows: Sequence[Row], classes: Sequence[str], learned_at: Sequence[int]) -> str:
    """The first part of `score_table`, with the same columns, as a Markdown table. Arguments and errors as there."""
    names, units, *lines = _final_scores(rows, classes, learned_at)
    header = [f"{name} ({unit})" if unit else name for name, unit in zip(names, units, strict=True)]
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in [header, rule, *lines]
    )
