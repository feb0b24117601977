"""The nnUNetTrainer subclass that makes training incremental. Methods differ only in ``objective_class``."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from nnunetv2.paths import nnUNet_results
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.collate_outputs import collate_outputs
from torch import distributed as dist
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.functional import interpolate
from torch.nn.parallel import DistributedDataParallel

from nnunet_cil import nnunet_api
from nnunet_cil.block import BLOCK_KEY, StepBlock
from nnunet_cil.checkpoint import read_checkpoint
from nnunet_cil.extraction import accumulate_prototypes, random_patch, transported
from nnunet_cil.features import FeatureTap, last_decoder_stage, lower_heads
from nnunet_cil.given_model import check_no_cascade
from nnunet_cil.host_memory import keep_freed_memory
from nnunet_cil.imprinting import class_statistics, imprint
from nnunet_cil.lineage import teacher_link, write_lineage
from nnunet_cil.logging_terms import TERM_PREFIX, TermLogger
from nnunet_cil.losses.partial import fold_unlabelled, without_unsure_background
from nnunet_cil.objectives.base import Objective, Outputs
from nnunet_cil.objectives.finetune import Finetune
from nnunet_cil.parallel import thread_count
from nnunet_cil.precision import Float32Loss, amp_dtype, autocast, set_memory_format
from nnunet_cil.prototypes import PrototypeStore
from nnunet_cil.pseudo_labels import (
    ENTROPY_BINS,
    JoinedDataset,
    PseudoLabelCache,
    PseudoLabelDataset,
    Rule,
    by_confidence,
    by_entropy,
    entropy_histogram,
    in_one_piece,
    kept_cases_of,
    median_entropies,
    merge_pseudo_labels,
    only_organs,
    rule_out,
)
from nnunet_cil.ranks import CasesOfThisRank, are_several, gathered, is_there, reduced
from nnunet_cil.step_files import (
    CHECKPOINT,
    COST_FILE,
    PROTOTYPE_FILE,
    REPLAY_FILE,
    check_step_files,
    read_step_file,
    write_json,
)
from nnunet_cil.teacher import Teacher, check_teacher, fuse_weights, grow_head, load_teacher, sha256_of

SHARE_OF_SAVING = 0.02  # of a training's time, up to which a checkpoint is written after every epoch
LATEST_CHECKPOINT = "checkpoint_latest.pth"  # nnU-Net resumes from it even where checkpoint_best.pth is newer


class WarmupPolyLRScheduler(PolyLRScheduler):
    """nnU-Net's polynomial decay, scaled up linearly over the first ``warmup_epochs``."""

    def __init__(self, optimizer: torch.optim.Optimizer, initial_lr: float, max_steps: int, warmup_epochs: int) -> None:
        self.warmup_epochs = warmup_epochs
        super().__init__(optimizer, initial_lr, max_steps)

    def step(self, current_step: int | None = None) -> None:
        super().step(current_step)
        epoch = self.ctr - 1 if current_step is None or current_step == -1 else current_step
        if epoch < self.warmup_epochs:
            for group in self.optimizer.param_groups:
                group["lr"] *= (epoch + 1) / (self.warmup_epochs + 1)


def unwrap(network: nn.Module) -> nn.Module:
    """The module inside of DistributedDataParallel and torch.compile."""
    if isinstance(network, DistributedDataParallel):
        network = network.module
    return network._orig_mod if isinstance(network, OptimizedModule) else network


