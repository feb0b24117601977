"""The trainer on a tiny prepared chain, in this process: teacher, terms, resuming, and what it refuses."""

from __future__ import annotations

import json
import random
import shutil
import sys
import zipfile
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint, run_training
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_cil.chain import Chain
from nnunet_cil.dataset import prepare_chain
from nnunet_cil.driver import variants_of
from nnunet_cil.environment import trainer_path_variable
from nnunet_cil.losses.distillation import fold_logits
from nnunet_cil.prototypes import PrototypeStore
from nnunet_cil.schedule import load_schedule
from nnunet_cil.step_files import write_json
from nnunet_cil.teacher import grow_head
from nnunet_cil.trainer import IncrementalTrainer, WarmupPolyLRScheduler, unwrap
from tests.conftest import write_schedule, write_tiny_dataset

CPU = torch.device("cpu")
THREADS_AS_PROCESSES = SimpleNamespace(get_context=lambda method: SimpleNamespace(Pool=ThreadPool))


def make_chain(root, monkeypatch, methods=("pgcd", "finetune"), ignore=False, **changes) -> Chain:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (root / name).mkdir()
        monkeypatch.setenv(name, str(root / name))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_def_n_proc", "2")
    monkeypatch.setenv("nnUNet_extTrainer", trainer_path_variable())
    source = write_tiny_dataset(root / "source", ignore=ignore)
    chain = Chain.open(load_schedule(write_schedule(root / "schedule.yaml", source, **changes)))
    prepare_chain(chain, variants_of(chain, methods, []))
    return chain


def train(chain: Chain, step, method="pgcd", resume=False, device=CPU) -> None:
    variant = chain.variant(method, 0)
    run_training(
        chain.dataset_name(step),
        chain.schedule.configuration,
        "all",
        variant.trainer,
        chain.plans_name(variant),
        continue_training=resume,
        device=device,
    )


def trainer_of(chain: Chain, step, method="pgcd", resume=False, device=CPU):
    variant = chain.variant(method, 0)
    trainer = get_trainer_from_args(
        chain.dataset_name(step),
        chain.schedule.configuration,
        "all",
        variant.trainer,
        chain.plans_name(variant),
        resume,
        device=device,
    )
    maybe_load_checkpoint(trainer, resume, False)
    return trainer


def fold_of(chain: Chain, step, method="pgcd"):
    return chain.model_folder(chain.variant(method, 0), step) / "fold_all"


@pytest.fixture(scope="module")
def module_patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def trained(tmp_path_factory, module_patch):
    """A chain whose step 1 is trained; tests leave it as it is."""
    chain = make_chain(tmp_path_factory.mktemp("trained"), module_patch)
    train(chain, 1)
    return chain


@pytest.fixture
def started(trained):
    """The trainer of step 2 with PGCD, ready for its first iteration; its results are removed after."""
    trainer = trainer_of(trained, 2)
    trainer.on_train_start()
    yield trainer
    shutil.rmtree(trained.model_folder(trained.variant("pgcd", 0), 2), ignore_errors=True)


def test_step_1_is_stock_nnunet_with_prototypes(trained):
    folder = fold_of(trained, 1)
    checkpoint = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["trainer_name"] == "nnUNetTrainerPGCD"
    store = PrototypeStore.load(folder / "prototypes.npz")
    assert store.class_names == ("background", "ball")
    assert store.counts.sum() > 0
    assert np.isfinite(store.means).all()
    assert (folder / "progress.png").is_file()
    assert json.loads((folder / "validation" / "summary.json").read_text(encoding="utf-8"))["metric_per_case"] == []
    cost = json.loads((folder / "cost.json").read_text(encoding="utf-8"))
    assert cost["seconds_per_iteration"] > 0
    assert cost["seconds_preparing"] > 0
    assert cost["seconds_prototypes"] > 0
    assert cost["peak_memory_bytes"] > 1e8


