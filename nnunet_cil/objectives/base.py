"""What a method adds to nnU-Net's segmentation loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from nnunet_cil.features import last_decoder_stage
from nnunet_cil.prototypes import PrototypeStore


class Outputs(NamedTuple):
    """What a network made of a batch.

    Attributes:
        logits: (B, K, *spatial) at full resolution.
        features: (B, D_i, *spatial_i) of each tapped module, in the order of ``Objective.feature_paths``.
    """

    logits: torch.Tensor
    features: tuple[torch.Tensor, ...] = ()


def automatic_share(n_old: int, n_classes: int) -> float:
    """1 - sqrt(new classes / all classes), background not counted (Xiao et al., CVPR 2023, eq. 8)."""
    return 1 - math.sqrt((n_classes - n_old) / (n_classes - 1))


class Objective(nn.Module):
    """Named loss terms of one method for one step; a Module, so that its state follows the device and is saved.

    Args:
        n_old: background and old classes (the teacher's outputs).
        n_classes: background, old and new classes (the student's outputs).
        settings: the method's coefficients, see ``schedule.METHOD_DEFAULTS``.
        prototypes: the teacher's, rows in the order of its outputs.
    """

    uses_teacher = True
    """Whether the teacher runs beside the student: needed for any distillation term."""
    uses_pseudo_labels = True
    """Whether the student trains on y^ (docs/method.md, section 1) or on the step's own labels."""
    uses_prototypes = False
    """Whether the teacher's prototypes are needed; they are made from its confident predictions if it has none."""
    replays = False
    """Whether cases of earlier steps are kept and trained on again."""
    pseudo_label_rule = "confidence"
    """When the teacher is believed: ``confidence`` or ``entropy``, see ``pseudo_labels``."""

    def __init__(
        self, n_old: int, n_classes: int, settings: Mapping[str, Any], prototypes: PrototypeStore | None
    ) -> None:
        super().__init__()
        self.check_settings(settings)
        self.n_old = n_old
        self.n_classes = n_classes
        self.settings = dict(settings)

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> None:
        """Refuse settings of which each is right and which do not go together with this method.

        Called before a chain is planned, too, so that no training is begun that cannot go on.

        Raises:
            ValueError: they do not.
        """
        chosen = settings["pseudo_labels"]
        if cls.pseudo_label_rule == "entropy" and chosen != "offline":
            raise ValueError(
                f"{cls.__name__}: got pseudo_labels {chosen!r}, expected 'offline': its entropy thresholds are counted "
                "over the step's cases. Give it a variant with `pseudo_labels: offline`, or leave it out."
            )

    @staticmethod
    def feature_paths(network: nn.Module) -> tuple[str, ...]:
        """Dotted paths of the modules whose output ``forward`` gets, of student and teacher alike.

        Raises:
            ValueError: the network is of a kind that cannot be extended.
        """
        return (last_decoder_stage(network),)

    def start(self, teacher: nn.Module, anchor: Mapping[str, torch.Tensor], patches: Iterator[torch.Tensor]) -> None:
        """Called once before the first iteration, also of a resumed training; most methods have no use for it.

        Args:
            teacher: its network, which must stay as it is.
            anchor: the student's state dict before its first iteration of the step.
            patches: without end, (1, C, *patch) of the step's training images.
        """

    def set_label_counts(self, counts: torch.Tensor) -> None:
        """Take the voxels by class (n_classes,) of the step's pseudo-labels; most methods have no use for them."""

    def segmentation(self, output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What nnU-Net's loss gets in place of logits (B, n_classes, *spatial) and labels (B, 1, *spatial).

        Called for each resolution of deep supervision.
        """
        return output, target

    def segmentation_weight(self, labels: torch.Tensor) -> torch.Tensor | None:
        """Factor of nnU-Net's loss, a scalar, from y^ (B, *spatial); None for 1."""
        return None

    def forward(self, student: Outputs, teacher: Outputs, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Weighted scalar terms by name, to be added to the segmentation loss.

        Args:
            student: logits (B, n_classes, *spatial), and features with their graph.
            teacher: logits (B, n_old, *spatial), and features of the same shapes.
            labels: (B, *spatial) y^; ids from n_classes on are ignored voxels.
        """
        return {}

    def parameter_terms(self, network: nn.Module) -> dict[str, torch.Tensor]:
        """Weighted scalar terms that depend on the student's parameters alone."""
        return {}

    def fusion_share(self) -> float:
        """Share of the teacher's weights in the step's final model, 0 to 1 (EWF, see ``teacher.fuse_weights``)."""
        share = self.settings["fusion"]
        return automatic_share(self.n_old, self.n_classes) if share == "auto" else float(share or 0)

    @property
    def imprints(self) -> bool:
        """Whether the head's new rows start from the prototypes of their classes (``imprinting``)."""
        return self.uses_prototypes and self.settings["new_rows"] == "prototypes"

    def labelled_new(self, labels: torch.Tensor) -> torch.Tensor:
        """Mask of the voxels that are labelled as one of the new classes."""
        return (labels >= self.n_old) & (labels < self.n_classes)
