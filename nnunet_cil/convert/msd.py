"""Tasks of the Medical Segmentation Decathlon (Antonelli et al. 2022), such as Task04_Hippocampus."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from nnunet_cil import nnunet_api
from nnunet_cil.convert.nifti import (
    check_whole,
    image_target,
    label_target,
    load,
    read_labels,
    write_case,
    write_labels,
)
from nnunet_cil.convert.source import (
    ENDING,
    SEEDED,
    Case,
    PublicSet,
    Written,
    check_layout,
    root_of,
    seeded_test,
    shown,
)
from nnunet_cil.untrusted import is_inside, read_json


def find(source: Path) -> PublicSet:
    """Read the layout ``dataset.json``, ``imagesTr/NAME.nii.gz``, ``labelsTr/NAME.nii.gz``.

    Channels, labels and subjects are those of ``dataset.json``. Its test subjects are left out, as their labels are not
    public.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: another layout; all problems at once.
    """
    root = root_of(source, "dataset.json", "the folder of a task, which holds dataset.json, imagesTr and labelsTr")
    content = _description(root / "dataset.json")
    problems: list[str] = []
    cases = []
    for entry in content["training"]:
        image, label = (root / entry[key] for key in ("image", "label"))
        cases.append(Case(image.name.removesuffix(ENDING), "imagesTr", (image,), (label,)))
    for kind, paths in (("image", [c.images[0] for c in cases]), ("label", [c.labels[0] for c in cases])):
        if missing := [path.name for path in paths if not path.is_file()]:
            problems.append(f"{root}: got no {kind} {shown(missing)}, expected all that dataset.json lists.")
    check_layout(root, "a Decathlon task", problems)
    channels = tuple(str(content["modality"][str(n)]) for n in range(len(content["modality"])))
    return PublicSet(
        name=root.resolve().name.partition("_")[2] or root.resolve().name,
        channels=channels,
        labels={
            "background" if int(value) == 0 else str(name): int(value) for value, name in content["labels"].items()
        },
        cases=tuple(cases),
        test=seeded_test([case.name for case in cases]),
        split_origin=SEEDED,
        terms=str(content.get("licence", "CC BY-SA 4.0")),
        reference="Antonelli et al.: The Medical Segmentation Decathlon. Nature Communications 13, 4128, 2022"
        + (f". Data: {reference}" if (reference := str(content.get("reference", "")).strip()) else ""),
        write=write_case if len(channels) == 1 else write_channels,
    )


def _description(path: Path) -> dict[str, Any]:
    content = read_json(path, "the dataset.json of a Decathlon task: download it again")
    try:
        channels, labels = content["modality"], content["labels"]
        readable = {str(n) for n in range(len(channels))} == {*channels.keys()}
        readable = readable and all(value in map(str, range(256)) for value, _ in labels.items())
        files = [entry[kind] for entry in content["training"] for kind in ("image", "label")]
        if outside := [file for file in files if not is_inside(file)]:
            raise ValueError(f"the file {outside[0]!r}, which is not in the task's folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: got {what}, expected the dataset.json of a Decathlon task.") from error
    if not readable or not content["training"]:
        raise ValueError(
            f"{path}: got no modality and labels by number with image and label of each training case, expected the "
            "dataset.json of a Decathlon task."
        )
    return content


def write_channels(case: Case, folder: Path, known: Collection[int]) -> Written:
    """Convert a case whose channels are the fourth axis of one NIfTI file; nnU-Net's own function takes it apart."""
    image = load(case.images[0], n_dimensions=4)
    check_whole(case.images[0])
    labels, distance = read_labels(case.labels[0], known, case.images[0], image)
    nnunet_api.split_4d(case.images[0], folder / "imagesTr")
    write_labels(label_target(case, folder), labels, image_target(case, folder))
    return Written(label_moved_mm=distance)
