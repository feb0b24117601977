"""Time of a whole chain, phase by phase: ``python -m benchmarks.chain``.

A two-step chain on phantoms through the driver, and beside it what nnU-Net alone does for one model on step 2's data:
fingerprint and preprocessing, a training with as many iterations by its own trainer (bare, in a process of its own as
ours), prediction of the same test subjects. Start-up, pseudo-labels, prototypes and checkpoints are part of a training.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import yaml

from benchmarks.setting import machine, set_folders

STOCK = """
import json, sys, torch
from nnunetv2.run.run_training import get_trainer_from_args
name, configuration, plans, epochs, iterations, validations, device = sys.argv[1:]
trainer = get_trainer_from_args(name, configuration, "all", "nnUNetTrainer", plans, device=torch.device(device))
trainer.num_epochs, trainer.num_iterations_per_epoch = int(epochs), int(iterations)
trainer.num_val_iterations_per_epoch = int(validations)
trainer.run_training()
"""


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--method", default="pgcd")
    parser.add_argument("--amp", default="auto", help="precision of ours: auto, off, bfloat16")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of 100 iterations in each training")
    parser.add_argument("--iterations", type=int, default=100, help="iterations of an epoch")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        set_folders(Path(root))
        with contextlib.redirect_stdout(io.StringIO()):
            result = measure(args, Path(root))
    print("| phase | ours, s | nnU-Net, s | ratio |\n|---|---:|---:|---:|")
    for phase, row in result["phases"].items():
        ours, theirs = row["ours"], row.get("nnunet")
        print(f"| {phase} | {ours:.1f} | " + (f"{theirs:.1f} | {ours / theirs:.2f} |" if theirs else "| |"))
    print(f"\n{result['machine']}, {args.epochs} x {args.iterations} iterations a training, amp {args.amp}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Run the chain and nnU-Net's part once each."""
    from nnunet_cil import dataset, driver, evaluate, nnunet_api
    from nnunet_cil.chain import Chain
    from nnunet_cil.parallel import worker_count
    from nnunet_cil.phantom import write_phantom
    from nnunet_cil.schedule import load_schedule

    write_phantom(root / "phantoms", n_train=8, n_test=4)
    content = {
        "name": "bench",
        "source": str(root / "phantoms"),
        "test": "phantoms/split.json",
        "fold": "all",
        "device": args.device,
        "plans": {"patch_size": [32, 48, 48], "batch_size": 2, "features_per_stage": [8, 16, 32, 32]},
        "training": {
            "epochs": args.epochs,
            "iterations_per_epoch": args.iterations,
            "val_iterations_per_epoch": 2,
            "amp": args.amp,
        },
        "steps": [["liver", "spleen"], ["right_kidney", "left_kidney"]],
    }
    (root / "bench.yaml").write_text(yaml.safe_dump(content))
    schedule = load_schedule(root / "bench.yaml")
    ours: dict[str, float] = {}
    with _timed(dataset, "_preprocess", lambda chain, step, *_: f"preparing step {step}", ours):
        driver.prepare(schedule, [args.method], [])
    with (
        _timed(driver, "_train", lambda chain, variant, step, *_: f"training step {step}", ours),
        _timed(driver, "evaluate_model", lambda chain, variant, step, *_: f"predicting and scoring step {step}", ours),
    ):
        driver.run(schedule, [args.method], [])
    phases = {phase: {"ours": seconds} for phase, seconds in ours.items()}

    chain = Chain.open(schedule)
    variant = chain.variant(args.method, 0)
    plans = {**dataset.base_plans(chain), "dataset_name": chain.dataset_name(2), "plans_name": "stock"}
    (chain.preprocessed(2) / "stock.json").write_text(json.dumps(plans))
    workers = worker_count(8)
    images = nnunet_api.image_lists(chain.folder / "test" / "images", ".nii.gz")
    shutil.rmtree(chain.folder / "test" / "preprocessed")
    model = chain.paths["nnUNet_results"] / chain.dataset_name(2) / "nnUNetTrainer__stock__3d_fullres"
    environment = {**os.environ, "nnUNet_n_proc_DA": os.environ.get("nnUNet_n_proc_DA", "0")}  # noqa: SIM112
    numbers = [str(args.epochs), str(args.iterations), "2", args.device]
    command = [sys.executable, "-c", STOCK, chain.dataset_name(2), "3d_fullres", "stock", *numbers]
    device = torch.device(args.device)
    theirs: dict[str, Callable[[], Any]] = {
        "preparing step 2": lambda: _nnunet_preparation(chain.dataset_id(2), workers),
        "training step 2": lambda: subprocess.run(command, check=True, capture_output=True, env=environment),
        "predicting and scoring step 2": lambda: nnunet_api.predict(
            model, ("all",), "3d_fullres", images, root / "p", root / "o", device, lambda line: None
        ),
    }
    for phase, way in theirs.items():
        started = perf_counter()
        way()
        phases[phase]["nnunet"] = perf_counter() - started
    both = [row for row in phases.values() if "nnunet" in row]
    phases["step 2 in all"] = {name: sum(row[name] for row in both) for name in ("ours", "nnunet")}
    assert evaluate.evaluation_file(chain, variant, 2, "all").is_file()
    return {"machine": machine(device), "phases": phases}


def _nnunet_preparation(number: int, workers: int) -> None:
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset, preprocess_dataset

    extract_fingerprint_dataset(number, num_processes=workers, verbose=False, show_progress_bar=False, clean=True)
    preprocess_dataset(number, "stock", ("3d_fullres",), (workers,), show_progress_bar=False)


@contextlib.contextmanager
def _timed(module: Any, name: str, phase: Callable[..., str], seconds: dict[str, float]) -> Iterator[None]:
    """Add the time of each call of a module's function to its phase."""
    function = getattr(module, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            key = phase(*args)
            seconds[key] = seconds.get(key, 0.0) + perf_counter() - started

    setattr(module, name, timed)
    try:
        yield
    finally:
        setattr(module, name, function)


if __name__ == "__main__":
    main()
