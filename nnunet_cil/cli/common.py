"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnunet_cil.schedule import Schedule


def add_chain_arguments(
    parser: argparse.ArgumentParser, methods: str = "the schedule's", seeds: str = "the schedule's"
) -> None:
    """SCHEDULE, --methods and --seeds.

    Args:
        methods, seeds: which are taken where none are named, for the help.
    """
    parser.add_argument("schedule", type=Path, help="YAML file that says what is learned when")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[],
        metavar="METHOD",
        help=f"methods side by side on the same step 1, such as pgcd, finetune, joint (default: {methods})",
    )
    add_seeds_argument(parser, seeds)


def schedule_of(args: argparse.Namespace) -> Schedule:
    """SCHEDULE, read before the caller imports PyTorch, which takes seconds: a mistake in it is told at once."""
    from nnunet_cil.schedule import load_schedule

    return load_schedule(args.schedule)


def add_launcher_argument(parser: argparse.ArgumentParser) -> None:
    """--launcher."""
    parser.add_argument(
        "--launcher",
        choices=("local", "slurm"),
        help="make a job of each training: side by side on this machine, or on a Slurm cluster (default: one after the "
        "other, here)",
    )


def add_seeds_argument(parser: argparse.ArgumentParser, default: str = "the schedule's") -> None:
    """--seeds, see `add_chain_arguments`."""
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=_seed,
        default=[],
        metavar="SEED",
        help=f"seeds of the trainings (default: {default})",
    )


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected whole numbers from 0 on with spaces between: 0 1 2")
    return int(text)
