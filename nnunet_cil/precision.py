"""What makes a step cheaper: half precision by autocast, and the memory layout that suits few channels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from nnunet_cil.losses.distillation import at_least_float32

FEW_CHANNELS = 32


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """Dtype of autocast for a setting of ``training: amp``; None for full precision.

    ``auto`` is nnU-Net's own float16 on CUDA, bfloat16 on a CPU with units for it (AMX or AVX512-BF16: without them it
    is slower than float32), and full precision elsewhere.

    Raises:
        ValueError: float16 elsewhere than on CUDA, where gradients would underflow.
    """
    if amp == "float16" and device.type != "cuda":
        raise ValueError(
            f"training: amp: got float16 on {device.type}, expected CUDA for it. Set amp to auto, bfloat16 or off."
        )
    if amp == "auto":
        amp = {"cuda": "float16", "cpu": "bfloat16" if cpu_has_bfloat16() else "off"}.get(device.type, "off")
    return {"off": None, "float16": torch.float16, "bfloat16": torch.bfloat16}[amp]


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware."""
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # private, so they may vanish from torch
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to ``dtype``; nothing at all for None, as some devices refuse even a disabled autocast."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def set_memory_format(network: nn.Module, device: torch.device, n_features: int, n_outputs: int) -> None:
    """Lay out a network's weights channels-last where that is faster: on a CPU, with few features in the first stage.

    oneDNN pads channels to blocks of 16, which wastes most of the work at few channels. Losses, on the other hand, are
    slower on channels-last logits of many classes. Values do not change.
    """
    if device.type == "cpu" and max(n_features, n_outputs) < FEW_CHANNELS:
        is_3d = any(isinstance(module, nn.Conv3d) for module in network.modules())
        network.to(memory_format=torch.channels_last_3d if is_3d else torch.channels_last)


class Float32Loss(nn.Module):
    """A segmentation loss on float32 outside of autocast, as the CPU's, unlike CUDA's, leaves softmax in half."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, output: Any, target: Any) -> torch.Tensor:
        """The wrapped loss of (B, K, *S) logits, or of the list that deep supervision gives."""
        first = output[0] if isinstance(output, (list, tuple)) else output
        with torch.autocast(first.device.type, enabled=False):
            if isinstance(output, (list, tuple)):
                return self.loss([at_least_float32(o) for o in output], target)
            return self.loss(at_least_float32(output), target)
