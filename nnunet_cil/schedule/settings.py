"""The settings of a schedule but for its method's: name, folds, training, plans, intensity, guard, launcher."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from nnunet_cil.given_model import check_plans
from nnunet_cil.schedule.content import MIN_STAGES, Guard, Intensity, Launcher, PlanOverride, Training
from nnunet_cil.schedule.reading import Reading, is_float, is_int
from nnunet_cil.untrusted import MAX_NAME_BYTES, read_json

CONFIGURATIONS = ("2d", "3d_lowres", "3d_fullres")
DEVICES = ("auto", "cuda", "cpu", "mps")
INTENSITY_MODES = ("step1", "whole_image")
INTENSITY_KEYS = ("mean", "std", "percentile_00_5", "percentile_99_5")
OPTIONAL_INTENSITY_KEYS = ("min", "max", "median")
AMP_CHOICES = ("auto", "off", "bfloat16", "float16")
ON_FORGETTING = ("warn", "stop")
SET_BY_KEYS = ("partition", "account", "gpus-per-node", "cpus-per-task", "mem", "time")
SET_BY_US = ("array", "dependency", "error", "kill-on-invalid-dep", "open-mode", "output", "requeue", "signal")
CHAIN_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_-]{{0,{MAX_NAME_BYTES // 2 - 1}}}")


def name_of(reading: Reading, value: Any) -> str:
    if not (isinstance(value, str) and CHAIN_NAME.fullmatch(value)):
        reading.problem(
            "name",
            repr(value),
            f"letters, digits, - and _, as it becomes part of folder names: at most {MAX_NAME_BYTES // 2}",
        )
        return ""
    return value


def dataset_id_of(reading: Reading, value: Any) -> int | None:
    if value is not None and not (is_int(value) and 1 <= value <= 990):
        reading.problem("dataset_id", repr(value), "a number from 1 to 990")
    return value


def folds_of(reading: Reading, value: Any) -> tuple[int | str, ...]:
    folds = value if isinstance(value, list) else [value]
    good = [fold == "all" or (is_int(fold) and fold >= 0) for fold in folds]
    if not folds or not all(good) or len({str(fold) for fold in folds}) != len(folds):
        reading.problem("fold", repr(value), "'all', a fold number or a list of different fold numbers")
    return tuple(folds)


def n_axes_of(reading: Reading) -> int:
    return 2 if reading.raw.get("configuration") == "2d" else 3


def numbers_of(reading: Reading, key: str, value: Any, kind: type) -> tuple | None:
    is_number = is_float if kind is float else is_int
    if value is None:
        return None
    if not (isinstance(value, list) and value and all(is_number(v) and v > 0 for v in value)):
        reading.problem(key, repr(value), "a list of positive numbers")
        return None
    return tuple(kind(v) for v in value)


def mirror_axes_of(reading: Reading, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not (isinstance(value, list) and all(is_int(v) and v >= 0 for v in value)):
        reading.problem("mirror_axes", repr(value), "a list of numbers from 0 on")
        return None
    axes = range(n_axes_of(reading))
    if len(set(value)) != len(value) or any(v not in axes for v in value):
        reading.problem("mirror_axes", repr(value), f"different axes out of {', '.join(map(str, axes))}")
    return tuple(value)


def training_of(reading: Reading, value: Any) -> Training:
    given = reading.mapping("training", value, [f.name for f in fields(Training)])
    if given.get("amp") is False:  # YAML reads off as false
        given["amp"] = "off"
    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "epochs": (lambda v: is_int(v) and v > 0, "a positive number"),
        "iterations_per_epoch": (lambda v: is_int(v) and v > 0, "a positive number"),
        "val_iterations_per_epoch": (lambda v: is_int(v) and v > 0, "a positive number"),
        "seed": (lambda v: v is None or (is_int(v) and v >= 0), "a number from 0 on, or null for none"),
        "initial_lr": (lambda v: is_float(v) and v > 0, "a positive number"),
        "later_lr": (lambda v: is_float(v) and v > 0, "a positive number"),
        "warmup_epochs": (lambda v: is_int(v) and v >= 0, "a number from 0 on"),
        "deep_supervision": (lambda v: isinstance(v, bool), "true or false"),
        "validation_cases": (lambda v: v is None or (is_int(v) and v >= 0), "a number from 0 on, or null"),
        "checkpoint_minutes": (lambda v: is_float(v) and v >= 0, "a number from 0 on"),
        "amp": (lambda v: isinstance(v, str) and v in AMP_CHOICES, f"one of {', '.join(AMP_CHOICES)}"),
    }
    for key in [key for key, v in given.items() if not checks[key][0](v)]:
        reading.problem(f"training: {key}", repr(given.pop(key)), checks[key][1])
    return Training(**given)


def tolerance_of(reading: Reading, value: Any) -> float:
    if not (is_float(value) and value > 0):
        reading.problem("nsd_tolerance_mm", repr(value), "a positive number of millimetres")
        return 2.0
    return float(value)


def guard_of(reading: Reading, value: Any) -> Guard:
    given = reading.mapping("guard", value, [f.name for f in fields(Guard)])
    if "on_forgetting" in given:
        reading.choice("guard: on_forgetting", given["on_forgetting"], ON_FORGETTING)
    for key, v in given.items():
        if key != "on_forgetting" and not (is_float(v) and 0 <= v <= 1):
            reading.problem(f"guard: {key}", repr(v), "a number from 0 to 1")
    return Guard(**given)


def launcher_of(reading: Reading, value: Any) -> Launcher:
    given = reading.mapping("launcher", value, [f.name for f in fields(Launcher)])
    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "jobs": (lambda v: is_int(v) and v > 0, "a positive number"),
        "jobs_per_gpu": (lambda v: is_int(v) and v > 0, "a positive number"),
        "partition": (lambda v: v is None or (isinstance(v, str) and v), "text"),
        "account": (lambda v: v is None or (isinstance(v, str) and v), "text"),
        "gpus": (
            lambda v: v is None or (is_int(v) and v >= 0) or (isinstance(v, str) and re.fullmatch(r"\S+:\d+", v)),
            "a number from 0 on, or kind and number such as a100:1",
        ),
        "cpus": (lambda v: is_int(v) and v > 0, "a positive number"),
        "memory_gb": (lambda v: is_float(v) and v > 0, "a positive number of gigabytes"),
        "hours": (lambda v: is_float(v) and v > 0, "a positive number of hours"),
        "setup": (lambda v: isinstance(v, list) and all(isinstance(line, str) for line in v), "lines of shell"),
        "sbatch": (lambda v: isinstance(v, dict), "a mapping of options of sbatch to their values"),
    }
    for key in [key for key, v in given.items() if not checks[key][0](v)]:
        reading.problem(f"launcher: {key}", repr(given.pop(key)), checks[key][1])
    for option, v in given.get("sbatch", {}).items():
        if not (isinstance(option, str) and re.fullmatch(r"[a-z][a-z-]*", option)):
            reading.problem(f"launcher: sbatch: {option}", repr(option), "a long option without its dashes")
        elif option in SET_BY_KEYS + SET_BY_US:
            reading.problem(f"launcher: sbatch: {option}", repr(v), "another option: nnunet-cil sets this one")
        elif not (isinstance(v, str) or is_int(v) or v is True):
            reading.problem(f"launcher: sbatch: {option}", repr(v), "text, a whole number or true")
    return Launcher(**given | {"setup": tuple(given.get("setup", ()))})


def intensity_of(reading: Reading, value: Any) -> Intensity:
    if isinstance(value, dict):
        reading.known_keys("intensity: ", value, ("given",))
        given = value.get("given")
        good = isinstance(given, dict) and given and all(isinstance(v, dict) for v in given.values())
        if not good:
            reading.problem(
                "intensity: given", repr(given), f"a mapping of channel numbers to {', '.join(INTENSITY_KEYS)}"
            )
            return Intensity()
        for channel, numbers in given.items():
            reading.known_keys(f"intensity: given: {channel}: ", numbers, INTENSITY_KEYS + OPTIONAL_INTENSITY_KEYS)
            for key in OPTIONAL_INTENSITY_KEYS:
                if not is_float(numbers.get(key, 0)):
                    reading.problem(f"intensity: given: {channel}: {key}", repr(numbers[key]), "a number")
            missing = [key for key in INTENSITY_KEYS if not is_float(numbers.get(key))]
            if missing:
                reading.problem(f"intensity: given: {channel}", f"no number for {missing}", ", ".join(INTENSITY_KEYS))
        return Intensity(
            "given", {str(c): {str(k): float(v) for k, v in n.items() if is_float(v)} for c, n in given.items()}
        )
    if value == "given":
        reading.problem("intensity", "'given' without numbers", "intensity: {given: {0: {mean: .., std: .., ..}}}")
        return Intensity()
    return Intensity(reading.choice("intensity", value, (*INTENSITY_MODES, "given")))


def plans_of(reading: Reading, value: Any) -> dict[str, Any]:
    override = [f.name for f in fields(PlanOverride)]
    given = reading.mapping("plans", value, (*override, "planner", "base"))
    result: dict[str, Any] = {}
    if "planner" in given:
        result["planner"] = reading.class_of_nnunet("plans: planner", given["planner"])
    if "base" in given:
        result["base_plans"] = base = reading.path("plans: base", given["base"])
        if base is not None:
            _check_base_plans(reading, base)
    patch = numbers_of(reading, "plans: patch_size", given.get("patch_size"), int)
    features = numbers_of(reading, "plans: features_per_stage", given.get("features_per_stage"), int)
    spacing = numbers_of(reading, "plans: spacing", given.get("spacing"), float)
    batch = given.get("batch_size")
    if batch is not None and not (is_int(batch) and batch > 0):
        reading.problem("plans: batch_size", repr(batch), "a positive number")
        batch = None
    n_axes = n_axes_of(reading)
    for key, numbers in (("patch_size", patch), ("spacing", spacing)):
        if numbers is not None and len(numbers) != n_axes:
            reading.problem(f"plans: {key}", f"{len(numbers)} numbers", f"{n_axes}, one for each axis")
    if features is not None and len(features) < MIN_STAGES:
        reading.problem(
            "plans: features_per_stage",
            f"{len(features)} stages",
            f"at least {MIN_STAGES}: deep supervision needs them",
        )
    return {**result, "plans": PlanOverride(patch, batch, features, spacing)}


def _check_base_plans(reading: Reading, path: Path) -> None:
    if not path.is_file():
        reading.problem("plans: base", f"no file {path}", "a plans.json of nnU-Net")
        return
    try:
        plans = read_json(path, "a plans.json of nnU-Net")
        missing = {"plans_name", "configurations", "image_reader_writer"} - set(plans)
        if not missing:
            check_plans(plans, str(path))
    except (OSError, ValueError) as error:
        reading.problem("plans: base", f"{path}: {error}", "a plans.json of nnU-Net")
        return
    if missing:
        reading.problem("plans: base", f"{path} without {sorted(missing)}", "a plans.json of nnU-Net")
