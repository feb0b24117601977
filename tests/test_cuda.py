"""What only a GPU shows: float16, compiled kernels, NCCL, and that a step there is the step of the CPU."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunet_cil.chain import Chain
from nnunet_cil.imprinting import ClassStatistics
from nnunet_cil.prototypes import PrototypeStore
from nnunet_cil.pseudo_labels import PseudoLabelCache, by_confidence
from nnunet_cil.schedule import load_schedule
from nnunet_cil.trainer import unwrap
from tests import shell
from tests.losses.test_pgcd import float16_errors
from tests.test_trainer import fold_of, make_chain, module_patch, train, trainer_of  # noqa: F401  (a fixture)
from tests.test_trainer_baselines import METHODS, log_of, weights_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
EPOCHS = "{epochs: 3, iterations_per_epoch: 60, val_iterations_per_epoch: 5, initial_lr: 0.05, later_lr: 0.05, seed: 0}"


@pytest.fixture(scope="module", autouse=True)
def plain(module_patch):  # noqa: F811
    """Without compiling, which takes longer than all else here; a test that compiles says so."""
    module_patch.setenv("nnUNet_compile", "0")


@pytest.fixture(scope="module")
def chain(tmp_path_factory, module_patch) -> Chain:  # noqa: F811
    """Step 1 is trained, on the GPU."""
    methods = ("pgcd", "finetune", "joint", *METHODS)
    chain = make_chain(tmp_path_factory.mktemp("cuda"), module_patch, methods)
    train(chain, 1, device=CUDA)
    return chain


@pytest.fixture(scope="module")
def full_precision(tmp_path_factory, module_patch) -> Chain:  # noqa: F811
    """Step 1 is trained, in float32."""
    chain = make_chain(tmp_path_factory.mktemp("float32"), module_patch, training=", amp: off")
    train(chain, 1, device=CUDA)
    return chain


def test_a_large_patch_neither_overflows_nor_vanishes_in_float16():
    assert max(float16_errors(2.0**16, stride=4, device="cuda")) < 0.01
    features = 3 + torch.randn(1, 8, 64, 64, 64, device=CUDA, generator=torch.Generator(CUDA).manual_seed(0))
    statistics = ClassStatistics(2, 8)
    with torch.autocast("cuda"):
        statistics.add(features, (features[:, 0] > 4).long())
    assert statistics.squares.max() > torch.finfo(torch.float16).max
    assert all(torch.isfinite(row).all() for row in statistics.discriminant(1))


@pytest.mark.parametrize("method", ["pgcd", "finetune", "joint", *METHODS])
def test_each_method_trains_in_float16(chain, method):
    step = "joint" if method == "joint" else 2
    train(chain, step, method, device=CUDA)
    assert all(torch.isfinite(value).all() for value in weights_of(chain, step, method).values())
    checkpoint = torch.load(fold_of(chain, step, method) / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["grad_scaler_state"]["scale"] > 0
    assert all(np.isfinite(v).all() for name, v in checkpoint["logging"].items() if name.startswith("loss_"))
    cost = json.loads((fold_of(chain, step, method) / "cost.json").read_text(encoding="utf-8"))
    assert cost["peak_gpu_memory_bytes"] > 1e6
    if step == 2:
        assert "float16" in log_of(chain, method)


@pytest.mark.parametrize("method", ["pgcd", "finetune"])
def test_a_float32_step_is_that_of_the_cpu(full_precision, method, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    there, here = (trainer_of(full_precision, 2, method, device=device) for device in (CUDA, CPU))
    for trainer in (there, here):
        trainer.on_train_start()
        trainer.network.train()
    unwrap(there.network).load_state_dict(unwrap(here.network).state_dict())
    for _ in range(3):
        batch = next(here.dataloader_train)
        expected, found = here.train_step(batch), there.train_step(batch)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert float(found[name]) == pytest.approx(float(value), rel=2e-3, abs=1e-5), name
    theirs = unwrap(there.network).state_dict()
    for name, value in unwrap(here.network).state_dict().items():
        torch.testing.assert_close(theirs[name].cpu(), value, rtol=1e-2, atol=1e-3, msg=name)


def test_pseudo_labels_are_decided_on_the_gpu_as_on_the_cpu(tmp_path):
    logits, seg = torch.randn(3, 6, 24, 24).half(), np.zeros((1, 6, 24, 24), np.int16)
    case, found, devices = (np.zeros((1, 6, 24, 24), np.float32), seg, None, {}), [], []
    dataset = SimpleNamespace(load_case=lambda name: case)

    def believed(probabilities, decision):
        devices.append(probabilities.device.type)
        return by_confidence(0.5, 0.7)(probabilities, decision)

    for device in (CPU, CUDA):
        cache = PseudoLabelCache(tmp_path / f"{len(found)}", {"n_classes": 4, "one_piece": [1]})
        cache.fill(dataset, ["a"], lambda image: logits, believed, (6, 8, 8), False, device=device)
        found.append(np.asarray(cache.load("a")[0][:]))
    assert devices == ["cpu", "cuda"]
    assert (found[0] == found[1]).mean() > 0.999


def test_prototypes_are_those_of_the_cpu(full_precision):
    train(full_precision, 2, device=CUDA)
    folder = fold_of(full_precision, 2)
    trainer = trainer_of(full_precision, 2)
    trainer.on_train_start()
    weights = torch.load(folder / "checkpoint_final.pth", weights_only=False, map_location="cpu")["network_weights"]
    unwrap(trainer.network).load_state_dict(weights)
    trainer.set_deep_supervision_enabled(False)
    dataset = trainer.dataloader_train.data_loader._data
    expected = trainer._extract(unwrap(trainer.network).eval(), dataset, 3, "", trainer.teacher.prototypes)
    stored = PrototypeStore.load(folder / "prototypes.npz")
    np.testing.assert_allclose(stored.counts, expected.counts, atol=20)
    np.testing.assert_allclose(stored.means, expected.means, rtol=0.05, atol=0.01)


def test_a_compiled_step_begins_stops_and_goes_on(chain, monkeypatch):
    monkeypatch.setenv("nnUNet_compile", "1")
    trainer = trainer_of(chain, 2, "pgcd", device=CUDA)
    trainer.on_train_start()
    assert isinstance(trainer.network, OptimizedModule)
    trainer.network.train()
    batch = next(trainer.dataloader_train)
    losses = [trainer.train_step(batch) for _ in range(10)]
    assert "loss_pgcd_spatial" in losses[0], "the taps of a compiled network fire"
    assert float(losses[-1]["loss"]) < float(losses[0]["loss"])
    folder = fold_of(chain, 2, "pgcd")
    trainer.save_checkpoint(str(folder / "checkpoint_latest.pth"))
    expected = {name: value.clone() for name, value in unwrap(trainer.network).state_dict().items()}
    again = trainer_of(chain, 2, "pgcd", resume=True, device=CUDA)
    again.on_train_start()
    (folder / "checkpoint_latest.pth").unlink()
    assert again.grad_scaler.state_dict()["scale"] == trainer.grad_scaler.state_dict()["scale"]
    assert all(torch.equal(value, expected[name]) for name, value in unwrap(again.network).state_dict().items())
    again.network.train()
    assert "loss_pgcd_spatial" in again.train_step(batch)


def _rank_trains(rank: int, schedule: str, folder: str) -> None:
    dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=rank, world_size=1)
    torch.cuda.set_device(rank)
    for method in ("plop", "pgcd"):
        trainer = trainer_of(Chain.open(load_schedule(schedule)), 2, method)
        assert trainer.device.type == "cuda"
        trainer.run_training()
        assert isinstance(trainer.network, DistributedDataParallel)
    dist.destroy_process_group()


def test_nccl_reduces_what_the_ranks_have(tmp_path, monkeypatch):
    """One rank, as there may be one GPU; with two, gloo on the CPU: ``test_distributed``."""
    chain = make_chain(tmp_path, monkeypatch, ("pgcd", "plop"))
    train(chain, 1, device=CUDA)
    mp.spawn(_rank_trains, (str(chain.schedule.file), str(tmp_path)), nprocs=1)
    for method in ("plop", "pgcd"):
        assert (fold_of(chain, 2, method) / "checkpoint_final.pth").is_file()
        assert PrototypeStore.load(fold_of(chain, 2, method) / "prototypes.npz").counts.sum() > 0


@pytest.mark.timeout(900)
def test_a_chain_on_the_gpu_keeps_what_finetune_loses(tmp_path, monkeypatch):
    """The commands of a user, compiled as nnU-Net does by default; then its prediction command."""
    chain = make_chain(tmp_path, monkeypatch)
    text = chain.schedule.file.read_text(encoding="utf-8").replace("device: cpu\n", "")
    start = text.index("training: ")
    text = (
        text[:start] + f"training: {EPOCHS}\nlauncher: {{jobs: 2, jobs_per_gpu: 2}}" + text[text.index("\n", start) :]
    )
    chain.schedule.file.write_text(text.replace("name: tiny", "name: gpu"), encoding="utf-8")
    environment = {**os.environ, "nnUNet_compile": "1"}
    tools = Path(sys.executable).parent
    command = [tools / "nnunet-cil", "run", "schedule.yaml", "--methods", "pgcd", "finetune", "--launcher", "local"]
    done = shell.run([str(part) for part in command], tmp_path, environment, seconds=600)
    assert done.returncode == 0, done.stdout
    folder = tmp_path / "nnUNet_results" / "chain_gpu"
    runs = {run["method"]: run["dice"] for run in json.loads((folder / "scores.json").read_text())["runs"]}
    assert runs["pgcd"][0][0] > 0.7
    assert runs["pgcd"][1][0] > 0.7
    assert runs["finetune"][1][0] < 0.2
    gpu = Chain.open(load_schedule(chain.schedule.file))
    variant = gpu.variant("pgcd", 0)
    arguments = ["-d", gpu.dataset_name(2), "-c", "3d_fullres", "-f", "all", "-tr", variant.trainer]
    arguments += ["-i", "source/imagesTr", "-o", "predicted", "-p", gpu.plans_name(variant)]
    done = shell.run([str(tools / "nnUNetv2_predict"), *arguments], tmp_path, environment, seconds=250)
    assert done.returncode == 0, done.stdout
    ours = next(folder.glob(f"predictions/{gpu.plans_name(variant)}/step2_fold_all/*/case_5.nii.gz"))
    theirs = tmp_path / "predicted" / "case_5.nii.gz"
    agreement = [SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))) for path in (ours, theirs)]
    assert (agreement[0] == agreement[1]).mean() > 0.999
