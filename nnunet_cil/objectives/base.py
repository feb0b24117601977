"""What a method adds to nnU-Net's segmentation loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nnunet_cil.prototypes import PrototypeStore


class Objective(nn.Module):
    """Named loss terms of one method for one step; a Module, so that its state follows the device and is saved.

    Args:
        n_old: background and old classes (the teacher's outputs).
        n_classes: background, old and new classes (the student's outputs).
        settings: the method's coefficients, see ``schedule.METHOD_DEFAULTS``.
        prototypes: the teacher's, rows in the order of its outputs.
    """

    uses_teacher = True
    """Whether the teacher runs beside the student: needed for any distillation term and for online pseudo-labels."""
    uses_pseudo_labels = True
    """Whether the student trains on y^ (docs/method.md, section 1) or on the step's own labels."""
    uses_prototypes = False
    """Whether the teacher's prototypes are needed; they are made from its confident predictions if it has none."""

    def __init__(
        self, n_old: int, n_classes: int, settings: Mapping[str, Any], prototypes: PrototypeStore | None
    ) -> None:
        super().__init__()
        self.n_old = n_old
        self.n_classes = n_classes
        self.settings = dict(settings)

    def set_label_counts(self, counts: torch.Tensor) -> None:
        """Take the voxels by class (n_classes,) of the step's pseudo-labels; most methods have no use for them."""

    def forward(
        self,
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        student_features: torch.Tensor,
        teacher_features: torch.Tensor,
        labels: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Weighted scalar terms by name, to be added to the segmentation loss.

        Args:
            student_logits: (B, n_classes, *spatial) at full resolution.
            teacher_logits: (B, n_old, *spatial).
            student_features: (B, D, *spatial) that enter the student's last segmentation layer.
            teacher_features: the same of the teacher.
            labels: (B, *spatial) y^; ids from n_classes on are ignored voxels.
        """
        return {}
