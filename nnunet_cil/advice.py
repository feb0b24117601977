"""What a schedule leaves out, of which its user should know before its chain is planned."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from nnunet_cil.schedule import Schedule

logger = logging.getLogger(__name__)

_SIDE = re.compile(r"left|right|(?<![a-z0-9])[lr](?![a-z0-9])")


def warn_before_planning(schedule: Schedule) -> None:
    """Warn of no test set, of classes that mirroring makes one of the other, and of a given model's islands.

    Of classes that a given model has already nothing is said.
    """
    if not schedule.test:
        logger.warning(
            "%s: test: got nothing, so no step is scored, and how much is forgotten is not measured. Name test "
            "subjects before the first training: those that were trained on cannot be held out later.",
            schedule.file,
        )
    pair = left_right_pair(schedule.classes, () if schedule.model is None else schedule.model.classes)
    if pair is not None and schedule.mirror_axes is None:
        logger.warning(
            "%s: mirror_axes: got nothing, so images are mirrored along all axes%s, and mirrored left to right %r "
            "looks like %r. The axes cannot be changed later. Leave out the axis from left to right: `mirror_axes: %s` "
            "in axial volumes, see docs/schedule.md.",
            schedule.file,
            "" if schedule.model is None else " that the model was trained with",
            *pair,
            [0] if schedule.configuration == "2d" else [0, 1],
        )
    model = schedule.model
    if model is not None and schedule.method["one_piece"] == "auto" and not model.has_prototypes(schedule.folds[0]):
        logger.warning(
            "%s: method: one_piece: got auto, but the model does not say which of its organs are in one piece, so its "
            "islands in pseudo-labels are believed. Name the organs that are, of %s: `method: {one_piece: [...]}` "
            "keeps them better, most of all on scans of another site.",
            schedule.file,
            ", ".join(model.classes),
        )


def left_right_pair(classes: Sequence[str], known: Sequence[str] = ()) -> tuple[str, str] | None:
    """The first two classes whose names differ by left and right alone, not both of them known; None if there are none.

    Case, blanks and signs do not count, and ``L`` and ``R`` by themselves are sides, too: ``Parotid_L``, ``Parotid_R``.
    """
    first: dict[str, tuple[str, str]] = {}
    for name in classes:
        plain = name.lower()
        sides = "".join(side[0] for side in _SIDE.findall(plain))
        other_sides, other = first.setdefault(re.sub(r"[\W_]", "", _SIDE.sub("X", plain)), (sides, name))
        if other_sides != sides and not {other, name} <= set(known):
            return other, name
    return None
