from __future__ import annotations

import json
import logging
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnunet_cil import driver, guard, nnunet_api
from nnunet_cil.chain import JOINT, Chain
from nnunet_cil.environment import trainer_path_variable
from nnunet_cil.guard import Check, Organ, agreement, check_step, confusion, read_checks
from nnunet_cil.objectives.base import Objective
from nnunet_cil.report.collect import collect
from nnunet_cil.report.write import write_report
from nnunet_cil.schedule import Guard
from tests.report.chain_files import open_chain, write_model, write_scores
from tests.test_trainer import fold_of, make_chain, module_patch  # noqa: F401  (a fixture)

CPU = torch.device("cpu")
THRESHOLDS = Guard()
STEPS = (("ball", "tube"), ("blob",))


@pytest.mark.parametrize(
    ("before", "after", "status"),
    [
        (0.9, 0.9, "kept"),
        (0.9, 0.99, "kept"),
        (0.9, 0.875, "kept"),
        (0.9, 0.86, "weakened"),
        (0.9, 0.46, "weakened"),
        (0.9, 0.44, "lost"),
        (0.05, 0.0, "already lacking"),
    ],
)
def test_an_organ_that_is_labelled_is_judged_by_its_dice(before, after, status):
    assert Organ(before, after, agreement=0.1).status(THRESHOLDS) == status


@pytest.mark.parametrize(
    ("found", "status"),
    [(1.0, "kept"), (0.81, "kept"), (0.79, "weakened"), (0.5, "weakened"), (0.49, "lost"), (0.0, "lost")],
)
def test_others_are_judged_by_agreement(found, status):
    assert Organ(agreement=found, cosine=-1.0).status(THRESHOLDS) == status
    assert Organ(before=0.9, agreement=found).status(THRESHOLDS) == status


def test_nothing_is_said_of_what_is_not_known():
    assert Organ(cosine=1.0).status(THRESHOLDS) == "not scored"


def test_thresholds_are_those_of_the_schedule():
    assert Organ(0.9, 0.8).status(Guard(weakened=0.2)) == "kept"
    assert Organ(0.9, 0.8).status(Guard(lost=0.95)) == "lost"
    assert Organ(agreement=0.7).status(Guard(agreement=0.6)) == "kept"


def test_confusion_leaves_new_classes_out_and_keeps_voxels_without_a_label():
    old = np.array([0, 1, 1, 1, 0, 1])
    new = np.array([0, 1, 2, 0, 2, 1])
    labels = np.array([-1, 0, 2, 1, 0, 3])  # outside of the body, background, new, old, background, ignored
    np.testing.assert_array_equal(confusion(old, new, labels, 2, 3), [[1, 0, 1], [1, 2, 0]])
    of_two_new = confusion(np.array([1, 1, 0]), np.array([3, 2, 0]), np.array([2, 3, 4]), 2, 4)
    np.testing.assert_array_equal(of_two_new, [[1, 0, 0, 0], [0, 0, 0, 0]])


def test_agreement_by_hand():
    voxels = np.array([[9000, 50, 0, 7], [100, 300, 0, 0], [300, 0, 0, 100], [49, 0, 50, 0]])
    np.testing.assert_allclose(agreement(voxels[:3]), [2 * 300 / (400 + 350), 0])
    found = agreement(voxels)
    assert math.isnan(found[2]), "99 voxels are too few to tell"
    assert agreement(np.array([[0, 0, 0], [0, 100, 0]]))[0] == 1, "and 100 are not"


def test_what_is_written_is_read_again():
    check = Check("pgcd", None, "all", 2, "a", "b", 5, {"ball": Organ(0.9, 0.8), "tube": Organ(agreement=0.3)})
    content = json.loads(json.dumps(check.to_json(THRESHOLDS), allow_nan=False))
    assert [organ["status"] for organ in content["organs"].values()] == ["weakened", "lost"]
    assert Check.from_json(content) == check
    assert check.judged_by == "test subjects and agreement with the step before on 5 new scans"
    assert list(check.lost(THRESHOLDS)) == ["tube"]


# --- in a chain whose trainings and scores are written by hand ---

