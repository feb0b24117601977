"""The tables of ``examples/results`` are those of the scores that lie beside them, subject by subject."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from nnunet_cil import driver
from nnunet_cil.chain import Chain, read_chain
from nnunet_cil.dataset import write_test_set
from nnunet_cil.schedule import load_schedule
from tests.test_examples import EXAMPLES, public_sets  # noqa: F401  (a fixture)

RESULTS = sorted(path.parent for path in EXAMPLES[0].parent.glob("results/*/chain.json"))


def test_lwf_and_mib_forget_less_than_finetune_on_the_hippocampus():
    """As their papers say, in the scores of real trainings; before and after the step, anterior part."""
    folder = EXAMPLES[0].parent / "results" / "hippocampus_methods" / "matrices"
    forgotten = {}
    for method in ("finetune", "lwf", "mib"):
        rows = list(csv.DictReader((folder / f"{method}_seed0_foldall_dice.csv").open(encoding="utf-8")))
        forgotten[method] = float(rows[0]["anterior"]) - float(rows[1]["anterior"])
    assert forgotten["finetune"] > 0.5
    assert max(forgotten["lwf"], forgotten["mib"]) < 0.1


@pytest.mark.data
@pytest.mark.parametrize("folder", RESULTS, ids=[folder.name for folder in RESULTS])
def test_scores_give_the_table(folder, public_sets):  # noqa: F811
    schedule = load_schedule(folder.parents[1] / f"{folder.name}.yaml")
    chain = Chain.open(schedule)
    chain.content["plans_name"] = read_chain(folder / "chain.json")["plans_name"]
    chain.save()
    write_test_set(chain)
    shown = driver.gather(schedule, [folder])
    assert shown + "\n" == (folder / "table.txt").read_text(encoding="utf-8")
    for file in sorted((folder / "matrices").iterdir()):
        assert file.read_text() == (chain.folder / "matrices" / file.name).read_text(), file.name


def test_there_are_results():
    assert RESULTS
    assert all(Path(folder / "mean_dice.png").is_file() for folder in RESULTS)
