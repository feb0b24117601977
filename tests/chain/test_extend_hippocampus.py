"""A model of stock nnU-Net, given away as a zip, learns the posterior hippocampus when its own data are gone."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from tests import shell
from tests.conftest import real_data

pytestmark = [pytest.mark.chain, pytest.mark.data, pytest.mark.slow, pytest.mark.timeout(3600)]

NETWORK = {"patch_size": [40, 56, 40], "batch_size": 2}
FEATURES = [8, 16, 32, 64]
TRAINER = "nnUNetTrainer_5epochs"  # nnU-Net's own: 5 epochs of 250 iterations


def write_raw(source: Path, target: Path, cases: Sequence[str], kept: dict[str, int]) -> Path:
    """The named cases of the set, with all labels but ``kept`` taken away and these numbered from 1."""
    for name in ("imagesTr", "labelsTr"):
        (target / name).mkdir(parents=True)
    for case in cases:
        shutil.copy(source / "imagesTr" / f"{case}_0000.nii.gz", target / "imagesTr")
        image = SimpleITK.ReadImage(str(source / "labelsTr" / f"{case}.nii.gz"))
        labels = SimpleITK.GetArrayFromImage(image)
        renumbered = sum(((labels == own).astype(np.uint8) * (i + 1) for i, own in enumerate(kept.values())))
        volume = SimpleITK.GetImageFromArray(renumbered)
        volume.CopyInformation(image)
        SimpleITK.WriteImage(volume, str(target / "labelsTr" / f"{case}.nii.gz"))
    content = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    content["labels"] = {"background": 0, **{name: i + 1 for i, name in enumerate(kept)}}
    content["numTraining"] = len(cases)
    (target / "dataset.json").write_text(json.dumps(content))
    return target


def call(*command: str, cwd: Path) -> None:
    program = str(Path(sys.executable).with_name(command[0]))
    workers = "0" if command[0] == "nnUNetv2_train" else "1"  # with 0 nnU-Net cannot plan
    environment = {**os.environ, "nnUNet_n_proc_DA": workers}
    done = shell.run([program, *command[1:]], cwd, environment, seconds=1800)
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_stock_model_keeps_the_anterior_part_without_its_data(tmp_path, nnunet_folders, record_property):
    source = real_data("hippocampus")
    own = json.loads((source / "dataset.json").read_text(encoding="utf-8"))["labels"]
    anterior, posterior = ({name: own[name]} for name in ("anterior", "posterior"))
    split = json.loads((source / "split.json").read_text(encoding="utf-8"))
    raw, preprocessed = nnunet_folders["nnUNet_raw"], nnunet_folders["nnUNet_preprocessed"]
    old, new = "Dataset001_Anterior", "Dataset002_Posterior"
    write_raw(source, raw / old, split["train"][:100], anterior)
    write_raw(source, raw / new, split["train"][100:], posterior)
    write_raw(source, raw / "Dataset003_Test", split["test"], anterior | posterior)

    call("nnUNetv2_plan_and_preprocess", "-d", "1", "-c", "3d_fullres", "--no_pp", cwd=tmp_path)
    plans_file = preprocessed / old / "nnUNetPlans.json"
    plans = json.loads(plans_file.read_text(encoding="utf-8"))
    configuration = plans["configurations"]["3d_fullres"]
    configuration.update(NETWORK)
    arguments = configuration["architecture"]["arch_kwargs"]
    n = len(FEATURES)
    for key, value in arguments.items():
        if isinstance(value, list):
            arguments[key] = value[: n - 1 if key == "n_conv_per_stage_decoder" else n]
    arguments.update(n_stages=n, features_per_stage=FEATURES)
    plans_file.write_text(json.dumps(plans))
    call("nnUNetv2_preprocess", "-d", "1", "-c", "3d_fullres", "-np", "2", cwd=tmp_path)
    call("nnUNetv2_train", "1", "3d_fullres", "all", "-tr", TRAINER, "-device", "cpu", cwd=tmp_path)
    packed = ["nnUNetv2_export_model_to_zip", "-d", "1", "-o", "anterior.zip", "-c", "3d_fullres", "-f", "all"]
    call(*packed, "-tr", TRAINER, cwd=tmp_path)
    for folder in nnunet_folders.values():
        shutil.rmtree(folder / old, ignore_errors=True)
    assert not any(old in path for _, folders, _ in os.walk(tmp_path) for path in folders)

    extend = ["nnunet-cil", "extend", "anterior.zip", "--with", new, "--classes", "posterior=1", "--name", "both"]
    call(*extend, "--test", "Dataset003_Test", "--epochs", "8", "--iterations", "100", "--device", "cpu", cwd=tmp_path)
    chain = nnunet_folders["nnUNet_results"] / "chain_both"
    scores = json.loads((chain / "scores.json").read_text(encoding="utf-8"))
    (before, after), n_subjects = scores["runs"][0]["dice"], scores["n_test_subjects"]
    record_property("anterior before and after, posterior", [before[0], *after])
    assert n_subjects == len(split["test"])
    assert before[0] > 0.6
    assert after[0] > before[0] - 0.03
    assert after[1] > 0.6
