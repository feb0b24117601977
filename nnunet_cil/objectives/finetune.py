"""Lower bound: go on training from the teacher's weights on the new labels alone."""

from __future__ import annotations

from nnunet_cil.objectives.base import Objective


class Finetune(Objective):
    """No distillation, no pseudo-labels: old organs are background, as in the labels of the step."""

    uses_teacher = False
    uses_pseudo_labels = False
