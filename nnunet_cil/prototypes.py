"""Class prototypes: local ones of a batch, the running one of the background, and the stored global ones of a step.

Sections 2 to 4 of docs/method.md.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from nnunet_cil.losses.chunked import chunks
from nnunet_cil.losses.distillation import at_least_float32
from nnunet_cil.ranks import add_up, are_several, gathered, reduced, this_rank

TARGET_CONFIDENCE = 0.9
TEMPERATURES = (1e-3, 10.0)
FALLBACK_TEMPERATURE = 0.1
MAX_BYTES = 100_000_000  # of stored prototypes


class _MaskedSums(torch.autograd.Function):
    """Sums by class as matrix products of one-hot labels and features, piece by piece; the gradient is a look-up."""

    @staticmethod
    def forward(ctx: Any, labels: torch.Tensor, n_classes: int, *features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        flat, label = [f.detach().flatten(2) for f in features], labels.flatten(1).to(torch.int16)  # compared faster
        dtype = at_least_float32(flat[0][..., :1]).dtype
        counts = torch.zeros(n_classes, dtype=dtype, device=labels.device)
        sums = [counts.new_zeros(n_classes, f.shape[1]) for f in flat]
        classes = torch.arange(n_classes, dtype=label.dtype, device=labels.device)[:, None]
        for b, where in chunks(flat[0], max(n_classes, flat[0].shape[1])):
            mask = (label[b, where] == classes).to(dtype)
            counts += mask.sum(1)
            for total, f in zip(sums, flat, strict=True):
                total += mask @ at_least_float32(f[b, :, where]).mT
        ctx.save_for_backward(labels)
        ctx.layouts = [(f.stride(1) == 1, f.dtype) for f in features]
        fixed = [s for s, wanted in zip(sums, ctx.needs_input_grad[2:], strict=True) if not wanted]
        ctx.mark_non_differentiable(counts, *fixed)
        return counts, *sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: torch.Tensor, *grad_sums: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (labels,) = ctx.saved_tensors
        n_classes = grad_sums[0].shape[0]
        index = torch.where((labels < 0) | (labels >= n_classes), n_classes, labels)
        gradients = []
        for (channels_last, dtype), grad, wanted in zip(ctx.layouts, grad_sums, ctx.needs_input_grad[2:], strict=True):
            rows = torch.cat([grad, torch.zeros_like(grad[:1])]).to(dtype)
            if not wanted:
                gradients.append(None)
            elif channels_last:
                gradients.append(rows.index_select(0, index.flatten()).unflatten(0, index.shape).movedim(-1, 1))
            else:
                gradients.append(rows.mT[:, index].movedim(0, 1))
        return None, None, *gradients


def masked_sums(labels: torch.Tensor, n_classes: int, *features: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Number of voxels of each class, and the sums of their features. Under autocast too, never in half precision.

    Args:
        labels: (B, *S) integers; values outside [0, n_classes) are left out.
        n_classes: K.
        features: (B, D_i, *S) each; differentiable.

    Returns:
        Counts (K,), and for each of the features sums (K, D_i), float32 or that of float64 features; zeros for a class
        without voxels.
    """
    with torch.autocast(labels.device.type, enabled=False):
        return _MaskedSums.apply(labels, n_classes, *features)


