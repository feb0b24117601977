"""A training is a process of its own: what becomes of it, and of its workers, when something is killed."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nnunet_cil import driver
from nnunet_cil.block import StepBlock
from nnunet_cil.chain import Chain
from nnunet_cil.evaluate import ENSEMBLE
from nnunet_cil.objectives.pgcd import PGCD
from nnunet_cil.objectives.replay import Replay
from nnunet_cil.schedule import ABLATIONS, Training, load_schedule
from tests.conftest import write_schedule, write_tiny_dataset

PATIENCE_SECONDS = 30


@pytest.fixture
def train(nnunet_folders, tmp_path, monkeypatch):
    """``train(script)`` lets the driver train step 1 with a shell script in place of nnU-Net."""
    source = write_tiny_dataset(tmp_path / "source", n_cases=2)
    chain = Chain.open(load_schedule(write_schedule(tmp_path / "s.yaml", source)))
    chain.content["plans_name"] = "nnUNetPlans"
    monkeypatch.chdir(tmp_path)
    block = StepBlock("c", 1, (("ball", "blob"),), training=Training(epochs=2))
    monkeypatch.setattr(driver, "block_of", lambda *_: block)

    def run(script: str) -> None:
        monkeypatch.setattr("nnunet_cil.nnunet_api.train_process_command", lambda *_: ["bash", "-c", script])
        driver._train(chain, chain.variant("pgcd", 0), 1, "all", "[1/1] step 1")

    return run


def wait_until(done, what: str) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not done():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def pid_in(path: Path) -> int:
    wait_until(lambda: path.is_file() and path.read_text().strip(), f"{path.name} was not written")
    return int(path.read_text())


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] == "Z"
    except FileNotFoundError:
        return True


linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@linux
@pytest.mark.faults("killed worker process", "one error, no waiting; the same command goes on", "cases in work")
def test_a_training_that_is_killed_ends_the_run_although_its_worker_lives_on(train):
    with pytest.raises(RuntimeError, match=r"step 1: the training ended with code -9.\nthe last line\n"):
        train("sleep 600 & echo $! > worker; echo the last line; kill -9 $$")
    worker = pid_in(Path("worker"))
    wait_until(lambda: is_gone(worker), "the worker lives on")


def test_the_reason_of_a_failure_is_this_trainings_and_not_that_of_an_earlier_one(train):
    with pytest.raises(RuntimeError, match=r"ended with code 1\.\nValueError: mended since"):
        train("echo begins; echo ValueError: mended since; exit 1")
    with pytest.raises(RuntimeError, match=r"ended with code -9\.\nbegins again\nAll of it") as caught:
        train("echo begins again; kill -9 $$")
    assert "mended since" not in str(caught.value)


@linux
def test_an_interrupt_ends_training_and_workers(train):
    def interrupt() -> None:
        """Once the driver reads what the training says."""
        wait_until(lambda: any("begins" in log.read_text() for log in Path().rglob("logs/*.log")), "nothing was said")
        os.kill(os.getpid(), signal.SIGINT)

    threading.Timer(0, interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        train("echo $$ > training; sleep 600 & echo $! > worker; echo it begins; wait")
    for name in ("training", "worker"):
        pid = pid_in(Path(name))
        wait_until(lambda pid=pid: is_gone(pid), f"the {name} lives on")


@linux
@pytest.mark.faults("kill -9", "the same command goes on, and ends as if nothing had been", "unfinished epoch")
def test_a_training_does_not_outlive_the_run_that_started_it(train):
    run = os.fork()
    if run == 0:
        try:
            train("echo $$ > training; exec sleep 600")
        finally:
            os._exit(1)
    training = pid_in(Path("training"))
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    wait_until(lambda: is_gone(training), "the training lives on: two of one model would run at once")


def test_nnunet_gets_no_more_workers_than_there_are_cores(train, monkeypatch):
    monkeypatch.delenv("nnUNet_def_n_proc")
    monkeypatch.setattr("nnunet_cil.parallel.core_count", lambda: 3)
    train("echo $nnUNet_def_n_proc > workers")
    assert Path("workers").read_text() == "3\n"
    monkeypatch.setenv("nnUNet_def_n_proc", "5")
    train("echo $nnUNet_def_n_proc > workers")
    assert Path("workers").read_text() == "5\n", "what the user says counts"


@pytest.mark.parametrize(
    ("device", "cores", "asked", "expected"),
    [
        ("cpu", 2, None, "0"),
        ("cpu", driver.FEW_CORES, None, "0"),
        ("cpu", driver.FEW_CORES + 1, None, None),
        ("cpu", 2, "6", "6"),
        ("cuda", 2, None, None),
    ],
)
@pytest.mark.parametrize("n_proc", ["3", "8", None])
def test_on_few_cores_the_training_process_augments(monkeypatch, device, cores, asked, expected, n_proc):
    """nnUNet_def_n_proc is about other work: many set it to 8 once and for all."""
    monkeypatch.setattr(driver, "core_count", lambda: cores)
    for name, value in ((driver.WORKERS_VARIABLE, asked), ("nnUNet_def_n_proc", n_proc)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert driver._augmentation_workers(SimpleNamespace(device=device)) == expected


def test_only_pgcd_and_trainers_made_of_it_are_ablated(tmp_path):
    schedule = load_schedule(write_schedule(tmp_path / "s.yaml", write_tiny_dataset(tmp_path / "source", n_cases=2)))
    assert driver.ablated_methods(schedule)[:2] == ["pgcd", "pgcd-no_spatial"]
    own = replace(schedule, trainer="nnUNetTrainerMine")
    assert driver.ablated_methods(own)[:2] == ["mine", "mine-no_spatial"]
    with pytest.raises(ValueError, match="got nnUNetTrainerFinetune, expected nnUNetTrainerPGCD or one made of it"):
        driver.ablated_methods(replace(schedule, trainer="nnUNetTrainerFinetune"))


@pytest.mark.parametrize(
    ("method", "left_out"),
    [
        ({}, set()),
        ({"eta": 0, "new_rows": "background"}, {"no_channel", "background_rows"}),
        ({"lambda_dapd": 0}, {"no_dapd_global", "no_dapd_local", "no_dapd", "rows_only"}),
        ({"lambda_pgcd": 0}, {"no_spatial", "no_channel", "no_pgcd", "uniform_weights", "rows_only"}),
    ],
)
def test_ablations_that_change_nothing_are_not_trained(tmp_path, caplog, method, left_out):
    """``rows_only`` of a method without DAPD is ``no_pgcd``, which is kept."""
    source = write_tiny_dataset(tmp_path / "source", n_cases=2)
    schedule = load_schedule(write_schedule(tmp_path / "s.yaml", source, extra=f"method: {json.dumps(method)}"))
    with caplog.at_level("INFO", "nnunet_cil"):
        methods = driver.ablated_methods(schedule)
    assert methods == ["pgcd", *(f"pgcd-{name}" for name in ABLATIONS if name not in left_out)]
    assert ("Left out" in caplog.text) == bool(left_out)


def test_methods_whose_settings_do_not_go_together_are_refused_before_anything_is_planned(nnunet_folders, tmp_path):
    source = write_tiny_dataset(tmp_path / "source", n_cases=2)
    extra = (
        "method: {pseudo_labels: online, one_piece: false}\n"
        "variants: {plop_too: {trainer: nnUNetTrainerPLOP, tau_old: 0.6}}"
    )
    schedule = load_schedule(write_schedule(tmp_path / "s.yaml", source, extra=extra))
    with pytest.raises(ValueError, match="plop: PLOP: got pseudo_labels 'online'") as error:
        driver.prepare(schedule, ["pseudo", "plop", "plop_too"], [0])
    assert "\nplop_too: PLOP: got pseudo_labels 'online'" in str(error.value)
    assert not list(nnunet_folders["nnUNet_preprocessed"].iterdir())


def test_a_trainer_of_ones_own_that_keeps_scans_says_so_in_its_name(nnunet_folders, tmp_path, monkeypatch):
    source = write_tiny_dataset(tmp_path / "source", n_cases=2)
    extra = "variants: {mine: {trainer: nnUNetTrainerMine}, replay_mine: {trainer: nnUNetTrainerMine}}"
    chain = Chain.open(load_schedule(write_schedule(tmp_path / "s.yaml", source, extra=extra)))
    monkeypatch.setattr(driver.nnunet_api, "objective_of", lambda _: Replay)
    driver._check_settings(chain, [chain.variant("replay_mine", 0)])
    with pytest.raises(ValueError, match="mine: got nnUNetTrainerMine, which keeps scans of earlier steps, expected a"):
        driver._check_settings(chain, [chain.variant("mine", 0)])


def test_all_ablations_of_a_balanced_method_can_be_trained(nnunet_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(driver.nnunet_api, "objective_of", lambda _: PGCD)
    source = write_tiny_dataset(tmp_path / "source", n_cases=2)
    schedule = load_schedule(write_schedule(tmp_path / "s.yaml", source, extra="method: {class_balance: true}"))
    chain = Chain.open(schedule)
    driver._check_settings(chain, [chain.variant(method, 0) for method in driver.ablated_methods(schedule)])


def test_progress_names_the_classes_of_its_dice(caplog, monkeypatch):
    monkeypatch.setattr(driver, "monotonic", iter(range(0, 1000, 20)).__next__)
    progress = driver._Progress("step 1", 3, ("liver", "spleen"))
    lines = ["Epoch 0 ", "Pseudo dice [np.float32(0.5), nan] ", "Epoch 1 ", "Pseudo dice [nan, nan] ", "Epoch 2 "]
    with caplog.at_level("INFO", "nnunet_cil"):
        for line in lines:
            progress.see(f"2026-11-29 04:00:00.000000: {line}\n")
    first, second, third = (record.getMessage().strip() for record in caplog.records)
    assert first == "step 1: epoch 1 of 3"
    assert second == "step 1: epoch 2 of 3, about 2:00 min left; Dice on validation patches: liver 0.50"
    assert third == "step 1: epoch 3 of 3, about 1:00 min left; Dice on validation patches: no class is there"


no_mps = pytest.mark.skipif(torch.backends.mps.is_available(), reason="the device is there")


@pytest.mark.parametrize("device", ["cuda", pytest.param("mps", marks=no_mps)])
def test_a_device_that_is_not_there_is_refused_before_anything_is_written(
    nnunet_folders, tmp_path, monkeypatch, device
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    path = write_schedule(tmp_path / "s.yaml", write_tiny_dataset(tmp_path / "source", n_cases=2))
    path.write_text(path.read_text().replace("device: cpu", f"device: {device}"))
    schedule, message = load_schedule(path), f"s.yaml: device: got {device}, but PyTorch sees none here"
    for launcher in (None, "local"):
        with pytest.raises(ValueError, match=message):
            driver.run(schedule, [], [], launcher)
    assert not list(nnunet_folders["nnUNet_results"].iterdir())

    def plan(chain: Chain, _) -> None:
        chain.content["plans_name"] = "nnUNetPlans"
        chain.save()

    assert "nothing is prepared yet" in driver.status(schedule, [], [])
    monkeypatch.setattr(driver, "prepare_chain", plan)
    monkeypatch.setattr(driver, "check_launcher", lambda *_: None)
    monkeypatch.setattr(driver, "launch", lambda *_: ["queued"])
    assert len(driver.prepare(schedule, [], [])) == 2, "another machine may train it"
    assert "waiting" in driver.run(schedule, [], [], "slurm")
    with pytest.raises(ValueError, match=message):
        driver.work_on(schedule, "pgcd", 0, 1, "all", (), ())
    monkeypatch.setattr(Chain, "trained", lambda *_: True)
    monkeypatch.setattr(driver, "is_scored", lambda *_: False)
    with pytest.raises(ValueError, match=message):
        driver.evaluate(schedule, [], [])
    monkeypatch.setattr(driver, "_is_done", lambda *_: True)
    monkeypatch.setattr(driver, "_run", lambda *_: "the table")
    assert driver.run(schedule, [], []) == "the table", "nothing is left to do"


@pytest.fixture
def two_folds(nnunet_folders, tmp_path, monkeypatch) -> Chain:
    """A chain of two folds, all of it trained; nothing is predicted or compared."""
    path = write_schedule(tmp_path / "s.yaml", write_tiny_dataset(tmp_path / "source", n_cases=7), fold="[0, 1]")
    monkeypatch.setattr(Chain, "trained", lambda *_: True)
    monkeypatch.setattr(driver, "check_step", lambda *_: None)
    return Chain.open(load_schedule(path))


def test_a_fold_waits_for_the_ensemble_that_the_job_of_another_one_predicts(two_folds, monkeypatch):
    """Folds end at the same time, and an ensemble is predicted for longer than other locks are waited for."""
    variant, scored = two_folds.variant("pgcd", 0), []
    monkeypatch.setattr("nnunet_cil.chain.PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(driver, "evaluate_model", lambda chain, variant, step, fold, device: scored.append(fold))
    job = threading.Thread(target=driver._judge, args=(two_folds, variant, 1, 0))
    with Chain.open(two_folds.schedule).locked(driver._name(two_folds, variant, 1, ENSEMBLE)):
        job.start()
        job.join(1)
        assert job.is_alive()
        assert scored == [0]
    job.join(30)
    assert scored == [0, ENSEMBLE]


def test_a_schedule_that_is_edited_during_a_run_changes_nothing_in_it(two_folds, monkeypatch):
    """The process that scores on CUDA, and jobs, have the schedule that the run began with."""
    file = two_folds.schedule.file
    scored = []
    monkeypatch.setattr(driver, "evaluate_model", lambda chain, *_: scored.append(chain.schedule.name))
    schedule = pickle.loads(pickle.dumps(two_folds.schedule))
    file.write_text(file.read_text().replace("name: tiny", "name: next"))
    driver.judge_model(schedule, "pgcd", 0, 1, 0)
    assert set(scored) == {"tiny"}
    assert [path.name for path in two_folds.folder.parent.glob("chain_*")] == ["chain_tiny"]


def test_the_results_of_a_finished_chain_are_written_once_and_not_for_each_of_its_trainings(two_folds, monkeypatch):
    """Tables of many methods and seeds take as long as scoring."""
    todo, judged, written = {(2, 1)}, [], []
    monkeypatch.setattr(driver, "_prepared_variants", lambda chain, *_: [chain.variant("pgcd", 0)])
    monkeypatch.setattr(driver, "_is_done", lambda chain, variant, *training: training not in todo)
    monkeypatch.setattr(driver, "_judge", lambda chain, variant, *training: judged.append(training))
    monkeypatch.setattr(driver, "report", lambda chain, variants: written.append(list(judged)) or "the table")
    everything = [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert driver._run(two_folds, [], []) == "the table"
    assert written == [everything, everything], "when a model is scored, and at the end"
    todo.clear()
    driver._run(two_folds, [], [])
    assert len(written) == 3
