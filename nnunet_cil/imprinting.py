"""First rows of the head for new classes, from their prototypes in the teacher's feature space."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import interpolate

from nnunet_cil.extraction import UNCOUNTED, labelled_tiles
from nnunet_cil.features import FeatureTap, decoder_stages
from nnunet_cil.prototypes import masked_sums
from nnunet_cil.ranks import reduced

SHRINKAGE = 0.1
_HEAD = "decoder.seg_layers."


class ClassStatistics:
    """Counts, sums and second moments of the features of background and of each new class, in float64.

    Args:
        n: background and new classes.
        n_channels: D.
    """

    def __init__(self, n: int, n_channels: int) -> None:
        self.counts = torch.zeros(n, dtype=torch.float64)
        self.sums = torch.zeros(n, n_channels, dtype=torch.float64)
        self.squares = torch.zeros(n, n_channels, n_channels, dtype=torch.float64)

    def add(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Take features (B, D, *S) with labels (B, *S); those outside [0, n) are left out.

        Under autocast too, never in half precision: a second moment over a patch exceeds float16's largest number.
        """
        counts, sums = masked_sums(labels, len(self.counts), features)
        self.sums += sums.cpu().double()
        self.counts += counts.cpu().double()
        by_voxel = features.flatten(2).mT
        for c in range(len(self.counts)):
            chosen = by_voxel[labels.flatten(1) == c]
            with torch.autocast(features.device.type, enabled=False):
                self.squares[c] += (chosen.mT @ chosen).cpu().double()

    def reduce(self) -> None:
        """Add up over distributed ranks; without a process group nothing changes."""
        for name in ("counts", "sums", "squares"):
            setattr(self, name, reduced(getattr(self, name)))

    def discriminant(self, c: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (D,) and bias () of the log-odds of new class ``c`` (from 1) against background.

        Fisher's linear discriminant: classes are Gaussian, with the frequencies as they were counted and one covariance
        for all, pooled over background and new classes and shrunk towards a multiple of the identity.

        Raises:
            ValueError: one of the two has no voxel.
        """
        if min(self.counts[0], self.counts[c]) == 0:
            raise ValueError(f"imprinting: got {self.counts.tolist()} voxels by class, expected some of 0 and {c}.")
        means = self.sums / self.counts.clamp_min(1)[:, None]
        scatter = self.squares - self.counts[:, None, None] * means[:, :, None] * means[:, None, :]
        within = scatter.sum(0) / self.counts.sum()
        scale = within.diagonal().mean().clamp_min(1e-12)
        within = (1 - SHRINKAGE) * within + SHRINKAGE * scale * torch.eye(len(within), dtype=within.dtype)
        weight = torch.linalg.solve(within, means[c] - means[0])
        bias = torch.log(self.counts[c] / self.counts[0]) - weight @ (means[c] + means[0]) / 2
        return weight, bias


@torch.no_grad()
def class_statistics(
    network: nn.Module,
    cases: Iterable[tuple[Any, Any]],
    patch_size: Sequence[int],
    n_old: int,
    n_classes: int,
    device: torch.device,
) -> dict[int, ClassStatistics]:
    """Statistics at every decoder stage, by its number, over all voxels that are labelled background or new.

    Not yet reduced over ranks; zeros without cases.

    Args:
        network: the teacher's, in eval mode.
        cases: (image (C, *spatial), y^ (1, *spatial)).
        patch_size: of the configuration, two entries for a 2d network.
    """
    heads = enumerate(network.decoder.seg_layers)
    found = {stage: ClassStatistics(n_classes - n_old + 1, head.in_channels) for stage, head in heads}
    with ExitStack() as stack:
        taps = [stack.enter_context(FeatureTap(network, path)) for path in decoder_stages(network)]
        numbered = ((image, _numbered(np.asarray(labels[:]), n_old, n_classes)) for image, labels in cases)
        for x, y in labelled_tiles(numbered, patch_size, device):
            network(x)
            for stage, tap in enumerate(taps):
                features = tap.features.float()
                tap.clear()
                small = interpolate(y[None].float(), size=features.shape[2:], mode="nearest-exact")[0].long()
                found[stage].add(features, small)
    return found


def _numbered(labels: NDArray, n_old: int, n_classes: int) -> NDArray:
    """Background 0, new classes from 1 on, all else ``UNCOUNTED``."""
    is_new = (labels >= n_old) & (labels < n_classes)
    return np.where(labels == 0, 0, np.where(is_new, labels - n_old + 1, UNCOUNTED))


def imprint(
    weights: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor], statistics: Mapping[int, ClassStatistics]
) -> dict[str, torch.Tensor]:
    """The student's first state dict with new rows that tell each new class from background at once. Our derivation.

    A new row is the teacher's background row plus the discriminant, so that the new class's logit exceeds background's
    by the log-odds of the two; old rows are the teacher's. The folded background is the teacher's wherever no new class
    is likely. It takes the idea of Qi et al., "Low-Shot Learning with Imprinted Weights", CVPR 2018.

    Args:
        weights: the student's state dict, of which the head is replaced.
        teacher: the teacher's state dict.
        statistics: by decoder stage; a stage without voxels of some new class keeps its head.
    """
    result = dict(weights)
    for stage, found in statistics.items():
        keys = [f"{_HEAD}{stage}.{name}" for name in ("weight", "bias")]
        if not (found.counts > 0).all() or any(key not in weights for key in keys):
            continue
        old_weight, old_bias = (teacher[key].double().cpu() for key in keys)
        rows = [found.discriminant(c) for c in range(1, len(found.counts))]
        new_weight = torch.stack([w for w, _ in rows]).reshape(len(rows), *old_weight.shape[1:]) + old_weight[:1]
        new_bias = torch.stack([b for _, b in rows]) + old_bias[:1]
        for key, old, new in zip(keys, (old_weight, old_bias), (new_weight, new_bias), strict=True):
            result[key] = torch.cat([old, new]).to(weights[key])
    return result
