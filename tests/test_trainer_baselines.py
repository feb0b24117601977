"""Each compared method trains a step of the tiny chain, and ends where its definition says."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnunet_cil.chain import Chain
from nnunet_cil.objectives.pgcd import class_balance
from nnunet_cil.objectives.plop import PLOP
from nnunet_cil.pseudo_labels import entropy_histogram, kept_cases_of
from nnunet_cil.step_files import write_json
from nnunet_cil.teacher import load_teacher
from tests.test_trainer import fold_of, make_chain, module_patch, train, trainer_of  # noqa: F401  (a fixture)

METHODS = {
    "pseudo": set(),
    "pseudo_kd": {"distillation"},
    "lwf": {"distillation"},
    "ilt": {"distillation", "features"},
    "ilt_mib": {"distillation", "features"},
    "mib": {"distillation"},
    "plop": {"pod", "pod_logits"},
    "ewf": set(),
    "ewc": {"ewc"},
    "replay": set(),
}
VARIANTS = {
    "ewf_0": "{trainer: nnUNetTrainerEWF, fusion: 0}",
    "ewf_1": "{trainer: nnUNetTrainerEWF, fusion: 1}",
    "ewc_0": "{trainer: nnUNetTrainerEWC, lambda_ewc: 0}",
    "plop_mirrored": "{trainer: nnUNetTrainerPLOP, pseudo_label_mirroring: true}",
    "plop_online": "{trainer: nnUNetTrainerPLOP, pseudo_labels: online}",
    "fused": "{trainer: nnUNetTrainerPGCD, fusion: auto}",
    "balanced": "{trainer: nnUNetTrainerPGCD, class_balance: true}",
}
EXTRA = "variants: {" + ", ".join(f"{name}: {changes}" for name, changes in VARIANTS.items()) + "}"


@pytest.fixture(scope="module")
def chain(tmp_path_factory, module_patch) -> Chain:  # noqa: F811
    """Step 1 is trained."""
    methods = ("pgcd", "finetune", "pgcd-no_channel", "pgcd-background_rows", *METHODS, *VARIANTS)
    chain = make_chain(tmp_path_factory.mktemp("baselines"), module_patch, methods, extra=EXTRA)
    train(chain, 1)
    return chain


def weights_of(chain: Chain, step: int, method: str) -> dict[str, torch.Tensor]:
    return torch.load(fold_of(chain, step, method) / "checkpoint_final.pth", weights_only=False)["network_weights"]


def log_of(chain: Chain, method: str) -> str:
    return next(fold_of(chain, 2, method).glob("training_log_*.txt")).read_text(encoding="utf-8")


@pytest.mark.parametrize("method", METHODS)
def test_a_whole_step_with_the_methods_terms(chain, method):
    train(chain, 2, method)
    checkpoint = torch.load(fold_of(chain, 2, method) / "checkpoint_final.pth", weights_only=False)
    logged = {key.removeprefix("loss_") for key in checkpoint["logging"] if key.startswith("loss_")}
    assert logged == METHODS[method] | {"segmentation"}
    assert checkpoint["network_weights"]["decoder.seg_layers.0.weight"].shape[0] == 3
    assert (fold_of(chain, 2, method) / "prototypes.npz").is_file()


def test_ewf_between_finetuning_and_the_teacher(chain):
    for method in ("finetune", "ewf_0", "ewf_1"):
        train(chain, 2, method)
    finetuned, teacher = weights_of(chain, 2, "finetune"), weights_of(chain, 1, "pgcd")
    assert all(torch.equal(value, finetuned[name]) for name, value in weights_of(chain, 2, "ewf_0").items())
    for name, value in weights_of(chain, 2, "ewf_1").items():
        assert torch.equal(value[: len(teacher[name])], teacher[name])
    assert "0.293 of the teacher's" in log_of(chain, "ewf"), "1 - sqrt(1/2)"


def test_ewc_of_weight_0_is_finetuning_bit_for_bit(chain):
    train(chain, 2, "ewc_0")
    if not (fold_of(chain, 2, "finetune") / "checkpoint_final.pth").is_file():
        train(chain, 2, "finetune")
    finetuned = weights_of(chain, 2, "finetune")
    assert all(torch.equal(value, finetuned[name]) for name, value in weights_of(chain, 2, "ewc_0").items())


def test_fusion_combines_with_any_method(chain):
    train(chain, 2, "fused")
    assert "Weights fused" in log_of(chain, "fused")


def test_replay_trains_on_kept_cases_without_their_background(chain):
    trainer = trainer_of(chain, 2, "replay")
    trainer.on_train_start()
    data = trainer.dataloader_train.data_loader._data
    kept = [case for case in data.identifiers if case.startswith("step1__")]
    assert len(kept) == 4
    assert len(data.identifiers) == 5 + 4
    _, seg, _, properties = data.load_case(kept[0])
    values = set(torch.from_numpy(seg[:].astype(int)).unique().tolist())
    assert 1 in values, "the labels of step 1"
    assert values <= {-1, 1, 3}, "and what is background there is ignored, as the new organ is in it unlabelled"
    assert 1 in properties["class_locations"]
    assert data._where[kept[0]][0]._cache.key["ignored_from"] == 2, "the id of step 1 for ignored voxels"
    listing = json.loads((fold_of(chain, 2, "replay") / "replay.json").read_text(encoding="utf-8"))
    assert listing["bytes"] > 0
    assert listing["cases"] == {"step1": [case.removeprefix("step1__") for case in kept]}


def test_replay_keeps_cases_of_every_earlier_step(chain, monkeypatch):
    """As step 3 would, on the models of steps 1 and 2."""
    trainer, made = trainer_of(chain, 2, "replay"), []
    second, plans = Path(trainer.output_folder_base), trainer.plans_manager.plans
    Path(trainer.output_folder).mkdir(parents=True, exist_ok=True)
    write_json(second / "plans.json", plans)
    monkeypatch.setitem(plans["cil"], "teacher", f"{second.parent.name}/{second.name}")
    trainer.block = replace(trainer.block, step=3, classes=(*trainer.block.classes, ("cube",)))
    monkeypatch.setitem(trainer.block.settings, "replay_cases", 2)
    monkeypatch.setattr(trainer, "_make_pseudo_labels", lambda cases, kept, *what: made.append(what))
    assert {step: len(data.identifiers) for step, data in trainer._kept_cases().items()} == {"step2": 2, "step1": 2}
    assert [what for what, _ in made] == [{"of": kept_cases_of(step), "ignored_from": step + 1} for step in (2, 1)]
    assert [set(ruled_out.values()) for _, ruled_out in made] == [{(2,)}, {(1,)}], "what each step's labels hold"


def test_mib_trains_on_bare_labels_and_plop_on_its_own_pseudo_labels(chain):
    for method, rule in (("mib", None), ("plop", PLOP.pseudo_label_rule)):
        trainer = trainer_of(chain, 2, method)
        trainer.on_train_start()
        seg = trainer.dataloader_train.data_loader._data.load_case("case_0")[1][:]
        assert (3 in seg) == (rule is not None), "ignored voxels"
        key = json.loads((trainer._cache.folder / "key.json").read_text(encoding="utf-8"))
        assert ("entropy" in key) == (rule is not None)
        assert ("tau_old" in key) == (rule is None)


@pytest.mark.parametrize(("method", "bare"), [("mib", True), ("pseudo", False), ("pgcd", False)])
def test_prototypes_say_whether_old_organs_were_background_in_their_labels(chain, method, bare):
    trainer = trainer_of(chain, 2, method)
    trainer.disable_checkpointing = True
    trainer.on_train_start()
    store, _ = trainer._final_prototypes()
    assert store.of_bare_labels == bare


def said_by(trainer, monkeypatch) -> list[str]:
    """What the trainer writes into its log from now on."""
    said: list[str] = []
    monkeypatch.setattr(trainer, "print_to_log_file", lambda *words, **_: said.extend(map(str, words)))
    return said


@pytest.mark.parametrize("bare", [False, True])
def test_prototypes_of_a_teacher_that_took_old_organs_for_background_are_taken_anew(chain, monkeypatch, bare):
    def loaded(*arguments):
        teacher = load_teacher(*arguments)
        return replace(teacher, prototypes=replace(teacher.prototypes, of_bare_labels=bare, tau=0.123))

    monkeypatch.setattr("nnunet_cil.trainer.load_teacher", loaded)
    trainer = trainer_of(chain, 2, "pgcd")
    said = said_by(trainer, monkeypatch)
    trainer.on_train_start()
    assert ("taking its confident predictions on this step" in " ".join(said)) == bare
    assert (float(trainer.objective.tau) == pytest.approx(0.123)) != bare


def dice_and_cross_entropy(logits: torch.Tensor, target: torch.Tensor, ignore: int, batch_dice: bool) -> torch.Tensor:
    """nnU-Net's loss from its definition: soft Dice of the foreground classes, negative, and cross-entropy."""
    valid = target != ignore
    log_p = torch.log_softmax(logits.float(), 1)
    truth = torch.nn.functional.one_hot(torch.where(valid, target, 0)[:, 0].long(), logits.shape[1]).movedim(-1, 1)
    truth = truth * valid
    axes = (0, 2, 3, 4) if batch_dice else (2, 3, 4)
    common, of_truth, of_p = ((x * valid).sum(axes) for x in (log_p.exp() * truth, truth, log_p.exp()))
    dice = (2 * common + 1e-5) / (of_truth + of_p + 1e-5)
    return -dice[..., 1:].mean() - (log_p * truth).sum() / valid.sum()


