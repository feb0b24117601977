"""The raw datasets that a schedule names: their labels, and which cases lack some of these."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_cil.labels import RESERVED, check_regions, read_unlabelled
from nnunet_cil.schedule.reading import Reading, is_int
from nnunet_cil.untrusted import EXPECTED_ENDING, EXPECTED_NAME, dataset_json_of, is_ending, is_name, read_json

UNLABELLED_FILES = ("unlabelled.csv", "unlabelled.json")
UNLABELLED = "a CSV with the columns case and class, or a JSON object of cases with lists of labels"
MAX_SHOWN = 100
"""Characters of a value in a message."""
MAX_SHOWN_DATASETS = 5
_CHANNEL_AND_ENDING = re.compile(r"_\d{4}(\.[A-Za-z0-9]{1,8}){1,3}$")


def dataset_of(reading: Reading, key: str, value: Any) -> Path | None:
    """A raw dataset by path, or by name or number in nnUNet_raw; checked to be one."""
    if is_int(value) or (is_name(value) and re.fullmatch(r"Dataset\d{3}_.+", value)):
        folder = _named_dataset(reading, key, value)
    else:
        folder = reading.path(key, value)
    if folder is None:
        return None
    if not folder.is_dir():
        reading.problem(key, f"no folder {folder}", f"a raw dataset{_raw_datasets()}")
        return None
    missing = [name for name in ("dataset.json", "imagesTr", "labelsTr") if not (folder / name).exists()]
    labels = labels_of(reading, key, folder) if "dataset.json" not in missing else None
    if missing and not (labels is not None and lists_files(folder) and "dataset.json" not in missing):
        reading.problem(key, f"{folder} without {', '.join(missing)}", "a raw dataset in nnU-Net's format")
        return None
    return folder if labels is not None else None


def _named_dataset(reading: Reading, key: str, value: str | int) -> Path | None:
    root = os.environ.get("nnUNet_raw")  # noqa: SIM112  (nnU-Net's spelling)
    if not root:
        reading.problem(key, f"{value!r} while nnUNet_raw is not set", "a path, or the variable nnUNet_raw")
        return None
    if is_int(value):
        found = sorted(Path(root).glob(f"Dataset{value:03d}_*"))
        if len(found) != 1:
            known = "" if found else _raw_datasets()
            reading.problem(key, f"{len(found)} datasets of number {value} in {root}", f"exactly one{known}")
            return None
        return found[0].absolute()
    return (Path(root) / value).absolute()


def _raw_datasets() -> str:
    """Which datasets ``nnUNet_raw`` has, or some of them; nothing where it has none or is not set."""
    root = os.environ.get("nnUNet_raw")  # noqa: SIM112  (nnU-Net's spelling)
    found = sorted(path.name for path in Path(root).glob("Dataset[0-9][0-9][0-9]_*")) if root else []
    more = len(found) - MAX_SHOWN_DATASETS
    shown = ", ".join(found[:MAX_SHOWN_DATASETS]) + (f" and {more} more" if more > 0 else "")
    return f"; nnUNet_raw has {shown}" if found else ""


def lists_files(folder: Path) -> bool:
    return "dataset" in dataset_json_of(folder)


def labels_of(reading: Reading, key: str, folder: Path) -> dict[str, int] | None:
    path, n_problems = folder / "dataset.json", len(reading.problems)
    try:
        content = read_json(path, "nnU-Net's dataset.json")
        labels = content.get("labels")
        values = _values_of(labels)
        if values is None and isinstance(labels, dict):
            check_regions(labels, str(path))
    except (OSError, ValueError) as error:
        reading.failed(key, error)
        return None
    if values is None:
        reading.problem(
            f"{key}: {path}: labels",
            _short(labels),
            'name: number as in nnU-Net v2 ({"background": 0, "liver": 1})',
        )
    elif values.get("background") != 0:
        reading.problem(f"{key}: {path}: labels", _short(labels), "background: 0 among them")
    elif len(set(values.values())) != len(values):
        reading.problem(key, f"{path} with a label value twice: {values}", "one value a label")
    if missing := [name for name in ("channel_names", "file_ending") if name not in content]:
        reading.problem(key, f"{path} without {', '.join(missing)}", "nnU-Net's dataset.json")
    else:
        try:
            _check_dataset_json(content)
        except ValueError as error:
            reading.problem(key, f"{path} without {error}", "nnU-Net's dataset.json")
    return values if len(reading.problems) == n_problems else None


def class_map_of(reading: Reading, key: str, value: Any, folder: Path | None) -> dict[str, str | None] | None:
    if isinstance(value, dict) and folder is not None:  # own labels may be given by number
        labels = dataset_json_of(folder)["labels"]
        names = {int(number): name for name, number in labels.items()}
        if unknown := [own for own in value if is_int(own) and own not in names]:
            known = ", ".join(f"{number} {name}" for number, name in names.items() if name not in RESERVED)
            reading.problem(key, f"the label {', '.join(map(str, unknown))}", f"one of {known}")
            return None
        owns = [names[own] if is_int(own) else own for own in value]
        if twice := sorted({str(own) for own in owns if owns.count(own) > 1}):
            reading.problem(key, f"the label {', '.join(twice)} twice, by number and by name", "each label once")
            return None
        value = dict(zip(owns, value.values(), strict=True))
    if isinstance(value, list):
        names = class_names_of(reading, key, value)
        if names is not None and len(set(names)) != len(names):
            reading.problem(key, f"a name twice in {names}", "each once")
        value = None if names is None else {name: name for name in names}
    elif not isinstance(value, dict) or not value:
        reading.problem(key, repr(value), "a list of class names, or a mapping of own names to class names or null")
        value = None
    elif bad := [
        k for k, v in value.items() if not isinstance(k, str) or not (v is None or (isinstance(v, str) and v))
    ]:
        reading.problem(key, f"{ {k: value[k] for k in bad} }", "own names mapped to class names or null")
        value = None
    elif reserved := {k: v for k, v in value.items() if k in RESERVED and v is not None}:
        reading.problem(key, f"{reserved}", "no class from background or ignore: they stay what they are")
        value = None
    if value is not None and folder is not None:
        check_own_names(reading, key, list(value), folder)
    return value


def class_names_of(reading: Reading, key: str, value: Any) -> list[str] | None:
    if isinstance(value, list) and any(map(is_int, value)):
        reading.problem(key, repr(value), "class names (text) such as liver, not label numbers")
        return None
    if not isinstance(value, list) or not value or not all(isinstance(name, str) and name for name in value):
        reading.problem(key, repr(value), "a list of at least one class name")
        return None
    return value


def check_own_names(reading: Reading, key: str, names: Sequence[str], folder: Path) -> None:
    labels = dataset_json_of(folder)["labels"]
    for name in names:
        if name not in labels:
            near = difflib.get_close_matches(name, labels, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            reading.problem(key, f"unknown class {name!r}{hint}", f"one of {sorted(set(labels) - set(RESERVED))}")


def unlabelled_of(reading: Reading, key: str, value: Any, folder: Path | None) -> dict[str, tuple[str, ...]]:
    """Own labels that cases of a raw dataset lack, by case: from the file that is named, or the dataset's own."""
    if folder is None:
        return {}
    own = [folder / name for name in UNLABELLED_FILES if (folder / name).is_file()]
    path = reading.file_beside(key, value, folder, UNLABELLED) if value is not None else own[0] if own else None
    cases = cases_in(folder / "imagesTr") | cases_in(folder / "imagesTs")
    if lists_files(folder):
        cases |= set(dataset_json_of(folder)["dataset"])
    return read_declared(reading, key, path, cases, labels_of(reading, key, folder) or {})


