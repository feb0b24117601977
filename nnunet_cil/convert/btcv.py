"""BTCV, the abdomen part of "Multi-Atlas Labeling Beyond the Cranial Vault" (Synapse syn3193805, MICCAI 2015)."""

from __future__ import annotations

import re
from pathlib import Path

from nnunet_cil.convert.nifti import write_case
from nnunet_cil.convert.source import ENDING, Case, PublicSet, check_layout, nifti_files, numbered, root_of, shown

# Numbers 1 to 13 as in MONAI's dataset_0.json for this set and uni-medical/A-Eval's label_systems.py.
ORGANS = (
    "spleen",
    "right_kidney",
    "left_kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior_vena_cava",
    "portal_and_splenic_veins",
    "pancreas",
    "right_adrenal_gland",
    "left_adrenal_gland",
)
# lists/lists_Synapse/train.txt and test_vol.txt of github.com/Beckschen/TransUNet, which many papers took over.
TRAIN = (5, 6, 7, 9, 10, 21, 23, 24, 26, 27, 28, 30, 31, 33, 34, 37, 39, 40)
TEST = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)


def find(source: Path) -> PublicSet:
    """Read the layout ``Training/img/imgNNNN.nii.gz``, ``Training/label/labelNNNN.nii.gz``, as in RawData.zip.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: another layout, or other subjects than the 30 labelled ones; all problems at once.
    """
    root = root_of(source, "Training", "RawData, which holds Training/img and Training/label")
    problems: list[str] = []
    images = _by_number(root / "Training" / "img", "img", problems)
    labels = _by_number(root / "Training" / "label", "label", problems)
    expected = sorted((*TRAIN, *TEST))
    for kind, found in (("img", images), ("label", labels)):
        folder = root / "Training" / kind
        if missing := [f"{kind}{n:04d}{ENDING}" for n in expected if n not in found]:
            problems.append(f"{folder}: got no {shown(missing)}, expected the 30 labelled subjects.")
        if others := [path.name for n, path in found.items() if n not in expected]:
            problems.append(f"{folder}: got {shown(others)}, expected the numbers 1 to 10 and 21 to 40 only.")
    check_layout(root, "BTCV", problems)
    return PublicSet(
        name="BTCV",
        channels=("CT",),
        labels=numbered(ORGANS),
        cases=tuple(Case(f"img{n:04d}", "Training", (images[n],), (labels[n],)) for n in expected),
        test=frozenset(f"img{n:04d}" for n in TEST),
        split_origin="lists/lists_Synapse of github.com/Beckschen/TransUNet (18 for training, 12 for test)",
        terms="the terms of Synapse syn3193805, to which you agreed on registration",
        reference="Landman et al.: MICCAI multi-atlas labeling beyond the cranial vault: workshop and challenge. 2015",
        write=write_case,
    )


def _by_number(folder: Path, prefix: str, problems: list[str]) -> dict[int, Path]:
    """Files by the number in their name; a name of another form is a problem."""
    files = nifti_files(folder, problems)
    matched = {name: re.fullmatch(rf"{prefix}(\d{{4}})", name) for name in files}
    if others := [name + ENDING for name, match in matched.items() if match is None]:
        problems.append(f"{folder}: got {shown(others)}, expected names such as {prefix}0001{ENDING}.")
    return {int(match[1]): files[name] for name, match in matched.items() if match is not None}