def class_means(sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Masked average pooling from ``masked_sums``: mean feature (K, D) of each class, zero for one without voxels."""
    return sums / counts.clamp_min(1)[:, None]


class RunningBackground(nn.Module):
    """The dynamic background prototype: p <- mu p + (1 - mu) mean, over voxels that are background now (section 4).

    Args:
        prototype: (D,) start value.
        momentum: mu in [0, 1].
    """

    prototype: torch.Tensor

    def __init__(self, prototype: torch.Tensor, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("prototype", prototype.detach().clone())

    @torch.no_grad()
    def update(self, total: torch.Tensor, count: torch.Tensor) -> None:
        """Take in a batch; sums and counts go over all ranks. No gradient.

        A batch without background changes nothing, nor does one with a feature that is not finite: float16 overflows in
        an iteration now and then, which the loss's scaler leaves out as well.

        Args:
            total: (D,) sum of the features over the batch's background.
            count: () its voxels.
        """
        both = add_up(torch.cat([total, count[None]]).to(self.prototype.dtype))
        moved = self.momentum * self.prototype + (1 - self.momentum) * both[:-1] / both[-1].clamp_min(1)
        self.prototype.copy_(torch.where((both[-1] > 0) & both.isfinite().all(), moved, self.prototype))


@dataclass(frozen=True)
class PrototypeStore:
    """Global prototypes of a step's final model, as they lie in ``prototypes.npz`` beside its checkpoint.

    Args:
        class_names: index is the label; background first.
        means: (K, D) float32; NaN for a class that never had a voxel.
        counts: (K,) voxels; 0 for a class without any.
        spread: (K,) root mean squared distance of a class's features to their mean.
        centre: (D,) mean of the usable prototypes; cosines are taken after subtracting it.
        tau: temperature of the assignment, in cosine units.
        stale: (K,) taken over from the step before, because the class had no voxel.
        step: 1-based number of the step.
        checkpoint_sha256: of the checkpoint the features come from.
        feature_path: module whose output was pooled.
        in_one_piece: names of the classes that were so in all labels of the step that learned them, see
            ``pseudo_labels.in_one_piece``.
        of_bare_labels: taken with a later step's own labels alone, where old organs are background: no teacher's.
    """

    class_names: tuple[str, ...]
    means: np.ndarray
    counts: np.ndarray
    spread: np.ndarray
    centre: np.ndarray
    tau: float
    stale: np.ndarray
    step: int
    checkpoint_sha256: str
    feature_path: str
    in_one_piece: tuple[str, ...] = ()
    of_bare_labels: bool = False

    @property
    def usable(self) -> np.ndarray:
        """(K,) classes with a finite prototype."""
        return np.isfinite(self.means).all(1)

    def save(self, path: Path) -> None:
        """Write the npz, without object arrays, whole or not at all: beside ``path`` first, then moved onto it."""
        arrays = {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}
        partial = path.with_name(path.name + ".part")
        with open(partial, "wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> PrototypeStore:
        """Read and check an npz; nothing in it is unpickled.

        Raises:
            ValueError: the file is truncated, or its content is not a consistent set of prototypes.
        """
        try:
            with zipfile.ZipFile(path) as zipped:
                if (size := sum(entry.file_size for entry in zipped.infolist())) > MAX_BYTES:
                    raise ValueError(f"{size} bytes unpacked")
            with np.load(path, allow_pickle=False) as file:
                raw = {f.name: file[f.name] for f in fields(cls) if f.name in file or f.default is MISSING}
            store = cls(
                class_names=tuple(str(name) for name in raw["class_names"]),
                means=raw["means"].astype(np.float32),
                counts=raw["counts"].astype(np.float64),
                spread=raw["spread"].astype(np.float32),
                centre=raw["centre"].astype(np.float32),
                tau=float(raw["tau"]),
                stale=raw["stale"].astype(bool),
                step=int(raw["step"]),
                checkpoint_sha256=str(raw["checkpoint_sha256"]),
                feature_path=str(raw["feature_path"]),
                in_one_piece=tuple(str(name) for name in raw.get("in_one_piece", ())),
                of_bare_labels=bool(raw.get("of_bare_labels", False)),
            )
        except Exception as error:  # a damaged file makes zipfile and numpy raise a dozen kinds
            raise ValueError(
                f"{path}: got no readable prototypes ({type(error).__name__}: {error}), expected the file that the end "
                "of a training writes. Train that step again, or remove the file to use the teacher's predictions."
            ) from error
        problems = store._problems()
        if problems:
            raise ValueError(f"{path}: got {'; '.join(problems)}. Train that step again.")
        return store

    def _problems(self) -> list[str]:
        n, d = len(self.class_names), self.centre.size
        shapes = {"means": (n, d), "counts": (n,), "spread": (n,), "centre": (d,), "stale": (n,)}
        wrong = [
            f"{name} of shape {getattr(self, name).shape}, expected {shape}"
            for name, shape in shapes.items()
            if getattr(self, name).shape != shape or 0 in shape
        ]
        if wrong:
            return wrong
        known = (self.counts > 0) | self.stale
        finite = {
            "means of classes with voxels": self.means[known],
            "spread of classes with voxels": self.spread[known],
            "counts": self.counts,
            "centre": self.centre,
            "tau": self.tau,
        }
        wrong = [f"{name} that are not finite" for name, values in finite.items() if not np.isfinite(values).all()]
        if self.tau <= 0:
            wrong.append(f"tau {self.tau}, expected a positive number")
        if (self.counts < 0).any():
            wrong.append("negative counts")
        if unknown := sorted({*self.in_one_piece} - {*self.class_names[1:]}):
            wrong.append(f"unknown classes in one piece, {unknown}")
        return wrong


class PrototypeAccumulator:
    """Sums, squared norms, counts and a bounded random sample of the features of each class, in float64.

    Args:
        n_classes: K.
        n_features: D.
        samples_per_class: size of the random sample, on which the temperature is chosen.
        seed: of the sample.
    """

    def __init__(self, n_classes: int, n_features: int, samples_per_class: int = 4096, seed: int = 0) -> None:
        self.sums = torch.zeros(n_classes, n_features, dtype=torch.float64)
        self.squares = torch.zeros(n_classes, dtype=torch.float64)
        self.counts = torch.zeros(n_classes, dtype=torch.float64)
        self._limit = samples_per_class
        self._rng = np.random.default_rng([seed, this_rank()])
        self._samples = [np.zeros((0, n_features)) for _ in range(n_classes)]
        self._keys = [np.zeros(0) for _ in range(n_classes)]

    @torch.no_grad()
    def add(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Take in features (B, D, *S) with labels (B, *S); labels outside [0, K) are left out."""
        n_classes = len(self.counts)
        if features.device.type == "mps":  # has no float64
            features, labels = features.cpu(), labels.cpu()
        features = features.detach().double()
        found = masked_sums(labels, n_classes, features, features.square().sum(1, keepdim=True))
        counts, sums, squares = (each.cpu() for each in found)
        self.sums += sums
        self.squares += squares[:, 0]
        self.counts += counts
        rows, label = features.movedim(1, -1).flatten(0, -2), labels.flatten()
        for c in torch.nonzero(counts)[:, 0].tolist():
            keys = self._rng.random(int(counts[c]))
            bound = self._keys[c].max() if len(self._keys[c]) == self._limit else 1.0
            chosen = np.flatnonzero(keys < bound)
            where = torch.nonzero(label == c)[:, 0][torch.from_numpy(chosen).to(label.device)]
            self._sample(c, keys[chosen], rows[where].cpu().numpy())

    def _sample(self, c: int, keys: np.ndarray, samples: np.ndarray) -> None:
        """Keep the features with the smallest random keys: a uniform sample of all that were offered."""
        keys, samples = np.concatenate([self._keys[c], keys]), np.concatenate([self._samples[c], samples])
        if len(keys) > self._limit:
            smallest = np.argpartition(keys, self._limit - 1)[: self._limit]
            keys, samples = keys[smallest], samples[smallest]
        self._keys[c], self._samples[c] = keys, samples

    def reduce(self) -> None:
        """Add up over distributed ranks and sample from all of them; without a process group nothing changes."""
        if not are_several():
            return
        for name in ("sums", "squares", "counts"):
            setattr(self, name, reduced(getattr(self, name)))
        of_all = gathered((self._keys, self._samples))
        for c in range(len(self.counts)):
            self._keys[c], self._samples[c] = self._keys[c][:0], self._samples[c][:0]
            for keys, samples in of_all:
                self._sample(c, keys[c], samples[c])

    def finish(
        self,
        class_names: Sequence[str],
        step: int,
        checkpoint_sha256: str,
        feature_path: str,
        previous: PrototypeStore | None,
    ) -> PrototypeStore:
        """The global prototypes; a class without voxels keeps that of ``previous``, marked stale, or is NaN.

        Raises:
            ValueError: another number of names than of classes, or not one voxel of any class.
        """
        if len(class_names) != len(self.counts):
            raise ValueError(f"class_names: got {list(class_names)}, expected {len(self.counts)} names.")
        counts = self.counts.numpy().copy()
        with np.errstate(invalid="ignore", divide="ignore"):
            means = self.sums.numpy() / counts[:, None]
            variance = self.squares.numpy() / counts - (means**2).sum(1)
        spread = np.sqrt(np.maximum(variance, 0))
        stale = np.zeros(len(counts), bool)
        for row in np.flatnonzero(counts == 0):
            if previous is not None and class_names[row] in previous.class_names:
                old = previous.class_names.index(class_names[row])
                means[row], spread[row] = previous.means[old], previous.spread[old]
                stale[row] = np.isfinite(means[row]).all()
        if not np.isfinite(means).all(1).any():
            raise ValueError("prototypes: got no voxel of any class, expected at least background. Check the labels.")
        centre, tau = self.centre_and_temperature(means)
        return PrototypeStore(
            class_names=tuple(class_names),
            means=means.astype(np.float32),
            counts=counts,
            spread=spread.astype(np.float32),
            centre=centre.astype(np.float32),
            tau=tau,
            stale=stale,
            step=step,
            checkpoint_sha256=checkpoint_sha256,
            feature_path=feature_path,
        )

    def centre_and_temperature(self, means: np.ndarray) -> tuple[np.ndarray, float]:
        """Mean (D,) of the prototypes (K, D) without NaN, and their temperature on the sampled features."""
        centre = means[np.isfinite(means).all(1)].mean(0)
        labels = np.repeat(np.arange(len(self.counts)), [len(samples) for samples in self._samples])
        return centre, choose_temperature(np.concatenate(self._samples), labels, means, centre)


def choose_temperature(
    samples: np.ndarray,
    labels: np.ndarray,
    means: np.ndarray,
    centre: np.ndarray,
    target: float = TARGET_CONFIDENCE,
) -> float:
    """Temperature at which the median assignment of a voxel to its own class is ``target`` (section 5).

    Args:
        samples: (N, D) features.
        labels: (N,) their classes.
        means: (K, D) prototypes; NaN rows are left out, with their samples.
        centre: (D,).
        target: between 1 / K and 1.

    Returns:
        Between 1e-3 and 10; 10, where all assignments are about equal, if no temperature reaches the target, as most
        voxels are nearest to another class's prototype; 0.1 with fewer than two usable classes or without samples.
    """
    usable = np.flatnonzero(np.isfinite(means).all(1))
    known = np.isin(labels, usable)
    samples, labels = samples[known], labels[known]
    if len(usable) < 2 or len(samples) == 0:
        return FALLBACK_TEMPERATURE
    directions = means[usable] - centre
    directions /= np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), 1e-8)
    centred = samples - centre
    cosine = centred @ directions.T / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-8)
    own = np.searchsorted(usable, labels)

    def median_confidence(tau: float) -> float:
        margins = (cosine - cosine[np.arange(len(own)), own][:, None]) / tau
        return float(np.median(1 / np.exp(np.minimum(margins, 700)).sum(1)))

    sharpest, flattest = TEMPERATURES
    if median_confidence(sharpest) <= target:
        return flattest
    low, high = np.log(sharpest), np.log(flattest)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if median_confidence(np.exp(middle)) > target else (low, middle)
    return float(np.exp((low + high) / 2))


def transported_mean(
    old_mean: np.ndarray, old_count: float, mean_shift: np.ndarray, new_mean: np.ndarray, new_count: float
) -> np.ndarray:
    """The mean of before, moved with the features, merged by counts with the re-extracted one (section 2).

    Our derivation. All means (D,). A count of zero leaves its side out; both zero give the moved old mean.
    """
    moved = old_mean + mean_shift
    if new_count == 0:
        return moved
    if old_count == 0:
        return new_mean
    return (old_count * moved + new_count * new_mean) / (old_count + new_count)
