"""Commands in processes of their own, that end: with what they printed, or with the stacks of what hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

STACKS_SECONDS = 10


def run(
    command: Sequence[str], cwd: Path, environment: Mapping[str, str], seconds: float = 400
) -> subprocess.CompletedProcess[str]:
    """Run a command; ``stdout`` of the result is all that it printed, errors too.

    Nothing that it started outlives it, and what is left neither holds us up nor the next test.

    Raises:
        AssertionError: it has not ended in time; the message has the stacks of all its Python processes.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**environment, "PYTHONFAULTHANDLER": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        hangs = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            hangs = True
            os.killpg(process.pid, signal.SIGABRT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STACKS_SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        output.seek(0)
        shown = output.read()
    assert not hangs, f"{command}: it has not ended after {seconds} s.\n{shown}"
    return subprocess.CompletedProcess(command, process.returncode, shown, "")
