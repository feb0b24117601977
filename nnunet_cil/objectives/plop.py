"""PLOP: Douillard et al., "PLOP: Learning without Forgetting for Continual Semantic Segmentation", CVPR 2021."""

from __future__ import annotations

import math

import torch

from nnunet_cil.features import decoder_stages, encoder_stages
from nnunet_cil.losses.pod import local_pod, with_new_summed_into_background
from nnunet_cil.objectives.base import Objective


class PLOP(Objective):
    """Local POD of every stage and of the logits, pseudo-labels by entropy, and the adaptive factor.

    Differs from the paper: strips run along three axes instead of two; the layers are all stages of nnU-Net's encoder
    and decoder; the adaptive factor nu (eq. 9) is taken over the batch and scales nnU-Net's Dice and cross-entropy;
    a voxel with a declared ignore label counts as not accepted in it. The factor sqrt(all / new classes) of the POD
    terms, background among all, is the authors' code. The logits are those at full resolution, and their term is not
    divided by the number of layers, see docs/methods.md.
    """

    pseudo_label_rule = "entropy"

    def __init__(self, n_old, n_classes, settings, prototypes):
        super().__init__(n_old, n_classes, settings, prototypes)
        self.scale = math.sqrt(n_classes / (n_classes - n_old))

    @staticmethod
    def feature_paths(network):
        return encoder_stages(network) + decoder_stages(network)

    def segmentation_weight(self, labels):
        accepted, undecided = (labels < self.n_old).sum(), (labels >= self.n_classes).sum()
        return accepted / (accepted + undecided).clamp_min(1)

    def forward(self, student, teacher, labels):
        terms = {}
        if self.settings["lambda_pod"]:
            layers = [local_pod(s, t) for s, t in zip(student.features, teacher.features, strict=True)]
            terms["pod"] = self.scale * self.settings["lambda_pod"] * torch.stack(layers).mean()
        if self.settings["lambda_pod_logits"]:
            logits = with_new_summed_into_background(student.logits, self.n_old)
            terms["pod_logits"] = self.scale * self.settings["lambda_pod_logits"] * local_pod(logits, teacher.logits)
        return terms
