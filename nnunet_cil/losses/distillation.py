"""Distillation of outputs, new classes folded into background (MiB) or left out (LwF), and of features (ILT)."""

from __future__ import annotations

import torch
from torch.nn.functional import log_softmax, mse_loss


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision ends at the loss: float16 and bfloat16 become float32, the rest stays."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def fold_logits(logits: torch.Tensor, n_old: int) -> torch.Tensor:
    """Logits over the old classes, background and all new classes taken together.

    Source: Cermelli et al., "Modeling the Background", CVPR 2020, eq. 8. The log-softmax of the result is the log of
    p_0 + (sum of the new classes' p) and of p_c.

    Args:
        logits: (B, K, *S), background first, old classes next, new ones last.
        n_old: background and old classes.

    Returns:
        (B, n_old, *S).
    """
    background = torch.logsumexp(torch.cat([logits[:, :1], logits[:, n_old:]], 1), 1, keepdim=True)
    return torch.cat([background, logits[:, 1:n_old]], 1)


def masked_mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over voxels of (B, *S) where ``mask`` is true; 0 with a gradient graph where it nowhere is."""
    if mask is None:
        return values.mean()
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp_min(1)


def folded_distillation(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean over voxels of KL(q || p~): MiB's unbiased distillation, less the teacher's own entropy.

    Source: Cermelli et al., CVPR 2020, eq. 8; the entropy has no gradient and makes 0 the smallest value.

    Args:
        student_logits: (B, K, *S).
        teacher_logits: (B, n_old, *S); gets no gradient.
        mask: (B, *S) voxels that count; all if None. An empty mask gives 0.
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        teacher_logits = at_least_float32(teacher_logits).detach()
        log_q = log_softmax(teacher_logits, 1)
        log_p = log_softmax(fold_logits(at_least_float32(student_logits), teacher_logits.shape[1]), 1)
        return masked_mean((log_q.exp() * (log_q - log_p)).sum(1), mask)


def plain_distillation(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0, among_all: bool = False
) -> torch.Tensor:
    """Mean over voxels of KL(q || p) over the old outputs, both softened, times the squared temperature.

    Source: Li and Hoiem, "Learning without Forgetting", ECCV 2016, eq. 2-4; the square keeps the size of the gradient
    (Hinton et al., arXiv:1503.02531). The teacher's entropy, which has no gradient, makes 0 the smallest value.

    Args:
        student_logits: (B, K, *S).
        teacher_logits: (B, n_old, *S); gets no gradient.
        temperature: above 0.
        among_all: whether p, the student's softmax, is that of all its outputs (ILT), or of the old ones alone (LwF).
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        n_old = teacher_logits.shape[1]
        log_q = log_softmax(at_least_float32(teacher_logits).detach() / temperature, 1)
        among = student_logits if among_all else student_logits[:, :n_old]
        log_p = log_softmax(at_least_float32(among) / temperature, 1)[:, :n_old]
        return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(1).mean()


def feature_distillation(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of two feature maps of one shape.

    Source: Michieli and Zanuttigh, "Incremental Learning Techniques for Semantic Segmentation", ICCVW 2019, eq. 4.
    """
    with torch.autocast(student.device.type, enabled=False):
        return mse_loss(at_least_float32(student), at_least_float32(teacher).detach())