DICE = {1: {"ball": 0.9, "tube": 0.8}, 2: {"ball": 0.85, "tube": 0.1, "blob": 0.9}}


@pytest.fixture
def chain(nnunet_folders, tmp_path) -> Chain:
    return open_chain(tmp_path, STEPS)


def settle(chain: Chain, **changes) -> None:
    chain.schedule = replace(chain.schedule, guard=Guard(**changes))


@pytest.fixture
def ran(chain, monkeypatch) -> SimpleNamespace:
    """``run(chain, *methods)`` with faked preparation, trainings and scores; ``trained`` lists what was trained."""
    trained = []

    def train(chain, variant, step, fold, label):
        trained.append((variant.method, step))
        write_model(chain, variant, step, {})

    def evaluate(chain, variant, step, fold, device):
        dice = DICE[2 if step == JOINT else step]
        write_scores(chain, variant, step, {"case_1": dice})

    for name, fake in (("_train", train), ("evaluate_model", evaluate), ("prepare_chain", lambda *_: None)):
        monkeypatch.setattr(driver, name, fake)
    monkeypatch.setattr(nnunet_api, "objective_of", lambda _: Objective)
    return SimpleNamespace(trained=trained, run=lambda *methods: driver._run(chain, methods, []))


def three_steps(chain: Chain, tmp_path, monkeypatch) -> Chain:
    shutil.rmtree(chain.folder.parent)
    shutil.rmtree(tmp_path / "source")
    chain.folder.parent.mkdir()
    monkeypatch.setitem(DICE, 3, {**DICE[2], "cube": 0.9})
    return open_chain(tmp_path, (*STEPS, ("cube",)))


def test_each_old_organ_gets_a_line_and_stands_in_guard_json_and_status(chain, ran, caplog):
    with caplog.at_level(logging.INFO):
        table = ran.run("pgcd", "joint")
    assert "pgcd: Dice (%) by step" in table
    said = {r.message.strip(): r.levelname for r in caplog.records if r.name == "nnunet_cil.guard"}
    assert said == {
        "guard: ball: weakened (Dice 0.900 -> 0.850, cosine of prototypes 1.00)": "WARNING",
        "guard: tube: lost (Dice 0.800 -> 0.100, cosine of prototypes 1.00)": "WARNING",
    }
    content = json.loads((chain.folder / "guard.json").read_text(encoding="utf-8"))
    assert list(content) == ["nnUNetPlans/step2_fold_all"]
    entry = content["nnUNetPlans/step2_fold_all"]
    assert (entry["method"], entry["step"], entry["n_scans"]) == ("pgcd", 2, 0)
    cosine = entry["organs"]["tube"].pop("cosine")
    assert entry["organs"]["tube"] == {"status": "lost", "before": 0.8, "after": 0.1, "agreement": None}
    assert cosine == pytest.approx(1.0)
    shown = driver.status(chain.schedule, ["pgcd", "joint"], []).splitlines()
    assert [line.split("fold all")[1].strip() for line in shown[1:]] == [
        "done",
        "done; lost tube, weakened ball",
        "done",
    ]


def test_what_is_known_is_not_said_again(ran, caplog):
    ran.run()
    caplog.clear()
    ran.run()
    assert not [record for record in caplog.records if record.name == "nnunet_cil.guard"]


@pytest.mark.parametrize("content", ["", "[]", "{}}", '{"a": 1}', '{"a": {"organs": {}}}', '{"a": {"organs": 1}}'])
def test_a_damaged_record_is_told_in_words_and_made_anew_once_it_is_removed(chain, ran, content):
    ran.run()
    path = chain.folder / "guard.json"
    known = path.read_text(encoding="utf-8")
    path.write_text(content, encoding="utf-8")
    for command in (ran.run, lambda: driver.status(chain.schedule, [], [])):
        with pytest.raises(ValueError, match=r"guard.json: got .*, expected what the guard .*wrote there. Remove it"):
            command()
    path.unlink()
    ran.run()
    assert path.read_text(encoding="utf-8") == known


