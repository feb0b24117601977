"""Which images a step trains on and which are held out, and where the label values of each go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_cil import nnunet_api
from nnunet_cil.labels import cumulative_labels, remap_table, without_classes
from nnunet_cil.schedule import Schedule
from nnunet_cil.untrusted import dataset_json_of

ONE_CHANNEL_A_FILE = (
    "Files with several channels in each, as RGB or NIfTI of four dimensions, are not supported: split them into "
    "CASE_0000, CASE_0001, ..."
)


@dataclass(frozen=True)
class Case:
    """One subject of a step: its files, and where its own label values go.

    Args:
        table: own label value -> the step's (or the final) label value.
        labelled: target values that are labelled in this case; others are unknown in it, not absent.
    """

    name: str
    images: tuple[Path, ...]
    label: Path
    table: Mapping[int, int]
    labelled: tuple[int, ...]


def final_labels(schedule: Schedule, step: int, own: Mapping[str, Any]) -> dict[str, int]:
    """Cumulative labels of a step, with an ignore label behind them if the source declares one."""
    labels = cumulative_labels([s.classes for s in schedule.steps], step)
    return {**labels, "ignore": len(labels)} if "ignore" in own else labels


def step_source(schedule: Schedule, step: int) -> Path:
    """Raw dataset folder that a step's cases come from."""
    folder = schedule.steps[step - 1].dataset or schedule.source
    if folder is None:
        raise ValueError(f"{schedule.file}: steps[{step - 1}]: got no dataset and no source.")
    return folder


def first_source(schedule: Schedule) -> Path:
    """Raw dataset of the first step that the chain trains, whose channels and file type all data have."""
    return step_source(schedule, schedule.own_steps[0])


def step_cases(schedule: Schedule, step: int) -> list[Case]:
    """Training cases of a step, sorted by name; test subjects are never among them."""
    folder = step_source(schedule, step)
    own = dataset_json_of(folder)["labels"]
    new = schedule.steps[step - 1]
    table = step_table(schedule, step)
    unlabelled = schedule.unlabelled if new.dataset is None else new.unlabelled
    held_out = _held_out(schedule)
    listed = nnunet_api.training_cases(folder)
    names = [
        name
        for name in sorted(listed)
        if not any(path.is_file() and file_id(path) in held_out for path in listed[name][0])
    ]
    if schedule.train_subjects is not None and new.dataset is None:
        names = [name for name in names if name in set(schedule.train_subjects)]
    if new.dataset is None and schedule.images == "disjoint":
        names = disjoint_parts(names, len(schedule.steps), schedule.training.seed or 0)[step - 1]
    return [_case(name, *listed[name], table, own, unlabelled.get(name, ())) for name in names]


def step_table(schedule: Schedule, step: int) -> dict[int, int]:
    """Where a step's own label values go, in cases that lack none of them."""
    own = dataset_json_of(step_source(schedule, step))["labels"]
    new = schedule.steps[step - 1]
    class_map = new.class_map if new.class_map is not None else {name: name for name in new.classes}
    return remap_table(own, class_map, final_labels(schedule, step, own))


def _case(
    name: str,
    images: Sequence[Path],
    label: Path,
    table: Mapping[int, int],
    own: Mapping[str, int],
    unlabelled: Sequence[str],
) -> Case:
    """A case that lacks some of its dataset's own labels, by their names."""
    table = without_classes(table, [int(own[lacking]) for lacking in unlabelled])
    not_classes = {0, *(table[int(own[key])] for key in ("ignore",) if key in own)}
    return Case(name, tuple(images), label, table, tuple(sorted(set(table.values()) - not_classes)))


