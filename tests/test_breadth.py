"""nnU-Net's breadth: models and configurations of all kinds are extended by a step, or refused by name."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args, run_training
from torch import nn

from nnunet_cil import nnunet_api
from nnunet_cil.chain import Chain
from nnunet_cil.cli.main import main
from nnunet_cil.dataset import prepare_chain
from nnunet_cil.driver import prepare, variants_of
from nnunet_cil.environment import trainer_path_variable
from nnunet_cil.evaluate import evaluate_model, evaluation_file
from nnunet_cil.export import export_model
from nnunet_cil.given_model import read_model
from nnunet_cil.plan_override import apply_override
from nnunet_cil.schedule import PlanOverride, ScheduleError, load_schedule
from nnunet_cil.step_files import write_json
from nnunet_cil.teacher import inherited_from, sha256_of
from nnunet_cil.trainer import IncrementalTrainer, unwrap
from tests.conftest import write_tiny_dataset
from tests.datasets import as_tiff
from tests.test_given_model import move_away, packed, write_extension
from tests.test_trainer import make_chain, module_patch, train, trainer_of  # noqa: F401  (a fixture)

CPU = torch.device("cpu")
TERMS = {"loss", "loss_segmentation", "loss_pgcd_spatial", "loss_pgcd_channel", "loss_dapd_global", "loss_dapd_local"}
THEIR_TRAINERS = '''
from dynamic_network_architectures.architectures.primus import Primus
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans


class nnUNetTrainerReLU(nnUNetTrainer):
    """Another network of the same parameters, by the older signature."""

    @staticmethod
    def build_network_architecture(
        architecture_class_name, arch_init_kwargs, arch_init_kwargs_req_import, n_inputs, n_outputs, deep_supervision
    ):
        return get_network_from_plans(
            architecture_class_name, {**arch_init_kwargs, "nonlin": "torch.nn.ReLU"}, arch_init_kwargs_req_import,
            n_inputs, n_outputs, deep_supervision=deep_supervision,
        )


class nnUNetTrainerTransformer(nnUNetTrainer):
    @staticmethod
    def build_network_architecture(plans_manager, configuration_manager, n_inputs, n_outputs, deep_supervision=True):
        return Primus(n_inputs, 24, (8, 8, 8), n_outputs, 1, 2, configuration_manager.patch_size)
'''


@pytest.fixture(scope="module")
def planned(tmp_path_factory, module_patch) -> dict[str, Any]:  # noqa: F811
    """nnU-Net's plans of the tiny dataset, with a small network in 3d_fullres."""
    chain = make_chain(tmp_path_factory.mktemp("planned"), module_patch, ("pgcd",))
    plans = json.loads((chain.preprocessed(1) / "nnUNetPlans.json").read_text(encoding="utf-8"))
    return {key: value for key, value in plans.items() if key != "cil"}


def residual(plans: dict[str, Any]) -> str:
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    arguments = architecture["arch_kwargs"]
    arguments["n_blocks_per_stage"] = arguments.pop("n_conv_per_stage")
    return "3d_fullres"


def older(plans: dict[str, Any], configuration: str = "3d_fullres") -> str:
    """The format from before there was ``architecture``."""
    settings = plans["configurations"][configuration]
    architecture = settings.pop("architecture")
    arguments = architecture["arch_kwargs"]
    convs = arguments.get("n_conv_per_stage", arguments.get("n_blocks_per_stage"))
    settings |= {
        "UNet_class_name": architecture["network_class_name"].rpartition(".")[2],
        "UNet_base_num_features": arguments["features_per_stage"][0],
        "unet_max_num_features": max(arguments["features_per_stage"]),
        "n_conv_per_stage_encoder": convs,
        "n_conv_per_stage_decoder": arguments["n_conv_per_stage_decoder"],
        "num_pool_per_axis": [2, 2, 2],
        "pool_op_kernel_sizes": arguments["strides"],
        "conv_kernel_sizes": arguments["kernel_sizes"],
    }
    return configuration


