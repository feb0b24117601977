from __future__ import annotations

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch.nn.functional import interpolate

from nnunet_cil.imprinting import ClassStatistics, class_statistics, imprint
from nnunet_cil.losses.distillation import fold_logits
from nnunet_cil.teacher import grow_head

CPU = torch.device("cpu")


def gaussian_features(n: int = 20000):
    """Background and one new class: Gaussians with one covariance, four times as much background."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.tensor([[1.0, 0.0, 0.0], [0.5, 2.0, 0.0], [0.0, 0.3, 0.7]])
    labels = (torch.rand(1, n, generator=generator) < 0.2).long()
    shift = torch.tensor([1.0, -1.0, 0.5])
    noise = torch.randn(1, n, 3, generator=generator) @ mixing.T
    return (noise + labels[..., None] * shift).mT, labels, mixing @ mixing.T, shift


def test_discriminant_is_the_log_odds_of_two_gaussians(monkeypatch):
    monkeypatch.setattr("nnunet_cil.imprinting.SHRINKAGE", 0.0)
    features, labels, covariance, shift = gaussian_features()
    statistics = ClassStatistics(2, 3)
    for part in (slice(0, 5000), slice(5000, None)):
        statistics.add(features[:, :, part], labels[:, part])
    weight, bias = statistics.discriminant(1)
    expected = torch.linalg.solve(covariance, shift).double()
    torch.testing.assert_close(weight, expected, atol=0.1, rtol=0)
    torch.testing.assert_close(bias, (np.log(0.2 / 0.8) - 0.5 * shift.double() @ expected), atol=0.1, rtol=0)


def test_moments_equal_a_loop_over_voxels_and_leave_other_labels_out():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, 3, 4, 5, generator=generator)
    labels = torch.randint(-1, 3, (2, 4, 5), generator=generator)
    statistics = ClassStatistics(2, 3)
    statistics.add(features, labels)
    for c in range(2):
        rows = [features[b, :, i, j] for b in range(2) for i in range(4) for j in range(5) if labels[b, i, j] == c]
        stacked = torch.stack(rows).double()
        assert statistics.counts[c] == len(rows)
        torch.testing.assert_close(statistics.sums[c], stacked.sum(0), atol=1e-5, rtol=0)
        torch.testing.assert_close(statistics.squares[c], stacked.T @ stacked, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_moments_are_those_of_full_precision_under_autocast(dtype):
    """A sum of squares over a patch exceeds 65504, the largest number of float16."""
    features = 3 + torch.randn(1, 4, 40, 40, 40, generator=torch.Generator().manual_seed(0))
    labels = (features[:, 0] > 4).long()
    full, under = ClassStatistics(2, 4), ClassStatistics(2, 4)
    full.add(features, labels)
    assert full.squares.max() > torch.finfo(torch.float16).max
    with torch.autocast("cpu", dtype):
        under.add(features, labels)
    assert torch.equal(under.squares, full.squares)
    assert torch.equal(under.sums, full.sums)


def test_a_class_without_voxels_is_refused():
    statistics = ClassStatistics(3, 2)
    statistics.add(torch.randn(1, 2, 6), torch.tensor([[0, 0, 1, 1, -1, -1]]))
    with pytest.raises(ValueError, match=r"expected some of 0 and 2"):
        statistics.discriminant(2)


def test_constant_features_give_finite_rows():
    statistics = ClassStatistics(2, 2)
    statistics.add(torch.ones(1, 2, 6), torch.tensor([[0, 0, 0, 0, 1, 1]]))
    assert all(torch.isfinite(part).all() for part in statistics.discriminant(1))


def network(n_out: int, dim: int = 3, seed: int = 0) -> PlainConvUNet:
    torch.manual_seed(seed)
    conv, norm = (torch.nn.Conv3d, torch.nn.InstanceNorm3d) if dim == 3 else (torch.nn.Conv2d, torch.nn.InstanceNorm2d)
    return PlainConvUNet(
        input_channels=1,
        n_stages=3,
        features_per_stage=(4, 8, 8),
        conv_op=conv,
        kernel_sizes=3,
        strides=(1, 2, 2),
        n_conv_per_stage=1,
        num_classes=n_out,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=norm,
        norm_op_kwargs={"affine": True},
        nonlin=torch.nn.LeakyReLU,
        deep_supervision=False,
    ).eval()


@pytest.fixture
def cases():
    """The new class (2) is a bright block, the old one (1) a dark one."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(2):
        labels = np.zeros((1, 8, 16, 16), np.int16)
        labels[:, :, 2:8, 2:8], labels[:, :, 9:14, 9:14], labels[:, 0, 0, 0] = 2, 1, 3
        image = rng.normal(0, 0.1, labels.shape) + 3 * (labels == 2) - 3 * (labels == 1)
        found.append((image.astype(np.float32), labels))
    return found