class IncrementalTrainer(nnUNetTrainer):
    """Trains one step of a chain: stock nnU-Net at step 1, with teacher, pseudo-labels and loss terms after it.

    What the step is stands in ``plans["cil"]`` (see ``block.StepBlock``). A subclass names its ``objective_class``.
    """

    objective_class: type[Objective] = Finetune

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):  # noqa: B008
        self.block = StepBlock.from_plans(plans, dataset_json)
        check_no_cascade(plans, configuration, f"plans {plans.get('plans_name')}")
        super().__init__(plans, configuration, fold, dataset_json, device)
        # without a cascade: nnU-Net's validation of 3d_lowres would look for data of its next stage
        self.configuration_manager.configuration.pop("next_stage", None)
        training = self.block.training
        self.amp_dtype = amp_dtype(training.amp, self.device)
        if self.device.type == "cpu":
            torch.set_num_threads(thread_count())  # nnUNetv2_train takes all cores of the machine
            keep_freed_memory()
        if self.amp_dtype != torch.float16:
            self.grad_scaler = None
        self.num_epochs = training.epochs
        self.num_iterations_per_epoch = training.iterations_per_epoch
        self.num_val_iterations_per_epoch = training.val_iterations_per_epoch
        self.initial_lr = training.initial_lr if self.block.step == 1 else training.later_lr
        self.enable_deep_supervision = training.deep_supervision
        self.teacher: Teacher | None = None
        self._teacher_link: dict | None = None
        self.objective: Objective | None = None
        self._taps: dict[str, tuple[FeatureTap, ...]] = {}
        self._cache: PseudoLabelCache | None = None
        self._unlabelled: dict[str, tuple[int, ...]] = {}  # new classes that a case's labels lack
        self._relabelled: dict[str, tuple[int, ...]] = {}  # old classes that a case's own labels hold
        self._resumed: dict | None = None
        self._is_fused = self._has_ended = False
        self._epoch_started = monotonic()
        self._last_save, self._seconds_of_save = monotonic(), 0.0
        self._seconds_training = self._seconds_preparing = 0.0
        self._validation_limit = sys.maxsize
        self.logger.local_logger = TermLogger()
        ignoring = {**dataset_json, "labels": {**dataset_json["labels"], "ignore": self.block.n_classes}}
        self._ignoring_label_manager = self.plans_manager.get_label_manager(ignoring)

    @property
    def incremental(self) -> bool:
        """Whether this is a step with a teacher."""
        return self.block.step > 1

    @property
    def online(self) -> bool:
        """Whether pseudo-labels come from the teacher's prediction of each patch."""
        return self.incremental and self.block.settings["pseudo_labels"] == "online"

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ):
        """nnU-Net's own network of the plans, or that of the trainer of the model that the chain was given."""
        owner = plans_manager.plans.get(BLOCK_KEY, {}).get("network_of")
        what = (configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision)
        if owner is None:
            network = nnUNetTrainer.build_network_architecture(plans_manager, *what)
        else:
            network = nnunet_api.network_of(owner, plans_manager, *what)
        if not enable_deep_supervision:
            for head in lower_heads(network):  # the decoder has them all the same; -num_gpus waits for their gradients
                head.requires_grad_(False)
        return network

    def initialize(self):
        self._seed()
        super().initialize()
        last_decoder_stage(unwrap(self.network))
        self._set_memory_format(self.network)
        self.print_to_log_file(f"Precision: {self.amp_dtype or 'full'}, {torch.get_num_threads()} threads")

    def _set_memory_format(self, network: nn.Module) -> None:
        n_features = unwrap(network).decoder.seg_layers[-1].in_channels
        set_memory_format(network, self.device, n_features, self.label_manager.num_segmentation_heads)

    def configure_optimizers(self):
        optimizer, scheduler = super().configure_optimizers()
        if self.incremental and self.block.training.warmup_epochs:
            warmup = self.block.training.warmup_epochs
            scheduler = WarmupPolyLRScheduler(optimizer, self.initial_lr, self.num_epochs, warmup)
        return optimizer, scheduler

    def _seed(self) -> None:
        if self.block.training.seed is not None:
            seed = self.block.training.seed + self.local_rank
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)

    @contextmanager
    def _ignoring_unsure_voxels(self) -> Iterator[None]:
        """Let nnU-Net's own code see the pseudo-labels' ignore id as declared ignore label."""
        declared = self.label_manager
        if self.incremental:
            self.label_manager = self._ignoring_label_manager
        try:
            yield
        finally:
            self.label_manager = declared

    def _build_loss(self):
        with self._ignoring_unsure_voxels():
            loss = super()._build_loss()
        return Float32Loss(loss) if self.device.type == "cpu" and self.amp_dtype is not None else loss

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):  # noqa: N802
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        if self.block.mirror_axes is not None:
            mirror_axes = self.block.mirror_axes or None
            self.inference_allowed_mirroring_axes = mirror_axes
        return rotation, dummy_2d, initial_patch_size, mirror_axes

    def get_training_transforms(self, *args, **kwargs):
        composed = nnUNetTrainer.get_training_transforms(*args, **kwargs)
        if self.block.training.seed is not None:
            for transform in composed.transforms:
                blur = getattr(transform, "transform", transform)
                if hasattr(blur, "benchmark"):
                    blur.benchmark = False  # chooses its algorithm by wall clock, so seeded runs would differ
        return composed

    def on_train_start(self):
        started = monotonic()
        if not self.was_initialized:
            self.initialize()
        elif self.incremental and self._resumed is None:
            self.print_to_log_file(
                "A later step starts from its teacher: other weights (-pretrained_weights) are not used."
            )
        check_step_files(Path(self.preprocessed_dataset_folder_base), self.configuration_manager.data_identifier)
        self._read_what_is_labelled()
        self._seed()
        if self.incremental:
            self.objective_class.check_settings(self.block.settings)
            self._load_teacher()
        super().on_train_start()
        if self._resumed is not None and not are_several():
            _set_random_state(self._resumed["random"])
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._seconds_preparing += monotonic() - started

    def _read_what_is_labelled(self) -> None:
        """From the step file, which says it where not just the new classes are labelled in all cases."""
        n_old, n_classes = self.block.n_old, self.block.n_classes
        labelled = (read_step_file(Path(self.preprocessed_dataset_folder_base)) or {}).get("labelled", {})
        for case, found in labelled.items():
            if lacking := tuple(c for c in range(n_old, n_classes) if c not in found):
                self._unlabelled[case] = lacking
            if old := tuple(c for c in found if c < n_old):
                self._relabelled[case] = old
        if labelled:
            lacking, old = len(self._unlabelled), len(self._relabelled)
            self.print_to_log_file(f"{lacking} cases lack labels of new classes, {old} have labels of old ones.")

    def _load_teacher(self) -> None:
        """Restore the teacher from the block; on a fresh start also grow the student from it."""
        block = self.block
        folder = Path(str(nnUNet_results)) / block.teacher
        self.teacher = load_teacher(folder, self.fold, block.teacher_checkpoint, self.device)
        plans = self.plans_manager.plans
        check_teacher(self.teacher, plans, self.dataset_json, self.configuration_name, block.old_classes)
        sha256 = self.teacher.sha256
        self._teacher_link = teacher_link(folder / f"fold_{self.fold}", block.teacher_checkpoint, sha256, block.chain)
        begun_with = None if self._resumed is None else self._resumed.get("teacher")
        if begun_with not in (None, sha256):
            raise ValueError(
                f"teacher: got a checkpoint of sha256 {sha256} in {folder}, expected {begun_with}, with which this "
                f"training was begun. Put that one back, or remove {self.output_folder} to start anew."
            )
        self._set_memory_format(self.teacher.network)
        student = unwrap(self.network)
        if self._resumed is None:
            student.load_state_dict(grow_head(self.teacher.weights, student.state_dict(), block.n_old))
        paths = self.objective_class.feature_paths(student)
        for name, network in (("student", student), ("teacher", self.teacher.network)):
            self._taps[name] = tuple(FeatureTap(network, path) for path in paths)
        self.print_to_log_file(
            f"Step {block.step} ({self.objective_class.__name__}): teacher {block.teacher}, fold {self.fold}, "
            f"sha256 {self.teacher.sha256[:16]}; old classes {list(block.old_classes)}, new {list(block.new_classes)}"
        )

    def get_tr_and_val_datasets(self):
        training, validation = super().get_tr_and_val_datasets()
        self._check_new_classes(training)
        if not self.incremental:
            return training, validation
        needs_labels = self.objective_class.uses_pseudo_labels or self.objective_class.uses_prototypes
        labelled_by_teacher = sorted({*(training.identifiers if needs_labels else ()), *validation.identifiers})
        if self.block.settings["pseudo_labels"] == "off" or (self.online and not self.objective_class.uses_prototypes):
            self._build_objective(training)
        else:  # online, prototypes still take their old organs from it
            self._cache = self._make_pseudo_labels(labelled_by_teacher, training=training.identifiers)
            labelled = (
                PseudoLabelDataset(training, self._cache) if self.objective_class.uses_pseudo_labels else training
            )
            self._build_objective(labelled)
            if not self.online:
                training, validation = labelled, PseudoLabelDataset(validation, self._cache)
        if self.objective_class.replays:
            training = JoinedDataset({"": training, **self._kept_cases()})
        return training, validation

    def _kept_cases(self) -> dict[str, PseudoLabelDataset]:
        """Cases of earlier steps by step, for a method that replays; what is kept is written to ``replay.json``."""
        kept, listing, n_bytes = {}, {}, 0
        root, plans = Path(self.preprocessed_dataset_folder_base).parent, self.plans_manager.plans
        for step in range(self.block.step - 1, 0, -1):
            model = Path(plans[BLOCK_KEY]["teacher"])
            plans = json.loads((Path(str(nnUNet_results)) / model / "plans.json").read_text(encoding="utf-8"))
            folder = root / model.parts[0] / self.configuration_manager.data_identifier
            cases = nnunet_api.fold_cases(folder, self.fold)
            chosen = np.random.default_rng([self.block.training.seed or 0, step]).permutation(len(cases))
            cases = sorted(cases[i] for i in chosen[: self.block.settings["replay_cases"]])
            dataset = nnunet_api.preprocessed_dataset(folder, cases)
            n_then = 1 + sum(map(len, self.block.classes[:step]))
            own = tuple(range(n_then - len(self.block.classes[step - 1]), n_then))
            labelled = (read_step_file(root / model.parts[0]) or {}).get("labelled", {})
            # what its own labels know of is no matter of opinion
            ruled_out = {case: tuple(labelled.get(case, own)) for case in cases}
            what = {"of": kept_cases_of(step), "ignored_from": n_then}
            cache = self._make_pseudo_labels(cases, dataset, what, ruled_out)
            kept[f"step{step}"] = PseudoLabelDataset(dataset, cache)
            listing[f"step{step}"] = cases
            n_bytes += sum(path.stat().st_size for case in cases for path in nnunet_api.case_files(folder, case))
        self.print_to_log_file(f"Keeps scans of earlier steps, which is not privacy-safe: {listing}, {n_bytes} bytes")
        if self.local_rank == 0:
            write_json(Path(self.output_folder, REPLAY_FILE), {"bytes": n_bytes, "cases": listing})
        return kept

    def _check_new_classes(self, training) -> None:
        missing = dict.fromkeys(range(self.block.n_old, self.block.n_classes))
        for case in training.identifiers:
            locations = training.load_case(case)[3]["class_locations"]
            for label in [label for label in missing if len(locations.get(label, ()))]:
                del missing[label]
            if not missing:
                return
        names = [self.block.new_classes[label - self.block.n_old] for label in missing]
        raise ValueError(
            f"{self.plans_manager.dataset_name}, fold {self.fold}: got no voxel of {names} in any of the "
            f"{len(training.identifiers)} training cases, expected at least one. Check the labels or the class map."
        )

    def _make_pseudo_labels(
        self,
        cases: list[str],
        kept: Any = None,
        what: Mapping[str, Any] | None = None,
        ruled_out: Mapping[str, Sequence[int]] | None = None,
        training: Sequence[str] = (),
    ) -> PseudoLabelCache:
        """Pseudo-labels of the step's own cases, or of cases that are kept of an earlier one.

        Args:
            cases: to make.
            kept: dataset of kept cases.
            what: what the cache's key says of these.
            ruled_out: classes that a kept case's own labels hold.
            training: the training cases among them.
        """
        settings, block = self.block.settings, self.block
        mirror_axes = self.teacher.mirror_axes if settings["pseudo_label_mirroring"] else None
        dataset = nnunet_api.preprocessed_dataset(Path(self.preprocessed_dataset_folder)) if kept is None else kept
        window = nnunet_api.SlidingWindow(
            self.teacher.network,
            self.teacher.plans,
            self.configuration_name,
            self.teacher.dataset_json,
            self.device,
            mirror_axes,
        )
        mine = CasesOfThisRank(cases)
        believed = {"tau_old": settings["tau_old"], "tau_background": settings["tau_background"]}
        accepts = self._believed()
        if kept is not None:
            believed, accepts = believed | dict(what or {}), only_organs(accepts)
        elif self.objective_class.pseudo_label_rule == "entropy":
            thresholds = self._entropy_thresholds(dataset, training, window)
            believed, accepts = {"entropy": thresholds.tolist()}, by_entropy(thresholds)
        pieces = block.in_one_piece(() if self.teacher.prototypes is None else self.teacher.prototypes.in_one_piece)
        key = {
            "teacher": self.teacher.sha256,
            "configuration": self.configuration_name,
            "data": self.configuration_manager.data_identifier,
            "n_classes": block.n_classes,
            **believed,
            "mirror_axes": mirror_axes,
            **({"one_piece": pieces} if pieces else {}),
        }
        cache = PseudoLabelCache(Path(self.preprocessed_dataset_folder_base) / "pseudo_labels", key)
        with self._autocast():
            made = cache.fill(
                dataset,
                mine,
                window.logits,
                accepts,
                self.configuration_manager.patch_size,
                self.label_manager.has_ignore_label,
                self.print_to_log_file,
                self._relabelled if kept is None else ruled_out,
                self.device,
            )
        if self.is_ddp:
            dist.barrier()
        said = f", one component of {', '.join(block.old_classes[c - 1] for c in pieces)}" if pieces else ""
        self.print_to_log_file(f"pseudo-labels: {made} cases made, {len(cases)} in use, in {cache.folder.name}{said}")
        return cache

    def _entropy_thresholds(self, dataset, training: Sequence[str], window: nnunet_api.SlidingWindow) -> torch.Tensor:
        """PLOP's median entropies by class, over the step's training cases on all ranks.

        They are kept, as a training that is resumed has to go on with the same ones to the last bit.
        """
        cases = sorted(training)
        mirrored = "" if window.mirror_axes is None else f" mirrored {window.mirror_axes}"
        digest = hashlib.sha256(f"{self.teacher.sha256} {self.configuration_name} {cases}{mirrored}".encode())
        for case in cases:
            digest.update(np.ascontiguousarray(np.asarray(dataset.load_case(case)[1][:])).tobytes())
            digest.update(repr(self._relabelled.get(case, ())).encode())
        path = Path(self.preprocessed_dataset_folder_base, "pseudo_labels", f"entropy_{digest.hexdigest()[:16]}.json")

        def kept() -> torch.Tensor:
            return torch.tensor(json.loads(path.read_text(encoding="utf-8"))["thresholds"])

        if is_there(path):
            return kept()
        histogram = torch.zeros(self.block.n_old, ENTROPY_BINS, dtype=torch.int64)
        with self._autocast():
            for case in CasesOfThisRank(cases):
                image, seg, _, _ = dataset.load_case(case)
                labels = torch.from_numpy(np.asarray(seg[:]).astype(np.int64))[None]
                logits = rule_out(window.logits(image)[None], [self._relabelled.get(case, ())])
                histogram += entropy_histogram(labels, logits)
        thresholds = median_entropies(torch.stack(gathered(histogram)).sum(0))
        if self.local_rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):  # another job's may be there now, and differ in the last digits
                if path.is_file():
                    thresholds = kept()
                else:
                    write_json(path, {"thresholds": thresholds.tolist()})
        thresholds = gathered(thresholds)[0]
        self.print_to_log_file(f"Entropy thresholds by class: {[round(t, 4) for t in thresholds.tolist()]}")
        return thresholds

    def _build_objective(self, training) -> None:
        block = self.block
        prototypes = self.teacher.prototypes
        are_missing = prototypes is None or (prototypes.of_bare_labels and self._cache is not None)
        if self.objective_class.uses_prototypes and are_missing:
            self.print_to_log_file(
                "The teacher has no prototypes.npz, or one of a method that does not tell old organs from background: "
                "taking its confident predictions on this step."
            )
            prototypes = self._extract(self.teacher.network, training, block.n_old, self.teacher.sha256, None)
        self.objective = self.objective_class(block.n_old, block.n_classes, block.settings, prototypes).to(self.device)
        if self._cache is not None and self.objective.uses_pseudo_labels:
            self.objective.set_label_counts(torch.from_numpy(self._cache.counts(training.identifiers)))
        if self._resumed is not None:
            self.objective.load_state_dict(self._resumed["objective"])
        elif self.objective.imprints:
            self._imprint(training)
        self.objective.start(self.teacher.network, self._anchor(), self._patches(training))
        if not self.objective.uses_teacher:
            self._remove_taps()

    def _imprint(self, training) -> None:
        """Let the new rows of the head begin with what tells the new classes from background (``imprinting``).

        Cases that lack a label take no part: their background would be counted with the class in it.
        """
        whole = [case for case in sorted(training.identifiers) if case not in self._unlabelled]
        cases = CasesOfThisRank(whole)
        with self._autocast():
            statistics = class_statistics(
                self.teacher.network,
                (training.load_case(case)[:2] for case in cases),
                self.configuration_manager.patch_size,
                self.block.n_old,
                self.block.n_classes,
                self.device,
            )
        for each in statistics.values():
            each.reduce()
        unwrap(self.network).load_state_dict(imprint(self._anchor(), self.teacher.weights, statistics))
        if any((each.counts > 0).all() for each in statistics.values()):
            self.print_to_log_file("New rows of the head start from the prototypes of their classes.")
        else:
            self.print_to_log_file(
                "New rows of the head start from the background's: no cases that lack no label show all new classes."
            )

    def _anchor(self) -> dict[str, torch.Tensor]:
        """The student's state dict before its first iteration."""
        return grow_head(self.teacher.weights, unwrap(self.network).state_dict(), self.block.n_old)

    def _patches(self, dataset) -> Iterator[torch.Tensor]:
        """Without end, one patch (1, C, *patch) of one training case after the other, without augmentation."""
        patch_size = self.configuration_manager.patch_size
        random_places = np.random.default_rng(self.block.training.seed or 0)  # the same when a training goes on
        while True:
            for case in sorted(dataset.identifiers):
                yield random_patch(dataset.load_case(case)[0], patch_size, random_places).to(self.device)

    def _remove_taps(self) -> None:
        for taps in self._taps.values():
            for tap in taps:
                tap.remove()

    def _outputs(self, name: str, logits: torch.Tensor) -> Outputs:
        return Outputs(logits, tuple(tap.features for tap in self._taps[name]))

    def _autocast(self):
        return autocast(self.device, self.amp_dtype)

    @torch.no_grad()
    def _teacher_logits(self, data: torch.Tensor) -> torch.Tensor:
        return self.teacher.network(data)

    def _believed(self) -> Rule:
        return by_confidence(self.block.settings["tau_old"], self.block.settings["tau_background"])

    @staticmethod
    def _in_batch(by_case: dict[str, tuple[int, ...]], batch: dict) -> list[tuple[int, ...]]:
        """What each sample of a batch has in ``by_case``; empty if no case has anything."""
        return [by_case.get(str(case), ()) for case in batch["keys"]] if by_case else []

    def _with_online_labels(self, target, teacher_logits: torch.Tensor, relabelled: Sequence[Sequence[int]] = ()):
        """y^ from the patch's own teacher prediction, at every resolution of the target."""
        full = _full(target)
        teacher_logits = rule_out(teacher_logits, relabelled)
        merged = merge_pseudo_labels(full, teacher_logits, self._believed(), ignore_id=self.block.n_classes)
        if not isinstance(target, list):
            return merged
        as_float = merged.float()
        lower = [interpolate(as_float, size=t.shape[2:], mode="nearest-exact").to(full.dtype) for t in target[1:]]
        return [merged, *lower]

    def _segmentation_loss(self, output, target, unlabelled: Sequence[Sequence[int]] = ()) -> torch.Tensor:
        """nnU-Net's loss at all resolutions, of what the objective makes of outputs and labels.

        Args:
            unlabelled: new classes that the labels lack, by sample; empty if they lack none.
        """
        output = _folded(output, unlabelled)
        if self.objective is None:
            return self.loss(output, target)
        weight = self.objective.segmentation_weight(_full(target)[:, 0])
        if isinstance(target, list):
            pairs = [self.objective.segmentation(o, t) for o, t in zip(output, target, strict=True)]
            loss = self.loss([o for o, _ in pairs], [t for _, t in pairs])
        else:
            loss = self.loss(*self.objective.segmentation(output, target))
        return loss if weight is None else weight * loss

    def _on_device(self, batch: dict) -> tuple[torch.Tensor, Any]:
        """Images and labels of a batch, the latter a list with deep supervision."""
        data, target = batch["data"].to(self.device, non_blocking=True), batch["target"]
        if isinstance(target, list):
            return data, [t.to(self.device, non_blocking=True) for t in target]
        return data, target.to(self.device, non_blocking=True)

    def train_step(self, batch: dict) -> dict:
        """nnU-Net's step, with the teacher's pass and the objective's terms where there is a teacher."""
        data, target = self._on_device(batch)
        self.optimizer.zero_grad(set_to_none=True)
        distils = self.incremental and self.objective.uses_teacher
        unlabelled = self._in_batch(self._unlabelled, batch)
        with self._autocast():
            teacher_logits = self._teacher_logits(data) if distils or self.online else None
            if self.online and self.objective.uses_pseudo_labels:
                target = self._with_online_labels(target, teacher_logits, self._in_batch(self._relabelled, batch))
            output = self.network(data)
            terms = {"segmentation": self._segmentation_loss(output, target, unlabelled)}
        if distils:
            labels = _full(target)[:, 0].long()
            terms |= self.objective(
                self._outputs("student", _full(output)),
                self._outputs("teacher", teacher_logits),
                without_unsure_background(labels, unlabelled, self.block.n_classes),
            )
        if self.incremental:
            terms |= self.objective.parameter_terms(unwrap(self.network))
        total = torch.stack([term.float() for term in terms.values()]).sum()
        if self.grad_scaler is not None:
            self.grad_scaler.scale(total).backward()
            self.grad_scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), 12)
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            total.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), 12)
            self.optimizer.step()
        values = torch.stack([total, *terms.values()]).detach().float().cpu().numpy()
        if not self.incremental:
            return {"loss": values[0]}
        return {"loss": values[0], **{TERM_PREFIX + n: v for n, v in zip(terms, values[1:], strict=True)}}

    def on_train_epoch_end(self, train_outputs: list[dict]):
        super().on_train_epoch_end(train_outputs)
        outputs = collate_outputs(train_outputs)
        self._check_finite(outputs)
        for name in sorted(key for key in outputs if key.startswith(TERM_PREFIX)):
            mean = float(np.mean(np.concatenate([np.ravel(values) for values in gathered(outputs[name])])))
            self.logger.log(name, mean, self.current_epoch)
            self.print_to_log_file(f"{name} {mean:.5f}")

    def _check_finite(self, outputs: dict) -> None:
        """Stop at a loss of NaN, but where the scaler of float16 left such an iteration out and others were well."""
        finite = np.isfinite(np.ravel(outputs["loss"]))
        if finite.all() or (self.grad_scaler is not None and finite.any()):
            return
        first = int(np.argmin(finite))
        terms = {name: float(np.ravel(values)[first]) for name, values in outputs.items()}
        self._refuse_to_go_on(f"epoch {self.current_epoch}, iteration {first}: got a loss that is not finite ({terms})")

    def _refuse_to_go_on(self, what: str) -> None:
        raise RuntimeError(
            f"{what}, expected numbers. The training stops here and its last checkpoint is as it was. The same command "
            "goes on from there. If it ends in the same way, set a lower `initial_lr` or `later_lr`, or `amp: off`, in "
            f"a schedule of another name. What is there of this one: {self.output_folder}"
        )

    def validation_step(self, batch: dict) -> dict:
        if self.online:
            data, target = self._on_device(batch)
            with self._autocast():
                logits = self._teacher_logits(data)
            target = self._with_online_labels(target, logits, self._in_batch(self._relabelled, batch))
            batch = {**batch, "data": data, "target": target}
        unlabelled = self._in_batch(self._unlabelled, batch)
        with self._ignoring_unsure_voxels(), self._autocast(), self._folding(unlabelled):
            return super().validation_step(batch)

    @contextmanager
    def _folding(self, unlabelled: Sequence[Sequence[int]]) -> Iterator[None]:
        """Let nnU-Net's validation see no prediction of a class in samples whose labels lack it."""
        network = self.network
        if any(unlabelled):
            self.network = lambda data: _folded(network(data), unlabelled)
        try:
            yield
        finally:
            self.network = network

    def on_epoch_start(self):
        super().on_epoch_start()
        self._epoch_started = monotonic()

    def on_epoch_end(self):
        affordable = self._seconds_of_save / SHARE_OF_SAVING
        due = monotonic() - self._last_save >= min(60 * self.block.training.checkpoint_minutes, affordable)
        self.save_every = 1 if due else sys.maxsize
        self._seconds_training += monotonic() - self._epoch_started
        super().on_epoch_end()

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint plus the objective's and the random generators' state; whole or not at all.

        Raises:
            RuntimeError: the network has weights that are not finite.
            OSError: the checkpoint could not be written; one that is there is kept.
        """
        if self._has_ended:  # its digest stands in lineages; what is missing is nnU-Net's validation
            return None
        if self.local_rank != 0 or self.disable_checkpointing:
            return super().save_checkpoint(filename)
        for name, weight in unwrap(self.network).state_dict().items():
            if not torch.isfinite(weight).all():
                self._refuse_to_go_on(f"epoch {self.current_epoch}: got weights that are not finite ({name})")
        partial, started = f"{filename}.part", monotonic()
        try:
            super().save_checkpoint(partial)
            checkpoint = read_checkpoint(Path(partial))
            checkpoint["cil"] = {
                "objective": {} if self.objective is None else self.objective.state_dict(),
                "random": _random_state(),
                "seconds_training": self._seconds_training,
                "seconds_preparing": self._seconds_preparing,
                "teacher": None if self.teacher is None else self.teacher.sha256,
            }
            torch.save(checkpoint, partial)
        except (OSError, RuntimeError, ValueError) as error:
            Path(partial).unlink(missing_ok=True)
            raise OSError(
                f"{filename}: got no whole file ({type(error).__name__}: {error}), expected a checkpoint. Is the disk "
                "full or read-only? The last checkpoint is as it was: make room, and give the same command again."
            ) from error
        os.replace(partial, filename)
        if Path(filename).name == LATEST_CHECKPOINT:
            self._last_save = monotonic()
            self._seconds_of_save = self._last_save - started
        return None

    def load_checkpoint(self, filename: str) -> None:
        resumed = read_checkpoint(Path(filename), mapped=True).get("cil")  # before nnU-Net unpickles the file
        if resumed is None:
            raise ValueError(
                f"{filename}: got a checkpoint that {type(self).__name__} did not write, expected one of its own to go "
                "on from. Remove it and start anew."
            )
        super().load_checkpoint(filename)  # nnU-Net's takes a dict by its signature, but fails on one
        self._resumed = resumed
        self._is_fused = Path(filename).name == CHECKPOINT
        self._has_ended = (
            self._is_fused
            and self.current_epoch >= self.num_epochs
            and Path(self.output_folder, PROTOTYPE_FILE).is_file()
        )
        self._seconds_training = resumed["seconds_training"]
        self._seconds_preparing = resumed.get("seconds_preparing", 0.0)  # not in those of earlier versions

    def do_split(self):
        training, validation = super().do_split()
        return training, validation[: self._validation_limit]

    def perform_actual_validation(self, save_probabilities: bool = False):
        limit = self.block.training.validation_cases
        if limit is None:
            limit = 0 if self.fold == "all" else sys.maxsize
        if limit == 0:
            if self.local_rank == 0:
                folder = Path(self.output_folder, "validation")
                folder.mkdir(exist_ok=True)
                nothing = {"foreground_mean": {"Dice": float("nan")}, "mean": {}, "metric_per_case": []}
                write_json(folder / "summary.json", nothing)
            why = "`fold: all` has no cases of its own" if self.block.training.validation_cases is None else "0 cases"
            self.print_to_log_file(f"Validation skipped: {why}, see `validation_cases` of a schedule.")
            return
        self._validation_limit = limit
        try:
            super().perform_actual_validation(save_probabilities)
        finally:
            self._validation_limit = sys.maxsize
        if self.incremental:
            self.print_to_log_file(
                f"This validation knows labels of {', '.join(self.block.new_classes)} alone: an old organ that is "
                "found counts as Dice 0, in its mean as well. The test set is what scores old organs. Their 0 misleads "
                "nnUNetv2_find_best_configuration: do not take its postprocessing, which may remove old organs."
            )

    def on_train_end(self):
        if self.incremental and not self._is_fused and (share := self.objective.fusion_share()):
            fuse_weights(unwrap(self.network), self.teacher.weights, share)
            self.print_to_log_file(f"Weights fused: {share:.3f} of the teacher's, {1 - share:.3f} of this step's.")
        if self.local_rank == 0 and not (self._has_ended or self.disable_checkpointing):
            Path(self.output_folder, PROTOTYPE_FILE).unlink(missing_ok=True)  # of the checkpoint that is replaced now
        super().on_train_end()
        self._remove_taps()
        if self._has_ended:
            return
        if self.local_rank == 0:
            for left in Path(self.output_folder).glob("checkpoint_*.part"):  # by a training that was killed
                left.unlink()
            self.logger.local_logger.draw(self.output_folder)
        started = monotonic()
        store, sha256 = self._final_prototypes()
        if self.local_rank == 0:
            self._write_cost(monotonic() - started)
            if not self.disable_checkpointing:
                self._store(store, sha256)

    def _write_cost(self, seconds_prototypes: float) -> None:
        iterations = max(1, self.num_epochs * self.num_iterations_per_epoch)
        scale = 1 if sys.platform == "darwin" else 1024
        cost = {
            "seconds_preparing": self._seconds_preparing,
            "seconds_prototypes": seconds_prototypes,
            "seconds_training": self._seconds_training,
            "seconds_per_iteration": self._seconds_training / iterations,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale,
            "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None,
        }
        write_json(Path(self.output_folder, COST_FILE), cost)
        self.print_to_log_file(f"Cost of this step: {cost}")

    def _final_prototypes(self) -> tuple[PrototypeStore, str]:
        """Global prototypes of the final model over the training cases, and its checkpoint's digest."""
        training, _ = nnUNetTrainer.get_tr_and_val_datasets(self)
        previous = None if self.teacher is None else self.teacher.prototypes
        pieces = self._in_one_piece(training, () if previous is None else previous.in_one_piece)
        with_old_organs = self._cache is not None and self.objective_class.uses_pseudo_labels
        if with_old_organs:
            training = PseudoLabelDataset(training, self._cache)
        self.set_deep_supervision_enabled(False)
        network = unwrap(self.network).eval()
        sha256 = ""
        if self.local_rank == 0 and not self.disable_checkpointing:
            sha256 = sha256_of(Path(self.output_folder, CHECKPOINT))
        store = self._extract(network, training, self.block.n_classes, sha256, previous)
        return replace(store, in_one_piece=pieces, of_bare_labels=self.incremental and not with_old_organs), sha256

    def _in_one_piece(self, dataset, old: Sequence[str]) -> tuple[str, ...]:
        """Those of the old classes, and the new ones that are in one piece in each case whose own labels hold them."""
        cases = CasesOfThisRank(sorted(dataset.identifiers))
        new = dict(enumerate(self.block.new_classes, self.block.n_old))
        seen = torch.zeros(2, self.block.n_classes, dtype=torch.int64)
        for case in cases:
            for c, whole in in_one_piece(np.asarray(dataset.load_case(case)[1][:])[0], new).items():
                seen[int(whole), c] += 1
        seen = reduced(seen)
        return (*old, *(name for c, name in new.items() if seen[1, c] > 0 and seen[0, c] == 0))

    def _store(self, store: PrototypeStore, sha256: str) -> None:
        """Prototypes and lineage, beside the checkpoint."""
        folder, labels = Path(self.output_folder), Path(self.preprocessed_dataset_folder_base, "gt_segmentations")
        unnamed = folder / f".{PROTOTYPE_FILE}"  # gets its name last: with it, a training counts as ended
        store.save(unnamed)
        known = {CHECKPOINT: sha256, PROTOTYPE_FILE: sha256_of(unnamed)}
        write_lineage(folder, type(self).__name__, labels, self._teacher_link, known)
        os.replace(unnamed, folder / PROTOTYPE_FILE)
        self.print_to_log_file(f"Prototypes of {list(store.class_names)} stored, tau {store.tau:.4f}")

    def _extract(
        self, network: nn.Module, dataset, n_classes: int, sha256: str, previous: PrototypeStore | None
    ) -> PrototypeStore:
        names = ("background", *self.block.old_classes, *self.block.new_classes)[:n_classes]
        cases = CasesOfThisRank(sorted(dataset.identifiers))
        transporting = previous is not None and self.block.settings["old_prototypes"] == "transport"
        path = last_decoder_stage(network)
        with self._autocast():
            accumulator, shift, counts = accumulate_prototypes(
                network,
                path,
                network.decoder.seg_layers[-1].in_channels,
                (self._image_and_sure_labels(dataset, case) for case in cases),
                self.configuration_manager.patch_size,
                n_classes,
                self.device,
                earlier=self.teacher.network if transporting else None,
            )
        accumulator.reduce()
        store = accumulator.finish(names, self.block.step, sha256, path, previous)
        if transporting:
            store = transported(store, previous, reduced(shift), reduced(counts), accumulator)
        return store

    def _image_and_sure_labels(self, dataset, case: str) -> tuple[Any, Any]:
        """Image and y^ of a case; background that may be an unlabelled class is ignored unless all cases lack one."""
        image, labels = dataset.load_case(case)[:2]
        if case in self._unlabelled and not self._unlabelled.keys() >= set(dataset.identifiers):
            labels = np.asarray(labels[:])
            labels = np.where(labels == 0, self.block.n_classes, labels)
        return image, labels


def _full(by_resolution):
    """Logits or labels at full resolution, of the list that deep supervision gives."""
    return by_resolution[0] if isinstance(by_resolution, (list, tuple)) else by_resolution


def _folded(output, unlabelled: Sequence[Sequence[int]]):
    """Logits, or the list of them that deep supervision gives, with unlabelled classes folded into background."""
    if isinstance(output, (list, tuple)):
        return [fold_unlabelled(logits, unlabelled) for logits in output]
    return fold_unlabelled(output, unlabelled)


def _random_state() -> dict:
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}


def _set_random_state(state: dict) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())
