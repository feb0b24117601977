"""AMOS22, abdominal organs in CT and MR (Ji et al. 2022; Zenodo 7262581)."""

from __future__ import annotations

import re
from pathlib import Path

from nnunet_cil.convert.nifti import write_case
from nnunet_cil.convert.source import (
    ENDING,
    PublicSet,
    check_choice,
    check_layout,
    nifti_files,
    numbered,
    pair,
    root_of,
    shown,
)

MODALITIES = ("ct", "mr")
LAST_CT = 500  # the set's readme: numbers below 500 are CT; nnU-Net's Dataset218_Amos2022_task1.py: up to 500
SIZES = {"ct": {"imagesTr": 200, "imagesVa": 100}, "mr": {"imagesTr": 40, "imagesVa": 20}}  # as in its readme
# Numbers 1 to 15 as in the set's dataset.json, where aorta and inferior vena cava are spelt "arota" and "postcava".
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
    "pancreas",
    "right_adrenal_gland",
    "left_adrenal_gland",
    "duodenum",
    "bladder",
    "prostate_or_uterus",
)


def find(source: Path, modality: str) -> PublicSet:
    """Read the layout ``imagesTr``, ``labelsTr``, ``imagesVa``, ``labelsVa``, with files ``amos_NNNN.nii.gz``.

    The set's validation subjects are held out. Its test subjects are left out, as their labels are not public.

    Args:
        modality: ``ct`` or ``mr``: which subjects are taken.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: another layout, or no subject of this modality; all problems at once.
    """
    check_choice("--modality", modality, MODALITIES)
    root = root_of(source, "imagesTr", "imagesTr, labelsTr, imagesVa and labelsVa")
    problems: list[str] = []
    for folder in (root / f"{kind}{part}" for part in ("Tr", "Va") for kind in ("images", "labels")):
        if others := [name + ENDING for name in nifti_files(folder, []) if _number(name) is None]:
            problems.append(f"{folder}: got {shown(others)}, expected names such as amos_0001{ENDING}.")

    def is_wanted(name: str) -> bool:
        number = _number(name)
        return number is not None and (number <= LAST_CT) == (modality == "ct")

    cases = []
    for part in ("Tr", "Va"):
        found = pair(root / f"images{part}", root / f"labels{part}", problems, keep=is_wanted)
        if not found:
            problems.append(f"{root / f'images{part}'}: got no {modality.upper()} subject with a label, expected some.")
        cases += found
    check_layout(root, "AMOS22", problems)
    return PublicSet(
        name=f"AMOS_{modality.upper()}",
        channels=(modality.upper(),),
        labels=numbered(ORGANS),
        cases=tuple(cases),
        test=frozenset(case.name for case in cases if case.part == "imagesVa"),
        split_origin="the set's own: imagesTr for training, imagesVa for test",
        terms="CC BY 4.0 (Zenodo 7262581), or CC BY-SA 4.0 (the set's dataset.json): the two differ",
        reference="Ji et al.: AMOS: A large-scale abdominal multi-organ benchmark for versatile medical image "
        "segmentation. NeurIPS Datasets and Benchmarks, 2022",
        write=write_case,
        sizes=SIZES[modality],
    )


def _number(name: str) -> int | None:
    match = re.fullmatch(r"amos_(\d{4})", name)
    return int(match[1]) if match else None
