"""Warnings of what cannot be made up for once a chain is planned."""

from __future__ import annotations

import pytest

from nnunet_cil import driver
from nnunet_cil.advice import left_right_pair, warn_before_planning
from nnunet_cil.chain import Chain
from nnunet_cil.schedule import load_schedule
from tests.conftest import write_schedule, write_tiny_dataset
from tests.test_given_model import write_model
from tests.test_schedule import BASE, ORGANS, load, write_raw

TEST = {"test": ["s1"]}


@pytest.fixture
def warned(tmp_path, monkeypatch, caplog):
    """``warned(changes)`` gives the warnings of a schedule over four organs, without the file's name."""
    write_raw(tmp_path / "raw" / "Dataset001_Organs")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))

    def warnings(changes: dict) -> list[str]:
        caplog.clear()
        warn_before_planning(load(tmp_path, {**BASE, "steps": [[name] for name in ORGANS], **changes}))
        return [record.getMessage().removeprefix(f"{tmp_path / 'schedule.yaml'}: ") for record in caplog.records]

    return warnings


@pytest.mark.parametrize(
    "pair",
    [
        ("right_kidney", "left_kidney"),
        ("kidney_left", "kidney_right"),
        ("Left Kidney", "right kidney"),
        ("RightParotid", "LeftParotid"),
        ("Parotid_L", "Parotid_R"),
        ("KIDNEY LEFT", "kidney-right"),
        ("r.lung", "l.lung"),
    ],
)
def test_names_that_differ_by_left_and_right_are_a_pair(pair):
    assert left_right_pair(["liver", pair[0], "spleen", pair[1]]) == pair


@pytest.mark.parametrize(
    "names",
    [
        ("liver", "spleen"),
        ("left_kidney", "kidneys"),
        ("left_kidney", "Left Kidney"),
        ("left_kidney", "right_lung"),
        ("vertebra_l1", "vertebra_r1"),
        ("liver", "river"),
        (),
    ],
)
def test_other_names_are_none(names):
    assert left_right_pair(names) is None


def test_classes_that_mirroring_exchanges_are_warned_of_once(warned):
    (line,) = warned(TEST)
    assert line.startswith("mirror_axes: got nothing, so images are mirrored along all axes")
    assert "'right_kidney' looks like 'left_kidney'" in line
    assert "`mirror_axes: [0, 1]`" in line
    assert "`mirror_axes: [0]`" in warned({**TEST, "configuration": "2d"})[0]


@pytest.mark.parametrize("axes", [[], [0, 1], [0, 1, 2]])
def test_who_names_the_axes_knows(warned, axes):
    assert warned({**TEST, "mirror_axes": axes}) == []


def test_other_organs_may_be_mirrored(warned):
    assert warned({**TEST, "steps": [["liver"], ["spleen", "left_kidney"]]}) == []


def test_what_a_given_model_learns_is_warned_of_and_what_it_has_is_not(warned, tmp_path):
    labels = {"background": 0, "lung_left": 1, "lung_right": 2, "eye_left": 3}
    model = write_model(tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres", labels)
    write_raw(tmp_path / "raw" / "Dataset002_Kidneys", labels=("kidney_l", "kidney_r", "eye_right"))

    def of(*classes: str, **changes) -> list[str]:
        steps = [{"dataset": 2, "classes": [*classes]}]
        of_schedule = {"source": None, "model": str(model), "method": {"one_piece": False}, "steps": steps}
        return warned(of_schedule | changes)[1:]

    assert of("kidney_l") == []
    (line,) = of("kidney_l", "kidney_r")
    assert line.startswith("mirror_axes: got nothing, so images are mirrored along all axes that the model was trained")
    assert "'kidney_l' looks like 'kidney_r'" in line
    assert "'eye_left' looks like 'eye_right'" in of("eye_right")[0], "one of them new"
    assert of("kidney_l", "kidney_r", mirror_axes=[0, 1]) == []


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("one_piece", ["auto", True, ["liver"]])
def test_a_model_that_does_not_say_what_is_in_one_piece_is_warned_of(warned, tmp_path, ours, one_piece):
    model = write_model(tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres")
    if ours:
        (model / "fold_all" / "prototypes.npz").touch()
    write_raw(tmp_path / "raw" / "Dataset002_Pancreas", labels=("pancreas",))
    steps = [{"dataset": 2, "classes": ["pancreas"]}]
    found = warned({"source": None, "model": str(model), "method": {"one_piece": one_piece}, "steps": steps})[1:]
    assert len(found) == (one_piece == "auto" and not ours)
    assert all("Name the organs that are, of liver, spleen: `method: {one_piece: [...]}`" in line for line in found)


def test_a_chain_is_warned_of_before_it_is_planned_and_not_again(nnunet_folders, tmp_path, monkeypatch, caplog):
    source = write_tiny_dataset(tmp_path / "source", n_cases=2)
    path = write_schedule(tmp_path / "s.yaml", source)
    path.write_text("".join(line for line in path.open() if not line.startswith("test:")))
    monkeypatch.setattr(driver, "prepare_chain", lambda *_: None)
    monkeypatch.setattr(driver, "_trainings", lambda *_: [])
    schedule = load_schedule(path)
    driver.prepare(schedule, [], [])
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith(f"{path}: test: got nothing, so no step is scored")
    chain = Chain.open(schedule)
    chain.content["plans_name"] = "nnUNetPlans"
    chain.save()
    caplog.clear()
    driver.prepare(schedule, [], [])
    assert not caplog.records
