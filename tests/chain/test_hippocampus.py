"""A short chain on real volumes: first the anterior, then the posterior hippocampus, on other subjects."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from tests import shell
from tests.conftest import real_data

pytestmark = [pytest.mark.chain, pytest.mark.data, pytest.mark.timeout(1300)]

SCHEDULE = {
    "name": "hippocampus",
    "images": "disjoint",
    "device": "cpu",
    # coarse, and patches of parts of an image, on which classes appear soon: minutes also on old processors
    "plans": {"spacing": [2, 2, 2], "patch_size": [16, 16, 16], "batch_size": 4, "features_per_stage": [8, 16, 32]},
    "mirror_axes": [2],
    "training": {
        "epochs": 4,
        "iterations_per_epoch": 60,
        "val_iterations_per_epoch": 2,
        "initial_lr": 0.02,
        "later_lr": 0.02,
        "seed": 0,
    },
    "steps": [["anterior"], ["posterior"]],
}


def dice_of(folder: Path, *methods: str) -> list[list[list[float]]]:
    """By method, step and part, of a chain that is run in ``folder``."""
    source = real_data("hippocampus")
    split = json.loads((source / "split.json").read_text(encoding="utf-8"))
    (folder / "split.json").write_text(json.dumps({"train": split["train"][:24], "test": split["test"][:6]}))
    schedule = {**SCHEDULE, "source": str(source), "test": str(folder / "split.json")}
    (folder / "schedule.yaml").write_text(yaml.safe_dump(schedule))
    command = [str(Path(sys.executable).with_name("nnunet-cil")), "run", "schedule.yaml", "--methods", *methods]
    done = shell.run(command, folder, os.environ, seconds=1200)
    assert done.returncode == 0, done.stdout
    scores = json.loads((folder / "nnUNet_results" / "chain_hippocampus" / "scores.json").read_text(encoding="utf-8"))
    assert scores["n_test_subjects"] == 6
    return [run["dice"] for run in scores["runs"]]


def test_pgcd_and_mib_keep_the_anterior_part_that_finetune_loses(tmp_path, nnunet_folders):
    pgcd, finetune, mib = dice_of(tmp_path, "pgcd", "finetune", "mib")
    assert pgcd[0][0] > 0.7
    assert finetune[1][0] < 0.05
    assert pgcd[1][0] > pgcd[0][0] - 0.03
    assert pgcd[1][1] > finetune[1][1] - 0.05
    assert mib[1][0] > finetune[1][0] + 0.1, "as its paper says"


@pytest.mark.slow
def test_lwf_forgets_less_than_finetune(tmp_path, nnunet_folders):
    """As its paper says; the trainings in ``examples/results`` show it, too: ``test_results``."""
    finetune, lwf = dice_of(tmp_path, "finetune", "lwf")
    assert lwf[1][0] > finetune[1][0] + 0.1
