"""A step's nnU-Net dataset: which cases, which labels, whose plans.

``prepare_chain`` turns a schedule into ``DatasetNNN_NAME_stepT`` folders in nnUNet_raw and nnUNet_preprocessed. All
sources are read and checked before anything is written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK

from nnunet_cil import nnunet_api
from nnunet_cil.block import BLOCK_KEY, StepBlock
from nnunet_cil.chain import JOINT, Chain, Variant
from nnunet_cil.checkpoint import read_checkpoint
from nnunet_cil.intensity import set_intensity, warn_of_clipping
from nnunet_cil.labels import apply_remap, cumulative_labels, remap_table, without_classes
from nnunet_cil.parallel import over_cases
from nnunet_cil.plan_override import apply_override
from nnunet_cil.schedule import Schedule, kept_source
from nnunet_cil.step_files import STEP_FILE, count_whole_cases, read_step_file, write_json
from nnunet_cil.teacher import inherited_from
from nnunet_cil.untrusted import dataset_json_of, read_json

logger = logging.getLogger(__name__)

SPACING_TOLERANCE = 1e-3
DIRECTION_TOLERANCE = 0.5  # of direction cosines: another order or sign of the axes, no rounding
FILES_FILE = "files.json"
WITH_DIRECTIONS = (".nii.gz", ".nii", ".nrrd", ".mha")  # file types that say where the axes lead
SHOWN_CASES = 5  # in a warning
INTENSITY_SAMPLES = 10**8  # in all of step 1, as nnU-Net takes them
INTENSITY_SAMPLES_LATER = 10**4  # in each case of a later step: nothing is planned from these


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
    table = _step_table(schedule, step)
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


def _step_table(schedule: Schedule, step: int) -> dict[int, int]:
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
            if case.label not in files:
                name = case.name if case.name not in found else f"step{number}_{case.name}"
                found[name] = replace(case, name=name)
                files.add(case.label)
    return sorted(found.values(), key=lambda case: case.name)


def disjoint_parts(names: Sequence[str], n_parts: int, seed: int) -> list[list[str]]:
    """Deal subjects to steps: a seeded permutation cut into parts whose sizes differ by at most one; sorted in each."""
    order = np.random.default_rng(seed).permutation(len(names))
    return [sorted(names[i] for i in part) for part in np.array_split(order, n_parts)]


def test_cases(schedule: Schedule) -> dict[str, tuple[int, Case]]:
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
            if len(files) != len(reference["channel_names"]):
                raise ValueError(
                    f"{files[0]}: got {len(files)} images of this test subject, expected one for each of the channels "
                    f"{reference['channel_names']}."
                )
            name = case if case not in found else f"set{number}_{case}"
            found[name] = (number, _case(name, files, label, table, test.values, test.unlabelled.get(case, ())))
    return found


def _held_out(schedule: Schedule) -> set[tuple[int, int]]:
    """Files of the test images, whatever their path or name."""
    return {file_id(path) for _, case in test_cases(schedule).values() for path in case.images}


def file_id(path: Path) -> tuple[int, int]:
    """The same for all paths and links of one file."""
    status = path.stat()
    return status.st_dev, status.st_ino


@dataclass(frozen=True)
class Scan:
    """What one reading of a case's files gave.

    Args:
        counts: voxels by own label value.
        problem: what is wrong with the files, None if nothing.
        crop: None if there is a problem.
        intensities: of the foreground of each step that has this case, by channel.
        digest: of a test subject, see `_scan_test`.
        axes: where the three axes of the voxels lead, such as ``LPS``; "" where the file does not say it.
    """

    counts: Mapping[int, int] = field(default_factory=dict)
    problem: str | None = None
    crop: nnunet_api.Crop | None = None
    intensities: Mapping[int | str, Sequence[np.ndarray]] = field(default_factory=dict)
    digest: str = ""
    axes: str = ""


def _read(case: Case, dataset_json: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """A case's images (C, *spatial), its segmentation in its own label values (1, *spatial), and the spacing in mm.

    Raises:
        ValueError: files are missing, damaged, of different grids, not finite, or with unknown label values.
    """
    for path in case.images:
        if not path.is_file():
            raise ValueError(f"{path}: got no file, expected the image of label {case.label.name}.")
    if not case.images:
        raise ValueError(f"{case.label}: got no image for this label, expected {case.name}_0000 in imagesTr.")
    if not case.label.is_file():
        raise ValueError(f"{case.label}: got no file, expected the label of image {case.images[0].name}.")
    n_channels = len(dataset_json["channel_names"])
    if len(case.images) != n_channels:
        raise ValueError(
            f"{case.name}: got {len(case.images)} images, expected one for each of the {n_channels} channel_names of "
            "dataset.json."
        )
    try:
        difference = _grid_difference(case.images, case.label)
        reader = nnunet_api.reader_writer(dataset_json, case.label)
        if not difference:
            images, properties = reader.read_images([str(path) for path in case.images])
            seg, _ = reader.read_seg(str(case.label))
            for path in (*case.images, case.label):
                nnunet_api.read_to_the_end(path)
    except Exception as error:
        raise ValueError(
            f"{case.label}: got an unreadable image or label ({error}), expected files nnU-Net can read."
        ) from error
    if difference:
        raise ValueError(f"{case.label}: {difference}")
    if images.shape[1:] != seg.shape[1:]:
        raise ValueError(f"{case.label}: got size {seg.shape[1:]}, expected {images.shape[1:]} as the image.")
    if not np.isfinite(images).all() or any(map(_hides_not_finite, case.images)):
        raise ValueError(f"{case.images[0]}: got voxels that are not finite (NaN or infinite), expected numbers.")
    if unknown := [int(v) if v == int(v) else v for v in np.unique(seg).tolist() if v not in case.table]:
        raise ValueError(
            f"{case.label}: got label values {unknown}, expected only {sorted(case.table)} of dataset.json."
        )
    return images, seg, tuple(properties["spacing"])


def _scan(case: Case, dataset_json: dict[str, Any], wanted: Mapping[int | str, tuple[Mapping[int, int], int]]) -> Scan:
    """Read one case's files, once for all steps; never raises.

    Args:
        wanted: step -> where the own label values go in it, and how many intensities to sample.
    """
    try:
        images, seg, spacing = _read(case, dataset_json)
    except ValueError as error:
        return Scan(problem=str(error))
    images, seg, crop = nnunet_api.crop_case(images, seg, spacing)
    values, counts = np.unique(seg[seg >= 0], return_counts=True)
    found = dict(zip(values.tolist(), counts.tolist(), strict=True))
    intensities = {
        step: nnunet_api.foreground_intensities(images, apply_remap(seg, {-1: 0, **table}), n_samples)
        for step, (table, n_samples) in wanted.items()
    }
    return Scan(found, None, crop, intensities, axes=_axes(case))


def _scan_test(case: Case, dataset_json: dict[str, Any]) -> Scan:
    """Read a test subject's files; never raises. The digest is of what scores depend on: voxels, labels and spacing.

    Files that hold the same, compressed in another way, have the same digest.
    """
    try:
        images, seg, spacing = _read(case, dataset_json)
    except ValueError as error:
        return Scan(problem=str(error))
    digest = hashlib.sha256(repr((images.shape, [round(float(each), 6) for each in spacing])).encode())
    digest.update(np.ascontiguousarray(images, np.float32))
    digest.update(np.ascontiguousarray(apply_remap(seg, case.table), np.int16))
    return Scan(digest=digest.hexdigest(), axes=_axes(case))


def scan_test_set(schedule: Schedule) -> dict[str, Scan]:
    """Read every test image and label once; by name of the subject."""
    if not schedule.test:
        return {}
    own, cases = dataset_json_of(first_source(schedule)), test_cases(schedule)
    n_bytes = bytes_of([path for _, case in cases.values() for path in case.images])
    todo = [(case, own) for _, case in cases.values()]
    return dict(zip(cases, over_cases(_scan_test, todo, n_bytes, "checking the test subjects"), strict=True))


def _axes(case: Case) -> str:
    if not case.label.name.endswith(WITH_DIRECTIONS):
        return ""
    direction = _header(case.label).GetDirection()
    return SimpleITK.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(direction) if len(direction) == 9 else ""


def warn_of_axes(schedule: Schedule, scans: Mapping[Path, Scan], tested: Mapping[str, Scan]) -> None:
    """Warn of images that are stored along different axes: to a network, some of them are mirrored or turned.

    Nothing is said where the reader of the plans turns all images the same way.
    """
    if schedule.model is not None:
        reader = schedule.model.plans.get("image_reader_writer")
    elif schedule.base_plans is not None:
        reader = read_json(schedule.base_plans, "a plans.json of nnU-Net").get("image_reader_writer")
    else:
        reader = dataset_json_of(first_source(schedule)).get("overwrite_image_reader_writer")
    if "Reorient" in str(reader):
        return
    found: dict[str, list[str]] = {}
    for name, scan in (*((path.name, scan) for path, scan in scans.items()), *tested.items()):
        if scan.axes:
            found.setdefault(scan.axes, []).append(name)
    if len(found) > 1:
        shown = "; ".join(f"{len(of)} along {axes}: {_shown(of)}" for axes, of in found.items())
        logger.warning(
            "%s: got images that are stored along different axes, expected the same for all: %s. nnU-Net takes voxels "
            "in the order of the file, so left and right, or head and feet, change places between them. Give "
            '"overwrite_image_reader_writer": "NibabelIOWithReorient" in each dataset.json, or store all in one way.',
            schedule.file,
            shown,
        )


def _problems(scans: Iterable[Scan]) -> list[str]:
    return list(dict.fromkeys(scan.problem for scan in scans if scan.problem))


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise ValueError("the data do not fit the schedule; nothing was written:\n  " + "\n  ".join(problems))


def _hides_not_finite(path: Path) -> bool:
    """Whether a NIfTI image has voxels that are not finite: SimpleITK takes them for 0 without a word."""
    if not path.name.endswith((".nii.gz", ".nii")):
        return False
    image = nibabel.load(path)
    return image.get_data_dtype().kind == "f" and not np.isfinite(image.dataobj.get_unscaled()).all()


def _header(path: Path) -> SimpleITK.ImageFileReader:
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader


def _grid_difference(images: Sequence[Path], label: Path) -> str:
    if not label.name.endswith(WITH_DIRECTIONS):
        return ""
    headers = [(h.GetSize(), h.GetSpacing(), h.GetDirection()) for h in map(_header, (label, *images))]
    for path, (size, spacing, direction) in zip(images, headers[1:], strict=True):
        if size != headers[0][0]:
            return f"got size {headers[0][0]}, expected {size} as {path.name}."
        if not np.allclose(spacing, headers[0][1], rtol=SPACING_TOLERANCE):
            return f"got spacing {headers[0][1]} mm, expected {spacing} mm as {path.name}."
        if not np.allclose(direction, headers[0][2], rtol=0, atol=DIRECTION_TOLERANCE):
            return f"got axes along {headers[0][2]}, expected {direction} as {path.name}: voxels are compared by index."
    return ""


def check_sources(
    schedule: Schedule, cases: Mapping[int | str, Sequence[Case]], tested: Mapping[str, Scan] | None = None
) -> dict[Path, Scan]:
    """Read every image and label once and check them; returns what was found, by label file.

    Args:
        cases: by step, and of ``"joint"`` if that is to be trained.
        tested: what `scan_test_set` found, to be refused along with the rest.

    Raises:
        ValueError: all problems at once: images without labels and the reverse, label values that dataset.json does not
            have, grids that differ, voxels that are not finite, an image twice, a step without cases or without any
            voxel of one of its classes, or a fold of it.
    """
    scans = _scan_all(schedule, cases)
    problems = _problems([*scans.values(), *(tested or {}).values()])
    own_steps = [of_step for step, of_step in cases.items() if step != JOINT]
    problems += dict.fromkeys(problem for of_step in own_steps for problem in _same_images(of_step))
    first = dataset_json_of(first_source(schedule))
    problems += _differences_to_model(schedule, first)
    for step in [step for step in schedule.own_steps if step in cases]:
        folder = step_source(schedule, step)
        for key in ("channel_names", "file_ending"):
            if (got := dataset_json_of(folder)[key]) != first[key]:
                problems.append(f"{folder / 'dataset.json'}: {key}: got {got}, expected {first[key]} as in step 1.")
        problems += [p for p in _labels_without_images(folder) if p not in problems]
        found = [scans[case.label] for case in cases[step]]
        where = f"{schedule.file}: steps[{step - 1}]"
        if not found:
            n_dealt = sum(len(of_step) for step, of_step in cases.items() if step != JOINT)
            problems.append(
                f"{where}: got no training case, as `images: disjoint` deals {n_dealt} training subjects to "
                f"{len(schedule.steps)} steps, expected at least one a step. Set `images: shared`, or take fewer steps."
                if n_dealt and schedule.source is not None and schedule.images == "disjoint"
                else f"{where}: got no training case in {folder}, expected at least one that is not a test subject."
            )
        elif not any(scan.problem for scan in found):
            totals = sum((_voxels(case, scans) for case in cases[step]), Counter())
            labels = final_labels(schedule, step, {})
            problems += [
                f"{where}: got no voxel of {name!r} in the labels of its {len(found)} cases, expected at least one. "
                "Check the class map, or move the class to a step that has it."
                for name in _labelled_classes(schedule, step)
                if not totals[labels[name]]
            ]
            known = {labels[name]: name for name in schedule.steps[step - 1].classes if totals[labels[name]]}
            voxels = {case.name: _voxels(case, scans) for case in cases[step]}
            problems += [f"{where}: {problem}" for problem in _fold_problems(schedule.folds, voxels, known)]
    _refuse(problems)
    return scans


def _fold_problems(
    folds: Sequence[int | str], voxels: Mapping[str, Mapping[int, int]], classes: Mapping[int, str]
) -> Iterator[str]:
    """What a fold's training part lacks.

    Args:
        voxels: of each case, by label value.
        classes: names of the new ones, by label value.
    """
    splits = nnunet_api.crossval_splits(list(voxels))
    for fold in folds:
        training = nnunet_api.training_part(voxels, splits, fold)
        if not training:
            yield (
                f"fold {fold}: got no training case, as the step has {len(voxels)}, expected at least one. Set "
                "`fold: all`, or add subjects."
            )
        elif missing := [name for value, name in classes.items() if not any(voxels[case][value] for case in training)]:
            yield (
                f"fold {fold}: got no voxel of {missing} in the labels of its {len(training)} training cases, expected "
                "at least one: the others validate. Set `fold: all`, or add subjects."
            )


def _same_images(cases: Sequence[Case]) -> list[str]:
    """Cases of a step whose images are one file under two names, by any kind of link."""
    first: dict[tuple[int, int], Path] = {}
    found = []
    for path in (path for case in cases for path in case.images if path.is_file()):
        if (other := first.setdefault(file_id(path), path)) != path:
            found.append(f"{path}: got the same file as {other.name}, expected each image once.")
    return found


def _labelled_classes(schedule: Schedule, step: int) -> tuple[str, ...]:
    """Classes that a step's data label: the new ones, and old ones where its class map leads to some."""
    return schedule.steps[step - 1].classes + schedule.steps[step - 1].old_classes


