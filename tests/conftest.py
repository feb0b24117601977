"""Shared fixtures: a tiny labelled dataset, nnU-Net's folders, and a prepared two-step chain on them."""

from __future__ import annotations

import json
import os
import signal
from multiprocessing.pool import ThreadPool
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side: threads of one would fight with those of another
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# nnU-Net's plot at the end of each training has 16 million pixels, which take as long as all else in a tiny training
os.environ.setdefault("MATPLOTLIBRC", str(Path(__file__).with_name("matplotlibrc")))

import numpy as np
import pytest
import SimpleITK
from hypothesis import settings

from nnunet_cil.report import figures
from tests.faults.table import pytest_itemcollected, pytest_terminal_summary  # noqa: F401  (hooks)

REAL_DATA = Path(os.environ.get("NNUNET_CIL_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
QUICK_SAMPLES = 10**4


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run what takes many minutes, such as the whole demo")


def pytest_configure(config: pytest.Config) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets jobs in its background ignore it
    settings.register_profile("same", derandomize=True)
    settings.register_profile("fuzz", max_examples=20 * settings.default.max_examples)
    settings.load_profile("fuzz" if config.getoption("markexpr") == "fuzz" else "same")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes many minutes: pytest --slow runs it"))


def real_data(name: str) -> Path:
    """Folder of a real dataset; the test is skipped where it is absent."""
    folder = REAL_DATA / name
    if not folder.is_dir():
        pytest.skip(f"the real volumes of {name} are not at {folder}; set NNUNET_CIL_TEST_DATA to their folder")
    return folder


def write_tiny_dataset(
    folder: Path,
    n_cases: int = 6,
    shape=(16, 24, 24),
    channel: str = "MR",
    ignore: bool = False,
    seed: int = 0,
    spacing=(1.5, 1.5, 2.0),
    outside: bool = False,
) -> Path:
    """Two organs, a bright ball and a dark box-like blob, in noise: raw format with split.json (the last is test)."""
    rng = np.random.default_rng(seed)
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    grid = np.stack(np.meshgrid(*[np.arange(s) for s in shape], indexing="ij"), -1).astype(float)
    for case in range(n_cases):
        labels = np.zeros(shape, np.uint8)
        ball = np.array([8, 8, 8]) + rng.uniform(-1, 1, 3)
        blob = np.array([8, 16, 16]) + rng.uniform(-1, 1, 3)
        labels[np.linalg.norm(grid - ball, axis=-1) < 4] = 1
        labels[(np.abs(grid - blob) / [3, 4, 4]).max(-1) < 1] = 2
        image = rng.normal(100, 5, shape) + 60 * (labels == 1) - 50 * (labels == 2)
        if ignore:
            labels[0] = 3
        if outside:  # zeros around the body, beyond the box and in a corner of it, and one labelled voxel among them
            inside = np.linalg.norm((grid - np.array(shape) / 2) / np.array(shape), axis=-1) < 0.48
            image, labels = image * inside, labels * inside
            labels[tuple(np.argwhere(~inside & (grid[..., 0] == shape[0] // 2))[0])] = 1
        for array, path in (
            (image.astype(np.float32), folder / "imagesTr" / f"case_{case}_0000.nii.gz"),
            (labels, folder / "labelsTr" / f"case_{case}.nii.gz"),
        ):
            volume = SimpleITK.GetImageFromArray(array)
            volume.SetSpacing(spacing)
            SimpleITK.WriteImage(volume, str(path))
    labels_json = {"background": 0, "ball": 1, "blob": 2, **({"ignore": 3} if ignore else {})}
    content = {"channel_names": {"0": channel}, "labels": labels_json, "numTraining": n_cases, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content))
    split = {"train": [f"case_{i}" for i in range(n_cases - 1)], "test": [f"case_{n_cases - 1}"]}
    (folder / "split.json").write_text(json.dumps(split))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Four cases, the last one for test; tests leave it as it is."""
    return write_tiny_dataset(tmp_path_factory.mktemp("dataset") / "source", n_cases=4)


@pytest.fixture(scope="session", autouse=True)
def quick_preparation():
    """What takes seconds each time: nnU-Net's 10^8 intensities, its 12 processes that list files, fonts in PDFs.

    What users get is tested by commands in processes of their own.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(figures._LOOK, "pdf.fonttype", 3)
        patch.setattr("nnunet_cil.source_check.INTENSITY_SAMPLES", QUICK_SAMPLES)
        patch.setattr("nnunetv2.utilities.utils.Pool", ThreadPool, raising=False)
        yield


TINY_SCHEDULE = """
name: {name}
source: {source}
images: {images}
test: {source}/split.json
configuration: {configuration}
fold: {fold}
device: cpu
plans: {plans}
training: {{epochs: 1, iterations_per_epoch: 2, val_iterations_per_epoch: 1, seed: 0{training}}}
{extra}
steps:
  - [ball]
  - [blob]
"""


def write_schedule(path: Path, source: Path, **changes) -> Path:
    """A two-step schedule on the tiny dataset; ``changes`` replace parts of it."""
    values = {
        "name": "tiny",
        "source": source,
        "images": "shared",
        "configuration": "3d_fullres",
        "fold": "all",
        "plans": "{patch_size: [16, 16, 16], batch_size: 2, features_per_stage: [4, 8, 8]}",
        "training": "",
        "extra": "",
    } | changes
    path.write_text(TINY_SCHEDULE.format(**values))
    return path


@pytest.fixture
def nnunet_folders(tmp_path, monkeypatch) -> dict[str, Path]:
    """nnU-Net's three folders in a temporary place, and no worker processes for augmentation."""
    folders = {name: tmp_path / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for name, folder in folders.items():
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_def_n_proc", "2")
    return folders
