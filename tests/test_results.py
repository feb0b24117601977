"""The tables of ``examples/results`` are those of the scores that lie beside them, subject by subject."""

from __future__ import annotations

from pathlib import Path

import pytest

from nnunet_cil import driver
from nnunet_cil.chain import Chain, read_chain
from nnunet_cil.dataset import write_test_set
from nnunet_cil.schedule import load_schedule
from tests.test_examples import EXAMPLES, public_sets  # noqa: F401  (a fixture)

RESULTS = sorted(path.parent for path in EXAMPLES[0].parent.glob("results/*/chain.json"))


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
