"""What we rely on inside nnunetv2: if a release changes it, this file says what, before a training goes wrong."""

from __future__ import annotations

import inspect
import json
from importlib.metadata import version

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.logging.nnunet_logger import LocalLogger, MetaLogger
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_cil import nnunet_api


def test_version_is_the_tested_one():
    assert version("nnunetv2").startswith("2.8.")


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (nnUNetTrainer.__init__, ["self", "plans", "configuration", "fold", "dataset_json", "device"]),
        (nnUNetTrainer.train_step, ["self", "batch"]),
        (nnUNetTrainer.validation_step, ["self", "batch"]),
        (nnUNetTrainer.on_train_epoch_end, ["self", "train_outputs"]),
        (nnUNetTrainer.save_checkpoint, ["self", "filename"]),
        (nnUNetTrainer.load_checkpoint, ["self", "filename_or_checkpoint"]),
        (nnUNetTrainer.perform_actual_validation, ["self", "save_probabilities"]),
        (nnUNetTrainer.get_tr_and_val_datasets, ["self"]),
        (nnUNetTrainer.do_split, ["self"]),
        (nnUNetTrainer._build_loss, ["self"]),
        (nnUNetTrainer.configure_optimizers, ["self"]),
        (nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size, ["self"]),
        (LocalLogger.log, ["self", "key", "value", "epoch"]),
        (LocalLogger.plot_progress_png, ["self", "output_folder"]),
        (MetaLogger.log, ["self", "key", "value", "step"]),
        (nnUNetPredictor.predict_sliding_window_return_logits, ["self", "input_image"]),
        (nnUNetDatasetBlosc2.load_case, ["self", "identifier"]),
    ],
)
def test_signatures_we_override_or_call(function, parameters):
    assert list(inspect.signature(function).parameters) == parameters


def test_network_builder_is_static_with_the_new_signature():
    assert isinstance(inspect.getattr_static(nnUNetTrainer, "build_network_architecture"), staticmethod)
    assert next(iter(inspect.signature(nnUNetTrainer.build_network_architecture).parameters)) == "plans_manager"


def test_training_transforms_are_static():
    assert isinstance(inspect.getattr_static(nnUNetTrainer, "get_training_transforms"), staticmethod)


@pytest.mark.parametrize(
    ("method", "needles"),
    [
        (nnUNetTrainer.run_training, ["self.on_train_start()", "self.train_step(", "self.on_train_end()"]),
        (nnUNetTrainer.on_train_start, ["self.get_dataloaders()", "self.initialize()"]),
        (nnUNetTrainer.get_dataloaders, ["self.get_tr_and_val_datasets()", "self.get_training_transforms("]),
        (nnUNetTrainer.on_epoch_end, ["self.save_every", "self.logger.plot_progress_png(", "checkpoint_latest.pth"]),
        (nnUNetTrainer._build_loss, ["self.label_manager.ignore_label"]),
        (nnUNetTrainer.validation_step, ["self.label_manager.has_ignore_label", "output = self.network(data)"]),
        (nnUNetTrainer.perform_actual_validation, ["self.do_split()", "'validation'"]),
    ],
)
def test_hooks_are_called_where_we_expect_them(method, needles):
    source = inspect.getsource(method)
    assert [needle for needle in needles if needle not in source] == []


def test_data_loader_reads_cases_and_locations_as_we_offer_them():
    source = inspect.getsource(nnUNetDataLoader)
    for needle in (
        "self._data.load_case(",
        "data.identifiers",
        "properties['class_locations']",
        "'keys': selected_keys",
    ):
        assert needle in source


def test_ignore_label_masks_dice_and_cross_entropy():
    loss = DC_and_CE_loss({"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}, {}, ignore_label=2)
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 4, 4, 4, requires_grad=True)
    target = torch.randint(0, 2, (1, 1, 4, 4, 4)).float()
    target[..., 2:] = 2
    loss(logits, target).backward()
    assert logits.grad[..., 2:].abs().sum() == 0
    assert logits.grad[..., :2].abs().sum() > 0


def test_ignore_label_must_be_the_highest():
    assert LabelManager({"background": 0, "a": 1, "ignore": 2}, None).num_segmentation_heads == 2
    with pytest.raises(AssertionError):
        LabelManager({"background": 0, "a": 1, "ignore": 5}, None)


def test_class_locations_have_a_channel_axis():
    from nnunet_cil.nnunet_api import class_locations

    seg = np.zeros((1, 3, 3, 3), np.int16)
    seg[0, 1, 1, 1] = 1
    locations = class_locations(seg, [1, 2], with_annotated=False)
    assert locations[1].tolist() == [[0, 1, 1, 1]]
    assert len(locations[2]) == 0


@pytest.mark.parametrize("named", [False, True], ids=["by folders", "by dataset.json"])
def test_training_cases_are_those_that_nnunet_lists(tmp_path, named):
    (tmp_path / "imagesTr" / "folder_0000.nii.gz").mkdir(parents=True)
    stray = ("notes.txt", "a_stray.nii.gz", "b10000.nii.gz", "a__000.nii.gz", "c_00a0.nii.gz", "d_0000.nii")
    for name in ("b_0001", "b_0000", "a_0000", "a_1_0000", "A_0003"):
        (tmp_path / "imagesTr" / f"{name}.nii.gz").touch()
    for name in stray:
        (tmp_path / "imagesTr" / name).touch()
    (tmp_path / "imagesTr" / "a_0001.nii.gz").symlink_to("gone")
    content = {"file_ending": ".nii.gz"}
    if named:
        content["dataset"] = {"x": {"images": ["imagesTr/b_0000.nii.gz"], "label": "labelsTr/b.nii.gz"}}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    theirs = get_filenames_of_train_images_and_targets(str(tmp_path))
    ours = nnunet_api.training_cases(tmp_path)
    assert list(ours) == [str(case) for case in theirs]
    for (images, label), files in zip(ours.values(), theirs.values(), strict=True):
        assert [str(image) for image in images] == list(files["images"])
        assert str(label) == files["label"]
