"""Make a raw dataset whose training cases lack some labels, and the list of them, from one that has all.

    python examples/drop_labels.py SOURCE TARGET --share 0.333 --seed 0

Images are linked. Labels of training subjects (``split.json``) are removed by chance; test subjects keep theirs.
``unlabelled.csv`` in TARGET says what is missing, so nnunet-cil takes it into account; without this file the missing
organs would be learned as background.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np
import SimpleITK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="raw dataset with split.json")
    parser.add_argument("target", type=Path, help="raw dataset to make, must not exist")
    parser.add_argument("--share", type=float, default=1 / 3, help="of the labels to remove (default: a third)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random = np.random.default_rng(args.seed)
    labels = json.loads((args.source / "dataset.json").read_text(encoding="utf-8"))["labels"]
    split = json.loads((args.source / "split.json").read_text(encoding="utf-8"))
    for name in ("imagesTr", "labelsTr"):
        (args.target / name).mkdir(parents=True)
    for image in (args.source / "imagesTr").iterdir():
        (args.target / "imagesTr" / image.name).symlink_to(image.resolve())
    for name in ("dataset.json", "split.json"):
        (args.target / name).write_bytes((args.source / name).read_bytes())
    missing = []
    for path in sorted((args.source / "labelsTr").iterdir()):
        case = path.name.split(".")[0]
        image = SimpleITK.ReadImage(str(path))
        voxels = SimpleITK.GetArrayFromImage(image)
        for name, label in labels.items():
            if name not in ("background", "ignore") and case in split["train"] and random.random() < args.share:
                voxels[voxels == label] = 0
                missing.append((case, name))
        left = SimpleITK.GetImageFromArray(voxels)
        left.CopyInformation(image)
        SimpleITK.WriteImage(left, str(args.target / "labelsTr" / path.name))
    with open(args.target / "unlabelled.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("case", "class"), *missing])


if __name__ == "__main__":
    main()
