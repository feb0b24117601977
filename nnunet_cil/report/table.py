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


@dataclass(frozen=True)
class FinalScores:
    """What stands beside Dice after the last step: means over classes and seeds, NaN where there is none.

    Attributes:
        nsd: in [0, 1]; nsd_tolerance_mm: the tolerance that it was taken at.
        hd95_mm: over the subjects in which reference and prediction both have the class; NaN if a class has no such
            subject, as a mean without a class that was forgotten would not compare.
        n_scores: scores behind the means, absent ones included: subjects x classes x seeds.
        missed, invented, both_empty: how many of them have no HD95 because the prediction, the reference or both are
            empty. The first two have Dice and NSD 0, the last has no score.
        gap_to_joint, plasticity_gap: of Dice, see ``metrics``.
    """

    nsd: float
    nsd_tolerance_mm: float
    hd95_mm: float
    n_scores: int
    missed: int
    invented: int
    both_empty: int
    gap_to_joint: float
    plasticity_gap: float


KEEPS_SCANS = "replay"  # and variants of it, whose names begin with this word


def marked(method: str) -> str:
    """A method's name as it is shown everywhere: one that keeps scans of earlier steps says so."""
    return f"{method} (not privacy-safe)" if method.startswith(KEEPS_SCANS) else method


@dataclass(frozen=True, eq=False)
class Row:
    """Scores of one method.

    Attributes:
        method: name to show.
        R: ``(T, K)`` Dice in [0, 1] after each step, the mean over seeds; NaN where there is none. A model trained on
            all classes together has scores in its last row only.
        seeds: number of seeds behind ``R``, at least 1.
        R_std: ``(T, K)`` standard deviation over seeds, or None.
        final: what else was measured after the last step, or None.

    Raises:
        ValueError: ``R`` is not a matrix of numbers in [0, 1], ``R_std`` has another shape, or ``seeds`` is below 1.
    """

    method: str
    R: NDArray[np.floating]
    seeds: int = 1
    R_std: NDArray[np.floating] | None = None
    final: FinalScores | None = None

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
        lines.append([marked(row.method), str(row.seeds), *final, *summary])
    return lines


def _beside_dice(rows: Sequence[Row]) -> list[str]:
    """The block of the rows that have more than Dice; no line if none has."""
    found = {row.method: row.final for row in rows if row.final is not None}
    if not found:
        return []
    tolerance_mm = next(iter(found.values())).nsd_tolerance_mm
    lines = [
        ["method", "NSD", "HD95", "missed", "invented", "both empty", "of", "gap to joint", "plasticity gap"],
        ["", "%", "mm", *["count"] * 4, *["points"] * 2],
    ]
    for method, final in found.items():
        hd95 = "n/a" if math.isnan(final.hd95_mm) else f"{final.hd95_mm:.1f}"
        counts = [str(n) for n in (final.missed, final.invented, final.both_empty, final.n_scores)]
        gaps = [_hundredths(gap, "+") for gap in (final.gap_to_joint, final.plasticity_gap)]
        lines.append([marked(method), _hundredths(final.nsd), hd95, *counts, *gaps])
    return [
        f"After the last step, mean over classes (NSD at {tolerance_mm:g} mm; HD95 where it exists, the rest counted)",
        *aligned(lines, header=2),
        f"Forward transfer: n/a, as {metrics.NO_FORWARD_TRANSFER}.",
    ]


def _scores_by_step(row: Row, classes: Sequence[str], learned_at: Sequence[int]) -> list[list[str]]:
    lines = [["step", *classes, "mean"]]
    for t, scores in enumerate(row.R, start=1):
        if not np.isnan(scores).all():
            cells = [_cell(row, t, c, learned_at) for c in range(len(classes))]
            lines.append([str(t), *cells, _hundredths(metrics.mean(row.R, learned_at, t))])
    return lines


def aligned(lines: Sequence[Sequence[str]], header: int) -> list[str]:
    """Lines of a plain-text table: first column flush left, the others flush right, a rule below the ``header`` lines.

    Raises:
        ValueError: the lines differ in their number of cells.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return [text.rstrip() for text in [*texts[:header], "-" * len(texts[0]), *texts[header:]]]


def score_table(rows: Sequence[Row], classes: Sequence[str], learned_at: Sequence[int]) -> str:
    """Plain-text table for the terminal: Dice after the last step, what stands beside it, then Dice step by step.

    Dice, means and plasticity are in %, forgetting and backward transfer (BWT) in points of 100 Dice; ``±`` is the
    standard deviation over seeds. The second part, of the rows with ``final``, has NSD and HD95, the number of absent
    scores, and what the joint model has more (in points). A class not yet learned is an empty cell, a missing score
    ``n/a``; a step without any score is left out of the third part. Forgetting and the like are those of the mean
    matrix over seeds.

    Args:
        rows: one per method, in the order to show.
        classes: K class names, in the order of the columns of ``R``.
        learned_at: the K steps, from 1, that learn them.

    Raises:
        ValueError: the numbers of classes do not agree.
    """
    parts = [["Dice after the last step", *aligned(_final_scores(rows, classes, learned_at), header=2)]]
    if beside := _beside_dice(rows):
        parts.append(beside)
    for row in rows:
        steps = aligned(_scores_by_step(row, classes, learned_at), header=1)
        parts.append([f"{marked(row.method)}: Dice (%) by step", *steps])
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def markdown_table(rows: Sequence[Row], classes: Sequence[str], learned_at: Sequence[int]) -> str:
    """The first part of `score_table`, with the same columns, as a Markdown table. Arguments and errors as there."""
    names, units, *lines = _final_scores(rows, classes, learned_at)
    header = [f"{name} ({unit})" if unit else name for name, unit in zip(names, units, strict=True)]
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in [header, rule, *lines]
    )
