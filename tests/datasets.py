"""Raw datasets and schedules on them that several files of tests take, and ways to damage them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import SimpleITK
import tifffile

from nnunet_cil.chain import Chain
from nnunet_cil.dataset import prepare_chain
from nnunet_cil.schedule import Schedule, load_schedule
from nnunet_cil.step_files import write_json
from tests.conftest import write_schedule, write_tiny_dataset

IDENTIFIER = "nnUNetPlans_3d_fullres"
VANISHED = pytest.mark.faults("vanished image", "refused by name; once it is back, the same command goes on", "nothing")
OWN_DATASETS = """
name: own
device: cpu
plans: {base: base.json}
test:
  - {dataset: one, subjects: [case_2], classes: {ball: lump, blob: lump}}
  - {dataset: two, subjects: [case_2], classes: [blob]}
steps:
  - {dataset: one, classes: {ball: lump, blob: lump}}
  - {dataset: two, classes: {ball: null, blob: blob}}
"""


def write_reversed(path: Path, source: Path, **changes) -> Path:
    """A schedule that learns the blob first, so that the numbers of the chain are not those of the source."""
    write_schedule(path, source, **changes)
    path.write_text(path.read_text(encoding="utf-8").replace("- [ball]\n  - [blob]", "- [blob]\n  - [ball]"))
    return path


def write_own_datasets(root: Path, base: Mapping | None = None) -> Schedule:
    no_plans = {"plans_name": "none", "configurations": {}, "image_reader_writer": "SimpleITKIO"}
    write_json(root / "base.json", base or no_plans)
    for seed, name in enumerate(("one", "two")):
        write_tiny_dataset(root / name, n_cases=3, seed=seed)
    (root / "own.yaml").write_text(OWN_DATASETS)
    return load_schedule(root / "own.yaml")


def cut(source: Path, folder: Path, test: str | None = None, **changes) -> Schedule:
    path = write_schedule(folder / "cases.yaml", source, **changes)
    if test is not None:
        path.write_text(path.read_text(encoding="utf-8").replace(f"test: {source}/split.json", test))
    return load_schedule(path)


def relabelling(root: Path, unlabelled: str = "", ignore: bool = False) -> Schedule:
    """Two datasets, of which the second labels the first one's class too."""
    write_tiny_dataset(root / "one", n_cases=2)
    write_tiny_dataset(root / "two", n_cases=3, seed=1, ignore=ignore)
    (root / "two" / "unlabelled.csv").write_text("case,class\n" + unlabelled)
    first, both = {"ball": "lump"}, {"ball": "lump", "blob": "blob"}
    steps = [{"dataset": name, "classes": of, "joint": both} for name, of in (("one", first), ("two", both))]
    write_json(root / "own.yaml", {"name": "own", "device": "cpu", "steps": steps})
    return load_schedule(root / "own.yaml")


def lacking(text: str, path: Path) -> str:
    path.write_text("case,class\n" + text)
    return f"unlabelled: {path}"


def copied(source: Path, folder: Path) -> Path:
    copy = Path(shutil.copytree(source, folder / "source"))
    write_json(copy / "split.json", {"test": ["case_3"]})  # a train list would name a removed image first
    return copy


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def as_tiff(folder: Path, spacing_mm: tuple[float, ...]) -> Path:
    """A raw dataset as TIFF, with the spacing in nnU-Net's CASE.json beside images and labels."""
    for path in list(folder.glob("*Tr/*.nii.gz")):
        tifffile.imwrite(
            str(path).replace(".nii.gz", ".tif"), SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
        )
        write_json(
            path.with_name(path.name.split("_0000")[0].removesuffix(".nii.gz") + ".json"), {"spacing": spacing_mm}
        )
        path.unlink()
    write_json(folder / "dataset.json", {**read_json(folder / "dataset.json"), "file_ending": ".tif"})
    return folder


def rewrite(path: Path, change) -> None:
    """Change a volume's voxels; the spacing stays."""
    volume = SimpleITK.ReadImage(str(path))
    changed = SimpleITK.GetImageFromArray(change(SimpleITK.GetArrayFromImage(volume)))
    changed.SetSpacing(volume.GetSpacing())
    path.unlink()  # a hard link of it must not change
    SimpleITK.WriteImage(changed, str(path))


def set_voxel(value):
    def change(array):
        array[0, 0, 0] = value
        return array

    return change


def refusal(schedule: Schedule, folders: dict[str, Path]) -> str:
    """The message by which the data are refused; nothing may have been written for nnU-Net."""
    chain = Chain.open(schedule)
    with pytest.raises(ValueError, match="the data do not fit the schedule; nothing was written") as caught:
        prepare_chain(chain, [chain.variant("pgcd", 0)])
    assert list(folders["nnUNet_raw"].iterdir()) == []
    assert list(folders["nnUNet_preprocessed"].iterdir()) == []
    return str(caught.value)
