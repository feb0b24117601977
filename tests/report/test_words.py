from __future__ import annotations

import math

import numpy as np
import pytest

from nnunet_cil.guard import Check, Organ
from nnunet_cil.report.words import (
    METHOD_WORDS,
    against_joint,
    fate_of_new,
    fate_of_old,
    last_scored_step,
    listed,
    lost_with_some,
    method_words,
    outcomes,
    status_words,
)
from nnunet_cil.schedule import Guard

NAN = math.nan


def _one(before: float, after: float) -> str:
    """Status of an organ of step 1 after step 2."""
    return outcomes(np.array([[before, NAN], [after, 0.9]]), ["a", "b"], [1, 2])[0].status


@pytest.mark.parametrize(
    ("before", "after", "status"),
    [
        (0.9, 0.9, "kept"),
        (0.9, 0.875, "kept"),
        (0.9, 0.94, "improved"),
        (0.9, 0.86, "weakened"),
        (0.9, 0.46, "weakened"),
        (0.9, 0.44, "lost"),
        (0.9, 0.0, "lost"),
        (0.05, 0.0, "not learned"),
        (NAN, 0.9, "not scored"),
        (0.9, NAN, "not scored"),
    ],
)
def test_status_of_an_earlier_organ(before, after, status):
    assert _one(before, after) == status
    assert status in status_words()


def test_thresholds_of_the_schedule():
    R = np.array([[0.9, NAN], [0.8, 0.9]])
    assert outcomes(R, "ab", [1, 2], Guard(weakened=0.2))[0].status == "kept"
    assert outcomes(R, "ab", [1, 2], Guard(lost=0.95))[0].status == "lost"
    assert status_words(Guard(weakened=0.07))["kept"].startswith("at most 7 points")


@pytest.mark.parametrize(
    ("after", "status"),
    [(0.8, "learned"), (0.5, "learned"), (0.3, "partly learned"), (0.02, "not learned"), (NAN, "not scored")],
)
def test_status_of_a_new_organ(after, status):
    found = outcomes(np.array([[0.9, NAN], [0.9, after]]), ["a", "b"], [1, 2])[1]
    assert found.status == status
    assert math.isnan(found.before)


def test_a_chain_that_is_not_finished():
    R = np.array([[0.9, NAN, NAN], [0.4, 0.8, NAN], [NAN] * 3])
    assert last_scored_step(R) == 2
    found = outcomes(R, ["a", "b", "c"], [1, 2, 3])
    assert [o.status for o in found] == ["lost", "learned", "still to come"]
    assert (found[0].before, found[0].after) == (0.9, 0.4)


def test_nothing_scored():
    R = np.full((2, 2), NAN)
    assert last_scored_step(R) == 0
    assert {o.status for o in outcomes(R, ["a", "b"], [1, 2])} == {"still to come"}


def _fates(R, classes, learned_at) -> tuple[str, str]:
    found = outcomes(np.array(R), classes, learned_at)
    return fate_of_old(found), fate_of_new(found)


def test_fates_in_words():
    assert _fates([[0.9, NAN], [0.9, 0.9]], ["liver", "spleen"], [1, 2]) == ("kept liver", "learned spleen")
    assert _fates([[0.9, NAN]], ["liver", "spleen"], [1, 2]) == ("", "learned liver")
    three = [[0.9, 0.9, 0.9, NAN], [0.0, 0.8, 0.9, 0.3]]
    assert _fates(three, list("abcd"), [1, 1, 1, 2]) == ("lost a, weakened b, kept c", "learned in part d")


def test_many_organs_are_counted():
    names, at = [f"organ_{i}" for i in range(7)], [1] * 6 + [2]
    R = [[*[0.9] * 6, NAN], [0.0, 0.0, 0.9, 0.9, 0.9, 0.9, 0.9], [NAN] * 7]
    assert fate_of_old(outcomes(np.array(R), names, at)) == "lost organ_0 and organ_1, kept 4 others"
    all_lost = [R[0], [*[0.0] * 6, 0.9]]
    assert fate_of_old(outcomes(np.array(all_lost), names, at)) == "lost all 6 earlier organs"
    both = [[0.9, 0.9, NAN], [0.9, 0.9, 0.9]]
    assert fate_of_old(outcomes(np.array(both), names[:3], [1, 1, 2])) == "kept both earlier organs"
    assert fate_of_new(outcomes(np.array([[0.9] * 6]), names[:6], at[:6])) == "learned 6 organs"


def test_organs_that_were_never_there_or_not_scored_are_none_that_are_kept():
    four, at = ["liver", "spleen", "pancreas", "kidney"], [1, 1, 1, 2]
    never = [[0.8, 0.85, 0.05, NAN], [0.8, 0.84, 0.02, 0.9]]
    assert _fates(never, four, at) == ("kept liver and spleen, never learned pancreas", "learned kidney")
    unscored = [[0.8, 0.85, NAN, NAN], [0.8, 0.84, NAN, 0.9]]
    assert _fates(unscored, four, at) == ("kept liver and spleen (pancreas not scored)", "learned kidney")
    only = [[0.05, 0.9], [0.02, 0.9]]
    assert _fates(only, ["pancreas", "kidney"], [1, 2]) == ("never learned pancreas", "learned kidney")
    assert _fates([[NAN, NAN], [NAN, 0.9]], ["pancreas", "kidney"], [1, 2]) == ("", "learned kidney")


def test_an_organ_that_one_of_three_trainings_loses_is_told_although_the_mean_is_weakened():
    by_seed = np.array([[[0.9, 0.8, NAN], [after, 0.0, 0.9]] for after in (0.9, 0.88, 0.0)])
    mean = outcomes(by_seed.mean(0), ["liver", "spleen", "kidney"], [1, 1, 2])
    assert [o.status for o in mean] == ["weakened", "lost", "learned"]
    assert lost_with_some(by_seed, mean) == "lost liver with 1 of 3 seeds"
    assert lost_with_some(by_seed[:1], outcomes(by_seed[0], ["liver", "spleen", "kidney"], [1, 1, 2])) == ""


def test_fates_of_a_check():
    """Its organs are all of earlier steps, whose numbers it does not know."""
    organs = {"liver": Organ(0.9, 0.9), "spleen": Organ(), "pancreas": Organ(0.9, 0.1)}
    check = Check("pgcd", 0, 0, 2, "a", "b", 0, organs)
    assert fate_of_old(check.outcomes(Guard())) == "lost pancreas, kept liver (spleen not scored)"
    later = Check("finetune", 0, "all", 3, "a", "b", 0, {"liver": Organ(0.0, 0.0), "spleen": Organ(0.7, 0.0)})
    assert fate_of_old(later.outcomes(Guard())) == "lost spleen, already lacked liver"


def test_listed():
    assert listed([]) == ""
    assert listed(["a"]) == "a"
    assert listed(["a", "b"]) == "a and b"
    assert listed(["a", "b", "c"]) == "a, b and c"


def test_against_joint():
    assert against_joint(0.05) == "5.0 points below joint training"
    assert against_joint(-0.05) == "5.0 points above joint training"
    assert against_joint(0.0004) == "level with joint training"
    assert against_joint(NAN) == ""


def test_methods_in_words():
    assert method_words("Pseudo_KD") == METHOD_WORDS["pseudokd"]
    assert method_words("mine") == ""
