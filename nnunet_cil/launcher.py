"""Trainings as jobs, through submitit: side by side on this machine, or on a Slurm cluster.

A chain's ``jobs.json`` says which job was started for what. Whether that is done, the chain's own files say, and
whether the job waits or runs, Slurm. Logs and what submitit needs lie in the chain's ``jobs`` folder.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from nnunet_cil.chain import Chain
from nnunet_cil.parallel import on_sigterm
from nnunet_cil.schedule import Schedule
from nnunet_cil.step_files import write_json
from nnunet_cil.untrusted import read_json

logger = logging.getLogger(__name__)

LAUNCHERS = ("local", "slurm")
JOBS_FILE = "jobs.json"
COMMANDS = ("sbatch", "squeue", "srun", "scontrol")
MAX_TIMEOUTS = 20
MINUTES_OF_A_YEAR = 525_600
POLL_SECONDS = 1.0
SIGNAL_SECONDS = 2.0
GRACE_SECONDS = 600.0


@dataclass(frozen=True)
class Task:
    """What one job does.

    Args:
        name: in ``jobs.json``, and that of its lock while it works.
        after: name of the task that has to be done before, None for none.
        work: does it; importable with its arguments, as ``functools.partial`` of a function of a module is. Called
            again, it goes on.
        is_done: whether there is nothing left to do.
    """

    name: str
    after: str | None
    work: Callable[[], None]
    is_done: Callable[[], bool]


class _Job:
    """What submitit runs in a process of its own, and runs again if Slurm ends it before it is done."""

    def __init__(self, work: Callable[[], None], environment: Mapping[str, str] | None = None) -> None:
        self.work, self.environment = work, dict(environment or {})

    def __call__(self) -> None:
        told_to_end = False

        def end(*_: Any) -> None:
            nonlocal told_to_end
            told_to_end = True
            if os.environ.get("SUBMITIT_EXECUTOR") == "local":
                raise KeyboardInterrupt

        on_sigterm(end)
        os.environ.update(self.environment)
        logging.basicConfig(format="%(message)s", stream=sys.stdout)
        logging.getLogger("nnunet_cil").setLevel(logging.INFO)
        try:
            self.work()
        except Exception:
            # Slurm signals every process of a job, so a training may end before this process is told to. A job that
            # ends by itself then has failed; one that stays until Slurm ends it is requeued if it was pre-empted.
            time.sleep(SIGNAL_SECONDS)
            if told_to_end:
                time.sleep(GRACE_SECONDS)
            raise

    def checkpoint(self) -> Any:
        """What submitit puts into the queue again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def check_launcher(schedule: Schedule, launcher: str) -> None:
    """Refuse a launcher that cannot work here.

    Raises:
        ValueError: submitit or Slurm is not there, or there are fewer GPUs than jobs at once.
    """
    if launcher not in LAUNCHERS:
        raise ValueError(f"--launcher: got {launcher!r}, expected one of {', '.join(LAUNCHERS)}.")
    if find_spec("submitit") is None:
        raise ValueError(
            f"--launcher {launcher}: got no package submitit, expected it beside nnunet-cil: "
            "pip install 'nnunet-cil[slurm]'"
        )
    if launcher == "local":
        _places(schedule)
    elif missing := [name for name in COMMANDS if shutil.which(name) is None]:
        raise ValueError(
            f"--launcher slurm: got no {', '.join(missing)} on this machine, expected a login node of a Slurm cluster. "
            "Run it there, or leave --launcher out."
        )


def launch(chain: Chain, tasks: Sequence[Task], launcher: str) -> list[str]:
    """Start what is neither done nor on its way, each task after the one that it needs.

    ``local`` returns when all are done, ``slurm`` when all are submitted.

    Args:
        tasks: each behind the one that it needs.

    Returns:
        Names of the tasks that are not done yet.

    Raises:
        RuntimeError: tasks failed, here; or Slurm did not take them.
    """
    todo = {task.name: task for task in tasks if not task.is_done()}
    if todo and launcher == "local":
        _run_here(chain, todo)
        return []
    if todo:
        _submit(chain, todo)
    return list(todo)


