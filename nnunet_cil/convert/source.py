"""A public set as found on disk: its subjects, labels, split and terms; and what is wrong with its layout."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ENDING = ".nii.gz"
TEST_SHARE = 0.25  # of the subjects of a set that has no split with public labels
SEEDED = f"ours: {TEST_SHARE:.0%} of the labelled subjects, permuted with seed 0, as the set has no public test labels"
SHOWN = 5  # names in a message
OF_MACOS = "__MACOSX"


@dataclass(frozen=True)
class Case:
    """One labelled subject of a set.

    Args:
        name: of the subject in the new dataset.
        part: of the set that it belongs to, such as ``imagesVa``.
        images: what each channel is read from: a NIfTI file, or a folder of DICOM slices.
        labels: what the labels are read from: one NIfTI file, one mask a label in their order, or one PNG a slice.
    """

    name: str
    part: str
    images: tuple[Path, ...]
    labels: tuple[Path, ...]


@dataclass(frozen=True)
class Written:
    """What came of one case.

    Args:
        problem: why the case cannot be converted, None if it was.
        label_moved_mm: most that a corner of the label's grid was off the image's.
        image_moved_mm: most that a corner moved because the image's axes were not perpendicular; 0 if they are.
        n_overlap: voxels that more than one mask claims; 0 where labels come in one file.
    """

    problem: str | None = None
    label_moved_mm: float = 0.0
    image_moved_mm: float = 0.0
    n_overlap: int = 0


@dataclass(frozen=True)
class PublicSet:
    """A set that can be converted.

    Args:
        name: of the dataset, if the user gives none.
        channels: name of each channel; ``CT`` is what makes nnU-Net normalise by the intensities of the whole dataset.
        labels: values by name, background included.
        test: names of the cases that are held out.
        split_origin: where the split comes from.
        terms: licence or terms, with where they are stated.
        reference: what to cite.
        write: writes one case into a folder with ``imagesTr`` and ``labelsTr``, given the known labels; importable by a
            worker process. Raises ValueError, OSError or RuntimeError where it cannot.
        sizes: labelled subjects of each part as published, where nothing in the set lists them.
    """

    name: str
    channels: tuple[str, ...]
    labels: Mapping[str, int]
    cases: tuple[Case, ...]
    test: frozenset[str]
    split_origin: str
    terms: str
    reference: str
    write: Callable[[Case, Path, Collection[int]], Written]
    sizes: Mapping[str, int] = field(default_factory=dict)


def numbered(names: Sequence[str]) -> dict[str, int]:
    """Label values: background 0, then the names from 1 on."""
    return {"background": 0, **{name: value for value, name in enumerate(names, 1)}}


def root_of(source: Path, marker: str, expected: str) -> Path:
    """The folder of a set, known by something in it.

    Args:
        marker: file or folder that the set's folder holds.
        expected: the layout, for the message.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it does not hold the marker; the message names a folder below or above that does.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: got no folder, expected {expected}.")
    if (source / marker).exists():
        return source
    below = [*sorted(source.glob(f"*/{marker}")), *sorted(source.glob(f"*/*/{marker}"))]
    near = [path.parent for path in below if OF_MACOS not in path.parts]
    near += [folder for folder in source.resolve().parents[:2] if (folder / marker).exists()]
    hint = f" Give {near[0]}/ instead." if near else ""
    raise ValueError(f"{source}: got {shown(visible(source))} in it, expected {expected}.{hint}")


def visible(folder: Path) -> list[str]:
    """Names in a folder, sorted, without hidden ones and what macOS leaves in archives: ``._*`` and ``__MACOSX``."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith((".", OF_MACOS)))


def shown(names: Sequence[str]) -> str:
    """The first few of many names, for a message."""
    return f"{list(names[:SHOWN])}{f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''}"


def nifti_files(folder: Path, problems: list[str]) -> dict[str, Path]:
    """NIfTI files by name without ending, sorted; a missing folder or a file of another type is a problem."""
    if not folder.is_dir():
        problems.append(f"{folder}: got no folder, expected NIfTI files ({ENDING}).")
        return {}
    names = visible(folder)
    if others := [name for name in names if not name.endswith(ENDING)]:
        problems.append(f"{folder}: got {shown(others)}, expected nothing but NIfTI files ({ENDING}).")
    if not names:
        problems.append(f"{folder}: got an empty folder, expected NIfTI files ({ENDING}).")
    return {name.removesuffix(ENDING): folder / name for name in names if name.endswith(ENDING)}


def pair(images: Path, labels: Path, problems: list[str], keep: Callable[[str], bool] = lambda _: True) -> list[Case]:
    """Cases of two folders whose files have the same names; a file without its partner is a problem.

    Args:
        keep: which names count.
    """
    found = {name: path for name, path in nifti_files(images, problems).items() if keep(name)}
    labelled = {name: path for name, path in nifti_files(labels, problems).items() if keep(name)}
    for folder, missing, kind in (
        (labels, sorted(set(found) - set(labelled)), "label of an image"),
        (images, sorted(set(labelled) - set(found)), "image of a label"),
    ):
        if missing and folder.is_dir():
            problems.append(f"{folder}: got no {shown([name + ENDING for name in missing])}, expected the {kind}.")
    return [Case(name, images.name, (path,), (labelled[name],)) for name, path in found.items() if name in labelled]


def check_layout(source: Path, name: str, problems: Sequence[str]) -> None:
    """Refuse a source that has problems.

    Raises:
        ValueError: all problems at once.
    """
    if problems:
        raise ValueError(
            f"{source}: got another layout than that of {name}; nothing was written:\n  " + "\n  ".join(problems)
        )


def check_choice(option: str, value: str, choices: Collection[str]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        ValueError: as it says.
    """
    if value not in choices:
        raise ValueError(f"{option}: got {value!r}, expected one of {list(choices)}.")


def seeded_test(names: Collection[str]) -> frozenset[str]:
    """A quarter of the names, at least one, by a permutation with seed 0: for sets without a split of their own.

    Raises:
        ValueError: fewer than two names.
    """
    if len(names) < 2:
        raise ValueError(
            f"got {len(names)} labelled subjects, expected at least 2: one to train on and one to test on."
        )
    order = np.random.default_rng(0).permutation(sorted(names)).tolist()
    return frozenset(order[: max(1, round(TEST_SHARE * len(order)))])