def _voxels(case: Case, scans: Mapping[Path, Scan]) -> Counter[int]:
    """Voxels of a case by the label value that they get."""
    counts: Counter[int] = Counter()
    for own, number in scans[case.label].counts.items():
        counts[case.table[own]] += number
    return counts


def tell_of_labels(schedule: Schedule, cases: Mapping[int | str, Sequence[Case]], scans: Mapping[Path, Scan]) -> None:
    """Say which old classes are labelled again, and warn where labels may be missing or are there but declared missing.

    A class that at least half of a step's cases have may have been left unlabelled in the others. Nothing is said of
    data for which something is declared: their user knows how.
    """
    for step in [step for step in schedule.own_steps if step in cases]:
        where, new = f"{schedule.file}: steps[{step - 1}]", schedule.steps[step - 1]
        if new.old_classes:
            logger.info("%s: labels of classes learned before are used: %s", where, ", ".join(new.old_classes))
        labels, table = final_labels(schedule, step, {}), _step_table(schedule, step)
        voxels = {case.name: _voxels(case, scans) for case in cases[step]}
        declared = bool(schedule.unlabelled if new.dataset is None else new.unlabelled)
        for name in _labelled_classes(schedule, step):
            value = labels[name]
            without = [case for case, found in voxels.items() if not found[value]]
            if 0 < len(without) <= len(voxels) / 2 and not declared:
                logger.warning(
                    "%s: %d of %d cases have no voxel of %r: %s. Where the organ is in the image and only its label is "
                    "missing, it is learned as background: declare these cases by `unlabelled`, see docs/schedule.md.",
                    where,
                    len(without),
                    len(voxels),
                    name,
                    _shown(without),
                )
            unused = [
                case.name
                for case in cases[step]
                if value not in case.labelled
                and any(scans[case.label].counts.get(own) for own, usual in table.items() if usual == value)
            ]
            if unused:
                logger.warning(
                    "%s: unlabelled: %d cases have voxels of %r, which they are declared not to label: %s. These are "
                    "not used.",
                    where,
                    len(unused),
                    name,
                    _shown(unused),
                )


