"""``nnunet-cil info``: what an exported model is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("info", help="print the card of an exported model")
    parser.add_argument("model", type=Path, help="folder or zip written by nnunet-cil export")
    parser.add_argument("--json", action="store_true", help="print the card as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit status."""
    from nnunet_cil.export import card_text, read_card

    card = read_card(args.model)
    print(json.dumps(card, indent=1) if args.json else card_text(card))
    return 0
