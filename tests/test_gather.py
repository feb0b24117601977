"""Seeds and methods that ran on other machines, in one table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nnunet_cil import driver
from nnunet_cil.chain import Chain
from nnunet_cil.dataset import write_test_set
from nnunet_cil.evaluate import evaluation_file
from nnunet_cil.gather import gather_scores
from nnunet_cil.present import present_variants
from nnunet_cil.schedule import load_schedule
from nnunet_cil.step_files import write_json
from nnunet_cil.teacher import sha256_of
from tests.conftest import write_schedule, write_tiny_dataset


def chain_with_test_set(tmp_path: Path) -> Chain:
    """A chain that is planned and of which nothing is trained; nnU-Net's folders have to be set."""
    source = write_tiny_dataset(tmp_path / "source", n_cases=3)
    chain = Chain.open(load_schedule(write_schedule(tmp_path / "s.yaml", source)))
    chain.content["plans_name"] = "nnUNetPlans"
    chain.save()
    write_test_set(chain)
    return chain


@pytest.fixture
def chain(nnunet_folders, tmp_path) -> Chain:
    return chain_with_test_set(tmp_path)


def score(chain: Chain, method: str, seed: int, step, ball: float) -> Path:
    """Scores of a model as ``evaluate_model`` stores them, in this chain's folder."""
    three = {"dice": ball, "hd95_mm": 1.0, "nsd": ball}
    path = evaluation_file(chain, chain.variant(method, seed), step, "all")
    content = {
        "test_sha256": sha256_of(chain.folder / "test" / "test.json"),
        "nsd_tolerance_mm": chain.schedule.nsd_tolerance_mm,
        "method": method,
        "seed": seed,
        "step": step,
        "fold": "all",
        "parameters": 100,
        "scores": {"case_2": {"ball": three} | ({} if step == 1 else {"blob": three})},
        "absent": {"case_2": {}},
    }
    write_json(path, content)
    return path


def elsewhere(chain: Chain, folder: Path) -> Path:
    """What lies in the chain's folder now, as another machine would have it; here it is gone."""
    shutil.copytree(chain.folder, folder, symlinks=True)
    shutil.rmtree(chain.folder / "predictions")
    return folder


def test_seeds_of_two_machines_stand_in_one_table(chain, tmp_path):
    for step, ball in ((1, 0.9), (2, 0.8)):
        score(chain, "pgcd", 0, step, ball)
    score(chain, "finetune", 0, 2, 0.1)
    first = elsewhere(chain, tmp_path / "first")
    for step, ball in ((1, 0.7), (2, 0.6)):
        score(chain, "pgcd", 1, step, ball)
    score(chain, "joint", 1, "joint", 0.95)
    second = elsewhere(chain, tmp_path / "second")
    score(chain, "pgcd", 2, 1, 0.5)
    shown = driver.gather(chain.schedule, [first, second])
    content = json.loads((chain.folder / "scores.json").read_text(encoding="utf-8"))
    found = {(run["method"], run["seed"]): run["dice"][-1][0] for run in content["runs"]}
    assert found == {("pgcd", 0): 0.8, ("finetune", 0): 0.1, ("pgcd", 1): 0.6, ("joint", 1): 0.95}
    assert "70.0 ±14.1" in shown, "mean and standard deviation of both seeds"
    assert [(v.method, v.seed) for v in present_variants(chain)] == list(found)
    assert gather_scores(chain, [first, second]) == 0, "all of it is here already"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_sha256": "0" * 64}, "test_sha256: got 0000"),
        ({"nsd_tolerance_mm": 7.0}, "nsd_tolerance_mm: got 7.0, expected"),
        ({"seed": 3}, "got scores of pgcd, seed 3, step 2, fold all, expected a step and fold of this chain in"),
        ({"fold": 4}, "fold 4, expected a step and fold of this chain"),
        ({"method": "unheard_of"}, "got 'unheard_of', expected some of"),
        ({"method": None}, "got no method, seed, step and fold"),
        ({"scores": {"case_2": {"ball": {"dice": 1.5}}}}, "expected scores in"),
        ({"scores": {"case_2": {"ball": {"nsd": -0.1}}}}, "got nsd: -0.1, expected scores in"),
        ({"scores": {"case_2": {"ball": {"hd95_mm": -1.0}}}}, "got hd95_mm: -1.0, expected scores in"),
    ],
)
def test_scores_that_do_not_belong_here_are_refused_and_none_is_copied(chain, tmp_path, changes, message):
    score(chain, "finetune", 0, 2, 0.1)
    path = score(chain, "pgcd", 0, 2, 0.8)
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | changes)
    other = elsewhere(chain, tmp_path / "other")
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("[", r"\[")):
        gather_scores(chain, [other])
    assert not list(chain.folder.glob("predictions/*/*/scores.json"))


