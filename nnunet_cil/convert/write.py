"""The raw dataset of a public set: written whole or not at all."""

from __future__ import annotations

import glob
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from nnunet_cil import nnunet_api
from nnunet_cil.convert.nifti import UNREADABLE
from nnunet_cil.convert.source import ENDING, Case, PublicSet, Written, shown
from nnunet_cil.parallel import over_cases
from nnunet_cil.step_files import whole_folder
from nnunet_cil.untrusted import EXPECTED_NAME, is_name

logger = logging.getLogger(__name__)

ROUNDING_MM = 1e-3  # below this, two headers say the same


@dataclass(frozen=True)
class Converted:
    """The dataset that was written: its folder, and the names of the cases to train and to test on."""

    folder: Path
    train: tuple[str, ...]
    test: tuple[str, ...]


def write_dataset(found: PublicSet, dataset_id: int, name: str | None = None) -> Converted:
    """Write ``DatasetNNN_NAME`` into nnUNet_raw: images, labels, ``dataset.json`` and ``split.json``.

    All labelled cases lie in ``imagesTr`` and ``labelsTr``. ``split.json``, which ``test:`` of a schedule takes, tells
    ``train`` and ``test`` apart, and says where this split comes from (``origin``) and to which part of the set a case
    belongs (``parts``).

    Args:
        dataset_id: nnU-Net's number, 1 to 999, that no dataset has yet in any of nnU-Net's three folders.
        name: letters, digits, ``-`` and ``_``; None takes the set's.

    Raises:
        FileExistsError: there is such a dataset already.
        ValueError: number or name cannot be used, or cases cannot be converted; all problems at once, and nothing was
            written.
    """
    folder = _target(dataset_id, name or found.name)
    _check_names(found)
    _warn_of_missing(found)
    with whole_folder(folder) as partial:
        for part in ("imagesTr", "labelsTr"):
            (partial / part).mkdir()
        known = frozenset(found.labels.values())
        arguments = [(found.write, case, partial, known, len(found.channels)) for case in found.cases]
        n_bytes = sum(_bytes_of(path) for case in found.cases for path in (*case.images, *case.labels))
        written = over_cases(_write_case, arguments, n_bytes, f"converting {folder.name}")
        if problems := [result.problem for result in written if result.problem]:
            raise ValueError(
                f"{len(problems)} of {len(written)} cases cannot be converted; nothing was written:\n  "
                + "\n  ".join(problems)
            )
        converted = _describe(found, folder, partial)
    _tell(found, written)
    return converted


def _target(dataset_id: int, name: str) -> Path:
    if not 1 <= dataset_id <= 999:
        raise ValueError(f"--dataset-id: got {dataset_id}, expected a number from 1 to 999.")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or not is_name(name):
        raise ValueError(
            f"--name: got {name!r}, expected letters, digits, - and _, as it becomes part of a folder name."
        )
    folder = nnunet_api.nnunet_paths()["nnUNet_raw"] / f"Dataset{dataset_id:03d}_{name}"
    if folder.exists():
        raise FileExistsError(
            f"{folder}: it exists and is not touched. Remove it, or give another --dataset-id or --name."
        )
    if taken := nnunet_api.taken_dataset_ids().get(dataset_id):
        raise ValueError(
            f"--dataset-id: got {dataset_id}, expected a number that is free: {', '.join(sorted(taken))} has it in "
            "nnUNet_raw, nnUNet_preprocessed or nnUNet_results."
        )
    return folder


def _check_names(found: PublicSet) -> None:
    names = [case.name for case in found.cases]
    if bad := [name for name in names if not is_name(name)]:
        raise ValueError(f"{found.name}: got the subject {bad[0]!r}, expected {EXPECTED_NAME}.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{found.name}: got the subjects {shown(twice)} twice, expected each once.")


def _warn_of_missing(found: PublicSet) -> None:
    """Say where a part has fewer subjects than published: an archive may be unpacked in part."""
    numbers = Counter(case.part for case in found.cases)
    for part, size in found.sizes.items():
        if numbers[part] < size:
            logger.warning(
                "%s: got %d labelled subjects in %s, expected %d as published. Unless some are left out on purpose, "
                "unpack the archive again.",
                found.name,
                numbers[part],
                part,
                size,
            )


def _bytes_of(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _write_case(
    write: Callable[[Case, Path, Collection[int]], Written],
    case: Case,
    folder: Path,
    known: Collection[int],
    n_channels: int,
) -> Written:
    """Convert one case; what is wrong with it becomes part of the result, so that all problems can be told at once."""
    try:
        result = write(case, folder, known)
    except (*UNREADABLE, RuntimeError) as error:
        return Written(problem=f"{case.name}: {error}")
    images = len(list((folder / "imagesTr").glob(f"{glob.escape(case.name)}_[0-9][0-9][0-9][0-9]{ENDING}")))
    if images != n_channels:
        return Written(problem=f"{case.name}: got {images} channels in {case.images[0]}, expected {n_channels}.")
    return result


def _describe(found: PublicSet, folder: Path, partial: Path) -> Converted:
    """Write ``split.json`` and ``dataset.json``."""
    names = [case.name for case in found.cases]
    parts: dict[str, list[str]] = {}
    for case in found.cases:
        parts.setdefault(case.part, []).append(case.name)
    converted = Converted(
        folder, tuple(n for n in names if n not in found.test), tuple(n for n in names if n in found.test)
    )
    split = {"origin": found.split_origin, "train": converted.train, "test": converted.test, "parts": parts}
    description = {
        "channel_names": {str(number): channel for number, channel in enumerate(found.channels)},
        "labels": dict(found.labels),
        "numTraining": len(names),
        "file_ending": ENDING,
        # scans of one set, and of two that are trained and tested on, may be stored along other axes
        "overwrite_image_reader_writer": "NibabelIOWithReorient",
        "reference": found.reference,
        "licence": found.terms,
        "description": "Converted by nnunet-cil convert; split.json says which of the cases are for test.",
    }
    for file, content in (("split.json", split), ("dataset.json", description)):
        (partial / file).write_text(json.dumps(content, indent=1) + "\n")
    return converted


def _tell(found: PublicSet, written: list[Written]) -> None:
    """Log what was changed on the way."""
    cases = dict(zip((case.name for case in found.cases), written, strict=True))
    if moved := {name: r.label_moved_mm for name, r in cases.items() if r.label_moved_mm > ROUNDING_MM}:
        logger.info(
            "%d labels took the grid of their image, off theirs by rounding: up to %.2g mm",
            len(moved),
            max(moved.values()),
        )
    if moved := {name: r.image_moved_mm for name, r in cases.items() if r.image_moved_mm > 0}:
        worst = max(moved, key=lambda name: moved[name])
        logger.warning(
            "%d images have axes that are not perpendicular, which ITK refuses. They were written anew with the "
            "nearest perpendicular axes and the same voxels; no voxel moved by more than %.3g mm (%s): %s",
            len(moved),
            moved[worst],
            worst,
            ", ".join(moved),
        )
    if overlap := {name: r.n_overlap for name, r in cases.items() if r.n_overlap}:
        logger.info(
            "%d voxels of %d cases are in more than one mask; the later organ has them",
            sum(overlap.values()),
            len(overlap),
        )
