"""Tables of an experiment: one line per method, and each method's scores step by step."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from nnunet_cil import metrics
from nnunet_cil.chain import JOINT, keeps_scans

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
            subject with one of the seeds, as a mean without a class that was forgotten would not compare.
        n_scores: scores behind the means, absent ones included: subjects x classes x seeds.
        missed, invented, both_empty: how many of them have no HD95 because the prediction, the reference or both are
            empty. The first two have Dice and NSD 0, the last has no score.
        gap_to_joint, plasticity_gap: of Dice, see ``metrics``, over ``gap_seeds``, which have a joint model, too.
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
    gap_seeds: tuple[int | None, ...] = (None,)


def marked(method: str) -> str:
    """A method's name as it is shown everywhere: one that keeps scans of earlier steps says so."""
    return f"{method} (not privacy-safe)" if keeps_scans(method) else method


def seed_numbers(seeds: Collection[int | None], between: str = " ") -> str:
    """Seeds in a row of three or more as their ends: ``0-2 5 6``; ``none`` for a training without one."""
    runs: list[list[int]] = []
    for seed in sorted(seed for seed in seeds if seed is not None):
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    texts = [[f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run) for run in runs]
    return between.join([*(["none"] if None in seeds else []), *(text for run in texts for text in run)])


def named_seeds(seeds: Collection[int | None]) -> str:
    """As ``seed 0``, ``seeds 0, 1`` or ``seeds 0-2``."""
    return f"seed{'s' * (len(seeds) > 1)} {seed_numbers(seeds, ', ')}"


@dataclass(frozen=True, eq=False)
class Row:
    """Scores of one method.

    Attributes:
        method: name to show.
        by_seed: ``(S, T, K)`` Dice in [0, 1] of each seed after each step, the mean over its folds; NaN where there is
            none. A model trained on all classes together has scores in its last row only.
        seeds: the S seeds; None for trainings without one.
        final: what else was measured after the last step, or None.

    Raises:
        ValueError: ``by_seed`` is not such an array of numbers in [0, 1], or has not as many seeds.
    """

    method: str
    by_seed: NDArray[np.floating]
    seeds: tuple[int | None, ...] = (None,)
    final: FinalScores | None = None

    def __post_init__(self) -> None:
        if self.by_seed.ndim != 3 or not self.by_seed.size:
            raise ValueError(
                f"by_seed of {self.method}: got shape {self.by_seed.shape}, expected (seeds, steps, classes)."
            )
        if len(self.seeds) != len(self.by_seed):
            raise ValueError(
                f"seeds of {self.method}: got {len(self.seeds)}, expected {len(self.by_seed)} as by_seed has."
            )
        scored = self.by_seed[~np.isnan(self.by_seed)]
        if ((scored < 0) | (scored > 1)).any():
            raise ValueError(
                f"by_seed of {self.method}: got values from {scored.min()} to {scored.max()}, expected Dice in [0, 1], "
                "not %."
            )

    @property
    def is_joint(self) -> bool:
        """Whether it is the model of all classes together, or the ensemble of its folds."""
        return self.method.partition(",")[0] == JOINT

    @cached_property
    def dice(self) -> NDArray[np.float64]:
        """``(T, K)`` mean over the seeds that have a score; NaN where none has one."""
        return metrics.over_seeds(self.by_seed)[0]

    @cached_property
    def dice_std(self) -> NDArray[np.float64]:
        """``(T, K)`` standard deviation over seeds (one degree of freedom less); NaN with one seed."""
        return metrics.over_seeds(self.by_seed)[1]

    def forgetting(self, learned_at: Sequence[int]) -> NDArray[np.float64]:
        """``(K,)`` mean over seeds of ``metrics.forgetting_per_class``."""
        return metrics.over_seeds(np.stack([metrics.forgetting_per_class(R, learned_at) for R in self.by_seed]))[0]

    def summary(self, learned_at: Sequence[int]) -> tuple[dict[str, float], dict[str, float]]:
        """Mean and standard deviation, over seeds, of ``metrics.summary``; the latter is NaN with one seed."""
        each = [metrics.summary(matrix, learned_at, self.is_joint) for matrix in self.by_seed]
        values = {key: metrics.over_seeds(np.array([scores[key] for scores in each])) for key in each[0]}
        return {key: float(mean) for key, (mean, _) in values.items()}, {
            key: float(std) for key, (_, std) in values.items()
        }


