from __future__ import annotations

import copy

import pytest

from nnunet_cil.plan_override import apply_override
from nnunet_cil.schedule import PlanOverride

PLANS = {
    "configurations": {
        "3d_fullres": {
            "patch_size": [48, 160, 160],
            "batch_size": 2,
            "spacing": [7.7, 2.5, 2.5],
            "median_image_size_in_voxels": [36, 128, 128],
            "architecture": {
                "arch_kwargs": {
                    "n_stages": 6,
                    "features_per_stage": [32, 64, 128, 256, 320, 320],
                    "strides": [[1, 1, 1]] + [[1, 2, 2]] + [[2, 2, 2]] * 4,
                    "kernel_sizes": [[3, 3, 3]] * 6,
                    "n_conv_per_stage": [2] * 6,
                    "n_conv_per_stage_decoder": [2] * 5,
                }
            },
        }
    }
}


def override(**changes):
    return apply_override(PLANS, "3d_fullres", PlanOverride(**changes))["configurations"]["3d_fullres"]


def test_nothing_given_changes_nothing():
    assert apply_override(PLANS, "3d_fullres", PlanOverride()) == PLANS


def test_small_network_derives_strides_and_kernels():
    before = copy.deepcopy(PLANS)
    settings = override(patch_size=(32, 96, 96), features_per_stage=(8, 16, 32, 64, 64), batch_size=4)
    arguments = settings["architecture"]["arch_kwargs"]
    assert arguments["n_stages"] == 5
    assert arguments["strides"][0] == [1, 1, 1]
    assert arguments["strides"][1] == [1, 2, 2]  # the coarse axis is pooled later
    assert len(arguments["kernel_sizes"]) == len(arguments["strides"]) == len(arguments["n_conv_per_stage"]) == 5
    assert len(arguments["n_conv_per_stage_decoder"]) == 4
    assert settings["patch_size"] == [32, 96, 96]
    assert settings["batch_size"] == 4
    assert before == PLANS


@pytest.mark.parametrize(
    ("patch_size", "expected"), [((32, 96, 96), False), ((36, 64, 64), False), ((32, 64, 64), True)]
)
def test_dice_is_taken_over_the_batch_where_nnunet_would(patch_size, expected):
    """Below a quarter of the median image, nnU-Net plans a low resolution as well, and takes Dice over the batch."""
    assert override(patch_size=patch_size)["batch_dice"] is expected
    assert "batch_dice" not in override(batch_size=4), "nothing that it follows from has changed"


def test_dice_follows_the_spacing_too():
    assert override(patch_size=(32, 96, 96), spacing=(7.7, 1.25, 1.25))["batch_dice"] is True


def test_patch_is_padded_to_the_strides(caplog):
    settings = override(patch_size=(30, 90, 90), features_per_stage=(8, 16, 32))
    assert settings["patch_size"] == [30, 92, 92]
    assert "padded" in caplog.text


def test_spacing_scales_the_median_size():
    settings = override(spacing=(7.7, 5.0, 5.0))
    assert settings["median_image_size_in_voxels"] == [36, 64, 64]


@pytest.mark.parametrize("features", [(8, 16), (8, 16, 32, 64, 64, 64, 64, 64)])
def test_stages_that_cannot_be_are_refused(features):
    with pytest.raises(ValueError, match="features_per_stage"):
        override(patch_size=(32, 32, 32), features_per_stage=features)


def test_wrong_number_of_axes():
    with pytest.raises(ValueError, match="expected 3 entries"):
        override(patch_size=(32, 32))


CHANGES = {"patch_size": (32, 96, 96), "features_per_stage": (8, 16, 32, 64, 64), "batch_size": 4}


def test_plans_of_the_older_format_give_the_same_network():
    settings = copy.deepcopy(PLANS["configurations"]["3d_fullres"])
    arguments = settings.pop("architecture")["arch_kwargs"]
    settings |= {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": 32,
        "unet_max_num_features": 320,
        "n_conv_per_stage_encoder": arguments["n_conv_per_stage"],
        "n_conv_per_stage_decoder": arguments["n_conv_per_stage_decoder"],
        "num_pool_per_axis": [4, 5, 5],
        "pool_op_kernel_sizes": arguments["strides"],
        "conv_kernel_sizes": arguments["kernel_sizes"],
    }
    plans = {"configurations": {"3d_fullres": settings}}
    assert apply_override(plans, "3d_fullres", PlanOverride()) == plans
    found = apply_override(plans, "3d_fullres", PlanOverride(**CHANGES))["configurations"]["3d_fullres"]
    expected = override(**CHANGES)
    assert "UNet_class_name" not in found
    assert {key: value for key, value in found.items() if key != "architecture"} == {
        key: value for key, value in expected.items() if key != "architecture"
    }
    arguments = found["architecture"]["arch_kwargs"]
    assert {key: arguments[key] for key in expected["architecture"]["arch_kwargs"]} == (
        expected["architecture"]["arch_kwargs"]
    )


def test_a_configuration_that_inherits_is_changed_by_itself():
    plans = copy.deepcopy(PLANS)
    plans["configurations"]["mine"] = {"inherits_from": "3d_fullres", "batch_size": 7}
    changed = apply_override(plans, "mine", PlanOverride(spacing=(7.7, 5.0, 5.0)))["configurations"]
    assert changed["3d_fullres"] == PLANS["configurations"]["3d_fullres"]
    assert changed["mine"]["batch_size"] == 7
    assert changed["mine"]["median_image_size_in_voxels"] == [36, 64, 64]
