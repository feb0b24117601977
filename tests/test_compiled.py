"""A step under ``torch.compile``, which nnU-Net uses on CUDA; here all but the last stage, which makes kernels."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch._dynamo import OptimizedModule

from nnunet_cil.chain import Chain
from nnunet_cil.trainer import IncrementalTrainer, unwrap
from tests.test_distributed import check_stored
from tests.test_trainer import fold_of, make_chain, module_patch, train, trainer_of  # noqa: F401  (a fixture)


@pytest.fixture(scope="module")
def chain(tmp_path_factory, module_patch) -> Chain:  # noqa: F811
    """Step 1 is trained."""
    chain = make_chain(tmp_path_factory.mktemp("compiled"), module_patch, ("pgcd", "plop"))
    train(chain, 1)
    return chain


def compile_with(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nnU-Net compile, on the CPU too."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(IncrementalTrainer, "_do_i_compile", lambda self: True)


@pytest.fixture
def compiling(monkeypatch):
    compile_with("aot_eager", monkeypatch)


def started(chain: Chain, method: str, resume: bool = False) -> IncrementalTrainer:
    trainer = trainer_of(chain, 2, method, resume)
    trainer.on_train_start()
    return trainer


@pytest.mark.parametrize(
    ("method", "backend"),
    [("pgcd", "aot_eager"), ("plop", "aot_eager"), pytest.param("pgcd", "inductor", marks=pytest.mark.slow)],
)
def test_train_steps_are_those_of_the_plain_network(chain, method, backend, monkeypatch):
    plain = started(chain, method)
    near_0 = 1e-7 if backend == "inductor" else None  # its kernels round a term of 1e-9 otherwise
    compile_with(backend, monkeypatch)
    compiled = started(chain, method)
    assert isinstance(compiled.network, OptimizedModule)
    assert not isinstance(plain.network, OptimizedModule)
    plain.network.train()
    compiled.network.train()
    for seed in range(3):
        batch = next(plain.dataloader_train)
        torch.manual_seed(seed)
        expected = plain.train_step(batch)
        torch.manual_seed(seed)
        found = compiled.train_step(batch)
        assert found == pytest.approx(expected, rel=1e-4, abs=near_0)
        assert len(found) > 3, "the taps gave features to all terms"
    for ours, theirs in zip(compiled.network.parameters(), plain.network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_step_is_resumed_with_and_without_compiling(chain, request, monkeypatch):
    request.getfixturevalue("compiling")
    trainer = started(chain, "pgcd")
    trainer.network.train()
    trainer.train_step(next(trainer.dataloader_train))
    expected = {name: value.clone() for name, value in unwrap(trainer.network).state_dict().items()}
    folder = fold_of(chain, 2, "pgcd")
    trainer.save_checkpoint(str(folder / "checkpoint_latest.pth"))
    saved = torch.load(folder / "checkpoint_latest.pth", weights_only=False)["network_weights"]
    assert saved.keys() == expected.keys(), "as any model of nnU-Net, without _orig_mod"
    for compiles in (True, False):
        monkeypatch.setattr(IncrementalTrainer, "_do_i_compile", lambda self, compiles=compiles: compiles)
        again = started(chain, "pgcd", resume=True)
        assert isinstance(again.network, OptimizedModule) == compiles
        assert all(torch.equal(value, expected[name]) for name, value in unwrap(again.network).state_dict().items())
        assert "loss_pgcd_spatial" in again.train_step(next(again.dataloader_train))
    (folder / "checkpoint_latest.pth").unlink()


def test_a_whole_step_ends_with_the_prototypes_of_its_network(chain, compiling):
    train(chain, 2)
    assert isinstance(started(chain, "pgcd").network, OptimizedModule)
    check_stored(chain, "pgcd")
