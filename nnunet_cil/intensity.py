"""CT intensities: by what nnU-Net clips and normalises, and a warning for organs that the window of step 1 cuts off."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nnunet_cil import nnunet_api
from nnunet_cil.schedule import Intensity
from nnunet_cil.untrusted import dataset_json_of

logger = logging.getLogger(__name__)

CLIPPED_SHARE_TO_WARN = 0.05
_PROPERTIES = "foreground_intensity_properties_per_channel"


class _CaseFiles(Protocol):
    images: tuple[Path, ...]
    label: Path
    table: Mapping[int, int]


def set_intensity(plans: Mapping[str, Any], intensity: Intensity, raw: Path) -> dict[str, Any]:
    """Plans whose intensity properties follow the schedule's ``intensity``.

    ``step1`` keeps nnU-Net's own, from the foreground of step 1. ``whole_image`` takes them from all voxels inside the
    body (above each image's lowest value) of step 1's images, between the 0.05th and the 99.95th percentile, so that
    organs of later steps are inside. ``given`` takes the schedule's numbers.
    """
    plans = copy.deepcopy(dict(plans))
    if intensity.mode == "given":
        for channel, values in (intensity.given or {}).items():
            plans[_PROPERTIES][str(channel)] = {**plans[_PROPERTIES][str(channel)], **values}
    elif intensity.mode == "whole_image":
        plans[_PROPERTIES].update(_whole_image_properties(raw, len(plans[_PROPERTIES])))
    return plans


def _whole_image_properties(raw: Path, n_channels: int) -> dict[str, dict[str, float]]:
    rng = np.random.default_rng(0)
    samples: list[list[np.ndarray]] = [[] for _ in range(n_channels)]
    dataset_json = dataset_json_of(raw)
    for images, _ in nnunet_api.training_cases(raw).values():
        reader = nnunet_api.reader_writer(dataset_json, images[0])
        data, _ = reader.read_images([str(path) for path in images])
        for channel in range(n_channels):
            inside = data[channel][data[channel] > data[channel].min()]
            samples[channel].append(rng.choice(inside, 20_000) if inside.size else inside)
    properties = {}
    for channel, parts in enumerate(samples):
        values = np.concatenate(parts).astype(np.float64)
        properties[str(channel)] = nnunet_api.intensity_properties(values, tail_percent=0.05)
    return properties


def warn_of_clipping(
    plans: Mapping[str, Any],
    configuration: str,
    dataset_json: Mapping[str, Any],
    cases: Sequence[_CaseFiles],
    names: Mapping[int, str],
    step: int,
) -> dict[str, float]:
    """Share of each class's voxels outside the CT window of the plans; logs a warning above 5 %.

    Args:
        dataset_json: of the raw dataset that the cases come from.
        cases: of this step, all of which are read.
        names: label value -> class name.

    Returns:
        Largest share over the CT channels by class name; empty without a CT channel or without voxels.
    """
    manager = nnunet_api.plans_manager(plans)
    schemes = manager.get_configuration(configuration).normalization_schemes
    channels = [index for index, scheme in enumerate(schemes) if scheme == "CTNormalization"]
    shares: dict[str, float] = {}
    for channel in channels:
        window = manager.foreground_intensity_properties_per_channel[str(channel)]
        low, high = window["percentile_00_5"], window["percentile_99_5"]
        outside, total = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
        for case in cases:
            reader = nnunet_api.reader_writer(dataset_json, case.images[channel])
            image = reader.read_images([str(case.images[channel])])[0][0]
            seg = reader.read_seg(str(case.label))[0][0]
            for own, value in case.table.items():
                if value in names:
                    voxels = image[seg == own]
                    total[value] += voxels.size
                    outside[value] += int(((voxels < low) | (voxels > high)).sum())
        for value, name in names.items():
            if total[value]:
                shares[name] = max(shares.get(name, 0.0), outside[value] / total[value])
        clipped = {name: share for name, share in shares.items() if share > CLIPPED_SHARE_TO_WARN}
        if clipped:
            listed = ", ".join(f"{share:.0%} of all {name} voxels" for name, share in clipped.items())
            logger.warning(
                "intensity: step %d: the CT window [%.0f, %.0f] of channel %d clips %s. By default nnU-Net takes it "
                "from the foreground of step 1. Set `intensity: whole_image` or `intensity: {given: ...}` in a chain "
                "of another name.",
                step,
                low,
                high,
                channel,
                listed,
            )
    return shares