def _shown(cases: Sequence[str]) -> str:
    return ", ".join(cases[:SHOWN_CASES]) + " ..." * (len(cases) > SHOWN_CASES)


def _scan_all(schedule: Schedule, cases: Mapping[int | str, Sequence[Case]]) -> dict[Path, Scan]:
    todo: dict[Path, tuple[Case, dict[str, Any], dict[int | str, tuple[Mapping[int, int], int]]]] = {}
    for step, of_step in cases.items():
        source = dataset_json_of(first_source(schedule) if step == JOINT else step_source(schedule, int(step)))
        n_samples = INTENSITY_SAMPLES // len(of_step) if step == 1 and of_step else INTENSITY_SAMPLES_LATER
        for case in of_step:
            todo.setdefault(case.label, (case, source, {}))[2][step] = (case.table, n_samples)
    n_bytes = bytes_of([path for case, _, _ in todo.values() for path in case.images])
    return dict(zip(todo, over_cases(_scan, list(todo.values()), n_bytes, "checking the data"), strict=True))


def bytes_of(paths: Sequence[Path]) -> int:
    """Size of the files that exist."""
    return sum(path.stat().st_size for path in paths if path.is_file())


def _differences_to_model(schedule: Schedule, own: Mapping[str, Any]) -> list[str]:
    """Where new data do not fit a given model: channels by number and name, as these decide the normalisation."""
    if schedule.model is None:
        return []
    theirs = {int(k): str(v) for k, v in schedule.model.dataset_json.get("channel_names", {}).items()}
    mine = {int(k): str(v) for k, v in own["channel_names"].items()}
    if theirs == mine:
        return []
    return [
        f"{schedule.file}: model: got a model for the channels {theirs}, expected {mine} as in the new data: number, "
        "order and kind decide how images are normalised. Use data of the same kind."
    ]


