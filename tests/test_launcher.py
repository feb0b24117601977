"""Trainings as jobs. But for the last test a training is a line of shell, which is started as the real ones are."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from nnunet_cil import chain as chain_module
from nnunet_cil import driver, launcher
from nnunet_cil.chain import JOINT, Chain
from nnunet_cil.cli.main import build_parser
from nnunet_cil.guard import GUARD_FILE, Check, Guard, Organ, place_of
from nnunet_cil.launcher import JOBS_FILE, LAUNCHERS, Task, check_launcher, job_states, launch
from nnunet_cil.schedule import Launcher, ScheduleError, load_schedule
from nnunet_cil.step_files import write_json
from tests.conftest import write_schedule, write_tiny_dataset
from tests.test_chain import write_training

DAEMONS = ("munged", "slurmctld", "slurmd")
SECONDS = 300.0


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("launcher") / "source", n_cases=3)


@pytest.fixture
def open_chain(nnunet_folders, tmp_path, source) -> Callable[..., Chain]:
    """Opens a chain of two steps as after its preparation; ``extra`` goes into its schedule."""

    def open_chain(extra: str = "") -> Chain:
        chain = Chain.open(load_schedule(write_schedule(tmp_path / "schedule.yaml", source, extra=extra)))
        chain.content["plans_name"] = "nnUNetPlans"
        chain.save()
        return chain

    return open_chain


class Trainings:
    """Tasks that note their names when they begin, and leave a file when they succeed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def task(self, name: str, after: str | None = None, script: str = "true") -> Task:
        line = f"cd {self.folder}; echo {name} >> begun; {script} && touch {name}.done"
        done = self.folder / f"{name}.done"
        return Task(name, after, partial(subprocess.check_call, line, shell=True), done.exists)

    def end(self, name: str) -> None:
        (self.folder / f"{name}.done").touch()

    @property
    def begun(self) -> list[str]:
        path = self.folder / "begun"
        return path.read_text().split() if path.is_file() else []


@pytest.fixture
def trainings(tmp_path) -> Trainings:
    return Trainings(tmp_path / "trainings")


def wait_for(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.5)


def test_local_jobs_keep_their_order_and_what_failed_is_tried_again(open_chain, trainings, monkeypatch):
    chain = open_chain("launcher: {jobs: 2}")
    tasks = [
        trainings.task("one"),
        trainings.task("two", "one", "test -e mended"),
        trainings.task("three", "two"),
        trainings.task("other"),
    ]
    with pytest.raises(RuntimeError, match="got 1 failed jobs") as caught:
        launch(chain, tasks, "local")
    log = Path(re.search(r"two: (.*)", str(caught.value)).group(1))
    assert "test -e mended" in log.read_text(), "the log says what went wrong"
    assert sorted(trainings.begun) == ["one", "other", "two"]
    assert trainings.begun.index("one") < trainings.begun.index("two")
    states = job_states(chain)
    assert (states["two"], states["three"]) == (f"failed, see {log}", "waiting")

    (trainings.folder / "mended").touch()
    assert launch(chain, tasks, "local") == []
    assert trainings.begun[3:] == ["two", "three"]
    monkeypatch.setattr(launcher, "_run_here", None)
    assert launch(chain, tasks, "local") == [], "nothing is left to start"


@pytest.mark.parametrize("content", ["", "[]", '{"one": 1}', '{"one": {"launcher": "local"}}'])
def test_a_damaged_list_of_jobs_is_told_in_words(open_chain, trainings, content):
    chain = open_chain()
    (chain.folder / JOBS_FILE).write_text(content)
    for command in (partial(job_states, chain), partial(launch, chain, [trainings.task("one")], "local")):
        with pytest.raises(ValueError, match=r"jobs.json: got .*, expected the jobs that .*Remove it"):
            command()