def older_ct(plans: dict[str, Any]) -> str:
    plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["CTNormalization"]
    intensities = plans.pop("foreground_intensity_properties_per_channel")
    plans["foreground_intensity_properties_by_modality"] = intensities
    return older(plans)


def older_residual(plans: dict[str, Any]) -> str:
    return older(plans, residual(plans))


def two_d(plans: dict[str, Any]) -> str:
    small = PlanOverride(patch_size=(16, 16), batch_size=2, features_per_stage=(4, 8, 8))
    plans["configurations"]["2d"] = apply_override(plans, "2d", small)["configurations"]["2d"]
    return "2d"


def lowres(plans: dict[str, Any]) -> str:
    """With the cascade that nnU-Net plans behind it."""
    full = plans["configurations"]["3d_fullres"]
    coarse = {"spacing": [1.5 * s for s in full["spacing"]], "data_identifier": "nnUNetPlans_3d_lowres"}
    plans["configurations"] |= {
        "3d_lowres": {**copy.deepcopy(full), **coarse, "next_stage": "3d_cascade_fullres"},
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
    }
    return "3d_lowres"


def inheriting(plans: dict[str, Any]) -> str:
    """A configuration as users write them, in plans of their own name."""
    plans["plans_name"] = "nnUNetPlansMine"
    plans["configurations"]["3d_small_batch"] = {"inherits_from": "3d_fullres", "batch_size": 1}
    return "3d_small_batch"


def unchanged(plans: dict[str, Any]) -> str:
    return "3d_fullres"


def write_given(
    root: Path,
    plans: Mapping[str, Any],
    configuration: str = "3d_fullres",
    trainer: str = "nnUNetTrainer",
    folds: tuple[int | str, ...] = ("all",),
    **changes: Any,
) -> Path:
    """A model of random weights that calls most voxels background; ``changes`` are of its dataset.json."""
    folder = root / f"{trainer}__{plans['plans_name']}__{configuration}"
    labels = {"background": 0, "ball": 1}
    dataset_json = {"channel_names": {"0": "MR"}, "labels": labels, "file_ending": ".nii.gz", **changes}
    write_json(folder / "plans.json", plans)
    write_json(folder / "dataset.json", dataset_json)
    for seed, fold in enumerate(folds):
        torch.manual_seed(seed)
        network = nnunet_api.build_network(plans, dataset_json, configuration, trainer)
        for head in getattr(getattr(network, "decoder", None), "seg_layers", ()):
            nn.init.zeros_(head.bias)
            head.bias.data[0] = 2
        (folder / f"fold_{fold}").mkdir()
        checkpoint = {
            "network_weights": network.state_dict(),
            "trainer_name": trainer,
            "init_args": {"configuration": configuration, "fold": fold},
            "inference_allowed_mirroring_axes": (0, 1),
        }
        torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
    return folder


def opened(root: Path, model: Path, **changes: Any) -> Chain:
    """A prepared chain with a given model, whose second step learns the blob."""
    changes = {"test": None, "method": {"new_rows": "prototypes"}, **changes}
    chain = Chain.open(load_schedule(write_extension(root, model, **changes)))
    prepare_chain(chain, variants_of(chain, [], []))
    return chain


def trainer_at(chain: Chain, step: int, fold: int | str = "all") -> IncrementalTrainer:
    """Ready for its first iteration."""
    variant = chain.variant("pgcd", 0)
    trainer = get_trainer_from_args(
        chain.dataset_name(step), chain.schedule.configuration, fold, variant.trainer, chain.plans_name(variant),
        device=CPU,
    )  # fmt: skip
    trainer.on_train_start()
    return trainer


