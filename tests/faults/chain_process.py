"""A process that has imported what a chain needs and forks one ``nnunet-cil`` after another, each killed on purpose.

Starting Python with PyTorch takes longer than all else in a tiny chain. Lines of JSON on stdin name a command and its
kill (`tests.faults.chains.Kill`), lines on stdout how it ended. Trainings are forked too, or started anew as usual.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

PR_SET_CHILD_SUBREAPER = 36


class ForkedTraining:
    """In place of ``subprocess.Popen`` for the process of a training."""

    def __init__(
        self,
        command: Sequence[str],
        env: dict[str, str],
        encoding: str,
        errors: str,
        preexec_fn: Callable[[], None],
        **_: Any,
    ) -> None:
        read, write = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            preexec_fn()
            os.dup2(write, 1)
            os.dup2(write, 2)
            os.closerange(3, 1024)  # a new program would have none of the driver's locks either
            os.environ.clear()
            os.environ.update(env)
            end_with(functools.partial(train, command[4:]))
        os.close(write)
        self.stdout = os.fdopen(read, encoding=encoding, errors=errors)
        self._lock, self._code = Lock(), None

    def wait(self) -> int:
        with self._lock:
            if self._code is None:
                self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            return self._code


def train(arguments: Sequence[str]) -> None:
    from nnunetv2.run.run_training import run_training_entry

    sys.argv = ["nnUNetv2_train", *arguments]
    run_training_entry()


def end_with(work: Callable[[], int | None]) -> None:
    """End this process with what ``work`` returns, and with its traceback if it fails."""
    code = 1
    try:
        code = work() or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def halve(arguments: Sequence[Any]) -> None:
    """Cut the file that a call has written to half of its length."""
    target = next(a for a in arguments if isinstance(a, (str, Path)) or hasattr(a, "fileno"))
    if hasattr(target, "fileno"):
        target.flush()
        target = target.name
    os.truncate(target, os.path.getsize(target) // 2)


def kill_at(name: str, number: int, how: str, training_only: bool) -> None:
    """Let the ``number``-th call of a function end in kill -9: before, after, or when its file is half written."""
    module, attribute = name.split(":")
    *owners, last = attribute.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original, calls, command = getattr(owner, last), [], os.getpid()

    @functools.wraps(original)
    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) != number:
            return original(*args, **kwargs)
        if how != "before":
            original(*args, **kwargs)
        if how == "half":
            halve([*args, *kwargs.values()])
        if not training_only:
            os.kill(command, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("killed")

    setattr(owner, last, dying)


def command(order: dict[str, Any]) -> int:
    from nnunet_cil import driver
    from nnunet_cil.cli.main import main

    os.environ.clear()
    os.environ.update(order["environment"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if order["forked"]:
        driver.subprocess = SimpleNamespace(Popen=ForkedTraining, PIPE=None, STDOUT=None)
    if order["at"]:
        kill_at(order["at"], order["number"], order["how"], order["training_only"])
    return main(order["arguments"])


def carry_out(order: dict[str, Any]) -> dict[str, Any]:
    pid = os.fork()
    if not pid:
        end_with(functools.partial(command, order))
    if order["seconds"] is not None and not select.select([os.pidfd_open(pid)], [], [], order["seconds"])[0]:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with suppress(ChildProcessError):
        while True:
            os.wait()  # for a training that has just been killed
    return {"status": status}


def import_all() -> None:
    from multiprocessing.pool import ThreadPool

    import matplotlib.backends.backend_pdf  # noqa: F401
    import monai.metrics  # noqa: F401
    import nnunetv2.inference.predict_from_raw_data
    import nnunetv2.run.run_training
    import nnunetv2.utilities.utils

    from nnunet_cil import source_check
    from nnunet_cil.environment import trainer_path_variable
    from nnunet_cil.nnunet_api import environment_variable, trainer_class
    from nnunet_cil.report import figures
    from tests.conftest import QUICK_SAMPLES

    source_check.INTENSITY_SAMPLES = QUICK_SAMPLES
    figures._LOOK["pdf.fonttype"] = 3
    nnunetv2.utilities.utils.Pool = ThreadPool
    with environment_variable("nnUNet_extTrainer", trainer_path_variable()):
        trainer_class("nnUNetTrainerPGCD")


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is imported may print
    import_all()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    for line in sys.stdin:
        print(json.dumps(carry_out(json.loads(line))), file=answers, flush=True)
