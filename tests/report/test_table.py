from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest

from nnunet_cil.report.table import FinalScores, Row, named_seeds, score_table, seed_numbers

NAN = np.nan
CLASSES = ["liver", "spleen", "kidney"]
LEARNED_AT = [1, 1, 2]
PGCD = Row("pgcd", np.array([[[0.9, 0.8, NAN], [0.891, 0.813, 0.79]]]))
FINETUNE = Row("finetune", np.array([[[0.9, 0.8, NAN], [0.0, 0.002, 0.81]]]))
JOINT = Row("joint", np.array([[[NAN] * 3, [0.91, 0.84, 0.83]]]))


def _cells(row):
    """The row's cells in the first part of the table, whose columns end where their names do."""
    _, header, _, _, line, *_ = score_table([row], CLASSES, LEARNED_AT).splitlines()
    ends = [0, *(match.end() for match in re.finditer(r"\S+(?: \S+)*", header))]
    return [line[start:end].strip() for start, end in pairwise(ends)]


def test_terminal_table_as_a_whole():
    assert (
        score_table([FINETUNE, JOINT], CLASSES, LEARNED_AT)
        == """\
Dice after the last step
method    seeds  liver  spleen  kidney   old   new  mean  avg inc mean  forgetting     BWT  plasticity
                     %       %       %     %     %     %             %      points  points           %
------------------------------------------------------------------------------------------------------
finetune   none    0.0     0.2    81.0   0.1  81.0  27.1          56.0        84.9   -84.9        81.0
joint      none   91.0    84.0    83.0  87.5  83.0  86.0           n/a         n/a     n/a         n/a

finetune: Dice (%) by step
step  liver  spleen  kidney  mean
---------------------------------
1      90.0    80.0          85.0
2       0.0     0.2    81.0  27.1

joint: Dice (%) by step
step  liver  spleen  kidney  mean
---------------------------------
2      91.0    84.0    83.0  86.0
"""
    )


def test_block_beside_dice_as_a_whole():
    forgot = FinalScores(
        nsd=0.251,
        nsd_tolerance_mm=2.5,
        hd95_mm=3.14,
        n_scores=60,
        missed=38,
        invented=1,
        both_empty=2,
        gap_to_joint=0.5904,
        plasticity_gap=-0.0123,
    )
    bound = FinalScores(0.912, 2.5, NAN, 60, 0, 0, 0, NAN, NAN)
    rows = [Row("finetune", FINETUNE.by_seed, final=forgot), Row("joint", JOINT.by_seed, final=bound), PGCD]
    block = score_table(rows, CLASSES, LEARNED_AT).split("\n\n")[1]
    assert (
        block
        == """\
After the last step, mean over classes (NSD at 2.5 mm; HD95 where it exists, the rest counted)
method     NSD  HD95  missed  invented  both empty     of  gap to joint  plasticity gap
             %    mm   count     count       count  count        points          points
---------------------------------------------------------------------------------------
finetune  25.1   3.1      38         1           2     60         +59.0            -1.2
joint     91.2   n/a       0         0           0     60           n/a             n/a
Forward transfer: n/a, as classes appear in one step only and have no score before it."""
    )


def test_each_column_has_its_score():
    pgcd = _cells(PGCD)
    assert pgcd == ["pgcd", "none", "89.1", "81.3", "79.0", "85.2", "79.0", "83.1", "84.1", "-0.2", "+0.2", "79.0"]
    assert _cells(JOINT)[-4:] == ["n/a"] * 4


def test_spread_over_seeds_is_shown_beside_scores():
    other = np.array([[[0.92, 0.78, NAN], [0.911, NAN, 0.85]]])
    text = score_table([Row("pgcd", np.concatenate([PGCD.by_seed, other]), (0, 2))], CLASSES, LEARNED_AT)
    assert "91.0 ±1.4  79.0 ±1.4" in text, "one degree of freedom less"
    line = text.splitlines()[4]
    assert line.split()[:3] == ["pgcd", "0", "2"]
    assert line.split()[3:8] == ["90.1", "±1.4", "81.3", "82.0", "±4.2"]
    assert "88.1 ±4.2  82.0 ±4.2" in line, "old and new, each from the seeds' own means"