def test_step_1_train_step_is_nnunets_own(trained):
    trainer = trainer_of(trained, 1)
    trainer.on_train_start()
    batch = next(trainer.dataloader_train)
    reference = trainer_of(trained, 1)
    reference.initialize()
    unwrap(reference.network).load_state_dict(unwrap(trainer.network).state_dict())
    with reference._autocast():
        expected = nnUNetTrainer.train_step(reference, batch)
    assert trainer.train_step(batch) == expected
    for ours, theirs in zip(trainer.network.parameters(), reference.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_teacher_is_the_final_model_not_the_best(started, trained):
    assert started.block.teacher_checkpoint == "checkpoint_final.pth"
    final = torch.load(fold_of(trained, 1) / "checkpoint_final.pth", weights_only=False)["network_weights"]
    of_teacher = started.teacher.network.state_dict()
    assert all(torch.equal(value, of_teacher[name]) for name, value in final.items())


def test_a_student_with_background_rows_folds_to_its_teacher(started):
    grown = grow_head(started.teacher.weights, started.network.state_dict(), 2)
    started.network.load_state_dict(grown)
    x = torch.randn(1, 1, 16, 16, 16)
    started.set_deep_supervision_enabled(False)
    with torch.no_grad():
        folded = torch.softmax(fold_logits(started.network(x), 2), 1)
        expected = torch.softmax(started.teacher.network(x), 1)
    torch.testing.assert_close(folded, expected, atol=1e-5, rtol=0)


def test_train_step_has_all_terms_one_teacher_pass_and_moves_the_student_only(started):
    calls = []
    handle = started.teacher.network.register_forward_hook(lambda *args: calls.append(1))
    teacher_before = {k: v.clone() for k, v in started.teacher.network.state_dict().items()}
    student_before = [p.detach().clone() for p in started.network.parameters()]
    stored_before = started.objective.means.clone()
    student_calls = []
    unwrap(started.network).register_forward_hook(lambda *args: student_calls.append(1))
    result = started.train_step(next(started.dataloader_train))
    handle.remove()
    assert set(result) == {
        "loss",
        "loss_segmentation",
        "loss_pgcd_spatial",
        "loss_pgcd_channel",
        "loss_dapd_global",
        "loss_dapd_local",
    }
    assert result["loss"] == pytest.approx(sum(v for k, v in result.items() if k != "loss"), rel=1e-5)
    assert len(calls) == len(student_calls) == 1
    assert not started.teacher.network.training
    assert all(p.grad is None and not p.requires_grad for p in started.teacher.network.parameters())
    assert all(torch.equal(v, teacher_before[k]) for k, v in started.teacher.network.state_dict().items())
    assert torch.equal(started.objective.means, stored_before)
    assert any(not torch.equal(a, b) for a, b in zip(student_before, started.network.parameters(), strict=True))


def test_each_distillation_term_reaches_the_student(started):
    data = next(started.dataloader_train)["data"]
    with torch.no_grad():
        logits = started.teacher.network(data)
    output = started.network(data + 0.1)[0]
    labels = torch.zeros(output.shape[0], *output.shape[2:], dtype=torch.long)
    labels[:, :4] = 1
    terms = started.objective(started._outputs("student", output), started._outputs("teacher", logits), labels)
    for name, term in terms.items():
        grads = torch.autograd.grad(term, list(started.network.parameters()), retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().sum() > 0 for g in grads), name


def test_training_data_hold_pseudo_labels_of_old_organs(started):
    case = started.dataloader_train.data_loader._data.load_case("case_0")
    own = nnUNetTrainer.get_tr_and_val_datasets(started)[0].load_case("case_0")
    assert set(np.unique(own[1][:])) <= {-1, 0, 2}
    merged = np.asarray(case[1][:])
    np.testing.assert_array_equal(merged[own[1][:] == 2], 2)
    assert set(np.unique(merged)) <= {-1, 0, 1, 2, 3}
    assert 1 in case[3]["class_locations"]
    validation = started.dataloader_val.data_loader._data.load_case("case_0")
    np.testing.assert_array_equal(merged, np.asarray(validation[1][:]))


def test_ignored_voxels_neither_reward_nor_punish(started):
    data = next(started.dataloader_train)["data"]
    output = started.network(data)
    target = [torch.full((o.shape[0], 1, *o.shape[2:]), 3, dtype=torch.int16) for o in output]
    loss = started.loss(output, target)
    grads = torch.autograd.grad(loss, list(started.network.parameters()), allow_unused=True)
    assert all(g is None or g.abs().sum() == 0 for g in grads)


def test_interrupted_run_restores_teacher_and_background(trained, started):
    started.on_epoch_start()
    started.on_train_epoch_start()
    started.on_train_epoch_end([started.train_step(next(started.dataloader_train)) for _ in range(2)])
    path = fold_of(trained, 2) / "checkpoint_latest.pth"
    started.save_checkpoint(str(path))
    assert not path.with_name(path.name + ".part").exists()
    again = trainer_of(trained, 2, resume=True)
    again.on_train_start()
    assert again.current_epoch == 1
    assert again.teacher.sha256 == started.teacher.sha256
    torch.testing.assert_close(again.objective.background.prototype, started.objective.background.prototype)
    assert not torch.equal(again.objective.background.prototype, again.objective.means[0])
    for ours, theirs in zip(again.network.parameters(), started.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert "loss_pgcd_spatial" in again.train_step(next(again.dataloader_train))


def test_loss_terms_reach_every_logger_of_nnunet_such_as_that_of_weights_and_biases(started, monkeypatch):
    seen = {}
    other = SimpleNamespace(log=lambda key, value, step: seen.setdefault(key, value), log_summary=lambda *of: None)
    monkeypatch.setattr(started.logger, "loggers", [*started.logger.loggers, other])
    started.on_epoch_start()
    started.on_train_epoch_start()
    outputs = [started.train_step(next(started.dataloader_train))]
    started.on_train_epoch_end(outputs)
    terms = {name for name in outputs[0] if name.startswith("loss_")}
    assert len(terms) == 5
    assert terms < set(seen)


def test_a_training_does_not_go_on_with_another_teacher(trained, started):
    started.save_checkpoint(str(fold_of(trained, 2) / "checkpoint_latest.pth"))
    again = trainer_of(trained, 2, resume=True)
    again._resumed = {**again._resumed, "teacher": "f00d"}
    with pytest.raises(ValueError, match="expected f00d, with which this training was begun"):
        again.on_train_start()


def test_pseudo_labels_are_kept_by_teacher_and_data_and_believed_by_their_own_thresholds(started):
    manager = started.configuration_manager
    made_of = {"teacher": started.teacher.sha256, "data": manager.data_identifier, "configuration": "3d_fullres"}
    assert made_of.items() <= started._cache.key.items()
    settings = started.block.settings
    between = (settings["tau_old"] + settings["tau_background"]) / 2
    probabilities = torch.tensor([[[between, 1 - between], [1 - between, between]]])
    believed = started._believed()(probabilities, torch.tensor([[[0, 1]]]))
    assert believed.flatten().tolist() == [False, True], "the old organ, not background"


def test_online_labels_are_scaled_down_as_nnunet_scales_labels_down(started):
    full = torch.randint(0, 3, (2, 1, 16, 16, 16), generator=torch.Generator().manual_seed(0))
    target = DownsampleSegForDSTransform([1, 0.5])
    lower = [torch.empty(2, 1, *(n // 2 for n in full.shape[2:]))]
    merged = started._with_online_labels([full, *lower], torch.zeros(2, 2, 16, 16, 16))
    for b in range(2):
        expected = target._apply_to_segmentation(merged[0][b])
        assert all(torch.equal(ours[b], theirs) for ours, theirs in zip(merged, expected, strict=True))


def test_online_labels_of_validation_are_taken_on_the_device_of_the_training(started, monkeypatch):
    """On the CPU a training on CUDA has one thread."""
    monkeypatch.setitem(started.block.settings, "pseudo_labels", "online")
    batch, given = next(started.dataloader_val), []
    started.device, started.amp_dtype = torch.device("meta"), None
    started.teacher.network.to("meta")
    monkeypatch.setattr(nnUNetTrainer, "validation_step", lambda self, batch: given.extend(batch.values()))
    started.validation_step({"data": batch["data"], "target": batch["target"], "keys": batch["keys"]})
    data, target, _ = given
    assert {tensor.device.type for tensor in (data, *target)} == {"meta"}


def test_gradients_are_clipped_to_the_norm_that_nnunet_clips_to(started):
    segmentation = started._segmentation_loss
    started._segmentation_loss = lambda *arguments: 1e4 * segmentation(*arguments)
    started.train_step(next(started.dataloader_train))
    norm = torch.stack([p.grad.norm() for p in started.network.parameters() if p.grad is not None]).norm()
    assert float(norm) == pytest.approx(12, rel=1e-3)


def test_a_class_that_no_training_case_holds_is_refused(started, monkeypatch):
    properties = {"class_locations": {1: [(0, 0, 0, 0)], 2: []}}
    empty = SimpleNamespace(identifiers=["a"], load_case=lambda case: (None, None, None, properties))
    monkeypatch.setattr(nnUNetTrainer, "get_tr_and_val_datasets", lambda self: (empty, empty))
    with pytest.raises(ValueError, match=r"fold all: got no voxel of \['blob'\] in any of the 1 training cases"):
        started.get_tr_and_val_datasets()


def test_a_class_is_in_one_piece_if_it_is_in_every_case(started):
    whole, parted = np.zeros((1, 4, 4, 4), np.int16), np.zeros((1, 4, 4, 4), np.int16)
    whole[0, 0] = parted[0, 0] = parted[0, 2] = 2
    for cases, expected in (({"a": whole}, ("ball", "blob")), ({"a": whole, "b": parted}, ("ball",)), ({}, ("ball",))):
        dataset = SimpleNamespace(identifiers=list(cases), load_case=lambda case, cases=cases: (None, cases[case]))
        assert started._in_one_piece(dataset, ("ball",)) == expected


def test_each_rank_has_a_seed_of_its_own(started):
    seeds = []
    for rank in range(2):
        started.local_rank = rank
        started._seed()
        seeds.append((torch.initial_seed(), np.random.random(), random.random()))
    assert seeds[0][0] == started.block.training.seed
    assert all(first != second for first, second in zip(*seeds, strict=True))


def test_transported_prototypes_are_merged_with_those_of_before(started, monkeypatch):
    previous, dataset = started.teacher.prototypes, started.dataloader_train.data_loader._data
    started.set_deep_supervision_enabled(False)
    counts = {}
    for chosen in ("reextract", "transport"):
        monkeypatch.setitem(started.block.settings, "old_prototypes", chosen)
        counts[chosen] = started._extract(unwrap(started.network).eval(), dataset, 3, "", previous).counts
    np.testing.assert_array_equal(counts["transport"] - counts["reextract"], [0, previous.counts[1], 0])


def test_whole_step_2_and_finetune(trained):
    train(trained, 2)
    train(trained, 2, "finetune")
    folder = fold_of(trained, 2)
    checkpoint = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    assert set(checkpoint["cil"]["objective"]) >= {"means", "background.prototype"}
    assert len(checkpoint["logging"]["loss_pgcd_spatial"]) == 1
    assert checkpoint["network_weights"]["decoder.seg_layers.0.weight"].shape[0] == 3
    assert json.loads((folder.parent / "dataset.json").read_text(encoding="utf-8"))["labels"] == {
        "background": 0,
        "ball": 1,
        "blob": 2,
    }
    log = next(folder.glob("training_log_*.txt")).read_text(encoding="utf-8")
    assert "loss_dapd_local" in log
    assert "teacher" in log
    debug = json.loads((folder / "debug.json").read_text(encoding="utf-8"))
    assert "tensor(" not in debug["teacher"], "nnU-Net writes all attributes: no weights among them"
    store = PrototypeStore.load(folder / "prototypes.npz")
    assert store.class_names == ("background", "ball", "blob")
    with zipfile.ZipFile(folder / "checkpoint_final.pth") as parts:
        pickled = b"".join(parts.read(name) for name in parts.namelist() if name.endswith(".pkl"))
    assert b"checkpoint_final.pth" in pickled, "the teacher's"
    root = str(trained.folder.parents[1])
    assert root.encode() not in pickled, "a model that is given away names no folder of its maker"
    assert root.encode() not in b"".join(
        np.load(folder / "prototypes.npz")[key].tobytes() for key in np.load(folder / "prototypes.npz")
    )
    other = torch.load(fold_of(trained, 2, "finetune") / "checkpoint_final.pth", weights_only=False)
    assert "loss_pgcd_spatial" not in other["logging"]
    assert other["trainer_name"] == "nnUNetTrainerFinetune"
    finetuned = PrototypeStore.load(fold_of(trained, 2, "finetune") / "prototypes.npz")
    assert finetuned.stale.tolist() == [False, True, False]
    shutil.rmtree(folder.parent)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "got no file"),
        ("truncated", "unreadable model"),
        ("foreign", "unreadable model"),
        ("classes", "classes: teacher"),
        ("plans", "patch_size: teacher"),
    ],
)
def test_teacher_that_does_not_fit_is_refused(trained, damage, message):
    folder = fold_of(trained, 1)
    kept = folder.parent.with_name("kept")
    shutil.copytree(folder.parent, kept)
    checkpoint = folder / "checkpoint_final.pth"
    try:
        if damage == "missing":
            checkpoint.unlink()
        elif damage == "truncated":
            checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
        elif damage == "foreign":
            torch.save({"state_dict": {}}, checkpoint)
        elif damage == "classes":
            content = json.loads((folder.parent / "dataset.json").read_text(encoding="utf-8"))
            write_json(folder.parent / "dataset.json", {**content, "labels": {"background": 0, "lung": 1}})
        else:
            content = json.loads((folder.parent / "plans.json").read_text(encoding="utf-8"))
            content["configurations"]["3d_fullres"]["patch_size"] = [8, 8, 8]
            write_json(folder.parent / "plans.json", content)
        trainer = trainer_of(trained, 2)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            trainer.on_train_start()
        assert not (fold_of(trained, 2) / "checkpoint_final.pth").exists()
    finally:
        shutil.rmtree(folder.parent)
        kept.rename(folder.parent)
        shutil.rmtree(trained.model_folder(trained.variant("pgcd", 0), 2), ignore_errors=True)


def test_teacher_without_prototypes_gives_its_confident_predictions(trained):
    path = fold_of(trained, 1) / "prototypes.npz"
    kept = path.rename(path.with_name("kept.npz"))
    try:
        trainer = trainer_of(trained, 2)
        trainer.on_train_start()
        assert trainer.objective.means.shape[0] == 2
        assert bool(trainer.objective.usable[0])
    finally:
        kept.rename(path)
        shutil.rmtree(trained.model_folder(trained.variant("pgcd", 0), 2), ignore_errors=True)


def test_interrupted_preprocessing_is_refused(trained):
    folder = trained.preprocessed(2) / "nnUNetPlans_3d_fullres"
    victim = folder / "case_1.pkl"
    content = victim.read_bytes()
    victim.unlink()
    try:
        with pytest.raises(ValueError, match="4 complete cases, expected 5"):
            trainer_of(trained, 2).on_train_start()
    finally:
        victim.write_bytes(content)
        shutil.rmtree(trained.model_folder(trained.variant("pgcd", 0), 2), ignore_errors=True)


def test_edited_labels_and_regions_are_refused(trained):
    path = trained.preprocessed(2) / "dataset.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    try:
        write_json(path, {**content, "labels": {"background": 0, "blob": 1, "ball": 2}})
        with pytest.raises(ValueError, match="in the order learned"):
            trainer_of(trained, 2)
        regions = {"background": 0, "ball": [1, 2], "blob": 2}
        write_json(path, {**content, "labels": regions, "regions_class_order": [1, 2]})
        with pytest.raises(ValueError, match="Region-based"):
            trainer_of(trained, 2)
    finally:
        write_json(path, content)


def test_joint_is_refused_on_a_later_step_where_it_would_be_finetuning(trained):
    trainer = get_trainer_from_args(
        trained.dataset_name(2), "3d_fullres", "all", "nnUNetTrainerJoint", "nnUNetPlans", device=CPU
    )
    with pytest.raises(ValueError, match=r"got step 2 of chain 'tiny', expected a dataset with the labels of all"):
        trainer.run_training()
    shutil.rmtree(trainer.output_folder_base)


def test_a_later_step_takes_no_pretrained_weights_and_says_so(trained):
    trainer = trainer_of(trained, 2)
    trainer.initialize()  # nnU-Net does, to load -pretrained_weights before the training starts
    with torch.no_grad():
        for parameter in trainer.network.parameters():
            parameter.fill_(7)
    trainer.on_train_start()
    assert not any((parameter == 7).any() for parameter in trainer.network.parameters())
    (log,) = fold_of(trained, 2).glob("training_log*.txt")
    assert "other weights (-pretrained_weights) are not used" in log.read_text(encoding="utf-8")


def test_warm_up_scales_nnunets_decay_up_linearly():
    def rates(make, *arguments):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler, found = make(optimizer, 0.1, 10, *arguments), []
        for epoch in range(5):
            scheduler.step(epoch)
            found.append(optimizer.param_groups[0]["lr"])
        return np.array(found)

    expected = rates(PolyLRScheduler) * [1 / 4, 2 / 4, 3 / 4, 1, 1]
    np.testing.assert_allclose(rates(WarmupPolyLRScheduler, 3), expected)


@pytest.mark.parametrize(("axes", "mirrored"), [("[0, 2]", (0, 2)), ("[]", None)])
def test_later_steps_have_a_rate_and_warm_up_of_their_own_and_all_steps_the_mirrored_axes(
    tmp_path, monkeypatch, axes, mirrored
):
    changes = {"training": ", initial_lr: 0.02, later_lr: 0.003, warmup_epochs: 2", "extra": f"mirror_axes: {axes}"}
    chain = make_chain(tmp_path, monkeypatch, methods=("pgcd",), **changes)
    for step, rate, scheduler in ((1, 0.02, PolyLRScheduler), (2, 0.003, WarmupPolyLRScheduler)):
        trainer = trainer_of(chain, step)
        trainer.initialize()
        assert (trainer.initial_lr, type(trainer.lr_scheduler)) == (rate, scheduler)
        assert trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[3] == mirrored
        assert trainer.inference_allowed_mirroring_axes == mirrored


def test_without_deep_supervision_all_that_trains_gets_a_gradient(tmp_path, monkeypatch):
    trainer = trainer_of(make_chain(tmp_path, monkeypatch, methods=("pgcd",), training=", deep_supervision: false"), 1)
    trainer.on_train_start()
    trainer.train_step(next(trainer.dataloader_train))
    trained = dict(trainer.network.named_parameters())
    assert all(parameter.requires_grad == (parameter.grad is not None) for parameter in trained.values())
    assert not trained["decoder.seg_layers.0.weight"].requires_grad, "-num_gpus would wait for its gradient"


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            {"training": ", deep_supervision: false, validation_cases: 1", "extra": "method: {pseudo_labels: online}"},
            id="no-deep-supervision-online-limited-validation",
        ),
        pytest.param(
            {
                "configuration": "2d",
                "plans": "{patch_size: [16, 16], batch_size: 1, features_per_stage: [4, 8, 8]}",
                "extra": "method: {old_prototypes: transport, background_features: student, one_piece: false}",
            },
            id="2d-batch-of-one-transport",
        ),
        pytest.param(
            {
                "plans": "{planner: nnUNetPlannerResEncM, patch_size: [16, 16, 16], features_per_stage: [4, 8, 8]}",
                "ignore": True,
                "images": "disjoint",
                "extra": "method: {class_balance: true, scale_by_classes: true, one_piece: [ball]}\nmirror_axes: []",
            },
            id="residual-encoder-ignore-label-disjoint-no-mirroring",
        ),
    ],
)
def test_other_configurations_train_both_steps(tmp_path, monkeypatch, changes):
    chain = make_chain(tmp_path, monkeypatch, methods=("pgcd",), **changes)
    for user in ("training.nnUNetTrainer.nnUNetTrainer", "evaluation.evaluate_predictions"):  # no processes to wait for
        monkeypatch.setattr(f"nnunetv2.{user}.multiprocessing", THREADS_AS_PROCESSES)
    for step in (1, 2):
        train(chain, step)
        store = PrototypeStore.load(fold_of(chain, step) / "prototypes.npz")
        assert store.class_names == ("background", "ball", "blob")[: step + 1]
        assert store.in_one_piece == store.class_names[1:]
    assert not store.stale.any(), "old organs of step 2 are found by pseudo-labels, online or not"
    assert store.counts[1] > 0
    (key,) = (chain.preprocessed(2) / "pseudo_labels").glob("*/key.json")
    found = json.loads(key.read_text(encoding="utf-8")).get("one_piece")
    (log,) = fold_of(chain, 2).glob("training_log*.txt")
    assert ("one component of ball" in log.read_text(encoding="utf-8")) == bool(found)
    assert found == (None if "one_piece: false" in changes["extra"] else [1])
    logged = torch.load(fold_of(chain, 2) / "checkpoint_final.pth", weights_only=False)["logging"]
    assert np.isfinite([values[0] for key, values in logged.items() if key.startswith("loss_")]).all()
    summary = json.loads((fold_of(chain, 2) / "validation" / "summary.json").read_text(encoding="utf-8"))
    validated = "validation_cases" in changes.get("training", "")
    assert len(summary["metric_per_case"]) == (1 if validated else 0)
    told = "knows labels of blob alone: an old organ that is found counts as Dice 0,"
    assert (told in log.read_text(encoding="utf-8")) == validated
    assert ("nnUNetv2_find_best_configuration" in log.read_text(encoding="utf-8")) == validated


