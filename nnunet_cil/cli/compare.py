"""``nnunet-cil compare``: every method on the same data, plans, seeds and step 1."""

from __future__ import annotations

import argparse

from nnunet_cil.cli.common import add_chain_arguments, add_launcher_argument, schedule_of


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "compare",
        help="run several methods side by side and report the differences",
        description="Trains, predicts and scores what is not done yet. All methods of a seed share step 1, data and "
        "plans; the table and report.html show the differences to the schedule's own method (where it is not among "
        "them: to the first), paired by test subject.",
    )
    add_chain_arguments(parser, methods="all but replay and ilt_mib")
    add_launcher_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit status."""
    schedule = schedule_of(args)
    from nnunet_cil import driver

    methods = args.methods or driver.compared_methods(schedule)
    seeds = args.seeds or [schedule.training.seed]
    print(driver.run(schedule, methods, seeds, args.launcher))
    print(f"\nReport: {driver.write_report(schedule, methods, seeds)}")
    return 0