def job_states(chain: Chain) -> dict[str, str]:
    """Where the jobs of a chain stand that are not done, by name.

    Queued, running, failed with the path of the log, cancelled, or waiting for the command that started them to be
    given again. Of what is done the state has no meaning.
    """
    entries = _entries(chain)
    by_slurm = any(entry["launcher"] == "slurm" for entry in entries.values())
    queue = _queue() if by_slurm and shutil.which("squeue") else None
    return {name: _state(chain, name, entry, queue) for name, entry in entries.items()}


def _state(chain: Chain, name: str, entry: Mapping[str, Any], queue: Mapping[str, str] | None) -> str:
    job = entry["job"]
    if chain.is_locked(name):
        return "running"
    if entry["launcher"] == "slurm" and queue is None:
        return f"job {job} of Slurm, which is not on this machine"
    if entry["launcher"] == "slurm" and job in queue:
        return queue[job]
    if entry["launcher"] == "slurm" or entry["failed"]:
        log = _log(chain, job)
        return f"failed, see {log}" if log.is_file() else "cancelled before it began"
    if not chain.is_locked():  # by the process that starts the jobs
        return "waiting"
    return "queued" if job is None else "running"


def _entries(chain: Chain) -> dict[str, dict[str, Any]]:
    """Content of ``jobs.json``: which job stands for a task.

    Raises:
        ValueError: the file is damaged.
    """
    path = chain.folder / JOBS_FILE
    expected = "the jobs that nnunet-cil started. Remove it once none of them is queued or runs"
    entries = read_json(path, expected) if path.is_file() else {}
    for name, entry in entries.items():
        if not isinstance(entry, dict) or set(entry) != {"launcher", "job", "failed"}:
            raise ValueError(f"{path}: got no job under {name!r}, expected {expected}.")
    return entries


def _note(chain: Chain, launcher: str, jobs: Mapping[str, str | None], failed: bool = False) -> None:
    """Write into ``jobs.json`` which job stands for a task."""
    noted = {name: {"launcher": launcher, "job": job, "failed": failed} for name, job in jobs.items()}
    write_json(chain.folder / JOBS_FILE, {**_entries(chain), **noted})


def _log(chain: Chain, job: str) -> Path:
    return chain.folder / "jobs" / f"{job}_0_log.out"


def _graph(todo: Mapping[str, Task]) -> TopologicalSorter:
    graph = TopologicalSorter({name: [task.after] if task.after in todo else [] for name, task in todo.items()})
    graph.prepare()
    return graph


