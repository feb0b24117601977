from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest

from nnunet_cil.chain import JOINT
from nnunet_cil.evaluate import evaluation_file
from nnunet_cil.report.collect import collect, last_scores, read_terms
from nnunet_cil.step_files import write_json
from tests.report.chain_files import open_chain, write_chain, write_log, write_scores

NAN = np.nan


@pytest.fixture
def chain(nnunet_folders, tmp_path):
    return open_chain(tmp_path)


def test_a_whole_chain(chain):
    variants = write_chain(chain, seeds=(0, 1))
    found = collect(chain, variants)
    assert found.classes == ("ball", "tube", "blob")
    assert found.learned_at == (1, 1, 2)
    assert found.methods == ("pgcd", "finetune", "joint")
    assert [row.method for row in found.rows] == ["pgcd", "finetune", "joint"]
    assert len(found.models) == 8
    pgcd, finetune = (next(run for run in found.runs if run.method == method) for method in ("pgcd", "finetune"))
    assert finetune.models[0] is pgcd.models[0]
    assert {len(matrices) for matrices in found.dice_by_run.values()} == {2}
    assert found.channels == {"0": "CT"}
    assert found.problems == ()
    model = pgcd.models[1]
    assert model.trained
    assert model.predictions.is_dir()
    assert model.machine == {"device": "cpu", "precision": "bfloat16, 2 threads", "torch": "9.9.9"}
    assert set(model.terms) == {"segmentation", "pgcd_spatial", "pgcd_channel", "dapd_local"}
    assert model.prototypes.class_names == ("background", "ball", "tube", "blob")
    assert (
        model.train_command == "nnUNetv2_train Dataset501_tiny_step2 3d_fullres all -tr nnUNetTrainerPGCD -device cpu"
    )
    assert model.predict_command.startswith("nnUNetv2_predict -i TEST_IMAGES -o OUTPUT -d Dataset501_tiny_step2")
    assert model.predict_command.endswith(" -device cpu"), "it is nnU-Net's default no more than of a training"


def test_costs_are_means_over_trainings(chain):
    variants = write_chain(chain, methods=("pgcd",), seeds=(0, 1, 2))
    seconds = (10.0, 20.0, None)
    for variant, time in zip(variants, seconds, strict=True):
        cost = {"seconds_training": time, "peak_memory_bytes": None if time is None else 1000 * time}
        write_json(chain.model_folder(variant, 2) / "fold_all" / "cost.json", cost)
    (cost,) = [one for one in collect(chain, variants).step_costs if one.step == "step2"]
    assert (cost.seconds, cost.memory_bytes, cost.gpu_memory_bytes) == (15.0, 15000.0, None)
    assert cost.parameters_added == 9


def test_nothing_trained(chain):
    found = collect(chain, [chain.variant(method, 0) for method in ("pgcd", "joint")])
    assert found.rows == ()
    assert [len(run.models) for run in found.runs] == [2, 1]
    assert all(model.scores is None and not model.trained and not model.terms for model in found.models)


def test_ensembles_have_their_commands(chain, monkeypatch):
    assert collect(chain, [chain.variant("pgcd", 0)]).predict_ensembles == ()
    monkeypatch.setattr(chain, "schedule", replace(chain.schedule, folds=(0, 1)))
    found = collect(chain, [chain.variant(method, 0) for method in ("pgcd", "finetune", "joint")])
    datasets = [line.split(" -d ")[1].split()[0] for line in found.predict_ensembles]
    assert datasets == ["Dataset500_tiny_step1", *["Dataset501_tiny_step2"] * 2, "Dataset502_tiny_joint"]
    assert all(" -f 0 1 " in line and "-i TEST_IMAGES" in line for line in found.predict_ensembles)


def test_nothing_prepared(chain):
    chain.content["plans_name"] = None
    found = collect(chain, [chain.variant("pgcd", 0)])
    assert (found.runs, found.rows, found.methods) == ((), (), ())


def test_scores_at_another_tolerance_are_to_be_made_again(chain):
    variant = chain.variant("pgcd", 0)
    folder = write_scores(chain, variant, 1, {"a": {"ball": 0.9}})
    path = folder.parent / "scores.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"nsd_tolerance_mm": 2.0', '"nsd_tolerance_mm": 1.0'))
    assert collect(chain, [variant]).models[0].scores is None


