"""Prototype-guided calibration distillation (PGCD), arXiv:2511.07749, in our reading.

Sections 5 and 6 of docs/method.md.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import log_softmax, normalize

from nnunet_cil.losses.distillation import at_least_float32, fold_logits, masked_mean

EPS = 1e-8


def _centred(features: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    return features - centre.reshape(1, -1, *[1] * (features.ndim - 2))


def similarity(features: torch.Tensor, prototypes: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Cosine between each voxel's feature and each prototype, both after subtracting ``centre``. Our derivation.

    Args:
        features: (B, D, *S).
        prototypes: (K, D).
        centre: (D,).

    Returns:
        (B, K, *S) in [-1, 1]; 0 where a centred vector is zero.
    """
    directions = normalize(prototypes - centre, dim=1, eps=EPS)
    centred = _centred(features, centre)
    products = torch.matmul(directions, centred.flatten(2)).unflatten(2, features.shape[2:])
    return products / centred.norm(dim=1, keepdim=True).clamp_min(EPS)


def calibration_weights(
    similarities: torch.Tensor, usable: torch.Tensor, tau: torch.Tensor | float, w_max: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Assignment of voxels to prototypes, and the distillation weight of each voxel and class. Our derivation.

    Args:
        similarities: (B, K, *S).
        usable: (K,) bool; the others take no part in the softmax.
        tau: temperature, in cosine units.
        w_max: largest weight.

    Returns:
        a (B, K, *S), a softmax over the usable classes, 0 for the others; and w = min(n a, w_max) with n usable
        classes, 1 for a class that is not usable.
    """
    shown = usable.reshape(1, -1, *[1] * (similarities.ndim - 2))
    scaled = torch.where(shown, similarities / tau, -torch.inf)
    assignment = torch.where(shown, torch.softmax(scaled, 1), 0.0)
    weights = torch.where(shown, (usable.sum() * assignment).clamp_max(w_max), 1.0)
    return assignment, weights


def pgcd_spatial(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    weights: torch.Tensor,
    mask: torch.Tensor,
    balance: torch.Tensor | None = None,
) -> torch.Tensor:
    """Calibrated distillation over space and classes: never negative, 0 exactly where student and teacher agree.

    Mean over the voxels of ``mask`` of b sum_k w_k [q_k log(q_k / p~_k) - q_k + p~_k]. Our derivation; with w = 1 it is
    MiB's folded distillation.

    Args:
        student_logits: (B, K, *S).
        teacher_logits: (B, n_old, *S); gets no gradient.
        weights: (B, n_old, *S).
        mask: (B, *S) voxels that are not labelled new; an empty one gives 0.
        balance: (n_old,) weight by the teacher's decision.
    """
    teacher_logits = teacher_logits.detach()
    log_q = log_softmax(teacher_logits, 1)
    log_p = log_softmax(fold_logits(student_logits, teacher_logits.shape[1]), 1)
    q = log_q.exp()
    divergence = (weights * (q * (log_q - log_p) - q + log_p.exp())).sum(1)
    if balance is not None:
        divergence = divergence * balance[teacher_logits.argmax(1)]
    return masked_mean(divergence, mask)


def pgcd_channel(
    student_features: torch.Tensor,
    teacher_features: torch.Tensor,
    assignment: torch.Tensor,
    prototypes: torch.Tensor,
    centre: torch.Tensor,
    teacher_decision: torch.Tensor,
    mask: torch.Tensor,
    balance: torch.Tensor | None = None,
) -> torch.Tensor:
    """Calibrated feature distillation: channels count by their share of the cosine to the best prototype.

    Mean over the voxels of ``mask`` of b a (1/D) sum_k g_k (F^S_k - F^T_k)^2, where g_k = D u_k / sum(u) and u is the
    positive part of each channel's product with the best prototype. Our derivation.

    Args:
        student_features: (B, D, *S).
        teacher_features: the same of the teacher; gets no gradient.
        assignment: (B, n_old, *S), 0 for classes without prototype.
        prototypes: (n_old, D).
        centre: (D,).
        teacher_decision: (B, *S), for ``balance``.
        mask: (B, *S); an empty one gives 0.
        balance: (n_old,).
    """
    with torch.no_grad():
        weight, best = assignment.max(1)
        shares = (_centred(teacher_features, centre) * (prototypes - centre).mT[:, best].movedim(0, 1)).clamp_min_(0)
        weight = weight / shares.sum(1).clamp_min(EPS)
        if balance is not None:
            weight = weight * balance[teacher_decision]
    squared = (student_features - teacher_features.detach()).square()
    return masked_mean(weight * (shares * squared).sum(1), mask)


class PGCDLoss(nn.Module):
    """Both parts of PGCD from logits, features and prototypes.

    Args:
        n_old: background and old classes.
        w_max: largest weight of the spatial part.
        eta: weight of the channel part; 0 leaves it out.
    """

    balance: torch.Tensor | None

    def __init__(self, n_old: int, w_max: float = 3.0, eta: float = 0.01) -> None:
        super().__init__()
        self.n_old, self.w_max, self.eta = n_old, w_max, eta
        self.register_buffer("balance", None, persistent=False)

    def set_balance(self, balance: torch.Tensor | None) -> None:
        """Set b_c (n_old,), the weight of a voxel by the teacher's decision; None weighs all the same."""
        self.balance = balance

    def forward(
        self,
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        student_features: torch.Tensor,
        teacher_features: torch.Tensor,
        labels: torch.Tensor,
        prototypes: torch.Tensor,
        centre: torch.Tensor,
        usable: torch.Tensor,
        tau: torch.Tensor | float,
    ) -> dict[str, torch.Tensor]:
        """The terms of a batch; computed in float32 whatever the inputs and autocast.

        Args:
            student_logits: (B, K, *S).
            teacher_logits: (B, n_old, *S).
            student_features: (B, D, *S).
            teacher_features: (B, D, *S).
            labels: (B, *S) y^; a voxel labelled new, in [n_old, K), does not distil.
            prototypes: (n_old, D); rows that are not usable are not read.
            centre: (D,).
            usable: (n_old,) bool.
            tau: temperature.

        Returns:
            ``{"pgcd_spatial", "pgcd_channel"}``, the latter times eta, or left out if eta is 0.
        """
        with torch.autocast(student_logits.device.type, enabled=False):
            z_s, z_t, f_s, f_t = map(
                at_least_float32, (student_logits, teacher_logits, student_features, teacher_features)
            )
            z_t, f_t = z_t.detach(), f_t.detach()
            prototypes = torch.where(usable[:, None], prototypes.detach(), 0.0).to(f_t.dtype)
            centre = centre.to(f_t.dtype)
            mask = (labels < self.n_old) | (labels >= z_s.shape[1])
            with torch.no_grad():
                assignment, weights = calibration_weights(similarity(f_t, prototypes, centre), usable, tau, self.w_max)
            terms = {"pgcd_spatial": pgcd_spatial(z_s, z_t, weights, mask, self.balance)}
            if self.eta:
                channel = pgcd_channel(f_s, f_t, assignment, prototypes, centre, z_t.argmax(1), mask, self.balance)
                terms["pgcd_channel"] = self.eta * channel
            return terms
