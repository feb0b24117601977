"""Samples whose labels lack a class: what they call background may be background or that class."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nnunet_cil.losses.distillation import at_least_float32

NEVER = -1e4  # a logit to which no softmax gives weight; finite, and within float16


def fold_unlabelled(logits: torch.Tensor, unlabelled: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits whose background stands for itself and for all classes that the sample's labels lack.

    The softmax of the result has p_0 + (sum of the unlabelled classes' p) as background and 0 for these classes, so
    cross-entropy of a background voxel is that of the marginal probability, and the classes' Dice gets nothing from the
    sample. Source: Shi et al., "Marginal loss and exclusion loss for partially supervised multi-organ segmentation",
    Medical Image Analysis 70, 2021 (arXiv:2007.03868), the marginal loss; on logits it is MiB's folding (CVPR 2020,
    eq. 8) with a set of classes for each sample.

    Args:
        logits: (B, K, *S), background first.
        unlabelled: classes from 1 on, by sample; if no sample lacks any, ``logits`` themselves come back.

    Returns:
        (B, K, *S) of the dtype of ``logits``.
    """
    if not any(unlabelled):
        return logits
    folded = logits.clone()
    for b, classes in enumerate(unlabelled):
        if classes:
            merged = at_least_float32(logits[b, [0, *classes]])
            folded[b, 0] = torch.logsumexp(merged, 0).to(logits.dtype)
            folded[b, list(classes)] = NEVER
    return folded


def without_unsure_background(
    labels: torch.Tensor, unlabelled: Sequence[Sequence[int]], ignore_id: int
) -> torch.Tensor:
    """Labels (B, *S) in which background is ``ignore_id`` in samples that lack a class, as it may be that class.

    Args:
        unlabelled: classes by sample; if no sample lacks any, ``labels`` themselves come back.
    """
    if not any(unlabelled):
        return labels
    unsure = torch.tensor([len(classes) > 0 for classes in unlabelled], device=labels.device)
    return torch.where(unsure.view(-1, *[1] * (labels.ndim - 1)) & (labels == 0), ignore_id, labels)
