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

RUN = 32  # voxels side by side that are chosen together: copied at once, as single ones are not

Where = slice | torch.Tensor
Terms = Callable[..., Sequence[tuple[torch.Tensor, torch.Tensor]]]


def sums_over_chunks(
    terms: Terms, *inputs: torch.Tensor, chosen: Sequence[torch.Tensor] | None = None
) -> tuple[torch.Tensor, ...]:
    """Sum of each term over voxels, differentiable by the inputs; term i depends on input i alone.

    Args:
        terms: called with the number of the image in the batch, which of its `runs` it is about (a slice or their
            numbers), and the pieces (1, C_i, v) of the inputs, float32 where these are of half precision; gives for
            each input a scalar and its derivative by the piece.
        inputs: (B, C_i, *S) each; what else the terms need they bring along.
        chosen: numbers of the runs that take part, by image; all if None.
    """
    return _SumsOverChunks.apply(terms, chosen, *inputs)


def runs(tensor: torch.Tensor) -> torch.Tensor:
    """The voxels of (B, C, *S) in R runs of L: a view (B, C, R, L) with L = RUN, or what the two have in common."""
    flat = tensor.flatten(2)
    length = math.gcd(flat.shape[2], RUN)
    return flat.unflatten(2, (flat.shape[2] // length, length))


def chunks(
    tensor: torch.Tensor, n_channels: int, chosen: Sequence[torch.Tensor] | None = None
) -> Iterator[tuple[int, Where]]:
    """Image by image, the third axis of (B, C, N, ...) in pieces on which a map of ``n_channels`` stays small."""
    batch, _, number, *rest = tensor.shape
    elements = CHUNK_ELEMENTS.get(tensor.device.type, DEFAULT_CHUNK_ELEMENTS)
    size = max(1, elements // (n_channels * math.prod(rest)))
    for b in range(batch):
        for start in range(0, number if chosen is None else len(chosen[b]), size):
            where = slice(start, start + size)
            yield b, where if chosen is None else chosen[b][where]


def _is_one(factor: torch.Tensor) -> bool:
    """Whether a pass over all voxels can be saved; where asking would wait for the device, it is not asked."""
    return factor.device.type == "cpu" and factor.item() == 1


def piece(tensor: torch.Tensor, b: int, where: Where) -> torch.Tensor:
    """Some runs (1, C, v) of (B, C, R, L), at least float32, voxels side by side: a channels-last one is turned."""
    if isinstance(where, slice):
        part = tensor[b : b + 1, :, where]
    elif tensor.stride(1) == 1:
        part = tensor[b : b + 1].movedim(1, 3).index_select(1, where).movedim(3, 1)
    else:
        part = tensor[b : b + 1].index_select(2, where)
    part = at_least_float32(part).flatten(2)
    return part if part.stride(2) == 1 else part.contiguous()


def _fill(tensor: torch.Tensor, b: int, where: Where, values: torch.Tensor) -> None:
    """Write ``values`` (1, C, v) where `piece` reads them."""
    values = values.unflatten(2, (-1, tensor.shape[3]))
    if isinstance(where, slice):
        tensor[b : b + 1, :, where] = values
    elif tensor.stride(1) == 1:
        tensor[b : b + 1].movedim(1, 3).index_copy_(1, where, values.movedim(1, 3).to(tensor.dtype))
    else:
        tensor[b : b + 1].index_copy_(2, where, values.to(tensor.dtype))


class _SumsOverChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, terms: Terms, chosen: Sequence[torch.Tensor] | None, *inputs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        flat = [runs(tensor) for tensor in inputs]
        wanted = any(ctx.needs_input_grad)
        like = torch.empty_like if chosen is None else torch.zeros_like
        gradients = [like(tensor) if wanted else None for tensor in flat]
        totals = [at_least_float32(tensor[0, 0, 0]).new_zeros(()) for tensor in flat]
        for b, where in chunks(flat[0], max(tensor.shape[1] for tensor in flat), chosen):
            found = terms(b, where, *(piece(tensor, b, where) for tensor in flat))
            if wanted:
                for whole, (_, gradient) in zip(gradients, found, strict=True):
                    _fill(whole, b, where, gradient)
            totals = [total + value for total, (value, _) in zip(totals, found, strict=True)]
        ctx.shapes = [tensor.shape for tensor in inputs]
        if wanted:
            ctx.save_for_backward(*gradients)
        return tuple(totals)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = [g if _is_one(u) else g * u.to(g.dtype) for g, u in zip(ctx.saved_tensors, upstream, strict=True)]
        return None, None, *(g.flatten(2).unflatten(2, shape[2:]) for g, shape in zip(scaled, ctx.shapes, strict=True))
