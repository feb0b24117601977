"""Rehearsal: a few old cases are kept and trained on again."""

from __future__ import annotations

from nnunet_cil.objectives.base import Objective


class Replay(Objective):
    """Pseudo-labels, and ``replay_cases`` cases of each earlier step. Not privacy-safe: scans of old subjects are kept.

    A kept case has the labels of its own step and the old organs of which the teacher is confident. All else in it is
    ignored, for organs of other steps are there without labels.
    """

    uses_teacher = False
    replays = True
