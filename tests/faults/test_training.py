"""Faults within a training and a prediction: numbers that are none, memory that ends, a clock that goes back."""

from __future__ import annotations

import json
import pydoc
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_cil import nnunet_api
from nnunet_cil.chain import Chain
from nnunet_cil.checkpoint import read_checkpoint
from nnunet_cil.prototypes import PrototypeStore
from nnunet_cil.teacher import sha256_of
from nnunet_cil.trainer import IncrementalTrainer
from tests.test_trainer import CPU, fold_of, make_chain, module_patch, train, trainer_of  # noqa: F401  (a fixture)

NAN = "NaN loss"
STOPS = "the training stops with one error; no checkpoint of NaNs is written"
KEPT = "epochs since the last checkpoint"


@pytest.fixture(scope="module")
def chain(tmp_path_factory, module_patch) -> Chain:  # noqa: F811
    """Step 1 is trained; trainings have three epochs, each with a checkpoint."""
    changes = {"training": ", checkpoint_minutes: 0"}
    chain = make_chain(tmp_path_factory.mktemp("training"), module_patch, ("pgcd", "ewf"), **changes)
    for path in chain.preprocessed(2).glob("nnUNetPlans*.json"):
        plans = json.loads(path.read_text(encoding="utf-8"))
        plans["cil"]["training"]["epochs"] = 3
        path.write_text(json.dumps(plans))
    train(chain, 1)
    return chain


def all_finite(path: Path) -> bool:
    return all(torch.isfinite(weight).all() for weight in read_checkpoint(path)["network_weights"].values())


@pytest.mark.faults(NAN, STOPS, KEPT)
def test_a_loss_of_nan_stops_the_training_and_it_goes_on_from_the_last_checkpoint(chain):
    trainer = trainer_of(chain, 2)
    loss, calls = trainer._segmentation_loss, []

    def diverging(*arguments):
        calls.append(1)
        return loss(*arguments) * (float("nan") if len(calls) == 5 else 1)

    trainer._segmentation_loss = diverging
    with pytest.raises(
        RuntimeError, match=r"epoch 2, iteration 0: got a loss that is not finite .*'loss_segmentation': nan"
    ):
        trainer.run_training()
    folder = fold_of(chain, 2)
    assert not (folder / "checkpoint_final.pth").exists()
    checkpoints = sorted(folder.glob("checkpoint_*"))
    assert folder / "checkpoint_latest.pth" in checkpoints
    assert all(map(all_finite, checkpoints))
    train(chain, 2, resume=True)
    assert all_finite(folder / "checkpoint_final.pth")
    assert len(read_checkpoint(folder / "checkpoint_final.pth")["logging"]["train_losses"]) == 3


@pytest.mark.faults(NAN, STOPS, KEPT)
def test_weights_of_nan_are_never_written(chain, tmp_path):
    trainer = trainer_of(chain, 1)
    trainer.on_train_start()
    next(trainer.network.parameters()).data[0] = float("nan")
    with pytest.raises(RuntimeError, match="got weights that are not finite"):
        trainer.save_checkpoint(str(tmp_path / "checkpoint_final.pth"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.faults(NAN, "one iteration that the scaler of float16 leaves out is none", "that iteration")
def test_an_iteration_that_the_scaler_leaves_out_does_not_stop_the_training(chain):
    trainer = trainer_of(chain, 1)
    trainer._check_finite({"loss": np.array([1.0, 2.0])})
    some, none = {"loss": np.array([1.0, np.nan])}, {"loss": np.array([np.nan, np.inf])}
    with pytest.raises(RuntimeError, match="iteration 1: got a loss that is not finite"):
        trainer._check_finite(some)
    trainer.grad_scaler = object()
    trainer._check_finite(some)
    with pytest.raises(RuntimeError, match="iteration 0: got a loss that is not finite"):
        trainer._check_finite(none)


@pytest.mark.faults("kill -9", "weights that were fused at the end of a training are not fused again", "nothing")
def test_a_training_that_is_resumed_after_its_last_checkpoint_is_not_fused_twice(chain):
    train(chain, 2, "ewf")
    path = fold_of(chain, 2, "ewf") / "checkpoint_final.pth"
    before = read_checkpoint(path)["network_weights"]
    train(chain, 2, "ewf", resume=True)
    after = read_checkpoint(path)["network_weights"]
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_a_fold_that_is_trained_anew_does_not_pass_for_ended_by_the_prototypes_of_before(chain, monkeypatch):
    def killed(trainer):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(IncrementalTrainer, "_final_prototypes", killed)
        with pytest.raises(KeyboardInterrupt):
            train(chain, 1)
    folder = fold_of(chain, 1)
    train(chain, 1, resume=True)
    stored = PrototypeStore.load(folder / "prototypes.npz")
    assert stored.checkpoint_sha256 == sha256_of(folder / "checkpoint_final.pth")


@pytest.mark.faults("clock that jumps", "costs are measured by a clock that cannot be set", "nothing")
def test_the_cost_of_a_training_does_not_follow_the_clock(chain, monkeypatch):
    now = iter(range(2_000_000_000, 0, -86_400))
    monkeypatch.setattr("nnunetv2.training.nnUNetTrainer.nnUNetTrainer.time", lambda: float(next(now)))
    train(chain, 1)
    cost = json.loads((fold_of(chain, 1) / "cost.json").read_text(encoding="utf-8"))
    assert 0 < cost["seconds_training"] < 600


@pytest.mark.faults("full disk", "the checkpoint before stays; one error says what to do", KEPT)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(chain, tmp_path, monkeypatch, error):
    trainer = trainer_of(chain, 1)
    trainer.on_train_start()
    path = tmp_path / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(path))
    before = path.read_bytes()

    def failing(content, file):
        Path(file).write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(OSError, match=rf"got no whole file \({type(error).__name__}: .*Is the disk full"):
        trainer.save_checkpoint(str(path))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


@pytest.mark.faults(
    "out of memory in prediction", "one error that names the image; what is predicted stays", "that image"
)
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
    ids=["python", "gpu", "cpu"],
)
@pytest.mark.parametrize("at", ["the network", "the export"])
def test_memory_ends_in_a_prediction(chain, tmp_path, monkeypatch, error, at):
    names = {
        "the network": "nnunetv2.inference.predict_from_raw_data.nnUNetPredictor.predict_logits_from_preprocessed_data",
        "the export": "nnunetv2.inference.export_prediction.export_prediction_from_logits",
    }
    images = {name: [chain.schedule.source / "imagesTr" / f"{name}_0000.nii.gz"] for name in ("case_0", "case_1")}
    model, output = chain.model_folder(chain.variant("pgcd", 0), 1), tmp_path / "out"
    given = (model, ["all"], "3d_fullres", images, tmp_path / "preprocessed", output, CPU)
    module, _, name = names[at].rpartition(".")
    with monkeypatch.context() as patch:
        original, calls = pydoc.locate(module), []
        function = getattr(original, name)

        def ending(*arguments):
            calls.append(1)
            if len(calls) == 2:
                raise error
            return function(*arguments)

        patch.setattr(original, name, ending)
        with pytest.raises(RuntimeError, match=re.escape("predicting case_1: got no memory (")):
            nnunet_api.predict(*given)
    assert [path.name for path in output.iterdir()] == ["case_0.nii.gz"]
    before = (output / "case_0.nii.gz").stat().st_mtime_ns
    nnunet_api.predict(*given)
    assert sorted(path.name for path in output.iterdir()) == ["case_0.nii.gz", "case_1.nii.gz"]
    assert (output / "case_0.nii.gz").stat().st_mtime_ns == before
