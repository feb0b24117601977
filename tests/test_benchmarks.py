"""Each benchmark runs to its table, on the smallest setting it has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEP = ("step", "--networks", "tiny", "--classes", "2", "--rounds", "1", "--contestants", "stock", "pgcd off")


@pytest.mark.parametrize(
    ("arguments", "row"),
    [
        (STEP, "| tiny | 2 | pgcd off |"),
        pytest.param(("prepare",), "| ours |", marks=pytest.mark.slow),
        pytest.param(("chain", "--epochs", "1", "--iterations", "2"), "| step 2 in all |", marks=pytest.mark.slow),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_it_ends_with_its_table(arguments, row):
    command = [sys.executable, "-m", f"benchmarks.{arguments[0]}", *arguments[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert row in done.stdout
