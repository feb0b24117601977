"""EWF: Xiao et al., "Endpoints Weight Fusion for Class Incremental Semantic Segmentation", CVPR 2023."""

from __future__ import annotations

from nnunet_cil.objectives.base import automatic_share
from nnunet_cil.objectives.finetune import Finetune


class EWF(Finetune):
    """Finetuning whose final weights are fused with the teacher's (eq. 6).

    The paper fuses after training with a distilling method; here that is any method with the setting ``fusion``. This
    one has the fusion alone, ``auto`` where the schedule sets none, so that what it adds can be seen.
    """

    def fusion_share(self):
        none_set = self.settings["fusion"] is None
        return automatic_share(self.n_old, self.n_classes) if none_set else super().fusion_share()
