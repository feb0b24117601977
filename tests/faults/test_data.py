"""Faults of the user's data, refused before anything is written, and of the processes that read them."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from nnunet_cil.cases import step_cases
from nnunet_cil.parallel import SMALL_BYTES, over_cases
from nnunet_cil.schedule import load_schedule
from tests.conftest import write_schedule, write_tiny_dataset
from tests.datasets import refusal


@pytest.fixture
def source(tmp_path) -> Path:
    return write_tiny_dataset(tmp_path / "source", n_cases=4)


@pytest.fixture
def refused(source, nnunet_folders, tmp_path):
    return lambda: refusal(load_schedule(write_schedule(tmp_path / "schedule.yaml", source)), nnunet_folders)


@pytest.mark.faults("NaN image", "refused by name before anything is written, also where SimpleITK hides it", "nothing")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_nifti_image_with_nan_which_simpleitk_reads_as_zero(source, refused, value):
    path = source / "imagesTr" / "case_1_0000.nii.gz"
    image = SimpleITK.ReadImage(str(path))
    image[3, 3, 3] = value
    SimpleITK.WriteImage(image, str(path))
    assert SimpleITK.ReadImage(str(path))[3, 3, 3] == 0, "SimpleITK tells of it now: _hides_not_finite may go"
    assert "case_1_0000.nii.gz: got voxels that are not finite" in refused()


@pytest.mark.faults("label on another grid", "refused by name before anything is written", "nothing")
def test_a_label_whose_axes_are_flipped(source, refused):
    path = source / "labelsTr" / "case_2.nii.gz"
    label = SimpleITK.ReadImage(str(path))
    label.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    SimpleITK.WriteImage(label, str(path))
    assert re.search(r"case_2.nii.gz: got axes along \(-1.0, .*expected \(1.0, .* as case_2_0000.nii.gz", refused())


@pytest.mark.faults("case present twice", "one file under two names is refused", "nothing")
@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_one_image_under_two_names(source, refused, link):
    for folder, case in (("imagesTr", "case_{}_0000.nii.gz"), ("labelsTr", "case_{}.nii.gz")):
        (source / folder / case.format(1)).unlink()
        link(source / folder / case.format(0), source / folder / case.format(1))
    found = refused()
    assert "case_1_0000.nii.gz: got the same file as case_0_0000.nii.gz, expected each image once" in found
    assert len(found.splitlines()) == 2, "it is told once, though both steps have the case"


@pytest.mark.faults("case present twice", "a test image under another name is not trained on", "nothing")
def test_a_test_image_under_the_name_of_a_training_case(source, nnunet_folders, tmp_path):
    (source / "split.json").write_text('{"test": ["case_3"]}')
    for folder, case in (("imagesTr", "case_{}_0000.nii.gz"), ("labelsTr", "case_{}.nii.gz")):
        os.link(source / folder / case.format(3), source / folder / case.format(7))
    schedule = load_schedule(write_schedule(tmp_path / "schedule.yaml", source))
    assert [case.name for case in step_cases(schedule, 1)] == ["case_0", "case_1", "case_2"]


@pytest.mark.faults("case present twice", "a file of another type beside the image is not read", "nothing")
def test_one_case_with_two_file_endings(source, nnunet_folders, tmp_path):
    for name in ("imagesTr/case_1_0000", "labelsTr/case_1"):
        (source / f"{name}.nrrd").write_bytes(b"no volume")
    shutil.copyfile(source / "imagesTr" / "case_1_0000.nii.gz", source / "imagesTr" / "case_1.nii.gz")
    cases = step_cases(load_schedule(write_schedule(tmp_path / "schedule.yaml", source)), 1)
    assert [case.name for case in cases] == ["case_0", "case_1", "case_2"]
    assert [path.name for path in cases[1].images] == ["case_1_0000.nii.gz"]


def killed_if(number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.faults("killed worker process", "one error, no waiting; the same command goes on", "cases in work")
def test_a_worker_process_of_the_preparation_is_killed(monkeypatch):
    monkeypatch.setenv("nnUNet_def_n_proc", "2")
    with pytest.raises(RuntimeError, match=r"preprocessing X: got a worker process that was killed"):
        over_cases(killed_if, [(number,) for number in range(4)], SMALL_BYTES, "preprocessing X")
