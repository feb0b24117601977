"""The frozen model of the step before, and the growth of its head into the student's."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnunet_cil import nnunet_api
from nnunet_cil.block import BLOCK_KEY
from nnunet_cil.checkpoint import read_checkpoint
from nnunet_cil.features import last_decoder_stage
from nnunet_cil.labels import classes_of
from nnunet_cil.prototypes import PrototypeStore
from nnunet_cil.step_files import CHECKPOINT, PROTOTYPE_FILE
from nnunet_cil.untrusted import read_json

_HEAD = "decoder.seg_layers."


@dataclass(frozen=True)
class Teacher:
    """A trained model of step t-1: frozen, in eval mode, without deep supervision heads.

    Args:
        network: on the training device; no parameter requires a gradient.
        weights: the checkpoint's state dict, on the CPU.
        prototypes: what the step stored beside its checkpoint; None for a model that was not trained by us.
        sha256: of the checkpoint file.
    """

    network: nn.Module = field(repr=False)  # nnU-Net writes each attribute of a trainer into debug.json
    weights: Mapping[str, torch.Tensor] = field(repr=False)
    plans: Mapping[str, Any] = field(repr=False)
    dataset_json: Mapping[str, Any] = field(repr=False)
    configuration: str
    trainer: str
    prototypes: PrototypeStore | None = field(repr=False)
    sha256: str
    mirror_axes: tuple[int, ...] | None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Foreground classes in the order of the network's outputs."""
        return classes_of(self.dataset_json["labels"])


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def load_teacher(model_folder: Path, fold: int | str, checkpoint_name: str, device: torch.device) -> Teacher:
    """Load a model folder of nnU-Net (any trainer whose network ends in ``decoder.seg_layers``) as frozen teacher.

    Raises:
        FileNotFoundError: the folder, its plans.json or dataset.json, or the fold's checkpoint is missing.
        ValueError: the checkpoint is truncated, not one of nnU-Net, holds code, or does not fit its own plans and
            dataset.json; its trainer is not found, or has a network that cannot be extended.
    """
    checkpoint_path = model_folder / f"fold_{fold}" / checkpoint_name
    for path in (model_folder / "plans.json", model_folder / "dataset.json", checkpoint_path):
        if not path.is_file():
            raise FileNotFoundError(
                f"teacher: got no file {path}, expected the finished model of the step before. Train that step (same "
                "fold) first: `nnunet-cil run SCHEDULE` does it in order."
            )
    try:
        plans = read_json(model_folder / "plans.json", "nnU-Net's plans")
        dataset_json = read_json(model_folder / "dataset.json", "that of a model of nnU-Net")
        checkpoint = read_checkpoint(checkpoint_path)
        weights = checkpoint["network_weights"]
        configuration = checkpoint["init_args"]["configuration"]
        trainer = checkpoint["trainer_name"]
        axes = checkpoint.get("inference_allowed_mirroring_axes")
        mirror_axes = None if axes is None else tuple(int(axis) for axis in axes)
    except nnunet_api.UNREADABLE as error:
        raise ValueError(
            f"teacher: got an unreadable model at {checkpoint_path} ({type(error).__name__}: {error}), expected a "
            "checkpoint written by nnU-Net. It is truncated or of another program: train the step before again."
        ) from error
    try:
        network = nnunet_api.build_network(plans, dataset_json, configuration, trainer)
    except Exception as error:  # what stands in plans reaches many classes, which check it or fail on it
        raise ValueError(
            f"teacher: got plans in {model_folder} of which no network can be built ({type(error).__name__}: {error}), "
            "expected those that the model was trained with."
        ) from error
    last_decoder_stage(network)
    try:
        network.load_state_dict(weights)
    except Exception as error:  # as above, of what stands in the checkpoint
        raise ValueError(
            f"teacher: got weights in {checkpoint_path} that do not fit {model_folder / 'plans.json'} and dataset.json "
            f"beside it, expected those they were trained with. {(str(error) or repr(error)).splitlines()[0]}"
        ) from error
    network.to(device).eval().requires_grad_(False)
    prototype_path = checkpoint_path.with_name(PROTOTYPE_FILE)
    return Teacher(
        network=network,
        weights=weights,
        plans=plans,
        dataset_json=dataset_json,
        configuration=configuration,
        trainer=trainer,
        prototypes=PrototypeStore.load(prototype_path) if prototype_path.is_file() else None,
        sha256=sha256_of(checkpoint_path),
        mirror_axes=mirror_axes,
    )


def inherited_from(model_folder: Path, fold: int | str) -> dict[str, Any]:
    """What later steps take over from a given model beside its plans, JSON-able; the model is loaded, and so checked.

    Returns:
        ``mirror_axes`` that its prediction may mirror, and ``network_of``, the trainer that builds its network, or None
        where that is nnU-Net's own.

    Raises:
        FileNotFoundError: as `load_teacher`.
        ValueError: as `load_teacher`; so also a network that cannot be extended, or a trainer that is not found.
    """
    model = load_teacher(model_folder, fold, CHECKPOINT, torch.device("cpu"))
    network_of = (model.plans.get(BLOCK_KEY) or {}).get("network_of")
    if nnunet_api.has_own_network(model.trainer):
        network_of = model.trainer
    return {"mirror_axes": list(model.mirror_axes or ()), "network_of": network_of}


