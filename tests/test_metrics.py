from __future__ import annotations

import warnings

import numpy as np
import pytest

from nnunet_cil import metrics

NAN = np.nan
# Three steps of one class each.
FORGETS = np.array([[0.9, NAN, NAN], [0.6, 0.8, NAN], [0.3, 0.7, 0.5]])
BETTERS = np.array([[0.5, NAN, NAN], [0.6, 0.4, NAN], [0.8, 0.7, 0.9]])
ONE_EACH = np.array([1, 2, 3])


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_means_by_hand():
    assert metrics.old_mean(FORGETS, ONE_EACH, 3) == pytest.approx((0.3 + 0.7) / 2)
    assert metrics.old_mean(FORGETS, ONE_EACH, 2) == pytest.approx(0.6)
    assert metrics.new_mean(FORGETS, ONE_EACH, 3) == pytest.approx(0.5)
    assert metrics.mean(FORGETS, ONE_EACH, 3) == pytest.approx(0.5)
    assert metrics.mean(FORGETS, ONE_EACH, 2) == pytest.approx(0.7)
    assert np.isnan(metrics.old_mean(FORGETS, ONE_EACH, 1))
    assert metrics.average_incremental_mean(FORGETS, ONE_EACH) == pytest.approx((0.9 + 0.7 + 0.5) / 3)


def test_forgetting_by_hand():
    np.testing.assert_allclose(metrics.forgetting_per_class(FORGETS, ONE_EACH), [0.6, 0.1, NAN])
    assert metrics.forgetting(FORGETS, ONE_EACH) == pytest.approx(0.35)
    assert metrics.backward_transfer(FORGETS, ONE_EACH) == pytest.approx((-0.6 - 0.1) / 2)
    assert metrics.plasticity(FORGETS, ONE_EACH) == pytest.approx((0.8 + 0.5) / 2)


def test_forgetting_is_negative_when_the_last_step_betters_old_classes():
    np.testing.assert_allclose(metrics.forgetting_per_class(BETTERS, ONE_EACH), [-0.2, -0.3, NAN])
    assert metrics.forgetting(BETTERS, ONE_EACH) == pytest.approx(-0.25)
    assert metrics.backward_transfer(BETTERS, ONE_EACH) == pytest.approx((0.3 + 0.3) / 2)


def test_forgetting_takes_the_best_earlier_score_and_backward_transfer_the_first():
    R = np.array([[0.5, NAN, NAN], [0.9, 0.8, NAN], [0.7, 0.8, 0.6]])
    np.testing.assert_allclose(metrics.forgetting_per_class(R, ONE_EACH), [0.2, 0.0, NAN])
    assert metrics.backward_transfer(R, ONE_EACH) == pytest.approx((0.2 + 0.0) / 2)


def test_scores_before_a_class_is_learned_do_not_count():
    R = np.array([[0.9, 0.99, 0.99], [0.6, 0.8, 0.99], [0.3, 0.7, 0.5]])
    assert metrics.summary(R, ONE_EACH) == metrics.summary(FORGETS, ONE_EACH)


def test_several_classes_a_step():
    R = np.array([[0.8, 0.6, NAN], [0.7, 0.7, 0.4]])
    result = metrics.summary(R, [1, 1, 2])
    assert result == pytest.approx(
        {
            "old_mean": 0.7,
            "new_mean": 0.4,
            "mean": 0.6,
            "average_incremental_mean": 0.65,
            "forgetting": 0.0,
            "backward_transfer": 0.0,
            "plasticity": 0.4,
        }
    )


def test_one_step_has_no_forgetting():
    result = metrics.summary([[0.8, 0.6]], [1, 1])
    assert result["mean"] == result["new_mean"] == result["average_incremental_mean"] == pytest.approx(0.7)
    assert all(np.isnan(result[k]) for k in ("old_mean", "forgetting", "backward_transfer", "plasticity"))
    assert np.isnan(metrics.forgetting_per_class([[0.8, 0.6]], [1, 1])).all()
    assert metrics.summary([[0.8, 0.6]], [1, 1], is_joint=True) == pytest.approx(result, nan_ok=True), "nor a last step"


def test_a_missing_score_is_left_out_not_zero():
    R = FORGETS.copy()
    R[1, 0] = NAN
    R[2, 1] = NAN
    assert metrics.old_mean(R, ONE_EACH, 3) == pytest.approx(0.3)
    assert metrics.mean(R, ONE_EACH, 2) == pytest.approx(0.8)
    np.testing.assert_allclose(metrics.forgetting_per_class(R, ONE_EACH), [0.6, NAN, NAN])
    assert metrics.forgetting(R, ONE_EACH) == pytest.approx(0.6)
    assert metrics.backward_transfer(R, ONE_EACH) == pytest.approx(-0.6)


def test_nothing_scored_is_nan_without_warning():
    result = metrics.summary(np.full((3, 3), NAN), ONE_EACH)
    assert len(result) == 7
    assert all(np.isnan(v) for v in result.values())


