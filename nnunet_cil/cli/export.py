"""``nnunet-cil export``: a step's model as folder and zip for stock nnU-Net."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from nnunet_cil.cli.common import schedule_of


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "export",
        help="write a step's model as folder and zip that stock nnU-Net predicts with",
        description="Writes TARGET and TARGET.zip: weights, plans, prototypes and a model card, without logs, names of "
        "subjects or paths. Whoever gets it needs nnU-Net only.",
    )
    parser.add_argument("schedule", type=Path, help="YAML file of the chain")
    parser.add_argument("target", type=Path, help="folder to write; .zip is added for the archive")
    parser.add_argument("--method", help="default: the schedule's trainer")
    parser.add_argument("--seed", type=int, help="default: the schedule's")
    parser.add_argument("--step", help="number of the step, or joint; default: the last one")
    parser.add_argument("--licence", help="for the model card, e.g. 'CC BY 4.0'")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit status."""
    schedule = schedule_of(args)
    from nnunet_cil.chain import JOINT, Chain
    from nnunet_cil.export import STOCK_TRAINER, export_model

    chain = Chain.open(schedule)
    if not chain.content["plans_name"]:
        raise ValueError(
            f"{chain.folder}: got a chain without any training, expected one. Start with `nnunet-cil run`."
        )
    method = args.method or (JOINT if args.step == JOINT else chain.default_method)
    variant = chain.variant(method, chain.schedule.training.seed if args.seed is None else args.seed)
    step = JOINT if JOINT in (method, args.step) else _step(args.step, chain.n_steps)
    archive = export_model(chain, variant, step, chain.schedule.folds, args.target.absolute(), args.licence)
    print(f"{args.target}\n{archive}")
    plans_name = chain.plans_name(chain.owner(variant, step))
    options = f"-d {chain.dataset_name(step)} -c {chain.schedule.configuration} -p {plans_name}"
    options += f" -f {' '.join(map(str, chain.schedule.folds))}"
    (model,) = (args.target / chain.dataset_name(step)).iterdir()
    if (trainer := model.name.split("__")[0]) != STOCK_TRAINER:
        options += f" -tr {trainer}"
    print(f"To predict with it:\n  nnUNetv2_install_pretrained_model_from_zip {shlex.quote(archive.name)}")
    print(f"  nnUNetv2_predict -i IMAGES -o SEGMENTATIONS {options}")
    return 0


def _step(value: str | None, n_steps: int) -> int:
    if value is None:
        return n_steps
    if not value.isdigit() or not 1 <= int(value) <= n_steps:
        raise ValueError(f"--step: got {value!r}, expected a number from 1 to {n_steps}, or joint.")
    return int(value)
