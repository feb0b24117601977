"""PGCD and DAPD (arXiv:2511.07749): distillation calibrated by prototypes, and alignment of prototypes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from nnunet_cil.losses.dapd import DAPDLoss
from nnunet_cil.losses.pgcd import PGCDLoss
from nnunet_cil.objectives.base import Objective
from nnunet_cil.prototypes import PrototypeStore, RunningBackground, masked_sums


def class_balance(counts: torch.Tensor, largest: float) -> torch.Tensor:
    """Weight b_c of each class: inverse frequency, at most ``largest``, mean 1 over voxels. Our derivation.

    Args:
        counts: (n,) voxels by class; a class without voxels gets weight 1.
        largest: bound, above 1.
    """
    frequency = counts.double() / counts.sum().clamp_min(1)
    present = frequency > 0
    weights = torch.where(present, 1 / frequency.clamp_min(1e-12), 0.0)
    low, high = 0.0, 1.0
    for _ in range(60):
        scale = (low + high) / 2
        too_large = (frequency * (weights * scale).clamp_max(largest)).sum() > 1
        low, high = (low, scale) if too_large else (scale, high)
    return torch.where(present, (weights * high).clamp_max(largest), 1.0).float()


class PGCD(Objective):
    """The paper's method in our reading: terms of sections 5 to 8 of docs/method.md on top of pseudo-labels.

    Raises:
        ValueError: ``class_balance`` without offline pseudo-labels (their frequencies are fixed over the step), or no
            prototypes.
    """

    uses_prototypes = True

    def __init__(
        self, n_old: int, n_classes: int, settings: Mapping[str, Any], prototypes: PrototypeStore | None
    ) -> None:
        super().__init__(n_old, n_classes, settings, prototypes)
        if prototypes is None or prototypes.means.shape[0] != n_old:
            got = "none" if prototypes is None else f"{prototypes.means.shape[0]}"
            raise ValueError(f"prototypes: got {got}, expected {n_old}: background and one for each old class.")
        means = torch.from_numpy(prototypes.means).float().nan_to_num()
        self.register_buffer("means", means)
        self.register_buffer("usable", torch.from_numpy(prototypes.usable))
        self.all_usable = bool(prototypes.usable.all())
        self.register_buffer("centre", torch.from_numpy(prototypes.centre).float())
        self.register_buffer("tau", torch.tensor(float(prototypes.tau)))
        self.background = RunningBackground(means[0].clone(), momentum=settings["mu"])
        self.pgcd = PGCDLoss(
            n_old,
            w_max=settings["w_max"],
            eta=settings["eta"],
            spatial=settings["pgcd_spatial"],
            calibrated=settings["calibration"] == "prototypes",
            voxel_stride=settings["voxel_stride"],
        )
        self.dapd = DAPDLoss(settings["n_min"])
        scale = math.sqrt(n_old / (n_classes - n_old)) if settings["scale_by_classes"] else 1.0
        self.lambda_pgcd = scale * settings["lambda_pgcd"]
        self.lambda_dapd = scale * settings["lambda_dapd"]

    @classmethod
    def check_settings(cls, settings):
        super().check_settings(settings)
        if settings["class_balance"] and settings["pseudo_labels"] != "offline":
            raise ValueError(
                f"method: class_balance: got pseudo_labels {settings['pseudo_labels']!r}, expected 'offline': the "
                "balance is counted once over the step's pseudo-labels. Change one of the two."
            )

    def set_label_counts(self, counts: torch.Tensor) -> None:
        if self.settings["class_balance"]:
            weights = class_balance(counts[: self.n_old], self.settings["class_balance_max"])
            self.pgcd.set_balance(weights.to(self.means.device))

    def forward(self, student, teacher, labels):
        features = (student.features[0], teacher.features[0].detach())
        counts, *sums = masked_sums(labels, self.n_old, *features)
        self.background.update(sums[self.settings["background_features"] == "teacher"][0], counts[0])
        prototypes = torch.cat([self.background.prototype[None], self.means[1:]])
        terms = {}
        if self.lambda_pgcd:
            calibrated = self.pgcd(
                student.logits,
                teacher.logits,
                *features,
                labels,
                prototypes,
                self.centre,
                None if self.all_usable else self.usable,
                self.tau,
            )
            terms |= {name: self.lambda_pgcd * value for name, value in calibrated.items()}
        if self.lambda_dapd:
            aligned = self.dapd(counts, *sums, prototypes, self.usable, self.centre)
            terms |= {name: self.lambda_dapd * value for name, value in aligned.items() if self.settings[name]}
        return terms
