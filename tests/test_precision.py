from __future__ import annotations

import pytest
import torch
from torch import nn

from nnunet_cil import precision
from nnunet_cil.precision import Float32Loss, amp_dtype, autocast, set_memory_format

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("has_units", [True, False])
def test_auto_on_a_cpu_needs_bfloat16_units(monkeypatch, has_units):
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: has_units)
    assert amp_dtype("auto", CPU) == (torch.bfloat16 if has_units else None)
    assert amp_dtype("bfloat16", CPU) == torch.bfloat16


def test_auto_elsewhere_is_what_nnunet_does():
    assert amp_dtype("auto", CUDA) == torch.float16
    assert amp_dtype("auto", torch.device("mps")) is None
    assert amp_dtype("off", CUDA) is None


def test_float16_is_refused_on_a_cpu():
    with pytest.raises(ValueError, match="float16 on cpu, expected CUDA"):
        amp_dtype("float16", CPU)


def test_a_torch_without_the_probes_counts_as_a_cpu_without_units(monkeypatch):
    for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, probe, raising=False)
    assert precision.cpu_has_bfloat16() is False


def test_autocast_of_none_leaves_float32():
    layer, x = nn.Linear(2, 2), torch.randn(1, 2)
    with autocast(CPU, None):
        assert layer(x).dtype == torch.float32
    with autocast(CPU, torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize(("conv", "shape"), [(nn.Conv2d, (8, 8)), (nn.Conv3d, (8, 8, 8))])
def test_memory_format_changes_the_layout_and_not_the_result(conv, shape):
    torch.manual_seed(0)
    network, x = (
        nn.Sequential(conv(1, 4, 3), conv(4, 2, 3)),
        torch.randn(2, 1, *shape),
    )  # a batch of one this small would not go through oneDNN
    before = network(x)
    set_memory_format(network, CPU, 4, 2)
    after = network(x)
    assert after.stride()[1] == 1
    torch.testing.assert_close(after, before)
    assert before.stride()[1] != 1


@pytest.mark.parametrize(("features", "outputs"), [(32, 2), (8, 106)])
def test_memory_format_stays_with_many_channels(features, outputs):
    network = nn.Sequential(nn.Conv3d(1, features, 3))
    set_memory_format(network, CPU, features, outputs)
    assert network(torch.randn(2, 1, 8, 8, 8)).is_contiguous()


@pytest.mark.parametrize("deep_supervision", [True, False])
def test_loss_is_computed_in_float32_within_autocast(deep_supervision):
    seen = []

    def loss(output, target):
        first = output[0] if deep_supervision else output
        seen.append((first.dtype, (first.flatten(1) @ first.flatten(1).mT).dtype))
        return first.mean()

    class Loss(nn.Module):
        def forward(self, output, target):
            return loss(output, target)

    logits = torch.randn(2, 3, 4, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = Float32Loss(Loss())([logits, logits] if deep_supervision else logits, None)
    value.backward()
    assert seen == [(torch.float32, torch.float32)]
    assert value.dtype == torch.float32
    assert logits.grad.abs().sum() > 0
