from __future__ import annotations

import json
from pathlib import Path

import pytest

from nnunet_cil.step_files import STEP_FILE, check_step_files, read_step_file, whole_folder

CASES = ("case_0", "case_1")
IDENTIFIER = "nnUNetPlans_3d_fullres"


@pytest.fixture
def dataset(tmp_path) -> Path:
    """A finished preprocessed dataset of two cases, of empty files."""
    folder = tmp_path / IDENTIFIER
    folder.mkdir()
    for case in CASES:
        for name in (f"{case}.b2nd", f"{case}_seg.b2nd", f"{case}.pkl"):
            (folder / name).touch()
    write_marker(tmp_path)
    return tmp_path


def write_marker(folder: Path, complete=(IDENTIFIER,), n_cases=2) -> None:
    content = {"chain": "tiny", "step": 2, "n_cases": n_cases, "complete": list(complete)}
    (folder / STEP_FILE).write_text(json.dumps(content))


def interrupted(folder: Path) -> None:
    with whole_folder(folder) as partial:
        (partial / "half").touch()
        raise KeyboardInterrupt


def test_a_folder_is_whole_or_not_there(tmp_path):
    folder, left_by_a_kill = tmp_path / "below" / "data", tmp_path / "below" / ".data.part" / "old"
    left_by_a_kill.mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        interrupted(folder)
    assert list(folder.parent.iterdir()) == []
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "of_its_own" / "data")
    assert not (tmp_path / "of_its_own").exists()
    with whole_folder(folder) as partial:
        (partial / "file").touch()
        assert not folder.exists()
    assert [path.relative_to(folder).as_posix() for path in folder.parent.rglob("*") if path.is_file()] == ["file"]
    with pytest.raises(OSError, match="not empty"), whole_folder(folder) as partial:
        (partial / "other").touch()
    assert [path.name for path in folder.parent.rglob("*")] == ["data", "file"], "what is there is not touched"


def test_step_file_is_read(dataset):
    assert read_step_file(dataset) == {"chain": "tiny", "step": 2, "n_cases": 2, "complete": [IDENTIFIER]}


@pytest.mark.parametrize("exists", [True, False])
def test_folder_without_step_file_is_not_ours(tmp_path, exists):
    folder = tmp_path / "Dataset001_theirs"
    if exists:
        folder.mkdir()
    assert read_step_file(folder) is None


def test_finished_dataset_passes(dataset):
    check_step_files(dataset, IDENTIFIER)


def test_files_beside_the_cases_do_no_harm(dataset):
    for name in ("case_1.npz", "case_2.b2nd", "notes.txt"):
        (dataset / IDENTIFIER / name).touch()
    check_step_files(dataset, IDENTIFIER)


def test_foreign_dataset_passes_whatever_it_lacks(dataset):
    (dataset / STEP_FILE).unlink()
    (dataset / IDENTIFIER / "case_0.pkl").unlink()
    check_step_files(dataset, IDENTIFIER)
    check_step_files(dataset, "a configuration that is not there")


@pytest.mark.parametrize("name", ["case_1.b2nd", "case_1_seg.b2nd", "case_1.pkl"])
def test_missing_file_is_refused(dataset, name):
    (dataset / IDENTIFIER / name).unlink()
    with pytest.raises(ValueError, match=rf"{IDENTIFIER}: got 1 complete cases, expected 2 .*`nnunet-cil prepare"):
        check_step_files(dataset, IDENTIFIER)


def test_more_cases_than_the_step_has_are_refused(dataset):
    write_marker(dataset, n_cases=1)
    with pytest.raises(ValueError, match="got 2 complete cases, expected 1"):
        check_step_files(dataset, IDENTIFIER)


@pytest.mark.parametrize("complete", [(), ("nnUNetPlans_2d",)])
def test_configuration_that_is_not_marked_as_complete_is_refused(dataset, complete):
    write_marker(dataset, complete)
    with pytest.raises(ValueError, match="got 2 complete cases, expected 2 and a finished preprocessing"):
        check_step_files(dataset, IDENTIFIER)


def test_missing_folder_is_refused(dataset):
    write_marker(dataset, [IDENTIFIER, "nnUNetPlans_2d"])
    with pytest.raises(ValueError, match="nnUNetPlans_2d: got 0 complete cases, expected 2"):
        check_step_files(dataset, "nnUNetPlans_2d")
