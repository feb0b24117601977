"""A chain on disk: its folder, the names of its datasets, plans and models, and what is finished."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nnunet_cil import nnunet_api
from nnunet_cil.environment import trainers_dir
from nnunet_cil.lineage import CHAIN_EXPECTED, CHAIN_FILE, CHANGEABLE_KEYS, check_chain, sealed
from nnunet_cil.schedule import ABLATIONS, STORED_METHOD_DEFAULTS, Schedule, Training, kept_source
from nnunet_cil.step_files import CHECKPOINT, PROTOTYPE_FILE, read_step_file, write_json
from nnunet_cil.untrusted import read_json

logger = logging.getLogger(__name__)

FIRST_FREE_ID, LAST_ID = 500, 999
PATIENCE_SECONDS = 120.0
SCORE_FILES = "predictions/*/*/scores.json"
NUMBERS_LOCK = ".nnunet_cil.lock"
"""In nnUNet_results, held while a new chain takes its dataset numbers."""
LOCK_MODE = 0o666  # whatever the umask: users who share nnUNet_results have to open each other's
JOINT = "joint"
_TRAINER_PREFIX = "nnUNetTrainer"
REPLAY_TRAINER = "nnUNetTrainerReplay"


def is_finished(fold_folder: Path) -> bool:
    """Whether a training has ended, with everything that comes after its last epoch."""
    if not all((fold_folder / name).is_file() for name in (CHECKPOINT, PROTOTYPE_FILE)):
        return False
    try:  # nnU-Net writes it in place
        read_json(fold_folder / "validation" / "summary.json", "the summary of nnU-Net's validation")
    except (FileNotFoundError, ValueError):
        return False
    return True


def method_of(trainer: str) -> str:
    """Short name of a trainer class: ``nnUNetTrainerPGCD`` -> ``pgcd``."""
    return trainer.removeprefix(_TRAINER_PREFIX).lower()


def has_ablations(trainer: str) -> bool:
    """Whether a trainer has PGCD's parts, which can be left out; of a trainer that is not ours it is believed."""
    return trainer == "nnUNetTrainerPGCD" or not (trainers_dir() / f"{trainer}.py").is_file()


def keeps_scans(method: str) -> bool:
    """Whether a method keeps scans of earlier steps: its name, or that of a variant of it, says so."""
    return method.startswith("replay")


def resolve_method(method: str, schedule: Schedule) -> tuple[str, dict[str, Any]]:
    """Trainer class of a method's short name, and its settings where they differ from the schedule's.

    A method is the schedule's own, one of this package's ``trainers/``, a variant that the schedule names, or PGCD or
    what is made of it with an ablation, ``pgcd-no_channel``.

    Raises:
        ValueError: no such method.
    """
    trainers = {method_of(path.stem): path.stem for path in trainers_dir().glob(f"{_TRAINER_PREFIX}*.py")}
    trainers[method_of(schedule.trainer)] = schedule.trainer
    base, dash, ablation = method.partition("-")
    if clash := sorted(set(trainers) & set(schedule.variants)):
        raise ValueError(f"{schedule.file}: variants: got {clash}, which are methods; expected other names.")
    changes = dict(schedule.variants.get(base, {}))
    trainer = changes.pop("trainer", schedule.trainer) if base in schedule.variants else trainers.get(base)
    if trainer is None or (dash and not (ablation in ABLATIONS and has_ablations(trainer))):
        raise ValueError(
            f"--methods: got {method!r}, expected some of {sorted({*trainers, *schedule.variants})}, or pgcd or one "
            f"made of it with an ablation, such as pgcd-no_channel: {', '.join(ABLATIONS)}."
        )
    if trainer == REPLAY_TRAINER and not keeps_scans(base):
        raise ValueError(
            f"{schedule.file}: variants: got the name {base!r} for a method that keeps scans of earlier steps, "
            "expected one that begins with replay, so that tables and figures can say so."
        )
    return trainer, changes | dict(ABLATIONS[ablation] if dash else {})


@dataclass(frozen=True)
class Variant:
    """A method, its settings included, with a seed: shares preprocessed data with others, never an output folder."""

    method: str
    trainer: str
    seed: int | None