def test_labels_of_coarser_stages_are_those_that_deep_supervision_trains_on():
    labels = np.random.default_rng(0).integers(0, 3, (1, 8, 16, 16)).astype(np.int16)
    image = np.random.default_rng(1).normal(size=labels.shape).astype(np.float32)
    statistics = class_statistics(network(2), [(image, labels)], (8, 16, 16), 2, 3, CPU)
    (targets,) = DownsampleSegForDSTransform([0.5])(segmentation=torch.from_numpy(labels))["segmentation"]
    counted = [int((targets == label).sum()) for label in (0, 2)]
    others = interpolate(torch.from_numpy(labels)[None].float(), scale_factor=0.5, mode="nearest")
    assert counted != [int((others == label).sum()) for label in (0, 2)], "another voxel of each eight"
    assert statistics[0].counts.tolist() == counted
    assert statistics[1].counts.tolist() == [int((labels == label).sum()) for label in (0, 2)]


@pytest.mark.parametrize("dim", [3, 2])
def test_imprinted_student_finds_the_new_class_and_keeps_the_teachers_outputs(cases, dim):
    teacher, student = network(2, dim), network(3, dim, seed=1)
    patch = (8, 16, 16) if dim == 3 else (16, 16)
    statistics = class_statistics(teacher, cases, patch, 2, 3, CPU)
    assert set(statistics) == {0, 1}
    assert float(statistics[1].counts.sum()) == sum(int(np.isin(seg, (0, 2)).sum()) for _, seg in cases)
    grown = grow_head(teacher.state_dict(), student.state_dict(), 2)
    student.load_state_dict(imprint(grown, teacher.state_dict(), statistics))
    image, labels = cases[0]
    x = torch.from_numpy(image)[None]
    x = x if dim == 3 else x[:, :, 0]
    y = labels[0] if dim == 3 else labels[0, 0]
    with torch.no_grad():
        logits, old = student(x), teacher(x)
    torch.testing.assert_close(logits[:, :2], old)
    odds = (logits[0, 2] - logits[0, 0]).numpy()
    new, background = odds[y == 2], odds[y == 0]
    assert (new[:, None] > background[None]).mean() > 0.8, "it tells the new class from background"
    folded, expected = torch.softmax(fold_logits(logits, 2), 1), torch.softmax(old, 1)
    old_organ = torch.from_numpy(y == 1)
    assert (folded - expected)[0].abs().amax(0)[old_organ].mean() < 0.2


@pytest.mark.parametrize("shape", [(6, 12, 12), (10, 20, 16)])
def test_each_voxel_of_the_case_counts_once_and_none_of_its_padding(shape):
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 4, (1, *shape))
    image = rng.normal(size=labels.shape).astype(np.float32)
    statistics = class_statistics(network(2), [(image, labels)], (8, 16, 16), 2, 3, CPU)
    assert statistics[1].counts.tolist() == [(labels == 0).sum(), (labels == 2).sum()]


def test_shrinking_goes_with_the_size_of_the_features():
    features, labels, *_ = gaussian_features(500)
    found = []
    for scale in (1.0, 1000.0):
        statistics = ClassStatistics(2, 3)
        statistics.add((scale * features).double(), labels)
        found.append(statistics.discriminant(1))
    torch.testing.assert_close(1000 * found[1][0], found[0][0])
    torch.testing.assert_close(found[1][1], found[0][1])


def test_a_stage_that_lacks_a_new_class_keeps_its_head(cases):
    teacher, student = network(2), network(3, seed=1)
    statistics = class_statistics(teacher, cases, (8, 16, 16), 2, 3, CPU)
    statistics[0].counts[1] = 0
    grown = grow_head(teacher.state_dict(), student.state_dict(), 2)
    result = imprint(grown, teacher.state_dict(), statistics)
    changed = {key for key in grown if not torch.equal(result[key], grown[key])}
    assert changed == {"decoder.seg_layers.1.weight", "decoder.seg_layers.1.bias"}
