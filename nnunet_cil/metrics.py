"""Scores of an incremental chain, from the matrix of its per-class test scores.

``R[t - 1, c]`` is the score of class ``c`` after step ``t`` (steps count from 1) and ``learned_at[c]`` the step that
learns it. NaN marks a score that does not exist: a class not yet learned, or one without any test voxel. Absent is not
zero: means run over the scores that exist, and a mean over nothing is NaN. Every function returns the unit of ``R``.

Means suit any score. Forgetting and all after it take more for better, as in Dice and NSD; for a distance they would
take the worst for the best.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
from numpy.typing import ArrayLike, NDArray

NO_FORWARD_TRANSFER = "classes appear in one step only and have no score before it"


def _checked(R: ArrayLike, learned_at: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    scores = np.asarray(R, dtype=np.float64)
    steps = np.asarray(learned_at)
    if scores.ndim != 2 or scores.shape[0] == 0:
        raise ValueError(f"R: got shape {scores.shape}, expected (steps, classes) with at least one step.")
    if np.isinf(scores).any():
        raise ValueError("R: got an infinite score, expected finite scores, or NaN where there is none.")
    if steps.shape != scores.shape[1:]:
        raise ValueError(f"learned_at: got shape {steps.shape}, expected {scores.shape[1:]}, one step per column of R.")
    if steps.size and (not np.issubdtype(steps.dtype, np.integer) or steps.min() < 1):
        raise ValueError(f"learned_at: got {steps.tolist()}, expected whole numbers from 1.")
    return scores, steps.astype(np.int64)


def _mean(values: NDArray[np.float64]) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else math.nan


def over_seeds(values: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation (one degree of freedom less) over the first axis, seeds or folds, of what is there.

    NaN where there is too little: nothing for the mean, a single value for the deviation.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(values, 0), np.nanstd(values, 0, ddof=1)


def _row(scores: NDArray[np.float64], t: int) -> NDArray[np.float64]:
    if not 1 <= t <= len(scores):
        raise ValueError(f"t: got {t}, expected a step from 1 to {len(scores)}.")
    return scores[t - 1]


def _when_learned(scores: NDArray[np.float64], learned_at: NDArray[np.int64]) -> NDArray[np.float64]:
    """``(K,)`` score of each class after the step that learned it; NaN for a class of a step beyond the matrix."""
    reached = learned_at <= len(scores)
    return np.where(reached, scores[np.where(reached, learned_at, 1) - 1, np.arange(scores.shape[1])], np.nan)


def old_mean(R: ArrayLike, learned_at: ArrayLike, t: int) -> float:
    """Mean score after step ``t`` of the classes learned before it; NaN at step 1.

    Args:
        R: ``(T, K)`` scores, NaN where there is none.
        learned_at: ``(K,)`` step, from 1, that learns each class.
        t: step, 1 to T.

    Raises:
        ValueError: the shapes do not fit, a step is below 1, a score is infinite, or ``t`` is outside 1 to T.
    """
    scores, steps = _checked(R, learned_at)
    return _mean(_row(scores, t)[steps < t])


def new_mean(R: ArrayLike, learned_at: ArrayLike, t: int) -> float:
    """Mean score after step ``t`` of the classes that step learned. Arguments and errors as `old_mean`."""
    scores, steps = _checked(R, learned_at)
    return _mean(_row(scores, t)[steps == t])


def mean(R: ArrayLike, learned_at: ArrayLike, t: int) -> float:
    """Mean score after step ``t`` of all classes learned so far. Arguments and errors as `old_mean`."""
    scores, steps = _checked(R, learned_at)
    return _mean(_row(scores, t)[steps <= t])


def average_incremental_mean(R: ArrayLike, learned_at: ArrayLike) -> float:
    """Mean over all steps of the mean score over the classes learned so far (iCaRL, arXiv:1611.07725).

    NaN if any step has no score at all: an average over fewer steps would not compare with one over all.
    Arguments and errors as `old_mean`.
    """
    scores, steps = _checked(R, learned_at)
    return float(np.mean([_mean(row[steps <= t]) for t, row in enumerate(scores, start=1)]))


def forgetting_per_class(R: ArrayLike, learned_at: ArrayLike) -> NDArray[np.float64]:
    """``(K,)`` best score between learning a class and the last step but one, minus its score after the last step.

    Negative where the last step bettered the class; NaN for a class the last step learned, and where either score is
    missing (Chaudhry et al., arXiv:1801.10112, "forgetting measure"). Arguments and errors as `old_mean`.
    """
    scores, steps = _checked(R, learned_at)
    before, last = scores[:-1], scores[-1]
    since_learned = np.arange(1, len(scores))[:, None] >= steps
    candidates = np.where(since_learned & ~np.isnan(before), before, -np.inf)
    best = candidates.max(axis=0, initial=-np.inf)
    return np.where(np.isinf(best), np.nan, best) - last


def forgetting(R: ArrayLike, learned_at: ArrayLike) -> float:
    """Mean of `forgetting_per_class` over the classes learned before the last step; lower is better.

    NaN for a chain of one step (Chaudhry et al., arXiv:1801.10112, "forgetting measure"). Arguments and errors as
    `old_mean`.
    """
    return _mean(forgetting_per_class(R, learned_at))


def backward_transfer(R: ArrayLike, learned_at: ArrayLike) -> float:
    """Mean, over the classes learned before the last step, of the last score minus the score when just learned.

    Negative where classes were forgotten; NaN for a chain of one step (Lopez-Paz and Ranzato, arXiv:1706.08840,
    "backward transfer"). Arguments and errors as `old_mean`.
    """
    scores, steps = _checked(R, learned_at)
    return _mean((scores[-1] - _when_learned(scores, steps))[steps < len(scores)])


def plasticity(R: ArrayLike, learned_at: ArrayLike) -> float:
    """Mean score, when just learned, of the classes learned at step 2 or later; higher is better.

    NaN for a chain of one step, and for one that has not come to its last step: a mean over fewer classes would not
    compare (our derivation). Arguments and errors as `old_mean`.
    """
    scores, steps = _checked(R, learned_at)
    return _mean(_when_learned(scores, steps)[steps >= 2]) if _has_ended(scores) else math.nan


def _has_ended(scores: NDArray[np.float64]) -> bool:
    return not np.isnan(scores[-1]).all()


def gap_to_joint(R: ArrayLike, R_joint: ArrayLike, learned_at: ArrayLike) -> float:
    """Mean, over the classes that both have after the last step, of the joint model's score minus the chain's.

    Positive where training on all classes together is better; NaN without a class that both have (our derivation).

    Args:
        R: ``(T, K)`` scores of the chain, NaN where there is none.
        R_joint: ``(T, K)`` scores of one model trained on all classes together, in the last row.
        learned_at: ``(K,)`` step, from 1, that learns each class.

    Raises:
        ValueError: as `old_mean`, or the two matrices differ in shape.
    """
    scores, joint, steps = _checked_pair(R, R_joint, learned_at)
    return _mean((joint[-1] - scores[-1])[steps <= len(scores)])


def plasticity_gap(R: ArrayLike, R_joint: ArrayLike, learned_at: ArrayLike) -> float:
    """Mean, over the classes of step 2 or later, of the single-step model's score minus the score when just learned.

    The single-step model is the joint one. Positive where learning in steps cost new classes something; NaN for a chain
    of one step or before its last one, and without a class that both have (our derivation). Arguments and errors as
    `gap_to_joint`.
    """
    scores, joint, steps = _checked_pair(R, R_joint, learned_at)
    return _mean((joint[-1] - _when_learned(scores, steps))[steps >= 2]) if _has_ended(scores) else math.nan


def _checked_pair(
    R: ArrayLike, R_joint: ArrayLike, learned_at: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    scores, steps = _checked(R, learned_at)
    joint, _ = _checked(R_joint, learned_at)
    if joint.shape != scores.shape:
        raise ValueError(f"R_joint: got shape {joint.shape}, expected {scores.shape} as R.")
    return scores, joint, steps


def final_means(R: ArrayLike, learned_at: ArrayLike) -> dict[str, float]:
    """``old_mean``, ``new_mean`` and ``mean`` after the last step, by name. Arguments and errors as `old_mean`."""
    scores, steps = _checked(R, learned_at)
    return {f.__name__: f(scores, steps, len(scores)) for f in (old_mean, new_mean, mean)}


def summary(R: ArrayLike, learned_at: ArrayLike, is_joint: bool = False) -> dict[str, float]:
    """All scores of a chain after its last step, by name.

    The keys are ``old_mean``, ``new_mean``, ``mean``, ``average_incremental_mean``, ``forgetting``,
    ``backward_transfer`` and ``plasticity``. Arguments and errors as `old_mean`.

    Args:
        is_joint: one model trained on all classes together. In several steps, the last four are then NaN, for such a
            model learned nothing after anything else.
    """
    scores, steps = _checked(R, learned_at)
    is_chain = len(scores) == 1 or not is_joint
    over_steps = (average_incremental_mean, forgetting, backward_transfer, plasticity)
    return {
        **final_means(scores, steps),
        **{f.__name__: f(scores, steps) if is_chain else math.nan for f in over_steps},
    }
