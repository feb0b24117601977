"""``nnunet-cil convert``: a public set as raw dataset."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

SETS = {
    "btcv": "BTCV abdomen CT: RawData with Training/img and Training/label",
    "word": "WORD abdomen CT: imagesTr, imagesVal, imagesTs and their labels",
    "amos": "AMOS22 abdomen CT or MR: imagesTr, imagesVa and their labels",
    "totalsegmentator": "TotalSegmentator CT, version 2: meta.csv, sNNNN/ct.nii.gz and sNNNN/segmentations",
    "msd": "a task of the Medical Segmentation Decathlon, such as Task04_Hippocampus",
    "chaos": "CHAOS abdomen CT or MR: Train_Sets with CT and MR, DICOM and PNG",
}
MODALITIES = {"amos": ("ct", "mr"), "chaos": ("ct", "t2spir", "t1dual")}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "convert",
        help="write a public set as raw dataset, with its usual split",
        description="Writes DatasetNNN_NAME with split.json into nnUNet_raw. Images are linked where they are NIfTI. "
        "Downloading a set and keeping to its terms is up to you.",
    )
    sets = parser.add_subparsers(title="sets", dest="set", required=True, metavar="SET")
    for name, layout in SETS.items():
        each = sets.add_parser(name, help=layout, description=layout)
        each.add_argument("source", type=Path, help="folder of the set, as unpacked")
        each.add_argument("--dataset-id", type=int, required=True, metavar="N", help="nnU-Net's number, 1 to 999")
        each.add_argument("--name", help="of the dataset (default: the set's)")
        if name in MODALITIES:
            each.add_argument("--modality", required=True, choices=MODALITIES[name], help="which images to take")
        if name == "totalsegmentator":
            each.add_argument(
                "--organs",
                nargs="+",
                required=True,
                metavar="ORGAN",
                help="masks to take; they are numbered in this order, and where they overlap the later one wins",
            )
        each.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit status."""
    from nnunet_cil.convert.write import write_dataset

    options = {name: getattr(args, name) for name in ("modality", "organs") if hasattr(args, name)}
    found = import_module(f"nnunet_cil.convert.{args.set}").find(args.source, **options)
    converted = write_dataset(found, args.dataset_id, args.name)
    n_train, n_test = len(converted.train), len(converted.test)
    print(converted.folder)
    print(f"{n_train + n_test} cases: {n_train} for training, {n_test} for test. Split: {found.split_origin}.")
    print(f"Labels: {', '.join(f'{value} {label}' for label, value in found.labels.items())}")
    print(f"Terms: {found.terms}.")
    print(f"Cite: {found.reference}.")
    print(f"In a schedule:\n  source: {converted.folder.name}\n  test: {converted.folder / 'split.json'}")
    return 0
