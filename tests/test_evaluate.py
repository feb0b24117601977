from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from nnunet_cil import evaluate, nnunet_api
from nnunet_cil.chain import JOINT, Chain
from nnunet_cil.evaluate import (
    collect_scores,
    count_parameters,
    evaluate_model,
    evaluation_file,
    learned_at,
    reference_of,
    score_matrix,
    scored_as,
    subject_scores,
    write_matrices,
)
from nnunet_cil.given_model import GivenModel
from nnunet_cil.report.table import score_table
from nnunet_cil.schedule import TestSet, load_schedule
from nnunet_cil.step_files import write_json
from tests.conftest import write_schedule, write_tiny_dataset

NAN = float("nan")
CPU = torch.device("cpu")


@pytest.fixture
def chain(nnunet_folders, tmp_path) -> Chain:
    source = write_tiny_dataset(tmp_path / "source", n_cases=2)
    chain = Chain.open(load_schedule(write_schedule(tmp_path / "s.yaml", source)))
    chain.content["plans_name"] = "nnUNetPlans"
    return chain


MISSED = {"dice": 0.0, "hd95_mm": None, "nsd": 0.0}


def score(
    chain: Chain, method: str, seed: int, step, given: dict, absent=None, parameters: int = 100, fold="all"
) -> None:
    """Store scores of a model; a number is a Dice, with an NSD 0.1 below it and a HD95 of ten times what it lacks."""
    scores = {case: {name: _three(value) for name, value in classes.items()} for case, classes in given.items()}
    content = {
        **scored_as(chain),
        "parameters": parameters,
        "scores": scores,
        "absent": {case: {} for case in scores} | (absent or {}),
    }
    write_json(evaluation_file(chain, chain.variant(method, seed), step, fold), content)


def _three(value) -> dict:
    if isinstance(value, dict):
        return value
    if value is None:
        return {"dice": None, "hd95_mm": None, "nsd": None}
    return {"dice": value, "hd95_mm": 10 * (1 - value), "nsd": value - 0.1}


def test_matrix_is_the_mean_over_subjects_that_have_a_score(chain):
    score(chain, "pgcd", 0, 1, {"a": {"ball": 0.8}, "b": {"ball": 0.6}})
    score(chain, "pgcd", 0, 2, {"a": {"ball": 0.5, "blob": None}, "b": {"ball": 0.7, "blob": 0.9}})
    expected = [[0.7, NAN], [0.6, 0.9]]
    np.testing.assert_allclose(score_matrix(chain, chain.variant("pgcd", 0), "all"), expected)
    expected = [[0.6, NAN], [0.5, 0.8]]
    np.testing.assert_allclose(score_matrix(chain, chain.variant("pgcd", 0), "all", "nsd"), expected)


def test_a_distance_that_does_not_exist_is_left_out_while_dice_and_nsd_are_zero(chain):
    score(chain, "pgcd", 0, 1, {"a": {"ball": MISSED}, "b": {"ball": 0.6}}, absent={"a": {"ball": "missed"}})
    variant = chain.variant("pgcd", 0)
    found = [score_matrix(chain, variant, "all", name)[0, 0] for name in ("dice", "nsd", "hd95_mm")]
    assert found == pytest.approx([0.3, 0.25, 4.0])
    score(chain, "pgcd", 0, 1, {"a": {"ball": MISSED}}, absent={"a": {"ball": "missed"}})
    assert np.isnan(score_matrix(chain, variant, "all", "hd95_mm")).all()


