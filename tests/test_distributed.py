"""Two gloo processes on the CPU train a step as nnU-Net's ``-num_gpus 2`` does, and agree with one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_cil.chain import Chain
from nnunet_cil.extraction import accumulate_prototypes
from nnunet_cil.imprinting import class_statistics
from nnunet_cil.prototypes import PrototypeStore
from nnunet_cil.schedule import load_schedule
from nnunet_cil.trainer import IncrementalTrainer, unwrap
from tests.test_trainer import fold_of, make_chain, module_patch, train, trainer_of  # noqa: F401  (a fixture)

CPU = torch.device("cpu")
EXTRA = "method: {new_rows: prototypes, old_prototypes: transport}"
N_RANKS = 2


def ddp_on_cpu(module: nn.Module, device_ids: list[int]) -> DistributedDataParallel:
    """nnU-Net names a GPU."""
    return DistributedDataParallel(module)


def distributed_trainer(chain: Chain, method: str) -> IncrementalTrainer:
    """A trainer of step 2 that nnU-Net puts on a GPU, as it does with every distributed one, back on the CPU."""
    trainer = trainer_of(chain, 2, method)
    assert trainer.is_ddp
    assert trainer.device.type == "cuda"
    trainer.device = CPU
    return trainer


def sums_over(trainer: IncrementalTrainer, cases: list[str]) -> list[torch.Tensor]:
    """What prototypes and imprinting take from the teacher over some cases, reduced over ranks."""
    dataset = trainer.dataloader_train.data_loader._data
    loaded = [dataset.load_case(case)[:2] for case in cases]
    teacher = trainer.teacher.network
    statistics = class_statistics(teacher, loaded, (16, 16, 16), 2, 3, CPU)
    accumulator, _, _ = accumulate_prototypes(teacher, "decoder.stages.1", 4, loaded, (16, 16, 16), 3, CPU)
    for each in (*statistics.values(), accumulator):
        each.reduce()
    return [accumulator.sums, *(part for s in statistics.values() for part in (s.counts, s.sums, s.squares))]


def rank_trains(rank: int, schedule: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=N_RANKS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nnunetv2.training.nnUNetTrainer.nnUNetTrainer.DDP", ddp_on_cpu)
        chain = Chain.open(load_schedule(schedule))
        plop = distributed_trainer(chain, "plop")
        plop.on_train_start()
        trainer = distributed_trainer(chain, "pgcd")
        found: dict[str, Any] = {"entropy": plop._cache.key["entropy"], "steps": [], "n_images": []}
        on_train_start, train_step = trainer.on_train_start, trainer.train_step

        def starting() -> None:
            on_train_start()
            assert isinstance(trainer.network, DistributedDataParallel)
            found["start"] = {name: value.clone() for name, value in unwrap(trainer.network).state_dict().items()}

        def stepping(batch: dict) -> dict:
            found["n_images"].append(len(batch["data"]))
            found["steps"].append(train_step(batch))
            return found["steps"][-1]

        trainer.on_train_start, trainer.train_step = starting, stepping
        trainer.run_training()
        if rank == 0:
            dist.barrier()
        trainer.perform_actual_validation()  # as nnU-Net has every rank do
        found["summary"] = Path(trainer.output_folder, "validation", "summary.json").is_file()
        if rank == 1:
            dist.barrier()
    found["one_case"] = sums_over(trainer, ["case_0"] if rank == 0 else [])
    found["end"] = unwrap(trainer.network).state_dict()
    found["background"] = trainer.objective.background.prototype
    found["logging"] = trainer.logger.local_logger.my_fantastic_logging
    torch.save(found, f"{folder}/rank_{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def chain(tmp_path_factory, module_patch) -> Chain:  # noqa: F811
    """Step 1 is trained by one process, step 2 of pgcd by two."""
    root = tmp_path_factory.mktemp("distributed")
    chain = make_chain(root, module_patch, ("pgcd", "plop"), extra=EXTRA, training=", amp: off, later_lr: 0.3")
    train(chain, 1)
    mp.spawn(rank_trains, (str(root / "schedule.yaml"), str(root)), nprocs=N_RANKS)
    return chain


@pytest.fixture(scope="module")
def ranks(chain) -> list[dict[str, Any]]:
    return [torch.load(chain.schedule.file.with_name(f"rank_{rank}.pt"), weights_only=False) for rank in range(N_RANKS)]


def extracted(chain: Chain, method: str) -> PrototypeStore:
    """Prototypes of step 2's finished model over all its cases, taken by one plain process."""
    folder = fold_of(chain, 2, method)
    trainer = trainer_of(chain, 2, method)
    trainer.on_train_start()
    unwrap(trainer.network).load_state_dict(
        torch.load(folder / "checkpoint_final.pth", weights_only=False)["network_weights"]
    )
    trainer.set_deep_supervision_enabled(False)
    dataset = trainer.dataloader_train.data_loader._data
    return trainer._extract(unwrap(trainer.network).eval(), dataset, 3, "", trainer.teacher.prototypes)


