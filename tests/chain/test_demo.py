"""The demo as a user meets it: interrupted once, started again, and showing what the method is for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from time import sleep

import pytest

from tests import shell

pytestmark = [pytest.mark.chain, pytest.mark.timeout(1500)]
SHORT = ["--epochs", "1", "--methods", "pgcd"]


def run_demo(folder: Path, arguments: list[str]) -> tuple[str, str]:
    """What the demo said until Ctrl-C, and what it said when started again."""
    command = [str(Path(sys.executable).with_name("nnunet-cil")), "demo", "--folder", str(folder), "--device", "cpu"]
    command += arguments
    environment = {key: value for key, value in os.environ.items() if not key.startswith("nnUNet_")}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    alarm = threading.Timer(300, process.kill)
    alarm.start()
    checkpoints = "nnUNet_results/Dataset*/*/fold_all/checkpoint_*.pth"
    while process.poll() is None and not any(folder.glob(checkpoints)):  # what it says depends on how fast it is
        sleep(0.1)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    first = process.communicate()[0]
    alarm.cancel()
    assert process.returncode == 130, first
    again = shell.run(command, Path.cwd(), environment, seconds=900)
    assert again.returncode == 0, again.stdout
    return first, again.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str, str]:
    """Folder of a demo of one epoch and PGCD alone, and what it said in its two parts."""
    folder = tmp_path_factory.mktemp("demo") / "with space"
    return folder, *run_demo(folder, SHORT)


def test_an_interrupted_run_says_how_to_go_on_and_does(demo):
    _, first, second = demo
    assert first.splitlines()[-1] == "Interrupted. The same command goes on from here."
    assert "Traceback" not in first
    assert "(resumed)" in second


def test_it_says_where_it_stands_and_for_how_long(demo):
    assert "[1/2] pgcd, seed 0, step 1 of 2, fold all" in demo[1]
    assert "on cpu, " in demo[1]
    assert "augmentation in " in demo[1]
    assert "min left" in demo[2]


def test_it_ends_with_a_table_and_files_that_are_there(demo):
    _, _, shown = demo
    assert "Dice after the last step" in shown
    for name in ("scores.json", "table.txt", "report.html"):
        assert name in shown
    for line in shown.split("The report to open")[1].splitlines()[1:]:
        assert Path(line.strip()).stat().st_size > 0


@pytest.mark.slow
def test_finetune_forgets_and_pgcd_keeps(tmp_path):
    """The demo as it is; on real data tests/chain/test_hippocampus.py shows the same."""
    folder = tmp_path / "demo"
    run_demo(folder, [])
    scores = json.loads((folder / "nnUNet_results" / "chain_demo" / "scores.json").read_text(encoding="utf-8"))
    runs = {run["method"]: run for run in scores["runs"]}
    pgcd, finetune = (runs[name]["summary"] for name in ("pgcd", "finetune"))
    before = runs["pgcd"]["dice"][0]
    assert min(before[:2]) > 0.75
    assert finetune["old_mean"] < 0.05
    assert pgcd["old_mean"] > sum(before[:2]) / 2 - 0.05
    assert pgcd["new_mean"] > 0.6, "it learns the new organ, too"
    assert pgcd["mean"] > finetune["mean"] + 0.2
