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


def test_pgcd_lwf_and_mib_keep_the_anterior_part_that_finetune_loses(tmp_path, nnunet_folders):
    source = real_data("hippocampus")
    split = json.loads((source / "split.json").read_text(encoding="utf-8"))
    (tmp_path / "split.json").write_text(json.dumps({"train": split["train"][:24], "test": split["test"][:6]}))
    schedule = {**SCHEDULE, "source": str(source), "test": str(tmp_path / "split.json")}
    (tmp_path / "schedule.yaml").write_text(yaml.safe_dump(schedule))
    command = [
        str(Path(sys.executable).with_name("nnunet-cil")),
        "run",
        "schedule.yaml",
        "--methods",
        "pgcd",
        "finetune",
        "lwf",
        "mib",
    ]
    done = shell.run(command, tmp_path, os.environ, seconds=1200)
    assert done.returncode == 0, done.stdout
    scores = json.loads((tmp_path / "nnUNet_results" / "chain_hippocampus" / "scores.json").read_text(encoding="utf-8"))
    pgcd, finetune, lwf, mib = (run["dice"] for run in scores["runs"])
    assert scores["n_test_subjects"] == 6
    assert pgcd[0][0] > 0.7
    assert finetune[1][0] < 0.05
    assert pgcd[1][0] > pgcd[0][0] - 0.03
    assert pgcd[1][1] > finetune[1][1] - 0.05
    assert min(lwf[1][0], mib[1][0]) > finetune[1][0] + 0.1, "as their papers say"
