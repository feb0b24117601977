"""``nnunet-cil extend``: teach a trained nnU-Net new classes without its data."""

from __future__ import annotations

import argparse
import glob
import re
from collections.abc import Sequence
from pathlib import Path

from nnunet_cil.cli.common import add_launcher_argument


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "extend",
        help="teach any trained nnU-Net new classes, without its data",
        description="Writes a schedule whose first step is the given model, and runs it. The data that it was trained "
        "on are not needed.",
    )
    parser.add_argument(
        "model",
        help="model folder TRAINER__PLANS__CONFIGURATION, a zip of an export, or number or name of a dataset in "
        "nnUNet_results, with -tr, -p and -c as in nnUNetv2_predict",
    )
    parser.add_argument("-tr", dest="trainer", default="nnUNetTrainer", help="default: nnUNetTrainer")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", help="default: nnUNetPlans")
    parser.add_argument("-c", dest="configuration", default="3d_fullres", help="default: 3d_fullres")
    parser.add_argument("--with", dest="dataset", required=True, metavar="DATASET", help="raw dataset of new scans")
    parser.add_argument(
        "--classes",
        nargs="+",
        required=True,
        metavar="NAME[=LABEL]",
        help="new classes, each with its label name or number in DATASET if that is not NAME",
    )
    parser.add_argument("--name", help="of the chain (default: extended)", default="extended")
    parser.add_argument("--test", metavar="DATASET", help="raw dataset with test images and labels to score")
    parser.add_argument(
        "--fold", nargs="+", default=["all"], help="folds of the new training (default: all, which is all new scans)"
    )
    parser.add_argument("--model-fold", metavar="FOLD", help="fold of MODEL to start from, where it has several")
    parser.add_argument("--epochs", type=int, help="default: nnU-Net's 1000")
    parser.add_argument("--iterations", type=int, help="iterations of an epoch (default: nnU-Net's 250)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--schedule", type=Path, help="where to write the schedule (default: NAME.yaml, here)")
    parser.add_argument("--only-write", action="store_true", help="write and check the schedule, run nothing")
    add_launcher_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit status."""
    import yaml

    from nnunet_cil import driver
    from nnunet_cil.schedule import load_schedule
    from nnunet_cil.untrusted import EXPECTED_NAME, is_name

    if not is_name(args.name):
        raise ValueError(f"--name: got {args.name!r}, expected {EXPECTED_NAME}.")
    path = args.schedule or Path(f"{args.name}.yaml")
    folds = [_fold(fold) for fold in args.fold]
    content = {
        "name": args.name,
        "model": str(_model(args)),
        **({} if args.model_fold is None else {"model_fold": _fold(args.model_fold)}),
        "steps": [{"dataset": _dataset(args.dataset), "classes": _classes(args.classes)}],
        "fold": folds if len(folds) > 1 else folds[0],
        "device": args.device,
    }
    training = {"epochs": args.epochs, "iterations_per_epoch": args.iterations}
    if training := {key: value for key, value in training.items() if value is not None}:
        content["training"] = training
    if args.test:
        content["test"] = {"dataset": _dataset(args.test)}
    text = yaml.safe_dump(content, sort_keys=False)
    was_there = path.is_file()
    if was_there and path.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"{path}: it exists with other content and is not touched. `nnunet-cil run {path}` goes on with it; for "
            "another one give another --name or --schedule, or remove it."
        )
    path.write_text(text, encoding="utf-8")
    try:
        schedule = load_schedule(path)
    except Exception:
        if not was_there:
            path.unlink()  # the same command with its mistake mended writes it anew
        raise
    print(f"The schedule is {path}; `nnunet-cil run {path}` goes on with it.")
    if not args.only_write:
        print(driver.run(schedule, [], [], args.launcher))
    return 0


def _model(args: argparse.Namespace) -> Path:
    """A path as it is; of a dataset the model of trainer, plans and configuration in nnUNet_results.

    Raises:
        ValueError: nnUNet_results has no such dataset, or several of that number.
    """
    from nnunet_cil.nnunet_api import model_folder_name, nnunet_paths

    if not args.model.isdigit() and (
        Path(args.model).exists() or not re.fullmatch(r"Dataset\d{3}_[^/\\]+", args.model)
    ):
        return Path(args.model).absolute()
    results = nnunet_paths()["nnUNet_results"]
    found = list(results.glob(f"Dataset{int(args.model):03d}_*" if args.model.isdigit() else glob.escape(args.model)))
    if len(found) != 1:
        raise ValueError(f"{args.model}: got {len(found)} such datasets in {results}, expected one with the model.")
    return found[0] / model_folder_name(args.trainer, args.plans, args.configuration)


def _fold(text: str) -> str | int:
    return int(text) if text.isdigit() else text


def _dataset(value: str) -> str | int:
    """A number, a name in nnUNet_raw, or a path, which is made absolute."""
    if value.isdigit():
        return int(value)
    return str(Path(value).absolute()) if Path(value).is_dir() else value


def _classes(given: Sequence[str]) -> dict[str | int, str]:
    """Own label -> class.

    Raises:
        ValueError: a label is given twice, or as of `_class`.
    """
    classes: dict[str | int, str] = {}
    for text in given:
        own, name = _class(text)
        if classes.setdefault(own, name) != name:
            raise ValueError(f"--classes: got the label {own} for {classes[own]} and for {name}, expected one class.")
    return classes


def _class(text: str) -> tuple[str | int, str]:
    """Own label -> class, of ``NAME`` or ``NAME=LABEL``.

    Raises:
        ValueError: NAME is a number, as where the two sides are exchanged.
    """
    name, equals, label = text.partition("=")
    if name.isdigit():
        meant = f"{label or 'NAME'}={name}"
        raise ValueError(f"--classes: got {text}, expected NAME=LABEL: {meant}.")
    own = label if equals else name
    return (int(own) if own.isdigit() else own), name
