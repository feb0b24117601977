"""``nnunet-cil prepare``: make the datasets and plans of all steps, train nothing."""

from __future__ import annotations

import argparse

from nnunet_cil.cli.common import add_chain_arguments, schedule_of


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "prepare", help="make the datasets and plans of all steps and print the nnUNetv2_train lines to type"
    )
    add_chain_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit status."""
    schedule = schedule_of(args)
    from nnunet_cil import driver
    from nnunet_cil.environment import export_line

    lines = driver.prepare(schedule, args.methods, args.seeds)
    print("Prepared. Train the steps in this order:")
    print(f"  {export_line()}")
    for line in lines:
        print(f"  {line}")
    return 0
