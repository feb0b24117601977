"""Label spaces: a dataset's own label values, and the cumulative ones of a chain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def cumulative_labels(steps_classes: Sequence[Sequence[str]], step: int) -> dict[str, int]:
    """Labels of a step's dataset: background 0, then the classes of steps 1..step in the order learned.

    Args:
        steps_classes: class names by step.
        step: 1-based.
    """
    names = [name for classes in steps_classes[:step] for name in classes]
    return {"background": 0, **{name: value for value, name in enumerate(names, 1)}}


def check_regions(labels: Mapping[str, Any], where: str) -> None:
    """Refuse region-based labels.

    Raises:
        ValueError: a label is a list of values.
    """
    regions = [name for name, value in labels.items() if isinstance(value, (list, tuple))]
    if regions:
        raise ValueError(
            f"{where}: labels: got regions {regions}, expected one integer a class. Region-based training is not "
            "supported yet: write the labels as classes that exclude each other."
        )


def remap_table(
    own_labels: Mapping[str, int], class_map: Mapping[str, str | None], target: Mapping[str, int]
) -> dict[int, int]:
    """Where each own label value goes: own value -> target value.

    Labels that ``class_map`` drops (None) or does not name become background. The own ignore label becomes the
    target's, if the target has one; several own labels may go to one class.
    """
    table = {}
    for name, value in own_labels.items():
        wanted = "ignore" if name == "ignore" else class_map.get(name)
        table[int(value)] = target.get(wanted, 0) if wanted is not None else 0
    return table


def apply_remap(seg: np.ndarray, table: Mapping[int, int]) -> np.ndarray:
    """Relabel an array of whole numbers; uint8, or uint16 where a target value is above 255.

    Raises:
        ValueError: the array holds values that the table does not know.
    """
    values, inverse = np.unique(seg, return_inverse=True)
    if unknown := [v for v in values.tolist() if v not in table]:
        raise ValueError(f"labels: got values {unknown}, expected only {sorted(table)} of dataset.json.")
    dtype = np.uint16 if max(table.values(), default=0) > 255 else np.uint8
    return np.array([table[int(v)] for v in values], dtype=dtype)[inverse].reshape(seg.shape)