def test_stop_ends_the_chain_before_the_next_step_until_it_may_go_on(chain, ran, tmp_path, monkeypatch):
    chain = three_steps(chain, tmp_path, monkeypatch)
    settle(chain, on_forgetting="stop")
    run = lambda *methods: driver._run(chain, methods, [])  # noqa: E731
    bad = chain.model_folder(chain.variant("pgcd", 0), 2) / "fold_all"
    for _ in range(2):
        with pytest.raises(RuntimeError) as caught:
            run()
        for part in (
            *("pgcd, seed 0, step 2 of 3, fold all", "tube lost (Dice 0.800 -> 0.100", "To go on from step 1"),
            *(f"remove {bad}", f"give {chain.model_folder(chain.variant('pgcd', 0), 1)} as `model`"),
        ):
            assert part in str(caught.value)
        assert "ball" not in str(caught.value), "weakened only"
        assert ran.trained == [("pgcd", 1), ("pgcd", 2)], "the second run trains nothing on it either"
    assert json.loads((chain.folder / "scores.json").read_text(encoding="utf-8"))["runs"], "what is scored is told"
    assert "done; lost tube, weakened ball, the guard stops here" in driver.status(chain.schedule, [], [])

    shutil.rmtree(bad)
    monkeypatch.setitem(DICE, 2, {**DICE[2], "tube": 0.8})
    monkeypatch.setitem(DICE, 3, {**DICE[3], "tube": 0.8})
    run()
    assert ran.trained[2:] == [("pgcd", 2), ("pgcd", 3)], "from the last good step on"


def test_warn_goes_on_with_a_model_that_was_stopped(chain, ran, tmp_path, monkeypatch):
    chain = three_steps(chain, tmp_path, monkeypatch)
    settle(chain, on_forgetting="stop")
    with pytest.raises(RuntimeError, match="to be kept"):
        driver._run(chain, [], [])
    settle(chain, on_forgetting="warn")
    driver._run(chain, [], [])
    assert ran.trained == [("pgcd", 1), ("pgcd", 2), ("pgcd", 3)]


def test_other_methods_of_a_comparison_are_not_stopped(chain, ran, monkeypatch):
    settle(chain, on_forgetting="stop")
    ran.run("finetune")
    assert ran.trained == [("pgcd", 1), ("finetune", 2)]
    assert read_checks(chain)["nnUNetPlans_finetune/step2_fold_all"].lost(THRESHOLDS)
    with pytest.raises(RuntimeError, match="pgcd, seed 0, step 2 of 2"):
        ran.run("finetune", "pgcd")


def test_the_report_has_a_row_a_step(chain, ran):
    ran.run("pgcd", "finetune")
    variants = [chain.variant(method, 0) for method in ("pgcd", "finetune", "joint")]
    assert [(c.method, c.step) for c in collect(chain, variants).checks] == [("pgcd", 2), ("finetune", 2)]
    html = write_report(chain, variants).read_text(encoding="utf-8")
    assert "Each step compared with the step before" in html
    assert html.count("<td>lost tube, weakened ball</td><td>test subjects</td>") == 2
    (chain.folder / "guard.json").write_text("[]")
    assert collect(chain, variants).problems == (
        "The file with what the guard against forgetting saw could not be read and is left out.",
    )


def test_an_organ_that_no_test_subject_has_labelled_is_compared_on_new_scans_beside_the_others(chain, monkeypatch):
    variant = chain.variant("pgcd", 0)
    for step in (1, 2):
        write_model(chain, variant, step, {})
        write_scores(chain, variant, step, {"case_1": {"ball": DICE[step]["ball"]}})
    voxels = np.array([[9000, 0, 0, 0], [0, 400, 0, 0], [100, 0, 300, 0]])
    monkeypatch.setattr(guard, "_compared_on_new_scans", lambda *_: (voxels, 5))
    check = check_step(chain, variant, 2, "all", CPU)
    assert check.n_scans == 5
    assert (check.organs["ball"].before, check.organs["ball"].after) == (0.9, 0.85)
    assert check.organs["tube"].agreement == pytest.approx(600 / 700)
    assert [organ.labelled for organ in check.organs.values()] == [True, False]