def _install_model(chain: Chain) -> None:
    """Copy a given model to where step 1 of a chain has its own, and note what later steps inherit."""
    model = chain.schedule.model
    if model is None:
        return
    target = chain.model_folder(chain.first_step(None), 1)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        model.install(target, chain.schedule.folds, check=read_checkpoint)
    if "network_of" not in chain.content:
        chain.content |= inherited_from(target, chain.schedule.folds[0])
    chain.content["plans_name"] = model.plans["plans_name"]
    chain.save()


def _labels_without_images(folder: Path) -> list[str]:
    dataset_json = dataset_json_of(folder)
    ending = dataset_json["file_ending"]
    if "dataset" in dataset_json:
        return []
    images = set(nnunet_api.image_lists(folder / "imagesTr", ending))
    labels = {path.name[: -len(ending)] for path in (folder / "labelsTr").iterdir() if path.name.endswith(ending)}
    return [
        f"{folder / 'labelsTr' / (name + ending)}: got a label without an image, expected {name}_0000{ending} in "
        "imagesTr."
        for name in sorted(labels - images)
    ]


def _write_case(case: Case, name: str, images: Path, labels: Path, ending: str, reader: Any) -> None:
    """Link a case's images and write its labels in the new values."""
    for channel, image in enumerate(case.images):
        nnunet_api.link_or_copy(image, images / f"{name}_{channel:04d}{ending}", symbolic=True)
    seg, properties = reader.read_seg(str(case.label))
    label = labels / f"{name}{ending}"
    reader.write_seg(apply_remap(seg[0], case.table), str(label), properties)
    nnunet_api.check_written(label, reader)


