"""A resumed training goes on exactly: weights, optimiser, background prototype, random generators, logged terms."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from nnunet_cil.chain import Chain
from nnunet_cil.step_files import write_json
from tests.test_trainer import fold_of, make_chain, module_patch, train, trainer_of  # noqa: F401  (a fixture)


@pytest.fixture(scope="module")
def chain(tmp_path_factory, module_patch) -> Chain:  # noqa: F811
    """Step 1 is trained; trainings have three epochs."""
    chain = make_chain(
        tmp_path_factory.mktemp("resume"), module_patch, ("pgcd", "ewc", "replay"), training=", checkpoint_minutes: 0"
    )
    for path in (path for step in (1, 2) for path in chain.preprocessed(step).glob("nnUNetPlans*.json")):
        plans = json.loads(path.read_text(encoding="utf-8"))
        if "cil" in plans:
            plans["cil"]["training"]["epochs"] = 3
            write_json(path, plans)
    train(chain, 1)
    return chain


def checkpoint(folder, name="checkpoint_final.pth"):
    return torch.load(folder / name, weights_only=False)


class KillError(Exception):
    """In place of kill -9."""


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool((a == b) if not hasattr(a, "all") else (a == b).all())


# ewc and replay also take something from outside the checkpoint: the teacher's weights, kept scans
@pytest.mark.parametrize(("step", "method"), [(1, "pgcd"), (2, "pgcd"), (2, "ewc"), (2, "replay")])
@pytest.mark.faults("kill -9", "the same command goes on, and ends as if nothing had been", "unfinished epoch")
def test_killed_in_the_second_epoch_and_resumed_ends_like_uninterrupted(chain, step, method):
    def ran(resume: bool, killed: bool = False):
        trainer = trainer_of(chain, step, method, resume=resume)
        if killed:
            train_step, calls = trainer.train_step, []

            def dying(batch):
                calls.append(1)
                if len(calls) == 4:  # the second iteration of the second epoch
                    raise KillError
                return train_step(batch)

            trainer.train_step = dying
            with pytest.raises(KillError):
                trainer.run_training()
        else:
            trainer.run_training()

    folder = fold_of(chain, step, method)
    kept = folder.parent.with_name("kept")
    if step == 1:
        shutil.copytree(folder.parent, kept)
        shutil.rmtree(folder)
    try:
        ran(resume=False)
        whole = checkpoint(folder)
        shutil.rmtree(folder)
        ran(resume=False, killed=True)
        assert not (folder / "checkpoint_final.pth").exists()
        ran(resume=True)
        resumed = checkpoint(folder)
        for key in ("network_weights", "optimizer_state"):
            assert equal(whole[key], resumed[key]), key
        for key in ("objective", "random"):
            assert equal(whole["cil"][key], resumed["cil"][key]), key
        times = ("epoch_start_timestamps", "epoch_end_timestamps")
        logged = [{k: v for k, v in each["logging"].items() if k not in times} for each in (whole, resumed)]
        assert equal(*logged)
    finally:
        if step == 1:
            shutil.rmtree(folder.parent)
            kept.rename(folder.parent)