def test_an_organ_that_no_test_subject_has_is_not_scored_also_where_it_is_invented(chain):
    """Else the method that invents it has a mean that the one that does not has not."""
    for method, ball, blob, why in (("pgcd", 0.9, MISSED, "invented"), ("finetune", 0.7, None, "both_empty")):
        score(chain, method, 0, 1, {"a": {"ball": 0.8}, "b": {"ball": 0.8}})
        given = {"a": {"ball": ball, "blob": blob}, "b": {"ball": ball, "blob": None}}
        score(chain, method, 0, 2, given, absent={"a": {"blob": why}, "b": {"blob": "both_empty"}})
    variants = [chain.variant(method, 0) for method in ("pgcd", "finetune")]
    rows = {row.method: row for row in collect_scores(chain, variants)[1]}
    np.testing.assert_allclose(rows["pgcd"].dice, [[0.8, NAN], [0.9, NAN]])
    np.testing.assert_allclose(rows["finetune"].dice, [[0.8, NAN], [0.7, NAN]])
    assert rows["pgcd"].final.invented == 1, "it is counted"
    assert subject_scores(chain, variants)["pgcd"][0, "all"]["a"] == {"ball": 0.9, "blob": None}


def test_a_site_without_an_organ_has_no_score_of_it(chain):
    chain.schedule = replace(chain.schedule, test=chain.schedule.test * 2)
    write_test_json(chain, {"a": 0, "b": 1})
    given = {"a": {"ball": 0.9, "blob": 0.6}, "b": {"ball": 0.7, "blob": MISSED}}
    score(chain, "pgcd", 0, 2, given, absent={"b": {"blob": "invented"}})
    (run,) = collect_scores(chain, [chain.variant("pgcd", 0)])[0]["runs"]
    by_set = [each["dice"][-1] for each in run["by_test_set"]]
    assert by_set == [[0.9, 0.6], [0.7, None]]
    assert run["dice"][-1] == pytest.approx([0.8, 0.3]), "of all subjects it is 0 in one, as some have it"


def test_scores_of_another_trainer_under_the_same_name_count_as_not_evaluated(chain):
    variant = chain.variant("pgcd", 0)
    score(chain, "pgcd", 0, 1, {"a": {"ball": 0.8}})
    path = evaluation_file(chain, variant, 1, "all")
    for trainer, counted in ((variant.trainer, True), ("nnUNetTrainerMiB", False)):
        write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "trainer": trainer})
        assert (collect_scores(chain, [variant])[1] != []) == counted


def test_a_seed_that_has_not_come_as_far_is_not_mixed_into_the_row(chain):
    for seed, ball in ((0, 0.9), (1, 0.3), (2, 0.4)):
        score(chain, "pgcd", seed, 1, {"a": {"ball": ball}})
    variants = [chain.variant("pgcd", seed) for seed in (0, 1, 2)]
    assert [row.seeds for row in collect_scores(chain, variants)[1]] == [(0, 1, 2)]
    score(chain, "pgcd", 0, 2, {"a": {"ball": 0.8, "blob": 0.5}})
    content, rows = collect_scores(chain, variants)
    assert [row.seeds for row in rows] == [(0,)]
    np.testing.assert_allclose(rows[0].dice, [[0.9, NAN], [0.8, 0.5]])
    assert len(content["runs"]) == 3, "in scores.json all are there"


def test_an_unknown_score_is_refused(chain):
    with pytest.raises(ValueError, match="score: got 'iou', expected one of dice, nsd, hd95_mm"):
        score_matrix(chain, chain.variant("pgcd", 0), "all", "iou")


def test_scores_of_an_earlier_version_or_another_tolerance_count_as_not_evaluated(chain):
    variant = chain.variant("pgcd", 0)
    write_json(evaluation_file(chain, variant, 1, "all"), {"dice": {"a": {"ball": 0.8}}})
    score(chain, "pgcd", 0, 2, {"a": {"ball": 0.8, "blob": 0.7}})
    chain.schedule = replace(chain.schedule, nsd_tolerance_mm=1.0)
    assert np.isnan(score_matrix(chain, variant, "all")).all()
    assert collect_scores(chain, [variant])[1] == []