def check_first_step(trainer: IncrementalTrainer, n_channels: int = 1) -> None:
    """The student starts as its teacher with an imprinted row, and a training step has all terms of PGCD."""
    student = unwrap(trainer.network).eval()
    trainer.set_deep_supervision_enabled(False)
    x = torch.randn(1, n_channels, *trainer.configuration_manager.patch_size)
    with torch.no_grad():
        logits, expected = student(x), trainer.teacher.network(x)
    torch.testing.assert_close(logits[:, :2], expected)
    assert logits.shape[1] == 3
    assert not torch.allclose(logits[:, 2], logits[:, 0], atol=0.1), "the new row is imprinted"
    assert trainer.objective.means.shape[0] == 2
    assert bool(trainer.objective.usable[0])
    dataset = trainer.dataloader_train.data_loader._data
    cases = [dataset.load_case(case) for case in dataset.identifiers]
    values = set(np.unique(np.concatenate([np.ravel(seg[:]) for _, seg, _, _ in cases])).tolist())
    assert {0, 2} <= values <= {-1, 0, 1, 2, 3}, "pseudo-labels: believed background, the new class, ignored voxels"
    trainer.set_deep_supervision_enabled(True)
    trainer.network.train()
    before = [parameter.detach().clone() for parameter in student.parameters()]
    result = trainer.train_step(next(trainer.dataloader_train))
    assert set(result) == TERMS
    assert np.isfinite(list(result.values())).all()
    assert any(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))


GIVEN: dict[str, tuple[Callable[[dict[str, Any]], str], str, str]] = {
    "2d": (two_d, "nnUNetTrainer", "PlainConvUNet"),
    "3d_lowres": (lowres, "nnUNetTrainer", "PlainConvUNet"),
    "residual encoder": (residual, "nnUNetTrainer", "ResidualEncoderUNet"),
    "older plans of CT": (older_ct, "nnUNetTrainer", "PlainConvUNet"),
    "older plans, residual encoder": (older_residual, "nnUNetTrainer", "ResidualEncoderUNet"),
    "configuration and plans of a user": (inheriting, "nnUNetTrainerNoMirroring", "PlainConvUNet"),
    "trainer with batch norm": (unchanged, "nnUNetTrainerBN", "BatchNorm3d"),
    "trainer of the older signature": (unchanged, "nnUNetTrainerReLU", "ReLU"),
}


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """Empty folders, and trainers of somebody else that nnU-Net finds."""
    move_away(tmp_path, monkeypatch)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "their_trainers.py").write_text(THEIR_TRAINERS)
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([trainer_path_variable(), str(tmp_path / "theirs")]))
    return tmp_path


@pytest.mark.parametrize("case", GIVEN)
def test_a_given_model_of_any_kind_is_extended(planned, machine, case):
    change, trainer_name, module = GIVEN[case]
    plans = copy.deepcopy(planned)
    configuration = change(plans)
    kind = "CT" if case.endswith("CT") else "MR"
    write_tiny_dataset(machine / "new", n_cases=3, seed=7, channel=kind)
    given = write_given(machine, plans, configuration, trainer_name, channel_names={"0": kind})
    trainer = trainer_at(opened(machine, given), 2)
    for network in (unwrap(trainer.network), trainer.teacher.network):
        assert module in {type(each).__name__ for each in network.modules()}
    check_first_step(trainer)


def test_a_network_of_its_own_goes_through_training_export_and_the_next_extension(planned, machine, capsys):
    theirs = {"dataset": {"theirs_0": {"images": ["/their/folder/theirs_0.nii.gz"]}}}
    chain = opened(machine, write_given(machine, planned, trainer="nnUNetTrainerBN", **theirs))
    train(chain, 2)
    variant = chain.variant("pgcd", 0)
    store = chain.model_folder(variant, 2) / "fold_all" / "prototypes.npz"
    assert store.is_file()
    assert main(["export", str(chain.schedule.file), str(machine / "out")]) == 0
    assert "-tr nnUNetTrainerBN" in capsys.readouterr().out
    archive = machine / "out.zip"
    first = export_model(chain, chain.first_step(0), 1, ["all"], machine / "first", None)
    assert read_model(first).name == "nnUNetTrainerBN__nnUNetPlans__3d_fullres", "the given model, as it was"
    assert "theirs" not in next((machine / "first").rglob("dataset.json")).read_text(encoding="utf-8")
    assert read_model(archive).name == "nnUNetTrainerBN__nnUNetPlans__3d_fullres"
    for folder in (next((machine / "out").rglob("nnUNetTrainerBN__*")), chain.model_folder(variant, 2)):
        assert inherited_from(folder, "all")["network_of"] == "nnUNetTrainerBN"
        predictor = nnUNetPredictor(device=CPU)
        predictor.initialize_from_trained_model_folder(str(folder), ("all",))
        assert any(isinstance(module, nn.BatchNorm3d) for module in predictor.network.modules())


