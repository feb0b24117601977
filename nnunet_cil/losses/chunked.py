"""Loss terms over voxels, piece by piece: no map over all voxels is held but the gradient of the inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from nnunet_cil.losses.distillation import at_least_float32

CHUNK_ELEMENTS = {"cpu": 2**19}  # a piece of each map fits into the cache, and calls are few
DEFAULT_CHUNK_ELEMENTS = 2**26  # elsewhere pieces are there to bound the memory

ALL = slice(None)

Terms = Callable[..., Sequence[tuple[torch.Tensor, torch.Tensor]]]


def sums_over_chunks(terms: Terms, *inputs: torch.Tensor, every: slice = ALL) -> tuple[torch.Tensor, ...]:
    """Sum of each term over voxels, differentiable by the inputs; term i depends on input i alone.

    Args:
        terms: called with the number of the image in the batch, the slice of its flattened voxels, and the pieces
            (1, C_i, v) of the inputs, float32 where these are of half precision; gives for each input a scalar and its
            derivative by the piece.
        inputs: (B, C_i, *S) each; what else the terms need they bring along.
        every: which of an image's flattened voxels take part: all, or each n-th from some voxel on.
    """
    return _SumsOverChunks.apply(terms, every, *inputs)


def chunks(flat: torch.Tensor, n_channels: int, every: slice = ALL) -> Iterator[tuple[int, slice]]:
    """Image by image, the voxels of (B, C, V) in pieces on which a map of ``n_channels`` stays small."""
    batch, _, n_voxels = flat.shape
    size = max(1, CHUNK_ELEMENTS.get(flat.device.type, DEFAULT_CHUNK_ELEMENTS) // n_channels)
    first, _, stride = every.indices(n_voxels)
    for b in range(batch):
        for start in range(first, n_voxels, size * stride):
            yield b, slice(start, start + size * stride, stride)


def _is_one(factor: torch.Tensor) -> bool:
    """Whether a pass over all voxels can be saved; where asking would wait for the device, it is not asked."""
    return factor.device.type == "cpu" and factor.item() == 1


def piece(flat: torch.Tensor, b: int, where: slice) -> torch.Tensor:
    """One piece (1, C, v) of (B, C, V), at least float32, voxels side by side: a channels-last one is turned around."""
    part = at_least_float32(flat[b : b + 1, :, where])
    return part if part.stride(2) == 1 else part.contiguous()


class _SumsOverChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, terms: Terms, every: slice, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        flat = [tensor.flatten(2) for tensor in inputs]
        wanted = any(ctx.needs_input_grad)
        like = torch.empty_like if every == ALL else torch.zeros_like
        gradients = [like(tensor) if wanted else None for tensor in flat]
        totals: list[torch.Tensor] = []
        for b, where in chunks(flat[0], max(tensor.shape[1] for tensor in flat), every):
            found = terms(b, where, *(piece(tensor, b, where) for tensor in flat))
            if wanted:
                for whole, (_, gradient) in zip(gradients, found, strict=True):
                    whole[b : b + 1, :, where] = gradient
            values = [value for value, _ in found]
            totals = [t + v for t, v in zip(totals, values, strict=True)] if totals else values
        ctx.shapes = [tensor.shape for tensor in inputs]
        if wanted:
            ctx.save_for_backward(*gradients)
        return tuple(totals)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = [g if _is_one(u) else g * u.to(g.dtype) for g, u in zip(ctx.saved_tensors, upstream, strict=True)]
        return None, None, *(g.unflatten(2, shape[2:]) for g, shape in zip(scaled, ctx.shapes, strict=True))