@pytest.mark.parametrize("method", ["pgcd", "lwf", "mib", "plop"])
def test_the_loss_is_nnunets_dice_and_cross_entropy(chain, method):
    """A published version of MiB lost the Dice; PLOP's factor scales both, for half of a sample is undecided.

    The other methods have what nnU-Net's loss gets from the same function, see ``objectives/test_baselines.py``.
    """
    trainer = trainer_of(chain, 2, method)
    trainer.on_train_start()
    batch = next(trainer.dataloader_train)
    target = [t.clone() for t in batch["target"]]
    if trainer.objective.uses_pseudo_labels:
        for t in target:
            t[0, :, : t.shape[2] // 2] = trainer.block.n_classes
    with torch.no_grad():
        output = trainer.network(batch["data"])
        found = trainer._segmentation_loss(output, target)
    weights = np.array([1 / 2**i for i in range(len(output))])
    weights[-1] = 0
    total = 0.0
    for weight, logits, labels in zip(weights / weights.sum(), output, target, strict=True):
        ignore = trainer.block.n_classes
        if method == "mib":  # background and the old class are one
            together = torch.logsumexp(logits[:, :2], 1, keepdim=True)
            logits, labels = torch.cat([together, logits[:, 2:]], 1), (labels - 1).clamp_min(0)
            ignore -= 1
        total += weight * dice_and_cross_entropy(logits, labels, ignore, trainer.configuration_manager.batch_dice)
    if method == "plop":
        accepted, undecided = (target[0] < 2).sum(), (target[0] == trainer.block.n_classes).sum()
        assert undecided > 0
        total *= accepted / (accepted + undecided)
    torch.testing.assert_close(found, total.to(found), rtol=1e-4, atol=1e-5)


def test_entropy_rule_needs_offline_pseudo_labels(chain):
    with pytest.raises(ValueError, match="PLOP: got pseudo_labels 'online', expected 'offline'"):
        trainer_of(chain, 2, "plop_online").on_train_start()
    assert not (fold_of(chain, 2, "plop_online") / "checkpoint_final.pth").exists()


def test_mirrored_predictions_have_entropy_thresholds_of_their_own(chain):
    plain, mirrored = trainer_of(chain, 2, "plop"), trainer_of(chain, 2, "plop_mirrored")
    for trainer in (plain, mirrored):
        trainer.on_train_start()
    assert plain._cache.key["mirror_axes"] is None
    assert mirrored._cache.key["mirror_axes"]
    assert plain._cache.key["entropy"] != mirrored._cache.key["entropy"]


def test_entropy_thresholds_are_those_of_the_teacher_and_of_what_is_labelled(chain):
    trainer = trainer_of(chain, 2, "plop")
    trainer.on_train_start()
    cases = trainer.dataloader_train.data_loader._data.identifiers
    folder = trainer._cache.folder.parent
    for path in folder.glob("entropy_*.json"):
        path.unlink()
    for number, change in enumerate((lambda: None, relabel(trainer), other_teacher(trainer)), 1):
        for _ in range(2):
            change()
            trainer._make_pseudo_labels(cases, training=cases)
            assert len([*folder.glob("entropy_*.json")]) == number


def test_entropy_thresholds_that_another_job_has_written_meanwhile_are_taken(chain, monkeypatch):
    trainer = trainer_of(chain, 2, "plop")
    trainer.on_train_start()
    cases, folder = trainer.dataloader_train.data_loader._data.identifiers, trainer._cache.folder.parent
    for path in folder.glob("entropy_*.json"):
        path.unlink()
    trainer._make_pseudo_labels(cases, training=cases)
    (path,) = folder.glob("entropy_*.json")
    path.unlink()

    def counted(labels, logits):
        write_json(path, {"thresholds": [0.25, 0.75]})
        return entropy_histogram(labels, logits)

    monkeypatch.setattr("nnunet_cil.trainer.entropy_histogram", counted)
    assert trainer._make_pseudo_labels(cases, training=cases).key["entropy"] == [0.25, 0.75]
    assert json.loads(path.read_text(encoding="utf-8"))["thresholds"] == [0.25, 0.75]
    path.unlink()


def relabel(trainer):
    return lambda: trainer._relabelled.update(case_0=(1,))


def other_teacher(trainer):
    return lambda: setattr(trainer, "teacher", replace(trainer.teacher, sha256="f00d"))


def test_balance_is_that_of_the_steps_pseudo_labels(chain):
    trainer = trainer_of(chain, 2, "balanced")
    trainer.on_train_start()
    counts = torch.from_numpy(trainer._cache.counts(trainer.dataloader_train.data_loader._data.identifiers))
    torch.testing.assert_close(trainer.objective.pgcd.balance, class_balance(counts[:2], 5.0))


def test_fisher_information_is_taken_at_random_places_of_all_cases(chain):
    trainer, cases = trainer_of(chain, 2, "ewc"), {}
    for number, case in enumerate("ba"):
        cases[case] = 100 * number + np.arange(64.0).reshape(1, 1, 1, 64).repeat(16, 1).repeat(16, 2)
    dataset = SimpleNamespace(identifiers=list(cases), load_case=lambda case: (cases[case], None))
    firsts = [float(patch[0, 0, 0, 0, 0]) for patch in islice(trainer._patches(dataset), 8)]
    assert [first >= 100 for first in firsts] == [True, False] * 4
    assert len({first % 100 for first in firsts}) > 4


def test_where_all_cases_lack_a_label_the_log_says_that_rows_start_from_background(chain, monkeypatch):
    trainer = trainer_of(chain, 2, "pgcd")
    lacking = {f"case_{i}": (2,) for i in range(5)}
    monkeypatch.setattr(trainer, "_read_what_is_labelled", lambda: trainer._unlabelled.update(lacking))
    said = said_by(trainer, monkeypatch)
    trainer.on_train_start()
    assert "New rows of the head start from the background's" in " ".join(said)


def test_imprinted_rows_start_from_prototypes_and_a_resumed_run_keeps_its_own(chain):
    plain, imprinted = trainer_of(chain, 2, "pgcd-background_rows"), trainer_of(chain, 2, "pgcd")
    for trainer in (plain, imprinted):
        trainer.on_train_start()
    ours, theirs = imprinted.network.state_dict(), plain.network.state_dict()
    changed = {key for key, value in ours.items() if not torch.equal(value, theirs[key])}
    assert changed
    assert all("seg_layers" in key for key in changed)
    imprinted.on_epoch_start()
    imprinted.on_train_epoch_start()
    imprinted.on_train_epoch_end([imprinted.train_step(next(imprinted.dataloader_train))])
    expected = imprinted.network.decoder.seg_layers[-1].bias.clone()
    imprinted.save_checkpoint(str(fold_of(chain, 2, "pgcd") / "checkpoint_latest.pth"))
    again = trainer_of(chain, 2, "pgcd", resume=True)
    again.on_train_start()
    assert torch.equal(again.network.decoder.seg_layers[-1].bias, expected)


@pytest.mark.parametrize("method", ["pgcd", "mib"])
def test_a_step_in_float16_goes_where_one_in_full_precision_goes(chain, method, monkeypatch):
    """As on CUDA, with autocast and a loss scaler, in its very first iteration."""
    gradients, batches = [], []
    for half in (False, True):
        for seed in (np.random.seed, random.seed, torch.manual_seed):
            seed(0)
        monkeypatch.setattr("nnunet_cil.trainer.amp_dtype", lambda *_, half=half: torch.float16 if half else None)
        trainer = trainer_of(chain, 2, method)
        trainer.on_train_start()
        trainer.grad_scaler = torch.amp.GradScaler("cpu") if half else None
        batches.append(next(trainer.dataloader_train))
        parameters, step = list(trainer.network.parameters()), trainer.optimizer.step

        def stepping(parameters=parameters, step=step):
            gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
            step()

        trainer.optimizer.step = stepping
        trainer.train_step(batches[-1])
    assert torch.equal(batches[0]["data"], batches[1]["data"])
    full, half = gradients
    assert torch.isfinite(half).all()
    assert torch.nn.functional.cosine_similarity(full, half, dim=0) > 0.999
    assert float(half.norm()) == pytest.approx(float(full.norm()), rel=0.01)
