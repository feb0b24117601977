"""What the benchmarks run on: made-up plans, a teacher with random weights on disk, a batch, and the trainers on them.

Time and memory of a step depend on shapes, hardly on values, so nothing here is trained.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from nnunet_cil.schedule import METHOD_DEFAULTS

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
CONFIGURATION = "3d_fullres"
TEACHER = "Dataset001_Old/nnUNetTrainerPGCD__nnUNetPlans__3d_fullres"


@dataclass(frozen=True)
class Network:
    """A 3d_fullres plan: patch and batch size, features by stage, spacing in mm (which decides the strides)."""

    patch_size: tuple[int, int, int]
    features: tuple[int, ...]
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    batch_size: int = 2


NETWORKS = {
    "hippocampus": Network((40, 56, 40), (8, 16, 32, 64)),
    "chaos": Network((32, 96, 96), (8, 16, 32, 64, 64), (7.7, 2.5, 2.5)),
    "standard64": Network((64, 64, 64), (32, 64, 128, 256, 320)),
    "standard128": Network((128, 128, 128), (32, 64, 128, 256, 320, 320)),
    "tiny": Network((16, 16, 16), (4, 8, 8)),
}


def set_folders(root: Path) -> None:
    """Point nnU-Net to folders under ``root``; before anything of nnunetv2 is imported."""
    from nnunet_cil.environment import trainer_path_variable

    for name in FOLDERS:
        os.environ[name] = str(root / name)
        (root / name).mkdir(parents=True, exist_ok=True)
    os.environ["nnUNet_extTrainer"] = trainer_path_variable()  # noqa: SIM112  (nnU-Net's spelling)


def plans_of(network: Network, dataset: str) -> dict[str, Any]:
    """nnU-Net's plans for ``network``."""
    from nnunet_cil import nnunet_api

    strides, kernels, _ = nnunet_api.pool_and_kernels(network.spacing_mm, network.patch_size)
    n = len(network.features)
    resampling = "resample_data_or_seg_to_shape"
    orders = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": network.batch_size,
        "patch_size": list(network.patch_size),
        "median_image_size_in_voxels": list(network.patch_size),
        "spacing": list(network.spacing_mm),
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        **{f"resampling_fn_{what}": resampling for what in ("data", "seg", "probabilities")},
        **{f"resampling_fn_{what}_kwargs": orders for what in ("data", "seg", "probabilities")},
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": n,
                "features_per_stage": list(network.features),
                "conv_op": "torch.nn.modules.conv.Conv3d",
                "kernel_sizes": kernels[:n],
                "strides": strides[:n],
                "n_conv_per_stage": [2] * n,
                "n_conv_per_stage_decoder": [2] * (n - 1),
                "conv_bias": True,
                "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": False,
    }
    return {
        "dataset_name": dataset,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": list(network.spacing_mm),
        "original_median_shape_after_transp": list(network.patch_size),
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {CONFIGURATION: configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {}},
        "continue_training": False,
    }


