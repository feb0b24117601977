"""A chain on disk: its folder, the names of its datasets, plans and models, and what is finished."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_cil import nnunet_api
from nnunet_cil.environment import trainers_dir
from nnunet_cil.schedule import Schedule
from nnunet_cil.step_files import read_step_file

logger = logging.getLogger(__name__)

FIRST_FREE_ID = 500
JOINT = "joint"
_TRAINER_PREFIX = "nnUNetTrainer"


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(content, indent=1, sort_keys=False) + "\n")
    os.replace(partial, path)


def method_of(trainer: str) -> str:
    """Short name of a trainer class: ``nnUNetTrainerPGCD`` -> ``pgcd``."""
    return trainer.removeprefix(_TRAINER_PREFIX).lower()


def trainer_of(method: str, schedule: Schedule) -> str:
    """Trainer class of a method's short name: the schedule's own or one of this package's ``trainers/``.

    Raises:
        ValueError: no trainer of that name.
    """
    known = {method_of(path.stem): path.stem for path in trainers_dir().glob(f"{_TRAINER_PREFIX}*.py")}
    known[method_of(schedule.trainer)] = schedule.trainer
    if method not in known:
        raise ValueError(f"--methods: got {method!r}, expected some of {sorted(known)}.")
    return known[method]


@dataclass(frozen=True)
class Variant:
    """A method with a seed: what shares preprocessed data with others but never an output folder."""

    method: str
    trainer: str
    seed: int | None


class Chain:
    """The chain of a schedule: ``chain_NAME`` in nnUNet_results, with ``chain.json`` and all that is not nnU-Net's.

    Args:
        schedule: the chain's schedule.
        content: of ``chain.json``: schedule, dataset numbers by step, number of the joint dataset, plans name.
    """

    def __init__(self, schedule: Schedule, content: dict[str, Any]) -> None:
        self.schedule = schedule
        self.content = content
        self.paths = nnunet_api.nnunet_paths()
        self.folder = self.paths["nnUNet_results"] / f"chain_{schedule.name}"

    @classmethod
    def open(cls, schedule: Schedule) -> Chain:
        """Find the chain of this schedule, or start it with free dataset numbers (or the given ones).

        Raises:
            ValueError: a chain of this name has another schedule, or the given numbers are taken by other datasets.
        """
        folder = nnunet_api.nnunet_paths()["nnUNet_results"] / f"chain_{schedule.name}"
        path = folder / "chain.json"
        if path.is_file():
            chain = cls(schedule, json.loads(path.read_text()))
            chain._check_same_schedule()
        else:
            count = len(schedule.steps) + 1
            numbers = _free_ids(schedule, count)
            chain = cls(schedule, {"datasets": numbers[:-1], JOINT: numbers[-1], "plans_name": None})
        chain.content = {"name": schedule.name, "schedule": schedule.to_dict(), **_without(chain.content, "schedule")}
        return chain

    def save(self) -> None:
        """Write ``chain.json``."""
        write_json(self.folder / "chain.json", self.content)

    def _check_same_schedule(self) -> None:
        before, now = self.content["schedule"], json.loads(json.dumps(self.schedule.to_dict()))
        ignored = ("device", "test", "file")
        differing = [key for key in sorted(set(before) | set(now)) if before.get(key) != now.get(key)]
        differing = [key for key in differing if key not in ignored]
        if differing:
            lines = "\n  ".join(f"{key}: chain {before.get(key)}, schedule {now.get(key)}" for key in differing)
            raise ValueError(
                f"{self.schedule.file}: got another schedule than the chain in {self.folder} was started with, "
                f"expected the same:\n  {lines}\nGive the schedule another name, or remove that folder to start anew."
            )

    @property
    def n_steps(self) -> int:
        """Number of steps, T."""
        return len(self.schedule.steps)

    @property
    def default_method(self) -> str:
        """Method of the schedule's trainer."""
        return method_of(self.schedule.trainer)

    def dataset_name(self, step: int | str) -> str:
        """nnU-Net dataset name of a step (1-based), or of ``"joint"``."""
        number = self.content[JOINT] if step == JOINT else self.content["datasets"][int(step) - 1]
        suffix = JOINT if step == JOINT else f"step{step}"
        return f"Dataset{number:03d}_{self.schedule.name.replace('-', '_')}_{suffix}"

    def dataset_id(self, step: int | str) -> int:
        """nnU-Net dataset number of a step, or of ``"joint"``."""
        return int(self.dataset_name(step)[7:10])

    def raw(self, step: int | str) -> Path:
        """Raw dataset folder of a step."""
        return self.paths["nnUNet_raw"] / self.dataset_name(step)

    def preprocessed(self, step: int | str) -> Path:
        """Preprocessed dataset folder of a step."""
        return self.paths["nnUNet_preprocessed"] / self.dataset_name(step)

    def variant(self, method: str, seed: int | None) -> Variant:
        """The variant of a method's short name and a seed."""
        return Variant(method, trainer_of(method, self.schedule), seed)

    def first_step(self, seed: int | None) -> Variant:
        """The variant whose step 1 all methods of this seed share."""
        return Variant(self.default_method, self.schedule.trainer, seed)

    def plans_name(self, variant: Variant) -> str:
        """Plans identifier of a variant; nnU-Net's own for the schedule's method and seed, so plain commands work."""
        name = self.content["plans_name"]
        if variant.method not in (self.default_method, JOINT):
            name += f"_{variant.method}"
        if variant.seed != self.schedule.training.seed:
            name += f"_seed{variant.seed}"
        return name

    def model_folder(self, variant: Variant, step: int | str) -> Path:
        """nnU-Net's model folder of a variant's step; step 1 is that of the shared variant."""
        if step == 1:
            variant = self.first_step(variant.seed)
        model = nnunet_api.model_folder_name(variant.trainer, self.plans_name(variant), self.schedule.configuration)
        return self.paths["nnUNet_results"] / self.dataset_name(step) / model

    def trained(self, variant: Variant, step: int | str, fold: int | str) -> bool:
        """Whether a training has ended, with everything that comes after its last epoch."""
        folder = self.model_folder(variant, step) / f"fold_{fold}"
        return (
            all((folder / name).is_file() for name in ("checkpoint_final.pth", "prototypes.npz"))
            and (folder / "validation" / "summary.json").is_file()
        )

    def check_not_foreign(self, folder: Path) -> None:
        """Refuse to write into a dataset folder that this chain did not make.

        Raises:
            FileExistsError: the folder exists and is not of this chain.
        """
        if not folder.exists():
            return
        step = read_step_file(folder)
        if step is None or step["chain"] != self.schedule.name:
            owner = "no chain" if step is None else f"chain {step['chain']!r}"
            raise FileExistsError(
                f"{folder}: got a dataset of {owner}, expected a free place for chain {self.schedule.name!r}. It is "
                "not touched. Set another `dataset_id` in the schedule."
            )


def _without(content: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in keys}


def _free_ids(schedule: Schedule, count: int) -> list[int]:
    """``count`` consecutive dataset numbers that nobody uses; from the given one on, if the schedule gives one."""
    taken = nnunet_api.taken_dataset_ids()
    if schedule.dataset_id is not None:
        numbers = list(range(schedule.dataset_id, schedule.dataset_id + count))
        if clash := sorted(name for number in numbers for name in taken.get(number, ())):
            raise ValueError(
                f"{schedule.file}: dataset_id: got {schedule.dataset_id}, expected {count} free numbers from there on, "
                f"but these exist: {clash}. They are not touched. Give another number or leave the key out."
            )
        return numbers
    first = FIRST_FREE_ID
    while any(number in taken for number in range(first, first + count)):
        first += 1
    if first + count > 1000:
        raise ValueError(f"{schedule.file}: got no {count} free dataset numbers from {FIRST_FREE_ID} to 999.")
    return list(range(first, first + count))