def read_declared(
    reading: Reading, key: str, path: Path | None, cases: set[str], labels: Mapping[str, int]
) -> dict[str, tuple[str, ...]]:
    """Own labels that cases lack, by case, of a file; none without one."""
    if path is None:
        return {}
    try:
        found = read_unlabelled(path)
    except (OSError, ValueError) as error:
        reading.problem(key, f"{path}: {error}", UNLABELLED)
        return {}
    if unknown := sorted(set(found) - cases):
        shown = f"{unknown[:5]}{' ...' * (len(unknown) > 5)}"
        reading.problem(key, f"{len(unknown)} cases that do not exist: {shown}", f"in {path} those of the dataset")
    names = {name: name for name in labels if name not in RESERVED}
    names = {str(labels[name]): name for name in names} | names  # a label may be given by its number
    if unknown := sorted({name for of_case in found.values() for name in of_case} - set(names)):
        reading.problem(key, f"unknown labels {unknown}", f"in {path} some of {sorted(set(labels) - set(RESERVED))}")
    return {case: tuple(names[name] for name in of_case if name in names) for case, of_case in found.items()}


def cases_in(images: Path) -> set[str]:
    """Names of the cases in a folder of images in nnU-Net's naming; none where there is no folder."""
    files = images.iterdir() if images.is_dir() else ()
    return {_CHANNEL_AND_ENDING.sub("", file.name) for file in files}


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
