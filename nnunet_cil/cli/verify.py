"""``nnunet-cil verify``: whether a chain or an exported model is still what was trained."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "verify",
        help="compare a chain or an exported model with the digests in its lineage.json",
        description="Names the first link of a chain that does not fit, with the file and both digests, and ends with "
        "status 1. Nothing is trained, predicted, unpacked or unpickled.",
    )
    parser.add_argument("target", type=Path, help="schedule, folder chain_NAME, or exported folder or zip")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit status."""
    from nnunet_cil.export import verify_export
    from nnunet_cil.lineage import CHAIN_FILE, Files, verify_chain

    files, target = Files(), args.target
    is_schedule = target.suffix in (".yaml", ".yml")
    if is_schedule:
        target = _chain_folder(target)
    verify = verify_chain if is_schedule or (target / CHAIN_FILE).is_file() else verify_export
    for line in verify(target, files):
        print(line)
    print(f"all {len(files)} files fit")
    return 0


def _chain_folder(schedule: Path) -> Path:
    """The chain of a schedule, of which nothing but the name is read: its data may be gone."""
    import yaml

    from nnunet_cil.nnunet_api import nnunet_paths
    from nnunet_cil.untrusted import is_name

    try:
        content = yaml.safe_load(schedule.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{schedule}: got no valid YAML: {error}") from error
    if not isinstance(content, dict) or not is_name(content.get("name")):
        raise ValueError(f"{schedule}: got no name, expected the schedule of a chain.")
    return nnunet_paths()["nnUNet_results"] / f"chain_{content['name']}"