@pytest.mark.parametrize(
    ("minutes", "seconds_of_save", "seconds_since", "due"),
    [
        (2.0, 0.0, 0.1, True),  # the first epoch
        (2.0, 0.1, 4.9, False),
        (2.0, 0.1, 5.1, True),  # 2 % of the time
        (2.0, 30.0, 119.0, False),
        (2.0, 30.0, 121.0, True),  # 30 s are a quarter of it, but nothing older than two minutes is lost
        (0.0, 30.0, 0.1, True),
    ],
)
def test_a_checkpoint_is_written_after_every_epoch_that_can_afford_it(
    monkeypatch, minutes, seconds_of_save, seconds_since, due
):
    trainer = IncrementalTrainer.__new__(IncrementalTrainer)
    trainer.block = SimpleNamespace(training=SimpleNamespace(checkpoint_minutes=minutes))
    trainer._epoch_started = trainer._seconds_training = 0.0
    trainer._last_save, trainer._seconds_of_save = 1000.0, seconds_of_save
    monkeypatch.setattr("nnunet_cil.trainer.monotonic", lambda: 1000.0 + seconds_since)
    seen = []
    monkeypatch.setattr(nnUNetTrainer, "on_epoch_end", lambda self: seen.append(self.save_every))
    trainer.on_epoch_end()
    assert seen == [1 if due else sys.maxsize]
