"""``nnunet-cil evaluate``: score the models that are trained."""

from __future__ import annotations

import argparse

from nnunet_cil.cli.common import add_chain_arguments, schedule_of


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("evaluate", help="score the models that are trained")
    add_chain_arguments(parser, methods="all that the chain has", seeds="all that the chain has")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit status."""
    schedule = schedule_of(args)
    from nnunet_cil import driver

    print(driver.evaluate(schedule, args.methods, args.seeds))
    return 0