def test_scores_on_another_test_set_count_as_not_evaluated(chain):
    variant = chain.variant("pgcd", 0)
    write_test_json(chain, {"a": 0})
    score(chain, "pgcd", 0, 1, {"a": {"ball": 0.8}})
    assert score_matrix(chain, variant, "all")[0, 0] == 0.8
    write_test_json(chain, {"a": 0, "b": 0})
    assert np.isnan(score_matrix(chain, variant, "all")).all()
    assert collect_scores(chain, [variant])[1] == []


def test_a_seed_is_the_mean_of_its_folds(chain):
    """Three folds of two seeds: the deviation is over two seeds, not over six trainings."""
    chain.schedule = replace(chain.schedule, folds=(0, 1, 2))
    for seed, values in ((0, (0.7, 0.8, 0.9)), (1, (0.3, 0.4, 0.5))):
        for fold, value in enumerate(values):
            score(chain, "pgcd", seed, 1, {"a": {"ball": value}}, fold=fold)
            score(chain, "pgcd", seed, 2, {"a": {"ball": value, "blob": value}}, fold=fold)
    score(chain, "joint", 0, JOINT, {"a": {"ball": 0.9, "blob": 0.9}}, fold=0)
    variants = [chain.variant(method, seed) for seed in (0, 1) for method in ("pgcd", "joint")]
    row = collect_scores(chain, variants)[1][0]
    assert row.seeds == (0, 1)
    np.testing.assert_allclose(row.by_seed[:, 1], [[0.8, 0.8], [0.4, 0.4]])
    np.testing.assert_allclose(row.dice_std[1], [0.4 / 2**0.5] * 2)
    assert row.final.n_scores == 12
    assert row.final.gap_to_joint == pytest.approx(0.2), "fold 0 of seed 0 has a joint model"
    assert row.final.gap_seeds == (0,)


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
    np.testing.assert_allclose(rows[0].dice, [[0.8, NAN], [0.7, 0.5]])
    np.testing.assert_allclose(rows[0].dice_std[:, 0], [0.1 * 2**0.5] * 2)
    assert rows[0].seeds == (0, 1)
    assert [run["seed"] for run in content["runs"]] == [0, 1]
    assert content["runs"][0]["summary"]["backward_transfer"] == pytest.approx(-0.1)
    json.dumps(content, allow_nan=False)


def test_nothing_scored_gives_no_row(chain):
    assert collect_scores(chain, [chain.variant("pgcd", 0)])[1] == []


def test_learned_at_counts_steps_from_one(chain):
    assert learned_at(chain).tolist() == [1, 2]


def run_two_steps(chain: Chain, method: str, seed: int, ball: float, blob: float) -> None:
    score(chain, method, seed, 1, {"a": {"ball": 0.9}, "b": {"ball": 0.9}, "c": {"ball": 0.9}})
    subjects = {case: {"ball": ball + extra, "blob": blob} for case, extra in (("a", 0.0), ("b", 0.01), ("c", -0.01))}
    score(chain, method, seed, 2, subjects, parameters=103)


def test_absent_scores_are_counted_by_kind_step_and_class(chain):
    score(chain, "finetune", 0, 1, {"a": {"ball": None}, "b": {"ball": 0.9}}, absent={"a": {"ball": "both_empty"}})
    score(
        chain,
        "finetune",
        0,
        2,
        {"a": {"ball": MISSED, "blob": MISSED}, "b": {"ball": MISSED, "blob": 0.8}, "c": {"blob": 0.8}},
        absent={"a": {"ball": "missed", "blob": "invented"}, "b": {"ball": "missed"}},
    )
    content, rows = collect_scores(chain, [chain.variant("finetune", 0)])
    (run,) = content["runs"]
    assert run["absent"] == {
        "both_empty": [[1, None], [0, 0]],
        "missed": [[0, None], [2, 0]],
        "invented": [[0, None], [0, 1]],
        "unlabelled": [[0, None], [1, 0]],
    }
    assert run["n_subjects"] == [[2, None], [2, 3]]
    assert run["hd95_mm"] == [[pytest.approx(1.0), None], [None, pytest.approx(2.0)]]
    final = rows[0].final
    assert (final.missed, final.invented, final.both_empty, final.n_scores) == (2, 1, 0, 5)
    assert final.nsd == pytest.approx((0 + 2 * 0.7 / 3) / 2)
    assert np.isnan(final.hd95_mm), "not 2 mm: the class that was forgotten has no distance"
    assert "n/a       2         1           0      5" in score_table(rows, chain.schedule.classes, learned_at(chain))


