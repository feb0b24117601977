"""``nnunet-cil ablate``: the chain's own method with one part of it left out at a time."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunet_cil.cli.common import add_launcher_argument, add_seeds_argument, schedule_of


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "ablate",
        help="run the chain's method with one part of it left out at a time",
        description="Trains, predicts and scores what is not done yet: a dozen chains a seed, which share step 1.",
    )
    parser.add_argument("schedule", type=Path, help="YAML file that says what is learned when")
    add_seeds_argument(parser)
    add_launcher_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit status."""
    schedule = schedule_of(args)
    from nnunet_cil import driver

    methods = driver.ablated_methods(schedule)
    seeds = args.seeds or [schedule.training.seed]
    print(driver.run(schedule, methods, seeds, args.launcher))
    print(f"\nReport: {driver.write_report(schedule, methods, seeds)}")
    return 0
