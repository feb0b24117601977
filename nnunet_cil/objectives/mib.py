"""MiB: Cermelli et al., "Modeling the Background for Incremental Learning in Semantic Segmentation", CVPR 2020."""

from __future__ import annotations

import torch

from nnunet_cil.losses.distillation import at_least_float32, folded_distillation
from nnunet_cil.objectives.base import Objective


class MiB(Objective):
    """Unbiased segmentation loss (eq. 5) and unbiased distillation (eq. 8) on the step's own labels.

    Where the labels say background, the student may say background or any old class: these are folded into one before
    nnU-Net's loss sees them. In 3D as in the paper but for nnU-Net's Dice, which joins cross-entropy on the folded
    probabilities. The head starts as in the paper (eq. 9 and 10, ``teacher.grow_head``), which all methods share here.
    """

    uses_pseudo_labels = False

    def segmentation(self, output, target):
        n_old = self.n_old
        background = torch.logsumexp(at_least_float32(output[:, :n_old]), 1, keepdim=True).to(output.dtype)
        folded = torch.cat([background, output[:, n_old:]], 1)
        shifted = torch.where(self.labelled_new(target), target - (n_old - 1), torch.where(target < n_old, 0, target))
        return folded, shifted.to(target.dtype)

    def forward(self, student, teacher, labels):
        return {"distillation": self.settings["lambda_kd"] * folded_distillation(student.logits, teacher.logits)}
