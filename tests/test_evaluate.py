from __future__ import annotations

import json

import numpy as np
import pytest

from nnunet_cil import evaluate, nnunet_api
from nnunet_cil.chain import JOINT, Chain, write_json
from nnunet_cil.evaluate import collect_scores, evaluate_model, evaluation_file, learned_at, score_matrix
from nnunet_cil.schedule import load_schedule
from tests.conftest import write_schedule, write_tiny_dataset

NAN = float("nan")


@pytest.fixture
def chain(nnunet_folders, tmp_path) -> Chain:
    source = write_tiny_dataset(tmp_path / "source", n_cases=2)
    chain = Chain.open(load_schedule(write_schedule(tmp_path / "s.yaml", source)))
    chain.content["plans_name"] = "nnUNetPlans"
    return chain


def score(chain: Chain, method: str, seed: int, step, dice: dict) -> None:
    write_json(evaluation_file(chain, chain.variant(method, seed), step, "all"), {"dice": dice})


def test_matrix_is_the_mean_over_subjects_that_have_a_score(chain):
    score(chain, "pgcd", 0, 1, {"a": {"ball": 0.8}, "b": {"ball": 0.6}})
    score(chain, "pgcd", 0, 2, {"a": {"ball": 0.5, "blob": None}, "b": {"ball": 0.7, "blob": 0.9}})
    expected = [[0.7, NAN], [0.6, 0.9]]
    np.testing.assert_allclose(score_matrix(chain, chain.variant("pgcd", 0), "all"), expected)


def test_methods_share_the_scores_of_step_1(chain):
    score(chain, "pgcd", 0, 1, {"a": {"ball": 0.8}})
    assert score_matrix(chain, chain.variant("finetune", 0), "all")[0, 0] == 0.8
    assert np.isnan(score_matrix(chain, chain.variant("finetune", 1), "all")).all()


def test_a_class_that_is_not_learned_yet_stays_empty_even_if_it_is_predicted(chain):
    score(chain, "pgcd", 0, 1, {"a": {"ball": 0.8, "blob": 0.3}})
    assert np.isnan(score_matrix(chain, chain.variant("pgcd", 0), "all")[0, 1])


def test_joint_fills_its_last_row_only(chain):
    score(chain, "joint", 0, JOINT, {"a": {"ball": 0.8, "blob": 0.6}})
    found = score_matrix(chain, chain.variant("joint", 0), "all")
    np.testing.assert_allclose(found, [[NAN, NAN], [0.8, 0.6]])


def test_rows_are_means_and_deviations_over_seeds(chain):
    for seed, value in ((0, 0.7), (1, 0.9)):
        score(chain, "pgcd", seed, 1, {"a": {"ball": value}})
        score(chain, "pgcd", seed, 2, {"a": {"ball": value - 0.1, "blob": 0.5}})
    content, rows = collect_scores(chain, [chain.variant("pgcd", seed) for seed in (0, 1)])
    np.testing.assert_allclose(rows[0].R, [[0.8, NAN], [0.7, 0.5]])
    np.testing.assert_allclose(rows[0].R_std[:, 0], [0.1 * 2**0.5] * 2)
    assert rows[0].seeds == 2
    assert [run["seed"] for run in content["runs"]] == [0, 1]
    assert content["runs"][0]["summary"]["backward_transfer"] == pytest.approx(-0.1)
    json.dumps(content, allow_nan=False)


def test_nothing_scored_gives_no_row(chain):
    assert collect_scores(chain, [chain.variant("pgcd", 0)])[1] == []


def test_learned_at_counts_steps_from_one(chain):
    assert learned_at(chain).tolist() == [1, 2]


@pytest.fixture
def predicting(chain, monkeypatch) -> tuple[Chain, list]:
    """A chain with a model file and test set, whose predictions are faked and counted."""
    fold = chain.model_folder(chain.variant("pgcd", 0), 2) / "fold_all"
    fold.mkdir(parents=True)
    (fold / "checkpoint_final.pth").write_bytes(b"one")
    cases = {"case_1": {"labelled": [1, 2], "set": 0}, "case_2": {"labelled": [2], "set": 0}}
    write_json(chain.folder / "test" / "test.json", {"ignore": 3, "file_ending": ".nii.gz", "cases": cases})
    for part in ("images/case_1_0000", "images/case_2_0000", "labels/case_1", "labels/case_2"):
        path = chain.folder / "test" / f"{part}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"0")
    calls = []
    monkeypatch.setattr(nnunet_api, "predict", lambda *arguments: calls.append(arguments))

    def metrics(reference, prediction, dataset_json, labels, ignore):
        assert ignore == 3
        return {label: {"Dice": NAN if label == 1 else 0.5} for label in labels}

    monkeypatch.setattr(evaluate.nnunet_api, "case_metrics", metrics)
    return chain, calls


def test_each_subject_is_scored_on_what_its_set_labels(predicting):
    chain, _ = predicting
    found = evaluate_model(chain, chain.variant("pgcd", 0), 2, "all", "cpu")
    assert found["dice"] == {"case_1": {"ball": None, "blob": 0.5}, "case_2": {"blob": 0.5}}


def test_a_model_is_predicted_again_only_if_it_or_the_test_set_changed(predicting):
    chain, calls = predicting
    variant = chain.variant("pgcd", 0)
    for _ in range(2):
        evaluate_model(chain, variant, 2, "all", "cpu")
    assert len(calls) == 1
    (chain.model_folder(variant, 2) / "fold_all" / "checkpoint_final.pth").write_bytes(b"two")
    evaluate_model(chain, variant, 2, "all", "cpu")
    path = chain.folder / "test" / "test.json"
    path.write_text(path.read_text() + "\n")
    evaluate_model(chain, variant, 2, "all", "cpu")
    outputs = [call[5] for call in calls]
    assert len(set(outputs)) == len(outputs) == 3, "no output folder serves two models or test sets"
    assert len({call[4] for call in calls}) == 1, "test subjects are preprocessed in one place"
