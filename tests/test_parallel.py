"""Work on many cases gives the same results in this process and in worker processes."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from multiprocessing import active_children

import pytest

from nnunet_cil import parallel
from nnunet_cil.parallel import SMALL_BYTES, in_own_process, over_cases, worker_count

BIG = SMALL_BYTES


@pytest.fixture(autouse=True)
def two_workers(monkeypatch):
    monkeypatch.setenv("nnUNet_def_n_proc", "2")


@pytest.mark.parametrize("n_bytes", [0, BIG], ids=["in-process", "workers"])
def test_results_are_in_the_order_of_the_arguments(n_bytes):
    # the first takes longest, so that a result taken as it comes would come last
    arguments = [(20_000,), (3,), (0,), (5,)]
    assert over_cases(math.factorial, arguments, n_bytes, "x") == [math.factorial(20_000), 6, 1, 120]


@pytest.mark.parametrize("n_bytes", [0, BIG], ids=["in-process", "workers"])
def test_the_first_exception_is_raised(n_bytes):
    with pytest.raises(ValueError, match="negative"):
        over_cases(math.factorial, [(3,), (-1,), ("no number",)], n_bytes, "x")


def test_all_arguments_reach_the_function():
    assert over_cases(math.gcd, [(12, 18), (7, 21, 49), ()], 0, "x") == [6, 7, 0]


def test_little_data_stay_in_this_process():
    assert set(over_cases(os.getpid, [()] * 3, SMALL_BYTES - 1, "x")) == {os.getpid()}


def test_much_data_go_to_worker_processes():
    pids = set(over_cases(os.getpid, [()] * 4, SMALL_BYTES, "x"))
    assert os.getpid() not in pids
    assert len(pids) <= 2


def test_a_single_case_stays_in_this_process():
    assert over_cases(os.getpid, [()], BIG, "x") == [os.getpid()]


def test_one_allowed_process_is_this_one(monkeypatch):
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    assert set(over_cases(os.getpid, [()] * 3, BIG, "x")) == {os.getpid()}


def test_no_case_gives_no_result():
    assert over_cases(math.factorial, [], BIG, "x") == []


def test_progress_is_told_but_not_after_the_last_case(monkeypatch, caplog):
    monkeypatch.setattr(parallel, "TELL_EVERY_SECONDS", -1.0)
    with caplog.at_level(logging.INFO, parallel.__name__):
        over_cases(math.factorial, [(1,)] * 3, 0, "preprocessing step 1")
    starts = [message.split(", about ")[0] for message in caplog.messages]
    assert starts == ["preprocessing step 1: case 1 of 3", "preprocessing step 1: case 2 of 3"]
    assert all(message.endswith(" s left") for message in caplog.messages)


def test_time_left_is_that_of_the_cases_left(monkeypatch, caplog):
    clock = iter([0.0, 20.0, 40.0, 45.0, 60.0])
    monkeypatch.setattr(parallel, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO, parallel.__name__):
        over_cases(math.factorial, [(1,)] * 4, 0, "x")
    assert caplog.messages == ["x: case 1 of 4, about 60 s left", "x: case 2 of 4, about 40 s left"]


def test_quick_work_is_silent(caplog):
    with caplog.at_level(logging.INFO, parallel.__name__):
        over_cases(math.factorial, [(1,)] * 3, 0, "x")
    assert caplog.messages == []


@pytest.mark.parametrize(("limit", "n_tasks", "expected"), [("3", 10, 3), ("3", 2, 2), ("3", 0, 1), ("0", 5, 1)])
def test_nnunets_variable_limits_the_workers(monkeypatch, limit, n_tasks, expected):
    monkeypatch.setenv("nnUNet_def_n_proc", limit)
    assert worker_count(n_tasks) == expected


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (5, 5), (32, 8)])
def test_without_it_there_are_as_many_workers_as_cores_up_to_eight(monkeypatch, cores, expected):
    monkeypatch.delenv("nnUNet_def_n_proc")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert worker_count(100) == expected


def test_where_there_is_no_affinity_the_machines_cores_count(monkeypatch):
    monkeypatch.delenv("nnUNet_def_n_proc")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert worker_count(100) == 3


@pytest.mark.parametrize(("asked", "threads"), [("3", 3), ("", 5), ("many", 5), ("0", 5)])
def test_threads_are_those_asked_for_else_the_cores_that_may_be_used(monkeypatch, asked, threads):
    monkeypatch.setattr(parallel, "core_count", lambda: 5)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert parallel.thread_count() == threads


def say_and_give_pid(line: str) -> int:
    logging.getLogger("nnunet_cil.somewhere").info(line)
    return os.getpid()


def test_a_process_of_its_own_gives_result_and_lines(capfd, caplog):
    with caplog.at_level(logging.INFO, "nnunet_cil"):
        assert in_own_process(say_and_give_pid, "half of it is done") != os.getpid()
    assert capfd.readouterr().err == "half of it is done\n"
    assert active_children() == []


def test_what_it_raises_is_raised_here():
    with pytest.raises(ValueError, match="negative"):
        in_own_process(math.factorial, -1)


def test_one_that_is_killed_is_told():
    with pytest.raises(RuntimeError, match="killed while it predicted or scored, expected it to end by itself"):
        in_own_process(os.abort)


def test_an_interrupt_ends_it():
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    before, started = signal.signal(signal.SIGALRM, interrupt), time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        with pytest.raises(KeyboardInterrupt):
            in_own_process(time.sleep, 60)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < 30
    assert active_children() == []
