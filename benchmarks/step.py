"""Time and memory of a training step: ``python -m benchmarks.step --device cpu``.

All contestants of a setting take turns, each in a process of its own, so that a machine whose speed drifts treats them
alike; each figure is a median, each ratio the median of the ratios within a round. Memory is measured in further
processes: the peak above what the process held before the contestant was built.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import yaml

from benchmarks.setting import (
    NETWORKS,
    batch_of,
    incremental_trainer,
    machine,
    set_folders,
    stock_trainer,
    write_teacher,
)

STOCK, FLOOR = "stock", "stock + teacher"
Step = Callable[[], Any]


def contestants(names: Sequence[str], network: str, n_classes: int, device: torch.device) -> dict[str, Step]:
    """One training step of each contestant.

    Args:
        names: ``stock``, ``stock + teacher`` (the floor: one teacher forward beside nnU-Net's step), or a method with
            the setting of ``amp`` behind it (``pgcd off``, ``pgcd bfloat16``), then, if it is not 2, the number of the
            step (``pgcd off 6``; the number of classes stays) and settings (``pgcd off voxel_stride=4``).
    """
    chosen = NETWORKS[network]
    batch = batch_of(chosen, n_classes, device)
    steps: dict[str, Step] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        write_teacher(chosen, n_classes, device)
        for name in names:
            if name == STOCK:
                trainer = stock_trainer(chosen, n_classes, device)
                steps[name] = lambda trainer=trainer: trainer.train_step(batch)
            elif name == FLOOR:
                steps[name] = _floor(stock_trainer(chosen, n_classes, device), chosen, n_classes, device, batch)
            else:
                method, amp, *others = name.split()
                settings = {
                    key: yaml.safe_load(value) for key, _, value in (o.partition("=") for o in others if "=" in o)
                }
                step = int(next((other for other in others if "=" not in other), 2))
                trainer = incremental_trainer(chosen, n_classes, device, method, amp, step, settings)
                steps[name] = lambda trainer=trainer: trainer.train_step(batch)
    return steps


def _floor(trainer: Any, network: Any, n_classes: int, device: torch.device, batch: dict[str, Any]) -> Step:
    from benchmarks.setting import CONFIGURATION, dataset_json, plans_of
    from nnunet_cil import nnunet_api

    plans = plans_of(network, "Dataset001_Old")
    teacher = nnunet_api.build_network(plans, dataset_json(n_classes - 1), CONFIGURATION, "nnUNetTrainer")
    teacher.to(device).eval().requires_grad_(False)

    def step() -> None:
        with torch.no_grad(), torch.autocast(device.type, enabled=device.type == "cuda"):
            teacher(batch["data"])
        trainer.train_step(batch)

    return step


class _Process:
    """A contestant in a process of its own: what one sets for its process, as PGCD for the allocator, no other has."""

    def __init__(self, name: str, network: str, n_classes: int, device: torch.device) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, network, n_classes, device), daemon=True)
        self._process.start()
        theirs.close()
        self.name = name
        self._answer()

    def seconds(self) -> float:
        """Time of one step, in which the other processes wait."""
        self._ours.send(True)
        return self._answer()

    def _answer(self) -> Any:
        try:
            return self._ours.recv()
        except EOFError as error:
            raise RuntimeError(
                f"{self.name}: got no answer from its process, expected a time. If memory ran out, name fewer "
                "--contestants at a time: all of a setting hold theirs at once."
            ) from error

    def end(self) -> None:
        self._ours.send(False)
        self._process.join()


def _serve(asked: Connection, name: str, network: str, n_classes: int, device: torch.device) -> None:
    with tempfile.TemporaryDirectory() as root:
        set_folders(Path(root))
        step = contestants([name], network, n_classes, device)[name]
        asked.send(None)
        while asked.recv():
            started = perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            asked.send(perf_counter() - started)


def time_interleaved(
    names: Sequence[str], network: str, n_classes: int, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, after three rounds that do not count."""
    processes = {name: _Process(name, network, n_classes, device) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-3, rounds):
        for name, process in processes.items():
            taken = process.seconds()
            if number >= 0:
                seconds[name].append(taken)
    for process in processes.values():
        process.end()
    return seconds


def peak_bytes(name: str, network: str, n_classes: int, device: torch.device) -> int | None:
    """Peak memory of three steps of one contestant, above what was held before; None where it cannot be measured."""
    contestants([name], "tiny", 2, device)[name]()  # what is imported at the first step does not count
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        before = _resident("VmRSS")
    step = contestants([name], network, n_classes, device)[name]
    for _ in range(3):
        step()
    after = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")
    return None if before is None or after is None else after - before


def _resident(key: str) -> int | None:
    path = Path("/proc/self/status")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All settings that ``args`` names."""
    device = torch.device(args.device)
    rows = []
    for network in args.networks:
        for n_classes in args.classes:
            seconds = time_interleaved(args.contestants, network, n_classes, args.rounds, device)
            for name in args.contestants:
                rows.append(
                    {
                        "network": network,
                        "classes": n_classes,
                        "contestant": name,
                        "seconds": median(seconds[name]),
                        **{f"to_{base}": _ratio(seconds, name, base) for base in (STOCK, FLOOR)},
                        "peak_bytes": None if args.no_memory else _peak_in_own_process(args, name, network, n_classes),
                    }
                )
                print(_line(rows[-1]), flush=True)
    return {"machine": machine(device), "torch": torch.__version__, "rounds": args.rounds, "rows": rows}


def _ratio(seconds: dict[str, list[float]], name: str, base: str) -> float | None:
    if base not in seconds:
        return None
    return median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def _peak_in_own_process(args: argparse.Namespace, name: str, network: str, n_classes: int) -> int | None:
    command = [sys.executable, "-m", "benchmarks.step", "--device", args.device, "--networks", network]
    command += ["--classes", str(n_classes), "--contestants", name, "--only-memory"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _line(row: dict[str, Any]) -> str:
    ratios = ["" if (value := row[f"to_{base}"]) is None else f"{value:.2f}" for base in (STOCK, FLOOR)]
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
    cells = [row["network"], str(row["classes"]), row["contestant"], f"{row['seconds']:.3f}", *ratios, peak]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS))
    parser.add_argument(
        "--classes", nargs="+", type=int, default=[2, 14, 105], help="foreground classes, one of them new"
    )
    parser.add_argument("--contestants", nargs="+", help="by default with the precision of stock nnU-Net among them")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--only-memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    of_stock = "off" if args.device == "cpu" else "float16"
    args.contestants = args.contestants or [
        STOCK,
        FLOOR,
        f"finetune {of_stock}",
        f"pgcd {of_stock}",
        "pgcd bfloat16",
    ]
    args.networks = args.networks or ["hippocampus", "chaos", "standard64" if args.device == "cpu" else "standard128"]
    with tempfile.TemporaryDirectory() as root:
        set_folders(Path(root))
        if args.only_memory:
            print(peak_bytes(args.contestants[0], args.networks[0], args.classes[0], torch.device(args.device)))
            return
        print("| network | classes | step | seconds | to stock | to floor | peak MiB |\n|---|---|---|---|---|---|---|")
        result = measure(args)
    print(f"\n{result['machine']}, torch {result['torch']}, medians of {args.rounds} rounds")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