def test_gaps_are_to_the_joint_model_of_the_same_seed(chain):
    for seed, blob in ((0, 0.6), (1, 0.7), (2, 0.1)):
        run_two_steps(chain, "pgcd", seed, 0.8, blob)
    for seed, value in ((0, 0.9), (1, 0.95)):
        score(chain, "joint", seed, JOINT, {case: {"ball": value, "blob": value} for case in "abc"})
    variants = [chain.variant(method, seed) for method in ("pgcd", "joint") for seed in (0, 1, 2)]
    content, rows = collect_scores(chain, variants)
    of = {(run["method"], run["seed"]): run for run in content["runs"]}
    assert of["pgcd", 0]["summary"]["gap_to_joint"] == pytest.approx(0.9 - 0.7)
    assert of["pgcd", 0]["summary"]["plasticity_gap"] == pytest.approx(0.9 - 0.6)
    assert of["pgcd", 1]["summary_nsd"]["gap_to_joint"] == pytest.approx(0.85 - 0.65)
    assert of["pgcd", 2]["summary"]["gap_to_joint"] is None
    assert of["joint", 0]["summary"]["gap_to_joint"] is None
    assert rows[0].final.gap_to_joint == pytest.approx((0.2 + 0.2) / 2), "the seed without joint takes no part"
    assert np.isnan(rows[1].final.plasticity_gap)
    assert rows[1].final.hd95_mm == pytest.approx((1.0 + 0.5) / 2)
    assert set(of["pgcd", 0]["summary_hd95_mm"]) == {"old_mean", "new_mean", "mean"}, "no forgetting of a distance"
    json.dumps(content, allow_nan=False)


def test_what_a_run_cost_and_kept(chain):
    run_two_steps(chain, "pgcd", 0, 0.8, 0.6)
    score(chain, "joint", 0, JOINT, {"a": {"ball": 0.9, "blob": 0.9}}, parameters=103)
    folders = [chain.model_folder(chain.variant("pgcd", 0), step) / "fold_all" for step in (1, 2)]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "prototypes.npz").write_bytes(b"0" * 7)
    write_json(folders[1] / "cost.json", {"seconds_training": 5.0})
    variants = [chain.variant("pgcd", 0), chain.variant("joint", 0)]
    pgcd, joint = collect_scores(chain, variants)[0]["runs"]
    assert pgcd["parameters"] == {"step1": {"total": 100, "added": None}, "step2": {"total": 103, "added": 3}}
    assert joint["parameters"] == {"joint": {"total": 103, "added": None}}
    kept = {"step1": {"prototypes": 0, "replay": 0}, "step2": {"prototypes": 7, "replay": 0}}
    assert pgcd["bytes_kept"] == kept
    assert joint["bytes_kept"] is None
    assert pgcd["cost"] == {"step2": {"seconds_training": 5.0}}
    assert pgcd["forward_transfer"]["value"] is None
    assert "one step only" in pgcd["forward_transfer"]["reason"]
    write_json(folders[1] / "replay.json", {"bytes": 12345})
    assert collect_scores(chain, variants)[0]["runs"][0]["bytes_kept"]["step2"] == {"prototypes": 7, "replay": 12345}


