"""A trained nnU-Net model that a chain starts from: a model folder, or a zip that holds one."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from nnunet_cil.labels import check_regions

CHECKPOINT = "checkpoint_final.pth"
PROTOTYPES = "prototypes.npz"
LINEAGE = "lineage.json"
MAX_JSON_BYTES = 100_000_000
MAX_BYTES = 50_000_000_000
_FOLD = re.compile(r"fold_(all|\d+)")


@dataclass(frozen=True)
class GivenModel:
    """What a model is, read without unpickling anything.

    Args:
        path: folder or zip.
        inner: the model folder within a zip, empty for a folder.
        name: of the model folder, ``TRAINER__PLANS__CONFIGURATION``.
        plans: its plans.json.
        dataset_json: its dataset.json.
        folds: with a finished checkpoint, ``"all"`` or numbers.
    """

    path: Path
    inner: str
    name: str
    plans: Mapping[str, Any]
    dataset_json: Mapping[str, Any]
    folds: tuple[int | str, ...]

    @property
    def configuration(self) -> str:
        """nnU-Net's configuration, from the folder's name."""
        return self.name.split("__")[2]

    @property
    def classes(self) -> tuple[str, ...]:
        """Foreground classes in the order of the network's outputs."""
        labels = {k: v for k, v in self.dataset_json["labels"].items() if k not in ("background", "ignore")}
        return tuple(sorted(labels, key=lambda name: int(labels[name])))

    def fold_for(self, fold: int | str) -> int | str:
        """The fold that teaches a training of ``fold``: the same one, or the only one there is.

        Raises:
            ValueError: it has neither.
        """
        if fold in self.folds:
            return fold
        if len(self.folds) == 1:
            return self.folds[0]
        raise ValueError(
            f"{self.path}: got a model with the folds {list(self.folds)}, expected fold {fold!r} among them. Set "
            "`fold` in the schedule to one that it has, or to a list of them."
        )

    def install(self, target: Path, folds: Sequence[int | str]) -> None:
        """Copy what a teacher needs into the model folder ``target``, as the folds that are asked for; whole or not."""
        partial = target.with_name(f".{target.name}.part")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, content in (("plans.json", self.plans), ("dataset.json", self.dataset_json)):
            (partial / name).write_text(json.dumps(content, indent=1) + "\n")
        for fold in folds:
            (partial / f"fold_{fold}").mkdir()
            for name in (CHECKPOINT, PROTOTYPES, LINEAGE):
                self._copy(f"fold_{self.fold_for(fold)}/{name}", partial / f"fold_{fold}" / name)
        os.replace(partial, target)

    def _copy(self, member: str, target: Path) -> None:
        with _opened(self.path, f"{self.inner}{member}") as source:
            if source is not None:
                with open(target, "wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)


@contextmanager
def _opened(path: Path, member: str) -> Iterator[IO[bytes] | None]:
    """A file of a folder or zip, None if there is none."""
    if path.is_dir():
        if not (path / member).is_file():
            yield None
            return
        with open(path / member, "rb") as file:
            yield file
        return
    with zipfile.ZipFile(path) as zipped:
        if member not in zipped.namelist():
            yield None
            return
        with zipped.open(member) as file:
            yield file


def read_model(path: Path) -> GivenModel:
    """Find and read the model in a folder or zip.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: no model in it or several, no finished fold, plans or labels that cannot be read, region-based
            labels, labels that are not 1..n, or a cascade's second stage.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: got nothing there, expected a model folder of nnU-Net or a zip.")
    names = _names(path)
    inner, name = _model_folder(path, names)
    plans, dataset_json = (_json(path, f"{inner}{file}") for file in ("plans.json", "dataset.json"))
    found = {m[1] for each in names if each.startswith(inner) and (m := _fold_of(each[len(inner) :]))}
    folds = tuple(sorted((f if f == "all" else int(f) for f in found), key=str))
    if not folds:
        raise ValueError(f"{path}: got no fold_X/{CHECKPOINT} in {name}, expected a finished training.")
    labels = dataset_json.get("labels", {})
    check_regions(labels, f"dataset.json of {path}")
    values = sorted(int(value) for key, value in labels.items() if key not in ("background", "ignore"))
    if not values or values != list(range(1, len(values) + 1)):
        raise ValueError(f"{path}: got the labels {labels}, expected foreground labels 1, 2, ... as nnU-Net has them.")
    model = GivenModel(path, inner, name, plans, dataset_json, folds)
    known = sorted(plans.get("configurations", {}))
    if model.configuration not in known:
        raise ValueError(
            f"{path}: got a model folder {name} whose configuration is not among {known} of its plans, expected "
            "TRAINER__PLANS__CONFIGURATION as nnU-Net names it."
        )
    check_no_cascade(plans, model.configuration, str(path))
    if plans.get("plans_name") != name.split("__")[1]:
        raise ValueError(f"{path}: got plans named {plans.get('plans_name')!r} in {name}, expected those of its name.")
    return model


def check_no_cascade(plans: Mapping[str, Any], configuration: str, where: str) -> None:
    """Refuse a configuration that builds on the segmentations of another one.

    Raises:
        ValueError: it is a cascade's second stage, itself or by inheritance.
    """
    configurations, name = plans["configurations"], configuration
    for _ in configurations:
        settings = configurations.get(name, {})
        if stage := settings.get("previous_stage"):
            raise ValueError(
                f"{where}: got the configuration {configuration}, which needs the segmentations of {stage}, expected "
                "one without a previous stage. Cascades are not supported, as their input grows with the classes too: "
                "take 3d_lowres or 3d_fullres."
            )
        name = settings.get("inherits_from")


def _names(path: Path) -> list[str]:
    """Files below a folder (two levels) or in a zip, with ``/``."""
    if path.is_dir():
        found = [*path.glob("*"), *path.glob("*/*")]
        return [each.relative_to(path).as_posix() for each in found if each.is_file()]
    try:
        with zipfile.ZipFile(path) as zipped:
            entries = zipped.infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path}: got no zip ({error}), expected a model folder or an exported model.") from error
    if (size := sum(entry.file_size for entry in entries)) > MAX_BYTES:
        raise ValueError(f"{path}: got a zip of {size} bytes unpacked, expected at most {MAX_BYTES}.")
    return [entry.filename for entry in entries]


def _model_folder(path: Path, names: Sequence[str]) -> tuple[str, str]:
    """Where the model lies within a zip, and the name of its folder."""
    inner = sorted({name[: -len("plans.json")] for name in names if PurePosixPath(name).name == "plans.json"})
    if path.is_dir():
        inner = [each for each in inner if not each]
    if len(inner) != 1:
        raise ValueError(
            f"{path}: got {len(inner)} folders with a plans.json, expected one model: the folder "
            "TRAINER__PLANS__CONFIGURATION in nnUNet_results, or a zip with one."
        )
    name = path.resolve().name if path.is_dir() else PurePosixPath(inner[0]).name
    if len(name.split("__")) != 3 or not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"{path}: got a model folder named {name!r}, expected TRAINER__PLANS__CONFIGURATION.")
    return inner[0], name


def _fold_of(name: str) -> re.Match[str] | None:
    folder, _, file = name.partition("/")
    return _FOLD.fullmatch(folder) if file == CHECKPOINT else None


def _json(path: Path, member: str) -> dict[str, Any]:
    with _opened(path, member) as file:
        if file is None:
            raise ValueError(f"{path}: got no {member}, expected nnU-Net's file of that name beside the folds.")
        text = file.read(MAX_JSON_BYTES + 1)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: got a {member} that is no JSON ({error}), expected nnU-Net's own.") from error
    if len(text) > MAX_JSON_BYTES or not isinstance(content, dict):
        raise ValueError(f"{path}: got a {member} that is too large or no JSON object, expected nnU-Net's own.")
    return content
