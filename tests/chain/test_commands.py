"""The commands a user types, each in a process of its own, on a tiny two-step chain."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch

from tests import shell
from tests.conftest import write_schedule, write_tiny_dataset

pytestmark = pytest.mark.chain

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
BIN = Path(sys.executable).parent


class User:
    """Somebody with a shell, nnU-Net's three folders and a schedule."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("nnUNet_")}
        self.environment |= {name: str(root / name) for name in FOLDERS}
        self.environment |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "nnUNet_n_proc_DA": "0"}
        self.environment |= {"nnUNet_def_n_proc": "1"}
        source = write_tiny_dataset(root / "source")
        self.schedule = write_schedule(root / "schedule.yaml", source)

    def types(self, *lines: str, fails: bool = False) -> str:
        """What one new shell prints for some lines; its status has to be 0, or not if it ``fails``."""
        done = shell.run(["bash", "-e", "-c", "\n".join(lines)], self.root, self.environment)
        assert (done.returncode != 0) == fails, done.stdout
        return done.stdout

    def fold(self, step: int) -> Path:
        model = "nnUNetTrainerPGCD__nnUNetPlans__3d_fullres"
        return self.root / "nnUNet_results" / f"Dataset{499 + step}_tiny_step{step}" / model / "fold_all"


@pytest.fixture(scope="module")
def driven(tmp_path_factory) -> User:
    """Ran the whole chain with ``nnunet-cil run``."""
    user = User(tmp_path_factory.mktemp("driven"))
    user.shown = user.types("nnunet-cil run schedule.yaml")
    return user


def test_run_ends_with_a_table_and_files(driven):
    chain = driven.root / "nnUNet_results" / "chain_tiny"
    for part in ("Dice after the last step", "pgcd: Dice (%) by step", "nnUNetv2_predict -i"):
        assert part in driven.shown
    scores = json.loads((chain / "scores.json").read_text(encoding="utf-8"))
    assert [run["method"] for run in scores["runs"]] == ["pgcd"]
    assert scores["runs"][0]["dice"][0][1] is None, "a class that is not yet learned has no score"
    assert scores["runs"][0]["cost"]["step2"]["seconds_per_iteration"] > 0
    assert (chain / "figures" / "mean_dice.png").stat().st_size > 1000
    assert b"/FontFile2" in (chain / "figures" / "mean_dice.pdf").read_bytes(), "publishers refuse Type 3 fonts"
    assert "done" in driven.types("nnunet-cil status schedule.yaml")


def test_a_second_run_repeats_nothing(driven):
    before = {path: path.stat().st_mtime_ns for path in driven.root.rglob("*.pth")}
    shown = driven.types("nnunet-cil run schedule.yaml")
    assert before == {path: path.stat().st_mtime_ns for path in driven.root.rglob("*.pth")}
    assert "predicting" not in shown
    assert shown.splitlines()[-1] == driven.shown.splitlines()[-1]


ON_A_GPU = """
import logging
from pathlib import Path

import torch

from nnunet_cil import driver, nnunet_api
from nnunet_cil.schedule import load_schedule

if __name__ == "__main__":
    logging.basicConfig(level="INFO")
    driver.device_of = lambda schedule: torch.device("cuda")
    nnunet_api.predict = None
    driver.run(load_schedule(Path("schedule.yaml")), [], [])
"""


def test_on_a_gpu_a_process_of_its_own_predicts_and_scores(driven):
    model = driven.root / "nnUNet_results" / "chain_tiny" / "predictions" / "nnUNetPlans" / "step2_fold_all"
    before = (model / "scores.json").read_text(encoding="utf-8")
    shutil.rmtree(model)
    (driven.root / "on_a_gpu.py").write_text(ON_A_GPU, encoding="utf-8")
    shown = driven.types("python on_a_gpu.py")
    assert "predicting 1 test subjects with step 2 of pgcd" in shown, "its lines come here"
    assert (model / "scores.json").read_text(encoding="utf-8") == before


