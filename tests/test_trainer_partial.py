"""Cases that lack labels, and new data that label an old class: what the trainer makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_cil import nnunet_api
from nnunet_cil.chain import Chain
from nnunet_cil.dataset import prepare_chain
from nnunet_cil.driver import variants_of
from nnunet_cil.environment import trainer_path_variable
from nnunet_cil.losses.partial import NEVER
from nnunet_cil.prototypes import PrototypeStore
from nnunet_cil.schedule import load_schedule
from nnunet_cil.step_files import write_json
from nnunet_cil.teacher import load_teacher
from nnunet_cil.trainer import unwrap
from tests.conftest import write_tiny_dataset
from tests.test_trainer import fold_of, module_patch, train, trainer_of  # noqa: F401  (a fixture)

LACKING = {"one": {"case_0": ["ball"]}, "two": {"case_1": ["ball"], "case_2": ["blob"]}}
SCHEDULE = {
    "name": "partial",
    "device": "cpu",
    "plans": {"patch_size": [16, 16, 16], "batch_size": 2, "features_per_stage": [4, 8, 8]},
    "training": {"epochs": 1, "iterations_per_epoch": 2, "val_iterations_per_epoch": 1, "amp": "off"},
    "variants": {
        "online": {"trainer": "nnUNetTrainerPGCD", "pseudo_labels": "online"},
        "imprinted": {"trainer": "nnUNetTrainerPGCD", "new_rows": "prototypes"},
    },
    "steps": [{"dataset": "one", "classes": ["ball"]}, {"dataset": "two", "classes": ["ball", "blob"]}],
}
METHODS = ("pgcd", "mib", "plop", "replay", *SCHEDULE["variants"])


@pytest.fixture(scope="module")
def chain(tmp_path_factory, module_patch) -> Chain:  # noqa: F811
    """Step 1 is trained; as teacher, its model sees the ball in every voxel."""
    root = tmp_path_factory.mktemp("partial")
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (root / name).mkdir()
        module_patch.setenv(name, str(root / name))
    module_patch.setenv("nnUNet_n_proc_DA", "0")
    module_patch.setenv("nnUNet_extTrainer", trainer_path_variable())
    for seed, (name, lacking) in enumerate(LACKING.items()):
        write_tiny_dataset(root / name, n_cases=4, seed=seed, ignore=name == "two")
        write_json(root / name / "unlabelled.json", lacking)
    write_json(root / "schedule.yaml", SCHEDULE)
    chain = Chain.open(load_schedule(root / "schedule.yaml"))
    prepare_chain(chain, variants_of(chain, METHODS, []))
    train(chain, 1)

    def seeing_balls(*arguments):
        teacher = load_teacher(*arguments)
        for head in teacher.network.decoder.seg_layers:
            head.bias[1] += 50
        return teacher

    module_patch.setattr("nnunet_cil.trainer.load_teacher", seeing_balls)
    return chain


def started(chain: Chain, step: int, method: str = "pgcd"):
    trainer = trainer_of(chain, step, method)
    trainer.on_train_start()
    return trainer


def batch_of(trainer, *cases: str) -> dict:
    return {**next(trainer.dataloader_train), "keys": list(cases)}


def seen_by_loss(trainer, monkeypatch, step) -> list[torch.Tensor]:
    """What nnU-Net's loss gets as logits in a step, by resolution."""
    seen, loss = [], trainer.loss
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "loss", lambda output, target: seen.append(output) or loss(output, target))
        step()
    return seen[0]


def test_a_kept_scan_has_no_organ_of_its_own_step_but_where_its_labels_have_it(chain):
    """Unless it lacks that label, as case_0 does: what the teacher sees there is all that is known of it."""
    kept = started(chain, 2, "replay")._kept_cases()["step1"]
    own = nnunet_api.preprocessed_dataset(chain.preprocessed(1) / "nnUNetPlans_3d_fullres")
    assert list(kept.identifiers) == [f"case_{i}" for i in range(4)]
    for case in kept.identifiers:
        labels, found = (np.asarray(data.load_case(case)[1][:]) for data in (own, kept))
        assert ((labels == 1).any(), (found == 1).all()) == (case != "case_0", case == "case_0")
        assert case == "case_0" or np.array_equal(found == 1, labels == 1)


@pytest.mark.parametrize(("step", "partial", "lacking"), [(1, "case_0", 1), (2, "case_2", 2)])
def test_the_background_of_a_case_that_lacks_a_class_may_be_that_class(chain, monkeypatch, step, partial, lacking):
    trainer = started(chain, step)
    assert (trainer.objective is None) == (step == 1)
    batch = batch_of(trainer, partial, "case_3")
    raw = []
    handle = unwrap(trainer.network).register_forward_hook(lambda module, x, output: raw.append(output))
    folded = seen_by_loss(trainer, monkeypatch, lambda: trainer.train_step(batch))
    handle.remove()
    assert len(folded) == len(raw[0]) > 1
    for before, after in zip(raw[0], folded, strict=True):
        assert (after[0, lacking] == NEVER).all()
        torch.testing.assert_close(after[0, 0], torch.logsumexp(before[0, [0, lacking]], 0))
        assert torch.equal(after[1], before[1])


def test_what_the_step_files_say_reaches_the_trainer(chain):
    first, second = started(chain, 1), started(chain, 2)
    assert (first._unlabelled, first._relabelled) == ({"case_0": (1,)}, {})
    assert second._unlabelled == {"case_2": (2,)}
    assert second._relabelled == {case: (1,) for case in ("case_0", "case_2", "case_3")}
    assert first.dataloader_train.data_loader._data.identifiers == [f"case_{i}" for i in range(4)]
    assert set(next(first.dataloader_train)["keys"]) <= {f"case_{i}" for i in range(4)}