def write_raw(chain: Chain, step: int | str, cases: Sequence[Case], labels: Mapping[str, int], source: Path) -> None:
    """Write a step's raw dataset: linked images, relabelled labels; whole or not at all. An existing one is kept."""
    folder = chain.raw(step)
    chain.check_not_foreign(folder)
    if folder.exists():
        return
    own = dataset_json_of(source)
    ending = own["file_ending"]
    partial = folder.with_name(f".cil_{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    for name in ("imagesTr", "labelsTr"):
        (partial / name).mkdir(parents=True)
    reader = nnunet_api.reader_writer(own, cases[0].images[0])
    for case in cases:
        _write_case(case, case.name, partial / "imagesTr", partial / "labelsTr", ending, reader)
    kept = {key: own[key] for key in ("channel_names", "file_ending", "overwrite_image_reader_writer") if key in own}
    write_json(partial / "dataset.json", {**kept, "labels": dict(labels), "numTraining": len(cases)})
    write_json(partial / STEP_FILE, {"chain": chain.schedule.name, "step": step, "n_cases": len(cases)})
    os.replace(partial, folder)
    logger.info("%s: %d cases, labels %s", folder.name, len(cases), dict(labels))


def write_test_set(chain: Chain, tested: Mapping[str, Scan] | None = None) -> None:
    """Link the test images and relabel their labels to the final numbers, in the chain's ``test`` folder.

    What is there of the same images and labels stays.

    Args:
        tested: what `scan_test_set` found; None: that is done here.

    Raises:
        ValueError: images or labels are damaged, do not fit each other, or have unknown labels.
    """
    folder = chain.folder / "test"
    schedule = chain.schedule
    if test_set_is_written(chain):
        return
    tested = tested or scan_test_set(schedule)
    _refuse(_problems(tested.values()))
    own = dataset_json_of(first_source(schedule))
    for test in schedule.test:
        if test.dataset and (theirs := dataset_json_of(test.dataset)["channel_names"]) != own["channel_names"]:
            logger.warning(
                "%s: channel_names: got %s, expected %s as in the training data: the test images are normalised as "
                "these. If they are of another kind, say so beside the scores.",
                test.dataset / "dataset.json",
                theirs,
                own["channel_names"],
            )
    ending = own["file_ending"]
    cases = test_cases(schedule)
    ignore = final_labels(schedule, chain.n_steps, {"ignore": None})["ignore"]
    listing = {name: {**entry, "sha256": tested[name].digest} for name, entry in _listing(cases).items()}
    content = {"test": schedule.to_dict()["test"], "ignore": ignore, "file_ending": ending, "cases": listing}
    if _test_json(chain) == json.loads(json.dumps(content)):
        write_json(folder / FILES_FILE, _file_states(cases))
        return
    partial = chain.folder / ".test.part"
    shutil.rmtree(partial, ignore_errors=True)
    for name in ("images", "labels"):
        (partial / name).mkdir(parents=True)
    for name, (_, case) in cases.items():
        reader = nnunet_api.reader_writer(own, case.images[0])
        _write_case(case, name, partial / "images", partial / "labels", ending, reader)
    write_json(partial / "test.json", content)
    write_json(partial / FILES_FILE, _file_states(cases))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    logger.info("test set: %d subjects", len(cases))


def _listing(cases: Mapping[str, tuple[int, Case]]) -> dict[str, Any]:
    return {name: {"labelled": list(case.labelled), "set": number} for name, (number, case) in cases.items()}


def _file_states(cases: Mapping[str, tuple[int, Case]]) -> dict[str, list[list[int]]]:
    """Size and time of change of each subject's label and images, by which a change is noticed without reading them."""
    states = {name: [path.stat() for path in (case.label, *case.images)] for name, (_, case) in cases.items()}
    return {name: [[state.st_size, state.st_mtime_ns] for state in found] for name, found in states.items()}


def _test_json(chain: Chain) -> dict[str, Any]:
    path = chain.folder / "test" / "test.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def test_set_is_written(chain: Chain) -> bool:
    """Whether the chain's ``test`` folder holds what the schedule names now, of files that have not changed since.

    True where it names nothing.
    """
    written, states = _test_json(chain), chain.folder / "test" / FILES_FILE
    if not chain.schedule.test or not written or not states.is_file():
        return not chain.schedule.test
    cases = test_cases(chain.schedule)
    listed = {name: {key: entry[key] for key in ("labelled", "set")} for name, entry in written["cases"].items()}
    return (
        written["test"] == json.loads(json.dumps(chain.schedule.to_dict()["test"]))
        and listed == _listing(cases)
        and json.loads(states.read_text(encoding="utf-8")) == _file_states(cases)
    )


def prepare_chain(chain: Chain, variants: Sequence[Variant]) -> None:
    """Make all datasets, plans and preprocessed data of a chain; what is there and whole is kept.

    Raises:
        ValueError: the data do not fit the schedule (nothing was written), or the plan cannot be made.
        FileExistsError: a dataset of somebody else is in the way.
    """
    schedule = chain.schedule
    chain.discard_abandoned()
    with_joint = any(variant.method == JOINT for variant in variants) and _joint_has_data(chain)
    wanted: list[int | str] = [*schedule.own_steps, *([JOINT] if with_joint else [])]
    steps = [step for step in wanted if step not in chain.forgotten]
    for step in steps:
        for folder in (chain.raw(step), chain.preprocessed(step)):
            chain.check_not_foreign(folder)
    _check_sources_are_there(chain, steps)
    _check_test_of_forgotten(chain)
    cases = {step: joint_cases(schedule) if step == JOINT else step_cases(schedule, int(step)) for step in steps}
    for step in steps:
        _check_same_cases(chain, step, cases[step])
    tested = {} if test_set_is_written(chain) else scan_test_set(schedule)
    if not all(is_prepared(chain, step) for step in steps):
        if schedule.source is not None:
            logger.info("%s is cut up: all its labels are read, as only a simulation can", schedule.source.name)
        if JOINT in steps:
            logger.info("joint keeps the scans and labels of all steps, which is not privacy-safe")
        scans = check_sources(schedule, cases, tested)
        tell_of_labels(schedule, cases, scans)
        warn_of_axes(schedule, scans, tested)
        chain.claim_numbers()
        _install_model(chain)
        write_test_set(chain, tested)
        for step in steps:
            number = chain.n_steps if step == JOINT else int(step)
            source = first_source(schedule) if step == JOINT else step_source(schedule, number)
            sources = [step_source(schedule, t) for t in (schedule.own_steps if step == JOINT else [number])]
            own = {name: None for folder in sources for name in dataset_json_of(folder)["labels"]}
            labels = final_labels(schedule, number, own)
            write_raw(chain, step, cases[step], labels, source)
            if not is_prepared(chain, step):
                _plan(chain, step, cases[step], scans)
                if step == schedule.own_steps[0]:
                    _warn_of_clipping(chain, cases)
                _preprocess(chain, step, cases[step], scans)
    _install_model(chain)
    write_test_set(chain, tested)
    for step in schedule.own_steps:
        keep_source(chain, step)
    for variant in variants:
        write_variant_plans(chain, variant)
    chain.save()


def keep_source(chain: Chain, step: int) -> None:
    """Keep the labels' names of a step's own dataset, without which no schedule loads, so that the dataset may go."""
    source = chain.schedule.steps[step - 1].dataset
    if source is None or chain.source_is_gone(step):
        return
    own = dataset_json_of(source)
    names = ("channel_names", "labels", "file_ending", "overwrite_image_reader_writer")
    kept = kept_source(chain.folder, step)
    write_json(kept / "dataset.json", {**{key: own[key] for key in names if key in own}, "dataset": {}})


def _joint_has_data(chain: Chain) -> bool:
    return chain.schedule.source is not None or not chain.forgotten


def _check_sources_are_there(chain: Chain, steps: Sequence[int | str]) -> None:
    for step in steps:
        if step != JOINT and chain.source_is_gone(int(step)):
            raise ValueError(
                f"{chain.schedule.file}: step {step}: got a dataset that is gone, expected its images and labels. If "
                "that is on purpose, remove what the chain has of them, too: "
                f"`nnunet-cil audit {chain.schedule.file} --forget {step}`."
            )


def _check_test_of_forgotten(chain: Chain) -> None:
    """Refuse to score on what a removed step was trained on: by name, as its files cannot be compared any more."""
    schedule = chain.schedule
    for step in [step for step in chain.forgotten if step != JOINT]:
        path = chain.preprocessed(step) / "splits_final.json"
        images = step_source(schedule, int(step)) / "imagesTr"
        if not path.is_file() or all(test.images != images for test in schedule.test):
            continue
        folds = json.loads(path.read_text(encoding="utf-8"))
        trained = {name for fold in folds for part in fold.values() for name in part}
        ending = dataset_json_of(images.parent)["file_ending"]
        tested = [case for number, case in test_cases(schedule).values() if schedule.test[number].images == images]
        if again := sorted({case.label.name.removesuffix(ending) for case in tested} & trained):
            raise ValueError(
                f"{schedule.file}: test: got {again}, which step {step} was trained on, expected other subjects."
            )


def _check_same_cases(chain: Chain, step: int | str, cases: Sequence[Case]) -> None:
    """Refuse a test set or source that would change which subjects an existing step dataset trains on."""
    folder = chain.raw(step)
    if not folder.is_dir():
        return
    before, now = set(nnunet_api.training_cases(folder)), {case.name for case in cases}
    if before != now:
        raise ValueError(
            f"{folder}: got a dataset that trains on {sorted(before - now)} and not on {sorted(now - before)}, "
            "expected the subjects that the schedule names now. Was the test set changed, or a subject added? Give the "
            "schedule another name: what was trained on a subject must not be scored on it."
        )


def is_prepared(chain: Chain, step: int | str) -> bool:
    """Whether a step's raw and preprocessed data are there and whole."""
    marker = read_step_file(chain.preprocessed(step)) if chain.raw(step).is_dir() else None
    return (
        marker is not None
        and chain.schedule.configuration in marker.get("configurations", ())
        and all(
            count_whole_cases(chain.preprocessed(step) / identifier) == marker["n_cases"]
            for identifier in marker["complete"]
        )
    )


def base_plans(chain: Chain) -> dict[str, Any]:
    """Plans of step 1, which all steps share, without block."""
    if chain.schedule.model is not None:
        return {key: value for key, value in chain.schedule.model.plans.items() if key != BLOCK_KEY}
    path = chain.preprocessed(1) / f"{chain.content['plans_name']}.json"
    return {key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if key != BLOCK_KEY}


def _plan(chain: Chain, step: int | str, cases: Sequence[Case], scans: Mapping[Path, Scan]) -> None:
    """Fingerprint, splits, dataset.json and plans of one step, in its preprocessed folder."""
    folder = chain.preprocessed(step)
    folder.mkdir(parents=True, exist_ok=True)
    marker = {"chain": chain.schedule.name, "step": step, "n_cases": len(cases), "complete": [], "configurations": []}
    write_json(folder / STEP_FILE, {**marker, **_labelled_by_case(chain.schedule, step, cases)})
    shutil.copyfile(chain.raw(step) / "dataset.json", folder / "dataset.json")
    found = [scans[case.label] for case in cases]
    nnunet_api.write_fingerprint(
        folder / "dataset_fingerprint.json", [scan.crop for scan in found], [scan.intensities[step] for scan in found]
    )
    write_json(folder / "splits_final.json", nnunet_api.crossval_splits([case.name for case in cases]))
    if step == 1:
        _plan_first_step(chain)
    else:
        plans = {**base_plans(chain), "dataset_name": chain.dataset_name(step)}
        write_json(folder / f"{chain.content['plans_name']}.json", plans)


def _labelled_by_case(schedule: Schedule, step: int | str, cases: Sequence[Case]) -> dict[str, Any]:
    """Entry of the step file: values that are labelled, by case; none if these are the new classes' everywhere."""
    new = schedule.classes if step == JOINT else schedule.steps[int(step) - 1].classes
    labels = cumulative_labels([s.classes for s in schedule.steps], len(schedule.steps))
    usual = tuple(labels[name] for name in new)
    if all(case.labelled == usual for case in cases):
        return {}
    return {"labelled": {case.name: list(case.labelled) for case in cases}}


def _plan_first_step(chain: Chain) -> None:
    schedule, folder = chain.schedule, chain.preprocessed(1)
    if schedule.base_plans is not None:
        plans = read_json(schedule.base_plans, "a plans.json of nnU-Net")
        plans["dataset_name"] = chain.dataset_name(1)
        name = plans["plans_name"]
    else:
        name = nnunet_api.plan(chain.dataset_id(1), schedule.planner)
        plans = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    if schedule.configuration not in plans["configurations"]:
        raise ValueError(
            f"{schedule.file}: configuration: got {schedule.configuration!r}, expected one that nnU-Net planned for "
            f"this data: {sorted(plans['configurations'])}."
        )
    nnunet_api.check_architecture(plans, schedule.configuration)
    plans.pop(BLOCK_KEY, None)
    plans = apply_override(plans, schedule.configuration, schedule.plans)
    plans = set_intensity(plans, schedule.intensity, chain.raw(1))
    write_json(folder / f"{name}.json", plans)
    chain.content["plans_name"] = name
    chain.save()


def _warn_of_clipping(chain: Chain, cases: Mapping[int | str, Sequence[Case]]) -> None:
    for step in [step for step in chain.schedule.own_steps if step in cases]:
        labels = cumulative_labels([s.classes for s in chain.schedule.steps], step)
        names = {labels[name]: name for name in chain.schedule.steps[step - 1].classes}
        own = dataset_json_of(step_source(chain.schedule, step))
        warn_of_clipping(base_plans(chain), chain.schedule.configuration, own, cases[step], names, step)


def _preprocess(chain: Chain, step: int | str, cases: Sequence[Case], scans: Mapping[Path, Scan]) -> None:
    """Bring a step's cases to the grid of the plans; an image that another step has there already is linked."""
    configuration, plans = chain.schedule.configuration, base_plans(chain)
    identifier = nnunet_api.plans_manager(plans).get_configuration(configuration).data_identifier
    folder = chain.preprocessed(step) / identifier
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    labels = chain.preprocessed(step) / "gt_segmentations"
    shutil.rmtree(labels, ignore_errors=True)
    labels.mkdir()
    dataset_json = dataset_json_of(chain.raw(step))
    donors = _donors(chain, step, identifier) if nnunet_api.can_derive(plans, configuration) else {}
    derive, anew = [], []
    for case in cases:
        label = chain.raw(step) / "labelsTr" / f"{case.name}{dataset_json['file_ending']}"
        nnunet_api.link_or_copy(label, labels / label.name)
        common = (folder / case.name, plans, configuration, dataset_json)
        if case.name in donors:
            derive.append((donors[case.name] / case.name, label, scans[case.label].crop, *common))
        else:
            anew.append((case.images, label, *common))
    what = f"preprocessing {chain.dataset_name(step)}"
    n_voxels = sum(math.prod(scans[case.label].crop.shape) for case in cases)
    over_cases(nnunet_api.preprocess_case, anew, 4 * n_voxels, what)
    over_cases(nnunet_api.derive_case, derive, n_voxels, what)
    marker = read_step_file(chain.preprocessed(step)) or {}
    marker["complete"] = sorted({*marker["complete"], identifier})
    marker["configurations"] = sorted({*marker["configurations"], configuration})
    write_json(chain.preprocessed(step) / STEP_FILE, marker)


def _donors(chain: Chain, step: int | str, identifier: str) -> dict[str, Path]:
    """Preprocessed folder of an earlier, finished step by case; only where equal names mean equal images."""
    if chain.schedule.source is None:
        return {}
    earlier = [other for other in chain.schedule.own_steps if step == JOINT or other < int(step)]
    finished = [other for other in earlier if is_prepared(chain, other)]
    return {
        path.name.removesuffix(".pkl"): path.parent
        for other in finished
        for path in (chain.preprocessed(other) / identifier).glob("*.pkl")
    }


def write_variant_plans(chain: Chain, variant: Variant) -> None:
    """Plans with the ``"cil"`` block for each step of a variant, written anew at each call."""
    steps: Sequence[int | str] = [JOINT] if variant.method == JOINT else chain.schedule.own_steps
    for step in steps:
        _check_same_settings(chain, variant, step)
    for step in steps:
        owner = chain.owner(variant, step)
        name = chain.plans_name(owner)
        plans = {**base_plans(chain), "dataset_name": chain.dataset_name(step), "plans_name": name}
        plans[BLOCK_KEY] = block_of(chain, owner, step).to_json()
        write_json(chain.preprocessed(step) / f"{name}.json", plans)


def _check_same_settings(chain: Chain, variant: Variant, step: int | str) -> None:
    """Refuse settings that differ from those of a training which was begun.

    nnU-Net writes plans and dataset.json in place at each start of a training: half ones are nothing to compare with.
    """
    owner = chain.owner(variant, step)
    path = chain.model_folder(variant, step) / "plans.json"
    try:
        plans, dataset_json = read_json(path, "plans of nnU-Net"), dataset_json_of(path.parent)
    except (FileNotFoundError, ValueError):
        return
    before = StepBlock.from_plans(plans, dataset_json).settings
    now = block_of(chain, owner, step).settings
    if differing := [f"{k}: {before.get(k)} then, {now.get(k)} now" for k in now if before.get(k) != now.get(k)]:
        raise ValueError(
            f"{chain.schedule.file}: variants: {variant.method}: got other settings than {path.parent} was trained "
            f"with, expected the same:\n  " + "\n  ".join(differing) + "\nGive the variant another name."
        )


def block_of(chain: Chain, variant: Variant, step: int | str) -> StepBlock:
    """The block of a variant's step. Joint has one step, that learns all classes for as long as all steps together."""
    schedule = chain.schedule
    training = replace(schedule.training, seed=variant.seed)
    classes = tuple(s.classes for s in schedule.steps)
    teacher = None
    if step == JOINT:
        number, classes = 1, (schedule.classes,)
        training = replace(training, epochs=training.epochs * chain.n_steps)
    else:
        number = int(step)
        classes = classes[:number]
    if number > 1:
        folder = chain.model_folder(variant, number - 1)
        teacher = folder.relative_to(chain.paths["nnUNet_results"]).as_posix()
    return StepBlock(
        chain=schedule.name,
        step=number,
        classes=classes,
        method=variant.method,
        settings=chain.settings(variant),
        training=training,
        mirror_axes=schedule.mirror_axes if schedule.model is None else tuple(chain.content["mirror_axes"]),
        teacher=teacher,
        network_of=chain.content.get("network_of"),
    )
