from __future__ import annotations

import json
import sys

import pytest

from nnunet_cil.block import BLOCK_KEY, StepBlock
from nnunet_cil.schedule import METHOD_DEFAULTS, Training

TEACHER = "Dataset500_tiny_step1/nnUNetTrainerPGCD__nnUNetPlans__3d_fullres"
BLOCK = StepBlock(
    chain="tiny",
    step=2,
    classes=(("liver", "spleen"), ("kidney",)),
    method="pgcd",
    settings={**METHOD_DEFAULTS, "lambda_pgcd": 0.5},
    training=Training(epochs=3, seed=7),
    mirror_axes=(0, 2),
    teacher=TEACHER,
    teacher_checkpoint="checkpoint_best.pth",
)
LABELS = {"background": 0, "liver": 1, "spleen": 2, "kidney": 3}


def read(labels=LABELS, **changes) -> StepBlock:
    """The block after its way through a plans file, with changed keys; None leaves a key out."""
    content = {key: value for key, value in {**BLOCK.to_json(), **changes}.items() if value is not None}
    plans = json.loads(json.dumps({"dataset_name": "Dataset501_tiny_step2", BLOCK_KEY: content}))
    return StepBlock.from_plans(plans, {"labels": labels})


def test_block_comes_back_from_a_plans_file_as_it_was():
    assert read() == BLOCK


@pytest.mark.parametrize("axes", [None, (), (1,)])
def test_no_mirror_axes_and_nnunets_choice_are_told_apart(axes):
    plans = {BLOCK_KEY: json.loads(json.dumps({**BLOCK.to_json(), "mirror_axes": axes}))}
    assert StepBlock.from_plans(plans, {"labels": LABELS}).mirror_axes == axes


def test_counts_include_the_background():
    assert BLOCK.old_classes == ("liver", "spleen")
    assert BLOCK.new_classes == ("kidney",)
    assert (BLOCK.n_old, BLOCK.n_classes) == (3, 4)


@pytest.mark.parametrize(
    ("named", "labels"),
    [(False, []), (True, [1, 2]), ("auto", [2]), (["liver"], [1]), (["kidney"], []), (["spleen", "liver"], [1, 2])],
)
def test_which_old_classes_are_in_one_piece(named, labels):
    assert read(settings={"one_piece": named}).in_one_piece(known=("spleen", "kidney")) == labels


def test_first_step_has_no_old_classes():
    first = read({"background": 0, "liver": 1, "spleen": 2}, step=1, classes=[["liver", "spleen"]], teacher=None)
    assert first.old_classes == ()
    assert (first.n_old, first.n_classes) == (1, 3)
    assert first.teacher is None


def test_what_a_block_leaves_out_has_the_defaults():
    block = read(settings={"mu": 0.5}, training={"epochs": 9}, teacher_checkpoint=None)
    of_then = {"voxel_stride": 1, "one_piece": False}
    assert block.settings == {**METHOD_DEFAULTS, "mu": 0.5, **of_then}, "versions without them took all voxels"
    assert block.training == Training(epochs=9)
    assert block.teacher_checkpoint == "checkpoint_final.pth"


def test_plans_without_block_are_a_first_step_with_all_classes():
    block = StepBlock.from_plans({"dataset_name": "Dataset001_Theirs"}, {"labels": {**LABELS, "ignore": 4}})
    assert (block.step, block.teacher) == (1, None)
    assert block.classes == (("liver", "spleen", "kidney"),)
    assert block.settings == METHOD_DEFAULTS


def test_plans_without_block_train_as_nnunet_does():
    training = StepBlock.from_plans({}, {"labels": LABELS}).training
    assert (training.epochs, training.iterations_per_epoch, training.val_iterations_per_epoch) == (1000, 250, 50)
    assert (training.initial_lr, training.warmup_epochs, training.deep_supervision) == (0.01, 0, True)
    assert training.seed is None
    assert training.validation_cases == sys.maxsize


def test_classes_of_plans_without_block_follow_their_values():
    labels = {"kidney": 3, "background": 0, "spleen": 2, "liver": 1}
    assert StepBlock.from_plans({}, {"labels": labels}).classes == (("liver", "spleen", "kidney"),)


def test_order_of_names_in_dataset_json_does_not_matter():
    assert read(dict(reversed(LABELS.items()))) == BLOCK


def test_ignore_label_is_no_class():
    assert read({**LABELS, "ignore": 4}).n_classes == 4


def test_unknown_keys_are_named():
    with pytest.raises(ValueError, match=r"plans\['cil'\]: got unknown keys \['lambda', 'techer'\], expected only \["):
        read(techer=TEACHER, **{"lambda": 1})


def test_unknown_training_keys_are_named():
    with pytest.raises(ValueError, match="epoch_count"):
        read(training={"epoch_count": 3})


def test_unknown_settings_are_named():
    with pytest.raises(ValueError, match="lambda_pgdc"):
        read(settings={"lambda_pgdc": 3})


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param({"background": 0, "spleen": 1, "liver": 2, "kidney": 3}, id="order-within-a-step"),
        pytest.param({"background": 0, "kidney": 1, "liver": 2, "spleen": 3}, id="new-before-old"),
        pytest.param({"background": 0, "liver": 1, "spleen": 2, "kidney": 4}, id="gap"),
        pytest.param({"background": 0, "liver": 2, "spleen": 3, "kidney": 4}, id="not-from-1"),
        pytest.param({"background": 0, "liver": 1, "spleen": 2}, id="class-missing"),
        pytest.param({**LABELS, "lung": 4}, id="class-too-many"),
        pytest.param({"background": 0, "liver": 1, "spleen": 2, "lung": 3}, id="other-class"),
        pytest.param({"background": 0, "liver": 1, "spleen": 2, "kidney": 2}, id="value-twice"),
    ],
)
def test_labels_that_are_not_those_of_the_step_are_refused(labels):
    with pytest.raises(
        ValueError,
        match=r"dataset.json of Dataset501_tiny_step2: got labels .*'liver', 'spleen', 'kidney'\] numbered 1..3",
    ):
        read(labels)


@pytest.mark.parametrize("step", [1, 3])
def test_step_number_that_does_not_fit_its_classes_is_refused(step):
    with pytest.raises(ValueError, match=rf"got step {step} with classes of 2 steps"):
        read(step=step)


@pytest.mark.parametrize("teacher", [None, ""])
def test_later_step_without_teacher_is_refused(teacher):
    with pytest.raises(ValueError, match="step 2 has no teacher, expected the model folder of step 1"):
        read(teacher=teacher)


@pytest.mark.parametrize("plans", [{"dataset_name": "Dataset001_Theirs"}, {"dataset_name": "x", BLOCK_KEY: {}}])
def test_regions_are_refused(plans):
    with pytest.raises(ValueError, match=rf"dataset.json of {plans['dataset_name']}: .*regions \['whole'\]"):
        StepBlock.from_plans(plans, {"labels": {"background": 0, "whole": [1, 2], "core": 2}})