class Chain:
    """The chain of a schedule: ``chain_NAME`` in nnUNet_results, with ``chain.json`` and all that is not nnU-Net's.

    Args:
        schedule: the chain's schedule.
        content: of ``chain.json``: schedule, dataset numbers by step, number of the joint dataset, plans name, steps
            whose data were removed, and what later steps inherit from a given model.
    """

    def __init__(self, schedule: Schedule, content: dict[str, Any]) -> None:
        self.schedule = schedule
        self.content = content
        self._abandoned: list[Path] = []
        self._is_new = False
        self.paths = nnunet_api.nnunet_paths()
        self.folder = self.paths["nnUNet_results"] / f"chain_{schedule.name}"

    @classmethod
    def open(cls, schedule: Schedule) -> Chain:
        """Find the chain of this schedule, or start it with free dataset numbers (or the given ones).

        Raises:
            ValueError: a chain of this name has another schedule, or the given numbers are taken by other datasets.
        """
        folder = nnunet_api.nnunet_paths()["nnUNet_results"] / f"chain_{schedule.name}"
        path = folder / CHAIN_FILE
        known = read_chain(path) if path.is_file() else None
        abandoned: list[Path] = []
        if known is not None:
            chain = cls(schedule, known)
            differing = chain.differing_keys(has_begun=chain.has_begun())
            if differing and chain.content["plans_name"] is not None:
                chain._refuse_other_schedule(differing)
            if differing:  # a mistake was mended before anything was planned
                abandoned, known = [folder for folder in chain._own_datasets() if chain._made(folder)], None
        if known is None:
            chain = cls(schedule, {"plans_name": None})
            chain._abandoned, chain._is_new = abandoned, True
            chain._choose_numbers()
        chain.content = {"name": schedule.name, "schedule": chain._in_force(), **_without(chain.content, "schedule")}
        return chain

    def _in_force(self) -> dict[str, Any]:
        """The schedule as it is; of what was moved since the chain was started, its path of then."""
        now = json.loads(json.dumps(self.schedule.to_dict()))
        before = self.content.get("schedule", {"steps": []})
        for then, given in zip([before, *before["steps"]], [now, *now["steps"]], strict=False):
            for key in ("source", "model", "base_plans", "dataset"):
                if self._was_moved(then.get(key), given.get(key)):
                    given[key] = then[key]
        return now

    def _was_moved(self, then: Any, now: Any) -> bool:
        """Whether nothing is at a path any more, and the other one has the same last part."""
        if not isinstance(then, str) or not isinstance(now, str) or Path(then).name != Path(now).name:
            return False
        places = (self.schedule.file.parent, self.paths["nnUNet_raw"])
        return not any((place / os.path.expanduser(then)).exists() for place in places)

    @contextmanager
    def locked(self, part: str = "", however_long: bool = False) -> Iterator[None]:
        """Keep other processes off this chain, or off a named part of it, which is a lock of its own and waited for.

        The lock goes with the process, however it ends.

        Args:
            however_long: wait for a part until it is free, and not ``PATIENCE_SECONDS`` alone.

        Raises:
            RuntimeError: another process has it; a part also after that time.
        """
        path = self._lock_file(part)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0 if not part else -1 if however_long else PATIENCE_SECONDS, mode=LOCK_MODE)
        try:
            lock.acquire()
        except Timeout as error:
            raise RuntimeError(
                f"{self.folder}: got a chain that another nnunet-cil is working on{part and f' ({part})'}, expected "
                "none. Wait for it, or end it: the same command then goes on from there."
            ) from error
        try:
            yield
        finally:
            lock.release()

    def is_locked(self, part: str = "") -> bool:
        """Whether a process works on this chain, or on a part of it, see `locked`."""
        path = self._lock_file(part)
        try:
            with FileLock(path, timeout=0, mode=LOCK_MODE) if path.is_file() else nullcontext():
                return False
        except Timeout:
            return True

    def _lock_file(self, part: str) -> Path:
        return self.folder / "locks" / f"{part}.lock" if part else self.folder / ".lock"

    def claim_numbers(self) -> None:
        """Write a new chain's ``chain.json``, with numbers that no other chain chose in the meantime."""
        self.paths["nnUNet_results"].mkdir(parents=True, exist_ok=True)
        with FileLock(self.paths["nnUNet_results"] / NUMBERS_LOCK, timeout=PATIENCE_SECONDS, mode=LOCK_MODE):
            if self._is_new:
                self._choose_numbers()
            self.save()
        self._is_new = False

    def _choose_numbers(self) -> None:
        numbers = _free_ids(self.schedule, len(self.schedule.steps) + 1, {path.name for path in self._abandoned})
        self.content |= {"datasets": numbers[:-1], JOINT: numbers[-1]}

    def save(self) -> None:
        """Write ``chain.json``."""
        write_json(self.folder / CHAIN_FILE, sealed(self.content))

    def has_begun(self) -> bool:
        """Whether a training of this chain was started, or one of its models is scored."""
        steps = (*self.schedule.own_steps, JOINT)
        is_trained = any(path for step in steps for path in self.results(step).glob("*/plans.json"))
        return is_trained or any(self.folder.glob(SCORE_FILES))

    def differing_keys(self, has_begun: bool = True) -> list[str]:
        """``key: then, now`` of the schedule in ``content`` and this one, for what may not change while a chain runs.

        That is all but what is no part of a training that was done, and the variants, whose trainings are compared
        one by one.

        Args:
            has_begun: see `has_begun`. Before, how to train may change, but for the seed, by which
                subjects were dealt to steps.
        """
        before, now = dict(self.content["schedule"]), self._in_force()
        for key, defaults in (("method", STORED_METHOD_DEFAULTS), ("training", asdict(Training()))):
            before[key] = {**defaults, **before[key]}  # a chain of an earlier version, which had fewer settings
        if not has_begun:
            before["method"], before["training"] = (
                now["method"],
                {**now["training"], "seed": before["training"]["seed"]},
            )
        for step, then, given in zip(self.schedule.own_steps, before["steps"], now["steps"], strict=False):
            if self.source_is_gone(step) and "unlabelled" in then:
                given["unlabelled"] = then["unlabelled"]
        keys = sorted((set(before) | set(now)) - CHANGEABLE_KEYS)
        return [line for key in keys for line in _differences(key, before.get(key), now.get(key))]

    def _refuse_other_schedule(self, differing: Sequence[str]) -> None:
        folders = "".join(f"\n  {folder}" for folder in (self.folder, *self._own_datasets()))
        lines = "\n  ".join(differing)
        raise ValueError(
            f"{self.schedule.file}: got another schedule than the chain in {self.folder} was started with, expected "
            f"the same:\n  {lines}\n{self._how_to_add_steps()}Give the schedule another name, or remove these folders "
            f"to start anew:{folders}"
        )

    def _how_to_add_steps(self) -> str:
        """A line for who adds steps to a chain; empty where something else was changed."""
        before, now = self.content["schedule"]["steps"], self._in_force()["steps"]
        if not len(before) < len(now) or now[: len(before)] != before:
            return ""
        step = len(before) + (self.schedule.model is not None)
        last = self.model_folder(self.first_step(self.schedule.training.seed), step)
        return (
            f"To teach its last model the steps that were added, give {last} to `nnunet-cil extend`, or as `model` to "
            "a schedule of another name. Else:\n"
        )

    def _own_datasets(self) -> list[Path]:
        numbers = [*self.content["datasets"], self.content[JOINT]]
        return [
            folder
            for root in self.paths.values()
            for number in numbers
            for folder in root.glob(f"Dataset{number:03d}_{self.schedule.name.replace('-', '_')}_*")
        ]

    def discard_abandoned(self) -> None:
        """Remove the unfinished datasets of another schedule of this name that was never planned."""
        for folder in self._abandoned:
            shutil.rmtree(folder)
        self._abandoned = []

    def source_is_gone(self, step: int) -> bool:
        """Whether a step's own dataset was removed, so that the chain has the names of its labels only."""
        return self.schedule.steps[step - 1].dataset == kept_source(self.folder, step)

    @property
    def n_steps(self) -> int:
        """Number of steps, T."""
        return len(self.schedule.steps)

    @property
    def forgotten(self) -> tuple[int | str, ...]:
        """Steps, ``"joint"`` too, whose data were removed by ``audit.forget``."""
        return tuple(self.content.get("forgotten", ()))

    @property
    def mirror_axes(self) -> tuple[int, ...] | None:
        """The schedule's; where it names none, a given model's, else None for nnU-Net's choice."""
        axes = self.schedule.mirror_axes
        return tuple(self.content["mirror_axes"]) if axes is None and self.schedule.model else axes

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

    def results(self, step: int | str) -> Path:
        """Folder with the model folders of a step, of all variants."""
        return self.paths["nnUNet_results"] / self.dataset_name(step)

    def variant(self, method: str, seed: int | None) -> Variant:
        """The variant of a method's short name and a seed."""
        return Variant(method, resolve_method(method, self.schedule)[0], seed)

    def settings(self, variant: Variant) -> dict[str, Any]:
        """The method's coefficients, see ``schedule.METHOD_DEFAULTS``."""
        return {**self.schedule.method, **resolve_method(variant.method, self.schedule)[1]}

    def first_step(self, seed: int | None) -> Variant:
        """The variant whose step 1 all methods of this seed share."""
        return Variant(self.default_method, self.schedule.trainer, seed)

    def owner(self, variant: Variant, step: int | str) -> Variant:
        """The variant whose plans and model stand for a variant's step: step 1 is shared."""
        return self.first_step(variant.seed) if step == 1 else variant

    def steps_of(self, variant: Variant) -> list[int | str]:
        """Steps of which a variant has models, in order; joint has one."""
        return [JOINT] if variant.method == JOINT else [*range(1, self.n_steps + 1)]

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
        if step == 1 and self.schedule.model is not None:
            return self.results(1) / self.schedule.model.name
        owner = self.owner(variant, step)
        model = nnunet_api.model_folder_name(owner.trainer, self.plans_name(owner), self.schedule.configuration)
        return self.results(step) / model

    def trained(self, variant: Variant, step: int | str, fold: int | str) -> bool:
        """Whether a training has ended, with everything that comes after its last epoch."""
        folder = self.model_folder(variant, step) / f"fold_{fold}"
        if step == 1 and self.schedule.model is not None:
            return (folder / CHECKPOINT).is_file()
        return is_finished(folder)

    def _made(self, folder: Path) -> bool:
        step = read_step_file(folder)
        return step is not None and step["chain"] == self.schedule.name

    def check_not_foreign(self, folder: Path) -> None:
        """Refuse to write into a dataset folder that this chain did not make.

        Raises:
            FileExistsError: the folder exists and is not of this chain.
        """
        if not folder.exists() or not any(folder.iterdir()):
            return
        if not self._made(folder):
            step = read_step_file(folder)
            owner = "no chain" if step is None else f"chain {step['chain']!r}"
            raise FileExistsError(
                f"{folder}: got a dataset of {owner}, expected a free place for chain {self.schedule.name!r}. It is "
                "not touched. Set another `dataset_id` in the schedule."
            )


