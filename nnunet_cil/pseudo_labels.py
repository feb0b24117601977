"""Pseudo-labels: the teacher's decisions fill in the organs that a step's labels do not hold."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch

from nnunet_cil import nnunet_api

logger = logging.getLogger(__name__)


def merge_pseudo_labels(
    labels: torch.Tensor, teacher_logits: torch.Tensor, tau_old: float, tau_background: float, ignore_id: int
) -> torch.Tensor:
    """Labels of the new classes, completed by the teacher where they say background (docs/method.md, section 1).

    Args:
        labels: (B, 1, *spatial) integers; 0 is background, all else is kept as it is.
        teacher_logits: (B, n_old, *spatial).
        tau_old: smallest confidence in [0, 1] at which an old class is taken over.
        tau_background: the same for background.
        ignore_id: given to voxels on which the teacher is less sure.

    Returns:
        (B, 1, *spatial) of the dtype of ``labels``.
    """
    confidence, decision = torch.softmax(teacher_logits.float(), 1).max(1, keepdim=True)
    threshold = torch.where(decision > 0, tau_old, tau_background)
    proposed = torch.where(confidence >= threshold, decision, ignore_id).to(labels.dtype)
    return torch.where(labels == 0, proposed, labels)


class PseudoLabelCache:
    """Offline pseudo-labels of one step's preprocessed cases: segmentation and class locations, one pair a case.

    A case is made once for each teacher, setting and label file: the folder's name holds the teacher's hash and the
    settings, and a case is made again when its own preprocessed segmentation has changed.

    Args:
        folder: parent of all caches of a dataset, outside nnU-Net's data folder.
        key: everything beside the case's own labels that the result depends on; ``n_classes``, ``tau_old`` and
            ``tau_background`` among it. Voxels of which the teacher is unsure get the id ``n_classes``.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
        self.folder = folder / digest[:16]
        self.key = dict(key)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "key.json").write_text(json.dumps(dict(key), sort_keys=True, indent=1))

    def _paths(self, case: str) -> tuple[Path, Path]:
        return self.folder / f"{case}_seg.b2nd", self.folder / f"{case}.npz"

    @staticmethod
    def _source_digest(seg: np.ndarray) -> str:
        return hashlib.sha256(np.ascontiguousarray(seg).tobytes()).hexdigest()

    def has(self, case: str, seg: np.ndarray) -> bool:
        """Whether the case is there, whole, and made from this segmentation."""
        seg_path, info_path = self._paths(case)
        if not (seg_path.is_file() and info_path.is_file()):
            return False
        with np.load(info_path, allow_pickle=False) as info:
            return str(info["source"]) == self._source_digest(seg)

    def fill(
        self,
        dataset: Any,
        cases: Sequence[str],
        teacher_logits: Callable[[Any], torch.Tensor],
        patch_size: Sequence[int],
        with_annotated: bool,
        say: Callable[[str], None] = logger.info,
    ) -> int:
        """Make the cases that are not there yet; returns how many were made.

        Args:
            dataset: nnU-Net's preprocessed dataset with the step's own labels.
            teacher_logits: (C, *spatial) image -> (n_old, *spatial) logits.
            patch_size: of the training, for which the files are chunked.
            with_annotated: whether the dataset declares an ignore label.
            say: gets a line of progress now and then.
        """
        started, made, told = monotonic(), 0, monotonic()
        for number, case in enumerate(cases, 1):
            image, seg, _, _ = dataset.load_case(case)
            seg = np.asarray(seg[:])
            if self.has(case, seg):
                continue
            self._add(case, seg, teacher_logits(image), patch_size, with_annotated)
            made += 1
            if monotonic() - told > 10:
                told = monotonic()
                left = (told - started) / number * (len(cases) - number)
                say(f"pseudo-labels: case {number} of {len(cases)}, about {left:.0f} s left")
        return made

    def _add(
        self, case: str, seg: np.ndarray, logits: torch.Tensor, patch_size: Sequence[int], with_annotated: bool
    ) -> None:
        n_classes = self.key["n_classes"]
        own = torch.from_numpy(seg.astype(np.int64))[None]
        taus = (self.key["tau_old"], self.key["tau_background"])
        merged = merge_pseudo_labels(own, logits[None], *taus, ignore_id=n_classes)[0].numpy()
        locations = nnunet_api.class_locations(merged, range(1, n_classes), with_annotated)
        counts = np.bincount(merged[(merged >= 0) & (merged < n_classes)], minlength=n_classes)
        arrays = {"source": np.asarray(self._source_digest(seg)), "counts": counts}
        for label, positions in locations.items():
            name = "annotated" if isinstance(label, tuple) else f"class_{label}"
            arrays[name] = np.asarray(positions, dtype=np.int32).reshape(-1, merged.ndim)
        seg_path, info_path = self._paths(case)
        nnunet_api.save_segmentation(merged, seg_path.with_suffix(""), patch_size)
        temporary = info_path.with_suffix(".part")
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, info_path)

    def load(self, case: str) -> tuple[Any, dict[Any, np.ndarray]]:
        """Segmentation (opened, not read) and class locations of a case."""
        seg_path, info_path = self._paths(case)
        with np.load(info_path, allow_pickle=False) as info:
            names = [name for name in info.files if name.startswith("class_")]
            locations: dict[Any, np.ndarray] = {int(name[len("class_") :]): info[name] for name in names}
            if "annotated" in info.files:
                locations[(-1, 0, *sorted(locations))] = info["annotated"]
        return nnunet_api.open_segmentation(seg_path), locations

    def counts(self, cases: Sequence[str]) -> np.ndarray:
        """Voxels by class, summed over the cases; ignored voxels are not counted."""
        total = 0
        for case in cases:
            with np.load(self._paths(case)[1], allow_pickle=False) as info:
                total = total + info["counts"]
        return np.asarray(total)


class PseudoLabelDataset:
    """A preprocessed dataset of nnU-Net whose segmentations and class locations come from a cache.

    It offers what nnU-Net's data loader and our prototype extraction use: ``identifiers`` and ``load_case``.
    """

    def __init__(self, dataset: Any, cache: PseudoLabelCache) -> None:
        self._dataset = dataset
        self._cache = cache
        self.identifiers = dataset.identifiers

    def load_case(self, identifier: str) -> tuple[Any, Any, Any, dict]:
        """nnU-Net's four: image, segmentation (here y^), segmentation of the previous stage, properties."""
        image, _, previous, properties = self._dataset.load_case(identifier)
        seg, locations = self._cache.load(identifier)
        return image, seg, previous, {**properties, "class_locations": locations}

    def __getitem__(self, identifier: str) -> tuple[Any, Any, Any, dict]:
        return self.load_case(identifier)
