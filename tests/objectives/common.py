"""A made-up batch and objectives on it."""

from __future__ import annotations

import torch

from nnunet_cil.objectives.base import Outputs
from nnunet_cil.schedule import METHOD_DEFAULTS

N_OLD, N_CLASSES, D = 3, 5, 4


def batch(seed: int = 0, requires_grad: bool = False) -> tuple[Outputs, Outputs, torch.Tensor]:
    """Student, teacher, labels (with the ignore id among them): arguments of ``Objective.forward``."""
    g = torch.Generator().manual_seed(seed)
    student_logits, teacher_logits = (torch.randn(2, n, 4, 5, generator=g) for n in (N_CLASSES, N_OLD))
    student_features, teacher_features = (torch.randn(2, D, 4, 5, generator=g) for _ in range(2))
    labels = torch.randint(0, N_CLASSES + 1, (2, 4, 5), generator=g)
    if requires_grad:
        student_logits.requires_grad_()
        student_features.requires_grad_()
    return Outputs(student_logits, (student_features,)), Outputs(teacher_logits, (teacher_features,)), labels


def settings(**changes) -> dict:
    """The default coefficients with changes."""
    return {**METHOD_DEFAULTS, **changes}
