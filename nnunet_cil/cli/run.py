"""``nnunet-cil run``: run a whole chain, or go on where it stopped."""

from __future__ import annotations

import argparse

from nnunet_cil.cli.common import add_chain_arguments, add_launcher_argument, schedule_of


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("run", help="run a whole chain, or go on where it stopped")
    add_chain_arguments(parser)
    add_launcher_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit status."""
    schedule = schedule_of(args)
    from nnunet_cil import driver

    print(driver.run(schedule, args.methods, args.seeds, args.launcher))
    return 0