def write_test_json(chain: Chain, sets: dict[str, int]) -> None:
    cases = {case: {"labelled": [1, 2], "set": number} for case, number in sets.items()}
    content = {"test": chain.schedule.to_dict()["test"], "ignore": 3, "file_ending": ".nii.gz", "cases": cases}
    write_json(chain.folder / "test" / "test.json", content)


def test_each_of_several_test_sets_has_its_matrix(chain, tmp_path):
    source, elsewhere = chain.schedule.source, tmp_path / "elsewhere"
    folders = [(source / "imagesTr", source), (elsewhere / "imagesTr", elsewhere), (elsewhere / "scans", None)]
    sets = tuple(TestSet(images, images, {}, {}, dataset) for images, dataset in folders)
    beside_source = TestSet(source / "imagesTs", source / "labelsTs", {}, {}, None)
    chain.schedule = replace(chain.schedule, test=(*sets, beside_source))
    write_test_json(chain, {"a": 0, "b": 1, "c": 1, "d": 2, "e": 3})
    score(chain, "pgcd", 0, 1, {case: {"ball": 0.9} for case in "abcde"})
    values = {"a": 0.9, "b": 0.5, "c": 0.3, "d": 0.7, "e": 0.8}
    score(chain, "pgcd", 0, 2, {case: {"ball": value, "blob": value} for case, value in values.items()})
    found = collect_scores(chain, [chain.variant("pgcd", 0)])[0]["runs"][0]["by_test_set"]
    assert [entry["set"] for entry in found] == [0, 1, 2, 3]
    assert [entry["name"] for entry in found] == [source.name, "elsewhere", "test set 3", "test set 4"]
    assert [entry["n_subjects"] for entry in found] == [1, 2, 1, 1]
    assert [entry["never_trained_on"] for entry in found] == [False, True, None, False]
    assert found[1]["dice"] == [[pytest.approx(0.9), None], [pytest.approx(0.4)] * 2]
    assert found[1]["mean"] == pytest.approx({"dice": 0.4, "nsd": 0.3, "hd95_mm": 6.0})
    assert [entry["n_classes"] for entry in found] == [2] * 4

    given = GivenModel(tmp_path, "", "nnUNetTrainer__nnUNetPlans__3d_fullres", {}, {}, ("all",))
    steps = chain.schedule.raw["steps"][1:]
    raw = {**chain.schedule.raw, "model": str(tmp_path), "steps": steps}
    without_step_1 = replace(chain.schedule, model=given, raw=raw)
    whole, chain.schedule = chain.schedule, without_step_1
    found = collect_scores(chain, [chain.variant("pgcd", 0)])[0]["runs"][0]["by_test_set"]
    assert [entry["never_trained_on"] for entry in found] == [False, None, None, False], "a given model's data"
    chain.schedule = replace(whole, raw={**whole.raw, "test": "others.json"})
    found = collect_scores(chain, [chain.variant("pgcd", 0)])[0]["runs"][0]["by_test_set"]
    assert [entry["name"] for entry in found] == [f"test set {n}" for n in (1, 2, 3, 4)], "scored as another list"
    assert [entry["never_trained_on"] for entry in found] == [None] * 4


def test_distance_is_missing_where_one_seed_lost_an_organ(chain):
    """A mean without the seed that lost it would be better than that of a method that keeps it badly."""
    score(chain, "pgcd", 0, 2, {"a": {"ball": 0.9, "blob": 0.9}})
    score(chain, "pgcd", 1, 2, {"a": {"ball": MISSED, "blob": 0.9}}, absent={"a": {"ball": "missed"}})
    variants = [chain.variant("pgcd", seed) for seed in (0, 1)]
    assert collect_scores(chain, variants[:1])[1][0].final.hd95_mm == pytest.approx(1.0)
    assert np.isnan(collect_scores(chain, variants)[1][0].final.hd95_mm)


