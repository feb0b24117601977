"""A step's nnU-Net dataset: which cases, which labels, whose plans.

``prepare_chain`` turns a schedule into ``DatasetNNN_NAME_stepT`` folders in nnUNet_raw and nnUNet_preprocessed. All
sources are read and checked before anything is written.
"""

from __future__ import annotations

import gzip
import json
import logging
import math
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK

from nnunet_cil import nnunet_api
from nnunet_cil.block import BLOCK_KEY, StepBlock
from nnunet_cil.chain import JOINT, Chain, Variant, write_json
from nnunet_cil.intensity import set_intensity, warn_of_clipping
from nnunet_cil.labels import apply_remap, cumulative_labels, remap_table
from nnunet_cil.parallel import over_cases
from nnunet_cil.plan_override import apply_override
from nnunet_cil.schedule import Schedule
from nnunet_cil.step_files import STEP_FILE, count_whole_cases, read_step_file
from nnunet_cil.teacher import mirror_axes_of

logger = logging.getLogger(__name__)

SPACING_TOLERANCE = 1e-3
INTENSITY_SAMPLES = 10**8  # in all of step 1, as nnU-Net takes them
INTENSITY_SAMPLES_LATER = 10**4  # in each case of a later step: nothing is planned from these


@dataclass(frozen=True)
class Case:
    """One subject of a step: its files, and where its own label values go.

    Args:
        table: own label value -> the step's (or the final) label value.
        labelled: target values that the source labels at all; others are unknown in this case, not absent.
    """

    name: str
    images: tuple[Path, ...]
    label: Path
    table: Mapping[int, int]
    labelled: tuple[int, ...]


def dataset_json_of(folder: Path) -> dict[str, Any]:
    """A raw dataset's dataset.json."""
    return json.loads((folder / "dataset.json").read_text(encoding="utf-8"))


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
    dataset_json = dataset_json_of(folder)
    own = dataset_json["labels"]
    target = final_labels(schedule, step, own)
    new = schedule.steps[step - 1]
    class_map = new.class_map if new.class_map is not None else {name: name for name in new.classes}
    table = remap_table(own, class_map, target)
    labelled = tuple(target[name] for name in new.classes)
    held_out = _held_out(schedule)
    listed = nnunet_api.training_cases(folder)
    names = [
        name
        for name in sorted(listed)
        if not any(path.is_file() and _file_id(path) in held_out for path in listed[name][0])
    ]
    if schedule.train_subjects is not None and new.dataset is None:
        names = [name for name in names if name in set(schedule.train_subjects)]
    if new.dataset is None and schedule.images == "disjoint":
        names = disjoint_parts(names, len(schedule.steps), schedule.training.seed or 0)[step - 1]
    return [Case(name, tuple(listed[name][0]), listed[name][1], table, labelled) for name in names]


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
        labelled = tuple(sorted({target[name] for name in test.class_map.values() if name is not None}))
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
            found[name] = (number, Case(name, tuple(files), label, table, labelled))
    return found


def _held_out(schedule: Schedule) -> set[tuple[int, int]]:
    """Files of the test images, whatever their path or name."""
    return {_file_id(path) for _, case in test_cases(schedule).values() for path in case.images}