def hundredths(value: float, sign: str = "", spread: float = math.nan) -> str:
    """100 times a value, with its spread, as text; ``n/a`` for NaN."""
    if math.isnan(value):
        return "n/a"
    text = f"{round(100 * value, 1) + 0.0:{sign}.1f}"
    return text if math.isnan(spread) else f"{text} ±{100 * spread:.1f}"


def _cell(row: Row, t: int, c: int, learned_at: Sequence[int]) -> str:
    if learned_at[c] > t:
        return ""
    return hundredths(row.dice[t - 1, c], spread=row.dice_std[t - 1, c])


def _final_scores(rows: Sequence[Row], classes: Sequence[str], learned_at: Sequence[int]) -> list[list[str]]:
    """Two lines of header (names, units), then one line per method."""
    if len(classes) != len(learned_at):
        raise ValueError(f"classes, learned_at: got {len(classes)} and {len(learned_at)} entries, expected as many.")
    names, units = zip(*_SUMMARY_COLUMNS.values(), strict=True)
    lines = [["method", "seeds", *classes, *names], ["", "", *["%"] * len(classes), *units]]
    for row in rows:
        means, spreads = row.summary(learned_at)
        final = [_cell(row, len(row.dice), c, learned_at) for c in range(len(classes))]
        summary = [
            hundredths(means[key], "+" if key == "backward_transfer" else "", spreads[key]) for key in _SUMMARY_COLUMNS
        ]
        lines.append([marked(row.method), seed_numbers(row.seeds), *final, *summary])
    return lines


def _beside_dice(rows: Sequence[Row]) -> list[str]:
    """The block of the rows that have more than Dice; no line if none has."""
    found = {row: row.final for row in rows if row.final is not None}
    if not found:
        return []
    tolerance_mm = next(iter(found.values())).nsd_tolerance_mm
    lines = [
        ["method", "NSD", "HD95", "missed", "invented", "both empty", "of", "gap to joint", "plasticity gap"],
        ["", "%", "mm", *["count"] * 4, *["points"] * 2],
    ]
    for row, final in found.items():
        hd95 = "n/a" if math.isnan(final.hd95_mm) else f"{final.hd95_mm:.1f}"
        counts = [str(n) for n in (final.missed, final.invented, final.both_empty, final.n_scores)]
        fewer = f" ({named_seeds(final.gap_seeds)})" if 0 < len(final.gap_seeds) < len(row.seeds) else ""
        gaps = [
            hundredths(gap, "+") + (fewer if not math.isnan(gap) else "")
            for gap in (final.gap_to_joint, final.plasticity_gap)
        ]
        lines.append([marked(row.method), hundredths(final.nsd), hd95, *counts, *gaps])
    return [
        f"After the last step, mean over classes (NSD at {tolerance_mm:g} mm; HD95 where it exists, the rest counted)",
        *aligned(lines, header=2),
        f"Forward transfer: n/a, as {metrics.NO_FORWARD_TRANSFER}.",
    ]


def _scores_by_step(row: Row, classes: Sequence[str], learned_at: Sequence[int]) -> list[list[str]]:
    lines = [["step", *classes, "mean"]]
    for t, scores in enumerate(row.dice, start=1):
        if not np.isnan(scores).all():
            cells = [_cell(row, t, c, learned_at) for c in range(len(classes))]
            lines.append([str(t), *cells, hundredths(metrics.mean(row.dice, learned_at, t))])
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
    ``n/a``; a step without any score is left out of the third part. Forgetting and the like are means over seeds of
    each seed's; a gap that only some seeds have says which.

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