@pytest.mark.parametrize("steps", [2, 3])
def test_joint_has_final_means_only(steps):
    R = np.full((steps, 3), NAN)
    R[-1] = [0.9, 0.8, 0.7]
    result = metrics.summary(R, [1, 1, steps], is_joint=True)
    assert result["old_mean"] == pytest.approx(0.85)
    assert result["new_mean"] == pytest.approx(0.7)
    assert result["mean"] == pytest.approx(0.8)
    assert all(
        np.isnan(result[k]) for k in ("average_incremental_mean", "forgetting", "backward_transfer", "plasticity")
    )


def test_a_chain_whose_earlier_steps_have_no_labelled_organ_is_no_joint_model():
    R = [[NAN, NAN, NAN], [NAN, NAN, 0.8]]
    assert metrics.summary(R, [1, 1, 2])["plasticity"] == pytest.approx(0.8)


def test_plasticity_waits_for_the_last_step():
    """A mean over the classes of fewer steps would not compare with one over all."""
    unfinished = FORGETS.copy()
    unfinished[-1] = NAN
    joint = [[NAN] * 3, [NAN] * 3, [0.9, 0.8, 0.7]]
    assert not np.isnan(metrics.plasticity(FORGETS, ONE_EACH))
    assert np.isnan(metrics.plasticity(unfinished, ONE_EACH))
    assert np.isnan(metrics.plasticity_gap(unfinished, joint, ONE_EACH))


def test_average_over_steps_needs_every_step():
    R = FORGETS.copy()
    R[1] = NAN
    assert np.isnan(metrics.average_incremental_mean(R, ONE_EACH))


def test_a_chain_cut_short_leaves_out_later_classes():
    result = metrics.summary(FORGETS[:2], ONE_EACH)
    assert result["mean"] == pytest.approx(0.7)
    assert result["forgetting"] == pytest.approx(0.3)
    assert result["plasticity"] == pytest.approx(0.8)


JOINT = np.array([[NAN] * 3, [NAN] * 3, [0.9, 0.8, 0.7]])


def test_gaps_to_joint_by_hand():
    assert metrics.gap_to_joint(FORGETS, JOINT, ONE_EACH) == pytest.approx((0.6 + 0.1 + 0.2) / 3)
    assert metrics.plasticity_gap(FORGETS, JOINT, ONE_EACH) == pytest.approx(((0.8 - 0.8) + (0.7 - 0.5)) / 2)
    assert metrics.gap_to_joint(BETTERS, JOINT, ONE_EACH) == pytest.approx((0.1 + 0.1 - 0.2) / 3)


def test_gaps_are_over_the_classes_that_both_have():
    missing, joint = FORGETS.copy(), JOINT.copy()
    missing[2, 0] = NAN
    joint[2, 1] = NAN
    assert metrics.gap_to_joint(missing, joint, ONE_EACH) == pytest.approx(0.7 - 0.5)
    assert metrics.plasticity_gap(missing, joint, ONE_EACH) == pytest.approx(0.7 - 0.5)
    joint[2, 1:] = [0.8, NAN]
    assert metrics.gap_to_joint(missing, joint, ONE_EACH) == pytest.approx(0.8 - 0.7), "no difference of two means"


def test_gaps_without_anything_to_compare():
    nothing = np.full((3, 3), NAN)
    for function in (metrics.gap_to_joint, metrics.plasticity_gap):
        assert np.isnan(function(FORGETS, nothing, ONE_EACH))
        assert np.isnan(function(nothing, JOINT, ONE_EACH))
        with pytest.raises(ValueError, match="R_joint: got shape"):
            function(FORGETS, JOINT[1:], ONE_EACH)
    assert metrics.gap_to_joint([[0.8]], [[0.9]], [1]) == pytest.approx(0.1)
    assert np.isnan(metrics.plasticity_gap([[0.8]], [[0.9]], [1])), "a chain of one step learned nothing later"


def test_means_of_a_distance_in_mm():
    found = metrics.final_means([[3.0, NAN], [5.0, 20.0]], [1, 2])
    assert found == {"old_mean": 5.0, "new_mean": 20.0, "mean": 12.5}


@pytest.mark.parametrize(
    ("R", "learned_at", "message"),
    [
        ([0.1, 0.2], [1, 1], "R: got shape"),
        (np.empty((0, 2)), [1, 1], "at least one step"),
        ([[0.1, 0.2]], [1], "learned_at: got shape"),
        ([[0.1, 0.2]], [0, 1], "whole numbers from 1"),
        ([[0.1, 0.2]], [1.0, 1.0], "whole numbers from 1"),
        ([[0.1, np.inf]], [1, 1], "infinite"),
    ],
)
def test_wrong_arguments(R, learned_at, message):
    with pytest.raises(ValueError, match=message):
        metrics.summary(R, learned_at)


@pytest.mark.parametrize("t", [0, 4, -1])
def test_a_step_out_of_range(t):
    with pytest.raises(ValueError, match="a step from 1 to 3"):
        metrics.mean(FORGETS, ONE_EACH, t)
