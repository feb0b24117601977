"""Files of a step: what those of a fold are called, how they are written whole, what makes a dataset whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnunet_cil.untrusted import read_json

STEP_FILE = "cil_step.json"
FILES_FILE = "files.json"  # which files of the user's datasets something was made of
CHECKPOINT = "checkpoint_final.pth"
PROTOTYPE_FILE = "prototypes.npz"
LINEAGE_FILE = "lineage.json"
COST_FILE = "cost.json"
REPLAY_FILE = "replay.json"


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(content, indent=1, sort_keys=False) + "\n")
    os.replace(partial, path)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside ``folder``, to write into; at the end it gets that name.

    After an error it is gone, and so is the parent that was made for it.

    Raises:
        OSError: ``folder`` is there at the end, and not empty.
    """
    partial = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    parent_is_ours = not folder.parent.exists()
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if parent_is_ours and not any(folder.parent.iterdir()):
            folder.parent.rmdir()


def read_step_file(folder: Path) -> dict | None:
    """Content of a folder's ``cil_step.json``, None if it has none (the folder is not one of ours)."""
    path = folder / STEP_FILE
    return read_json(path, "what nnunet-cil wrote there: run `nnunet-cil prepare` again") if path.is_file() else None


def count_whole_cases(folder: Path) -> int:
    """Cases of a folder of preprocessed data that have image, segmentation and properties."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    cases = [name.removesuffix("_seg.b2nd") for name in names if name.endswith("_seg.b2nd")]
    return sum({f"{case}.b2nd", f"{case}.pkl"} <= names for case in cases)


def check_step_files(preprocessed: Path, data_identifier: str) -> None:
    """Refuse a step's dataset whose preprocessing was not finished. Datasets that are not ours pass.

    Raises:
        ValueError: the data were removed, the configuration is not marked as complete, or images, segmentations or
            properties are missing.
    """
    step = read_step_file(preprocessed)
    if step is None:
        return
    if step.get("forgotten"):
        raise ValueError(
            f"{preprocessed}: got a step whose data were removed with `nnunet-cil audit --forget`, expected data to "
            "train on. Train a later step, or start a chain of another name."
        )
    folder = preprocessed / data_identifier
    n_whole = count_whole_cases(folder)
    if data_identifier not in step["complete"] or n_whole != step["n_cases"]:
        raise ValueError(
            f"{folder}: got {n_whole} complete cases, expected {step['n_cases']} and a finished preprocessing. It "
            "was interrupted or files were removed: run `nnunet-cil prepare SCHEDULE` again, then this command."
        )