def test_a_job_that_ended_well_has_not_failed_for_what_another_one_made_due_meanwhile(open_chain, trainings):
    """An ensemble, where the last of its folds has just been trained: it is of that fold's job."""
    first = replace(trainings.task("fold_0"), is_done=lambda: False)
    assert launch(open_chain(), [first, trainings.task("step_2", "fold_0")], "local") == []
    assert trainings.begun == ["fold_0", "step_2"]


def test_an_interrupt_ends_the_jobs_and_leaves_them_to_be_started_again(open_chain, trainings):
    chain, pid = open_chain(), trainings.folder / "pid"
    task = trainings.task("long", script="echo $$ > pid.part; mv pid.part pid; sleep 600")

    def interrupt() -> None:
        wait_for(pid.exists, "the job has not begun")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        launch(chain, [task], "local")
    thread.join()
    assert not Path(f"/proc/{pid.read_text().strip()}").exists(), "the training has ended with its job"
    assert job_states(chain) == {"long": "waiting"}
    assert not (trainings.folder / "long.done").exists()


def test_each_local_job_has_a_gpu_of_its_own(open_chain, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def places(jobs: int, device: str = "cuda", per_gpu: int = 1) -> list[str | None]:
        chain = open_chain(f"launcher: {{jobs: {jobs}, jobs_per_gpu: {per_gpu}}}")
        path = chain.schedule.file
        path.write_text(path.read_text().replace("device: cpu", f"device: {device}"))
        return [place.get("CUDA_VISIBLE_DEVICES") for place in launcher._places(load_schedule(path))]

    assert places(2) == ["0", "1"]
    with pytest.raises(ValueError, match=r"schedule.yaml: launcher: jobs: got 3, expected at most 2"):
        places(3)
    assert places(3, per_gpu=2) == ["0", "1", "0"]
    with pytest.raises(
        ValueError, match=r"got 5, expected at most 4: a GPU takes 2 at a time \(jobs_per_gpu\), and there are 2\."
    ):
        places(5, per_gpu=2)
    with pytest.raises(ValueError, match="got 5, expected at most 4"):
        check_launcher(load_schedule(tmp_path / "schedule.yaml"), "local")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert places(2, "auto") == ["3", "GPU-5"]
    assert places(3, "cpu") == [None] * 3


def test_a_local_job_sees_the_gpu_that_is_its_place(open_chain, trainings, monkeypatch):
    monkeypatch.setattr(launcher, "_places", lambda schedule: [{"CUDA_VISIBLE_DEVICES": "GPU-5"}])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    launch(open_chain(), [trainings.task("one", script="echo $CUDA_VISIBLE_DEVICES >> begun")], "local")
    assert trainings.begun == ["one", "GPU-5"]


@pytest.fixture
def sigterm() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize("told_to_end", [True, False])
def test_a_job_whose_training_slurm_ended_stays_until_slurm_ends_it(told_to_end, sigterm, monkeypatch):
    slept = []
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setattr(launcher.time, "sleep", slept.append)

    def work() -> None:
        if told_to_end:
            os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("the training ended with code -15")

    with pytest.raises(RuntimeError, match="code -15"):
        launcher._Job(work)()
    assert slept == [launcher.SIGNAL_SECONDS] + [launcher.GRACE_SECONDS] * told_to_end


def test_a_launcher_that_cannot_work_is_refused_before_anything_is_prepared(open_chain, nnunet_folders, monkeypatch):
    schedule = open_chain().schedule
    shutil.rmtree(nnunet_folders["nnUNet_results"])
    nnunet_folders["nnUNet_results"].mkdir()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="--launcher slurm: got no sbatch, squeue, srun, scontrol on this machine"):
        driver.run(schedule, [], [], "slurm")
    monkeypatch.setattr(launcher, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"--launcher local: got no package submitit, .*nnunet-cil\[slurm\]"):
        driver.run(schedule, [], [], "local")
    with pytest.raises(ValueError, match="got 'pbs', expected one of local, slurm"):
        check_launcher(schedule, "pbs")
    assert not [path for folder in nnunet_folders.values() for path in folder.iterdir()]


