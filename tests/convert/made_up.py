"""Miniature sources of exactly the layout, names and label numbers of the public sets; no voxel is anyone's."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK
from PIL import Image
from scipy.spatial.transform import Rotation

from nnunet_cil.convert import amos, btcv, chaos, word

SHAPE = (4, 5, 6)
BRIGHT = 1000  # intensity of voxels that carry label 1 is 1001, and so on


def oblique(spacing_mm=(0.7, 0.9, 3.3), flip=(1, -1, 1), origin=(-12.5, 33.25, -401.0)) -> np.ndarray:
    """An affine in RAS+ mm with turned axes, anisotropic spacing and a flipped axis."""
    turned = Rotation.from_euler("xyz", (12, -7, 21), degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turned * np.multiply(spacing_mm, flip)
    affine[:3, 3] = origin
    return affine


def marks(n_labels: int, shape: Sequence[int] = SHAPE) -> dict[int, tuple[int, ...]]:
    """A voxel for each label value, none of them in a symmetric place."""
    flat = [(7 * value + 1) % int(np.prod(shape)) for value in range(1, n_labels + 1)]
    assert len(set(flat)) == n_labels
    return {value: tuple(map(int, np.unravel_index(at, shape))) for value, at in enumerate(flat, 1)}


def volumes(n_labels: int, shape: Sequence[int] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """Image and labels: each label value marks one voxel, which is bright in the image."""
    image, labels = np.full(shape, -50, np.int16), np.zeros(shape, np.uint8)
    for value, at in marks(n_labels, shape).items():
        image[at], labels[at] = BRIGHT + value, value
    return image, labels


def write_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None, with_qform: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = oblique() if affine is None else affine
    image = nibabel.Nifti1Image(voxels, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1 if with_qform else 0)
    nibabel.save(image, path)
    return path


def write_pair(image_path: Path, label_path: Path, n_labels: int) -> None:
    image, labels = volumes(n_labels)
    write_nifti(image_path, image)
    write_nifti(label_path, labels)


def make_btcv(folder: Path) -> Path:
    root = folder / "RawData"
    for n in (*range(1, 11), *range(21, 41)):
        part = root / "Training"
        write_pair(part / "img" / f"img{n:04d}.nii.gz", part / "label" / f"label{n:04d}.nii.gz", len(btcv.ORGANS))
    write_nifti(root / "Testing" / "img" / "img0061.nii.gz", volumes(1)[0])
    return root


def make_word(folder: Path) -> Path:
    root = folder / "WORD-V0.1.0"
    for part, numbers in (("Tr", (2, 3, 5)), ("Val", (1, 9)), ("Ts", (14,))):
        for n in numbers:
            name = f"word_{n:04d}.nii.gz"
            write_pair(root / f"images{part}" / name, root / f"labels{part}" / name, len(word.ORGANS))
    return root


def make_amos(folder: Path) -> Path:
    root = folder / "amos22"
    for part, numbers in (("Tr", (1, 4, 410, 507, 518)), ("Va", (8, 13, 530))):
        for n in numbers:
            name = f"amos_{n:04d}.nii.gz"
            write_pair(root / f"images{part}" / name, root / f"labels{part}" / name, len(amos.ORGANS))
    write_nifti(root / "imagesTs" / "amos_0500.nii.gz", volumes(1)[0])
    (root / "imagesTr" / "._amos_0001.nii.gz").write_bytes(b"of macOS")
    return root


TOTAL_ORGANS = ("liver", "kidney_right", "kidney_left", "spleen")


def make_totalsegmentator(folder: Path, organs: Sequence[str] = TOTAL_ORGANS) -> Path:
    root = folder / "Totalsegmentator_dataset_v201"
    root.mkdir(parents=True)
    header = "\ufeffimage_id;age;gender;institute;study_type;split;manufacturer\n"
    rows = [("s0000", "train"), ("s0001", "val"), ("s0010", "test"), ("s0011", "train")]
    (root / "meta.csv").write_text(
        header + "".join(f"{name};60;m;A;ct abdomen;{split};siemens\n" for name, split in rows), encoding="utf-8"
    )
    image, labels = volumes(len(organs))
    for name, _ in rows:
        write_nifti(root / name / "ct.nii.gz", image)
        for value, organ in enumerate(organs, 1):
            write_nifti(root / name / "segmentations" / f"{organ}.nii.gz", (labels == value).astype(np.uint8))
    return root


def make_msd(
    folder: Path,
    task: str = "Task04_Hippocampus",
    labels: Mapping[str, str] | None = None,
    modality: Mapping[str, str] | None = None,
    n_cases: int = 5,
) -> Path:
    root = folder / task
    labels = {"0": "background", "1": "Anterior", "2": "Posterior"} if labels is None else labels
    modality = {"0": "MRI"} if modality is None else modality
    prefix = task.partition("_")[2].lower()
    names = [f"{prefix}_{n:03d}.nii.gz" for n in range(1, n_cases + 1)]
    image, voxels = volumes(len(labels) - 1)
    if len(modality) > 1:
        image = np.stack([image + 10 * channel for channel in range(len(modality))], axis=-1)
    for name in names:
        write_nifti(root / "imagesTr" / name, image)
        write_nifti(root / "labelsTr" / name, voxels.astype(np.float32))
    write_nifti(root / "imagesTs" / f"{prefix}_900.nii.gz", image)
    (root / "imagesTr" / f"._{names[0]}").write_bytes(b"of macOS")
    content = {
        "name": prefix,
        "reference": " Vanderbilt University Medical Center",
        "licence": "CC-BY-SA 4.0",
        "tensorImageSize": "3D",
        "modality": dict(modality),
        "labels": dict(labels),
        "numTraining": n_cases,
        "numTest": 1,
        "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names],
        "test": [f"./imagesTs/{prefix}_900.nii.gz"],
    }
    (root / "dataset.json").write_text(json.dumps(content))
    return root


DICOM_SPACING_MM = (0.8, 1.1, 7.5)


def dicom_axes() -> np.ndarray:
    """Rows, columns and normal of turned slices, as the rows of a matrix, in DICOM's LPS."""
    return Rotation.from_euler("xyz", (4, -9, 15), degrees=True).as_matrix().T