def test_a_trainer_of_ours_has_no_network_of_its_own():
    assert not nnunet_api.has_own_network("nnUNetTrainerPGCD")
    assert not nnunet_api.has_own_network("nnUNetTrainerNoMirroring")
    assert nnunet_api.has_own_network("nnUNetTrainerBN")


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ("nnUNetTrainerTransformer", "got Primus, expected one with decoder.stages and decoder.seg_layers"),
        ("nnUNetTrainerNowhere", "'nnUNetTrainerNowhere', which nnU-Net does not find"),
    ],
)
def test_other_networks_and_unknown_trainers_are_refused_before_anything_is_preprocessed(
    planned, machine, trainer, message
):
    known = "nnUNetTrainer" if trainer.endswith("Nowhere") else trainer
    folder = write_given(machine, planned, trainer=known)
    path = folder / "fold_all" / "checkpoint_final.pth"
    torch.save({**torch.load(path, weights_only=False), "trainer_name": trainer}, path)
    with pytest.raises(ValueError, match=message):
        opened(machine, folder)
    assert not list((machine / "nnUNet_preprocessed").iterdir())


def test_a_chain_of_3d_lowres_with_plans_of_a_user_and_no_cascade(planned, tmp_path, monkeypatch):
    plans = copy.deepcopy(planned)
    lowres(plans)
    plans["plans_name"] = "nnUNetPlansMine"
    write_json(tmp_path / "base.json", plans)
    base = f"{{base: {tmp_path / 'base.json'}}}"
    extra = "method: {new_rows: prototypes}"
    chain = make_chain(tmp_path, monkeypatch, ("pgcd",), configuration="3d_lowres", plans=base, extra=extra)
    lines = prepare(chain.schedule, [], [])
    assert [line.split(" 3d_")[1] for line in lines] == [
        "lowres all -tr nnUNetTrainerPGCD -p nnUNetPlansMine -device cpu"
    ] * 2
    train(chain, 1)
    trainer = trainer_at(chain, 2)
    check_first_step(trainer)
    assert trainer.configuration_manager.next_stage_names is None, "nnU-Net's validation would look for its data"
    assert trainer.plans_manager.plans["configurations"]["3d_lowres"]["next_stage"] == "3d_cascade_fullres"
    with pytest.raises(ValueError, match="3d_cascade_fullres, which needs the segmentations of 3d_lowres"):
        get_trainer_from_args(
            chain.dataset_name(2), "3d_cascade_fullres", "all", "nnUNetTrainerPGCD", "nnUNetPlansMine", device=CPU
        )
    assert not list((tmp_path / "nnUNet_results").rglob("*3d_cascade_fullres"))
    text = (tmp_path / "schedule.yaml").read_text(encoding="utf-8")
    (tmp_path / "cascade.yaml").write_text(text.replace("3d_lowres", "3d_cascade_fullres"))
    with pytest.raises(ScheduleError, match="configuration: got '3d_cascade_fullres', expected one of 2d, 3d_lowres"):
        load_schedule(tmp_path / "cascade.yaml")


