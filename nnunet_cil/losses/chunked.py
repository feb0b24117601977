"""Loss terms over voxels, piece by piece: no map over all voxels is held but the gradient of the inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from nnunet_cil.losses.distillation import at_least_float32

CHUNK_ELEMENTS = {"cpu": 2**19}  # a piece of each map fits into the cache, and calls are few
DEFAULT_CHUNK_ELEMENTS = 2**26  # elsewhere pieces are there to bound the memory

Terms = Callable[..., Sequence[tuple[torch.Tensor, torch.Tensor]]]


def sums_over_chunks(terms: Terms, *inputs: torch.Tensor, chosen: slice = slice(None)) -> tuple[torch.Tensor, ...]:
    """Sum of each term over voxels, differentiable by the inputs; term i depends on input i alone.

    Args:
        terms: called with the number of the image in the batch, a slice of its `rows`, and the pieces (1, C_i, v) of
            the inputs, float32 where these are of half precision; gives for each input a scalar and its derivative by
            the piece.
        inputs: (B, C_i, *S) each; what else the terms need they bring along.
        chosen: the rows that take part.
    """
    return _SumsOverChunks.apply(terms, chosen, *inputs)


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """The voxels of (B, C, *S) by row: a view (B, C, R, L), L the length of the last axis."""
    return tensor.flatten(2).unflatten(2, (-1, tensor.shape[-1]))


def chunks(tensor: torch.Tensor, n_channels: int, chosen: slice = slice(None)) -> Iterator[tuple[int, slice]]:
    """Image by image, the chosen rows of (B, C, R, L), or voxels of (B, C, V), in pieces.

    A map of ``n_channels`` stays small on each.
    """
    batch, _, number, *rest = tensor.shape
    elements = CHUNK_ELEMENTS.get(tensor.device.type, DEFAULT_CHUNK_ELEMENTS)
    start, stop, step = chosen.indices(number)
    size = step * max(1, elements // (n_channels * math.prod(rest)))
    for b in range(batch):
        for first in range(start, stop, size):
            yield b, slice(first, min(first + size, stop), step)


def _is_one(factor: torch.Tensor) -> bool:
    """Whether a pass over all voxels can be saved; where asking would wait for the device, it is not asked."""
    return factor.device.type == "cpu" and factor.item() == 1


def _scaled(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Their product in the gradient's type; the factor, which may be the loss's scale, need not fit into that."""
    if _is_one(factor):
        return gradient
    if gradient.dtype == factor.dtype:
        return gradient * factor
    result = torch.empty_like(gradient)
    for image, whole in zip(result, gradient, strict=True):
        image.copy_(whole.to(factor.dtype) * factor)
    return result


def piece(tensor: torch.Tensor, b: int, where: slice) -> torch.Tensor:
    """What `chunks` chose as (1, C, v), at least float32, voxels side by side: a channels-last one is turned."""
    part = at_least_float32(tensor[b : b + 1, :, where]).flatten(2)
    return part if part.stride(2) == 1 else part.contiguous()


class _SumsOverChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, terms: Terms, chosen: slice, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        by_row = [rows(tensor) for tensor in inputs]
        wanted = any(ctx.needs_input_grad)
        like = torch.empty_like if chosen == slice(None) else torch.zeros_like
        gradients = [like(tensor) if wanted else None for tensor in by_row]
        totals = [at_least_float32(tensor[0, 0, 0]).new_zeros(()) for tensor in by_row]
        for b, where in chunks(by_row[0], max(tensor.shape[1] for tensor in by_row), chosen):
            found = terms(b, where, *(piece(tensor, b, where) for tensor in by_row))
            if wanted:
                for whole, (_, gradient) in zip(gradients, found, strict=True):
                    whole[b : b + 1, :, where] = gradient.unflatten(2, (-1, whole.shape[3]))
            totals = [total + value for total, (value, _) in zip(totals, found, strict=True)]
        ctx.shapes = [tensor.shape for tensor in inputs]
        if wanted:
            ctx.save_for_backward(*gradients)
        return tuple(totals)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = [_scaled(g, u) for g, u in zip(ctx.saved_tensors, upstream, strict=True)]
        return None, None, *(g.flatten(2).unflatten(2, shape[2:]) for g, shape in zip(scaled, ctx.shapes, strict=True))
