"""From a file to a checked schedule."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from nnunet_cil.schedule.content import KEYS, Intensity, Schedule, ScheduleError, Step
from nnunet_cil.schedule.held_out import test_sets_of
from nnunet_cil.schedule.method import METHOD_DEFAULTS, method_of, variants_of
from nnunet_cil.schedule.raw_datasets import dataset_of, unlabelled_of
from nnunet_cil.schedule.reading import Reading
from nnunet_cil.schedule.settings import (
    CONFIGURATIONS,
    DEVICES,
    dataset_id_of,
    folds_of,
    guard_of,
    intensity_of,
    launcher_of,
    mirror_axes_of,
    name_of,
    plans_of,
    tolerance_of,
    training_of,
)
from nnunet_cil.schedule.steps import check_folds_of, model_of, steps_of
from nnunet_cil.untrusted import check_extent, dataset_json_of

MAX_FILE_BYTES = 1_000_000
MAX_ENTRIES = 100_000


def load_schedule(path: Path | str) -> Schedule:
    """Read and check a schedule.

    Raises:
        FileNotFoundError: there is no such file.
        ScheduleError: listing every problem of the file and of the folders it names.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: got no file, expected a schedule in YAML.")
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"more than {MAX_FILE_BYTES} bytes")
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
        check_extent(raw, MAX_ENTRIES)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: also a date such as 2001-99-99
        raise ScheduleError(f"{path}: got no valid YAML: {error}") from error
    return _schedule(Reading(path, raw))


class _StrictLoader(yaml.SafeLoader):
    """A key that stands twice in a mapping is an error, not a silent choice of the last; 1e-3 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int, float, bool, type(None))):
                raise yaml.constructor.ConstructorError(
                    None, None, f"got the key {key!r}, expected text", node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"got the key {key!r} twice, expected it once", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _schedule(reading: Reading) -> Schedule:
    if not isinstance(reading.raw, dict):
        raise ScheduleError(
            f"{reading.file}: got {type(reading.raw).__name__}, expected a mapping with the keys {KEYS}."
        )
    raw = reading.raw
    reading.known_keys("", raw, KEYS)
    values: dict[str, Any] = {
        "name": name_of(reading, raw.get("name")),
        "source": dataset_of(reading, "source", raw["source"]) if raw.get("source") is not None else None,
        "images": reading.choice("images", raw.get("images", "shared"), ("shared", "disjoint")),
        "configuration": reading.choice("configuration", raw.get("configuration", "3d_fullres"), CONFIGURATIONS),
        "folds": folds_of(reading, raw.get("fold", "all")),
        "trainer": reading.class_of_nnunet("trainer", raw.get("trainer", "nnUNetTrainerPGCD")),
        "mirror_axes": mirror_axes_of(reading, raw.get("mirror_axes")),
        "device": reading.choice("device", raw.get("device", "auto"), DEVICES),
        "dataset_id": dataset_id_of(reading, raw.get("dataset_id")),
        "launcher": launcher_of(reading, raw.get("launcher")),
        "training": training_of(reading, raw.get("training")),
        "method": method_of(reading, "method", raw.get("method"), METHOD_DEFAULTS),
        "nsd_tolerance_mm": tolerance_of(reading, raw.get("nsd_tolerance_mm", 2.0)),
        "guard": guard_of(reading, raw.get("guard")),
        "intensity": intensity_of(reading, raw.get("intensity", "step1")),
        **plans_of(reading, raw.get("plans")),
    }
    values["model"] = model = model_of(reading, raw.get("model"), raw.get("model_fold"))
    if model is not None:
        values["configuration"] = model.configuration
        check_folds_of(reading, model, values["folds"])
    values["variants"] = variants_of(reading, raw.get("variants"), values["method"])
    values["unlabelled"] = unlabelled_of(reading, "unlabelled", raw.get("unlabelled"), values["source"])
    if raw.get("unlabelled") is not None and raw.get("source") is None:
        reading.problem("unlabelled", "the key without a source", "a source, or the key in each step that needs it")
    own = steps_of(reading, raw.get("steps"), values["source"], () if model is None else model.classes)
    values["steps"] = own if model is None else (Step(model.classes), *own)
    _check_components(reading, values)
    _check_channels(reading, values["intensity"], values["source"], values["steps"])
    if values["device"] in ("cpu", "mps") and values["training"].amp == "float16":
        reading.problem("training: amp", f"float16 with device: {values['device']}", "auto, bfloat16 or off")
    declared = _declared([(step.dataset, step.unlabelled) for step in own] + [(values["source"], values["unlabelled"])])
    values["steps"] = tuple(
        replace(step, unlabelled=declared[step.dataset.resolve()]) if step.dataset else step for step in values["steps"]
    )
    values["test"], values["train_subjects"] = test_sets_of(
        reading, raw.get("test"), values["source"], values["steps"], declared
    )
    if reading.problems:
        raise ScheduleError("\n".join(reading.problems))
    return Schedule(file=reading.file, raw=raw, **values)


def _declared(unlabelled: Sequence[tuple[Path | None, Mapping[str, tuple[str, ...]]]]) -> dict[Path, Any]:
    """Dataset, by its real path -> labels that its cases lack, which steps of the same dataset declare together."""
    found: dict[Path, dict[str, tuple[str, ...]]] = {}
    for folder, cases in unlabelled:
        if folder is not None:
            known = found.setdefault(folder.resolve(), {})
            for case, names in cases.items():
                known[case] = tuple(dict.fromkeys((*known.get(case, ()), *names)))
    return found


def _check_components(reading: Reading, values: Mapping[str, Any]) -> None:
    known = [name for step in values["steps"] for name in step.classes]
    for where, settings in {"method": values["method"], **values["variants"]}.items():
        named = settings.get("one_piece")
        if isinstance(named, list) and (unknown := [name for name in named if name not in known]):
            where = where if where == "method" else f"variants: {where}"
            reading.problem(f"{where}: one_piece", unknown, f"classes of the steps: {known}")


def _check_channels(reading: Reading, intensity: Intensity, source: Path | None, steps: tuple[Step, ...]) -> None:
    folder = source or (steps[-1].dataset if steps else None)
    if folder is None or not intensity.given:
        return
    names = dataset_json_of(folder)["channel_names"]
    if unknown := sorted(set(intensity.given) - {str(channel) for channel in names}):
        reading.problem("intensity: given", f"channels {unknown}", f"channel numbers of {folder.name}: {dict(names)}")
