"""What the processes of a distributed training agree on, with two of them and with one alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nnunet_cil import ranks
from nnunet_cil.ranks import CasesOfThisRank, gathered, is_there, n_ranks, reduced, this_rank

CASES = [f"case_{i}" for i in range(2 * ranks.MEET_EVERY + 1)]


def rank_works(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    met = []
    with pytest.MonkeyPatch.context() as patch:
        seen, barrier = [], dist.barrier
        patch.setattr(dist, "barrier", lambda: (met.append(len(seen)), barrier()))
        cases = CasesOfThisRank(CASES)
        for case in cases:
            seen.append(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "is_file", lambda path: rank == 1)  # another job has written it meanwhile
        found = {"rank": this_rank(), "ranks": n_ranks(), "cases": seen, "length": len(cases), "met": met}
        found |= {"is_there": is_there(Path("file")), "gathered": gathered(f"of {rank}")}
    torch.save(found | {"sum": reduced(torch.tensor([1.0 + rank]))}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(rank_works, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_two_ranks_share_the_cases_and_meet_as_often(two):
    assert [(each["rank"], each["ranks"]) for each in two] == [(0, 2), (1, 2)]
    assert [each["cases"] for each in two] == [CASES[::2], CASES[1::2]]
    assert [each["length"] for each in two] == [ranks.MEET_EVERY + 1, ranks.MEET_EVERY]
    assert [each["met"] for each in two] == [[ranks.MEET_EVERY]] * 2


def test_two_ranks_have_the_same_sum_list_and_view_of_a_file(two):
    for each in two:
        assert each["sum"].tolist() == [3.0]
        assert each["gathered"] == ["of 0", "of 1"]
        assert each["is_there"] is False


def test_one_process_alone_has_all(tmp_path):
    assert (this_rank(), n_ranks()) == (0, 1)
    assert list(CasesOfThisRank(CASES)) == CASES
    assert gathered("own") == ["own"]
    assert reduced(torch.tensor([2.0])).tolist() == [2.0]
    assert not is_there(tmp_path / "file")
    (tmp_path / "file").touch()
    assert is_there(tmp_path / "file")