def test_what_is_kept_is_unknown_where_the_models_are_not(chain):
    score(chain, "replay", 0, 1, {"a": {"ball": 0.9}})
    score(chain, "replay", 0, 2, {"a": {"ball": 0.9, "blob": 0.9}})
    found = collect_scores(chain, [chain.variant("replay", 0)])[0]["runs"][0]["bytes_kept"]
    assert found == {"step1": {"prototypes": 0, "replay": None}, "step2": {"prototypes": None, "replay": None}}


def test_a_single_test_set_is_shown_where_it_is_another_domain(chain, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    test = TestSet(elsewhere / "imagesTs", elsewhere / "labelsTs", {}, {}, elsewhere)
    chain.schedule = replace(chain.schedule, test=(test,))
    write_test_json(chain, {"a": 0})
    run_two_steps(chain, "pgcd", 0, 0.8, 0.6)
    (found,) = collect_scores(chain, [chain.variant("pgcd", 0)])[0]["runs"][0]["by_test_set"]
    assert (found["name"], found["never_trained_on"]) == ("elsewhere", True)
    assert found["mean"]["dice"] == pytest.approx(0.7), "over both organs of the one subject"


def test_a_single_test_set_is_not_shown_twice(chain):
    write_test_json(chain, {"a": 0})
    run_two_steps(chain, "pgcd", 0, 0.8, 0.6)
    content, _ = collect_scores(chain, [chain.variant("pgcd", 0)])
    assert content["runs"][0]["by_test_set"] == []
    assert content["n_test_subjects"] == 1


def test_subjects_are_compared_with_the_schedules_own_method(chain):
    for seed in (0, 1):
        run_two_steps(chain, "pgcd", seed, 0.8, 0.6)
        run_two_steps(chain, "finetune", seed, 0.2, 0.7)
    variants = [chain.variant(method, seed) for seed in (0, 1) for method in ("finetune", "pgcd")]
    scores = subject_scores(chain, variants, "nsd")
    assert list(scores) == ["finetune", "pgcd"]
    assert list(scores["pgcd"]) == [(0, "all"), (1, "all")]
    assert scores["pgcd"][1, "all"]["b"] == pytest.approx({"ball": 0.71, "blob": 0.5})
    paired = collect_scores(chain, variants)[0]["paired"]
    assert paired["reference"] == "pgcd"
    assert paired["dice"]["finetune"]["old"]["mean"] == pytest.approx(-0.6)
    assert paired["dice"]["finetune"]["new"]["n_seeds"] == 2
    assert collect_scores(chain, variants[:1])[0]["paired"] == {"reference": "finetune", "dice": {}, "nsd": {}}
    assert collect_scores(chain, [])[0]["paired"] == {"reference": "pgcd", "dice": {}, "nsd": {}}


def test_without_the_schedules_own_method_the_first_is_the_reference(chain):
    for method, old in (("pseudo", 0.6), ("finetune", 0.5)):
        run_two_steps(chain, method, 0, old, 0.7)
    score(chain, "joint", 0, "joint", {case: {"ball": 0.9, "blob": 0.9} for case in "abc"})
    variants = [chain.variant(method, 0) for method in ("joint", "pseudo", "finetune")]
    assert reference_of(chain, subject_scores(chain, variants)) == "pseudo"
    paired = collect_scores(chain, variants)[0]["paired"]
    assert paired["reference"] == "pseudo"
    assert paired["dice"]["finetune"]["old"]["mean"] == pytest.approx(-0.1)
    assert paired["dice"]["joint"]["new"]["mean"] == pytest.approx(0.2)


def test_matrices_as_csv(chain):
    score(chain, "pgcd", 0, 1, {"a": {"ball": 0.75}})
    score(chain, "pgcd", 0, 2, {"a": {"ball": MISSED, "blob": 0.5}}, absent={"a": {"ball": "missed"}})
    content, _ = collect_scores(chain, [chain.variant("pgcd", 0)])
    content["classes"][1] = "blob, left"
    files = write_matrices(chain, content)
    names = [f"pgcd_seed0_foldall_{name}.csv" for name in ("dice", "nsd", "hd95_mm")]
    assert files == [chain.folder / "matrices" / name for name in names]
    assert files[0].read_bytes() == b'step,ball,"blob, left"\n1,0.75,\n2,0.0,0.5\n'
    assert list(csv.reader(files[2].open(newline=""))) == [
        ["step", "ball", "blob, left"],
        ["1", "2.5", ""],
        ["2", "", "5.0"],
    ]
    assert sorted(path.name for path in files[0].parent.iterdir()) == sorted(names)


def save_checkpoint(chain: Chain, n_rows: int, method: str = "pgcd") -> None:
    shared = torch.zeros(2, 3)
    weights = {"encoder.weight": shared, "decoder.encoder.weight": shared, "head": torch.zeros(n_rows, 4)}
    path = chain.model_folder(chain.variant(method, 0), 2) / "fold_all" / "checkpoint_final.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"network_weights": weights, "optimizer_state": {}}, path)


def test_a_tensor_under_two_names_is_counted_once(chain):
    save_checkpoint(chain, n_rows=5)
    path = chain.model_folder(chain.variant("pgcd", 0), 2) / "fold_all" / "checkpoint_final.pth"
    assert count_parameters(path) == 2 * 3 + 5 * 4
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="unreadable model"):
        count_parameters(path)