@pytest.mark.parametrize("case", ["case_0", "case_1"])
def test_validation_counts_no_false_positives_of_a_class_that_is_not_labelled(chain, case):
    trainer = started(chain, 1)
    trainer.network.eval()
    with torch.no_grad():
        for head in unwrap(trainer.network).decoder.seg_layers:
            head.bias[1] += 50
        batch = batch_of(trainer, case, case)
        batch["target"] = [torch.zeros_like(target) for target in batch["target"]]
        found = trainer.validation_step(batch)
    everywhere = batch["target"][0].numel()
    assert found["fp_hard"].tolist() == [0 if case == "case_0" else everywhere]
    assert (found["loss"] < 0.1) == (case == "case_0")
    assert isinstance(trainer.network, torch.nn.Module)


def test_labels_of_an_old_class_take_the_place_of_pseudo_labels_but_where_they_lack(chain):
    trainer = started(chain, 2)
    own, _ = nnUNetTrainer.get_tr_and_val_datasets(trainer)
    merged = trainer.dataloader_train.data_loader._data
    for case in own.identifiers:
        labels, found = (np.asarray(data.load_case(case)[1][:]) for data in (own, merged))
        assert set(np.unique(labels[labels > 0])) == {"case_1": {2, 3}, "case_2": {1, 3}}.get(case, {1, 2, 3})
        np.testing.assert_array_equal(found[labels > 0], labels[labels > 0])
        assert (found == 3).sum() == (labels == 3).sum() > 0, "the ignore label of this dataset alone"
        expected = 1 if case == "case_1" else 0
        assert (found[labels == 0] == expected).all(), "the teacher sees the ball everywhere"


def test_online_and_entropy_rules_know_it_too(chain):
    trainer = started(chain, 2, "online")
    batch = batch_of(trainer, "case_0", "case_1")
    batch["target"] = [torch.zeros_like(target) for target in batch["target"]]
    logits = trainer._teacher_logits(batch["data"])
    merged = trainer._with_online_labels(batch["target"], logits, trainer._in_batch(trainer._relabelled, batch))
    for labels in merged:
        assert (labels[0] == 0).all()
        assert (labels[1] == 1).all()
    seen = []
    trainer.loss = lambda output, target: seen.append(target) or output[0].sum() * 0
    trainer.train_step(batch)
    assert all(torch.equal(a, b) for a, b in zip(seen[0], merged, strict=True))
    trainer = started(chain, 2, "plop")
    found = np.asarray(trainer.dataloader_train.data_loader._data.load_case("case_0")[1][:])
    assert set(np.unique(found)) <= {-1, 0, 1, 2, 3}
    own = np.asarray(nnUNetTrainer.get_tr_and_val_datasets(trainer)[0].load_case("case_0")[1][:])
    assert not (found[own == 0] == 1).any()


def test_objectives_do_not_take_unsure_background_for_background(chain, monkeypatch):
    trainer = started(chain, 2)
    batch, seen, objective = batch_of(trainer, "case_2", "case_3"), [], trainer.objective.forward
    batch["target"] = [torch.zeros_like(target) for target in batch["target"]]
    monkeypatch.setattr(
        trainer.objective, "forward", lambda *arguments: seen.append(arguments[2]) or objective(*arguments)
    )
    trainer.train_step(batch)
    assert (seen[0][0] == 3).all()
    assert (seen[0][1] == 0).all()


def test_a_method_with_bare_labels_folds_on_top_of_its_own_folding(chain, monkeypatch):
    trainer = started(chain, 2, "mib")
    folded = seen_by_loss(trainer, monkeypatch, lambda: trainer.train_step(batch_of(trainer, "case_2", "case_3")))
    assert all(logits.shape[1] == 2 for logits in folded)
    assert all((logits[0, 1] == NEVER).all() and (logits[1, 1] > NEVER / 2).all() for logits in folded)


def test_rows_are_imprinted_from_cases_that_have_all_labels(chain, monkeypatch):
    seen = []
    monkeypatch.setattr("nnunet_cil.trainer.class_statistics", lambda network, cases, *_: seen.extend(cases) or {})
    data = started(chain, 2, "imprinted").dataloader_train.data_loader._data
    whole = [data.load_case(case)[1][:] for case in data.identifiers if case != "case_2"]
    assert len(seen) == len(whole) == 3
    assert all(np.array_equal(labels[:], expected) for (_, labels), expected in zip(seen, whole, strict=True))


@pytest.mark.parametrize("method", ["pgcd", "imprinted"])
def test_a_whole_step_trains(chain, method):
    train(chain, 2, method)
    logged = torch.load(fold_of(chain, 2, method) / "checkpoint_final.pth", weights_only=False)["logging"]
    assert np.isfinite([values[0] for key, values in logged.items() if key.startswith("loss_")]).all()
    store = PrototypeStore.load(fold_of(chain, 2, method) / "prototypes.npz")
    merged = started(chain, 2, method).dataloader_train.data_loader._data
    found = {case: np.asarray(merged.load_case(case)[1][:]) for case in merged.identifiers}
    assert store.counts[1] == sum((labels == 1).sum() for labels in found.values())
    assert store.counts[0] == sum((labels <= 0).sum() for case, labels in found.items() if case != "case_2")
