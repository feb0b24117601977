"""What a schedule holds, once it is checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nnunet_cil.given_model import GivenModel
from nnunet_cil.schedule.method import METHOD_DEFAULTS

MIN_STAGES = 3


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
            **{key: self.raw[key] for key in ("model", "model_fold") if self.model and self.raw.get(key) is not None},
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
    "model_fold",
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
