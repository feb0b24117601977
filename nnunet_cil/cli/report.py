"""``nnunet-cil report``: one page on what a chain has kept and learned."""

from __future__ import annotations

import argparse

from nnunet_cil.cli.common import add_chain_arguments, schedule_of


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "report",
        help="write a page with tables, figures and pictures of a chain",
        description="Writes report.html, one file that opens anywhere, and figures/ (PNG and PDF) into the chain's "
        "folder. It reads what `run` and `evaluate` have written; nothing is trained or predicted.",
    )
    add_chain_arguments(parser, methods="all that the chain has", seeds="all that the chain has")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit status."""
    schedule = schedule_of(args)
    from nnunet_cil import driver

    print(driver.write_report(schedule, args.methods, args.seeds, must_be_there=True))
    return 0