@pytest.fixture
def predicting(chain, monkeypatch) -> tuple[Chain, list]:
    """A chain with a model file and test set, whose predictions are faked and counted."""
    save_checkpoint(chain, n_rows=3)
    cases = {"case_1": {"labelled": [1, 2], "set": 0}, "case_2": {"labelled": [2], "set": 0}}
    write_json(chain.folder / "test" / "test.json", {"ignore": 3, "file_ending": ".nii.gz", "cases": cases})
    for part in ("images/case_1_0000", "images/case_2_0000", "labels/case_1", "labels/case_2"):
        path = chain.folder / "test" / f"{part}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"0")
    calls = []
    monkeypatch.setattr(nnunet_api, "predict", lambda *arguments: calls.append(arguments))

    def metrics(reference, prediction, dataset_json, labels, ignore, tolerance_mm):
        assert ignore == 3
        missed = {"Dice": 0.0, "hd95_mm": NAN, "nsd": 0.0, "n_ref": np.int64(4), "n_pred": np.int64(0)}
        found = {"Dice": 0.5, "hd95_mm": 3.0, "nsd": tolerance_mm / 10, "n_ref": 4, "n_pred": 4}
        nothing = {"Dice": NAN, "hd95_mm": NAN, "nsd": NAN, "n_ref": 0, "n_pred": 0}
        return {label: nothing if label == 1 else missed if "case_2" in reference.name else found for label in labels}

    monkeypatch.setattr(evaluate.nnunet_api, "case_metrics", metrics)
    return chain, calls


def test_each_subject_is_scored_on_what_its_set_labels(predicting):
    chain, _ = predicting
    found = evaluate_model(chain, chain.variant("pgcd", 0), 2, "all", CPU)
    assert found["scores"] == {
        "case_1": {
            "ball": {"dice": None, "hd95_mm": None, "nsd": None},
            "blob": {"dice": 0.5, "hd95_mm": 3.0, "nsd": 0.2},
        },
        "case_2": {"blob": {"dice": 0.0, "hd95_mm": None, "nsd": 0.0}},
    }
    assert found["absent"] == {"case_1": {"ball": "both_empty"}, "case_2": {"blob": "missed"}}
    assert [found[key] for key in ("step", "fold", "nsd_tolerance_mm")] == [2, "all", 2.0]
    assert found["parameters"] == 2 * 3 + 3 * 4
    stored = evaluation_file(chain, chain.variant("pgcd", 0), 2, "all")
    assert json.loads(stored.read_text(encoding="utf-8")) == found


