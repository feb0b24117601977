"""LwF (Li and Hoiem, ECCV 2016) and ILT (Michieli and Zanuttigh, ICCV Workshops 2019)."""

from __future__ import annotations

from nnunet_cil.features import encoder_stages
from nnunet_cil.losses.distillation import feature_distillation, plain_distillation
from nnunet_cil.objectives.base import Objective


class LwF(Objective):
    """Distillation of the old outputs (eq. 2 to 4, temperature 2) beside nnU-Net's loss on the step's own labels.

    Differs from the paper: voxels instead of images; the shared head initialisation; no warm-up of the new rows alone.
    """

    uses_pseudo_labels = False

    def forward(self, student, teacher, labels):
        loss = plain_distillation(student.logits, teacher.logits, self.settings["lwf_temperature"])
        return {"distillation": self.settings["lambda_lwf"] * loss}


class ILT(LwF):
    """Distillation of the old outputs among all (L'_D, eq. 2) and the encoder's last features (L''_D, eq. 4).

    The softmax of L'_D is over all outputs and its targets are those of old ones, so new ones are pushed down.

    Differs from the paper: the encoder is nnU-Net's; its features count by a setting of their own.
    """

    among_all = True

    @staticmethod
    def feature_paths(network):
        return (encoder_stages(network)[-1],)

    def forward(self, student, teacher, labels):
        outputs = plain_distillation(student.logits, teacher.logits, among_all=self.among_all)
        features = feature_distillation(student.features[0], teacher.features[0])
        return {
            "distillation": self.settings["lambda_lwf"] * outputs,
            "features": self.settings["lambda_ilt"] * features,
        }


class ILTOfMiB(ILT):
    """ILT as in the code of MiB (Cermelli et al., CVPR 2020), whose tables later papers copy: old outputs alone."""

    among_all = False
