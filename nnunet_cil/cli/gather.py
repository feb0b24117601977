"""``nnunet-cil gather``: one table of what ran on several machines."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunet_cil.cli.common import schedule_of


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "gather",
        help="one table of seeds and methods that ran on several machines",
        description="Copies the scores of the same chain's runs elsewhere into the chain's folder and writes the "
        "tables of all that is scored. The other machines' models and images are not needed.",
    )
    parser.add_argument("schedule", type=Path, help="YAML file of the chain, the same on all machines")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="chain_NAME of the other machines")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit status."""
    schedule = schedule_of(args)
    from nnunet_cil import driver

    print(driver.gather(schedule, args.folders))
    return 0
