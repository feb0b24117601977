"""No old data: what a step opens, traced by the kernel and followed to inodes, so through links and in C as well."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from nnunet_cil.cli.main import main
from tests import shell
from tests.conftest import write_schedule, write_tiny_dataset

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
BIN = Path(sys.executable).parent
DATA = (".nii.gz", ".b2nd", ".pkl", ".npz", ".npy")
STRACE = ["strace", "--follow-forks", "--output-separately", "--seccomp-bpf", "-qq", "-y", "-s", "0"]
CALLS = ["-e", "trace=?open,openat,?openat2", "--status=successful"]
SCHEDULE = """
name: two_hospitals
test: {dataset: tests}
fold: 0
device: cpu
plans: {patch_size: [16, 16, 16], batch_size: 2, features_per_stage: [4, 8, 8]}
training: {epochs: 1, iterations_per_epoch: 2, val_iterations_per_epoch: 1, seed: 0, validation_cases: 1}
steps:
  - {dataset: old, classes: [ball]}
  - {dataset: new, classes: [blob]}
"""

Inode = tuple[int, int]


def can_trace() -> bool:
    try:
        return subprocess.run([*STRACE, *CALLS, "-o", os.devnull, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


pytestmark = pytest.mark.skipif(not can_trace(), reason="strace is not there, or may not trace here")


def trace(command: Sequence[str], folder: Path, environment: dict[str, str], cwd: Path) -> set[Path]:
    """Real paths of all files that a command and its children open, whatever name or link they open them by."""
    folder.mkdir()
    line = [*STRACE, *CALLS, "-o", str(folder / "trace"), *command]
    done = shell.run(line, cwd, environment)
    assert done.returncode == 0, done.stdout
    calls = [line for path in folder.iterdir() for line in path.read_text(errors="replace").splitlines()]
    return {Path(match[1]) for line in calls if (match := re.search(r" = \d+<(.*)>$", line))}


def inodes(paths: Iterable[Path]) -> set[Inode]:
    """Of the files that are there."""
    return {(path.stat().st_dev, path.stat().st_ino) for path in paths if path.is_file()}


def files_of(*folders: Path) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*") if path.is_file()}


def below(paths: Iterable[Path], *folders: Path) -> set[Path]:
    return {path for path in paths if any(path.is_relative_to(folder) for folder in folders)}


def test_the_trace_sees_files_through_links_and_in_c(tmp_path):
    secret, link, hard = (tmp_path / name for name in ("secret.b2nd", "link.b2nd", "hard.b2nd"))
    code = "import sys, blosc2, numpy; blosc2.asarray(numpy.zeros(9), urlpath=sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(secret)], check=True)
    link.symlink_to(secret)
    os.link(secret, hard)
    code = "import sys, blosc2; blosc2.open(sys.argv[1], mode='r')"
    for number, path in enumerate((link, hard)):
        opened = trace([sys.executable, "-c", code, path.name], tmp_path / f"{number}", dict(os.environ), tmp_path)
        assert inodes([secret]) <= inodes(opened)
    opened = trace([sys.executable, "-c", "import blosc2"], tmp_path / "none", dict(os.environ), tmp_path)
    assert not inodes([secret]) & inodes(opened)


class Shell:
    """nnU-Net's folders in a place of their own, and commands that run there."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("nnUNet_")}
        self.environment |= {name: str(self.root / name) for name in FOLDERS}
        self.environment |= {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1"}
        exported = subprocess.run([str(BIN / "nnunet-cil"), "env"], capture_output=True, text=True, check=True)
        self.environment["nnUNet_extTrainer"] = exported.stdout.strip().split("=", 1)[1].strip("'\"")

    def run(self, *command: str) -> None:
        line = [str(BIN / command[0]), *command[1:]]
        done = shell.run(line, self.root, self.environment)
        assert done.returncode == 0, done.stdout

    def says(self, *arguments: str) -> str:
        """What ``nnunet-cil`` prints, run in this process: it starts sooner, and only what is traced needs its own."""
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as shown:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            patch.chdir(self.root)
            assert main(arguments) == 0
        return shown.getvalue()

    def trains(self, step: int, trainer: str = "PGCD", plans: str = "nnUNetPlans", fold: str = "all") -> list[str]:
        (dataset,) = (self.root / "nnUNet_preprocessed").glob(f"*_step{step}")
        options = ["-tr", f"nnUNetTrainer{trainer}", "-p", plans, "-device", "cpu"]
        return ["nnUNetv2_train", dataset.name, "3d_fullres", fold, *options]

    def traced(self, *command: str) -> set[Path]:
        line = [str(BIN / command[0]), *command[1:]]
        folder = self.root / f"trace_{len(list(self.root.glob('trace_*')))}"
        return below(trace(line, folder, self.environment, self.root), self.root) - files_of(folder)

    def step(self, step: int) -> dict[str, Path]:
        return {name: next((self.root / name).glob(f"*_step{step}"), Path("/none")) for name in FOLDERS}


@pytest.mark.chain
def test_a_step_runs_and_is_scored_after_all_earlier_data_are_deleted_and_opens_none_of_them(tmp_path):
    shell = Shell(tmp_path)
    root = shell.root
    for seed, (name, n_cases) in enumerate({"old": 3, "new": 3, "tests": 1}.items()):
        write_tiny_dataset(root / name, n_cases=n_cases, seed=seed)
    (root / "schedule.yaml").write_text(SCHEDULE)
    shell.says("prepare", "schedule.yaml")
    shell.run(*shell.trains(1, fold="0"))
    old, new = shell.step(1), shell.step(2)
    data = {path for path in files_of(root / "old", *old.values()) if path.name.endswith(DATA)}
    data = {path for path in data if path.name != "prototypes.npz"}
    assert {path.parent.name for path in data} == {
        *("imagesTr", "labelsTr", "nnUNetPlans_3d_fullres", "gt_segmentations", "validation")
    }
    vault = root / "vault"  # keeps the inodes, so that no new file gets one of them
    vault.mkdir()
    for number, path in enumerate(sorted(data)):
        os.link(path, vault / str(number))
    shell.says("audit", "schedule.yaml", "--forget", "1", "--yes")
    shutil.rmtree(root / "old")
    assert not [path for path in data if path.exists()]

    opened = shell.traced("nnunet-cil", "run", "schedule.yaml")

    assert not inodes(opened) & inodes(files_of(vault)), "by inode, under whatever name"
    assert {path.suffix for path in below(opened, old["nnUNet_raw"], old["nnUNet_preprocessed"])} <= {".json", ".part"}
    chain = root / "nnUNet_results" / "chain_two_hospitals"
    own = [root / "new", new["nnUNet_raw"], new["nnUNet_preprocessed"], shell.step(2)["nnUNet_results"]]
    scored = [root / "tests", chain / "test", chain / "predictions"]
    read = {path for path in opened if path.name.endswith(DATA)} - {
        path for path in below(opened, old["nnUNet_results"]) if path.name == "prototypes.npz"
    }
    assert read == below(read, *own, *scored)
    images = set((new["nnUNet_preprocessed"] / "nnUNetPlans_3d_fullres").glob("case_?.b2nd"))
    assert len(images) == 3
    assert inodes(images) <= inodes(opened), "the trace sees what is read"
    assert {path.name for path in below(opened, old["nnUNet_results"]) if path.suffix in (".pth", ".npz")} == {
        "checkpoint_final.pth",
        "prototypes.npz",
    }
    assert below(opened, chain / "test" / "images")
    assert "done, data removed" in shell.says("status", "schedule.yaml")
    assert (chain / "table.txt").is_file()


@pytest.mark.chain
def test_with_shared_images_a_training_opens_its_own_list_only_and_replay_is_caught(tmp_path):
    shell = Shell(tmp_path)
    write_schedule(shell.root / "schedule.yaml", write_tiny_dataset(shell.root / "source", n_cases=3))
    shell.says("prepare", "schedule.yaml", "--methods", "pgcd", "replay")
    shell.run(*shell.trains(1))
    old, new = shell.step(1), shell.step(2)
    of_old = files_of(old["nnUNet_raw"], old["nnUNet_preprocessed"])
    own = inodes(files_of(new["nnUNet_raw"], new["nnUNet_preprocessed"]))
    shared = inodes(of_old) & own
    secret = inodes(path for path in of_old if path.name.endswith(DATA)) - shared
    assert len(shared) == 4, "raw and preprocessed images of two cases"
    assert len(secret) == 6, "raw labels, preprocessed labels and properties; gt_segmentations are the raw labels"

    opened = shell.traced(*shell.trains(2))
    assert not inodes(opened) & secret
    assert not below(opened, old["nnUNet_raw"], old["nnUNet_preprocessed"], shell.root / "source")
    assert inodes(opened) & shared, "images of its own list"

    opened = shell.traced(*shell.trains(2, "Replay", "nnUNetPlans_replay"))
    assert inodes(opened) & secret, "it keeps cases of step 1, and the trace shows it"
    assert "which replay keeps: NOT privacy-safe" in shell.says("audit", "schedule.yaml")
