from __future__ import annotations

import json
import re

import numpy as np
import pytest

from nnunet_cil import driver
from nnunet_cil.report.by_test_set import TestSetScores, by_test_set, table_by_test_set
from nnunet_cil.report.collect import collect
from nnunet_cil.report.table import Row
from tests.report.chain_files import open_chain, write_scores, write_test_set

TITLE = "Mean Dice after the last step, by test set"


def _run(method, seed, fold, *dice, n_classes=2):
    sets = [
        {"set": n, "name": f"site {n}", "n_subjects": n + 1, "n_classes": n_classes, "never_trained_on": n == 1}
        | {"mean": {"dice": value}}
        for n, value in enumerate(dice)
    ]
    return {"method": method, "seed": seed, "fold": fold, "by_test_set": sets}


def test_a_seed_counts_once_however_many_folds_it_has():
    runs = [_run("pgcd", 0, 0, 0.2, 0.5), _run("pgcd", 0, 1, 0.4, 0.7), _run("pgcd", 1, 0, 0.9, None)]
    first, second = by_test_set([*runs, _run("pgcd", 0, "ensemble", 1.0, 1.0, n_classes=9)])
    assert (first.name, first.n_subjects, first.n_classes, first.never_trained_on) == ("site 0", 1, 2, False)
    assert first.dice == pytest.approx({"pgcd": 0.6})
    assert second.dice == pytest.approx({"pgcd": 0.6})


def test_table_as_a_whole():
    rows = [Row(method, np.array([[[0.5]]])) for method in ("pgcd", "replay", "mib")]
    sets = (
        TestSetScores("site_a", 1, 2, False, {"pgcd": 0.8, "replay": 0.7512}),
        TestSetScores("site_b", 3, 1, True, {"pgcd": 0.4}),
    )
    assert (
        table_by_test_set(rows, sets, 2)
        == """\
Mean Dice after the last step, by test set
method                                              site_a            site_b
                                                 1 subject        3 subjects
                                                  2 organs     1 of 2 organs
                           trained on other subjects of it  never trained on
                                                         %                 %
----------------------------------------------------------------------------
pgcd                                                  80.0              40.0
replay (not privacy-safe)                             75.1               n/a
mib                                                    n/a               n/a
"""
    )
    assert table_by_test_set(rows, (), 2) == ""


def test_terminal_file_and_page_have_the_same(nnunet_folders, tmp_path):
    chain = open_chain(tmp_path)
    write_test_set(chain, ("a", "b", "c"))
    path = chain.folder / "test" / "test.json"
    test = json.loads(path.read_text(encoding="utf-8"))
    test["cases"]["c"]["set"] = 1
    path.write_text(json.dumps(test))
    variants = [chain.variant("pgcd", seed) for seed in (0, 1)]
    for variant in variants:
        values = {"a": 0.9, "b": 0.7, "c": 0.4 + 0.2 * variant.seed}
        scores = {case: dict.fromkeys(("ball", "tube", "blob"), value) for case, value in values.items()}
        write_scores(chain, variant, 2, scores)
    shown = driver.report(chain, variants)
    assert shown + "\n" == (chain.folder / "table.txt").read_text(encoding="utf-8")
    (block,) = [part for part in shown.split("\n\n") if part.startswith(TITLE)]
    assert re.split(r"\s{2,}", block.splitlines()[-1]) == ["pgcd", "80.0", "50.0"]
    assert [one.dice["pgcd"] for one in collect(chain, variants).by_test_set] == pytest.approx([0.8, 0.5])