def test_another_schedule_is_refused(chain, tmp_path):
    score(chain, "pgcd", 0, 2, 0.8)
    other = elsewhere(chain, tmp_path / "other")
    content = json.loads((other / "chain.json").read_text(encoding="utf-8"))
    content["schedule"]["training"]["epochs"] = 99
    content.pop("digest")
    write_json(other / "chain.json", content)
    with pytest.raises(ValueError, match=r"got scores of another schedule.*\n.*training: epochs: chain 99, schedule 1"):
        gather_scores(chain, [other])


@pytest.mark.parametrize("variants", [None, [], {"pgcd": 1}])
def test_a_chain_without_variants_is_gathered_and_one_with_others_refused(chain, tmp_path, variants):
    score(chain, "pgcd", 0, 2, 0.8)
    other = elsewhere(chain, tmp_path / "other")
    content = json.loads((other / "chain.json").read_text(encoding="utf-8"))
    content["schedule"]["variants"] = variants
    if variants is None:
        del content["schedule"]["variants"]
    write_json(other / "chain.json", content)
    if variants:
        with pytest.raises(ValueError, match=r"another schedule.*\n.*variants: pgcd: chain 1, schedule {}"):
            gather_scores(chain, [other])
    else:
        assert gather_scores(chain, [other]) == 1


def test_another_training_of_the_same_model_is_refused(chain, tmp_path):
    score(chain, "pgcd", 0, 2, 0.8)
    other = elsewhere(chain, tmp_path / "other")
    score(chain, "pgcd", 0, 2, 0.7)
    with pytest.raises(ValueError, match=r"got other scores than .* has, expected the same"):
        gather_scores(chain, [other])


def test_without_a_prepared_chain_it_says_what_to_do(nnunet_folders, tmp_path):
    source = write_tiny_dataset(tmp_path / "source", n_cases=2)
    schedule = load_schedule(write_schedule(tmp_path / "s.yaml", source))
    with pytest.raises(ValueError, match=r"Run `nnunet-cil prepare .*s.yaml` first"):
        gather_scores(Chain.open(schedule), [tmp_path])


def test_without_a_test_set_no_command_is_named_that_cannot_help(nnunet_folders, tmp_path):
    source = write_tiny_dataset(tmp_path / "source", n_cases=2)
    path = write_schedule(tmp_path / "s.yaml", source)
    path.write_text("".join(line for line in path.open() if not line.startswith("test:")))
    with pytest.raises(ValueError, match=r"s.yaml: test: got nothing, expected the test set of these scores") as caught:
        gather_scores(Chain.open(load_schedule(path)), [tmp_path])
    assert "prepare" not in str(caught.value)


def test_a_mistyped_folder_is_named(chain, tmp_path):
    score(chain, "pgcd", 0, 2, 0.8)
    other = elsewhere(chain, tmp_path / "other")
    wrong = tmp_path / "elswhere" / "chain_x"
    with pytest.raises(FileNotFoundError) as caught:
        gather_scores(chain, [other, wrong])
    assert str(caught.value) == f"{wrong}: got no such folder, expected chain_tiny of another machine."
    with pytest.raises(FileNotFoundError) as caught:
        gather_scores(chain, [other, tmp_path])
    assert str(caught.value) == f"{tmp_path}: got a folder without chain.json, expected chain_tiny of another machine."
    assert not list(chain.folder.glob("predictions/*/*/scores.json"))