def _places(schedule: Schedule) -> list[dict[str, str]]:
    """Environment of each of the jobs that run here at once; on CUDA each has a GPU, or its share of one.

    Raises:
        ValueError: there are fewer GPUs, or shares of them.
    """
    jobs, per_gpu = schedule.launcher.jobs, schedule.launcher.jobs_per_gpu
    if schedule.device in ("cpu", "mps") or not torch.cuda.is_available():
        return [{} for _ in range(jobs)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    if jobs > len(gpus) * per_gpu:
        raise ValueError(
            f"{schedule.file}: launcher: jobs: got {jobs}, expected at most {len(gpus) * per_gpu}: a GPU takes "
            f"{per_gpu} at a time (jobs_per_gpu), and there are {len(gpus)}."
        )
    return [{"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} for number in range(jobs)]


def _run_here(chain: Chain, todo: Mapping[str, Task]) -> None:
    from submitit import LocalExecutor, LocalJob

    executor = LocalExecutor(chain.folder / "jobs")
    executor.update_parameters(timeout_min=MINUTES_OF_A_YEAR, stderr_to_stdout=True)
    free, order, graph = _places(chain.schedule), list(todo), _graph(todo)
    ready, running, failed = list(graph.get_ready()), {}, []
    _note(chain, "local", dict.fromkeys(todo))

    def start(name: str) -> tuple[LocalJob, dict[str, str]]:
        place = free.pop(0)
        with _deaf_to_interrupts():
            job = executor.submit(_Job(todo[name].work, place))
        _note(chain, "local", {name: job.job_id})
        logger.info("%s: started, log %s", name, _log(chain, job.job_id))
        return job, place

    def end(name: str) -> None:
        job, place = running.pop(name)
        free.append(place)
        # by its end: an ensemble that another fold's training has just made due is that job's
        if job.exception() is None or todo[name].is_done():
            logger.info("%s: done", name)
            graph.done(name)
            return
        failed.append(f"{name}: {_log(chain, job.job_id)}")
        logger.warning("%s: failed", name)
        _note(chain, "local", {name: job.job_id}, failed=True)

    try:
        while ready or running:
            while ready and free:
                name = ready.pop(0)
                running[name] = start(name)
            time.sleep(POLL_SECONDS)
            for name in [name for name, (job, _) in running.items() if job.done()]:
                end(name)
            ready = sorted([*ready, *graph.get_ready()], key=order.index)
    except BaseException:
        for job in [job for job, _ in running.values() if not job.done()]:
            os.kill(int(job.job_id), signal.SIGTERM)
        while not all(job.done() for job, _ in running.values()):
            time.sleep(0.1)
        raise
    if failed:
        lines = "\n  ".join(failed)
        raise RuntimeError(
            f"{chain.folder}: got {len(failed)} failed jobs, expected none; their logs say why:\n  {lines}\nThe same "
            "command tries them again, and goes on with what needs them."
        )


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Let what is started meanwhile ignore Ctrl-C, which a terminal sends to it too: submitit would kill it within a
    second, and leave a training behind that is its child."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _submit(chain: Chain, todo: Mapping[str, Task]) -> None:
    queue, entries = _queue(), _entries(chain).items()
    known = {name: entry["job"] for name, entry in entries if entry["launcher"] == "slurm" and entry["job"] in queue}
    graph = _graph(todo)
    n_submitted = 0
    while graph.is_active():
        ready = list(graph.get_ready())
        groups: dict[str | None, list[str]] = defaultdict(list)
        for name in ready:
            if name not in known:
                groups[known.get(todo[name].after or "")].append(name)
        for job_before, names in groups.items():
            executor = _slurm_executor(chain, job_before)
            jobs = executor.submit_array([_Job(todo[name].work) for name in names])
            new = {name: job.job_id for name, job in zip(names, jobs, strict=True)}
            _note(chain, "slurm", new)
            known |= new
            n_submitted += len(new)
        graph.done(*ready)
    logger.info("%d jobs submitted, %d were on their way", n_submitted, len(todo) - n_submitted)


def _slurm_executor(chain: Chain, job_before: str | None) -> Any:
    """Executor of jobs that start once another one has succeeded; submitit makes an array of several."""
    from submitit import SlurmExecutor

    asked = chain.schedule.launcher
    gpus = asked.gpus if asked.gpus is not None else 0 if chain.schedule.device in ("cpu", "mps") else 1
    executor = SlurmExecutor(chain.folder / "jobs", max_num_timeout=MAX_TIMEOUTS)
    executor.update_parameters(
        job_name=f"cil_{chain.schedule.name}",
        partition=asked.partition,
        account=asked.account,
        gpus_per_node=gpus or None,
        cpus_per_task=asked.cpus,
        mem=f"{math.ceil(1024 * asked.memory_gb)}M",
        time=math.ceil(60 * asked.hours),
        dependency=None if job_before is None else f"afterok:{job_before}",
        setup=list(asked.setup),
        srun_args=[f"--cpus-per-task={asked.cpus}"],  # since Slurm 22.05 srun does not take it from the job
        stderr_to_stdout=True,
        wckey=None,
        additional_parameters={"requeue": True, "kill-on-invalid-dep": "yes", **asked.sbatch},
    )
    return executor


def _queue() -> dict[str, str]:
    """Jobs of all users that Slurm has in its queue or runs, by id: queued, and why, or running; two may share a chain.

    Raises:
        RuntimeError: Slurm does not answer.
    """
    command = ["squeue", "--array", "--noheader", "--format=%i|%T|%r"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"squeue: got {done.stderr.strip()!r}, expected the queue of Slurm. Try again later.")
    lines = [line.split("|", 2) for line in done.stdout.splitlines()]
    return {
        job: "running" if state != "PENDING" else "queued" if reason == "None" else f"queued ({reason})"
        for job, state, reason in lines
        if reason != "DependencyNeverSatisfied"
    }
