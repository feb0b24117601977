"""Pseudo-labels: the teacher's decisions fill in the organs that a step's labels do not hold."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acvl_utils.morphology.morphology_helper import label_with_component_sizes
from filelock import FileLock
from scipy import ndimage

from nnunet_cil import nnunet_api
from nnunet_cil.parallel import told

logger = logging.getLogger(__name__)

ENTROPY_BINS = 100
SMALLEST_THRESHOLD = 1e-3  # of entropy
VOXELS_AT_A_TIME = 10**6  # of a whole image; the probabilities of all would be as large as the logits
SHARE_IN_ONE_PIECE = 0.95
SIZE_OF_A_RIVAL = 0.5
CONFIDENCE_OF_A_TIE = 0.02

Rule = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def kept_cases_of(step: int) -> str:
    """What the key of a cache says under ``of`` if its cases are kept ones of an earlier step (``replay``)."""
    return f"kept cases of step {step}"


def by_confidence(tau_old: float, tau_background: float) -> Rule:
    """Believe a decision whose probability is at least ``tau_old``, or ``tau_background`` where it is background."""

    def accepts(probabilities: torch.Tensor, decision: torch.Tensor) -> torch.Tensor:
        return probabilities.gather(1, decision) >= torch.where(decision > 0, tau_old, tau_background)

    return accepts


def by_entropy(thresholds: torch.Tensor) -> Rule:
    """Believe a decision c whose normalised entropy is below ``thresholds[c]`` (PLOP, CVPR 2021, eq. 8).

    Args:
        thresholds: (n_old,) in [0, 1], see `median_entropies`.
    """

    def accepts(probabilities: torch.Tensor, decision: torch.Tensor) -> torch.Tensor:
        return normalised_entropy(probabilities) < thresholds.to(probabilities)[decision]

    return accepts


def only_organs(accepts: Rule) -> Rule:
    """Believe a decision where ``accepts`` does, unless it is background."""
    return lambda probabilities, decision: accepts(probabilities, decision) & (decision > 0)


def normalised_entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """(B, 1, *S) entropy of (B, n, *S) probabilities, divided by its largest value log(n)."""
    return torch.special.entr(probabilities).sum(1, keepdim=True) / math.log(probabilities.shape[1])


def entropy_histogram(labels: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """(n_old, ENTROPY_BINS) voxels that the labels call background, by the teacher's decision and entropy in [0, 1].

    Args:
        labels: (B, 1, *S).
        teacher_logits: (B, n_old, *S).
    """
    n_old = teacher_logits.shape[1]
    total = torch.zeros(n_old * ENTROPY_BINS, dtype=torch.int64, device=labels.device)
    for part in _slabs(labels.shape):
        probabilities = torch.softmax(teacher_logits[part].float(), 1)
        bins = (normalised_entropy(probabilities) * ENTROPY_BINS).long().clamp_(0, ENTROPY_BINS - 1)
        index = probabilities.argmax(1, keepdim=True) * ENTROPY_BINS + bins
        total += torch.bincount(index[labels[part] == 0], minlength=len(total))
    return total.reshape(n_old, ENTROPY_BINS)


def _slabs(shape: Sequence[int]) -> Iterator[tuple[slice, slice, slice]]:
    """Cut a batch (B, C, *spatial) along its first spatial axis into parts of about ``VOXELS_AT_A_TIME``."""
    depth = max(1, VOXELS_AT_A_TIME // max(1, math.prod(shape[3:])))
    for begin in range(0, shape[2], depth):
        yield slice(None), slice(None), slice(begin, begin + depth)


def median_entropies(histogram: torch.Tensor) -> torch.Tensor:
    """(n_old,) median entropy of each class, at least ``SMALLEST_THRESHOLD``, which a class without voxels has.

    Within the bin that holds it, it is interpolated, as if the voxels there were spread evenly.

    Args:
        histogram: (n_old, ENTROPY_BINS), see `entropy_histogram`.
    """
    half = histogram.sum(1, dtype=torch.float64) / 2
    cumulated = histogram.cumsum(1)
    number = (cumulated < half[:, None]).sum(1, keepdim=True)
    inside = histogram.gather(1, number)[:, 0]
    share = (half - (cumulated.gather(1, number)[:, 0] - inside)) / inside.clamp_min(1)
    return ((number[:, 0] + share) / ENTROPY_BINS).clamp_min(SMALLEST_THRESHOLD).float()


def rule_out(teacher_logits: torch.Tensor, classes: Sequence[Sequence[int]]) -> torch.Tensor:
    """The teacher's logits where it is known what a voxel is not: minus infinity for these classes of each sample.

    A case whose own labels hold an old class needs no pseudo-label of it: what they call background is none of it. Its
    probability goes to the other outputs in proportion, as in conditioning on what is known.

    Args:
        teacher_logits: (B, n_old, *spatial).
        classes: old classes from 1 on, by sample; if no sample has any, the logits come back as they are.
    """
    if not any(classes):
        return teacher_logits
    result = teacher_logits.clone()
    for sample, known in zip(result, classes, strict=True):
        sample[list(known)] = -math.inf
    return result


def merge_pseudo_labels(
    labels: torch.Tensor, teacher_logits: torch.Tensor, accepts: Rule, ignore_id: int
) -> torch.Tensor:
    """The step's own labels, completed by the teacher where they say background (docs/method.md, section 1).

    Args:
        labels: (B, 1, *spatial) integers; 0 is background, all else is kept as it is.
        teacher_logits: (B, n_old, *spatial).
        accepts: from probabilities (B, n_old, *spatial) and decision (B, 1, *spatial), where the teacher is believed.
        ignore_id: given to voxels on which it is not.

    Returns:
        (B, 1, *spatial) of the dtype of ``labels``.
    """
    probabilities = torch.softmax(teacher_logits.float(), 1)
    decision = probabilities.argmax(1, keepdim=True)
    proposed = torch.where(accepts(probabilities, decision), decision, ignore_id).to(labels.dtype)
    return torch.where(labels == 0, proposed, labels)


def in_one_piece(labels: np.ndarray, classes: Iterable[int], share: float = SHARE_IN_ONE_PIECE) -> dict[int, bool]:
    """Whether the largest component of each class that is there holds ``share`` of its voxels.

    As nnU-Net's postprocessing finds components: voxels that touch, by a corner at least.

    Args:
        labels: (*spatial) of a whole image.
        classes: to look at.
        share: below 1, as a slip of the pen is an island, too.
    """
    boxes = dict(enumerate(ndimage.find_objects(np.maximum(labels, 0).astype(np.int32)), 1))
    masks = {c: labels[boxes[c]] == c for c in classes if boxes.get(c) is not None}
    sizes = {c: label_with_component_sizes(mask)[1].values() for c, mask in masks.items()}
    return {c: max(found) >= share * sum(found) for c, found in sizes.items()}


def without_islands(
    merged: np.ndarray, is_proposed: np.ndarray, confidence: np.ndarray, classes: Sequence[int], ignore_id: int
) -> np.ndarray:
    """Pseudo-labels of which these classes keep one component; their other voxels are ignored.

    Of components at least half as large as the largest it is the one of which the teacher is most confident: on images
    of another kind than it knows, the largest is often not the organ. Those within 0.02 of it stay, too, as nothing
    tells them apart. Our derivation.

    Args:
        merged: (1, *spatial), the step's own labels completed by the teacher.
        is_proposed: (1, *spatial), where the teacher completed them.
        confidence: (1, *spatial), the teacher's probability of what it decided on.
        classes: old classes from 1 on that are in one piece in a whole image, see `in_one_piece`.
        ignore_id: given to the voxels that are left out.
    """
    result = merged.copy()
    proposed = np.where(is_proposed, merged, 0)[0]
    boxes = ndimage.find_objects(np.maximum(proposed, 0))
    for c, box in enumerate(boxes, 1):
        if c not in classes or box is None:
            continue
        mask = proposed[box] == c
        components, sizes = label_with_component_sizes(mask)
        rivals = [number for number, size in sizes.items() if size >= SIZE_OF_A_RIVAL * max(sizes.values())]
        means = np.asarray(ndimage.mean(confidence[0][box], components, rivals))
        kept = np.asarray(rivals)[means >= means.max() - CONFIDENCE_OF_A_TIE]
        result[0][box][mask & ~np.isin(components, kept)] = ignore_id
    return result


class PseudoLabelCache:
    """Offline pseudo-labels of one step's preprocessed cases: segmentation and class locations, one pair a case.

    A case is made once for each teacher, setting and label file: the folder's name holds the teacher's hash and the
    settings, and a case is made again when its own preprocessed segmentation has changed.

    Args:
        folder: parent of all caches of a dataset, outside nnU-Net's data folder.
        key: everything beside the case's own labels that the result depends on; ``n_classes`` among it. Voxels on
            which the teacher is not believed get the id ``n_classes``, and so do labels from ``ignored_from`` on, where
            it is there: a case of an earlier step has that step's id for ignored voxels. ``one_piece``, where it is
            there, has old classes that are in one piece.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
        self.folder = folder / digest[:16]
        self.key = dict(key)
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"key.{os.getpid()}.part"  # of its own, as another training may write the same now
        partial.write_text(json.dumps(dict(key), sort_keys=True, indent=1))
        os.replace(partial, self.folder / "key.json")

    def _paths(self, case: str) -> tuple[Path, Path]:
        return self.folder / f"{case}_seg.b2nd", self.folder / f"{case}.npz"

    @staticmethod
    def _source_digest(seg: np.ndarray, ruled_out: Sequence[int]) -> str:
        digest = hashlib.sha256(np.ascontiguousarray(seg).tobytes())
        if ruled_out:
            digest.update(repr(sorted(ruled_out)).encode())
        return digest.hexdigest()

    def has(self, case: str, seg: np.ndarray, ruled_out: Sequence[int] = ()) -> bool:
        """Whether the case is there, whole, and made from this segmentation, with these classes ruled out."""
        seg_path, info_path = self._paths(case)
        if not (seg_path.is_file() and info_path.is_file()):
            return False
        with np.load(info_path, allow_pickle=False) as info:
            return str(info["source"]) == self._source_digest(seg, ruled_out)

    def fill(
        self,
        dataset: Any,
        cases: Sequence[str],
        teacher_logits: Callable[[Any], torch.Tensor],
        accepts: Rule,
        patch_size: Sequence[int],
        with_annotated: bool,
        say: Callable[[str], None] = logger.info,
        ruled_out: Mapping[str, Sequence[int]] | None = None,
        device: torch.device | None = None,
    ) -> int:
        """Make the cases that are not there yet; returns how many were made.

        Args:
            dataset: nnU-Net's preprocessed dataset with the step's own labels.
            teacher_logits: (C, *spatial) image -> (n_old, *spatial) logits.
            accepts: where the teacher is believed, see `merge_pseudo_labels`.
            patch_size: of the training, for which the files are chunked.
            with_annotated: whether the dataset declares an ignore label.
            say: gets a line of progress now and then.
            ruled_out: old classes that a case's own labels hold, by case, see `rule_out`.
            device: that takes the decisions; None for the CPU, of which nnU-Net gives a training on CUDA one thread.
        """
        made = 0
        for case in told(cases, len(cases), lambda line: say(f"pseudo-labels: {line}")):
            image, seg, _, _ = dataset.load_case(case)
            seg, known = np.asarray(seg[:]), (ruled_out or {}).get(case, ())
            if self.has(case, seg, known):
                continue
            with FileLock(self.folder / f"{case}.lock"):  # other methods fill it meanwhile, where trainings are jobs
                if self.has(case, seg, known):
                    continue
                self._add(case, seg, known, teacher_logits(image), accepts, patch_size, with_annotated, device)
            made += 1
        return made

    def _add(
        self,
        case: str,
        seg: np.ndarray,
        ruled_out: Sequence[int],
        logits: torch.Tensor,
        accepts: Rule,
        patch_size: Sequence[int],
        with_annotated: bool,
        device: torch.device | None,
    ) -> None:
        n_classes = self.key["n_classes"]
        own = torch.from_numpy(seg.astype(np.int16))[None]
        own[own >= self.key.get("ignored_from", n_classes)] = n_classes
        merged, confidence = np.empty_like(seg, np.int16), np.empty_like(seg, np.float32)
        for part in _slabs(own.shape):
            of_teacher = rule_out(logits[None][part].to(device).float(), [ruled_out])
            completed = merge_pseudo_labels(own[part].to(device), of_teacher, accepts, n_classes)
            merged[part[1:]] = completed[0].cpu().numpy()
            confidence[part[1:]] = torch.softmax(of_teacher, 1).amax(1).cpu().numpy()
        if pieces := self.key.get("one_piece"):
            merged = without_islands(merged, own[0].numpy() == 0, confidence, pieces, n_classes)
        locations = nnunet_api.class_locations(merged, range(1, n_classes), with_annotated)
        counts = np.bincount(merged[(merged >= 0) & (merged < n_classes)], minlength=n_classes)
        arrays = {"source": np.asarray(self._source_digest(seg, ruled_out)), "counts": counts}
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


class JoinedDataset:
    """Several preprocessed datasets as one; cases of all but the first are named ``PREFIX__CASE``.

    Args:
        datasets: prefix -> dataset; the first prefix is not used.
    """

    def __init__(self, datasets: Mapping[str, Any]) -> None:
        self._where = {
            case if number == 0 else f"{prefix}__{case}": (dataset, case)
            for number, (prefix, dataset) in enumerate(datasets.items())
            for case in dataset.identifiers
        }
        self.identifiers = list(self._where)

    def load_case(self, identifier: str) -> tuple[Any, Any, Any, dict]:
        """As nnU-Net's datasets."""
        dataset, case = self._where[identifier]
        return dataset.load_case(case)
