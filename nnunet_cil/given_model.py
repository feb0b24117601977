"""A trained nnU-Net model that a chain starts from: a model folder, or a zip that holds one."""

from __future__ import annotations

import re
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from nnunet_cil.labels import RESERVED, check_regions, classes_of
from nnunet_cil.step_files import CHECKPOINT, LINEAGE_FILE, PROTOTYPE_FILE, whole_folder, write_json
from nnunet_cil.untrusted import (
    EXPECTED_ENDING,
    EXPECTED_NAME,
    EXPECTED_PART,
    MAX_MODEL_JSON_BYTES,
    is_ending,
    is_name,
    is_part,
    parse_json,
)

MAX_BYTES = 50_000_000_000
MAX_RATIO = 100  # of what a zip unpacks to; weights hardly shrink
SMALL_BYTES = 100_000_000  # below which the ratio does not matter
DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError)
"""What reading a damaged zip raises."""
_FOLD = re.compile(r"fold_(all|0|[1-9][0-9]{0,3})")


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
        return classes_of(self.dataset_json["labels"])

    def fold_for(self, fold: int | str) -> int | str:
        """The fold that teaches a training of ``fold``: the same one, or the only one there is.

        Raises:
            ValueError: it has neither.
        """
        if fold in self.folds:
            return fold
        if len(self.folds) == 1:
            return self.folds[0]
        folds, first = " ".join(map(str, self.folds)), self.folds[0]
        raise ValueError(
            f"{self.path}: got a model with the folds {list(self.folds)}, expected fold {fold!r} among them. Choose "
            f"one of them to start from, `model_fold: {first}` in the schedule (--model-fold {first} of `nnunet-cil "
            f"extend`), or set `fold` (--fold) to folds that it has: --fold {folds} trains each from its own."
        )

    def has_prototypes(self, fold: int | str) -> bool:
        """Whether prototypes lie beside the checkpoint that teaches ``fold``; they also say what is in one piece."""
        with _opened(self.path, f"{self.inner}fold_{self.fold_for(fold)}/{PROTOTYPE_FILE}") as file:
            return file is not None

    def install(
        self, target: Path, folds: Sequence[int | str], check: Callable[[Path], Any] = lambda checkpoint: None
    ) -> None:
        """Copy what a teacher needs into the model folder ``target``, as the folds that are asked for; whole or not.

        Args:
            check: is called with each checkpoint before the folder gets its name.

        Raises:
            ValueError: it cannot be read, or ``check`` raises it; nothing is left behind.
        """
        with whole_folder(target) as partial:
            for name, content in (("plans.json", self.plans), ("dataset.json", self.dataset_json)):
                write_json(partial / name, content)
            for fold in folds:
                (partial / f"fold_{fold}").mkdir()
                for name in (CHECKPOINT, PROTOTYPE_FILE, LINEAGE_FILE):
                    self._copy(f"fold_{self.fold_for(fold)}/{name}", partial / f"fold_{fold}" / name)
                check(partial / f"fold_{fold}" / CHECKPOINT)

    def _copy(self, member: str, target: Path) -> None:
        with _opened(self.path, f"{self.inner}{member}") as source:
            if source is not None:
                with open(target, "wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)


@contextmanager
def _opened(path: Path, member: str) -> Iterator[IO[bytes] | None]:
    """A file of a folder or zip, None if there is none. Raises as `opened_zip`."""
    with nullcontext() if path.is_dir() else opened_zip(path) as zipped:
        found = path / member if zipped is None else zipfile.Path(zipped, member)
        with found.open("rb") if found.is_file() else nullcontext() as file:
            yield file


@contextmanager
def opened_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip from elsewhere, whose entries are checked before anything is read.

    Raises:
        ValueError: it is none or damaged, also where it is read meanwhile; an entry leads out of the zip's folder, is
            no plain file, is encrypted, or stands there twice; or it is far larger unpacked.
    """
    with ExitStack() as stack:
        try:
            zipped = stack.enter_context(zipfile.ZipFile(path))
            if (problem := _problem_of(zipped.infolist(), path.stat().st_size)) is None:
                for entry in zipped.infolist():
                    zipped.open(entry).close()
        except (*DAMAGED, OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path}: got no zip ({error}), expected a model folder or an exported model.") from error
        if problem:
            raise ValueError(f"{path}: got a zip {problem}. Do not use it: nothing of it was unpacked.")
        try:
            yield zipped
        except DAMAGED as error:
            raise ValueError(f"{path}: got a damaged zip ({error}), expected an exported model.") from error


def _problem_of(entries: Sequence[zipfile.ZipInfo], packed: int) -> str | None:
    """What speaks against unpacking them; None if nothing does."""
    for entry in entries:
        name, kind = entry.orig_filename, stat.S_IFMT(entry.external_attr >> 16)
        if {"", ".", ".."} & set(name.removesuffix("/").split("/")) or re.search(r"[\\\0]|^[A-Za-z]:", name):
            return f"with the entry {name!r}, expected names that stay in its folder"
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            return f"with {name!r}, a link or device, expected files and folders only"
        if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            return f"with {name!r} encrypted or packed by another method than deflate, expected neither"
    names = [entry.filename for entry in entries]
    if len(set(names)) != len(names):
        return f"with {max(names, key=names.count)!r} twice, expected each file once"
    size = sum(entry.file_size for entry in entries)
    if size > MAX_BYTES or size > max(SMALL_BYTES, MAX_RATIO * packed):
        return f"of {size} bytes unpacked from {packed}, expected at most {MAX_BYTES}, and {MAX_RATIO} times as many"
    return None


def read_model(path: Path) -> GivenModel:
    """Find and read the model in a folder or zip.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: no model in it or several, no finished fold, plans or labels that cannot be read, region-based
            labels, labels that are not 1..n, names that lead out of their folder, a zip that `opened_zip` refuses, or
            a cascade's second stage.
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
    _check_dataset_json(path, dataset_json)
    model = GivenModel(path, inner, name, plans, dataset_json, folds)
    check_plans(plans, str(path))
    if model.configuration not in plans["configurations"]:
        raise ValueError(
            f"{path}: got a model folder {name} whose configuration is not among {sorted(plans['configurations'])} of "
            "its plans, expected TRAINER__PLANS__CONFIGURATION as nnU-Net names it."
        )
    check_no_cascade(plans, model.configuration, str(path))
    if plans.get("plans_name") != name.split("__")[1]:
        raise ValueError(f"{path}: got plans named {plans.get('plans_name')!r} in {name}, expected those of its name.")
    return model


def _check_dataset_json(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse a dataset.json without nnU-Net's labels, or with other channels or file ending than it has.

    Raises:
        ValueError: see `read_model`.
    """
    labels = content.get("labels")
    values: list[str] = []
    if isinstance(labels, dict):
        check_regions(labels, f"dataset.json of {path}")
        values = [str(value) for key, value in labels.items() if key not in RESERVED]
    if not values or set(values) != {str(n) for n in range(1, len(values) + 1)}:
        raise ValueError(f"{path}: got the labels {labels}, expected foreground labels 1, 2, ... as nnU-Net has them.")
    channels, ending = content.get("channel_names", {}), content.get("file_ending", ".nii.gz")
    if not isinstance(channels, dict) or not all(key.isdecimal() for key in channels):
        raise ValueError(f"{path}: got the channel_names {channels!r}, expected names by number in its dataset.json.")
    if not is_ending(ending):
        raise ValueError(f"{path}: got the file_ending {ending!r}, expected {EXPECTED_ENDING} in its dataset.json.")


def check_plans(plans: Mapping[str, Any], where: str) -> None:
    """Refuse plans without configurations, or whose names, of which nnU-Net makes folders, lead out of these.

    Raises:
        ValueError: as it says.
    """
    configurations = plans.get("configurations")
    if not isinstance(configurations, dict) or not all(isinstance(each, dict) for each in configurations.values()):
        raise ValueError(f"{where}: got plans without configurations, expected those of nnU-Net.")
    named = [("plans_name", plans.get("plans_name")), *(("configurations", name) for name in configurations)]
    for settings in configurations.values():
        named += [(key, settings[key]) for key in ("data_identifier", "inherits_from") if key in settings]
    for key, value in named:
        if not is_name(value):
            raise ValueError(f"{where}: got plans with {key} {value!r}, expected {EXPECTED_NAME}.")
        if key in ("plans_name", "configurations") and not is_part(value):
            raise ValueError(f"{where}: got plans with {key} {value!r}, expected {EXPECTED_PART}. Change it there.")


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
    with opened_zip(path) as zipped:
        return zipped.namelist()


def _model_folder(path: Path, names: Sequence[str]) -> tuple[str, str]:
    """Where the model lies within a zip, and the name of its folder."""
    inner = sorted({name[: -len("plans.json")] for name in names if PurePosixPath(name).name == "plans.json"})
    if path.is_dir():
        inner = [each for each in inner if not each]
    elif len(inner) > 1:  # nnUNetv2_export_model_to_zip -exp_cv_preds packs plans beside the predictions, too
        inner = [each for each in inner if len(PurePosixPath(each).name.split("__")) == 3]
    if len(inner) != 1:
        raise ValueError(
            f"{path}: got {len(inner)} folders with a plans.json, expected one model: the folder "
            "TRAINER__PLANS__CONFIGURATION in nnUNet_results, or a zip with one."
        )
    name = path.resolve().name if path.is_dir() else PurePosixPath(inner[0]).name
    if len(name.split("__")) != 3 or not re.fullmatch(r"[\w.-]+", name) or not is_name(name):
        raise ValueError(f"{path}: got a model folder named {name!r}, expected TRAINER__PLANS__CONFIGURATION.")
    return inner[0], name


def _fold_of(name: str) -> re.Match[str] | None:
    folder, _, file = name.partition("/")
    return _FOLD.fullmatch(folder) if file == CHECKPOINT else None


def _json(path: Path, member: str) -> dict[str, Any]:
    with _opened(path, member) as file:
        if file is None:
            raise ValueError(f"{path}: got no {member}, expected nnU-Net's file of that name beside the folds.")
        text = file.read(MAX_MODEL_JSON_BYTES + 1)
    return parse_json(text, f"{path}: {member}", "nnU-Net's own", MAX_MODEL_JSON_BYTES)
