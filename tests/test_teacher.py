from __future__ import annotations

import math

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnunet_cil.losses.distillation import fold_logits
from nnunet_cil.teacher import Teacher, check_teacher, fuse_weights, grow_head

COMMON = {
    "input_channels": 1,
    "n_stages": 3,
    "features_per_stage": (4, 8, 8),
    "conv_op": torch.nn.Conv3d,
    "kernel_sizes": 3,
    "strides": (1, 2, 2),
    "n_conv_per_stage_decoder": 1,
    "conv_bias": True,
    "norm_op": torch.nn.InstanceNorm3d,
    "norm_op_kwargs": {"affine": True},
    "nonlin": torch.nn.LeakyReLU,
}


def plain(n_classes: int, deep_supervision: bool = False) -> torch.nn.Module:
    return PlainConvUNet(n_conv_per_stage=1, num_classes=n_classes, deep_supervision=deep_supervision, **COMMON)


def residual(n_classes: int, deep_supervision: bool = False) -> torch.nn.Module:
    return ResidualEncoderUNet(n_blocks_per_stage=1, num_classes=n_classes, deep_supervision=deep_supervision, **COMMON)


@pytest.mark.parametrize("build", [plain, residual])
@pytest.mark.parametrize("n_new", [1, 3])
def test_grown_student_folds_to_teacher(build, n_new):
    torch.manual_seed(0)
    teacher, student = build(3), build(3 + n_new)
    student.load_state_dict(grow_head(teacher.state_dict(), student.state_dict(), 3))
    x = torch.randn(2, 1, 8, 8, 8)
    with torch.no_grad():
        folded = torch.softmax(fold_logits(student(x), 3), 1)
        expected = torch.softmax(teacher(x), 1)
    torch.testing.assert_close(folded, expected, atol=1e-5, rtol=0)


def test_grown_rows_by_hand():
    teacher = {"decoder.seg_layers.0.bias": torch.tensor([1.0, 2.0]), "decoder.seg_layers.0.weight": torch.eye(2)}
    student = {"decoder.seg_layers.0.bias": torch.zeros(4), "decoder.seg_layers.0.weight": torch.zeros(4, 2)}
    grown = grow_head(teacher, student, 2)
    shifted = 1 - math.log(3)
    torch.testing.assert_close(grown["decoder.seg_layers.0.bias"], torch.tensor([shifted, 2.0, shifted, shifted]))
    torch.testing.assert_close(grown["decoder.seg_layers.0.weight"], torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 0]]))
    assert grown["decoder.seg_layers.0.bias"].data_ptr() != teacher["decoder.seg_layers.0.bias"].data_ptr()


def test_head_width_equal_to_old_class_count_is_not_mistaken_for_rows():
    weights = plain(4).state_dict()
    grown = grow_head(plain(4).state_dict(), plain(5).state_dict(), 4)
    assert {key: value.shape for key, value in grown.items() if "seg_layers" not in key} == {
        key: value.shape for key, value in weights.items() if "seg_layers" not in key
    }


def test_other_architecture_is_refused():
    with pytest.raises(ValueError, match="same architecture"):
        grow_head(plain(2).state_dict(), residual(3).state_dict(), 2)


def test_other_features_are_refused():
    wider = PlainConvUNet(
        n_conv_per_stage=1, num_classes=3, deep_supervision=False, **{**COMMON, "features_per_stage": (6, 8, 8)}
    )
    with pytest.raises(ValueError, match="only the rows"):
        grow_head(plain(2).state_dict(), wider.state_dict(), 2)


def two_layers(n_out: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv1d(1, 2, 1), nn.Conv1d(2, n_out, 1))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_fused_weights_lie_between_teacher_and_student(share):
    teacher, student, before = two_layers(2, 0), two_layers(3, 1), two_layers(3, 1).state_dict()
    fuse_weights(student, teacher.state_dict(), share)
    for name, value in student.state_dict().items():
        source = teacher.state_dict()[name]
        torch.testing.assert_close(value[: len(source)], share * source + (1 - share) * before[name][: len(source)])
        assert torch.equal(value[len(source) :], before[name][len(source) :]), "rows of new classes stay"


def test_fusion_of_1_gives_the_teachers_outputs_and_of_0_the_students():
    teacher, student, x = two_layers(2, 0), two_layers(3, 1), torch.randn(1, 1, 4)
    before = student(x)
    fuse_weights(student, teacher.state_dict(), 0.0)
    assert torch.equal(student(x), before)
    fuse_weights(student, teacher.state_dict(), 1.0)
    torch.testing.assert_close(student(x)[:, :2], teacher(x))


CONFIGURATION = {"architecture": {}, "patch_size": [8, 8, 8], "batch_size": 2, "data_identifier": "a"}
PLANS = {
    "configurations": {"3d_fullres": CONFIGURATION},
    "transpose_forward": [0, 1, 2],
    "foreground_intensity_properties_per_channel": {"0": {"mean": 1.0}},
    "image_reader_writer": "SimpleITKIO",
}
DATASET = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "spleen": 1, "liver": 2, "ignore": 3}}
OLD = ("spleen", "liver")


def check(plans: dict | None = None, dataset_json: dict | None = None, configuration: str = "3d_fullres") -> None:
    """A teacher of ``PLANS`` and ``DATASET`` for a step with some changes."""
    teacher = Teacher(nn.Identity(), {}, PLANS, DATASET, "3d_fullres", "nnUNetTrainer", None, "", None)
    check_teacher(teacher, {**PLANS, **(plans or {})}, {**DATASET, **(dataset_json or {})}, configuration, OLD)


def test_a_teacher_fits_whose_batches_data_folder_and_later_labels_are_others():
    check()
    other = {**CONFIGURATION, "batch_size": 4, "data_identifier": "b"}
    check({"configurations": {"3d_fullres": other}}, {"labels": {"background": 0, "kidney": 3}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plans": {"transpose_forward": [2, 0, 1]}}, r"transpose_forward: teacher \[0, 1, 2\], step \[2, 0, 1\]"),
        ({"plans": {"foreground_intensity_properties_per_channel": {"0": {"mean": 2.0}}}}, "properties_per_channel: "),
        ({"plans": {"foreground_intensity_properties_by_modality": {}}}, "properties_by_modality: teacher None"),
        (
            {"plans": {"configurations": {"3d_fullres": {**CONFIGURATION, "patch_size": [8, 8, 16]}}}},
            r"3d_fullres.patch_size: teacher \[8, 8, 8\], step \[8, 8, 16\]",
        ),
        ({"plans": {"image_reader_writer": "NibabelIO"}}, "image_reader_writer: teacher SimpleITKIO, step NibabelIO"),
        ({"dataset_json": {"channel_names": {"0": "MR"}}}, "channel_names: teacher {'0': 'CT'}, step {'0': 'MR'}"),
        ({"configuration": "2d"}, "configuration: teacher 3d_fullres, step 2d"),
    ],
)
def test_a_teacher_with_another_input_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check(**changes)