def read_chain(path: Path) -> dict[str, Any]:
    """Content of a ``chain.json``, see `Chain`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    content = read_json(path, CHAIN_EXPECTED)
    check_chain(content, path)
    return content


def _differences(key: str, then: Any, now: Any) -> Iterator[str]:
    """A line for each innermost key at which two parts of a schedule differ."""
    if isinstance(then, dict) and isinstance(now, dict):
        for name in sorted(set(then) | set(now)):
            yield from _differences(f"{key}: {name}", then.get(name), now.get(name))
    elif key == "steps" and len(then) == len(now):
        for number, pair in enumerate(zip(then, now, strict=True)):
            yield from _differences(f"steps[{number}]", *pair)
    elif then != now:
        yield f"{key}: chain {then}, schedule {now}"


def _without(content: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in keys}


def _free_ids(schedule: Schedule, count: int, abandoned: Set[str]) -> list[int]:
    """``count`` consecutive dataset numbers that nobody uses; from the given one on, if the schedule gives one."""
    folders = {number: names - abandoned for number, names in nnunet_api.taken_dataset_ids().items()}
    taken = _ids_of_other_chains(schedule.name) | {number: names for number, names in folders.items() if names}
    if schedule.dataset_id is not None:
        numbers = list(range(schedule.dataset_id, schedule.dataset_id + count))
        if numbers[-1] > LAST_ID:
            raise ValueError(
                f"{schedule.file}: dataset_id: got {schedule.dataset_id}, expected at most {LAST_ID + 1 - count}: the "
                f"chain takes {count} numbers and nnU-Net's end at {LAST_ID}."
            )
        if clash := sorted(name for number in numbers for name in taken.get(number, ())):
            raise ValueError(
                f"{schedule.file}: dataset_id: got {schedule.dataset_id}, expected {count} free numbers from there on, "
                f"but these exist: {clash}. They are not touched. Give another number or leave the key out."
            )
        return numbers
    first = FIRST_FREE_ID
    while any(number in taken for number in range(first, first + count)):
        first += 1
    if first + count - 1 > LAST_ID:
        raise ValueError(f"{schedule.file}: got no {count} free dataset numbers from {FIRST_FREE_ID} to {LAST_ID}.")
    return list(range(first, first + count))


def _ids_of_other_chains(name: str) -> dict[int, set[str]]:
    """Numbers that chains keep for datasets which they have not made yet."""
    files = nnunet_api.nnunet_paths()["nnUNet_results"].glob("chain_*/chain.json")
    others = [content for file in files if (content := read_chain(file))["name"] != name]
    return {
        number: {f"chain {content['name']}"} for content in others for number in [*content["datasets"], content[JOINT]]
    }
