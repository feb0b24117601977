"""Label spaces: a dataset's own label values, and the cumulative ones of a chain."""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_cil.untrusted import read_json

RESERVED = ("background", "ignore")
"""Labels of nnU-Net's own, which are no classes."""


def cumulative_labels(steps_classes: Sequence[Sequence[str]], step: int) -> dict[str, int]:
    """Labels of a step's dataset: background 0, then the classes of steps 1..step in the order learned.

    Args:
        steps_classes: class names by step.
        step: 1-based.
    """
    names = [name for classes in steps_classes[:step] for name in classes]
    return {"background": 0, **{name: value for value, name in enumerate(names, 1)}}


def classes_of(labels: Mapping[str, Any]) -> tuple[str, ...]:
    """Foreground classes of a dataset.json, in the order of their values and so of a network's outputs."""
    return tuple(sorted((name for name in labels if name not in RESERVED), key=lambda name: int(labels[name])))


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


def without_classes(table: Mapping[int, int], own_values: Collection[int]) -> dict[int, int]:
    """The table of a case that lacks these own labels: the classes that they lead to become background.

    Where several own labels lead to one class, the class is gone as soon as one of them is.
    """
    gone = {table[value] for value in own_values}
    return {own: 0 if value in gone else value for own, value in table.items()}


def read_unlabelled(path: Path) -> dict[str, tuple[str, ...]]:
    """Labels that cases lack, by case, each once.

    Args:
        path: JSON ``{case: [label, ...]}`` where its name ends so, else CSV with the columns ``case`` and ``class``, a
            line for each label that a case lacks.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is neither.
    """
    if path.suffix == ".json":
        content = read_json(path, "an object of lists")
        if not all(isinstance(names, list) for names in content.values()):
            raise ValueError("got no object of lists")
        pairs = [(case, str(name)) for case, names in content.items() for name in names]
    else:
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                rows = csv.DictReader(file)
                columns = rows.fieldnames
                pairs = [tuple((row.get(key) or "").strip() for key in ("case", "class")) for row in rows]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"got no CSV in UTF-8 ({error})") from error
        if not {"case", "class"} <= set(columns or ()):
            raise ValueError(f"got the columns {columns}")
    found: dict[str, dict[str, None]] = {}
    for case, name in pairs:
        found.setdefault(case, {})[name] = None
    return {case: tuple(names) for case, names in found.items()}


def apply_remap(seg: np.ndarray, table: Mapping[int, int]) -> np.ndarray:
    """Relabel an array of whole numbers; uint8, or uint16 where a target value is above 255.

    Raises:
        ValueError: the array holds values that the table does not know.
    """
    below, above = min(table, default=0) - 1, max(table, default=0) + 1
    lookup = np.full(above - below + 1, -1, np.int32)
    for own, value in table.items():
        lookup[own - below] = value
    with np.errstate(invalid="ignore"):  # what is not finite becomes some number, and so differs from it
        whole = seg.astype(np.int32)
    mapped = lookup[whole.clip(below, above) - below]
    unknown = (mapped < 0) | (whole != seg)
    if unknown.any():
        raise ValueError(
            f"labels: got values {np.unique(seg[unknown]).tolist()}, expected only {sorted(table)} of dataset.json."
        )
    return mapped.astype(np.uint16 if max(table.values(), default=0) > 255 else np.uint8)
