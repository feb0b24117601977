"""What is wrong in the images and labels that a schedule names.

All are read once, before anything is written.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK

from nnunet_cil import nnunet_api
from nnunet_cil.cases import (
    ONE_CHANNEL_A_FILE,
    Case,
    file_id,
    final_labels,
    first_source,
    held_out_cases,
    step_source,
    step_table,
)
from nnunet_cil.chain import JOINT
from nnunet_cil.labels import apply_remap
from nnunet_cil.parallel import over_cases
from nnunet_cil.schedule import Schedule
from nnunet_cil.untrusted import dataset_json_of, read_json

logger = logging.getLogger(__name__)

SPACING_TOLERANCE = 1e-3
DIRECTION_TOLERANCE = 0.5  # of direction cosines: another order or sign of the axes, no rounding
WITH_DIRECTIONS = (".nii.gz", ".nii", ".nrrd", ".mha")  # file types that say where the axes lead
SHOWN_CASES = 5  # in a warning
INTENSITY_SAMPLES = 10**8  # in all of step 1, as nnU-Net takes them
INTENSITY_SAMPLES_LATER = 10**4  # in each case of a later step: nothing is planned from these


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
            f"dataset.json. {ONE_CHANNEL_A_FILE}"
        )
    try:
        difference = _grid_difference(case.images, case.label, dataset_json)
        reader = nnunet_api.reader_writer(dataset_json, case.label)
        if not difference:
            images, properties = reader.read_images([str(path) for path in case.images])
            seg, of_label = reader.read_seg(str(case.label))
            for path in (*case.images, case.label):
                nnunet_api.read_to_the_end(path)
    except Exception as error:
        raise ValueError(
            f"{case.label}: got an unreadable image or label ({error}), expected files nnU-Net can read."
        ) from error
    if difference:
        raise ValueError(f"{case.label}: {difference}")
    if len(images) != n_channels:
        raise ValueError(
            f"{case.images[0]}: got {len(images)} channels in {n_channels} files, expected one in each. "
            f"{ONE_CHANNEL_A_FILE}"
        )
    if images.shape[1:] != seg.shape[1:]:
        raise ValueError(f"{case.label}: got size {seg.shape[1:]}, expected {images.shape[1:]} as the image.")
    got, expected = (tuple(each["spacing"]) for each in (of_label, properties))
    if nnunet_api.spacing_file(case.label, is_label=True) and not np.allclose(got, expected, rtol=SPACING_TOLERANCE):
        raise ValueError(f"{case.label}: got spacing {got} mm, expected {expected} mm as {case.images[0].name}.")
    for path, voxels, files in ((case.images[0], images, case.images), (case.label, seg, [case.label])):
        if not np.isfinite(voxels).all() or any(map(_hides_not_finite, files)):
            raise ValueError(f"{path}: got voxels that are not finite (NaN or infinite), expected numbers.")
    if unknown := [int(v) if v == int(v) else v for v in np.unique(seg).tolist() if v not in case.table]:
        raise ValueError(
            f"{case.label}: got label values {unknown}, expected only {sorted(case.table)} of dataset.json."
        )
    return images, seg, expected


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
    intensities = {
        step: nnunet_api.foreground_intensities(images, apply_remap(seg, {-1: 0, **table}), n_samples)
        for step, (table, n_samples) in wanted.items()
    }
    return Scan(_counts(seg), None, crop, intensities, axes=_axes(case, dataset_json))


def _counts(seg: np.ndarray) -> dict[int, int]:
    """Voxels by own label value; what nnU-Net crops away is -1 and not counted."""
    values, counts = np.unique(seg[seg >= 0], return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


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
    return Scan(_counts(seg), digest=digest.hexdigest(), axes=_axes(case, dataset_json))


def scan_test_set(schedule: Schedule) -> dict[str, Scan]:
    """Read every test image and label once; by name of the subject."""
    if not schedule.test:
        return {}
    own, cases = dataset_json_of(first_source(schedule)), held_out_cases(schedule)
    n_bytes = bytes_of([path for _, case in cases.values() for path in case.images])
    todo = [(case, own) for _, case in cases.values()]
    return dict(zip(cases, over_cases(_scan_test, todo, n_bytes, "checking the test subjects"), strict=True))


def check_test_set(schedule: Schedule, tested: Mapping[str, Scan]) -> None:
    """Refuse test subjects whose files `scan_test_set` found to be damaged, not to fit each other, or mislabelled.

    Of classes that are labelled in them and that none of them has, a warning says that they are not scored.

    Raises:
        ValueError: all problems at once.
    """
    _refuse(_problems(tested.values()))
    cases = {name: case for name, (_, case) in held_out_cases(schedule).items()}
    for value, name in enumerate(schedule.classes, 1):
        labelled = [subject for subject, case in cases.items() if value in case.labelled]
        if labelled and not any(voxels_of(cases[subject], tested[subject])[value] for subject in labelled):
            logger.warning(
                "%s: test: got no voxel of %r in the labels of its %d subjects, so it is not scored. Was it left "
                "unlabelled there, or has the test set another name for it? See docs/schedule.md.",
                schedule.file,
                name,
                len(labelled),
            )


def _axes(case: Case, dataset_json: Mapping[str, Any]) -> str:
    if not case.label.name.endswith(WITH_DIRECTIONS):
        return ""
    _, _, direction = _grid(case.label, dataset_json)
    return SimpleITK.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(direction) if len(direction) == 9 else ""


def warn_of_axes(schedule: Schedule, scans: Mapping[Path, Scan], tested: Mapping[str, Scan]) -> None:
    """Warn of images that are stored along different axes: to a network, some of them are mirrored or turned.

    Nothing is said where the reader of the plans turns all images the same way.
    """
    given = _given_plans(schedule)
    dataset_json = dataset_json_of(first_source(schedule))
    reader = dataset_json.get("overwrite_image_reader_writer") if given is None else given.get("image_reader_writer")
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


def _given_plans(schedule: Schedule) -> Mapping[str, Any] | None:
    """Of a given model or of ``plans: base``; None if nnU-Net plans the chain."""
    if schedule.model is not None:
        return schedule.model.plans
    return None if schedule.base_plans is None else read_json(schedule.base_plans, "a plans.json of nnU-Net")


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


def _grid(path: Path, dataset_json: Mapping[str, Any]) -> tuple[tuple[float, ...], ...]:
    """Size, spacing and direction cosines as the dataset's reader takes them: ITK refuses some that nibabel reads."""
    if "Nibabel" in str(dataset_json.get("overwrite_image_reader_writer")) or path.suffix == ".nii":
        image = nibabel.load(path)
        spacing = np.linalg.norm(image.affine[:3, :3], axis=0)
        direction = np.diag([-1, -1, 1]) @ image.affine[:3, :3] / spacing  # from RAS to LPS
        return image.shape, tuple(spacing.tolist()), tuple(direction.ravel().tolist())
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader.GetSize(), reader.GetSpacing(), reader.GetDirection()


