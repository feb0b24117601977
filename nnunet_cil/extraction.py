"""Global prototypes: one pass of a network over a step's cases, every voxel counted once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from numpy.typing import NDArray
from torch import nn

from nnunet_cil.features import FeatureTap
from nnunet_cil.prototypes import PrototypeAccumulator, PrototypeStore, masked_sums, transported_mean

UNCOUNTED = -1


def tiles(shape: Sequence[int], patch_size: Sequence[int]) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Cover a volume with patches: yields (patch, the part of that patch which no patch before it has covered).

    The last patch of an axis is shifted back to stay inside; the second tuple is relative to the patch. Together the
    second parts cover each voxel exactly once.

    Args:
        shape: spatial shape, at least ``patch_size`` along every axis.
        patch_size: one entry an axis; for a 2d network on a 3d volume pass (1, y, x).
    """
    axes = []
    for size, patch in zip(shape, patch_size, strict=True):
        if size < patch:
            raise ValueError(f"got a volume of {tuple(shape)}, expected at least {tuple(patch_size)}: pad it first.")
        starts = [min(start, size - patch) for start in range(0, size, patch)]
        covered = [0, *(start + patch for start in starts[:-1])]
        axes.append(
            [
                (slice(start, start + patch), slice(done - start, patch))
                for start, done in zip(starts, covered, strict=True)
            ]
        )
    for combination in itertools.product(*axes):
        yield tuple(part[0] for part in combination), tuple(part[1] for part in combination)


def labelled_tiles(
    cases: Iterable[tuple[Any, NDArray]], patch_size: Sequence[int], device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Patches (1, C, *patch_size) that cover each case, with their labels (1, *patch_size), each voxel's once.

    A voxel is ``UNCOUNTED`` where a patch before has covered it; a patch without any other is left out.

    Args:
        cases: (image (C, *spatial), labels (1, *spatial)).
        patch_size: of the configuration, two entries for a 2d network.
    """
    is_2d = len(patch_size) == 2
    patch = (1, *patch_size) if is_2d else tuple(patch_size)
    for image, labels in cases:
        image = pad_nd_image(np.asarray(image[:]), patch, "constant", {"constant_values": 0})
        labels = pad_nd_image(labels.astype(np.int64), patch, "constant", {"constant_values": UNCOUNTED})
        for where, fresh in tiles(image.shape[1:], patch):
            chosen = np.full(patch, UNCOUNTED, dtype=np.int64)
            chosen[fresh] = labels[(0, *where)][fresh]
            if (chosen == UNCOUNTED).all():
                continue
            x = torch.from_numpy(np.ascontiguousarray(image[(slice(None), *where)]))[None].float().to(device)
            y = torch.from_numpy(chosen)[None].to(device)
            yield (x[:, :, 0], y[:, 0]) if is_2d else (x, y)


def accumulate_prototypes(
    network: nn.Module,
    feature_path: str,
    n_features: int,
    cases: Iterable[tuple[np.ndarray, np.ndarray]],
    patch_size: Sequence[int],
    n_classes: int,
    device: torch.device,
    earlier: nn.Module | None = None,
) -> tuple[PrototypeAccumulator, torch.Tensor, torch.Tensor]:
    """Sums, counts and samples of the features of each class (docs/method.md, section 2), in the caller's autocast.

    Instance norm depends on the input's size, so the network sees patches of the size that it was trained with.

    Args:
        network: in eval mode; not a compiled or wrapped module, so that its hooks fire.
        feature_path: module whose output is pooled, e.g. ``decoder.stages.2``.
        n_features: channels of that output, D.
        cases: (image (C, *spatial), labels (1, *spatial)); labels below 0 are background, those from ``n_classes`` on
            are left out.
        patch_size: of the configuration, two entries for a 2d network.
        n_classes: background and foreground classes.
        earlier: a network of the same architecture; if given, the mean shift of the features from it to ``network``
            is summed too.

    Returns:
        The accumulator, and the sums (n_classes, D) and counts (n_classes,) of ``features(network) -
        features(earlier)`` in float64 on the CPU. Not yet reduced over ranks; zeros without cases or ``earlier``.
    """
    accumulator = PrototypeAccumulator(n_classes, n_features)
    shift = torch.zeros(n_classes, n_features, dtype=torch.float64)
    shift_counts = torch.zeros(n_classes, dtype=torch.float64)
    with ExitStack() as stack:
        networks = [net for net in (network, earlier) if net is not None]
        taps = [stack.enter_context(FeatureTap(net, feature_path)) for net in networks]
        from_background_on = ((image, np.maximum(labels[:], 0)) for image, labels in cases)
        for x, y in labelled_tiles(from_background_on, patch_size, device):
            features = _features(network, taps[0], x)
            accumulator.add(features, y)
            if earlier is not None:
                counts, sums = masked_sums(y, n_classes, features - _features(earlier, taps[1], x))
                shift += sums.cpu().double()
                shift_counts += counts.cpu().double()
    return accumulator, shift, shift_counts


def random_patch(image: np.ndarray, patch_size: Sequence[int], random: np.random.Generator) -> torch.Tensor:
    """A patch somewhere in an image (C, *spatial), as (1, C, *patch_size); an image that is too small is padded."""
    is_2d = len(patch_size) == 2
    patch = (1, *patch_size) if is_2d else tuple(patch_size)
    image = pad_nd_image(np.asarray(image[:]), patch, "constant", {"constant_values": 0})
    starts = [random.integers(size - p + 1) for size, p in zip(image.shape[1:], patch, strict=True)]
    piece = image[(slice(None), *(slice(start, start + p) for start, p in zip(starts, patch, strict=True)))]
    x = torch.from_numpy(np.ascontiguousarray(piece))[None].float()
    return x[:, :, 0] if is_2d else x


@torch.no_grad()
def _features(network: nn.Module, tap: FeatureTap, x: torch.Tensor) -> torch.Tensor:
    network(x)
    features = tap.features.float()
    tap.clear()
    return features


def transported(
    store: PrototypeStore,
    previous: PrototypeStore,
    shift: torch.Tensor,
    counts: torch.Tensor,
    accumulator: PrototypeAccumulator,
) -> PrototypeStore:
    """Replace the old classes' means by those of before, moved with the features and merged by counts.

    Centre and temperature become those of the new means.

    Args:
        store: re-extracted with the new model.
        previous: of the model before.
        shift: (K, D) summed difference of the features, new model minus the one before.
        counts: (K,) voxels in ``shift``.
        accumulator: the one that gave ``store``.
    """
    means, totals = store.means.copy(), store.counts.copy()
    for row, name in enumerate(store.class_names):
        if row == 0 or name not in previous.class_names or counts[row] == 0:
            continue
        old = previous.class_names.index(name)
        old_count = float(previous.counts[old])
        means[row] = transported_mean(
            previous.means[old], old_count, (shift[row] / counts[row]).numpy(), store.means[row], totals[row]
        )
        totals[row] += old_count
    centre, tau = accumulator.centre_and_temperature(means)
    return replace(store, means=means, counts=totals, centre=centre.astype(np.float32), tau=tau)