def _file_id(path: Path) -> tuple[int, int]:
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
    """

    counts: Mapping[int, int] = field(default_factory=dict)
    problem: str | None = None
    crop: nnunet_api.Crop | None = None
    intensities: Mapping[int | str, Sequence[np.ndarray]] = field(default_factory=dict)


def _scan(case: Case, dataset_json: dict[str, Any], wanted: Mapping[int | str, tuple[Mapping[int, int], int]]) -> Scan:
    """Read one case's files, once for all steps; never raises.

    Args:
        wanted: step -> where the own label values go in it, and how many intensities to sample.
    """
    for path in case.images:
        if not path.is_file():
            return Scan(problem=f"{path}: got no file, expected the image of label {case.label.name}.")
    if not case.images:
        return Scan(problem=f"{case.label}: got no image for this label, expected {case.name}_0000 in imagesTr.")
    if not case.label.is_file():
        return Scan(problem=f"{case.label}: got no file, expected the label of image {case.images[0].name}.")
    n_channels = len(dataset_json["channel_names"])
    if len(case.images) != n_channels:
        return Scan(
            problem=f"{case.name}: got {len(case.images)} images, expected one for each of the {n_channels} "
            "channel_names of dataset.json."
        )
    try:
        if difference := _grid_difference(case.images, case.label):
            return Scan(problem=f"{case.label}: {difference}")
        reader = nnunet_api.reader_writer(dataset_json, case.label)
        images, properties = reader.read_images([str(path) for path in case.images])
        seg, _ = reader.read_seg(str(case.label))
        for path in (*case.images, case.label):
            _read_to_the_end(path)
    except Exception as error:
        return Scan(
            problem=f"{case.label}: got an unreadable image or label ({error}), expected files nnU-Net can read."
        )
    if images.shape[1:] != seg.shape[1:]:
        return Scan(problem=f"{case.label}: got size {seg.shape[1:]}, expected {images.shape[1:]} as the image.")
    if not np.isfinite(images).all():
        return Scan(problem=f"{case.images[0]}: got voxels that are not finite (NaN or infinite), expected numbers.")
    if unknown := [int(v) if v == int(v) else v for v in np.unique(seg).tolist() if v not in case.table]:
        return Scan(
            problem=f"{case.label}: got label values {unknown}, expected only {sorted(case.table)} of dataset.json."
        )
    images, seg, crop = nnunet_api.crop_case(images, seg, properties["spacing"])
    values, counts = np.unique(seg[seg >= 0], return_counts=True)
    found = dict(zip(values.tolist(), counts.tolist(), strict=True))
    intensities = {
        step: nnunet_api.foreground_intensities(images, apply_remap(seg, {-1: 0, **table}), n_samples)
        for step, (table, n_samples) in wanted.items()
    }
    return Scan(found, None, crop, intensities)


def _read_to_the_end(path: Path) -> None:
    """Unpack a .gz file: SimpleITK takes the missing end of a truncated one for zeros.

    Raises:
        EOFError: it is truncated.
    """
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            while file.read(1 << 22):
                pass


def _grid_difference(images: Sequence[Path], label: Path) -> str:
    if not label.name.endswith((".nii.gz", ".nii", ".nrrd", ".mha")):
        return ""
    headers = []
    for path in (label, *images):
        reader = SimpleITK.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        headers.append((reader.GetSize(), reader.GetSpacing()))
    for path, (size, spacing) in zip(images, headers[1:], strict=True):
        if size != headers[0][0]:
            return f"got size {headers[0][0]}, expected {size} as {path.name}."
        if not np.allclose(spacing, headers[0][1], rtol=SPACING_TOLERANCE):
            return f"got spacing {headers[0][1]} mm, expected {spacing} mm as {path.name}."
    return ""


def check_sources(schedule: Schedule, cases: Mapping[int | str, Sequence[Case]]) -> dict[Path, Scan]:
    """Read every image and label once and check them; returns what was found, by label file.

    Args:
        cases: by step, and of ``"joint"`` if that is to be trained.

    Raises:
        ValueError: all problems at once: images without labels and the reverse, label values that dataset.json does not
            have, grids that differ, voxels that are not finite, a step without cases or without any voxel of one of its
            classes.
    """
    scans = _scan_all(schedule, cases)
    problems = [scan.problem for scan in scans.values() if scan.problem]
    first = dataset_json_of(first_source(schedule))
    problems += _differences_to_model(schedule, first)
    for step in schedule.own_steps:
        folder = step_source(schedule, step)
        for key in ("channel_names", "file_ending"):
            if (got := dataset_json_of(folder)[key]) != first[key]:
                problems.append(f"{folder / 'dataset.json'}: {key}: got {got}, expected {first[key]} as in step 1.")
        problems += [p for p in _labels_without_images(folder) if p not in problems]
        found = [scans[case.label] for case in cases[step]]
        where = f"{schedule.file}: steps[{step - 1}]"
        if not found:
            problems.append(
                f"{where}: got no training case in {folder}, expected at least one that is not a test subject."
            )
        elif not any(scan.problem for scan in found):
            totals: Counter[int] = Counter()
            for case, scan in zip(cases[step], found, strict=True):
                for value, number in scan.counts.items():
                    totals[case.table[value]] += number
            labels = final_labels(schedule, step, {})
            problems += [
                f"{where}: got no voxel of {name!r} in the labels of its {len(found)} cases, expected at least one. "
                "Check the class map, or move the class to a step that has it."
                for name in schedule.steps[step - 1].classes
                if not totals[labels[name]]
            ]
    if problems:
        raise ValueError("the data do not fit the schedule; nothing was written:\n  " + "\n  ".join(problems))
    return scans


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
        model.install(target, chain.schedule.folds)
    chain.content["plans_name"] = model.plans["plans_name"]
    chain.content["mirror_axes"] = list(mirror_axes_of(target, chain.schedule.folds[0]) or ())
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


def link(source: Path, target: Path) -> None:
    """Hard link; a symbolic link where that is impossible; a copy where neither is."""
    source = source.resolve()
    for make in (os.link, os.symlink, shutil.copyfile):
        try:
            make(source, target)
            return
        except OSError as error:
            if make is shutil.copyfile:
                raise
            logger.debug("%s of %s: %s", make.__name__, source, error)


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
        for channel, image in enumerate(case.images):
            link(image, partial / "imagesTr" / f"{case.name}_{channel:04d}{ending}")
        seg, properties = reader.read_seg(str(case.label))
        reader.write_seg(
            apply_remap(seg[0], case.table), str(partial / "labelsTr" / f"{case.name}{ending}"), properties
        )
    kept = {key: own[key] for key in ("channel_names", "file_ending", "overwrite_image_reader_writer") if key in own}
    write_json(partial / "dataset.json", {**kept, "labels": dict(labels), "numTraining": len(cases)})
    write_json(partial / STEP_FILE, {"chain": chain.schedule.name, "step": step, "n_cases": len(cases)})
    os.replace(partial, folder)
    logger.info("%s: %d cases, labels %s", folder.name, len(cases), dict(labels))


def write_test_set(chain: Chain) -> None:
    """Link the test images and relabel their labels to the final numbers, in the chain's ``test`` folder."""
    folder = chain.folder / "test"
    schedule = chain.schedule
    if test_set_is_written(chain):
        return
    partial = chain.folder / ".test.part"
    shutil.rmtree(partial, ignore_errors=True)
    for name in ("images", "labels"):
        (partial / name).mkdir(parents=True)
    own = dataset_json_of(first_source(schedule))
    ending = own["file_ending"]
    listing: dict[str, Any] = {}
    for name, (number, case) in test_cases(schedule).items():
        reader = nnunet_api.reader_writer(own, case.images[0])
        for channel, image in enumerate(case.images):
            link(image, partial / "images" / f"{name}_{channel:04d}{ending}")
        seg, properties = reader.read_seg(str(case.label))
        try:
            relabelled = apply_remap(seg[0], case.table)
        except ValueError as error:
            raise ValueError(f"{case.label}: {error}") from error
        reader.write_seg(relabelled, str(partial / "labels" / f"{name}{ending}"), properties)
        listing[name] = {"labelled": list(case.labelled), "set": number}
    ignore = final_labels(schedule, chain.n_steps, {"ignore": None})["ignore"]
    content = {"test": schedule.to_dict()["test"], "ignore": ignore, "file_ending": ending, "cases": listing}
    write_json(partial / "test.json", content)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    logger.info("test set: %d subjects", len(listing))