def test_forgetting_is_that_of_each_seed_not_of_the_mean_matrix():
    """Two seeds whose best steps differ: the mean matrix has no such best."""
    by_seed = np.array(
        [[[0.5, NAN, NAN], [0.9, 0.5, NAN], [0.5, 0.5, 0.5]], [[0.9, NAN, NAN], [0.5, 0.5, NAN], [0.5, 0.5, 0.5]]]
    )
    means, spreads = Row("pgcd", by_seed, (0, 1)).summary([1, 2, 3])
    assert means["forgetting"] == pytest.approx(0.2)  # 0.4 of the first class, 0 of the second, in each seed
    assert spreads["forgetting"] == pytest.approx(0.0)
    assert np.isnan(Row("pgcd", by_seed[:1]).summary([1, 2, 3])[1]["mean"])


def test_a_gap_that_only_some_seeds_have_says_which():
    final = FinalScores(0.9, 2.0, 1.0, 60, 0, 0, 0, 0.02, 0.01, gap_seeds=(1,))
    three = Row("pgcd", np.concatenate([PGCD.by_seed] * 3), (0, 1, 2), final)
    assert "+2.0 (seed 1)   +1.0 (seed 1)" in score_table([three], CLASSES, LEARNED_AT)
    assert "(seed" not in score_table([Row("pgcd", PGCD.by_seed, (1,), final)], CLASSES, LEARNED_AT)


def test_seeds_in_few_words():
    assert [seed_numbers(seeds) for seeds in ((1, 0), (2, 0, 1), (5, 0, 1, 2, 6), (0, 2, 4), (None,), (None, 3))] == [
        "0 1",
        "0-2",
        "0-2 5 6",
        "0 2 4",
        "none",
        "none 3",
    ]
    assert [named_seeds(seeds) for seeds in ((4,), (1, 2), (0, 1, 2))] == ["seed 4", "seeds 1, 2", "seeds 0-2"]


def test_seeds_that_differ_in_equal_number_are_told():
    two = np.concatenate([PGCD.by_seed] * 2)
    text = score_table([Row("pgcd", two, (0, 1)), Row("pgcd_largest", two, (1, 2))], CLASSES, LEARNED_AT)
    assert [re.split(r"\s{2,}", line)[1] for line in text.splitlines()[4:6]] == ["0 1", "1 2"]


def test_a_missing_score_is_not_available_and_a_class_to_come_is_empty():
    row = Row("pgcd", np.array([[[0.9, NAN, NAN]]]))
    cells = _cells(row)
    assert cells[2:5] == ["90.0", "n/a", ""]
    assert "nan" not in score_table([row], CLASSES, LEARNED_AT)


def test_no_minus_zero():
    row = Row("pgcd", np.array([[[0.9, 0.8, NAN], [0.9001, 0.8001, 0.5]]]))
    cells = _cells(row)
    assert cells[9:11] == ["0.0", "+0.0"]


def test_columns_line_up():
    lines = score_table([PGCD, FINETUNE, JOINT], CLASSES, LEARNED_AT).split("\n\n")[0].splitlines()[1:]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    ("by_seed", "message"),
    [
        (np.array([[[85.0]]]), "not %"),
        (np.array([[0.5]]), "seeds, steps, classes"),
        (np.zeros((0, 1, 1)), "seeds, steps, classes"),
        (np.zeros((2, 1, 1)), "seeds of pgcd: got 1, expected 2"),
    ],
)
def test_wrong_rows(by_seed, message):
    with pytest.raises(ValueError, match=message):
        Row("pgcd", by_seed)


def test_numbers_of_classes_must_agree():
    with pytest.raises(ValueError, match="got 2 and 3 entries"):
        score_table([PGCD], CLASSES[:2], LEARNED_AT)
    with pytest.raises(ValueError, match="learned_at"):
        score_table([PGCD], CLASSES[:2], LEARNED_AT[:2])


def test_a_method_that_keeps_scans_says_so():
    kept = Row("replay_8", PGCD.by_seed)
    assert score_table([kept], CLASSES, LEARNED_AT).count("replay_8 (not privacy-safe)") == 2
    assert "keeps" not in score_table([PGCD], CLASSES, LEARNED_AT)
