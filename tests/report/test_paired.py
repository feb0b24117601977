from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from nnunet_cil.report.paired import paired_difference, paired_differences, paired_table

NAN = math.nan
A, B, C = ((seed, "all") for seed in range(3))


def one_class(*values, name="a"):
    """Scores of one class in subjects s0, s1, ..."""
    return {f"s{i}": {name: value} for i, value in enumerate(values)}


ZERO = one_class(0.0, 0.0, 0.0, 0.0)


def test_by_hand():
    """All of 4 differences are positive: 2 of the 2**4 ways to set the signs are as far out."""
    found = paired_difference({A: one_class(0.6, 0.7, 0.8, 0.9)}, {A: one_class(0.5, 0.5, 0.5, 0.5)}, ["a"])
    assert found.mean == pytest.approx(0.25)
    assert found.p_value == pytest.approx(2 / 16)
    assert 0.1 <= found.low < 0.25 < found.high <= 0.4
    assert (found.n_subjects, found.n_seeds, found.note) == (4, 1, "")


def test_the_sign_is_method_minus_reference():
    found = paired_difference({A: ZERO}, {A: one_class(0.1, 0.2, 0.3, 0.4)}, ["a"])
    assert found.mean == pytest.approx(-0.25)
    assert found.low < found.mean < found.high < 0


def test_classes_are_averaged_in_each_subject_where_both_have_them():
    method = {A: {"s0": {"a": 0.9, "b": 0.5, "c": 0.1}, "s1": {"a": 0.9, "b": None}, "s2": {"a": 0.7, "b": NAN}}}
    reference = {A: {"s0": {"a": 0.5, "b": 0.3, "c": 0.9}, "s1": {"a": 0.8, "b": 0.0}, "s2": {"a": 0.6, "b": 0.0}}}
    found = paired_difference(method, reference, ["a", "b"])
    assert found.mean == pytest.approx(np.mean([(0.4 + 0.2) / 2, 0.1, 0.1]))


def test_only_subjects_and_seeds_that_both_have_are_compared():
    method = {A: one_class(0.1, 0.2, 0.3, 0.4), B: one_class(0.9, 0.9, 0.9, 0.9)}
    found = paired_difference(method, {A: one_class(0.0, 0.0, 0.0), C: ZERO}, ["a"])
    assert found.mean == pytest.approx(0.2)
    assert (found.n_subjects, found.n_seeds) == (3, 1)


def test_seeds_are_averaged_by_subject():
    method = {A: one_class(0.3, 0.1, 0.2, 0.5), B: one_class(0.1, 0.3, 0.2)}
    found = paired_difference(method, {A: ZERO, B: ZERO}, ["a"])
    assert found.mean == pytest.approx(np.mean([0.2, 0.2, 0.2, 0.5])), (
        "a subject counts once, however many seeds it has"
    )
    assert (found.n_subjects, found.n_seeds) == (4, 2)


def test_more_seeds_of_the_same_subjects_are_no_larger_sample():
    values = one_class(0.1, -0.05, 0.3, 0.2, 0.0, 0.15)
    zero = one_class(*[0.0] * 6)
    one = paired_difference({A: values}, {A: zero}, ["a"])
    many = paired_difference(
        {(seed, "all"): values for seed in range(10)}, {(seed, "all"): zero for seed in range(10)}, ["a"]
    )
    assert (many.low, many.high, many.p_value, many.n_subjects) == (one.low, one.high, one.p_value, 6)
    assert many.n_seeds == 10


def test_the_interval_is_the_same_each_time():
    arguments = {A: one_class(0.1, 0.3, 0.2, 0.4)}, {A: ZERO}, ["a"]
    assert paired_difference(*arguments) == paired_difference(*arguments)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_below_three_subjects_there_is_no_interval(n):
    found = paired_difference({A: one_class(*[0.5, 0.7][:n])}, {A: ZERO}, ["a"])
    assert np.isnan([found.low, found.high, found.p_value]).all()
    assert found.n_subjects == n
    assert f"{n} subject{'s' * (n != 1)} with a pair, fewer than 3" in found.note
    assert math.isnan(found.mean) if n == 0 else found.mean == pytest.approx([0.5, 0.6][n - 1])


def test_equal_differences_have_no_width_also_if_they_are_equal_but_for_rounding():
    found = paired_difference({A: one_class(0.8, 0.6, 0.3)}, {A: one_class(0.7, 0.5, 0.2)}, ["a"])
    assert 0.8 - 0.7 != 0.3 - 0.2
    assert found.low == found.high == found.mean == pytest.approx(0.1)
    assert found.p_value == pytest.approx(2 / 8)
    assert "no width" in found.note


def test_no_difference_at_all_is_not_tested():
    found = paired_difference({A: one_class(0.8, 0.6, 0.3)}, {A: one_class(0.8, 0.6, 0.3)}, ["a"])
    assert (found.mean, found.low, found.high) == (0, 0, 0)
    assert math.isnan(found.p_value)
    assert "no test" in found.note


