"""Arguments that several subcommands share."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_chain_arguments(parser: argparse.ArgumentParser) -> None:
    """SCHEDULE, --methods and --seeds."""
    parser.add_argument("schedule", type=Path, help="YAML file that says what is learned when")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[],
        metavar="METHOD",
        help="methods to run side by side on the same step 1: pgcd, finetune, joint (default: the schedule's trainer)",
    )
    add_seeds_argument(parser)


def add_launcher_argument(parser: argparse.ArgumentParser) -> None:
    """--launcher."""
    parser.add_argument(
        "--launcher",
        choices=("local", "slurm"),
        help="make a job of each training: side by side on this machine, or on a Slurm cluster (default: one after the "
        "other, here)",
    )


def add_seeds_argument(parser: argparse.ArgumentParser) -> None:
    """--seeds."""
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[], metavar="SEED", help="seeds to run (default: the schedule's)"
    )
