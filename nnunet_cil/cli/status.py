"""``nnunet-cil status``: say where a chain stands."""

from __future__ import annotations

import argparse

from nnunet_cil.cli.common import add_chain_arguments, schedule_of


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("status", help="say where a chain stands")
    add_chain_arguments(parser, methods="all that are prepared", seeds="all that are prepared")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit status."""
    schedule = schedule_of(args)
    from nnunet_cil import driver

    print(driver.status(schedule, args.methods, args.seeds))
    return 0