def test_set_is_written(chain: Chain) -> bool:
    """Whether the chain's ``test`` folder holds what the schedule names now; true where it names nothing."""
    path = chain.folder / "test" / "test.json"
    if not chain.schedule.test or not path.is_file():
        return not chain.schedule.test
    written = json.loads(path.read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(chain.schedule.to_dict()["test"]))
    return written["test"] == wanted and list(written["cases"]) == list(test_cases(chain.schedule))


def prepare_chain(chain: Chain, variants: Sequence[Variant]) -> None:
    """Make all datasets, plans and preprocessed data of a chain; what is there and whole is kept.

    Raises:
        ValueError: the data do not fit the schedule (nothing was written), or the plan cannot be made.
        FileExistsError: a dataset of somebody else is in the way.
    """
    schedule = chain.schedule
    chain.discard_abandoned()
    with_joint = any(variant.method == JOINT for variant in variants)
    steps: list[int | str] = [*schedule.own_steps, *([JOINT] if with_joint else [])]
    for step in steps:
        for folder in (chain.raw(step), chain.preprocessed(step)):
            chain.check_not_foreign(folder)
    cases: dict[int | str, list[Case]] = {step: step_cases(schedule, step) for step in schedule.own_steps}
    if with_joint:
        cases[JOINT] = joint_cases(schedule)
    for step in steps:
        _check_same_cases(chain, step, cases[step])
    if not all(_is_prepared(chain, step) for step in steps):
        scans = check_sources(schedule, cases)
        chain.save()
        _install_model(chain)
        write_test_set(chain)
        for step in steps:
            number = chain.n_steps if step == JOINT else int(step)
            source = first_source(schedule) if step == JOINT else step_source(schedule, number)
            labels = final_labels(schedule, number, dataset_json_of(source)["labels"])
            write_raw(chain, step, cases[step], labels, source)
            if not _is_prepared(chain, step):
                _plan(chain, step, cases[step], scans)
                if step == schedule.own_steps[0]:
                    _warn_of_clipping(chain, cases)
                _preprocess(chain, step, cases[step], scans)
    _install_model(chain)
    write_test_set(chain)
    for variant in variants:
        write_variant_plans(chain, variant)
    chain.save()


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