def joint_cases(schedule: Schedule) -> list[Case]:
    """All training cases with all labels: of a cut-up dataset, or of the steps' own where these say how (``joint``).

    Cases of a second dataset that have the name of an earlier one are named ``stepT_CASE``.

    Raises:
        ValueError: the steps have datasets of their own, in which the organs of other steps are not labelled.
    """
    if not schedule.has_joint:
        raise ValueError(
            f"{schedule.file}: --methods: got 'joint' for steps with datasets of their own, expected data that label "
            "all classes: in partly labelled images the other organs would be learned as background. Leave 'joint' "
            "out, or give each step a `joint` map from its dataset's labels to all classes."
        )
    if schedule.source is not None:
        together = replace(schedule.steps[0], classes=schedule.classes)
        return step_cases(replace(schedule, steps=(together,), images="shared"), 1)
    found: dict[str, Case] = {}
    files: set[Path] = set()
    for number in schedule.own_steps:
        step = schedule.steps[number - 1]
        together = replace(step, classes=schedule.classes, class_map=step.joint_map)
        for case in step_cases(replace(schedule, steps=(together,), model=None), 1):
            if (label := case.label.resolve()) not in files:
                name = case.name if case.name not in found else f"step{number}_{case.name}"
                found[name] = replace(case, name=name)
                files.add(label)
    return sorted(found.values(), key=lambda case: case.name)


def disjoint_parts(names: Sequence[str], n_parts: int, seed: int) -> list[list[str]]:
    """Deal subjects to steps: a seeded permutation cut into parts whose sizes differ by at most one; sorted in each."""
    order = np.random.default_rng(seed).permutation(len(names))
    return [sorted(names[i] for i in part) for part in np.array_split(order, n_parts)]


def held_out_cases(schedule: Schedule) -> dict[str, tuple[int, Case]]:
    """Test subjects by name, with the number of their test set; labels in the numbers of the last step.

    Raises:
        ValueError: a test set has no images, files of another type than the training data, or other channels.
        FileNotFoundError: a subject has no label.
    """
    target = final_labels(schedule, len(schedule.steps), {"ignore": None})
    reference = dataset_json_of(first_source(schedule))
    ending = reference["file_ending"]
    found: dict[str, tuple[int, Case]] = {}
    for number, test in enumerate(schedule.test):
        if test.dataset is not None and (own := dataset_json_of(test.dataset)["file_ending"]) != ending:
            raise ValueError(f"{test.dataset}: got files of type {own}, expected {ending} as the training data.")
        if test.dataset is not None and test.images.name == "imagesTr":
            listed = nnunet_api.training_cases(test.dataset)
        else:
            images = nnunet_api.image_lists(test.images, ending)
            listed = {case: (files, test.labels / f"{case}{ending}") for case, files in images.items()}
        wanted = sorted(listed) if test.subjects is None else test.subjects
        if missing := [case for case in wanted if case not in listed]:
            raise ValueError(f"{test.images}: got no images of test subjects {missing}, expected CASE_0000{ending}.")
        if not wanted:
            raise ValueError(f"{test.images}: got no test image, expected files such as CASE_0000{ending}.")
        table = remap_table(test.values, test.class_map, target)
        for case in wanted:
            files, label = listed[case]
            if not label.is_file():
                raise FileNotFoundError(f"{label}: got no file, expected the label of test image {files[0].name}.")
            if gone := [path for path in files if not path.is_file()]:
                raise FileNotFoundError(f"{gone[0]}: got no file, expected the image of test subject {case}.")
            if len(files) != len(reference["channel_names"]):
                raise ValueError(
                    f"{files[0]}: got {len(files)} images of this test subject, expected one for each of the channels "
                    f"{reference['channel_names']}. {ONE_CHANNEL_A_FILE}"
                )
            name = case if case not in found else f"set{number}_{case}"
            found[name] = (number, _case(name, files, label, table, test.values, test.unlabelled.get(case, ())))
    return found


def _held_out(schedule: Schedule) -> set[tuple[int, int]]:
    """Files of the test images, whatever their path or name."""
    return {file_id(path) for _, case in held_out_cases(schedule).values() for path in case.images}


def file_id(path: Path) -> tuple[int, int]:
    """The same for all paths and links of one file."""
    status = path.stat()
    return status.st_dev, status.st_ino
