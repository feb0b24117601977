"""``nnunet-cil``: the command line."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import threading
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from nnunet_cil.parallel import on_sigterm

SUBCOMMANDS = (
    "run",
    "prepare",
    "status",
    "evaluate",
    "extend",
    "compare",
    "ablate",
    "gather",
    "report",
    "audit",
    "export",
    "verify",
    "info",
    "convert",
    "env",
    "demo",
)
INTERRUPTED = 130
ENOUGH_BYTES = 10_000_000
ERRORS = (ValueError, OSError, RuntimeError, MemoryError)
"""What is told in a line; anything else is a mistake of ours, and shows where it arose."""

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; ``args.run(args)`` runs the chosen one. Imports nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="nnunet-cil", description="Class-incremental segmentation with nnU-Net: chains of PGCD training steps."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('nnunet-cil')}")
    subparsers = parser.add_subparsers(title="subcommands", required=True, metavar="SUBCOMMAND")
    for name in SUBCOMMANDS:
        import_module(f"nnunet_cil.cli.{name}").add_parser(subparsers)
    # Before or after the subcommand; the default lies with the outer parser only, as an inner one would overwrite it.
    parser.set_defaults(debug=False)
    for each in (parser, *subparsers.choices.values()):
        each.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="say more, and show where an error arose"
        )
    return parser


def _interrupt(number: int, frame: object) -> None:
    """Take SIGTERM as Ctrl-C, so that a training that was started ends with us."""
    raise KeyboardInterrupt


def _tell_of_full_disks() -> None:
    """Say which of nnU-Net's folders are full: of several libraries' errors nobody would guess it."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        folder = os.environ.get(name, "")
        if os.path.isdir(folder) and (free := shutil.disk_usage(folder).free) < ENOUGH_BYTES:
            print(
                f"{name}: {folder} has {free / 1e6:.1f} MB left on its disk. Make room: the same command then goes on.",
                file=sys.stderr,
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``nnunet-cil``.

    Args:
        argv: arguments; None takes those of the process.

    Returns:
        The exit status: 0, 1 after an error (told on stderr), 130 after an interrupt; argparse itself exits with 2.
    """
    args = build_parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("nnunet_cil").setLevel(logging.DEBUG if args.debug else logging.INFO)
    if not args.debug:
        warnings.simplefilter("ignore", FutureWarning)  # of torch, about what nnU-Net's dependencies use
    if threading.current_thread() is threading.main_thread():
        on_sigterm(_interrupt)
    try:
        return args.run(args)
    except ERRORS as error:
        logger.debug("Traceback of the error:", exc_info=True)
        print(f"nnunet-cil: error: {error or type(error).__name__}", file=sys.stderr)
        _tell_of_full_disks()
        return 1
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from here.", file=sys.stderr)
        return INTERRUPTED
