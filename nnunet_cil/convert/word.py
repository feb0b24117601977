"""WORD, the Whole abdominal ORgan Dataset (Luo et al. 2022)."""

from __future__ import annotations

from pathlib import Path

from nnunet_cil.convert.nifti import write_case
from nnunet_cil.convert.source import PublicSet, check_layout, numbered, pair, root_of

# Numbers 1 to 16 in this order: the order of the paper; the numbers as in uni-medical/A-Eval's label_systems.py and
# in MIC-DKFZ/MultiTalent's conversion.
ORGANS = (
    "liver",
    "spleen",
    "left_kidney",
    "right_kidney",
    "stomach",
    "gallbladder",
    "esophagus",
    "pancreas",
    "duodenum",
    "colon",
    "intestine",
    "adrenal",
    "rectum",
    "bladder",
    "left_head_of_femur",
    "right_head_of_femur",
)


def find(source: Path) -> PublicSet:
    """Read the layout ``imagesTr``, ``imagesVal``, ``imagesTs`` and their labels, with files ``word_NNNN.nii.gz``.

    The set's own validation and test subjects are held out.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: another layout; all problems at once.
    """
    root = root_of(source, "imagesTr", "imagesTr, imagesVal, imagesTs and their labelsTr, labelsVal, labelsTs")
    problems: list[str] = []
    cases = [
        case for part in ("Tr", "Val", "Ts") for case in pair(root / f"images{part}", root / f"labels{part}", problems)
    ]
    if not (root / "labelsTs").is_dir():
        problems.append(
            f"{root / 'labelsTs'}: these labels come in an archive of their own; unpack WORD_V0.1.0_labelsTs.zip of "
            "github.com/HiLab-git/WORD."
        )
    names = [case.name for case in cases]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"{root}: got {twice} in more than one part, expected each subject once.")
    check_layout(root, "WORD", problems)
    return PublicSet(
        name="WORD",
        channels=("CT",),
        labels=numbered(ORGANS),
        cases=tuple(cases),
        test=frozenset(case.name for case in cases if case.part != "imagesTr"),
        split_origin="the set's own: imagesTr for training; imagesVal and imagesTs for test",
        terms="GNU GPL 3.0; academic research only, not for clinical, commercial or other use (README of "
        "github.com/HiLab-git/WORD)",
        reference="Luo et al.: WORD: A large scale dataset, benchmark and clinical applicable study for abdominal "
        "organ segmentation from CT image. Medical Image Analysis 82, 102642, 2022",
        write=write_case,
        sizes={"imagesTr": 100, "imagesVal": 20, "imagesTs": 30},
    )
