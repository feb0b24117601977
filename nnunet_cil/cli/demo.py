"""``nnunet-cil demo``: a whole chain on made-up abdomens, in a few minutes on a CPU."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

SCHEDULE = """\
# A hospital labelled liver and spleen. New scans arrive on which only the kidneys are labelled.
name: demo
test:
  dataset: Dataset001_OldScans
  subjects: {subjects}
  classes: {{liver: liver, spleen: spleen, right_kidney: kidneys, left_kidney: kidneys}}
fold: all
device: {device}
plans: {{patch_size: [24, 40, 40], batch_size: 2, features_per_stage: [8, 16, 32, 32]}}
mirror_axes: []  # a short training has no time to learn mirrored abdomens
training:
  epochs: {epochs}
  iterations_per_epoch: 50
  val_iterations_per_epoch: 5
  initial_lr: 0.02
  later_lr: 0.02
  seed: {seed}
steps:
  - dataset: Dataset001_OldScans
    classes: [liver, spleen]
  - dataset: Dataset002_NewScans
    classes: {{right_kidney: kidneys, left_kidney: kidneys}}
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "demo", help="run a whole chain on made-up abdomens: what PGCD keeps, finetune forgets"
    )
    parser.add_argument("--folder", type=Path, default=Path("nnunet-cil-demo"), help="where all of it goes")
    parser.add_argument(
        "--methods", nargs="+", default=["pgcd", "finetune"], metavar="METHOD", help="methods to compare"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to train")
    parser.add_argument("--epochs", type=int, default=12, help="epochs of 50 iterations in each step")
    parser.add_argument("--seed", type=int, default=0, help="seed of the subjects and of the trainings")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit status."""
    folder = args.folder.absolute()
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[name] = str(folder / name)
        (folder / name).mkdir(parents=True, exist_ok=True)
    from nnunet_cil import driver
    from nnunet_cil.phantom import write_phantom
    from nnunet_cil.schedule import load_schedule

    old, new = (folder / "nnUNet_raw" / name for name in ("Dataset001_OldScans", "Dataset002_NewScans"))
    for source, n_test, seed in ((old, 6, args.seed), (new, 0, args.seed + 1)):
        if not (source / "dataset.json").is_file():
            write_phantom(source, n_train=6, n_test=n_test, seed=seed)
    subjects = json.loads((old / "split.json").read_text(encoding="utf-8"))["test"]
    path = folder / "demo.yaml"
    text = SCHEDULE.format(subjects=subjects, device=args.device, epochs=args.epochs, seed=args.seed)
    path.write_text(text, encoding="utf-8")
    schedule = load_schedule(path)
    print(driver.run(schedule, args.methods, []))
    page = driver.write_report(schedule, args.methods, [])
    print("\nThe report to open in a browser, and beside it the table, the scores and the figures:")
    for file in (page, *(page.with_name(name) for name in ("table.txt", "scores.json", "figures")), path):
        print(f"  {file}")
    return 0