def write_slice(path: Path, pixels: np.ndarray, position: Sequence[float], axes: np.ndarray, modality: str) -> None:
    """One DICOM slice, with a series identifier of its own, as CHAOS' anonymised files have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(pixels)
    image.SetSpacing(DICOM_SPACING_MM[:2])
    tags = {
        "0008|0060": modality,
        "0020|0032": "\\".join(f"{v:.9g}" for v in position),
        "0020|0037": "\\".join(f"{v:.9g}" for v in axes[:2].ravel()),
        "0018|0050": str(DICOM_SPACING_MM[2]),
        "0020|000d": "1.2.3",
        "0020|000e": f"1.2.3.{zlib.crc32(path.name.encode())}",
    }
    for tag, value in tags.items():
        image.SetMetaData(tag, value)
    writer = SimpleITK.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetFileName(str(path))
    writer.Execute(image)


def write_series(
    folder: Path, voxels: np.ndarray, names: Sequence[str], modality: str, origin=(10.0, -20.0, 30.0)
) -> None:
    """Slices of a volume (z, y, x) along the normal; names in the order of position."""
    axes = dicom_axes()
    for z, name in enumerate(names):
        position = np.array(origin) + z * DICOM_SPACING_MM[2] * axes[2]
        write_slice(folder / f"{name}.dcm", voxels[z], position, axes, modality)


GREY = {1: 63, 2: 126, 3: 189, 4: 252}


def make_chaos(folder: Path, n_subjects: int = 4) -> Path:
    """CT names run from head to feet, against the normal, as in the real set; MR names from feet to head."""
    root = folder / "Train_Sets"
    shape = (5, 4, 6)
    for subject in [1, 2, 5, 13][:n_subjects]:
        liver, (image, labels) = volumes(1, shape), volumes(len(chaos.MR_ORGANS), shape)
        names = [f"i{n:04d},0000b" for n in reversed(range(shape[0]))]
        ct = root / "CT" / str(subject)
        write_series(ct / "DICOM_anon", liver[0].astype(np.int16), names, "CT")
        for z in range(shape[0]):
            write_png(ct / "Ground" / f"liver_GT_{shape[0] - 1 - z:03d}.png", liver[1][z] == 1)
        for sequence, first, step in (("T2SPIR", 1, 1), ("T1DUAL", 2, 2)):
            mr = root / "MR" / str(subject) / sequence
            names = [f"IMG-0004-{first + step * z:05d}" for z in range(shape[0])]
            phase = mr / "DICOM_anon" / "InPhase" if sequence == "T1DUAL" else mr / "DICOM_anon"
            write_series(phase, image.astype(np.uint16), names, "MR")
            for z, name in enumerate(names):
                write_png(mr / "Ground" / f"{name}.png", to_grey(labels[z]))
            if sequence == "T1DUAL":
                odd = [f"IMG-0004-{1 + 2 * z:05d}" for z in range(shape[0])]
                write_series(mr / "DICOM_anon" / "OutPhase", image.astype(np.uint16) + 10, odd, "MR")
    return root


def to_grey(labels: np.ndarray) -> np.ndarray:
    grey = np.zeros_like(labels)
    for value, level in GREY.items():
        grey[labels == value] = level
    return grey


def write_png(path: Path, grey: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grey).save(path)


MAKERS: dict[str, Callable[[Path], Path]] = {
    "btcv": make_btcv,
    "word": make_word,
    "amos": make_amos,
    "totalsegmentator": make_totalsegmentator,
    "msd": make_msd,
    "chaos": make_chaos,
}