def check_stored(chain: Chain, method: str) -> None:
    """What a training stored is what one plain process takes from its model."""
    stored = PrototypeStore.load(fold_of(chain, 2, method) / "prototypes.npz")
    expected = extracted(chain, method)
    assert stored.class_names == expected.class_names
    assert stored.in_one_piece == expected.class_names[1:]
    np.testing.assert_array_equal(stored.counts, expected.counts)
    for name in ("means", "spread", "centre"):
        np.testing.assert_allclose(getattr(stored, name), getattr(expected, name), rtol=1e-4, atol=1e-5, err_msg=name)
    assert stored.tau == pytest.approx(expected.tau, rel=0.05), "chosen on a random sample"


def test_prototypes_are_those_of_one_process_over_all_cases_transported_ones_too(chain):
    check_stored(chain, "pgcd")


def test_ranks_share_the_batch_and_end_with_the_same_network_and_background(ranks):
    first, second = ranks
    assert first["n_images"] == second["n_images"] == [1, 1]
    for name, value in first["end"].items():
        assert torch.equal(value, second["end"][name]), name
    assert torch.equal(first["background"], second["background"])


def test_imprinted_rows_and_entropy_thresholds_are_those_of_one_process(chain, ranks):
    trainer, plop = trainer_of(chain, 2), trainer_of(chain, 2, "plop")
    for each in (trainer, plop):
        for path in Path(each.preprocessed_dataset_folder_base, "pseudo_labels").glob("entropy_*.json"):
            path.unlink()  # the ranks have kept theirs
        each.on_train_start()
    for rank in ranks:
        for name, value in unwrap(trainer.network).state_dict().items():
            torch.testing.assert_close(rank["start"][name], value, rtol=1e-4, atol=1e-5, msg=name)
        assert rank["entropy"] == plop._cache.key["entropy"]


def test_logged_terms_are_means_over_the_ranks(ranks):
    terms = [name for name in ranks[0]["steps"][0] if name.startswith("loss_")]
    assert len(terms) == 5
    for name in terms:
        values = [float(step[name]) for rank in ranks for step in rank["steps"]]
        assert len(set(values)) > 1, "the ranks had different patches"
        for rank in ranks:
            assert rank["logging"][name] == [pytest.approx(np.mean(values), rel=1e-5)]


def test_a_rank_without_a_case_waits_for_the_others(chain, ranks):
    trainer = trainer_of(chain, 2)
    trainer.on_train_start()
    for rank in ranks:
        torch.testing.assert_close(rank["one_case"], sums_over(trainer, ["case_0"]))


def test_one_rank_alone_writes_the_summary_of_a_validation_left_out(ranks):
    """Two that write it at once take the unfinished file from each other."""
    assert [rank["summary"] for rank in ranks] == [True, False]
