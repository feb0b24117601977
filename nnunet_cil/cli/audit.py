"""``nnunet-cil audit``: which data a chain read and what is kept of them; remove the data of finished steps."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunet_cil.cli.common import schedule_of


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "audit",
        help="show which data each step read and what is kept of them, and remove those of finished steps",
        description="Shows for each step which data its trainings read, what is kept of them, and which files name its "
        "cases. With --forget the chain's data of finished steps are removed: raw, preprocessed, pseudo-labels and "
        "predicted masks. Models, prototypes, scores and logs stay, your own datasets too, and the chain goes on.",
    )
    parser.add_argument("schedule", type=Path, help="YAML file of the chain")
    parser.add_argument("--names", action="store_true", help="show the names of cases, not only how many")
    parser.add_argument(
        "--forget", nargs="+", default=[], metavar="STEP", help="steps whose data to remove: numbers, or joint"
    )
    parser.add_argument("--yes", action="store_true", help="remove them; without it, --forget only lists what would go")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit status."""
    schedule = schedule_of(args)
    from nnunet_cil.audit import audit_chain, audit_text, check_forget, forget, forgetting_text
    from nnunet_cil.chain import Chain

    chain = Chain.open(schedule)
    steps = [int(step) if step.isdigit() else step for step in args.forget]
    if steps:
        print(forgetting_text(check_forget(chain, steps)))
        if not args.yes:
            print("Nothing was removed. The same command with --yes removes it; it does not come back.")
            return 0
        with chain.locked():
            forget(chain, steps)
        print()
    print(audit_text(chain, audit_chain(chain), args.names))
    return 0
