"""Dual-aligned prototype distillation (DAPD), arXiv:2511.07749, in our reading: docs/method.md, section 7."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from nnunet_cil.losses.distillation import at_least_float32
from nnunet_cil.prototypes import masked_average


def _alignment(local: torch.Tensor, target: torch.Tensor, chosen: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Mean over the chosen rows of 1 - cosine of the centred vectors; 0 with a graph if none is chosen."""
    centre, target = centre.detach(), torch.where(chosen[:, None], target.detach(), 0.0)
    distance = 1 - cosine_similarity(local - centre, target - centre, dim=1)
    return torch.where(chosen, distance, 0.0).sum() / chosen.sum().clamp_min(1)


def dapd_global(
    student: torch.Tensor, present: torch.Tensor, prototypes: torch.Tensor, usable: torch.Tensor, centre: torch.Tensor
) -> torch.Tensor:
    """Distance of the student's local prototypes to the stored global ones, background to its running one.

    Mean over the classes that are present and usable of 1 - cosine of the centred vectors. Our derivation.

    Args:
        student: (K, D) local prototypes; present: (K,) which of them the batch has.
        prototypes: (K, D) global; usable: (K,) which of them exist. They get no gradient.
        centre: (D,).

    Returns:
        Between 0 and 2; 0 with a gradient graph for an empty set.
    """
    return _alignment(student, prototypes, present & usable, centre)


def dapd_local(
    student: torch.Tensor, teacher: torch.Tensor, present: torch.Tensor, centre: torch.Tensor
) -> torch.Tensor:
    """Distance of the student's local prototypes (K, D) to the teacher's on the same voxels. Our derivation.

    Args:
        student: (K, D) local prototypes; present: (K,) which of them the batch has.
        teacher: (K, D), of the same voxels; gets no gradient.
        centre: (D,).

    Returns:
        Between 0 and 2; 0 with a gradient graph for an empty set.
    """
    return _alignment(student, teacher, present, centre)


class DAPDLoss(nn.Module):
    """Both parts of DAPD from features and labels.

    Args:
        n_old: background and old classes.
        n_min: classes with fewer voxels in the batch are left out.
    """

    def __init__(self, n_old: int, n_min: int = 10) -> None:
        super().__init__()
        self.n_old, self.n_min = n_old, n_min

    def forward(
        self,
        student_features: torch.Tensor,
        teacher_features: torch.Tensor,
        labels: torch.Tensor,
        prototypes: torch.Tensor,
        usable: torch.Tensor,
        centre: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The terms of a batch; computed in float32 whatever the inputs and autocast.

        Args:
            student_features: (B, D, *S).
            teacher_features: (B, D, *S).
            labels: (B, *S) y^; values outside [0, n_old) are left out.
            prototypes: (n_old, D) global; usable: (n_old,) which of them exist.
            centre: (D,).

        Returns:
            ``{"dapd_global", "dapd_local"}``.
        """
        with torch.autocast(student_features.device.type, enabled=False):
            f_s, f_t = at_least_float32(student_features), at_least_float32(teacher_features).detach()
            centre, prototypes = centre.to(f_s.dtype), prototypes.to(f_s.dtype)
            student, present = masked_average(f_s, labels, self.n_old, self.n_min)
            teacher, _ = masked_average(f_t, labels, self.n_old, self.n_min)
            return {
                "dapd_global": dapd_global(student, present, prototypes, usable, centre),
                "dapd_local": dapd_local(student, teacher, present, centre),
            }
