"""Which methods and seeds the commands take that only look at a chain."""

from __future__ import annotations

import json
import logging

import pytest

from nnunet_cil import driver
from nnunet_cil.chain import JOINT, Chain
from nnunet_cil.dataset import block_of
from nnunet_cil.present import present_variants
from nnunet_cil.step_files import write_json
from tests.test_gather import chain_with_test_set, score


@pytest.fixture
def chain(nnunet_folders, tmp_path) -> Chain:
    return chain_with_test_set(tmp_path)


def plans_of(chain: Chain, method: str, seed: int, step: int | str, begun: bool = True) -> None:
    """The plans of a training that was begun, or only prepared."""
    variant = chain.variant(method, seed)
    path = chain.preprocessed(step) / f"{chain.plans_name(variant)}.json"
    write_json(
        chain.model_folder(variant, step) / "plans.json" if begun else path,
        {"cil": block_of(chain, variant, step).to_json()},
    )


def names(*args, **kwargs) -> list[tuple[str, int | None]]:
    return [(variant.method, variant.seed) for variant in present_variants(*args, **kwargs)]


def test_of_a_new_chain_it_is_the_schedules_own(chain):
    assert names(chain) == [("pgcd", 0)]
    assert names(chain, seeds=[3, 1]) == [("pgcd", 3), ("pgcd", 1)]
    chain.content["plans_name"] = None
    assert names(chain, prepared=True) == [("pgcd", 0)]


def test_all_that_is_scored_begun_or_prepared_is_found(chain):
    plans_of(chain, "pgcd", 0, 1)
    assert names(chain) == [("pgcd", 0)]
    plans_of(chain, "pseudo_kd", 0, 2)
    plans_of(chain, "pseudo_kd", 10, 2)
    plans_of(chain, "pgcd-no_channel", 2, 2)
    plans_of(chain, "joint", 2, JOINT)
    score(chain, "mib", 2, 2, 0.5)  # of another machine
    plans_of(chain, "ewc", 0, 2, begun=False)
    begun = [("pseudo_kd", 0), ("mib", 2), ("pgcd-no_channel", 2), ("pseudo_kd", 10), ("joint", 2)]
    assert names(chain) == begun, "step 1 with seed 0 is of pseudo_kd as well"
    assert names(chain, prepared=True) == [("ewc", 0), *begun]


def test_what_is_named_is_taken_whether_it_is_there_or_not(chain):
    plans_of(chain, "finetune", 0, 2)
    plans_of(chain, "mib", 1, 2)
    assert names(chain, ["plop", "mib"]) == [("plop", 0), ("mib", 0), ("plop", 1), ("mib", 1)], "of all seeds"
    assert names(chain, seeds=[1]) == [("mib", 1)], "all methods of it"
    assert names(chain, seeds=[1, 5]) == [("mib", 1), ("pgcd", 5)]
    assert names(chain, ["plop"], [7]) == [("plop", 7)]


def test_damaged_files_and_variants_that_are_gone_are_passed_over(chain, caplog):
    plans_of(chain, "finetune", 0, 2)
    folder = chain.paths["nnUNet_results"] / chain.dataset_name(2)
    for name, content in {
        "half": '{"cil": {"meth',
        "stock": '{"configurations": {}}',
        "list": "[]",
        "gone": json.dumps({"cil": {"method": "long_gone", "training": {"seed": 0}}}),
    }.items():
        (folder / name).mkdir()
        (folder / name / "plans.json").write_text(content, encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert names(chain) == [("finetune", 0)]
    assert all(name in caplog.text for name in ("half", "list", "long_gone"))
    assert "stock" not in caplog.text, "it is no chain's, and nothing is wrong with it"


def test_status_and_report_show_all_of_it(chain, monkeypatch):
    score(chain, "pgcd", 0, 2, 0.8)
    score(chain, "finetune", 0, 2, 0.1)
    plans_of(chain, "pseudo", 0, 2, begun=False)
    shown = driver.status(chain.schedule, [], [])
    assert [f"{method}, seed" in shown for method in ("pgcd", "finetune", "pseudo", "mib")] == [True, True, True, False]
    monkeypatch.setattr(driver.report_page, "write_report", lambda chain, variants: [v.method for v in variants])
    assert driver.write_report(chain.schedule, [], []) == ["pgcd", "finetune"]
    assert driver.write_report(chain.schedule, ["pgcd"], []) == ["pgcd"]
    assert driver.write_report(chain.schedule, ["pgcd", "mib"], []) == ["pgcd", "mib"], "the page says what is missing"
    assert driver.write_report(chain.schedule, ["pgcd"], [9]) == ["pgcd"], "its jobs may be queued"
    message = "got nothing of pgcd with seed 9, expected what was begun or scored: pgcd with seed 0, finetune with seed"
    with pytest.raises(ValueError, match=message):
        driver.write_report(chain.schedule, ["pgcd"], [9], must_be_there=True)