@pytest.mark.parametrize("command", ["run", "compare"])
def test_the_command_line_offers_the_launchers(command):
    parser = build_parser()
    assert parser.parse_args([command, "s.yaml"]).launcher is None
    assert [parser.parse_args([command, "s.yaml", "--launcher", name]).launcher for name in LAUNCHERS] == [*LAUNCHERS]
    with pytest.raises(SystemExit):
        parser.parse_args([command, "s.yaml", "--launcher", "pbs"])


def test_every_mistake_in_the_key_is_reported_at_once(open_chain, source, tmp_path):
    mistakes = """launcher:
  jobs: 0
  jobs_per_gpu: 0.5
  partition: 1
  account: ''
  gpus: a100
  cpus: 1.5
  memory_gb: -1
  hours: true
  setup: module load cuda
  sbatch: {time: 5, array: 0-3, --qos: long, comment: 1.5}
  nodes: 2"""
    path = write_schedule(tmp_path / "schedule.yaml", source, extra=mistakes)
    with pytest.raises(ScheduleError) as caught:
        load_schedule(path)
    keys = [re.search(r"yaml: launcher: (.*?): got", line).group(1) for line in str(caught.value).splitlines()]
    plain = ["jobs", "jobs_per_gpu", "partition", "account", "gpus", "cpus", "memory_gb", "hours", "setup"]
    assert sorted(keys) == sorted(
        [*plain, "nodes", *(f"sbatch: {key}" for key in ("time", "array", "--qos", "comment"))]
    )


def test_the_key_is_read_and_may_change_while_a_chain_runs(open_chain):
    open_chain()
    schedule = open_chain(
        "launcher: {gpus: 'a100:1', hours: 0.5, setup: [module load cuda], sbatch: {qos: long}}"
    ).schedule
    assert schedule.launcher == Launcher(gpus="a100:1", hours=0.5, setup=("module load cuda",), sbatch={"qos": "long"})


