"""The processes of ``-num_gpus N``, called ranks: which cases are whose, and what all of them have together.

One process alone, without a process group, is one rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

Object = TypeVar("Object")

MEET_EVERY = 20


def are_several() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def this_rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if are_several() else 0


def n_ranks() -> int:
    """How many there are."""
    return dist.get_world_size() if are_several() else 1


def add_up(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, which now holds the sum over ranks; it lies where their backend works, on the GPU for NCCL."""
    if are_several():
        dist.all_reduce(tensor)
    return tensor


def reduced(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over ranks on the CPU, whatever their backend; the tensor stays as it is, or is the result."""
    on_cuda = are_several() and dist.get_backend() == "nccl"
    return add_up(tensor.to(torch.device("cuda", torch.cuda.current_device()) if on_cuda else "cpu")).cpu()


def gathered(own: Object) -> list[Object]:
    """What each rank has, by rank."""
    found = [own] * n_ranks()
    if are_several():
        dist.all_gather_object(found, own)
    return found


def is_there(path: Path) -> bool:
    """Whether the first rank sees the file.

    By its own eyes a later rank might see what another job has just written, and leave the others to wait for it.
    """
    return gathered(path.is_file())[0]


@dataclass(frozen=True)
class CasesOfThisRank:
    """Each N-th case, in turn. Ranks that go through theirs to the end meet every 20 cases, as in nnU-Net's validation.

    Without that, NCCL's time limit would end those that wait at the next reduction for one ten minutes behind.

    Args:
        cases: of all ranks, in the same order on each.
    """

    cases: Sequence[str]

    def __len__(self) -> int:
        return len(self._own)

    def __iter__(self) -> Iterator[str]:
        every_rank_has = len(self.cases) // n_ranks()
        for number, case in enumerate(self._own, start=1):
            yield case
            if number % MEET_EVERY == 0 and number <= every_rank_has and are_several():
                dist.barrier()

    @property
    def _own(self) -> Sequence[str]:
        return self.cases[this_rank() :: n_ranks()]
