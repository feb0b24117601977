from __future__ import annotations

import subprocess
import sys

import pytest

from nnunet_cil import host_memory
from nnunet_cil.host_memory import keeping_freed_memory

ROUNDS = """
import resource
from contextlib import nullcontext
import torch
from nnunet_cil.host_memory import keep_freed_memory, keeping_freed_memory

def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        maps = [torch.ones(16_000_000) for _ in range(2)]
        del maps
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1])
"""

needs_glibc = pytest.mark.skipif(host_memory._glibc() is None, reason="glibc's allocator is not there")


def run(code: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", ROUNDS + code], capture_output=True, text=True, check=True, timeout=120
    )
    return [int(number) for number in done.stdout.split()]


@needs_glibc
def test_what_is_freed_is_taken_again_without_page_faults():
    plain, kept = run("plain = faults(20); keep_freed_memory(); faults(20); print(plain, faults(20))")
    assert plain > 200_000
    assert kept < 0.01 * plain


@needs_glibc
def test_in_the_end_all_goes_back():
    before, within, after = run(
        "before = resident()\nwith keeping_freed_memory():\n    faults(5); within = resident()\n"
        "print(before, within, resident())"
    )
    assert within > before + 20_000
    assert after < before + 2_000


@needs_glibc
def test_not_wanted_nothing_is_kept():
    before, after = run(
        "before = resident()\nwith keeping_freed_memory(False):\n    faults(5); print(before, resident())"
    )
    assert after < before + 2_000


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(host_memory.sys, "platform", "darwin")
    with keeping_freed_memory():
        assert host_memory._glibc() is None