def test_references_are_read_as_they_were_written(predicting, monkeypatch):
    chain, _ = predicting
    path = chain.schedule.source / "dataset.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**described, "overwrite_image_reader_writer": "NibabelIO"})
    readers, fake = [], nnunet_api.case_metrics

    def metrics(reference, prediction, dataset_json, *others):
        readers.append(type(nnunet_api.reader_writer(dataset_json, reference)).__name__)
        return fake(reference, prediction, dataset_json, *others)

    monkeypatch.setattr(evaluate.nnunet_api, "case_metrics", metrics)
    evaluate_model(chain, chain.variant("pgcd", 0), 2, "all", CPU)
    assert readers == ["NibabelIO"] * 2


def test_the_log_says_what_is_predicted_and_that_it_keeps_scans(predicting, caplog):
    chain, _ = predicting
    save_checkpoint(chain, n_rows=3, method="replay")
    with caplog.at_level("INFO"):
        evaluate_model(chain, chain.variant("replay", 0), 2, "all", CPU)
    assert "predicting 2 test subjects with step 2 of replay (not privacy-safe)" in caplog.text
    assert "-f all -tr nnUNetTrainerReplay -p nnUNetPlans_replay -device cpu\n" in caplog.text


def test_a_model_is_predicted_again_only_if_it_or_the_test_set_changed(predicting):
    chain, calls = predicting
    variant = chain.variant("pgcd", 0)
    for _ in range(2):
        evaluate_model(chain, variant, 2, "all", CPU)
    assert len(calls) == 1
    save_checkpoint(chain, n_rows=4)
    evaluate_model(chain, variant, 2, "all", CPU)
    path = chain.folder / "test" / "test.json"
    path.write_text(path.read_text(encoding="utf-8") + "\n")
    evaluate_model(chain, variant, 2, "all", CPU)
    outputs = [call[5] for call in calls]
    assert len(set(outputs)) == len(outputs) == 3, "no output folder serves two models or test sets"
    assert len({call[4] for call in calls}) == 1, "test subjects are preprocessed in one place"


def test_another_tolerance_scores_the_same_predictions_anew(predicting):
    chain, calls = predicting
    variant = chain.variant("pgcd", 0)
    evaluate_model(chain, variant, 2, "all", CPU)
    chain.schedule = replace(chain.schedule, nsd_tolerance_mm=1.0)
    found = evaluate_model(chain, variant, 2, "all", CPU)
    assert found["scores"]["case_1"]["blob"]["nsd"] == 0.1
    assert calls[0][5] == calls[1][5]


def test_scores_of_an_earlier_version_are_made_anew_from_the_same_predictions(predicting):
    chain, calls = predicting
    variant = chain.variant("pgcd", 0)
    new = evaluate_model(chain, variant, 2, "all", CPU)
    path = evaluation_file(chain, variant, 2, "all")
    old = {key: new[key] for key in ("checkpoint_sha256", "test_sha256")} | {"dice": {"case_1": {"blob": 0.5}}}
    write_json(path, old)
    assert evaluate_model(chain, variant, 2, "all", CPU) == new == json.loads(path.read_text(encoding="utf-8"))
    assert calls[0][5] == calls[1][5]


def test_damaged_costs_are_left_out(chain, caplog):
    score(chain, "replay", 0, 1, {"a": {"ball": 0.9}})
    score(chain, "replay", 0, 2, {"a": {"ball": 0.9, "blob": 0.9}})
    variant = chain.variant("replay", 0)
    folder = chain.model_folder(variant, 2) / "fold_all"
    folder.mkdir(parents=True)
    write_json(folder / "cost.json", {"seconds_training": [90.0]})
    write_json(folder / "replay.json", {"bytes": "many"})
    run = collect_scores(chain, [variant])[0]["runs"][0]
    assert run["cost"] == {"step2": {}}
    assert run["bytes_kept"]["step2"]["replay"] is None
    assert "got seconds_training: [90.0], expected a number" in caplog.text