def test_a_step_whose_teacher_is_gone_is_not_checked(chain):
    variant = chain.variant("pgcd", 0)
    write_model(chain, variant, 2, {})
    assert check_step(chain, variant, 2, "all", CPU) is None
    assert not (chain.folder / "guard.json").exists()


# --- without labels: two networks on preprocessed scans ---


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, module_patch) -> Chain:  # noqa: F811
    """A tiny chain that is prepared and has no test set."""
    chain = make_chain(tmp_path_factory.mktemp("prepared"), module_patch, ("pgcd",), training=", validation_cases: 0")
    chain.schedule = replace(chain.schedule, test=())
    return chain


def write_network(chain: Chain, step: int, says: int) -> None:
    """A model folder of nnU-Net whose network calls every voxel the class ``says``."""
    folder = chain.model_folder(chain.variant("pgcd", 0), step)
    (folder / "fold_all" / "validation").mkdir(parents=True, exist_ok=True)
    for name, source in (("plans.json", "nnUNetPlans.json"), ("dataset.json", "dataset.json")):
        shutil.copyfile(chain.preprocessed(step) / source, folder / name)
    plans, dataset_json = (json.loads((folder / name).read_text()) for name in ("plans.json", "dataset.json"))
    weights = nnunet_api.build_network(plans, dataset_json, "3d_fullres", "nnUNetTrainerPGCD").state_dict()
    for name in [name for name in weights if ".seg_layers." in name]:
        weights[name] = torch.zeros_like(weights[name])
        if name.endswith("bias"):
            weights[name][says] = 5
    content = {"network_weights": weights, "trainer_name": "nnUNetTrainerPGCD"}
    torch.save({**content, "init_args": {"configuration": "3d_fullres"}}, folder / "fold_all" / "checkpoint_final.pth")
    for name in ("prototypes.npz", "validation/summary.json"):
        (folder / "fold_all" / name).write_text("{}")


def test_without_a_test_set_both_models_are_compared_on_the_new_scans(prepared, monkeypatch, caplog):
    chain, variant = prepared, prepared.variant("pgcd", 0)
    monkeypatch.setattr(guard.PrototypeStore, "load", lambda path: None)
    monkeypatch.setattr(guard, "alignment", lambda before, after: {"ball": 0.75, "background": 1.0})
    monkeypatch.setenv("nnUNet_extTrainer", trainer_path_variable())
    write_network(chain, 1, says=1)
    write_network(chain, 2, says=1)
    with caplog.at_level(logging.INFO):
        check = check_step(chain, variant, 2, "all", CPU)
    assert check.organs == {"ball": Organ(agreement=1.0, cosine=0.75)}
    assert check.n_scans == 5
    assert "guard: ball: kept (agreement with the step before 1.000, cosine of prototypes 0.75)" in caplog.text

    write_network(chain, 2, says=2)
    assert check_step(chain, variant, 2, "all", CPU).organs["ball"].status(THRESHOLDS) == "lost", "another checkpoint"
    calls = []
    monkeypatch.setattr(guard, "load_teacher", lambda *arguments: calls.append(arguments))
    assert check_step(chain, variant, 2, "all", CPU).organs["ball"].agreement == 0
    assert not calls, "what is known of these two models is not measured again"

    write_network(chain, 2, says=0)
    chain.content["forgotten"] = [2]
    forgotten = check_step(chain, variant, 2, "all", CPU)
    del chain.content["forgotten"]
    assert (forgotten.n_scans, forgotten.organs["ball"].status(THRESHOLDS)) == (0, "not scored")
    assert not calls, "the scans are gone"


def test_scans_are_validation_cases_where_the_fold_has_some(prepared):
    folder = prepared.preprocessed(2) / "nnUNetPlans_3d_fullres"
    splits = json.loads((folder.parent / "splits_final.json").read_text(encoding="utf-8"))
    assert guard._few_cases(folder, 0) == sorted(splits[0]["val"])
    assert guard._few_cases(folder, 99) == guard._few_cases(folder, "all") == [f"case_{i}" for i in range(5)]