def _is_prepared(chain: Chain, step: int | str) -> bool:
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
    write_json(folder / STEP_FILE, marker)
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


def _plan_first_step(chain: Chain) -> None:
    schedule, folder = chain.schedule, chain.preprocessed(1)
    if schedule.base_plans is not None:
        plans = json.loads(schedule.base_plans.read_text(encoding="utf-8"))
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
    plans.pop(BLOCK_KEY, None)
    plans = apply_override(plans, schedule.configuration, schedule.plans)
    plans = set_intensity(plans, schedule.intensity, chain.raw(1))
    write_json(folder / f"{name}.json", plans)
    chain.content["plans_name"] = name
    chain.save()


def _warn_of_clipping(chain: Chain, cases: Mapping[int | str, Sequence[Case]]) -> None:
    for step in chain.schedule.own_steps:
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
    finished = [other for other in earlier if _is_prepared(chain, other)]
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
        owner = chain.first_step(variant.seed) if step == 1 else variant
        name = chain.plans_name(owner)
        plans = {**base_plans(chain), "dataset_name": chain.dataset_name(step), "plans_name": name}
        plans[BLOCK_KEY] = block_of(chain, owner, step).to_json()
        write_json(chain.preprocessed(step) / f"{name}.json", plans)


def _check_same_settings(chain: Chain, variant: Variant, step: int | str) -> None:
    """Refuse settings that differ from those of a training which was begun."""
    owner = chain.first_step(variant.seed) if step == 1 else variant
    path = chain.model_folder(variant, step) / "plans.json"
    if not path.is_file():
        return
    before = StepBlock.from_plans(json.loads(path.read_text(encoding="utf-8")), dataset_json_of(path.parent)).settings
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
    )