def test_lines_typed_by_hand_give_what_the_driver_gives(driven, tmp_path):
    user = User(tmp_path)
    shown = user.types("nnunet-cil prepare schedule.yaml")
    lines = [line.strip() for line in shown.splitlines() if line.startswith("  ")]
    export, trainings = lines[0], lines[1:]
    assert export.startswith("export nnUNet_extTrainer=")
    assert trainings == [
        f"nnUNetv2_train Dataset50{i}_tiny_step{i + 1} 3d_fullres all -tr nnUNetTrainerPGCD -device cpu" for i in (0, 1)
    ]
    user.types(export, *trainings)
    for step in (1, 2):
        hand, driver = (torch.load(u.fold(step) / "checkpoint_final.pth", weights_only=False) for u in (user, driven))
        assert hand["trainer_name"] == driver["trainer_name"] == "nnUNetTrainerPGCD"
        terms = [key for key in hand["logging"] if key.startswith("loss_")]
        assert terms == [key for key in driver["logging"] if key.startswith("loss_")]
        assert len(terms) == (0 if step == 1 else 5)
        for key in ("train_losses", "val_losses", *terms):
            assert hand["logging"][key] == driver["logging"][key]
        for key, weight in hand["network_weights"].items():
            assert torch.equal(weight, driver["network_weights"][key])
    said = [next(u.fold(2).glob("training_log*.txt")).read_text(encoding="utf-8") for u in (user, driven)]
    teachers = [
        next(line for line in text.splitlines() if "teacher Dataset" in line).split("teacher ")[1] for text in said
    ]
    assert teachers[0].split(", sha256")[0] == teachers[1].split(", sha256")[0]
    assert "pgcd: Dice (%) by step" in user.types("nnunet-cil evaluate schedule.yaml")


def test_nnunets_own_predict_gives_the_segmentations_that_were_scored(driven):
    line = next(line for line in driven.shown.splitlines() if "nnUNetv2_predict" in line and "_step2 " in line)
    driven.types('eval "$(nnunet-cil env)"', line.replace("OUTPUT", "out") + " -npp 0 -nps 0")
    stored = driven.root.glob("nnUNet_results/chain_tiny/predictions/nnUNetPlans/step2_fold_all/*/case_5.nii.gz")
    ours, theirs = (
        SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
        for path in (next(stored), driven.root / "out" / "case_5.nii.gz")
    )
    np.testing.assert_array_equal(ours, theirs)
    assert theirs.max() <= 2


def test_without_the_variable_nnunet_says_what_is_missing(driven):
    images = driven.root / "nnUNet_results" / "chain_tiny" / "test" / "images"
    line = f"nnUNetv2_predict -i {images} -o none -d 501 -tr nnUNetTrainerPGCD -c 3d_fullres -f all -device cpu"
    assert "Could not find requested nnunet trainer nnUNetTrainerPGCD" in driven.types(line, fails=True)


def test_export_to_zip_and_import(driven, tmp_path):
    arguments = "-d 501 -f all -c 3d_fullres -tr nnUNetTrainerPGCD -p nnUNetPlans"
    driven.types(f"nnUNetv2_export_model_to_zip {arguments} -o {tmp_path}/model.zip")
    driven.types(
        f"export nnUNet_results={tmp_path}/elsewhere; mkdir $nnUNet_results",
        f"nnUNetv2_install_pretrained_model_from_zip {tmp_path}/model.zip",
    )
    there = tmp_path / "elsewhere" / driven.fold(2).relative_to(driven.root / "nnUNet_results")
    assert (there / "checkpoint_final.pth").read_bytes() == (driven.fold(2) / "checkpoint_final.pth").read_bytes()
    assert (there / "validation" / "summary.json").is_file()


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_broken_teacher_stops_the_chain_with_one_message(driven, tmp_path, damage):
    user = User(tmp_path)
    shutil.rmtree(tmp_path / "source")
    for name in (*FOLDERS, "source"):
        shutil.copytree(driven.root / name, tmp_path / name, symlinks=True, dirs_exist_ok=True)
    user.schedule.write_text(driven.schedule.read_text(encoding="utf-8"))
    checkpoint = user.fold(1) / "checkpoint_final.pth"
    shutil.rmtree(user.fold(2))
    if damage == "missing":
        checkpoint.unlink()
        (user.fold(1) / "prototypes.npz").unlink()
        line = "nnUNetv2_train 501 3d_fullres all -tr nnUNetTrainerPGCD -device cpu"
        shown = user.types('eval "$(nnunet-cil env)"', line, fails=True)
        assert "teacher: got no file" in shown
    else:
        checkpoint.write_bytes(checkpoint.read_bytes()[:10_000])
        shown = user.types("nnunet-cil run schedule.yaml", fails=True)
        assert "got an unreadable model" in shown
        assert "Traceback" not in shown
    assert not list(user.fold(2).glob("*.pth"))


def test_unset_folders_are_named_before_anything_starts(driven):
    shown = driven.types("unset nnUNet_raw nnUNet_results", "nnunet-cil run schedule.yaml", fails=True)
    assert "nnUNet_raw, nnUNet_results: got nothing, expected a folder" in shown
    assert "Traceback" not in shown