@pytest.mark.parametrize("configuration", ["3d_cascade_fullres", "mine"])
def test_a_given_cascade_is_refused_also_by_inheritance(planned, tmp_path, configuration):
    plans = copy.deepcopy(planned)
    lowres(plans)
    plans["configurations"]["mine"] = {"inherits_from": "3d_cascade_fullres", "batch_size": 1}
    folder = tmp_path / f"nnUNetTrainer__nnUNetPlans__{configuration}"
    (folder / "fold_0").mkdir(parents=True)
    (folder / "fold_0" / "checkpoint_final.pth").touch()
    write_json(folder / "plans.json", plans)
    write_json(folder / "dataset.json", {"labels": {"background": 0, "ball": 1}})
    with pytest.raises(ValueError, match=f"{configuration}, which needs the segmentations of 3d_lowres"):
        read_model(folder)


def test_two_channels(tmp_path, monkeypatch):
    def with_second_channel(folder: Path, **changes: Any) -> Path:
        write_tiny_dataset(folder, **changes)
        for path in (folder / "imagesTr").glob("*_0000.nii.gz"):
            second = SimpleITK.ReadImage(str(path)) * -2
            SimpleITK.WriteImage(second, str(path).replace("_0000", "_0001"))
        content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        write_json(folder / "dataset.json", {**content, "channel_names": {"0": "T1", "1": "T2"}})
        return folder

    monkeypatch.setattr("tests.test_trainer.write_tiny_dataset", with_second_channel)
    chain = make_chain(tmp_path, monkeypatch, ("pgcd",), extra="method: {new_rows: prototypes}")
    train(chain, 1)
    trainer = trainer_at(chain, 2)
    data = next(trainer.dataloader_train)["data"]
    assert data.shape[1] == 2
    image = trainer.dataloader_val.data_loader._data.load_case("case_0")[0][:]
    np.testing.assert_allclose(image[0], -image[1], atol=1e-3, err_msg="each channel is normalised by itself")
    check_first_step(trainer, n_channels=2)


def test_a_chain_of_tiffs_is_trained_and_scored_and_its_segmentations_have_their_spacing(tmp_path, monkeypatch):
    spacing = [2.0, 1.0, 1.0]
    monkeypatch.setattr(
        "tests.test_trainer.write_tiny_dataset",
        lambda folder, **changes: as_tiff(write_tiny_dataset(folder, **changes), spacing),
    )
    chain = make_chain(tmp_path, monkeypatch, ("pgcd",))
    variant = chain.variant("pgcd", 0)
    for step in (1, 2):
        train(chain, step)
        scores = evaluate_model(chain, variant, step, "all", CPU)["scores"]
        (folder,) = evaluation_file(chain, variant, step, "all").parent.glob("*/")
        assert {path.name for path in folder.iterdir()} == {f"{case}{e}" for case in scores for e in (".tif", ".json")}
        for case in scores:
            assert Tiff3DIO().read_seg(str(folder / f"{case}.tif"))[1]["spacing"] == spacing


def test_each_fold_has_its_own_teacher_and_a_zip_of_all_folds_is_ensembled_and_extended(tmp_path, monkeypatch):
    chain = make_chain(tmp_path, monkeypatch, ("pgcd",), fold="[0, 1]", training=", validation_cases: 0")
    variant = chain.variant("pgcd", 0)
    for fold in (0, 1):
        run_training(chain.dataset_name(1), "3d_fullres", fold, variant.trainer, chain.plans_name(variant), device=CPU)
    files = [chain.model_folder(variant, 1) / f"fold_{fold}" / "checkpoint_final.pth" for fold in (0, 1)]
    assert [trainer_at(chain, 2, fold).teacher.sha256 for fold in (0, 1)] == [sha256_of(file) for file in files]
    archive = export_model(chain, variant, 1, [0, 1], tmp_path / "out", None)
    assert read_model(archive).folds == (0, 1)

    folder = next((tmp_path / "out").rglob("nnUNetTrainer__*"))
    x = torch.randn(1, 16, 16, 16)
    predictions = []
    for folds in ((0,), (1,), (0, 1)):
        predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(folder), folds)
        predictions.append(predictor.predict_logits_from_preprocessed_data(x))
    assert not torch.allclose(predictions[0], predictions[1], atol=1e-3)
    torch.testing.assert_close(predictions[2], (predictions[0] + predictions[1]) / 2, atol=1e-2, rtol=0)

    (tmp_path / "there").mkdir()
    move_away(tmp_path / "there", monkeypatch)
    with pytest.raises(
        ScheduleError, match=r"fold: .*the folds \[0, 1\], expected fold 'all'.*model_fold: 0.* --fold 0 1 "
    ):
        opened(tmp_path / "there", archive)
    extended = opened(tmp_path / "there", archive, fold=[0, 1], training={"epochs": 1, "iterations_per_epoch": 1})
    for fold in (0, 1):
        teacher = trainer_at(extended, 2, fold).teacher
        own = torch.load(files[fold], weights_only=False)["network_weights"]
        assert all(torch.equal(value, own[name]) for name, value in teacher.weights.items())
        assert teacher.prototypes is not None