def dataset_json(n_classes: int) -> dict[str, Any]:
    """dataset.json with ``n_classes`` foreground classes."""
    labels = {"background": 0, **{f"class_{c:03d}": c for c in range(1, n_classes + 1)}}
    return {"channel_names": {"0": "MR"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}


def _block(n_classes: int, step: int, method: str, amp: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := sorted(set(settings) - set(METHOD_DEFAULTS)):
        raise ValueError(f"--contestants: got the settings {unknown}, expected some of {sorted(METHOD_DEFAULTS)}.")
    names = list(dataset_json(n_classes)["labels"])[1:]
    return {
        "chain": "benchmark",
        "step": step,
        "classes": [names[: n_classes - step + 1], *([name] for name in names[n_classes - step + 1 :])],
        "method": method,
        "settings": {**METHOD_DEFAULTS, **settings},
        "training": {"amp": amp, "seed": 0},
        "teacher": None if step == 1 else TEACHER,
    }


def _trainer(trainer_class: Any, plans: dict[str, Any], labels: dict[str, Any], device: torch.device) -> Any:
    folder = Path(os.environ["nnUNet_preprocessed"], plans["dataset_name"])  # noqa: SIM112  (nnU-Net's spelling)
    data = folder / "nnUNetPlans_3d_fullres"
    data.mkdir(parents=True, exist_ok=True)
    (data / "none.b2nd").touch()  # from which nnU-Net infers the file type
    (folder / "dataset.json").write_text(json.dumps(labels))
    trainer = trainer_class(plans, CONFIGURATION, 0, labels, device)
    trainer.print_to_log_file = lambda *args, **kwargs: None
    trainer.initialize()
    trainer.network.train()
    return trainer


def stock_trainer(network: Network, n_classes: int, device: torch.device) -> Any:
    """nnU-Net's own trainer for all classes."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    return _trainer(nnUNetTrainer, plans_of(network, "Dataset002_New"), dataset_json(n_classes), device)


def write_teacher(network: Network, n_classes: int, device: torch.device) -> None:
    """The model of step 1 with random weights: it knows all classes but the last, and has prototypes."""
    from nnunet_cil.prototypes import PrototypeAccumulator
    from nnunet_cil.trainer import IncrementalTrainer

    labels = dataset_json(n_classes - 1)
    plans = {**plans_of(network, "Dataset001_Old"), "cil": _block(n_classes - 1, 1, "pgcd", "off", {})}
    trainer = _trainer(IncrementalTrainer, plans, labels, device)
    folder = Path(os.environ["nnUNet_results"], TEACHER)  # noqa: SIM112  (nnU-Net's spelling)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(labels))
    trainer.save_checkpoint(str(folder / "fold_0" / "checkpoint_final.pth"))
    accumulator = PrototypeAccumulator(n_classes, network.features[0])
    own, noise = (
        torch.randn(1, network.features[0], n_classes, 1, 1),
        torch.randn(1, network.features[0], n_classes, 16, 16),
    )
    features = own + 0.5 * noise  # told apart with a temperature as of real organs: a tiny one makes exp slow
    accumulator.add(features, torch.arange(n_classes)[None, :, None, None].expand(1, -1, 16, 16))
    names = list(labels["labels"])
    accumulator.finish(names, 1, "", "decoder.stages", None).save(folder / "fold_0" / "prototypes.npz")


def incremental_trainer(
    network: Network,
    n_classes: int,
    device: torch.device,
    method: str,
    amp: str,
    step: int = 2,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """The trainer of a step that learns the last class, with its teacher loaded; each step before learned one, too.

    Raises:
        ValueError: ``settings`` has a key that no method has.
    """
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunet_cil.chain import method_of
    from nnunet_cil.environment import trainers_dir

    names = {method_of(path.stem): path.stem for path in trainers_dir().glob("nnUNetTrainer*.py")}
    plans = {**plans_of(network, "Dataset002_New"), "cil": _block(n_classes, step, method, amp, settings)}
    trainer_class = recursive_find_trainer_class_by_name(names[method])
    trainer = _trainer(trainer_class, plans, dataset_json(n_classes), device)
    trainer._load_teacher()
    trainer._build_objective(_OneCase(network, n_classes))
    return trainer


class _OneCase:
    """In place of nnU-Net's dataset, for what a method does before its first iteration."""

    identifiers = ("noise",)

    def __init__(self, network: Network, n_classes: int) -> None:
        rng, shape = np.random.default_rng(0), (1, *network.patch_size)
        self._case = (rng.normal(size=shape).astype(np.float32), rng.integers(0, n_classes + 1, shape))

    def load_case(self, identifier: str) -> tuple[np.ndarray, np.ndarray]:
        return self._case


def batch_of(network: Network, n_classes: int, device: torch.device) -> dict[str, Any]:
    """A batch with all classes in blocks, as the data loader gives it: targets at each resolution.

    About as much is background as in training patches of CHAOS.
    """
    from nnunet_cil import nnunet_api

    strides, _, _ = nnunet_api.pool_and_kernels(network.spacing_mm, network.patch_size)
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, n_classes + 1, (network.batch_size, 1, *(-(-s // 8) for s in network.patch_size)))
    blocks[rng.random(blocks.shape) < 0.85] = 0
    full = blocks.repeat(8, 2).repeat(8, 3).repeat(8, 4)
    full = torch.from_numpy(full[:, :, : network.patch_size[0], : network.patch_size[1], : network.patch_size[2]])
    full = full.to(torch.int16)
    target, step = [full], np.ones(3, int)
    for stride in strides[1 : len(network.features) - 1]:
        step = step * stride
        target.append(full[:, :, :: step[0], :: step[1], :: step[2]].contiguous())
    data = torch.randn(network.batch_size, 1, *network.patch_size, generator=torch.Generator().manual_seed(0))
    return {"data": data.to(device), "target": [t.to(device) for t in target]}


def machine(device: torch.device) -> str:
    """The processor that was measured, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{(model or ['unknown CPU'])[0]}, {torch.get_num_threads()} threads"


def _cpuinfo() -> Sequence[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else ()