class FakeSlurm:
    """Commands that keep what is submitted, and say that the jobs in ``queue`` are there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        commands = {
            "sbatch": f'n=$((100 + $(ls {folder} | grep -c sh$))); cp "$1" {folder}/$n.sh; echo "batch job $n"',
            "squeue": f"[ $1 = --me ] || [ $1 = --user ] || cat {folder}/queue",  # all are a colleague's
            "srun": "exit 1",
            "scontrol": "exit 1",
        }
        for name, line in commands.items():
            path = folder / "bin" / name
            path.write_text(f"#!/bin/sh\n{line}\n")
            path.chmod(0o755)
        self.queue()

    def queue(self, *lines: str) -> None:
        (self.folder / "queue").write_text("".join(f"{line}\n" for line in lines))

    @property
    def submitted(self) -> dict[int, dict[str, str | None]]:
        """Options of each submission, by job id."""
        files = {int(path.stem): path.read_text() for path in sorted(self.folder.glob("*.sh"))}
        return {job: dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.M)) for job, text in files.items()}


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", str(fake.folder / "bin"), prepend=os.pathsep)
    return fake


def test_slurm_gets_arrays_of_what_starts_together_and_each_waits_for_what_it_needs(open_chain, trainings, slurm):
    chain = open_chain()
    tasks = [
        trainings.task("one"),
        trainings.task("pgcd_2", "one"),
        trainings.task("pgcd_3", "pgcd_2"),
        trainings.task("mib_2", "one"),
        trainings.task("mib_3", "mib_2"),
        trainings.task("joint"),
    ]
    assert launch(chain, tasks, "slurm") == [task.name for task in tasks]
    found = {job: (options.get("array"), options.get("dependency")) for job, options in slurm.submitted.items()}
    assert found == {
        100: ("0-1%2", None),
        101: ("0-1%2", "afterok:100_0"),
        102: (None, "afterok:101_0"),
        103: (None, "afterok:101_1"),
    }
    jobs = {name: entry["job"] for name, entry in json.loads((chain.folder / JOBS_FILE).read_text()).items()}
    assert jobs == {
        "one": "100_0",
        "joint": "100_1",
        "pgcd_2": "101_0",
        "mib_2": "101_1",
        "pgcd_3": "102",
        "mib_3": "103",
    }

    trainings.end("one")
    (chain.folder / "jobs" / "101_1_0_log.out").touch()
    slurm.queue("100_1|PENDING|None", "101_0|RUNNING|None", "102|PENDING|Dependency", "7|RUNNING|None")
    assert job_states(chain) | {"one": ""} == {
        "one": "",
        "joint": "queued",
        "pgcd_2": "running",
        "pgcd_3": "queued (Dependency)",
        "mib_2": f"failed, see {chain.folder / 'jobs' / '101_1_0_log.out'}",
        "mib_3": "cancelled before it began",
    }
    assert launch(chain, tasks, "slurm") == ["pgcd_2", "pgcd_3", "mib_2", "mib_3", "joint"]
    again = {job: options.get("dependency") for job, options in slurm.submitted.items() if job > 103}
    assert again == {104: None, 105: "afterok:104"}, "only what failed, and what needs it"


def test_a_dependency_that_never_comes_is_no_job_on_its_way(open_chain, trainings, slurm):
    chain = open_chain()
    launch(chain, [trainings.task("one"), trainings.task("two", "one")], "slurm")
    slurm.queue("101|PENDING|DependencyNeverSatisfied")
    assert job_states(chain)["two"] == "cancelled before it began"


def test_slurm_is_asked_for_what_the_schedule_says(open_chain, trainings, slurm):
    chain = open_chain(
        "launcher: {partition: gpu, account: lab, gpus: 'a100:1', cpus: 6, memory_gb: 12.5, hours: 1.1, "
        "setup: ['module load cuda'], sbatch: {qos: long, exclusive: true}}"
    )
    launch(chain, [trainings.task("one")], "slurm")
    options = slurm.submitted[100]
    asked = {
        "partition": "gpu",
        "account": "lab",
        "gpus-per-node": "a100:1",
        "cpus-per-task": "6",
        "mem": "12800M",
        "time": "66",
        "qos": "long",
        "exclusive": "",
        "requeue": "",
        "kill-on-invalid-dep": "yes",
        "job-name": "cil_tiny",
    }
    assert asked.items() <= options.items()
    assert "wckey" not in options, "many clusters refuse unknown ones"
    lines = (slurm.folder / "100.sh").read_text().splitlines()
    (srun,) = [line for line in lines if line.startswith("srun ")]
    assert "--cpus-per-task=6" in srun.split()
    assert lines.index("module load cuda") < lines.index(srun)


@pytest.mark.parametrize(
    ("device", "gpus", "asked"), [("cpu", "null", None), ("auto", "null", "1"), ("auto", "0", None)]
)
def test_slurm_is_asked_for_a_gpu_where_there_is_a_use_for_one(open_chain, trainings, slurm, device, gpus, asked):
    path = open_chain(f"launcher: {{gpus: {gpus}}}").schedule.file
    path.write_text(path.read_text().replace("device: cpu", f"device: {device}"))
    launch(Chain.open(load_schedule(path)), [trainings.task("one")], "slurm")
    assert slurm.submitted[100].get("gpus-per-node") == asked


def test_slurm_that_does_not_answer_is_no_empty_queue(open_chain, trainings, slurm):
    chain, task = open_chain(), trainings.task("one")
    launch(chain, [task], "slurm")
    (slurm.folder / "bin" / "squeue").write_text("#!/bin/sh\necho 'no controller' >&2; exit 1\n")
    for call in (partial(job_states, chain), partial(launch, chain, [task], "slurm")):
        with pytest.raises(RuntimeError, match="squeue: got 'no controller', expected the queue"):
            call()
    (slurm.folder / "bin" / "squeue").unlink()
    assert len(slurm.submitted) == 1


def test_a_machine_without_slurm_says_which_job_it_is(open_chain, monkeypatch):
    chain = open_chain()
    write_json(chain.folder / JOBS_FILE, {"one": {"launcher": "slurm", "job": "12_3", "failed": False}})
    monkeypatch.setenv("PATH", "")
    assert job_states(chain) == {"one": "job 12_3 of Slurm, which is not on this machine"}


# What a job is for the driver


def launched(monkeypatch) -> list[Task]:
    """What the driver would start; preparation is left out."""
    tasks: list[Task] = []

    def launch(chain: Chain, found: list[Task], launcher: str) -> list[str]:
        tasks.extend(found)
        return [task.name for task in found]

    monkeypatch.setattr(driver, "launch", launch)
    monkeypatch.setattr(driver, "_prepared_variants", lambda *a, **_: driver.variants_of(*a))
    return tasks


def test_step_2_of_all_methods_waits_for_the_step_1_of_its_seed_and_later_ones_for_their_own(open_chain, monkeypatch):
    chain, tasks = open_chain("variants: {strong: {lambda_pgcd: 3.0}}"), launched(monkeypatch)
    shown = driver.run(chain.schedule, ["pgcd", "strong", JOINT], [0, 1], "local")
    assert {task.name: task.after for task in tasks} == {
        "nnUNetPlans_1_fold_all": None,
        "nnUNetPlans_2_fold_all": "nnUNetPlans_1_fold_all",
        "nnUNetPlans_strong_2_fold_all": "nnUNetPlans_1_fold_all",
        "nnUNetPlans_joint_fold_all": None,
        "nnUNetPlans_seed1_1_fold_all": None,
        "nnUNetPlans_seed1_2_fold_all": "nnUNetPlans_seed1_1_fold_all",
        "nnUNetPlans_strong_seed1_2_fold_all": "nnUNetPlans_seed1_1_fold_all",
        "nnUNetPlans_seed1_joint_fold_all": None,
    }
    assert len(tasks) == 8, "step 1 is shared"
    assert shown.count("waiting") == 8


def test_a_job_is_done_when_its_model_is_trained_scored_and_compared(open_chain, monkeypatch):
    chain, tasks = open_chain(), launched(monkeypatch)
    driver.run(chain.schedule, [], [], "local")
    first, second = tasks
    variant = chain.variant("pgcd", 0)
    monkeypatch.setattr(driver, "is_scored", lambda chain, variant, step, fold: step in scored)
    scored: list[int] = []
    write_training(chain, variant, 1)
    write_training(chain, variant, 2)
    assert (first.is_done(), second.is_done()) == (False, False)
    scored += [1, 2]
    assert (first.is_done(), second.is_done()) == (True, False)
    write_json(chain.folder / GUARD_FILE, {place_of(chain, variant, 2, "all"): check().to_json(Guard())})
    assert second.is_done()


def check(agreement: float = 1.0) -> Check:
    return Check("pgcd", 0, "all", 2, "", "", 1, {"ball": Organ(agreement=agreement)})


def test_a_job_trains_what_is_not_trained_scores_it_and_writes_the_results(open_chain, monkeypatch):
    chain, tasks = open_chain(), launched(monkeypatch)
    driver.run(chain.schedule, [], [], "local")
    calls = []

    def train(chain: Chain, variant, step, fold, label) -> None:
        assert chain.is_locked(tasks[0].name)
        calls.append(f"train {step}")
        write_training(chain, variant, step)

    monkeypatch.setattr(driver, "_train", train)
    monkeypatch.setattr(driver, "evaluate_model", lambda chain, variant, step, *_: calls.append(f"score {step}"))
    monkeypatch.setattr(driver, "check_step", lambda *_: None)
    monkeypatch.setattr(driver, "report", lambda chain, variants: calls.append([v.method for v in variants]))
    for _ in range(2):
        tasks[0].work()
    assert calls == ["train 1", "score 1", ["pgcd"], "score 1", ["pgcd"]]
    with chain.locked(tasks[0].name):
        monkeypatch.setattr(chain_module, "PATIENCE_SECONDS", 0.1)
        with pytest.raises(RuntimeError, match=r"another nnunet-cil is working on \(nnUNetPlans_1_fold_all\)"):
            tasks[0].work()


def test_nothing_is_started_after_a_step_at_which_the_guard_stops(open_chain, monkeypatch):
    chain, tasks = open_chain("guard: {on_forgetting: stop}"), launched(monkeypatch)
    variant = chain.variant("pgcd", 0)
    write_json(chain.folder / GUARD_FILE, {place_of(chain, variant, 2, "all"): check(0.1).to_json(Guard())})
    driver.run(chain.schedule, [], [], "local")
    assert len(tasks) == 2, "its model was removed, to be trained anew"
    write_training(chain, variant, 2)
    with pytest.raises(RuntimeError, match="ball lost"):
        driver.run(chain.schedule, [], [], "local")
    assert len(tasks) == 2


def test_status_says_where_jobs_stand(open_chain):
    chain = open_chain()
    names = [f"nnUNetPlans_{step}_fold_all" for step in (1, 2)]
    jobs = [{"launcher": "local", "job": job, "failed": False} for job in ("11", None)]
    write_json(chain.folder / JOBS_FILE, dict(zip(names, jobs, strict=True)))

    def states() -> list[str]:
        return [line[62:].strip() for line in driver.status(chain.schedule, [], []).splitlines()[1:]]

    assert states() == ["waiting", "waiting"], "nobody starts them any more"
    with chain.locked():
        assert states() == ["running", "queued"]
    with chain.locked(names[1]):
        assert states() == ["waiting", "running"]
    write_training(chain, chain.variant("pgcd", 0), 1)
    with chain.locked():
        assert states() == ["running", "queued"], "it is scored now"
    jobs[0]["failed"] = True
    write_json(chain.folder / JOBS_FILE, dict(zip(names, jobs, strict=True)))
    (chain.folder / "jobs").mkdir()
    (chain.folder / "jobs" / "11_0_log.out").touch()
    assert states()[0] == f"failed, see {chain.folder / 'jobs' / '11_0_log.out'}"
    scores = driver.evaluation_file(chain, chain.variant("pgcd", 0), 1, "all")
    write_json(scores, {})
    assert states()[0] == "done"


# A Slurm of one's own


@pytest.fixture(scope="module")
def own_slurm(tmp_path_factory) -> Iterator[None]:
    """munged, slurmctld and slurmd on loopback; the partition ``high`` pre-empts jobs of ``low``."""
    if missing := [name for name in DAEMONS if shutil.which(name) is None]:
        pytest.skip(f"no {', '.join(missing)} (Debian: slurm-wlm and munge)")
    if os.geteuid() != 0:
        pytest.skip("slurmd starts jobs as root only")
    folder = tmp_path_factory.mktemp("own_slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(256))
    (folder / "munge.key").chmod(0o600)
    host, munge = socket.gethostname(), folder / "munge.socket"
    (folder / "slurm.conf").write_text(
        f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={munge},cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SchedulerParameters=sched_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=1 RealMemory=1000 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES PriorityTier=1 GraceTime=5 State=UP
PartitionName=high Nodes={host} PriorityTier=10 PreemptMode=OFF State=UP
"""
    )
    munged = ["munged", "--foreground", "--force", f"--socket={munge}", f"--key-file={folder}/munge.key"]
    munged += [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
    daemons = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        try:
            for command in (munged, ["slurmctld", "-D"], ["slurmd", "-D"]):
                log = open(folder / f"{command[0]}.log", "w")  # noqa: SIM115  (the daemon's own)
                daemons.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
                log.close()
                if command is munged:
                    wait_for(munge.exists, "munged does not start")
            idle = ["sinfo", "--noheader", "--states=idle", "--format=%P"]
            wait_for(
                lambda: "low" in subprocess.run(idle, capture_output=True, text=True).stdout, "Slurm does not start"
            )
            yield
        finally:
            subprocess.run(["scancel", "--me"], capture_output=True)
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


SMALL = "launcher: {partition: low, cpus: 1, memory_gb: 0.1, hours: %s}"


@pytest.mark.slurm
def test_slurm_keeps_the_order_and_what_failed_is_submitted_again(own_slurm, open_chain, trainings):
    chain = open_chain(SMALL % 1)
    tasks = [
        trainings.task("one"),
        trainings.task("two", "one"),
        trainings.task("bad", "one", "test -e mended"),
        trainings.task("after_bad", "bad"),
    ]
    assert launch(chain, tasks, "slurm") == ["one", "two", "bad", "after_bad"]
    assert job_states(chain)["two"].startswith("queued")
    wait_for(lambda: job_states(chain)["after_bad"] == "cancelled before it began", "the job that cannot start stays")
    wait_for(tasks[1].is_done, "the job whose dependency is done does not start")
    assert job_states(chain)["bad"].startswith("failed, see ")
    assert trainings.begun[0] == "one"
    assert sorted(trainings.begun[1:]) == ["bad", "two"]

    (trainings.folder / "mended").touch()
    assert launch(chain, tasks, "slurm") == ["bad", "after_bad"]
    wait_for(tasks[3].is_done, "what failed is not submitted again")
    assert trainings.begun[3:] == ["bad", "after_bad"]
    assert launch(chain, tasks, "slurm") == []


@pytest.mark.slurm
@pytest.mark.parametrize("by", ["preemption", "timeout"])
def test_what_slurm_ends_is_requeued_and_goes_on_before_the_next(own_slurm, open_chain, trainings, by):
    chain = open_chain(SMALL % (1 if by == "preemption" else 1 / 60))
    begin_or_go_on = "if [ -e checkpoint ]; then echo resumed >> begun; else touch checkpoint; sleep 600; fi"
    tasks = [trainings.task("one", script=begin_or_go_on), trainings.task("two", "one")]
    launch(chain, tasks, "slurm")
    wait_for((trainings.folder / "checkpoint").exists, "the job does not begin")
    assert job_states(chain)["one"] == "running"
    if by == "preemption":
        subprocess.run(["sbatch", "--partition=high", "--output=/dev/null", "--wrap=true"], check=True)
    wait_for(tasks[1].is_done, "the chain does not go on")
    assert trainings.begun == ["one", "one", "resumed", "two"]


# The whole command


@pytest.mark.chain
def test_run_with_local_jobs_ends_as_run_does(nnunet_folders, tmp_path, source):
    schedule = load_schedule(write_schedule(tmp_path / "schedule.yaml", source, extra="launcher: {jobs: 2}"))
    shown = driver.run(schedule, ["pgcd", "finetune"], [], "local")
    assert "pgcd: Dice (%) by step" in shown
    assert shown == driver.run(schedule, ["pgcd", "finetune"], [])


@pytest.mark.chain
@pytest.mark.slurm
def test_run_on_slurm_says_where_it_stands_and_then_gives_the_table(own_slurm, nnunet_folders, tmp_path, source):
    schedule = load_schedule(write_schedule(tmp_path / "schedule.yaml", source, extra=SMALL % 1))
    shown = driver.run(schedule, ["pgcd", "finetune"], [], "slurm")
    assert shown.count("queued") + shown.count("running") == 3
    assert driver.write_report(schedule, ["pgcd", "finetune"], []).is_file(), "of what is there so far: nothing"
    wait_for(lambda: driver.status(schedule, ["pgcd", "finetune"], []).count("done") == 3, "the jobs do not end")
    wait_for(lambda: not launcher._queue(), "the last job stays")
    shown = driver.run(schedule, ["pgcd", "finetune"], [], "slurm")
    assert "pgcd: Dice (%) by step" in shown
    assert "finetune: Dice (%) by step" in shown
