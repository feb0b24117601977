"""The schedule: a YAML file that says what is learned when, on what, and how.

``load_schedule`` checks the whole file and the folders it names and reports every problem at once.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from nnunet_cil.given_model import GivenModel, check_plans, read_model
from nnunet_cil.labels import RESERVED, check_regions, read_unlabelled
from nnunet_cil.untrusted import (
    EXPECTED_ENDING,
    EXPECTED_NAME,
    MAX_NAME_BYTES,
    check_extent,
    dataset_json_of,
    is_ending,
    is_name,
    read_json,
)

METHOD_DEFAULTS: Mapping[str, Any] = {
    "lambda_pgcd": 1.0,
    "lambda_dapd": 0.01,
    "eta": 0.01,
    "w_max": 3.0,
    "mu": 0.99,
    "n_min": 10,
    "tau_old": 0.5,
    "tau_background": 0.7,
    "pseudo_labels": "offline",
    "pseudo_label_mirroring": False,
    "one_piece": "auto",
    "old_prototypes": "reextract",
    "background_features": "teacher",
    "class_balance": False,
    "class_balance_max": 5.0,
    "scale_by_classes": False,
    "new_rows": "prototypes",
    "pgcd_spatial": True,
    "calibration": "prototypes",
    "voxel_stride": 4,
    "dapd_global": True,
    "dapd_local": True,
    "fusion": None,
    "lambda_kd": 1.0,
    "lambda_lwf": 1.0,
    "lwf_temperature": 2.0,
    "lambda_ilt": 1.0,
    "lambda_pod": 0.01,
    "lambda_pod_logits": 0.0005,
    "lambda_ewc": 100.0,
    "ewc_patches": 50,
    "replay_cases": 4,
}
STORED_METHOD_DEFAULTS: Mapping[str, Any] = {**METHOD_DEFAULTS, "voxel_stride": 1, "one_piece": False}
"""What a key meant that a stored chain or model lacks: a version without it trained so."""
METHOD_CHOICES = {
    "pseudo_labels": ("offline", "online", "off"),
    "old_prototypes": ("reextract", "transport"),
    "background_features": ("teacher", "student"),
    "calibration": ("prototypes", "uniform"),
    "new_rows": ("background", "prototypes"),
}
ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "no_spatial": {"pgcd_spatial": False},
    "no_channel": {"eta": 0.0},
    "no_pgcd": {"lambda_pgcd": 0.0},
    "no_dapd_global": {"dapd_global": False},
    "no_dapd_local": {"dapd_local": False},
    "no_dapd": {"lambda_dapd": 0.0},
    "static_background": {"mu": 1.0},
    "uniform_weights": {"calibration": "uniform"},
    "no_pseudo_labels": {"pseudo_labels": "off", "class_balance": False},
    "background_rows": {"new_rows": "background"},
    "rows_only": {"lambda_pgcd": 0.0, "lambda_dapd": 0.0},
}
CONFIGURATIONS = ("2d", "3d_lowres", "3d_fullres")
INTENSITY_MODES = ("step1", "whole_image")
INTENSITY_KEYS = ("mean", "std", "percentile_00_5", "percentile_99_5")
OPTIONAL_INTENSITY_KEYS = ("min", "max", "median")
AMP_CHOICES = ("auto", "off", "bfloat16", "float16")
DEVICES = ("auto", "cuda", "cpu", "mps")
ON_FORGETTING = ("warn", "stop")
SET_BY_KEYS = ("partition", "account", "gpus-per-node", "cpus-per-task", "mem", "time")
SET_BY_US = ("array", "dependency", "error", "kill-on-invalid-dep", "open-mode", "output", "requeue", "signal")
UNLABELLED_FILES = ("unlabelled.csv", "unlabelled.json")
UNLABELLED = "a CSV with the columns case and class, or a JSON object of cases with lists of labels"
MIN_STAGES = 3
MAX_FILE_BYTES = 1_000_000
MAX_ENTRIES = 100_000
MAX_SHOWN = 100
"""Characters of a value in a message."""
MAX_SHOWN_DATASETS = 5
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_-]{{0,{MAX_NAME_BYTES // 2 - 1}}}")


def in_effect(method: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of PGCD without those that change nothing, as the term that they belong to is off."""
    no_pgcd, no_dapd = (not method[key] for key in ("lambda_pgcd", "lambda_dapd"))
    unused = {
        *(("pgcd_spatial", "eta", "calibration") if no_pgcd else ()),
        *(("dapd_global", "dapd_local") if no_dapd else ()),
        *(("mu",) if no_pgcd and no_dapd else ()),
    }
    return {key: value for key, value in method.items() if key not in unused}


def kept_source(chain_folder: Path, step: int) -> Path:
    """Raw dataset without files that a chain keeps of a step's own dataset, see ``dataset.keep_source``."""
    return chain_folder / "sources" / f"step{step}"


class ScheduleError(ValueError):
    """All problems of a schedule, one a line: file, key, got, expected."""


@dataclass(frozen=True)
class Step:
    """Classes of one step; ``dataset`` and ``class_map`` (own label -> class, None: dropped) if it has its own data.

    ``class_map`` may lead to classes of earlier steps too, whose labels are then used. ``joint_map``: likewise for the
    joint model, if the dataset labels the classes of all steps. ``unlabelled``: own labels that a case lacks, by case.
    """

    classes: tuple[str, ...]
    dataset: Path | None = None
    class_map: Mapping[str, str | None] | None = None
    joint_map: Mapping[str, str | None] | None = None
    unlabelled: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def old_classes(self) -> tuple[str, ...]:
        """Classes of earlier steps that this step's data label as well."""
        found = dict.fromkeys(name for name in (self.class_map or {}).values() if name is not None)
        return tuple(name for name in found if name not in self.classes)


@dataclass(frozen=True)
class TestSet:
    """Test images and labels: own label names -> classes, own label names -> values, which subjects (None: all).

    ``unlabelled``: own labels that a subject lacks, by subject.
    """

    __test__ = False

    images: Path
    labels: Path
    class_map: Mapping[str, str | None]
    values: Mapping[str, int]
    dataset: Path | None = None
    subjects: tuple[str, ...] | None = None
    unlabelled: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class PlanOverride:
    """What differs from nnU-Net's plan; axes in the order of the plans, spacing in mm."""

    patch_size: tuple[int, ...] | None = None
    batch_size: int | None = None
    features_per_stage: tuple[int, ...] | None = None
    spacing: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Training:
    """How long and how fast each step learns. nnU-Net's own values are the defaults.

    ``later_lr`` and ``warmup_epochs`` hold for steps after the first. ``validation_cases`` limits nnU-Net's validation
    pass after training; None means all cases of a numbered fold and none of fold ``all``. ``amp``: see ``precision``.
    """

    epochs: int = 1000
    iterations_per_epoch: int = 250
    val_iterations_per_epoch: int = 50
    seed: int | None = 0
    initial_lr: float = 0.01
    later_lr: float = 0.01
    warmup_epochs: int = 0
    deep_supervision: bool = True
    validation_cases: int | None = None
    checkpoint_minutes: float = 2.0
    amp: str = "auto"


