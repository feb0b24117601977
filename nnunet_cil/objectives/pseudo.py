"""Plain baselines on pseudo-labels: alone, and with folded distillation."""

from __future__ import annotations

from nnunet_cil.losses.distillation import folded_distillation
from nnunet_cil.objectives.base import Objective


class Pseudo(Objective):
    """Pseudo-labels alone: nnU-Net's loss on y^ (as arXiv:2203.02100 for CT). No teacher runs beside the student."""

    uses_teacher = False


class PseudoKD(Objective):
    """Pseudo-labels and MiB's folded distillation where no new class is labelled: PGCD with all weights 1.

    The distillation is eq. 8 of Cermelli et al., "Modeling the Background", CVPR 2020.
    """

    def forward(self, student, teacher, labels):
        kept = ~self.labelled_new(labels)
        return {"distillation": self.settings["lambda_kd"] * folded_distillation(student.logits, teacher.logits, kept)}
