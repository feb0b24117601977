"""The ``"cil"`` block of a plans file: all that a training needs to know about its step.

The driver writes it, the trainer reads it, and because nnU-Net stores the plans in every checkpoint the settings travel
with the model.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from nnunet_cil.labels import check_regions, classes_of
from nnunet_cil.schedule import METHOD_DEFAULTS, STORED_METHOD_DEFAULTS, Training
from nnunet_cil.step_files import CHECKPOINT

BLOCK_KEY = "cil"


@dataclass(frozen=True)
class StepBlock:
    """One step of a chain as its trainer sees it.

    Args:
        chain: name of the chain.
        step: 1-based number of the step.
        classes: class names by step, in the order learned, for steps 1..step.
        method: name of the method, e.g. ``pgcd``; only for logs and tables.
        settings: the method's coefficients, see ``schedule.METHOD_DEFAULTS``.
        training: epochs, iterations, learning rates, seed, ...
        mirror_axes: axes that augmentation and prediction may mirror; None keeps nnU-Net's choice, () means none.
        teacher: model folder of step - 1, relative to nnUNet_results; None at step 1.
        teacher_checkpoint: file name of the teacher's checkpoint in its ``fold_X``.
        network_of: trainer that builds the network, where a given model has another than nnU-Net's own of its plans.
    """

    chain: str
    step: int
    classes: tuple[tuple[str, ...], ...]
    method: str = ""
    settings: Mapping[str, Any] = field(default_factory=lambda: dict(METHOD_DEFAULTS))
    training: Training = field(default_factory=Training)
    mirror_axes: tuple[int, ...] | None = None
    teacher: str | None = None
    teacher_checkpoint: str = CHECKPOINT
    network_of: str | None = None

    @property
    def old_classes(self) -> tuple[str, ...]:
        """Names of the classes of steps 1..step-1, in the order learned."""
        return tuple(name for names in self.classes[:-1] for name in names)

    @property
    def new_classes(self) -> tuple[str, ...]:
        """Names of the classes that this step learns."""
        return self.classes[-1]

    @property
    def n_old(self) -> int:
        """Number of the teacher's outputs: background and the old classes. 1 at step 1."""
        return 1 + len(self.old_classes)

    @property
    def n_classes(self) -> int:
        """Number of the student's outputs: background, old and new classes."""
        return self.n_old + len(self.new_classes)

    def in_one_piece(self, known: Collection[str]) -> list[int]:
        """Labels of the old classes of which a pseudo-label is one component only.

        Args:
            known: classes that were in one piece in the labels that they were learned from; what ``auto`` takes.
        """
        named = self.settings["one_piece"]
        if not isinstance(named, (list, tuple)):
            named = {"auto": known, True: self.old_classes, False: ()}[named]
        return [label for label, name in enumerate(self.old_classes, 1) if name in named]

    def to_json(self) -> dict[str, Any]:
        """The block as JSON-able dict."""
        return asdict(self) | {"settings": dict(self.settings)}

    @classmethod
    def from_plans(cls, plans: Mapping[str, Any], dataset_json: Mapping[str, Any]) -> StepBlock:
        """Read and check the block of ``plans`` against ``dataset_json``.

        Plans without a block are a first step with nnU-Net's own training settings: any nnU-Net dataset can be trained
        with our trainers and be extended later.

        Raises:
            ValueError: region-based labels, labels that are not 0..n in the order learned, unknown keys, or a later
                step without a teacher.
        """
        where = f"dataset.json of {plans.get('dataset_name', 'this dataset')}"
        labels = dataset_json["labels"]
        check_regions(labels, where)
        by_value = classes_of(labels)
        raw = plans.get(BLOCK_KEY)
        if raw is None:
            untouched = Training(seed=None, checkpoint_minutes=30.0, validation_cases=sys.maxsize)
            return cls(chain="", step=1, classes=(by_value,), training=untouched)

        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(raw) - known):
            raise ValueError(
                f"plans['{BLOCK_KEY}']: got unknown keys {unknown}, expected only {sorted(known)}. "
                "The plans were written by another version of nnunet-cil: run `nnunet-cil prepare` again."
            )
        for key, names in (("settings", METHOD_DEFAULTS), ("training", {f.name for f in fields(Training)})):
            if unknown := sorted(set(raw.get(key, {})) - set(names)):
                raise ValueError(
                    f"plans['{BLOCK_KEY}']: {key}: got unknown keys {unknown}, expected only {sorted(names)}. Run "
                    "`nnunet-cil prepare` again: it writes the plans from the schedule."
                )
        block = cls(
            **dict(
                raw,
                classes=tuple(tuple(names) for names in raw["classes"]),
                settings={**STORED_METHOD_DEFAULTS, **raw["settings"]} if "settings" in raw else dict(METHOD_DEFAULTS),
                training=Training(**raw.get("training", {})),
                mirror_axes=None if raw.get("mirror_axes") is None else tuple(raw["mirror_axes"]),
            )
        )
        expected = (*block.old_classes, *block.new_classes)
        if by_value != expected or [labels[name] for name in by_value] != list(range(1, len(expected) + 1)):
            raise ValueError(
                f"{where}: got labels {dict(labels)}, expected {list(expected)} numbered 1..{len(expected)} in the "
                "order learned. Do not edit a step's dataset.json: change the schedule and run `nnunet-cil prepare`."
            )
        if block.step != len(block.classes):
            raise ValueError(
                f"plans['{BLOCK_KEY}']: got step {block.step} with classes of {len(block.classes)} steps, expected one "
                "list of classes a step."
            )
        if block.step > 1 and not block.teacher:
            raise ValueError(
                f"plans['{BLOCK_KEY}']: step {block.step} has no teacher, expected the model folder of step "
                f"{block.step - 1}. Run `nnunet-cil prepare` with the schedule."
            )
        return block
