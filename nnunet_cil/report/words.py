"""What became of each organ, in words: the summary that a report opens with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nnunet_cil.schedule import Guard

THRESHOLDS = Guard()
LEARNED_FROM = 0.5
NOT_LEARNED_BELOW = 0.1
NAMED = 3

METHOD_WORDS = {
    "pgcd": "Prototype-guided calibration and dual-aligned distillation: the method this package is about",
    "finetune": "Trained on the new organs only; nothing protects the old ones",
    "joint": "One model trained on all organs at once, with every label: what is within reach without forgetting",
    "pseudo": "The previous model labels the old organs on the new scans",
    "pseudokd": "The previous model labels the old organs, and the new one is held to its predictions",
    "mib": "MiB: distillation that allows for old organs hidden in the background",
    "plop": "PLOP: pseudo-labels, and features that are held at several scales",
    "lwf": "LwF: the new model is held to the old one's predictions",
    "ilt": "ILT: the new model is held to the old one's predictions and features",
    "iltmib": "ILT as in MiB's code: the same, among the old organs alone",
    "ewf": "EWF: the weights of the old and the new model are averaged",
    "ewc": "EWC: weights that mattered for the old organs may change little",
    "replay": "Not privacy-safe: some old scans are kept, with their labels, and trained on again",
}


def status_words(guard: Guard = THRESHOLDS) -> dict[str, str]:
    """What each status of an organ means, with these thresholds."""
    points, share = f"{100 * guard.weakened:g}", f"{100 * guard.lost:g}"
    return {
        "kept": f"at most {points} points from what it was when just learned",
        "improved": f"more than {points} points higher than when just learned",
        "weakened": f"more than {points} points lower, but at least {share} % of what it was",
        "lost": f"less than {share} % of what it was",
        "learned": f"new in the last step, with {100 * LEARNED_FROM:.0f} or more",
        "partly learned": f"new in the last step, with {100 * NOT_LEARNED_BELOW:.0f} to {100 * LEARNED_FROM:.0f}",
        "not learned": f"below {100 * NOT_LEARNED_BELOW:.0f} when it should have been learned",
        "still to come": "a later step learns it",
        "not scored": "no test subject has it labelled, or its model is not scored yet",
    }


def method_words(method: str) -> str:
    """One line on what a method does; empty for a method we do not know."""
    return METHOD_WORDS.get(method.lower().replace("_", ""), "")


@dataclass(frozen=True)
class Outcome:
    """What became of an organ under a method.

    Attributes:
        organ: its name.
        step: 1-based step that learns it.
        before: Dice in [0, 1] when just learned; NaN for an organ of the last scored step, and where it is not scored.
        after: Dice after the last scored step; NaN where there is none.
        status: a key of `status_words`.
    """

    organ: str
    step: int
    before: float
    after: float
    status: str


def last_scored_step(R: NDArray[np.floating]) -> int:
    """1-based number of the last row with a score; 0 if none has one."""
    scored = np.flatnonzero(~np.isnan(R).all(1))
    return int(scored[-1]) + 1 if len(scored) else 0


def outcomes(
    R: NDArray[np.floating], classes: Sequence[str], learned_at: Sequence[int], guard: Guard = THRESHOLDS
) -> list[Outcome]:
    """What became of each class until the last scored step, see `status_words`.

    Args:
        R: ``(T, K)`` Dice in [0, 1]; NaN where there is none.
        classes: K names.
        learned_at: the K steps, from 1, that learn them.
        guard: thresholds; the others are ours.
    """
    last = last_scored_step(R)
    found = []
    for c, (organ, step) in enumerate(zip(classes, learned_at, strict=True)):
        before = float(R[step - 1, c]) if step < last else math.nan
        after = float(R[last - 1, c]) if step <= last else math.nan
        found.append(Outcome(organ, int(step), before, after, _status(step, last, before, after, guard)))
    return found


def _status(step: int, last: int, before: float, after: float, guard: Guard) -> str:
    if step > last:
        return "still to come"
    if step < last:
        return fate(before, after, guard)
    if math.isnan(after):
        return "not scored"
    return "learned" if after >= LEARNED_FROM else "partly learned" if after >= NOT_LEARNED_BELOW else "not learned"


def fate(before: float, after: float, guard: Guard = THRESHOLDS) -> str:
    """What became of an organ: ``kept``, ``improved``, ``weakened``, ``lost``, ``not learned`` or ``not scored``.

    Args:
        before, after: Dice in [0, 1]; NaN where there is none.
    """
    if math.isnan(before) or math.isnan(after):
        return "not scored"
    if max(before, after) < NOT_LEARNED_BELOW:
        return "not learned"
    if after < guard.lost * before:
        return "lost"
    if abs(after - before) <= guard.weakened:
        return "kept"
    return "improved" if after > before else "weakened"


def counted(n: int, word: str) -> str:
    """``1 organ``, ``2 organs``."""
    return f"{n} {word}{'' if n == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([*([", ".join(names[:-1])] if names[:-1] else []), *names[-1:]])


def fate_of_old(found: Sequence[Outcome]) -> str:
    """What a method did to the organs of earlier steps, after its name: ``lost a and b, kept 5 others (c not scored)``.

    Up to three organs are named, more are counted. Empty if no earlier organ is scored.
    """
    last = max((o.step for o in found if o.status != "still to come"), default=0)
    old = [o for o in found if o.step < max(last, 1)]  # a check's organs are all old, and of step 0
    words = {
        "lost": ("lost",),
        "weakened": ("weakened",),
        "kept": ("kept", "improved"),
        "never learned": ("not learned",),
        "already lacked": ("already lacking",),
    }
    groups = {word: [o.organ for o in old if o.status in statuses] for word, statuses in words.items()}
    parts = []
    for word, names in groups.items():
        if len(names) == len(old) > 1:
            parts.append(f"{word} {'both' if len(names) == 2 else f'all {len(names)}'} earlier organs")
        elif names:
            rest = "others" if parts else "earlier organs"
            parts.append(f"{word} {listed(names) if len(names) <= NAMED else f'{len(names)} {rest}'}")
    unscored = [o.organ for o in old if o.status == "not scored"]
    beside = f" ({listed(unscored) if len(unscored) <= NAMED else f'{len(unscored)} others'} not scored)"
    return ", ".join(parts) + beside * bool(parts and unscored)


def lost_with_some(by_seed: NDArray[np.floating], found: Sequence[Outcome], guard: Guard = THRESHOLDS) -> str:
    """Which organs are lost with some seeds and not on average: ``lost a with 1 of 3 seeds``; empty if none is.

    Args:
        by_seed: ``(n, T, K)`` Dice in [0, 1].
        found: of their mean.
    """
    names, learned_at = [o.organ for o in found], [o.step for o in found]
    each = [[o.status for o in outcomes(R, names, learned_at, guard)] for R in by_seed]
    times = {o.organ: sum(of[c] == "lost" for of in each) for c, o in enumerate(found) if o.status != "lost"}
    return listed([f"lost {organ} with {n} of {len(by_seed)} seeds" for organ, n in times.items() if n])


def fate_of_new(found: Sequence[Outcome]) -> str:
    """What a method made of the organs of the last scored step: ``learned a and b``; as `fate_of_old`."""
    last = max((o.step for o in found if o.status != "still to come"), default=0)
    groups = {
        status: [o.organ for o in found if o.step == last and o.status == status]
        for status in ("learned", "partly learned", "not learned")
    }
    words = {"learned": "learned", "partly learned": "learned in part", "not learned": "did not learn"}
    parts = [f"{words[s]} {listed(n) if len(n) <= NAMED else f'{len(n)} organs'}" for s, n in groups.items() if n]
    return listed(parts)


def against_joint(gap: float) -> str:
    """How far a chain is from joint training, as a clause; empty where there is no gap.

    Args:
        gap: Dice in [-1, 1] that joint training has more, NaN without.
    """
    if math.isnan(gap):
        return ""
    distance = round(100 * abs(gap), 1)
    if distance < 0.1:
        return "level with joint training"
    return f"{distance:.1f} points {'below' if gap > 0 else 'above'} joint training"
