"""Which subjects are held out for scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_cil.labels import RESERVED
from nnunet_cil.schedule.content import Step, TestSet
from nnunet_cil.schedule.raw_datasets import (
    UNLABELLED,
    cases_in,
    class_map_of,
    dataset_of,
    labels_of,
    lists_files,
    read_declared,
    unlabelled_of,
)
from nnunet_cil.schedule.reading import Reading
from nnunet_cil.untrusted import dataset_json_of, is_name, read_json

Declared = Mapping[Path | None, Mapping[str, tuple[str, ...]]]


def test_sets_of(
    reading: Reading, value: Any, source: Path | None, steps: tuple[Step, ...], declared: Declared
) -> tuple[tuple[TestSet, ...], tuple[str, ...] | None]:
    """The test sets, and the training subjects if a split file names them.

    Args:
        declared: own labels that cases of the training data lack, by dataset and case; what holds there holds here.
    """
    train: tuple[str, ...] | None = None
    if value is None:
        return (), None
    if isinstance(value, str) and value.endswith(".json"):
        value, train = _split_file(reading, value, source)
        if value is None:
            return (), None
    classes = tuple(name for step in steps for name in step.classes)
    entries = value if isinstance(value, list) and not all(isinstance(v, str) for v in value) else [value]
    sets = [_test_set(reading, entry, source, classes, declared) for entry in entries]
    if train is not None and source is not None:
        _subjects(reading, "test: train", train, source / "imagesTr", source)
    return tuple(s for s in sets if s is not None), train


def _split_file(reading: Reading, value: str, source: Path | None) -> tuple[list[str] | None, tuple[str, ...] | None]:
    path = reading.file_beside("test", value, source, "a JSON file with the key 'test', and maybe 'train'")
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
        reading.problem("test", f"{path}: {error}", "a JSON object with the key 'test' (names), and maybe 'train'")
        return None, None
    if both := sorted(set(test) & set(train or ())):
        reading.problem("test", f"{both} as test and as training subjects", "each in one of the two")
    return test, None if train is None else tuple(train)


def _test_set(
    reading: Reading, entry: Any, source: Path | None, classes: tuple[str, ...], declared: Declared
) -> TestSet | None:
    subjects = class_map = unlabelled_file = None
    if isinstance(entry, list):
        if source is None:
            if reading.raw.get("source") is None:  # else what is wrong with it is told already
                reading.problem("test", "subjects without a source", "a dataset, or {images: .., labels: ..}")
            return None
        folder, subjects = source, entry
    elif isinstance(entry, dict) and "images" in entry:
        return _folder_pair(reading, entry, source, classes)
    elif isinstance(entry, dict):
        reading.known_keys("test: ", entry, ("dataset", "subjects", "classes", "unlabelled"))
        folder = dataset_of(reading, "test: dataset", entry.get("dataset"))
        subjects, unlabelled_file = entry.get("subjects"), entry.get("unlabelled")
        if "classes" in entry:
            class_map = class_map_of(reading, "test: classes", entry["classes"], folder)
    else:
        folder = dataset_of(reading, "test", entry)
    if folder is None:
        return None
    part = "Ts" if subjects is None and all((folder / f"{n}Ts").is_dir() for n in ("images", "labels")) else "Tr"
    values = labels_of(reading, "test", folder) or {}
    if class_map is None:
        class_map = {name: name for name in values if name in classes}
    _check_targets(reading, class_map, classes)
    if subjects is not None:
        subjects = _subjects(reading, "test", subjects, folder / f"images{part}", folder)
    if unlabelled_file is None and folder.resolve() in declared:
        unlabelled = declared[folder.resolve()]
    else:
        unlabelled = unlabelled_of(reading, "test: unlabelled", unlabelled_file, folder)
    images, labels = folder / f"images{part}", folder / f"labels{part}"
    return TestSet(images, labels, class_map, values, folder, subjects, unlabelled)


def _folder_pair(reading: Reading, entry: Mapping, source: Path | None, classes: tuple[str, ...]) -> TestSet | None:
    reading.known_keys("test: ", entry, ("images", "labels", "classes", "unlabelled"))
    folders = [reading.path(f"test: {key}", entry.get(key)) for key in ("images", "labels")]
    for key, folder in zip(("images", "labels"), folders, strict=True):
        if folder is not None and not folder.is_dir():
            reading.problem(f"test: {key}", f"no folder {folder}", f"the folder of the test {key}")
    values = labels_of(reading, "source", source) if source is not None else None
    values = values or {"background": 0, **{name: value for value, name in enumerate(classes, 1)}}
    class_map = class_map_of(reading, "test: classes", entry["classes"], None) if "classes" in entry else None
    class_map = class_map or {name: name for name in values if name in classes}
    is_known = source is not None or reading.raw.get("source") is None
    if is_known and (unknown := sorted(set(class_map) - set(values))):
        reading.problem("test: classes", f"unknown labels {unknown}", f"some of {sorted(set(values) - set(RESERVED))}")
    _check_targets(reading, class_map, classes)
    if folders[0] is None or folders[1] is None:
        return None
    given = entry.get("unlabelled")
    path = reading.file_beside("test: unlabelled", given, folders[0], UNLABELLED) if given is not None else None
    unlabelled = read_declared(reading, "test: unlabelled", path, cases_in(folders[0]), values)
    return TestSet(folders[0], folders[1], class_map, values, unlabelled=unlabelled)


def _check_targets(reading: Reading, class_map: Mapping[str, str | None], classes: Sequence[str]) -> None:
    if unknown := sorted({name for name in class_map.values() if name is not None and name not in classes}):
        reading.problem("test: classes", f"{unknown}", f"classes of the steps: {list(classes)}")
    if classes and not any(name is not None for name in class_map.values()):
        reading.problem("test", "no class of the steps", f"labels of some of {list(classes)}")


def _subjects(reading: Reading, key: str, subjects: Any, images: Path, folder: Path) -> tuple[str, ...] | None:
    if not isinstance(subjects, (list, tuple)) or not subjects or not all(isinstance(s, str) for s in subjects):
        reading.problem(f"{key}: subjects", repr(subjects), "a list of subject names")
        return None
    ending = dataset_json_of(folder)["file_ending"]
    missing = [s for s in subjects if not (is_name(s) and (images / f"{s}_0000{ending}").is_file())]
    if missing and not lists_files(folder):
        shown = f"{missing[:5]}{' ...' * (len(missing) > 5)}"
        reading.problem(key, f"{len(missing)} subjects that do not exist: {shown}", f"names from {images}")
    if twice := sorted({s for s in subjects if list(subjects).count(s) > 1}):
        reading.problem(key, f"{twice} twice", "each subject once")
    return tuple(subjects)
