"""Names and completeness of the files that make a step's preprocessed dataset."""

from __future__ import annotations

import json
from pathlib import Path

STEP_FILE = "cil_step.json"


def read_step_file(folder: Path) -> dict | None:
    """Content of a folder's ``cil_step.json``, None if it has none (the folder is not one of ours)."""
    path = folder / STEP_FILE
    return json.loads(path.read_text()) if path.is_file() else None


def check_step_files(preprocessed: Path, data_identifier: str) -> None:
    """Refuse a step's dataset whose preprocessing was not finished. Datasets that are not ours pass.

    Raises:
        ValueError: the configuration is not marked as complete, or images, segmentations or properties are missing.
    """
    step = read_step_file(preprocessed)
    if step is None:
        return
    folder = preprocessed / data_identifier
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    cases = [name[: -len("_seg.b2nd")] for name in names if name.endswith("_seg.b2nd")]
    whole = [case for case in cases if {f"{case}.b2nd", f"{case}.pkl"} <= names]
    if data_identifier not in step["complete"] or len(whole) != step["n_cases"]:
        raise ValueError(
            f"{folder}: got {len(whole)} complete cases, expected {step['n_cases']} and a finished preprocessing. It "
            "was interrupted or files were removed: run `nnunet-cil prepare SCHEDULE` again, then this command."
        )
