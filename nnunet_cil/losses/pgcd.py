"""Prototype-guided calibration distillation (PGCD), arXiv:2511.07749, in our reading.

Sections 5 and 6 of docs/method.md. Both terms give their gradient along with their value, so that the loss can go over
the voxels in pieces and hold no map of all voxels and classes beside that gradient.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import normalize

from nnunet_cil.losses.chunked import piece, rows, sums_over_chunks

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
    lengths = centred.square().sum(1, keepdim=True).sqrt_()  # torch's norm is 10 times slower over a few channels
    unit = centred.div_(lengths.clamp_min_(EPS))
    return torch.matmul(directions, unit.flatten(2)).unflatten(2, features.shape[2:])


def calibration_weights(
    similarities: torch.Tensor, usable: torch.Tensor | None, tau: torch.Tensor | float, w_max: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Assignment of voxels to prototypes, and the distillation weight of each voxel and class. Our derivation.

    Args:
        similarities: (B, K, *S).
        usable: (K,) bool; the others take no part in the softmax. None: all are.
        tau: temperature, in cosine units.
        w_max: largest weight.

    Returns:
        a (B, K, *S), a softmax over the usable classes, 0 for the others; and w = min(n a, w_max) with n usable
        classes, 1 for a class that is not usable.
    """
    if usable is None:
        assignment, _ = _softmax(similarities / tau)
        return assignment, (similarities.shape[1] * assignment).clamp_max_(w_max)
    shown = usable.reshape(1, -1, *[1] * (similarities.ndim - 2))
    scaled = torch.where(shown, similarities / tau, -torch.inf)
    assignment = torch.where(shown, torch.softmax(scaled, 1), 0.0)
    weights = torch.where(shown, (usable.sum() * assignment).clamp_max(w_max), 1.0)
    return assignment, weights


def _softmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities of logits (B, K, *S), and the log of what the exponentials were divided by, (B, 1, *S)."""
    peak = logits.amax(1, keepdim=True)
    probabilities = (logits - peak).exp_()
    norm = probabilities.sum(1, keepdim=True)
    return probabilities.div_(norm), norm.log_().add_(peak)


@torch.no_grad()
def pgcd_spatial(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    weights: torch.Tensor,
    balance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Calibrated distillation over space and classes: never negative, 0 exactly where student and teacher agree.

    At each voxel b sum_k w_k [q_k log(q_k / p~_k) - q_k + p~_k]. Our derivation; with w = 1 it is MiB's folded
    distillation. By u_j, the folded logits, its derivative is b (h_j - p~_j sum_k h_k), h_k = w_k (p~_k - q_k); that
    of u_0 is shared out to background and new classes by their probabilities.

    Args:
        student_logits: (B, K, *S).
        teacher_logits: (B, n_old, *S).
        weights: (B, n_old, *S).
        balance: (n_old,) weight by the teacher's decision.

    Returns:
        Values (B, *S), whose mean over the voxels that are not labelled new is the term, and the derivative of each by
        the student's logits of its voxel, (B, K, *S).
    """
    n_old = teacher_logits.shape[1]
    folded_in = torch.cat([student_logits[:, :1], student_logits[:, n_old:]], 1)
    background = torch.logsumexp(folded_in, 1, keepdim=True)
    gap, old = torch.empty_like(teacher_logits), student_logits[:, 1:n_old]
    torch.sub(teacher_logits[:, :1], background, out=gap[:, :1])
    torch.sub(teacher_logits[:, 1:], old, out=gap[:, 1:])
    p, log_norm_p = _softmax(torch.cat([background, old], 1))
    q, log_norm_q = _softmax(teacher_logits)
    gap.add_(log_norm_p - log_norm_q)  # log(q / p~)
    wanted = q.mul_(weights)
    excess = (p * weights).sub_(wanted)
    total = excess.sum(1, keepdim=True)
    values = gap.mul_(wanted).sum(1).add_(total[:, 0])
    gradient = torch.empty_like(student_logits)
    torch.addcmul(excess[:, 1:], p[:, 1:], total, value=-1, out=gradient[:, 1:n_old])
    by_background = (folded_in - background).exp_().mul_(excess[:, :1] - p[:, :1] * total)
    gradient[:, :1], gradient[:, n_old:] = by_background[:, :1], by_background[:, 1:]
    if balance is not None:
        weight = balance[teacher_logits.argmax(1)]
        values, gradient = values * weight, gradient * weight[:, None]
    return values, gradient


