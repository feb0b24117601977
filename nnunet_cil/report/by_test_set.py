"""Mean Dice after the last step on each test set, where a chain has several."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunet_cil.evaluate import ENSEMBLE
from nnunet_cil.report.table import Row, aligned, hundredths, marked
from nnunet_cil.report.words import counted

_KNOWN = {True: "never trained on", False: "trained on other subjects of it", None: "unknown whether trained on"}


@dataclass(frozen=True, eq=False)
class TestSetScores:
    """One of several test sets.

    Attributes:
        name: of its dataset, or its number.
        n_subjects: its size.
        n_classes: of how many classes it has scores.
        never_trained_on: whether no step draws from its dataset; None where that is not known.
        dice: method -> mean Dice over all classes after the last step, in [0, 1], the mean over its seeds, each the
            mean of its folds.
    """

    __test__ = False  # no case of pytest

    name: str
    n_subjects: int
    n_classes: int
    never_trained_on: bool | None
    dice: Mapping[str, float]

    def about(self, n_classes: int) -> tuple[str, str, str]:
        """As ``3 subjects``, ``1 of 2 organs``, ``never trained on``, for a chain of so many classes."""
        organs = counted(n_classes, "organ")
        if self.n_classes < n_classes:
            organs = f"{self.n_classes} of {organs}"
        return counted(self.n_subjects, "subject"), organs, _KNOWN[self.never_trained_on]


def by_test_set(runs: Sequence[Mapping[str, Any]]) -> tuple[TestSetScores, ...]:
    """The test sets of the runs of ``evaluate.collect_scores``, if they have several; the ensemble has no score."""
    sets: dict[int, Mapping[str, Any]] = {}
    dice: dict[int, dict[str, dict[int | None, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    n_classes: dict[int, int] = defaultdict(int)
    for run in (run for run in runs if run["fold"] != ENSEMBLE):
        for one in run["by_test_set"]:
            sets[one["set"]] = one
            n_classes[one["set"]] = max(one["n_classes"], n_classes[one["set"]])
            if one["mean"]["dice"] is not None:
                dice[one["set"]][run["method"]][run["seed"]].append(one["mean"]["dice"])
    return tuple(
        TestSetScores(
            one["name"],
            one["n_subjects"],
            n_classes[number],
            one["never_trained_on"],
            {
                method: float(np.mean([np.mean(folds) for folds in seeds.values()]))
                for method, seeds in dice[number].items()
            },
        )
        for number, one in sorted(sets.items())
    )


def table_by_test_set(rows: Sequence[Row], sets: Sequence[TestSetScores], n_classes: int) -> str:
    """Plain-text table of these methods, in %; empty without test sets.

    Args:
        rows: one per method, in the order to show.
        sets: from `by_test_set`.
        n_classes: of the chain.
    """
    if not sets:
        return ""
    lines = [["method", *(one.name for one in sets)]]
    lines += [["", *texts] for texts in zip(*(one.about(n_classes) for one in sets), strict=True)]
    lines.append(["", *["%"] * len(sets)])
    for row in rows:
        lines.append([marked(row.method), *(hundredths(one.dice.get(row.method, math.nan)) for one in sets)])
    return "\n".join(["Mean Dice after the last step, by test set", *aligned(lines, header=5)]) + "\n"
