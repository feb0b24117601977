"""Tiny chains whose commands are killed, and what has to hold for their files."""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK

from nnunet_cil.checkpoint import read_checkpoint
from tests.conftest import write_tiny_dataset

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")
SCHEDULE = """
name: tiny
source: source
test: source/split.json
fold: all
device: cpu
plans: {patch_size: [16, 16, 16], batch_size: 2, features_per_stage: [4, 8, 8]}
training: {epochs: 3, iterations_per_epoch: 2, val_iterations_per_epoch: 1, seed: 0, checkpoint_minutes: 0}
steps:
  - [ball]
  - [blob]
"""


@dataclass(frozen=True)
class Kill:
    """When a command is killed.

    Args:
        at: ``module:attribute`` of a function; None for a kill after ``seconds``.
        number: of the call, from 1 on.
        how: ``before`` the call, ``after`` it, or when the file that it writes is ``half`` written.
        training_only: the command sees its training killed; else both are.
    """

    at: str | None = None
    number: int = 1
    how: str = "before"
    seconds: float | None = None
    training_only: bool = False


@functools.cache
def command_process(**own: str) -> subprocess.Popen[str]:
    """The process that forks commands; chains with the same variables of their own share it."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.faults.chain_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=variables(Path(os.devnull), own),
        cwd=Path(__file__).parents[2],
    )


def variables(root: Path, own: Mapping[str, str]) -> dict[str, str]:
    """Variables of commands whose folders lie in ``root``."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("nnUNet_")}
    one_thread = dict.fromkeys(ONE_THREAD, "1") | {"BLOSC_NTHREADS": "1"}
    folders = {name: str(root / name) for name in FOLDERS}
    return clean | folders | one_thread | {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1"} | dict(own)


class TinyChain:
    """A schedule in a folder of its own, and a process that runs its commands."""

    def __init__(self, root: Path, environment: Mapping[str, str] | None = None) -> None:
        self.root = root
        write_tiny_dataset(root / "source", n_cases=5)
        (root / "source" / "split.json").write_text(json.dumps({"test": ["case_3", "case_4"]}))
        self.schedule = root / "schedule.yaml"
        self.schedule.write_text(SCHEDULE)
        self.environment = variables(root, environment or {})
        self._process = command_process(**environment or {})

    def types(self, command: str, *arguments: str, kill: Kill | None = None, forked: bool = True) -> int:
        """Exit status of a command of ``nnunet-cil`` on the schedule; -9 if it was killed.

        Args:
            forked: also its trainings, instead of fresh processes.
        """
        line = [command, str(self.schedule), *arguments]
        order = {"arguments": line, "forked": forked, "log": str(self.log), **asdict(kill or Kill())}
        order["environment"] = self.environment
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())["status"]

    @property
    def log(self) -> Path:
        return self.root / "command.log"

    def said(self) -> str:
        """What the last command said."""
        return self.log.read_text(errors="replace")

    def remove(self) -> None:
        """All that a chain has made."""
        for name in FOLDERS:
            shutil.rmtree(self.root / name)


def results(root: Path) -> dict[str, Any]:
    """Of a chain that has ended: digests of each model's weights and prototypes, by name; all scores and the table."""
    found: dict[str, Any] = {}
    for folder in sorted(root.glob("nnUNet_results/Dataset*/*/fold_all")):
        model = str(folder.parent.relative_to(root / "nnUNet_results"))
        weights = read_checkpoint(folder / "checkpoint_final.pth")["network_weights"]
        for name, tensor in weights.items():
            found[f"{model} weights {name}"] = digest_of(tensor.numpy())
        with np.load(folder / "prototypes.npz") as prototypes:
            for name in sorted(set(prototypes.files) - {"checkpoint_sha256"}):  # of a file that holds times
                found[f"{model} prototypes {name}"] = digest_of(prototypes[name])
    chain = root / "nnUNet_results/chain_tiny"
    content = json.loads((chain / "scores.json").read_text(encoding="utf-8"))
    found["scores"] = [{score: run[score] for score in ("dice", "nsd", "hd95_mm", "absent")} for run in content["runs"]]
    return found | {"paired": content["paired"], "table": (chain / "table.txt").read_text(encoding="utf-8")}


def digest_of(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def unreadable(root: Path, ended: bool) -> list[str]:
    """Files that have their final name and are not whole.

    While a chain has not ended, what nnU-Net itself writes in place and makes anew is left out.
    """
    found = []
    for path in (path for name in FOLDERS for path in (root / name).rglob("*") if path.is_file()):
        is_part = any(".part" in name or name == "partial" for name in path.parts)
        try:
            if not is_part and (ended or not in_place(path, root)):
                read(path)
        except Exception as error:
            found.append(f"{path.relative_to(root)}: {type(error).__name__}: {error}")
    return found


def in_place(path: Path, root: Path) -> bool:
    """Whether nnU-Net writes a file under its final name: in unfinished steps, and at the start of a training."""
    if path.is_relative_to(root / "nnUNet_preprocessed"):
        return path.name != "cil_step.json"
    return path.parent.parent.parent == root / "nnUNet_results" or path.name in (
        "debug.json",
        "dataset_fingerprint.json",
    )


def read(path: Path) -> None:
    """Read a file to its end.

    Raises:
        Exception: it is damaged.
    """
    if path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            [arrays[name] for name in arrays.files]
    elif path.suffix == ".pth":
        read_checkpoint(path)
    elif path.name.endswith(".nii.gz"):
        gzip.decompress(path.read_bytes())
        SimpleITK.ReadImage(str(path))
    elif path.suffix == ".b2nd":
        import blosc2

        blosc2.open(str(path), mode="r")[:]
    elif path.suffix == ".pkl":
        import pickle

        pickle.loads(path.read_bytes())