def test_the_interval_holds_the_true_mean_about_19_times_in_20():
    """Of 20 subjects that differ, with seeds that differ more: taken for 60 subjects they would give 82 %."""
    rng = np.random.default_rng(0)
    zero = {model: one_class(*[0.0] * 20) for model in (A, B, C)}
    hits = []
    for _ in range(400):
        subjects = rng.normal(0.05, 0.1, 20)
        method = {model: one_class(*(subjects + rng.normal(0, 0.1, 20))) for model in (A, B, C)}
        found = paired_difference(method, zero, ["a"])
        hits.append(found.low <= 0.05 <= found.high)
    assert 0.9 <= np.mean(hits) <= 0.98


def test_groups_of_classes():
    scores = {
        "pgcd": {A: {s: {"a": 0.5, "b": 0.5, "c": 0.5} for s in "xyz"}},
        "mib": {A: {s: {"a": 0.1, "b": 0.3, "c": 0.9} for s in "xyz"}},
    }
    found = paired_differences(scores, "pgcd", ["a", "b", "c"], [1, 2, 3])
    assert list(found) == ["mib"]
    assert {group: d.mean for group, d in found["mib"].items()} == pytest.approx(
        {"all": (-0.4 - 0.2 + 0.4) / 3, "old": -0.3, "new": 0.4}
    )
    assert list(paired_differences(scores, "pgcd", ["a", "b", "c"], [1, 1, 1])["mib"]) == ["all", "new"]


def test_table_as_a_whole():
    one_left_out = "absent organs that one of the two invented are left out: 0 by it, 1 by the other"
    both = [{"liver": 0.9, "kidney": 0.8}] * 3
    scores = {
        "pgcd": {A: {f"s{i}": entry for i, entry in enumerate(both)}},
        "finetune": {
            A: {"s0": {"liver": 0.1, "kidney": 0.8}, "s1": {"liver": 0.0, "kidney": 0.8}, "s2": {"kidney": 0.8}}
        },
    }
    assert (
        paired_table(scores, "pgcd", ["liver", "kidney"], [1, 2])
        == f"""\
Dice after the last step, difference to pgcd in points, paired by test subject
(interval: bootstrap over subjects; p: Wilcoxon signed-rank, not corrected for the number of comparisons)
method    classes  difference  95 % interval      p  subjects  seeds
--------------------------------------------------------------------
finetune      all       -28.3  [-43.3, +0.0]  0.500         3      0
finetune      old       -85.0            n/a    n/a         2      0
finetune      new        +0.0   [+0.0, +0.0]    n/a         3      0
finetune, all: {one_left_out}.
finetune, old: 2 subjects with a pair, fewer than 3: no interval and no test; {one_left_out}.
finetune, new: no subject differs: no test.
"""
    )


def test_an_organ_that_one_of_the_two_invented_is_told():
    empty, invented = one_class(0.8, 0.7, None, 0.6), one_class(0.8, 0.7, 0.0, 0.6)
    found = paired_difference({A: invented}, {A: empty}, ["a"])
    assert (found.mean, found.n_subjects) == (0, 3)
    assert found.note == (
        "no subject differs: no test; absent organs that one of the two invented are left out: 1 by it, 0 by the other"
    )
    assert paired_difference({A: empty}, {A: empty}, ["a"]).note == "no subject differs: no test"


def test_a_reference_that_keeps_scans_is_marked():
    scores = {"replay": {A: one_class(0.5, 0.5, 0.5)}, "pgcd": {A: one_class(0.6, 0.5, 0.5)}}
    assert "difference to replay (not privacy-safe) in points" in paired_table(scores, "replay", ["a"], [1])


def test_several_seeds_are_shown_one_by_one():
    scores = {
        "pgcd": {model: one_class(0.5, 0.5, 0.5) for model in (A, B)},
        "mib": {A: one_class(0.9, 0.8, 0.7), B: one_class(0.1, 0.2, 0.3)},
        "lwf": {A: one_class(0.4, 0.4, 0.4)},
    }
    assert paired_difference(scores["mib"], scores["pgcd"], ["a"]).by_seed == pytest.approx({0: 0.3, 1: -0.3})
    told, header, _, *lines = paired_table(scores, "pgcd", ["a"], [1]).splitlines()[2:9]
    assert told == "(over trainings: 95 % interval over other subjects and other trainings)"
    assert header.split()[-5:] == ["seeds", "over", "trainings", "by", "seed"]
    assert [line.split()[0] for line in lines] == ["mib", "mib", "lwf", "lwf"]
    assert lines[0].split()[-4:] == ["0:", "+30.0,", "1:", "-30.0"]
    assert "  3    0 1  " in lines[0], "subjects, seeds"
    assert lines[2].split()[-4:] == ["0", "n/a", "0:", "-10.0"]