@torch.no_grad()
def pgcd_channel(
    student_features: torch.Tensor,
    teacher_features: torch.Tensor,
    assignment: torch.Tensor,
    prototypes: torch.Tensor,
    centre: torch.Tensor,
    teacher_decision: torch.Tensor | None = None,
    balance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Calibrated feature distillation: channels count by their share of the cosine to the best prototype.

    At each voxel b a (1/D) sum_k g_k (F^S_k - F^T_k)^2, where g_k = D u_k / sum(u) and u is the positive part of each
    channel's product with the best prototype. Our derivation.

    Args:
        student_features: (B, D, *S).
        teacher_features: the same of the teacher.
        assignment: (B, n_old, *S), 0 for classes without prototype.
        prototypes: (n_old, D).
        centre: (D,).
        teacher_decision: (B, *S), needed for ``balance``.
        balance: (n_old,).

    Returns:
        Values (B, *S), whose mean over the voxels that are not labelled new is the term, and the derivative of each by
        the student's features of its voxel, (B, D, *S).
    """
    weight = assignment.amax(1, keepdim=True)
    best = (assignment / weight.clamp_min(EPS)).floor_()  # one-hot; argmax takes ten times as long
    directions = torch.matmul((prototypes - centre).mT, best.flatten(2)).unflatten(2, best.shape[2:])
    shares = directions.mul_(_centred(teacher_features, centre)).clamp_min_(0)
    weight = weight[:, 0] / shares.sum(1).clamp_min_(EPS)
    if balance is not None:
        weight = weight * balance[teacher_decision]
    difference = student_features - teacher_features
    half_gradient = shares.mul_(difference).mul_(weight[:, None])
    return (half_gradient * difference).sum(1), half_gradient.mul_(2)


class PGCDLoss(nn.Module):
    """Both parts of PGCD from logits, features and prototypes.

    Args:
        n_old: background and old classes.
        w_max: largest weight of the spatial part.
        eta: weight of the channel part; 0 leaves it out.
        spatial: whether the spatial part is there.
        calibrated: whether prototypes weigh voxels and classes; else all weights are 1 (an ablation), and prototypes
            only choose the channels that count.
        voxel_stride: n; each n-th row of voxels stands for all, and they take turns. 1: all take part. Whose turn it is
            belongs to the state, not to a random stream: batches are the same for all n.
    """

    balance: torch.Tensor | None

    def __init__(
        self,
        n_old: int,
        w_max: float = 3.0,
        eta: float = 0.01,
        spatial: bool = True,
        calibrated: bool = True,
        voxel_stride: int = 1,
    ) -> None:
        super().__init__()
        self.n_old, self.w_max, self.eta = n_old, w_max, eta
        self.spatial, self.calibrated, self.voxel_stride = spatial, calibrated, voxel_stride
        self._turn = 0
        self.register_buffer("balance", None, persistent=False)

    def set_balance(self, balance: torch.Tensor | None) -> None:
        """Set b_c (n_old,), the weight of a voxel by the teacher's decision; None weighs all the same."""
        self.balance = balance

    def get_extra_state(self) -> int:
        return self._turn

    def set_extra_state(self, state: int) -> None:
        self._turn = state

    def forward(
        self,
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        student_features: torch.Tensor,
        teacher_features: torch.Tensor,
        labels: torch.Tensor,
        prototypes: torch.Tensor,
        centre: torch.Tensor,
        usable: torch.Tensor | None,
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
            usable: (n_old,) bool; None if all are, which saves time.
            tau: temperature.

        Returns:
            ``{"pgcd_spatial", "pgcd_channel"}``, the latter times eta; less what the settings leave out.
        """
        if not (self.spatial or self.eta):
            return {}
        with torch.autocast(student_logits.device.type, enabled=False):
            z_t, f_t = (rows(tensor.detach()) for tensor in (teacher_logits, teacher_features))
            usable_prototypes = prototypes.detach()
            if usable is not None:
                usable_prototypes = torch.where(usable[:, None], usable_prototypes, 0.0)
            chosen = slice(None)
            if self.voxel_stride > 1:
                chosen = slice(self._turn, None, self.voxel_stride)
                self._turn = (self._turn + 1) % self.voxel_stride
            mask = rows(((labels < self.n_old) | (labels >= student_logits.shape[1]))[:, None])[:, 0]
            share = 1 / mask[:, chosen].sum().clamp_min(1)

            def terms(b: int, where: slice, *inputs: torch.Tensor) -> list:
                logits, features = (piece(tensor, b, where) for tensor in (z_t, f_t))
                own, middle = usable_prototypes.to(features.dtype), centre.to(features.dtype)
                similarities = similarity(features, own, middle)
                assignment, weights = calibration_weights(similarities, usable, tau, self.w_max)
                if not self.calibrated:
                    best = assignment.argmax(1, keepdim=True)
                    assignment = torch.zeros_like(assignment).scatter_(1, best, 1.0)
                    weights = torch.ones_like(weights)
                found = []
                if self.spatial:
                    found.append(pgcd_spatial(inputs[0], logits, weights, self.balance))
                if self.eta:
                    decision = None if self.balance is None else logits.argmax(1)
                    channel = pgcd_channel(inputs[-1], features, assignment, own, middle, decision, self.balance)
                    found.append(channel)
                taking_part = mask[b, where].flatten()[None]
                weighted = [taking_part * weight for weight in within]
                return [
                    ((by_voxel * values).sum(), gradient.mul_(by_voxel[:, None]))
                    for by_voxel, (values, gradient) in zip(weighted, found, strict=True)
                ]

            named = {}
            if self.spatial:
                named["pgcd_spatial"] = (student_logits, 1.0)
            if self.eta:
                named["pgcd_channel"] = (student_features, self.eta)
            # float16 would lose derivatives as small as a voxel's share: there they get it along with the loss's scale
            is_late = [tensor.dtype == torch.float16 for tensor, _ in named.values()]
            weights_of_terms = [share * weight for _, weight in named.values()]
            within = [1.0 if late else weight for late, weight in zip(is_late, weights_of_terms, strict=True)]
            sums = sums_over_chunks(terms, *(tensor for tensor, _ in named.values()), chosen=chosen)
            means = [s * w if late else s for s, w, late in zip(sums, weights_of_terms, is_late, strict=True)]
            return dict(zip(named, means, strict=True))