def _grid_difference(images: Sequence[Path], label: Path, dataset_json: Mapping[str, Any]) -> str:
    if not label.name.endswith(WITH_DIRECTIONS):
        return ""
    headers = [_grid(path, dataset_json) for path in (label, *images)]
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
    problems += _unfit_reader(schedule, first["file_ending"])
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
            totals = sum((voxels_of(case, scans[case.label]) for case in cases[step]), Counter())
            labels = final_labels(schedule, step, {})
            problems += [
                f"{where}: got no voxel of {name!r} in the labels of its {len(found)} cases, expected at least one. "
                "Check the class map, or move the class to a step that has it."
                for name in _labelled_classes(schedule, step)
                if not totals[labels[name]]
            ]
            known = {labels[name]: name for name in schedule.steps[step - 1].classes if totals[labels[name]]}
            voxels = {case.name: voxels_of(case, scans[case.label]) for case in cases[step]}
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


def voxels_of(case: Case, scan: Scan) -> Counter[int]:
    """Voxels of a case by the label value that they get."""
    counts: Counter[int] = Counter()
    for own, number in scan.counts.items():
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
        labels, table = final_labels(schedule, step, {}), step_table(schedule, step)
        voxels = {case.name: voxels_of(case, scans[case.label]) for case in cases[step]}
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


def _unfit_reader(schedule: Schedule, ending: str) -> list[str]:
    given = _given_plans(schedule)
    if given is None or nnunet_api.can_read(reader := given.get("image_reader_writer"), ending):
        return []
    return [
        f"{schedule.file}: {'plans: base' if schedule.model is None else 'model'}: got plans with the image reader "
        f"{reader!r}, expected one of nnU-Net's that takes {ending} files, as the new data are. Convert the data to a "
        "type that it takes."
    ]


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
