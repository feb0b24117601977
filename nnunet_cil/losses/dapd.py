"""Dual-aligned prototype distillation (DAPD), arXiv:2511.07749, in our reading: docs/method.md, section 7."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from nnunet_cil.prototypes import class_means


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
    """Both parts of DAPD from the sums of a batch's features by class.

    Args:
        n_min: classes with fewer voxels in the batch are left out; at least 1.
    """

    def __init__(self, n_min: int = 10) -> None:
        super().__init__()
        self.n_min = n_min

    def forward(
        self,
        counts: torch.Tensor,
        student_sums: torch.Tensor,
        teacher_sums: torch.Tensor,
        prototypes: torch.Tensor,
        usable: torch.Tensor,
        centre: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The terms of a batch, in the precision of the sums whatever autocast says.

        Args:
            counts: (n_old,) voxels by y^; counts and sums are those of ``prototypes.masked_sums``.
            student_sums: (n_old, D) of the student's features.
            teacher_sums: (n_old, D) of the teacher's.
            prototypes: (n_old, D) global; usable: (n_old,) which of them exist.
            centre: (D,).

        Returns:
            ``{"dapd_global", "dapd_local"}``.
        """
        with torch.autocast(counts.device.type, enabled=False):
            centre, prototypes = centre.to(student_sums.dtype), prototypes.to(student_sums.dtype)
            student, teacher = class_means(student_sums, counts), class_means(teacher_sums, counts)
            present = counts >= self.n_min
            return {
                "dapd_global": dapd_global(student, present, prototypes, usable, centre),
                "dapd_local": dapd_local(student, teacher, present, centre),
            }