def crossed(differences):
    """Scores of (S, T) differences to `zeros`, a seed each column."""
    return {(seed, "all"): one_class(*column) for seed, column in enumerate(np.transpose(differences))}


def zeros(n_subjects, n_seeds):
    return crossed(np.zeros((n_subjects, n_seeds)))


def test_interval_over_trainings_by_hand():
    """Where subjects and seeds only add, nothing is left over: the variances of both means add up."""
    of_subjects, of_seeds = np.array([0.0, 0.1, 0.5]), np.array([0.2, 0.4])
    found = paired_difference(crossed(of_subjects[:, None] + of_seeds), zeros(3, 2), ["a"])
    variances = np.var(of_subjects, ddof=1) / 3, np.var(of_seeds, ddof=1) / 2
    freedom = (sum(variances) / variances[1]) ** 2
    half = stats.t.ppf(0.975, freedom) * math.sqrt(sum(variances))
    assert (found.wide_low, found.wide_high) == pytest.approx((0.5 - half, 0.5 + half))


def test_other_trainings_widen_the_interval_and_subjects_alone_do_not():
    """Three subjects, three seeds; the mean square of the rest is more than that of subjects, which counts as none."""
    rest = 0.01 * np.array([[1, -1, 0], [-1, 0, 1], [0, 1, -1]])
    found = paired_difference(crossed(rest + np.array([-0.3, 0.0, 0.3])), zeros(3, 3), ["a"])
    half = stats.t.ppf(0.975, 2) * 0.3 / math.sqrt(3)
    assert (found.wide_low, found.wide_high) == pytest.approx((-half, half))
    assert found.low == found.high == pytest.approx(0), "each subject has the same mean over seeds"
    same = paired_difference(crossed(np.full((3, 3), 0.2)), zeros(3, 3), ["a"])
    assert (same.wide_low, same.wide_high) == pytest.approx((0.2, 0.2))


def test_interval_over_trainings_without_a_pair_of_each():
    one = paired_difference(crossed(np.eye(4, 1)), zeros(4, 1), ["a"])
    two_subjects = paired_difference(crossed(np.eye(2, 2)), zeros(2, 2), ["a"])
    lacks = crossed(np.eye(4, 2))
    del lacks[1, "all"]["s3"]
    for found in (one, two_subjects, paired_difference(lacks, zeros(4, 2), ["a"])):
        assert np.isnan([found.wide_low, found.wide_high]).all()


def test_the_interval_over_trainings_holds_the_true_mean_about_19_times_in_20():
    """15 subjects and 3 seeds that both differ; over subjects alone it is held in 60 of 100."""
    rng = np.random.default_rng(0)
    narrow, wide = [], []
    for _ in range(200):
        differences = 0.05 + rng.normal(0, 0.05, (15, 1)) + rng.normal(0, 0.05, 3) + rng.normal(0, 0.05, (15, 3))
        found = paired_difference(crossed(differences), zeros(15, 3), ["a"])
        narrow.append(found.low <= 0.05 <= found.high)
        wide.append(found.wide_low <= 0.05 <= found.wide_high)
    assert 0.89 <= np.mean(wide) <= 0.98
    assert np.mean(narrow) < 0.7


def test_folds_of_a_seed_are_no_further_seeds():
    """Each seed counts once for a subject, and each fold is paired with itself."""
    method = {(0, 0): one_class(0.3, 0.3, 0.3), (0, 1): one_class(0.9, 0.9, 0.9), B: one_class(0.2, 0.1, 0.3)}
    reference = {(0, 0): one_class(0.2, 0.2, 0.2), (0, 1): one_class(0.6, 0.6, 0.6), B: one_class(0.0, 0.0, 0.0)}
    found = paired_difference(method, reference, ["a"])
    assert (found.n_subjects, found.n_seeds) == (3, 2)
    assert found.by_seed == pytest.approx({0: 0.2, 1: 0.2})
    assert found.mean == pytest.approx(0.2)
    alone = paired_difference({(0, 0): method[0, 0]}, {(0, 1): reference[0, 1]}, ["a"])
    assert alone.n_subjects == 0, "folds that only one of them has are no pair"


def test_small_p_values_and_other_scores():
    many = {"a": {A: one_class(*np.linspace(0.5, 0.7, 30))}, "b": {A: one_class(*[0.0] * 30)}}
    text = paired_table(many, "b", ["a"], [1], score_name="NSD")
    assert text.startswith("NSD after the last step, difference to b")
    assert "<0.001" in text


def test_a_method_alone_has_no_table():
    assert paired_table({"pgcd": {A: ZERO}}, "pgcd", ["a"], [1]) == ""


def test_wrong_arguments():
    with pytest.raises(ValueError, match="reference: got 'pgcd', expected one of"):
        paired_differences({"mib": {A: ZERO}}, "pgcd", ["a"], [1])
    with pytest.raises(ValueError, match="got 1 and 2 entries"):
        paired_table({"mib": {A: ZERO}}, "mib", ["a"], [1, 2])