def test_five_folds_of_stock_nnunet_in_a_zip_teach_each_its_own(planned, machine):
    model = write_given(machine, planned, folds=(0, 1, 2, 3, 4))
    chain = opened(machine, packed(model), fold=[1, 4])
    assert read_model(model).folds == (0, 1, 2, 3, 4)
    for fold in (1, 4):
        expected = torch.load(model / f"fold_{fold}" / "checkpoint_final.pth", weights_only=False)["network_weights"]
        trainer = trainer_at(chain, 2, fold)
        assert all(torch.equal(value, expected[name]) for name, value in trainer.teacher.weights.items())


def test_regions_are_refused_by_extend_in_the_new_data_and_in_the_model(planned, machine, monkeypatch, capsys):
    monkeypatch.chdir(machine)
    model = write_given(machine, planned)
    data = write_tiny_dataset(machine / "new", n_cases=3)
    command = ["extend", str(model), "--with", str(data), "--classes", "whole=1", "--only-write"]
    for folder, labels in ((data, {"background": 0, "whole": [1, 2], "core": 2}), (model, {"whole": [1, 2]})):
        content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        write_json(folder / "dataset.json", {**content, "labels": labels})
        assert main(command) == 1
        assert "got regions ['whole'], expected one integer a class" in capsys.readouterr().err
        write_json(folder / "dataset.json", content)


@pytest.mark.parametrize("dataset", ["7", "Dataset007_Theirs"])
def test_a_model_is_named_by_dataset_trainer_plans_and_configuration(planned, machine, monkeypatch, capsys, dataset):
    monkeypatch.chdir(machine)
    plans = copy.deepcopy(planned)
    configuration = inheriting(plans)
    theirs = machine / "nnUNet_results" / "Dataset007_Theirs"
    model = write_given(theirs, plans, configuration, "nnUNetTrainerBN", (0, 1))
    data = write_tiny_dataset(machine / "new", n_cases=3)
    command = ["extend", dataset, "-tr", "nnUNetTrainerBN", "-p", "nnUNetPlansMine", "-c", configuration]
    command += ["--with", str(data), "--classes", "blob", "--only-write"]
    assert main(command) == 1, "nnU-Net's usual folds are not `all`"
    assert "--fold 0 1 trains each from its own" in capsys.readouterr().err
    assert not (machine / "extended.yaml").exists(), "the mended command writes it"
    command += ["--fold", "0", "1"]
    assert main(command) == 0
    schedule = load_schedule(machine / "extended.yaml")
    assert schedule.model.path == model
    assert schedule.folds == (0, 1)
    assert main([*command[:1], dataset.replace("7", "8"), *command[2:]]) == 1
    assert "got 0 such datasets in" in capsys.readouterr().err


def test_the_tests_that_the_page_on_support_names_exist():
    page = Path(__file__).parents[1] / "docs" / "support.md"
    named = set(re.findall(r"`(test\w+\.py)::(test\w+)`", page.read_text(encoding="utf-8")))
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (Path(__file__).parent / file).read_text(encoding="utf-8"), (file, test)
