"""``nnunet-cil env``: show nnU-Net where our trainers are."""

from __future__ import annotations

import argparse
import logging

logger = logging.getLogger(__name__)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "env",
        help="print the line that lets nnU-Net find the trainers",
        description='Prints the line that lets nnU-Net find the trainers; eval "$(nnunet-cil env)" runs it.',
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--persist", action="store_true", help="also set it whenever the active venv or conda environment is activated"
    )
    choice.add_argument("--remove", action="store_true", help="undo --persist")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit status."""
    from nnunet_cil.environment import export_line, persist

    if args.persist or args.remove:
        changed = persist(remove=args.remove)
        for path in changed:
            logger.info("%s: changed. It counts from the next activation on.", path)
        if not changed:
            logger.info("Nothing to change.")
    if not args.remove:
        print(export_line())
    return 0
