"""The schedules of ``examples/`` fit the real data that they are made for."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from nnunet_cil.cases import held_out_cases, step_cases
from nnunet_cil.schedule import load_schedule
from tests.conftest import real_data

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))
FOLDERS = {
    "Dataset004_Hippocampus": "hippocampus",
    "Dataset111_CHAOSMRsmall": "chaos_mr_small",
    "Dataset120_OpenKBP": "openkbp_ct",
    "Dataset130_CardiacA": "cardiac_site_a",
    "Dataset131_CardiacB": "cardiac_site_b",
}


@pytest.fixture
def public_sets(nnunet_folders) -> Path:
    """nnUNet_raw with the real data by the names that the examples use."""
    raw = nnunet_folders["nnUNet_raw"]
    for name, folder in FOLDERS.items():
        (raw / name).symlink_to(real_data(folder), target_is_directory=True)
    drop_labels = [sys.executable, str(EXAMPLES[0].with_name("drop_labels.py"))]
    subprocess.run([*drop_labels, str(raw / "Dataset120_OpenKBP"), str(raw / "Dataset121_OpenKBPpartial")], check=True)
    return raw


@pytest.mark.data
def test_labels_are_dropped_from_training_subjects_and_declared(public_sets):
    whole, partial = (public_sets / name for name in ("Dataset120_OpenKBP", "Dataset121_OpenKBPpartial"))
    numbers = json.loads((whole / "dataset.json").read_text(encoding="utf-8"))["labels"]
    split = json.loads((whole / "split.json").read_text(encoding="utf-8"))
    with open(partial / "unlabelled.csv", encoding="utf-8") as file:
        dropped = {(row["case"], row["class"]) for row in csv.DictReader(file)}
    assert 0.2 < len(dropped) / (len(split["train"]) * (len(numbers) - 1)) < 0.45
    for case in (*split["train"][:3], *split["test"][:2]):
        before, after = (
            SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / "labelsTr" / f"{case}.nii.gz")))
            for folder in (whole, partial)
        )
        for name, number in numbers.items():
            if (case, name) in dropped:
                assert case in split["train"]
                assert not (after == number).any()
            elif number:
                np.testing.assert_array_equal(before == number, after == number)


@pytest.mark.data
@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_example_fits_its_data(path, public_sets):
    schedule = load_schedule(path)
    assert schedule.name == path.stem
    test = {case.images[0].resolve() for _, case in held_out_cases(schedule).values()}
    assert test
    seen: set[str] = set()
    for step in range(1, len(schedule.steps) + 1):
        cases = step_cases(schedule, step)
        assert cases
        assert not test & {case.images[0].resolve() for case in cases}
        if schedule.images == "disjoint":
            assert not seen & {case.name for case in cases}
        seen |= {case.name for case in cases}
