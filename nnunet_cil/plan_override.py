"""Small networks and patches on request: a plan with other patch size, batch size, features or spacing."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nnunet_cil import nnunet_api
from nnunet_cil.schedule import MIN_STAGES, PlanOverride

logger = logging.getLogger(__name__)

SHARE_OF_BATCH_DICE = 0.25
"""nnU-Net's: where a patch holds less of an image, an organ is missing in most patches, whose Dice would each reward a
network that finds nothing; so Dice is taken over the batch."""


def apply_override(plans: Mapping[str, Any], configuration: str, override: PlanOverride) -> dict[str, Any]:
    """Plans with ``override`` applied to one configuration; everything that follows from it is derived anew.

    Strides and kernels come from nnU-Net's ``get_pool_and_conv_props``, cut to the number of ``features_per_stage``.
    The patch size is padded to a multiple of the strides, as nnU-Net pads it. Axes are in the order of the plans
    (after nnU-Net's transpose).

    Raises:
        ValueError: fewer than 3 stages (deep supervision would weigh nothing), more features than the patch allows
            stages, or a length that is not the configuration's number of axes.
    """
    plans = copy.deepcopy(dict(plans))
    if override == PlanOverride():
        return plans
    # nnU-Net resolves what a configuration inherits, and turns the older format into today's
    settings = nnunet_api.plans_manager(plans).get_configuration(configuration).configuration
    settings.pop("inherits_from", None)
    plans["configurations"][configuration] = settings
    n_axes = len(settings["patch_size"])
    for key in ("patch_size", "spacing"):
        value = getattr(override, key)
        if value is not None and len(value) != n_axes:
            raise ValueError(f"plans: {key}: got {list(value)}, expected {n_axes} entries for {configuration}.")
    if override.spacing is not None:
        factor = np.asarray(settings["spacing"]) / np.asarray(override.spacing)
        settings["median_image_size_in_voxels"] = (
            np.asarray(settings["median_image_size_in_voxels"]) * factor
        ).tolist()
        settings["spacing"] = [float(s) for s in override.spacing]
    if override.batch_size is not None:
        settings["batch_size"] = int(override.batch_size)
    if override.patch_size is not None or override.features_per_stage is not None or override.spacing is not None:
        patch_size = override.patch_size or settings["patch_size"]
        _derive_topology(settings, patch_size, override.features_per_stage)
    if configuration == "3d_fullres" and (override.patch_size is not None or override.spacing is not None):
        share = np.prod(settings["patch_size"]) / np.prod(settings["median_image_size_in_voxels"])
        settings["batch_dice"] = bool(share < SHARE_OF_BATCH_DICE)
    return plans


def _derive_topology(settings: dict[str, Any], patch_size: Sequence[int], features: Sequence[int] | None) -> None:
    arguments = settings["architecture"]["arch_kwargs"]
    strides, kernels, _ = nnunet_api.pool_and_kernels(settings["spacing"], patch_size)
    if features is None:
        before = arguments["features_per_stage"]
        features = [min(before[0] * 2**i, max(before)) for i in range(len(strides))]
    n_stages = len(features)
    if not MIN_STAGES <= n_stages <= len(strides):
        raise ValueError(
            f"plans: features_per_stage: got {n_stages} stages, expected {MIN_STAGES} to {len(strides)} for patch size "
            f"{list(patch_size)} at spacing {settings['spacing']}. Change one of the two."
        )
    strides, kernels = strides[:n_stages], kernels[:n_stages]
    multiple = np.prod(strides, axis=0)
    padded = [int(-(-size // m) * m) for size, m in zip(patch_size, multiple, strict=True)]
    if padded != list(patch_size):
        logger.warning("plans: patch size %s is padded to %s, a multiple of the strides.", list(patch_size), padded)
    settings["patch_size"] = padded
    arguments.update(
        n_stages=n_stages, features_per_stage=[int(f) for f in features], strides=strides, kernel_sizes=kernels
    )
    for key, length in (
        ("n_conv_per_stage", n_stages),
        ("n_blocks_per_stage", n_stages),
        ("n_conv_per_stage_decoder", n_stages - 1),
    ):
        if key in arguments:
            value = list(arguments[key])
            arguments[key] = (value + value[-1:] * length)[:length]