def check_teacher(
    teacher: Teacher,
    plans: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
    configuration: str,
    old_classes: Sequence[str],
) -> None:
    """Refuse a teacher whose classes, plans or input channels are not those of the step.

    Raises:
        ValueError: naming every difference, the teacher's side first.
    """
    problems = []
    if teacher.class_names != tuple(old_classes):
        problems.append(f"classes: teacher {list(teacher.class_names)}, step {list(old_classes)}")
    if teacher.configuration != configuration:
        problems.append(f"configuration: teacher {teacher.configuration}, step {configuration}")
    elif configuration in teacher.plans["configurations"]:
        mine = nnunet_api.plans_manager(plans).get_configuration(configuration).configuration
        theirs = nnunet_api.plans_manager(teacher.plans).get_configuration(configuration).configuration
        for key in sorted(set(mine) | set(theirs)):
            if key not in ("data_identifier", "batch_size") and mine.get(key) != theirs.get(key):
                problems.append(f"plans: {configuration}.{key}: teacher {theirs.get(key)}, step {mine.get(key)}")
    intensities = [f"foreground_intensity_properties_{by}" for by in ("per_channel", "by_modality")]  # now, and once
    for key in ("transpose_forward", *intensities, "image_reader_writer"):
        if teacher.plans.get(key) != plans.get(key):
            problems.append(f"plans: {key}: teacher {teacher.plans.get(key)}, step {plans.get(key)}")
    if teacher.dataset_json.get("channel_names") != dataset_json.get("channel_names"):
        channels = (teacher.dataset_json.get("channel_names"), dataset_json.get("channel_names"))
        problems.append(f"channel_names: teacher {channels[0]}, step {channels[1]}")
    if problems:
        raise ValueError(
            "teacher: got a model that does not fit this step, expected the same plans and the old classes in order:"
            "\n  "
            + "\n  ".join(problems)
            + "\nRun `nnunet-cil prepare` with the chain's schedule: it gives every step the plans of step 1."
        )


def grow_head(
    teacher: Mapping[str, torch.Tensor], student: Mapping[str, torch.Tensor], n_old: int
) -> dict[str, torch.Tensor]:
    """The student's state dict for its first iteration: the teacher's weights with new rows in every head.

    Body and old rows are copied. New rows copy the background row; the biases of background and of each of the n new
    classes become ``b_0 - log(n + 1)``, so that background and new classes together have the teacher's background
    probability. Source: Cermelli et al., "Modeling the Background" (MiB), CVPR 2020, eq. 9-10.

    Args:
        teacher: state dict with ``decoder.seg_layers.*`` of ``n_old`` rows.
        student: state dict of the grown network; gives the shapes, its values are not used.
        n_old: background and old classes.

    Raises:
        ValueError: keys differ, or a tensor other than the head's rows has another shape.
    """
    if set(teacher) != set(student):
        odd = sorted(set(teacher) ^ set(student))
        raise ValueError(
            f"teacher: got a network whose parameters differ from the student's in {odd[:4]}{' ...' * (len(odd) > 4)}, "
            "expected the same architecture. Use the plans that the teacher was trained with."
        )
    grown = {}
    for key, target in student.items():
        source = teacher[key].to(target.device)
        if _HEAD in key and source.shape[0] == n_old and source.shape[1:] == target.shape[1:]:
            n_new = target.shape[0] - n_old
            rows = torch.cat([source, source[:1].expand(n_new, *source.shape[1:])]).clone()
            if key.endswith(".bias"):
                rows[0] -= math.log(n_new + 1)
                rows[n_old:] -= math.log(n_new + 1)
            grown[key] = rows
        elif source.shape == target.shape:
            grown[key] = source.clone()
        else:
            raise ValueError(
                f"teacher: got {key} of shape {tuple(source.shape)}, the student has {tuple(target.shape)}; only the "
                f"rows of {_HEAD}* may grow. Use the plans that the teacher was trained with."
            )
    return grown


@torch.no_grad()
def fuse_weights(student: nn.Module, teacher: Mapping[str, torch.Tensor], share: float) -> None:
    """Move the student's parameters towards the teacher's: ``share * teacher + (1 - share) * student``.

    Source: endpoints weight fusion, Xiao et al., "Endpoints Weight Fusion for Class Incremental Semantic Segmentation",
    CVPR 2023, eq. 6. Rows of the head that the teacher does not have stay as trained; buffers too.

    Args:
        student: not wrapped by DistributedDataParallel or torch.compile.
        teacher: state dict with all parameters of the student.
        share: of the teacher, 0 (nothing changes) to 1 (the old outputs become the teacher's).
    """
    for name, parameter in student.named_parameters():
        source = teacher[name].to(parameter)
        parameter[: len(source)].lerp_(source, share)
