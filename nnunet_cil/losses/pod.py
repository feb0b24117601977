"""Local pooled outputs distillation (local POD) of PLOP, carried over to volumes.

Source: Douillard et al., "PLOP: Learning without Forgetting for Continual Semantic Segmentation", CVPR 2021, eq. 3-6.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from nnunet_cil.losses.distillation import at_least_float32

SCALES = (1, 2, 4)  # numbers of stretches along an axis


def strips(features: torch.Tensor, axis: int, parts: int) -> torch.Tensor:
    """Mean over each of ``parts`` stretches of one spatial axis; every voxel is in one stretch.

    The paper cuts an image into windows and averages each window's rows and columns. As the other axes are not pooled,
    the strips of all windows are those of the whole axis cut into as many stretches; sizes differ by at most one voxel.

    Args:
        features: (B, D, *S).
        axis: 0 for the first spatial axis.
        parts: at most as many as the axis has voxels.

    Returns:
        (B, D, *S), but ``parts`` along ``axis``.
    """
    size = features.shape[axis + 2]
    if size % parts == 0:
        return features.unflatten(axis + 2, (parts, size // parts)).mean(axis + 3)
    bounds = [round(i * size / parts) for i in range(parts + 1)]
    sizes = [end - start for start, end in pairwise(bounds)]
    return torch.cat([piece.mean(axis + 2, keepdim=True) for piece in features.split(sizes, axis + 2)], axis + 2)


def local_pod_embedding(features: torch.Tensor) -> torch.Tensor:
    """All strips along all spatial axes at all scales, as one vector an image (eq. 5 and 6).

    Features are squared first and the vector is not normalised, as in the authors' published code with the options of
    their method. A scale that an axis is too short for is left out on that axis.

    Args:
        features: (B, D, *S) with two or three spatial axes.

    Returns:
        (B, E) in float32 or better.
    """
    squared = at_least_float32(features).square()
    axes = range(features.ndim - 2)
    pooled = [
        strips(squared, axis, parts).flatten(1) for parts in SCALES for axis in axes if squared.shape[axis + 2] >= parts
    ]
    return torch.cat(pooled, 1)


def local_pod(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Euclidean distance of the two embeddings, mean over the batch; grows with the features and their number.

    Args:
        student: (B, D, *S).
        teacher: the same of the teacher; gets no gradient.
    """
    with torch.autocast(student.device.type, enabled=False):
        difference = local_pod_embedding(student) - local_pod_embedding(teacher.detach())
        squares = difference.square().sum(1)
        # the derivative of a root at 0 is infinite; student and teacher are equal in the first iteration
        return torch.where(squares > 0, squares.clamp_min(1e-12).sqrt(), 0.0).mean()


def with_new_summed_into_background(logits: torch.Tensor, n_old: int) -> torch.Tensor:
    """(B, n_old, *S) from (B, K, *S): the new classes' logits are added to background's, as in the authors' code.

    In float32 or better, as the sum would be rounded in half precision.
    """
    logits = at_least_float32(logits)
    background = logits[:, :1] + logits[:, n_old:].sum(1, keepdim=True)
    return torch.cat([background, logits[:, 1:n_old]], 1)