@dataclass(frozen=True)
class Intensity:
    """From where nnU-Net takes the CT window: ``step1``, ``whole_image``, or ``given`` numbers by channel."""

    mode: str = "step1"
    given: Mapping[str, Mapping[str, float]] | None = None


@dataclass(frozen=True)
class Guard:
    """When an organ of an earlier step counts as weakened or lost, and whether a chain stops where one is lost.

    ``weakened``: drop of Dice; ``lost``: share of the Dice before; ``agreement``: Dice between the masks of two models,
    where no labels say how good either is. All in [0, 1].
    """

    on_forgetting: str = "warn"
    weakened: float = 0.03
    lost: float = 0.5
    agreement: float = 0.8


@dataclass(frozen=True)
class Launcher:
    """What a training takes that is a job: ``jobs`` at once on this machine, at most ``jobs_per_gpu`` of them on one
    GPU; all else on a Slurm cluster.

    ``gpus``: a number, or kind and number as ``a100:1``; None means 1, and 0 where ``device`` is no GPU of Slurm's.
    ``setup``: lines of shell before it. ``sbatch``: further options, without their dashes.
    """

    jobs: int = 1
    jobs_per_gpu: int = 1
    partition: str | None = None
    account: str | None = None
    gpus: int | str | None = None
    cpus: int = 8
    memory_gb: float = 32.0
    hours: float = 24.0
    setup: tuple[str, ...] = ()
    sbatch: Mapping[str, str | int | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Schedule:
    """A checked schedule; see docs/schedule.md for what each key means."""

    name: str
    file: Path
    steps: tuple[Step, ...]
    source: Path | None = None
    images: str = "shared"
    unlabelled: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    train_subjects: tuple[str, ...] | None = None
    test: tuple[TestSet, ...] = ()
    configuration: str = "3d_fullres"
    folds: tuple[int | str, ...] = ("all",)
    trainer: str = "nnUNetTrainerPGCD"
    planner: str = "ExperimentPlanner"
    base_plans: Path | None = None
    plans: PlanOverride = field(default_factory=PlanOverride)
    intensity: Intensity = field(default_factory=Intensity)
    mirror_axes: tuple[int, ...] | None = None
    training: Training = field(default_factory=Training)
    method: Mapping[str, Any] = field(default_factory=lambda: dict(METHOD_DEFAULTS))
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    nsd_tolerance_mm: float = 2.0
    guard: Guard = field(default_factory=Guard)
    model: GivenModel | None = None
    dataset_id: int | None = None
    device: str = "auto"
    launcher: Launcher = field(default_factory=Launcher)
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def own_steps(self) -> range:
        """Numbers of the steps that the chain trains: all, or all but the first if that is a given model."""
        return range(1 if self.model is None else 2, len(self.steps) + 1)

    @property
    def has_joint(self) -> bool:
        """Whether there are data that label all classes, on which a joint model can be trained."""
        return self.source is not None or all(self.steps[t - 1].joint_map for t in self.own_steps)

    @property
    def classes(self) -> tuple[str, ...]:
        """All classes in the order learned."""
        return self.classes_until(len(self.steps))

    def classes_until(self, step: int) -> tuple[str, ...]:
        """Classes of steps 1..step."""
        return tuple(name for s in self.steps[:step] for name in s.classes)

    def to_dict(self) -> dict[str, Any]:
        """The settings in force, JSON-able; data sources and test set as the user wrote them, so without our paths.

        Of what is unlabelled there is a digest, as it may be long. The launcher has no part in what is trained.
        """
        return {
            "name": self.name,
            "source": self.raw.get("source"),
            "steps": [
                {"classes": list(s.classes), "dataset": _written(raw), "class_map": s.class_map and dict(s.class_map)}
                | ({"joint": dict(s.joint_map)} if s.joint_map else {})
                | _digest_of(s.unlabelled)
                for s, raw in zip([self.steps[t - 1] for t in self.own_steps], self.raw["steps"], strict=True)
            ],
            **({"model": self.raw["model"]} if self.model else {}),
            "images": self.images,
            **_digest_of(self.unlabelled),
            "test": self.raw.get("test"),
            "configuration": self.configuration,
            "folds": list(self.folds),
            "trainer": self.trainer,
            "planner": self.planner,
            "base_plans": (self.raw.get("plans") or {}).get("base"),
            "plans": asdict(self.plans),
            "intensity": {"mode": self.intensity.mode, "given": self.intensity.given},
            "mirror_axes": self.mirror_axes,
            "training": asdict(self.training),
            "method": dict(self.method),
            "variants": {name: dict(settings) for name, settings in self.variants.items()},
            "nsd_tolerance_mm": self.nsd_tolerance_mm,
            "guard": asdict(self.guard),
            "device": self.device,
        }


KEYS = (
    "name",
    "model",
    "source",
    "images",
    "unlabelled",
    "test",
    "configuration",
    "fold",
    "trainer",
    "plans",
    "intensity",
    "mirror_axes",
    "training",
    "method",
    "variants",
    "nsd_tolerance_mm",
    "guard",
    "dataset_id",
    "device",
    "launcher",
    "steps",
)


def _written(raw_step: Any) -> str | None:
    return str(raw_step["dataset"]) if isinstance(raw_step, Mapping) else None


def _digest_of(unlabelled: Mapping[str, Sequence[str]]) -> dict[str, str]:
    if not unlabelled:
        return {}
    content = json.dumps({case: sorted(names) for case, names in unlabelled.items()}, sort_keys=True)
    return {"unlabelled": f"{len(unlabelled)} cases, sha256 {hashlib.sha256(content.encode()).hexdigest()[:16]}"}


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
    return _Reader(path, raw).schedule()


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


class _Reader:
    """Turns raw YAML into a Schedule and collects what is wrong on the way."""

    def __init__(self, path: Path, raw: Any) -> None:
        self.path, self.raw, self.problems = path, raw, []
        self.declared: dict[Path | None, Mapping[str, tuple[str, ...]]] = {}

    def problem(self, key: str, got: Any, expected: str) -> None:
        self.problems.append(f"{self.path}: {key}: got {got}, expected {expected}.")

    def schedule(self) -> Schedule:
        if not isinstance(self.raw, dict):
            raise ScheduleError(f"{self.path}: got {type(self.raw).__name__}, expected a mapping with the keys {KEYS}.")
        raw = self.raw
        self._known_keys("", raw, KEYS)
        values: dict[str, Any] = {
            "name": self._name(raw.get("name")),
            "source": self._dataset("source", raw["source"]) if raw.get("source") is not None else None,
            "images": self._choice("images", raw.get("images", "shared"), ("shared", "disjoint")),
            "configuration": self._choice("configuration", raw.get("configuration", "3d_fullres"), CONFIGURATIONS),
            "folds": self._folds(raw.get("fold", "all")),
            "trainer": self._class_of_nnunet("trainer", raw.get("trainer", "nnUNetTrainerPGCD")),
            "mirror_axes": self._numbers("mirror_axes", raw.get("mirror_axes"), int, empty=True),
            "device": self._choice("device", raw.get("device", "auto"), DEVICES),
            "dataset_id": self._dataset_id(raw.get("dataset_id")),
            "launcher": self._launcher(raw.get("launcher")),
            "training": self._training(raw.get("training")),
            "method": self._method("method", raw.get("method"), METHOD_DEFAULTS),
            "nsd_tolerance_mm": self._tolerance(raw.get("nsd_tolerance_mm", 2.0)),
            "guard": self._guard(raw.get("guard")),
            "intensity": self._intensity(raw.get("intensity", "step1")),
            **self._plans(raw.get("plans")),
        }
        values["model"] = model = self._model(raw.get("model"))
        if model is not None:
            values["configuration"] = model.configuration
            self._check_folds_of(model, values["folds"])
        values["variants"] = self._variants(raw.get("variants"), values["method"])
        values["unlabelled"] = self._unlabelled("unlabelled", raw.get("unlabelled"), values["source"])
        if raw.get("unlabelled") is not None and raw.get("source") is None:
            self.problem("unlabelled", "the key without a source", "a source, or the key in each step that needs it")
        own = self._steps(raw.get("steps"), values["source"], () if model is None else model.classes)
        values["steps"] = own if model is None else (Step(model.classes), *own)
        self._check_components(values)
        self._check_channels(values["intensity"], values["source"], values["steps"])
        if values["device"] in ("cpu", "mps") and values["training"].amp == "float16":
            self.problem("training: amp", f"float16 with device: {values['device']}", "auto, bfloat16 or off")
        self.declared = {step.dataset: step.unlabelled for step in own} | {values["source"]: values["unlabelled"]}
        values["test"], values["train_subjects"] = self._test(raw.get("test"), values["source"], values["steps"])
        if self.problems:
            raise ScheduleError("\n".join(self.problems))
        return Schedule(file=self.path, raw=raw, **values)

    def _check_components(self, values: Mapping[str, Any]) -> None:
        known = [name for step in values["steps"] for name in step.classes]
        for where, settings in {"method": values["method"], **values["variants"]}.items():
            named = settings.get("one_piece")
            if isinstance(named, list) and (unknown := [name for name in named if name not in known]):
                where = where if where == "method" else f"variants: {where}"
                self.problem(f"{where}: one_piece", unknown, f"classes of the steps: {known}")

    def _check_channels(self, intensity: Intensity, source: Path | None, steps: tuple[Step, ...]) -> None:
        folder = source or (steps[-1].dataset if steps else None)
        if folder is None or not intensity.given:
            return
        names = dataset_json_of(folder)["channel_names"]
        if unknown := sorted(set(intensity.given) - {str(channel) for channel in names}):
            self.problem("intensity: given", f"channels {unknown}", f"channel numbers of {folder.name}: {dict(names)}")

    def _known_keys(self, where: str, mapping: Mapping, known: Sequence[str]) -> None:
        for key in mapping:
            if key not in known:
                near = difflib.get_close_matches(str(key)[:100], known, 1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                self.problem(f"{where}{key}", f"an unknown key{hint}", f"one of {', '.join(known)}")

    def _name(self, value: Any) -> str:
        if not (isinstance(value, str) and _NAME.fullmatch(value)):
            self.problem(
                "name",
                repr(value),
                f"letters, digits, - and _, as it becomes part of folder names: at most {MAX_NAME_BYTES // 2}",
            )
            return ""
        return value

    def _class_of_nnunet(self, key: str, value: Any) -> str:
        if not isinstance(value, str) or not value.isidentifier() or not is_name(value):
            self.problem(key, repr(value), "text: the name of a class")
            return ""
        if value == "nnUNetTrainerJoint":
            self.problem(key, value, "the trainer of a method that goes step by step: the method `joint` needs no key")
        return value

    def _choice(self, key: str, value: Any, choices: Sequence[str]) -> str:
        if value not in choices or not isinstance(value, str):
            self.problem(key, repr(value), f"one of {', '.join(choices)}")
        return str(value)

    def _dataset_id(self, value: Any) -> int | None:
        if value is not None and not (_is_int(value) and 1 <= value <= 990):
            self.problem("dataset_id", repr(value), "a number from 1 to 990")
        return value

    def _folds(self, value: Any) -> tuple[int | str, ...]:
        folds = value if isinstance(value, list) else [value]
        good = [fold == "all" or (_is_int(fold) and fold >= 0) for fold in folds]
        if not folds or not all(good) or len({str(fold) for fold in folds}) != len(folds):
            self.problem("fold", repr(value), "'all', a fold number or a list of different fold numbers")
        return tuple(folds)

    def _numbers(self, key: str, value: Any, kind: type, empty: bool = False) -> tuple | None:
        if value is None:
            return None
        is_number = _is_float if kind is float else _is_int
        good = isinstance(value, list) and (empty or value) and all(is_number(v) for v in value)
        if not good or not all(v >= 0 if empty else v > 0 for v in value):
            self.problem(key, repr(value), f"a list of {'numbers from 0 on' if empty else 'positive numbers'}")
            return None
        axes = range(self._n_axes())
        if key == "mirror_axes" and (len(set(value)) != len(value) or any(v not in axes for v in value)):
            self.problem(key, repr(value), f"different axes out of {', '.join(map(str, axes))}")
        return tuple(kind(v) for v in value)

    def _n_axes(self) -> int:
        return 2 if self.raw.get("configuration") == "2d" else 3

    def _mapping(self, key: str, value: Any, known: Sequence[str]) -> dict[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.problem(key, repr(value), f"a mapping with the keys {', '.join(known)}")
            return {}
        self._known_keys(f"{key}: ", value, known)
        return {k: v for k, v in value.items() if k in known}

    def _training(self, value: Any) -> Training:
        given = self._mapping("training", value, [f.name for f in fields(Training)])
        if given.get("amp") is False:  # YAML reads off as false
            given["amp"] = "off"
        checks: dict[str, tuple[Callable[[Any], bool], str]] = {
            "epochs": (lambda v: _is_int(v) and v > 0, "a positive number"),
            "iterations_per_epoch": (lambda v: _is_int(v) and v > 0, "a positive number"),
            "val_iterations_per_epoch": (lambda v: _is_int(v) and v > 0, "a positive number"),
            "seed": (lambda v: v is None or (_is_int(v) and v >= 0), "a number from 0 on, or null for none"),
            "initial_lr": (lambda v: _is_float(v) and v > 0, "a positive number"),
            "later_lr": (lambda v: _is_float(v) and v > 0, "a positive number"),
            "warmup_epochs": (lambda v: _is_int(v) and v >= 0, "a number from 0 on"),
            "deep_supervision": (lambda v: isinstance(v, bool), "true or false"),
            "validation_cases": (lambda v: v is None or (_is_int(v) and v >= 0), "a number from 0 on, or null"),
            "checkpoint_minutes": (lambda v: _is_float(v) and v >= 0, "a number from 0 on"),
            "amp": (lambda v: isinstance(v, str) and v in AMP_CHOICES, f"one of {', '.join(AMP_CHOICES)}"),
        }
        for key in [key for key, v in given.items() if not checks[key][0](v)]:
            self.problem(f"training: {key}", repr(given.pop(key)), checks[key][1])
        return Training(**given)

    def _method(self, where: str, value: Any, base: Mapping[str, Any]) -> dict[str, Any]:
        given = self._mapping(where, value, tuple(METHOD_DEFAULTS))
        if given.get("pseudo_labels") is False:  # YAML reads off as false
            given["pseudo_labels"] = "off"
        for key, v in given.items():
            default = METHOD_DEFAULTS[key]
            if key in METHOD_CHOICES:
                self._choice(f"{where}: {key}", v, METHOD_CHOICES[key])
            elif key == "one_piece":
                named = isinstance(v, list) and all(isinstance(name, str) for name in v)
                if not (v == "auto" or isinstance(v, bool) or named):
                    self.problem(f"{where}: {key}", repr(v), "auto, true, false or a list of classes")
            elif key == "fusion":
                if not (v is None or v == "auto" or (_is_float(v) and 0 <= v <= 1)):
                    self.problem(f"{where}: {key}", repr(v), "auto, a number from 0 to 1, or null")
            elif isinstance(default, bool):
                if not isinstance(v, bool):
                    self.problem(f"{where}: {key}", repr(v), "true or false")
            elif isinstance(default, int) and not (_is_int(v) and v >= 0):
                self.problem(f"{where}: {key}", repr(v), "a whole number from 0 on")
            elif not _is_float(v) or v < 0:
                self.problem(f"{where}: {key}", repr(v), "a number from 0 on")
            elif key in ("mu", "tau_old", "tau_background") and v > 1:
                self.problem(f"{where}: {key}", repr(v), "a number from 0 to 1")
            elif key in ("lwf_temperature", "voxel_stride") and v == 0:
                self.problem(f"{where}: {key}", repr(v), "a number above 0")
        method = {**base, **given}
        if method["class_balance"] is True and method["pseudo_labels"] != "offline":
            self.problem(
                f"{where}: class_balance",
                f"true with pseudo_labels: {method['pseudo_labels']}",
                "offline ones, over which the balance is counted once",
            )
        if method["one_piece"] not in ("auto", False) and method["pseudo_labels"] == "online":
            self.problem(
                f"{where}: one_piece",
                f"{method['one_piece']} with pseudo_labels: online",
                "offline ones, which are of whole images",
            )
        return method

    def _variants(self, value: Any, base: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """What each named variant changes; its ``trainer`` names the method it varies."""
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            self.problem("variants", repr(value), "a mapping of names to what each changes")
            return {}
        variants = {}
        for name, changes in value.items():
            if not re.fullmatch(rf"[a-z][a-z0-9_]{{0,{MAX_NAME_BYTES // 2 - 1}}}", name):
                self.problem(
                    f"variants: {name}", repr(name), f"lower-case letters, digits and _: at most {MAX_NAME_BYTES // 2}"
                )
            if not isinstance(changes, dict) or not changes:
                self.problem(f"variants: {name}", repr(changes), "a mapping of settings, as in `method`")
                continue
            trainer = changes.get("trainer", "nnUNetTrainer")
            self._class_of_nnunet(f"variants: {name}: trainer", trainer)
            settings = {key: v for key, v in changes.items() if key != "trainer"}
            whole = self._method(f"variants: {name}", settings, base)
            variants[name] = {key: whole[key] for key in settings if key in whole}
            if "trainer" in changes:
                variants[name]["trainer"] = trainer
        return variants

    def _tolerance(self, value: Any) -> float:
        if not (_is_float(value) and value > 0):
            self.problem("nsd_tolerance_mm", repr(value), "a positive number of millimetres")
            return 2.0
        return float(value)

    def _guard(self, value: Any) -> Guard:
        given = self._mapping("guard", value, [f.name for f in fields(Guard)])
        if "on_forgetting" in given:
            self._choice("guard: on_forgetting", given["on_forgetting"], ON_FORGETTING)
        for key, v in given.items():
            if key != "on_forgetting" and not (_is_float(v) and 0 <= v <= 1):
                self.problem(f"guard: {key}", repr(v), "a number from 0 to 1")
        return Guard(**given)

    def _launcher(self, value: Any) -> Launcher:
        given = self._mapping("launcher", value, [f.name for f in fields(Launcher)])
        checks: dict[str, tuple[Callable[[Any], bool], str]] = {
            "jobs": (lambda v: _is_int(v) and v > 0, "a positive number"),
            "jobs_per_gpu": (lambda v: _is_int(v) and v > 0, "a positive number"),
            "partition": (lambda v: v is None or (isinstance(v, str) and v), "text"),
            "account": (lambda v: v is None or (isinstance(v, str) and v), "text"),
            "gpus": (
                lambda v: v is None or (_is_int(v) and v >= 0) or (isinstance(v, str) and re.fullmatch(r"\S+:\d+", v)),
                "a number from 0 on, or kind and number such as a100:1",
            ),
            "cpus": (lambda v: _is_int(v) and v > 0, "a positive number"),
            "memory_gb": (lambda v: _is_float(v) and v > 0, "a positive number of gigabytes"),
            "hours": (lambda v: _is_float(v) and v > 0, "a positive number of hours"),
            "setup": (lambda v: isinstance(v, list) and all(isinstance(line, str) for line in v), "lines of shell"),
            "sbatch": (lambda v: isinstance(v, dict), "a mapping of options of sbatch to their values"),
        }
        for key in [key for key, v in given.items() if not checks[key][0](v)]:
            self.problem(f"launcher: {key}", repr(given.pop(key)), checks[key][1])
        for option, v in given.get("sbatch", {}).items():
            if not (isinstance(option, str) and re.fullmatch(r"[a-z][a-z-]*", option)):
                self.problem(f"launcher: sbatch: {option}", repr(option), "a long option without its dashes")
            elif option in SET_BY_KEYS + SET_BY_US:
                self.problem(f"launcher: sbatch: {option}", repr(v), "another option: nnunet-cil sets this one")
            elif not (isinstance(v, str) or _is_int(v) or v is True):
                self.problem(f"launcher: sbatch: {option}", repr(v), "text, a whole number or true")
        return Launcher(**given | {"setup": tuple(given.get("setup", ()))})

    def _intensity(self, value: Any) -> Intensity:
        if isinstance(value, dict):
            self._known_keys("intensity: ", value, ("given",))
            given = value.get("given")
            good = isinstance(given, dict) and given and all(isinstance(v, dict) for v in given.values())
            if not good:
                self.problem(
                    "intensity: given", repr(given), f"a mapping of channel numbers to {', '.join(INTENSITY_KEYS)}"
                )
                return Intensity()
            for channel, numbers in given.items():
                self._known_keys(f"intensity: given: {channel}: ", numbers, INTENSITY_KEYS + OPTIONAL_INTENSITY_KEYS)
                for key in OPTIONAL_INTENSITY_KEYS:
                    if not _is_float(numbers.get(key, 0)):
                        self.problem(f"intensity: given: {channel}: {key}", repr(numbers[key]), "a number")
                missing = [key for key in INTENSITY_KEYS if not _is_float(numbers.get(key))]
                if missing:
                    self.problem(f"intensity: given: {channel}", f"no number for {missing}", ", ".join(INTENSITY_KEYS))
            return Intensity(
                "given", {str(c): {str(k): float(v) for k, v in n.items() if _is_float(v)} for c, n in given.items()}
            )
        if value == "given":
            self.problem("intensity", "'given' without numbers", "intensity: {given: {0: {mean: .., std: .., ..}}}")
            return Intensity()
        return Intensity(self._choice("intensity", value, (*INTENSITY_MODES, "given")))

    def _plans(self, value: Any) -> dict[str, Any]:
        override = [f.name for f in fields(PlanOverride)]
        given = self._mapping("plans", value, (*override, "planner", "base"))
        result: dict[str, Any] = {}
        if "planner" in given:
            result["planner"] = self._class_of_nnunet("plans: planner", given["planner"])
        if "base" in given:
            result["base_plans"] = base = self._path("plans: base", given["base"])
            if base is not None:
                self._check_base_plans(base)
        patch = self._numbers("plans: patch_size", given.get("patch_size"), int)
        features = self._numbers("plans: features_per_stage", given.get("features_per_stage"), int)
        spacing = self._numbers("plans: spacing", given.get("spacing"), float)
        batch = given.get("batch_size")
        if batch is not None and not (_is_int(batch) and batch > 0):
            self.problem("plans: batch_size", repr(batch), "a positive number")
            batch = None
        n_axes = self._n_axes()
        for key, numbers in (("patch_size", patch), ("spacing", spacing)):
            if numbers is not None and len(numbers) != n_axes:
                self.problem(f"plans: {key}", f"{len(numbers)} numbers", f"{n_axes}, one for each axis")
        if features is not None and len(features) < MIN_STAGES:
            self.problem(
                "plans: features_per_stage",
                f"{len(features)} stages",
                f"at least {MIN_STAGES}: deep supervision needs them",
            )
        return {**result, "plans": PlanOverride(patch, batch, features, spacing)}

    def _check_base_plans(self, path: Path) -> None:
        if not path.is_file():
            self.problem("plans: base", f"no file {path}", "a plans.json of nnU-Net")
            return
        try:
            plans = read_json(path, "a plans.json of nnU-Net")
            missing = {"plans_name", "configurations", "image_reader_writer"} - set(plans)
            if not missing:
                check_plans(plans, str(path))
        except (OSError, ValueError) as error:
            self.problem("plans: base", f"{path}: {error}", "a plans.json of nnU-Net")
            return
        if missing:
            self.problem("plans: base", f"{path} without {sorted(missing)}", "a plans.json of nnU-Net")

    def _path(self, key: str, value: Any) -> Path | None:
        if not isinstance(value, str) or not value:
            self.problem(key, repr(value), "a path")
            return None
        try:
            path = (self.path.parent / Path(value).expanduser()).absolute()
            path.exists()
        except (OSError, RuntimeError, ValueError) as error:  # a name too long, an unknown user after ~, a null byte
            self.problem(key, f"{value[:80]!r} ({getattr(error, 'strerror', None) or error})", "a path")
            return None
        return path

    def _dataset(self, key: str, value: Any) -> Path | None:
        """A raw dataset by path, or by name or number in nnUNet_raw; checked to be one."""
        if _is_int(value) or (is_name(value) and re.fullmatch(r"Dataset\d{3}_.+", value)):
            folder = self._named_dataset(key, value)
        else:
            folder = self._path(key, value)
        if folder is None:
            return None
        if not folder.is_dir():
            self.problem(key, f"no folder {folder}", f"a raw dataset{self._raw_datasets()}")
            return None
        missing = [name for name in ("dataset.json", "imagesTr", "labelsTr") if not (folder / name).exists()]
        labels = self._labels_of(key, folder) if "dataset.json" not in missing else None
        if missing and not (labels is not None and self._lists_files(folder) and "dataset.json" not in missing):
            self.problem(key, f"{folder} without {', '.join(missing)}", "a raw dataset in nnU-Net's format")
            return None
        return folder if labels is not None else None

    def _named_dataset(self, key: str, value: str | int) -> Path | None:
        root = os.environ.get("nnUNet_raw")  # noqa: SIM112  (nnU-Net's spelling)
        if not root:
            self.problem(key, f"{value!r} while nnUNet_raw is not set", "a path, or the variable nnUNet_raw")
            return None
        if _is_int(value):
            found = sorted(Path(root).glob(f"Dataset{value:03d}_*"))
            if len(found) != 1:
                known = "" if found else self._raw_datasets()
                self.problem(key, f"{len(found)} datasets of number {value} in {root}", f"exactly one{known}")
                return None
            return found[0].absolute()
        return (Path(root) / value).absolute()

    @staticmethod
    def _raw_datasets() -> str:
        """Which datasets ``nnUNet_raw`` has, or some of them; nothing where it has none or is not set."""
        root = os.environ.get("nnUNet_raw")  # noqa: SIM112  (nnU-Net's spelling)
        found = sorted(path.name for path in Path(root).glob("Dataset[0-9][0-9][0-9]_*")) if root else []
        more = len(found) - MAX_SHOWN_DATASETS
        shown = ", ".join(found[:MAX_SHOWN_DATASETS]) + (f" and {more} more" if more > 0 else "")
        return f"; nnUNet_raw has {shown}" if found else ""

    @staticmethod
    def _lists_files(folder: Path) -> bool:
        return "dataset" in dataset_json_of(folder)

    def _labels_of(self, key: str, folder: Path) -> dict[str, int] | None:
        path, n_problems = folder / "dataset.json", len(self.problems)
        try:
            content = read_json(path, "nnU-Net's dataset.json")
            labels = content.get("labels")
            values = _values_of(labels)
            if values is None and isinstance(labels, dict):
                check_regions(labels, str(path))
        except (OSError, ValueError) as error:
            self.problems.append(f"{self.path}: {key}: {error}")
            return None
        if values is None:
            self.problem(
                f"{key}: {path}: labels",
                _short(labels),
                'name: number as in nnU-Net v2 ({"background": 0, "liver": 1})',
            )
        elif values.get("background") != 0:
            self.problem(f"{key}: {path}: labels", _short(labels), "background: 0 among them")
        elif len(set(values.values())) != len(values):
            self.problem(key, f"{path} with a label value twice: {values}", "one value a label")
        if missing := [name for name in ("channel_names", "file_ending") if name not in content]:
            self.problem(key, f"{path} without {', '.join(missing)}", "nnU-Net's dataset.json")
        else:
            try:
                _check_dataset_json(content)
            except ValueError as error:
                self.problem(key, f"{path} without {error}", "nnU-Net's dataset.json")
        return values if len(self.problems) == n_problems else None

    def _model(self, value: Any) -> GivenModel | None:
        if value is None:
            return None
        path = self._path("model", value)
        for key in ("plans", "intensity", "mirror_axes", "source", "configuration"):
            if self.raw.get(key) is not None:
                self.problem(
                    key, "the key beside a model", "no such key: it is the model's, or each step has its dataset"
                )
        try:
            return None if path is None else read_model(path)
        except (ValueError, OSError) as error:
            self.problems.append(f"{self.path}: model: {error}")
            return None

    def _check_folds_of(self, model: GivenModel, folds: Sequence[int | str]) -> None:
        try:
            for fold in folds:
                model.fold_for(fold)
        except ValueError as error:
            self.problems.append(f"{self.path}: fold: {error}")

    def _steps(self, value: Any, source: Path | None, given: Sequence[str] = ()) -> tuple[Step, ...]:
        if not isinstance(value, list) or not value:
            self.problem("steps", repr(value), "a list with the classes of each step")
            return ()
        steps, seen = [], dict.fromkeys(given, "the model")
        for index, entry in enumerate(value):
            key = f"steps[{index}]"
            number = index + (2 if given else 1)
            step = self._own_step(key, entry, number) if isinstance(entry, dict) else self._cut_step(key, entry, source)
            if step is None:
                continue
            new = tuple(name for name in step.classes if name not in seen)
            relabels = isinstance(entry, dict) and len(new) > 0  # its data label old classes as well
            for name in step.classes:
                if name in RESERVED:
                    self.problem(key, repr(name), "a class; that name is nnU-Net's own")
                if name in seen and not relabels:
                    expected = "at least one new class" if isinstance(entry, dict) else "each class in one step, once"
                    self.problem(key, f"class {name!r} that {seen[name]} has already", expected)
                seen.setdefault(name, key)
            steps.append(replace(step, classes=new) if relabels else step)
        for step, key in [(step, seen[step.classes[0]]) for step in steps if step.joint_map and step.classes]:
            found = {name for name in (step.joint_map or {}).values() if name is not None}
            if found != set(seen):
                self.problem(f"{key}: joint", sorted(found), f"all classes of the steps: {list(seen)}")
        kinds = {isinstance(entry, dict) for entry in value}
        if len(kinds) > 1:
            self.problem("steps", "steps with and without a dataset of their own", "all of one kind")
        if kinds == {True} and source is not None:
            self.problem("source", "a source beside steps with datasets of their own", "one of the two")
        if kinds == {True} and self.raw.get("images") is not None:
            self.problem(
                "images", "images beside steps with datasets of their own", "no such key: each step has its images"
            )
        return tuple(steps)

    def _class_names(self, key: str, value: Any) -> list[str] | None:
        if isinstance(value, list) and any(map(_is_int, value)):
            self.problem(key, repr(value), "class names (text) such as liver, not label numbers")
            return None
        if not isinstance(value, list) or not value or not all(isinstance(name, str) and name for name in value):
            self.problem(key, repr(value), "a list of at least one class name")
            return None
        return value

    def _cut_step(self, key: str, entry: Any, source: Path | None) -> Step | None:
        names = self._class_names(key, entry)
        if self.raw.get("source") is None:
            self.problem(key, "classes without a dataset", "`source`, or {dataset: ..., classes: ...}")
            return None
        if names is None:
            return None
        if source is not None:
            self._check_own_names(key, names, source)
        return Step(tuple(names))

    def _check_own_names(self, key: str, names: Sequence[str], folder: Path) -> None:
        labels = dataset_json_of(folder)["labels"]
        for name in names:
            if name not in labels:
                near = difflib.get_close_matches(name, labels, 1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                self.problem(key, f"unknown class {name!r}{hint}", f"one of {sorted(set(labels) - set(RESERVED))}")

    def _own_step(self, key: str, entry: Mapping, number: int) -> Step | None:
        self._known_keys(f"{key}: ", entry, ("dataset", "classes", "joint", "unlabelled"))
        n_problems, kept = len(self.problems), self._kept_source(number)
        folder = self._dataset(f"{key}: dataset", entry.get("dataset"))
        if is_gone := folder is None and kept is not None:
            folder = kept
            del self.problems[n_problems:]
        joint = self._class_map(f"{key}: joint", entry["joint"], folder) if "joint" in entry else None
        class_map = self._class_map(f"{key}: classes", entry.get("classes"), folder)
        if folder is None or class_map is None:
            return None
        classes = tuple(dict.fromkeys(name for name in class_map.values() if name is not None))
        if not classes:
            self.problem(f"{key}: classes", "no class", "at least one that is learned")
        unlabelled = self._unlabelled(f"{key}: unlabelled", entry.get("unlabelled"), None if is_gone else folder)
        return Step(classes, folder, class_map, joint, unlabelled)

    def _unlabelled(self, key: str, value: Any, folder: Path | None) -> dict[str, tuple[str, ...]]:
        """Own labels that cases of a raw dataset lack, by case: from the file that is named, or the dataset's own."""
        if folder is None:
            return {}
        own = [folder / name for name in UNLABELLED_FILES if (folder / name).is_file()]
        path = self._file(key, value, folder, UNLABELLED) if value is not None else own[0] if own else None
        cases = _cases_in(folder / "imagesTr") | _cases_in(folder / "imagesTs")
        if self._lists_files(folder):
            cases |= set(dataset_json_of(folder)["dataset"])
        return self._read_unlabelled(key, path, cases, self._labels_of(key, folder) or {})

    def _read_unlabelled(
        self, key: str, path: Path | None, cases: set[str], labels: Mapping[str, int]
    ) -> dict[str, tuple[str, ...]]:
        if path is None:
            return {}
        try:
            found = read_unlabelled(path)
        except (OSError, ValueError) as error:
            self.problem(key, f"{path}: {error}", UNLABELLED)
            return {}
        if unknown := sorted(set(found) - cases):
            shown = f"{unknown[:5]}{' ...' * (len(unknown) > 5)}"
            self.problem(key, f"{len(unknown)} cases that do not exist: {shown}", f"in {path} those of the dataset")
        names = {name: name for name in labels if name not in RESERVED}
        names = {str(labels[name]): name for name in names} | names  # a label may be given by its number
        if unknown := sorted({name for of_case in found.values() for name in of_case} - set(names)):
            self.problem(key, f"unknown labels {unknown}", f"in {path} some of {sorted(set(labels) - set(RESERVED))}")
        return {case: tuple(names[name] for name in of_case if name in names) for case, of_case in found.items()}

    def _file(self, key: str, value: Any, folder: Path | None, expected: str) -> Path | None:
        """A file beside the schedule; if there is none, in the folder of a dataset.

        Nothing is said of one that may lie in the folder of a source of which another problem is known.
        """
        path = self._path(key, value)
        if path is None:
            return None
        if not path.is_file() and folder is not None and (folder / value).is_file():
            path = folder / value
        if not path.is_file():
            if folder is not None or self.raw.get("source") is None:
                self.problem(key, f"no file {path}", expected)
            return None
        return path

    def _kept_source(self, number: int) -> Path | None:
        """What the chain kept of a step's dataset, whose scans may be gone once they are trained on."""
        results = os.environ.get("nnUNet_results")  # noqa: SIM112  (nnU-Net's spelling)
        name = self.raw.get("name")
        if not results or not isinstance(name, str) or not _NAME.fullmatch(name):
            return None
        folder = kept_source(Path(results).absolute() / f"chain_{name}", number)
        return folder if (folder / "dataset.json").is_file() else None

    def _class_map(self, key: str, value: Any, folder: Path | None) -> dict[str, str | None] | None:
        if isinstance(value, dict) and folder is not None:  # own labels may be given by number
            labels = dataset_json_of(folder)["labels"]
            names = {int(number): name for name, number in labels.items()}
            if unknown := [own for own in value if _is_int(own) and own not in names]:
                known = ", ".join(f"{number} {name}" for number, name in names.items() if name not in RESERVED)
                self.problem(key, f"the label {', '.join(map(str, unknown))}", f"one of {known}")
                return None
            value = {names[own] if _is_int(own) else own: name for own, name in value.items()}
        if isinstance(value, list):
            names = self._class_names(key, value)
            if names is not None and len(set(names)) != len(names):
                self.problem(key, f"a name twice in {names}", "each once")
            value = None if names is None else {name: name for name in names}
        elif not isinstance(value, dict) or not value:
            self.problem(key, repr(value), "a list of class names, or a mapping of own names to class names or null")
            value = None
        elif bad := [
            k for k, v in value.items() if not isinstance(k, str) or not (v is None or (isinstance(v, str) and v))
        ]:
            self.problem(key, f"{ {k: value[k] for k in bad} }", "own names mapped to class names or null")
            value = None
        elif reserved := {k: v for k, v in value.items() if k in RESERVED and v is not None}:
            self.problem(key, f"{reserved}", "no class from background or ignore: they stay what they are")
            value = None
        if value is not None and folder is not None:
            self._check_own_names(key, list(value), folder)
        return value

    def _test(
        self, value: Any, source: Path | None, steps: tuple[Step, ...]
    ) -> tuple[tuple[TestSet, ...], tuple[str, ...] | None]:
        train: tuple[str, ...] | None = None
        if value is None:
            return (), None
        if isinstance(value, str) and value.endswith(".json"):
            value, train = self._split_file(value, source)
            if value is None:
                return (), None
        classes = tuple(name for step in steps for name in step.classes)
        entries = value if isinstance(value, list) and not all(isinstance(v, str) for v in value) else [value]
        sets = [self._test_set(entry, source, classes) for entry in entries]
        if train is not None and source is not None:
            self._subjects("test: train", train, source / "imagesTr", source)
        return tuple(s for s in sets if s is not None), train

    def _split_file(self, value: str, source: Path | None) -> tuple[list[str] | None, tuple[str, ...] | None]:
        path = self._file("test", value, source, "a JSON file with the key 'test', and maybe 'train'")
        if path is None:
            return None, None
        try:
            content = read_json(path, "a split")
            test, train = content["test"], content.get("train")
            if not test or not all(isinstance(names, list) for names in (test, train or [])):
                raise ValueError("subjects must be lists")
            if not all(isinstance(name, str) for name in [*test, *(train or [])]):
                raise ValueError("subjects must be names")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.problem("test", f"{path}: {error}", "a JSON object with the key 'test' (names), and maybe 'train'")
            return None, None
        if both := sorted(set(test) & set(train or ())):
            self.problem("test", f"{both} as test and as training subjects", "each in one of the two")
        return test, None if train is None else tuple(train)

    def _test_set(self, entry: Any, source: Path | None, classes: tuple[str, ...]) -> TestSet | None:
        subjects = class_map = declared = None
        if isinstance(entry, list):
            if source is None:
                if self.raw.get("source") is None:  # else what is wrong with it is told already
                    self.problem("test", "subjects without a source", "a dataset, or {images: .., labels: ..}")
                return None
            folder, subjects = source, entry
        elif isinstance(entry, dict) and "images" in entry:
            return self._folder_pair(entry, source, classes)
        elif isinstance(entry, dict):
            self._known_keys("test: ", entry, ("dataset", "subjects", "classes", "unlabelled"))
            folder = self._dataset("test: dataset", entry.get("dataset"))
            subjects, declared = entry.get("subjects"), entry.get("unlabelled")
            if "classes" in entry:
                class_map = self._class_map("test: classes", entry["classes"], folder)
        else:
            folder = self._dataset("test", entry)
        if folder is None:
            return None
        part = "Ts" if subjects is None and all((folder / f"{n}Ts").is_dir() for n in ("images", "labels")) else "Tr"
        values = self._labels_of("test", folder) or {}
        if class_map is None:
            class_map = {name: name for name in values if name in classes}
        self._check_targets(class_map, classes)
        if subjects is not None:
            subjects = self._subjects("test", subjects, folder / f"images{part}", folder)
        if declared is None and folder in self.declared:
            unlabelled = self.declared[folder]
        else:
            unlabelled = self._unlabelled("test: unlabelled", declared, folder)
        images, labels = folder / f"images{part}", folder / f"labels{part}"
        return TestSet(images, labels, class_map, values, folder, subjects, unlabelled)

    def _folder_pair(self, entry: Mapping, source: Path | None, classes: tuple[str, ...]) -> TestSet | None:
        self._known_keys("test: ", entry, ("images", "labels", "classes", "unlabelled"))
        folders = [self._path(f"test: {key}", entry.get(key)) for key in ("images", "labels")]
        for key, folder in zip(("images", "labels"), folders, strict=True):
            if folder is not None and not folder.is_dir():
                self.problem(f"test: {key}", f"no folder {folder}", f"the folder of the test {key}")
        values = self._labels_of("source", source) if source is not None else None
        values = values or {"background": 0, **{name: value for value, name in enumerate(classes, 1)}}
        class_map = self._class_map("test: classes", entry["classes"], None) if "classes" in entry else None
        class_map = class_map or {name: name for name in values if name in classes}
        is_known = source is not None or self.raw.get("source") is None
        if is_known and (unknown := sorted(set(class_map) - set(values))):
            self.problem("test: classes", f"unknown labels {unknown}", f"some of {sorted(set(values) - set(RESERVED))}")
        self._check_targets(class_map, classes)
        if folders[0] is None or folders[1] is None:
            return None
        given = entry.get("unlabelled")
        path = self._file("test: unlabelled", given, folders[0], UNLABELLED) if given is not None else None
        unlabelled = self._read_unlabelled("test: unlabelled", path, _cases_in(folders[0]), values)
        return TestSet(folders[0], folders[1], class_map, values, unlabelled=unlabelled)

    def _check_targets(self, class_map: Mapping[str, str | None], classes: Sequence[str]) -> None:
        if unknown := sorted({name for name in class_map.values() if name is not None and name not in classes}):
            self.problem("test: classes", f"{unknown}", f"classes of the steps: {list(classes)}")
        if classes and not any(name is not None for name in class_map.values()):
            self.problem("test", "no class of the steps", f"labels of some of {list(classes)}")

    def _subjects(self, key: str, subjects: Any, images: Path, folder: Path) -> tuple[str, ...] | None:
        if not isinstance(subjects, (list, tuple)) or not subjects or not all(isinstance(s, str) for s in subjects):
            self.problem(f"{key}: subjects", repr(subjects), "a list of subject names")
            return None
        ending = dataset_json_of(folder)["file_ending"]
        missing = [s for s in subjects if not (is_name(s) and (images / f"{s}_0000{ending}").is_file())]
        if missing and not self._lists_files(folder):
            shown = f"{missing[:5]}{' ...' * (len(missing) > 5)}"
            self.problem(key, f"{len(missing)} subjects that do not exist: {shown}", f"names from {images}")
        if twice := sorted({s for s in subjects if list(subjects).count(s) > 1}):
            self.problem(key, f"{twice} twice", "each subject once")
        return tuple(subjects)


def _cases_in(images: Path) -> set[str]:
    """Names of the cases in a folder of images in nnU-Net's naming; none where there is no folder."""
    files = images.iterdir() if images.is_dir() else ()
    return {re.sub(r"_\d{4}\..*$", "", file.name) for file in files}


def _values_of(labels: Any) -> dict[str, int] | None:
    """The numbers of a dataset's labels by name; None where they are something else."""
    try:
        return {str(name): int(value) for name, value in labels.items()}
    except (ValueError, TypeError, AttributeError, OverflowError):
        return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 4]} ..."


def _check_dataset_json(content: Mapping[str, Any]) -> None:
    """Refuse what no dataset of nnU-Net has beside its labels, and names of cases that lead out of its folders.

    Raises:
        ValueError: saying what is missing.
    """
    channels, ending, listed = content["channel_names"], content["file_ending"], content.get("dataset", {})
    if not isinstance(channels, dict) or not all(key.isdecimal() for key in channels):
        raise ValueError(f"channel_names by number: {channels!r}")
    if not is_ending(ending):
        raise ValueError(f"{EXPECTED_ENDING} as file_ending: {ending!r}")
    if not isinstance(listed, dict) or not all(map(_is_listed_case, listed.values())):
        raise ValueError("images and label of each case under dataset")
    if bad := [name for name in listed if not is_name(name)]:
        raise ValueError(f"names of cases with {EXPECTED_NAME}: {bad[0]!r}")


def _is_listed_case(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("images"), list):
        return False
    return all(isinstance(file, str) for file in [*entry["images"], entry.get("label")])


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_float(value: Any) -> bool:
    return (isinstance(value, float) or _is_int(value)) and abs(value) <= sys.float_info.max
