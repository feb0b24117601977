"""The schedules of ``examples/`` fit the real data that they are made for."""

from __future__ import annotations

from pathlib import Path

import pytest

from nnunet_cil.dataset import step_cases
from nnunet_cil.dataset import test_cases as held_out_cases
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


@pytest.mark.data
@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_example_fits_its_data(path, nnunet_folders):
    for name, folder in FOLDERS.items():
        (nnunet_folders["nnUNet_raw"] / name).symlink_to(real_data(folder), target_is_directory=True)
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
