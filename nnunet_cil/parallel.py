"""Work on many cases, in this process or in workers, whichever is faster; and work in a process of its own."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from multiprocessing import active_children, get_context
from time import monotonic
from typing import Any, TypeVar

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

SMALL_BYTES = 64 * 2**20
TELL_EVERY_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def on_sigterm(handler: Callable[[int, Any], None]) -> None:
    """Have ``handler`` called on SIGTERM in this process, while workers that it forks end by it, as pools expect.

    Python forgets a signal that reaches a forked process before it is set up. A pool that ends a worker so early would
    wait for it for ever. So SIGTERM waits while a process forks.
    """
    signal.signal(signal.SIGTERM, handler)
    _watch_forks()


@cache
def _watch_forks() -> None:
    """Hooks of a fork can't be taken back, so they are there once."""

    def hold() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def let() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def end_by_it() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        let()

    os.register_at_fork(before=hold, after_in_parent=let, after_in_child=end_by_it)


def core_count() -> int:
    """Cores that this process may use: those a batch system gave it, not those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_count() -> int:
    """Threads of a training on the CPU: OMP_NUM_THREADS where it is set, else one for each core."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) > 0 else core_count()


def worker_count(n_tasks: int) -> int:
    """Worker processes for ``n_tasks``, from the cores that this process may use; nnUNet_def_n_proc overrides."""
    limit = int(os.environ.get("nnUNet_def_n_proc", min(8, core_count())))  # noqa: SIM112  (nnU-Net's spelling)
    return max(1, min(limit, n_tasks))


def over_cases(
    function: Callable[..., Result], arguments: Sequence[tuple[Any, ...]], n_bytes: int, what: str
) -> list[Result]:
    """``function(*a)`` for every ``a`` of ``arguments``, results in their order.

    Starting worker processes takes seconds, as each imports nnU-Net: below ``SMALL_BYTES`` this process does the work.

    Args:
        function: importable by a worker process.
        n_bytes: size of the arrays to work on, as a measure of the work.
        what: for the lines of progress, such as ``preprocessing step 1``.

    Raises:
        RuntimeError: a worker process was killed.
        Exception: the first one that ``function`` raises.
    """
    workers, total, say = worker_count(len(arguments)), len(arguments), partial(logger.info, "%s: %s", what)
    if workers == 1 or n_bytes < SMALL_BYTES:
        return list(told((function(*a) for a in arguments), total, say))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(function, *a) for a in arguments]
        try:
            return list(told((future.result() for future in futures), total, say))
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"{what}: got a worker process that was killed, expected all {workers} to end by themselves. Most "
                f"often memory ran out: set nnUNet_def_n_proc below {workers}, and give the same command again."
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def told(cases: Iterable[Result], total: int, say: Callable[[str], None]) -> Iterator[Result]:
    """The cases one by one; ``say`` gets a line now and then on how many are done and how long the others take."""
    started = last = monotonic()
    for done, case in enumerate(cases, 1):
        yield case
        if (now := monotonic()) - last > TELL_EVERY_SECONDS and done < total:
            last = now
            say(f"case {done} of {total}, about {(now - started) / done * (total - done):.0f} s left")


def end_with_parent() -> None:
    """In a new process: be killed when the one that started it ends, however that ends; on Linux alone."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL)


def in_own_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """``function(*arguments)`` in a new process, which ends with it and tells its progress on stderr.

    Interrupted, it is ended as well.

    Args:
        function: importable by the process.
        arguments: like the result to be pickled.

    Raises:
        RuntimeError: the process was killed.
        Exception: what ``function`` raises.
    """
    level = logging.getLogger("nnunet_cil").getEffectiveLevel()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_begin, initargs=(level,)) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "got a process that was killed while it predicted or scored, expected it to end by itself. Most often "
                "memory ran out. The same command goes on from there."
            ) from error
        except BaseException:
            for child in active_children():
                child.terminate()
            raise


def _begin(level: int) -> None:
    """At the start of such a process; an interrupt from the keyboard is its parent's."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("nnunet_cil").setLevel(level)
    if level > logging.DEBUG:
        warnings.simplefilter("ignore", FutureWarning)  # as in the command itself
