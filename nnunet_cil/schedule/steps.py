"""What each step learns, on which data, and the model that the first one may be."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunet_cil.given_model import GivenModel, read_model
from nnunet_cil.labels import RESERVED
from nnunet_cil.schedule.content import Step, kept_source
from nnunet_cil.schedule.raw_datasets import check_own_names, class_map_of, class_names_of, dataset_of, unlabelled_of
from nnunet_cil.schedule.reading import Reading
from nnunet_cil.schedule.settings import CHAIN_NAME


def model_of(reading: Reading, value: Any, fold: Any) -> GivenModel | None:
    """The given model; of its folds only ``fold``, where one is named. If it is gone, the copy that the chain has."""
    if value is None:
        if fold is not None:
            reading.problem("model_fold", "the key without a model", "`model`, of which it names a fold")
        return None
    path = reading.path("model", value)
    for key in ("plans", "intensity", "source", "configuration"):
        if reading.raw.get(key) is not None:
            reading.problem(
                key, "the key beside a model", "no such key: it is the model's, or each step has its dataset"
            )
    kept = None if path is None or path.exists() else _kept_model(reading)
    try:
        if kept is not None:
            return read_model(kept)
        model = None if path is None else read_model(path)
    except (ValueError, OSError) as error:
        reading.failed("model", error)
        return None
    if model is None or fold is None:
        return model
    if isinstance(fold, bool) or fold not in model.folds:
        reading.problem("model_fold", repr(fold), f"one of the folds that the model has: {list(model.folds)}")
        return None
    return replace(model, folds=(fold,))


def check_folds_of(reading: Reading, model: GivenModel, folds: Sequence[int | str]) -> None:
    try:
        for fold in folds:
            model.fold_for(fold)
    except ValueError as error:
        reading.failed("fold", error)


def steps_of(reading: Reading, value: Any, source: Path | None, given: Sequence[str] = ()) -> tuple[Step, ...]:
    if not isinstance(value, list) or not value:
        reading.problem("steps", repr(value), "a list with the classes of each step")
        return ()
    steps, seen = [], dict.fromkeys(given, "the model")
    for index, entry in enumerate(value):
        key = f"steps[{index}]"
        number = index + (2 if given else 1)
        step = (
            _own_step(reading, key, entry, number)
            if isinstance(entry, dict)
            else _cut_step(reading, key, entry, source)
        )
        if step is None:
            continue
        new = tuple(name for name in step.classes if name not in seen)
        relabels = isinstance(entry, dict) and len(new) > 0  # its data label old classes as well
        for name in step.classes:
            if name in RESERVED:
                reading.problem(key, repr(name), "a class; that name is nnU-Net's own")
            if name in seen and not relabels:
                expected = "at least one new class" if isinstance(entry, dict) else "each class in one step, once"
                reading.problem(key, f"class {name!r} that {seen[name]} has already", expected)
            seen.setdefault(name, key)
        steps.append(replace(step, classes=new) if relabels else step)
    for step, key in [(step, seen[step.classes[0]]) for step in steps if step.joint_map and step.classes]:
        found = {name for name in (step.joint_map or {}).values() if name is not None}
        if found != set(seen):
            reading.problem(f"{key}: joint", sorted(found), f"all classes of the steps: {list(seen)}")
    kinds = {isinstance(entry, dict) for entry in value}
    if len(kinds) > 1:
        reading.problem("steps", "steps with and without a dataset of their own", "all of one kind")
    if kinds == {True} and source is not None:
        reading.problem("source", "a source beside steps with datasets of their own", "one of the two")
    if kinds == {True} and reading.raw.get("images") is not None:
        reading.problem(
            "images", "images beside steps with datasets of their own", "no such key: each step has its images"
        )
    return tuple(steps)


def _cut_step(reading: Reading, key: str, entry: Any, source: Path | None) -> Step | None:
    names = class_names_of(reading, key, entry)
    if reading.raw.get("source") is None:
        reading.problem(key, "classes without a dataset", "`source`, or {dataset: ..., classes: ...}")
        return None
    if names is None:
        return None
    if source is not None:
        check_own_names(reading, key, names, source)
    return Step(tuple(names))


def _own_step(reading: Reading, key: str, entry: Mapping, number: int) -> Step | None:
    reading.known_keys(f"{key}: ", entry, ("dataset", "classes", "joint", "unlabelled"))
    n_problems, kept = len(reading.problems), _kept_source(reading, number)
    folder = dataset_of(reading, f"{key}: dataset", entry.get("dataset"))
    if is_gone := folder is None and kept is not None:
        folder = kept
        del reading.problems[n_problems:]
    joint = class_map_of(reading, f"{key}: joint", entry["joint"], folder) if "joint" in entry else None
    class_map = class_map_of(reading, f"{key}: classes", entry.get("classes"), folder)
    if folder is None or class_map is None:
        return None
    classes = tuple(dict.fromkeys(name for name in class_map.values() if name is not None))
    if not classes:
        reading.problem(f"{key}: classes", "no class", "at least one that is learned")
    unlabelled = unlabelled_of(reading, f"{key}: unlabelled", entry.get("unlabelled"), None if is_gone else folder)
    return Step(classes, folder, class_map, joint, unlabelled)


def _kept_source(reading: Reading, number: int) -> Path | None:
    """What the chain kept of a step's dataset, whose scans may be gone once they are trained on."""
    chain = _chain_folder(reading)
    folder = None if chain is None else kept_source(chain, number)
    return folder if folder is not None and (folder / "dataset.json").is_file() else None


def _kept_model(reading: Reading) -> Path | None:
    """The copy of the given model that the chain teaches with, its folds those of the chain."""
    chain = _chain_folder(reading)
    if chain is None or not chain.is_dir():
        return None
    dataset = f"Dataset[0-9][0-9][0-9]_{reading.raw['name'].replace('-', '_')}_step1"
    found = [path.parent for path in chain.parent.glob(f"{dataset}/*__*__*/plans.json")]
    return found[0] if len(found) == 1 else None


def _chain_folder(reading: Reading) -> Path | None:
    results = os.environ.get("nnUNet_results")  # noqa: SIM112  (nnU-Net's spelling)
    name = reading.raw.get("name")
    if not results or not isinstance(name, str) or not CHAIN_NAME.fullmatch(name):
        return None
    return Path(results).absolute() / f"chain_{name}"
