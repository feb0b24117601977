"""TotalSegmentator's CT dataset, version 2 (Wasserthal et al. 2023; Zenodo 10047292): one mask an organ."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from nnunet_cil.convert.nifti import image_target, label_target, place_channels, read_labels, write_labels
from nnunet_cil.convert.source import (
    ENDING,
    Case,
    PublicSet,
    Written,
    check_layout,
    nifti_files,
    numbered,
    root_of,
    shown,
    visible,
)

PARTS = ("train", "val", "test")
SHOWN_ORGANS = 8


def find(source: Path, organs: Sequence[str]) -> PublicSet:
    """Read the layout ``meta.csv``, ``sNNNN/ct.nii.gz``, ``sNNNN/segmentations/ORGAN.nii.gz``.

    The column ``split`` of ``meta.csv`` says which subjects are for test; those of ``val`` are for training, as in
    TotalSegmentator's own ``convert_dataset_to_nnunet.py``.

    Args:
        organs: names of masks; their order is that of the label values, from 1 on. Where masks overlap the later organ
            wins, as there.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: another layout, an unknown organ, or a missing mask; all problems at once.
    """
    root = root_of(source, "meta.csv", "meta.csv and a folder a subject, such as s0000")
    problems: list[str] = []
    parts = _parts(root / "meta.csv", problems)
    if not parts:
        check_layout(root, "TotalSegmentator", problems)
    folders = [name for name in visible(root) if (root / name).is_dir()]
    if missing := sorted(set(parts) - set(folders)):
        problems.append(f"{root}: got no folder {shown(missing)}, expected one for each subject of meta.csv.")
    if others := sorted(set(folders) - set(parts)):
        problems.append(f"{root}: got folders {shown(others)} that meta.csv does not have, expected its subjects only.")
    subjects = [name for name in folders if name in parts]
    found = {name: nifti_files(root / name / "segmentations", problems) for name in subjects}
    known = sorted(set().union(*found.values()))
    for organ in dict.fromkeys(organs):
        if organ not in known:
            near = difflib.get_close_matches(organ, known, 3)
            problems.append(f"--organs: got {organ!r}, expected a mask such as {near or known[:SHOWN_ORGANS]}.")
        elif lacking := [name for name in subjects if organ not in found[name]]:
            problems.append(
                f"{root}: got no segmentations/{organ}{ENDING} of {shown(lacking)}, expected one a subject."
            )
    if twice := sorted({organ for organ in organs if list(organs).count(organ) > 1}):
        problems.append(f"--organs: got {twice} twice, expected each organ once.")
    problems += [
        f"{root / name}: got no ct{ENDING}." for name in subjects if not (root / name / f"ct{ENDING}").is_file()
    ]
    check_layout(root, "TotalSegmentator", problems)
    return PublicSet(
        name="TotalSegmentator",
        channels=("CT",),
        labels=numbered(organs),
        cases=tuple(
            Case(name, parts[name], (root / name / f"ct{ENDING}",), tuple(found[name][organ] for organ in organs))
            for name in subjects
        ),
        test=frozenset(name for name in subjects if parts[name] == "test"),
        split_origin="the column split of the set's meta.csv: train and val for training, test for test",
        terms="CC BY 4.0 (Zenodo 10047292)",
        reference="Wasserthal et al.: TotalSegmentator: robust segmentation of 104 anatomic structures in CT images. "
        "Radiology: Artificial Intelligence 5(5), 2023",
        write=write_masks,
    )


def _parts(path: Path, problems: list[str]) -> dict[str, str]:
    """Part of each subject, of ``meta.csv``."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, delimiter=";"))
    except (csv.Error, UnicodeDecodeError) as error:
        problems.append(f"{path}: got no CSV in UTF-8 ({error}), expected image_id;...;split;...")
        return {}
    if not rows or not {"image_id", "split"} <= set(rows[0]):
        problems.append(f"{path}: got columns {list(rows[0]) if rows else []}, expected image_id;...;split;...")
        return {}
    parts = {str(row["image_id"]): str(row["split"]) for row in rows}
    if others := sorted(set(parts.values()) - set(PARTS)):
        problems.append(f"{path}: got {others} in column split, expected {list(PARTS)}.")
    if "test" not in parts.values() or not {"train", "val"} & set(parts.values()):
        problems.append(
            f"{path}: got {sorted(set(parts.values()))} in column split, expected subjects of train and test."
        )
    return parts


def write_masks(case: Case, folder: Path, known: Collection[int]) -> Written:
    """Convert a case with one binary mask a label, in the order of the labels; a later one wins where they overlap."""
    first, moved = place_channels(case, folder)
    labels = np.zeros(first.shape, np.uint8)
    distance, overlap = 0.0, 0
    for value, path in enumerate(case.labels, 1):
        values, moved_label = read_labels(path, (0, 1), case.images[0], first)
        distance = max(distance, moved_label)
        mask = values == 1
        overlap += int(np.count_nonzero(labels[mask]))
        labels[mask] = value
    write_labels(label_target(case, folder), labels, image_target(case, folder))
    return Written(label_moved_mm=distance, image_moved_mm=moved, n_overlap=overlap)