def test_damaged_files_are_told_and_left_out(chain):
    variants = write_chain(chain, methods=("pgcd",))
    folder = chain.model_folder(variants[0], 2) / "fold_all"
    (folder / "prototypes.npz").write_bytes(b"PK not an archive")
    (folder / "debug.json").write_text("[]")
    found = collect(chain, variants)
    assert found.models[1].prototypes is None
    assert found.models[1].machine == {"precision": "bfloat16, 2 threads"}
    assert len(found.problems) == 2
    assert not any(str(chain.folder.parent) in problem for problem in found.problems)


def test_a_damaged_file_of_a_method_that_keeps_scans_says_so(chain):
    variant = chain.variant("replay", 0)
    damaged = evaluation_file(chain, variant, 2, "all")
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{")
    what = "the scores of replay (not privacy-safe), seed 0, step 2, fold all"
    assert collect(chain, [variant]).problems == (f"The file with {what} could not be read and is left out.",)


def test_coefficients_that_a_method_has_of_its_own(chain):
    found = collect(chain, [chain.variant(method, 0) for method in ("pgcd", "pgcd-no_dapd")])
    assert found.own_settings == {"pgcd": {}, "pgcd-no_dapd": {"lambda_dapd": 0.0}}
    assert found.own_method == "pgcd"


def test_logs_are_read_in_the_order_of_time(tmp_path):
    """nnU-Net writes days and months without leading zeros: the tenth sorts before the ninth."""
    write_log(tmp_path, {"kd": [1.0, 1.0]}, number=9)
    write_log(tmp_path, {"kd": [2.0]}, start=1, number=10)
    old, new = (tmp_path / f"training_log_2026_1_{day}_10_00_00.txt" for day in (9, 10))
    os.utime(old, (1000, 1000))
    os.utime(new, (2000, 2000))
    assert read_terms(tmp_path)["kd"].tolist() == [1.0, 2.0]


def test_scores_of_subjects_are_means_over_runs(chain):
    names = ("ball", "tube", "blob")
    values = {0: (0.8, 0.6, None), 1: (0.6, None, None)}
    for seed, dice in values.items():
        write_scores(chain, chain.variant("joint", seed), JOINT, {"a": dict(zip(names, dice, strict=True))})
    write_scores(chain, chain.variant("joint", 2), JOINT, {"b": {"ball": 0.0}})
    runs = collect(chain, [chain.variant("joint", seed) for seed in range(4)]).runs
    cases, scores = last_scores(runs, names, "dice")
    assert cases == ["a", "b"]
    np.testing.assert_allclose(scores, [[0.7, 0.6, NAN], [0.0, NAN, NAN]])
    assert np.isnan(last_scores(runs, names, "hd95_mm")[1][1]).all()


def test_no_scores_of_subjects(chain):
    runs = collect(chain, [chain.variant("pgcd", 0)]).runs
    cases, scores = last_scores(runs, ("ball",), "dice")
    assert cases == []
    assert scores.shape == (0, 1)


def test_a_resumed_training_has_one_curve(tmp_path):
    write_log(tmp_path, {"segmentation": [1.0, 2.0, 3.0], "gone": [5.0, 5.0, 5.0]}, number=1)
    write_log(tmp_path, {"segmentation": [2.5, 3.5]}, start=2, number=2)
    found = read_terms(tmp_path)
    np.testing.assert_allclose(found["segmentation"], [1, 2, 2.5, 3.5])
    np.testing.assert_allclose(found["gone"], [5, 5, 5, NAN])


def test_a_log_without_terms(tmp_path):
    assert read_terms(tmp_path) == {}
    (tmp_path / "training_log_1.txt").write_text(
        "2026-01-01 10:00:01.0: Epoch 0 \n2026-01-01 10:00:01.0: train_loss 1\n"
    )
    assert read_terms(tmp_path) == {}


def test_a_value_that_is_no_number_is_absent(tmp_path):
    write_log(tmp_path, {"segmentation": [float("nan"), 1.0]})
    np.testing.assert_allclose(read_terms(tmp_path)["segmentation"], [NAN, 1.0])
    assert json.dumps(read_terms(tmp_path)["segmentation"].tolist()[1]) == "1.0"
