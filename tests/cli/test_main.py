import argparse
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest

from nnunet_cil.cli import main as cli
from nnunet_cil.cli.main import SUBCOMMANDS, build_parser, main

HEAVY = {"torch", "nnunetv2", "numpy", "SimpleITK", "scipy", "matplotlib", "yaml"}


@pytest.fixture
def raising(monkeypatch):
    """Makes the command line run something that raises."""

    def set_error(error: BaseException) -> None:
        def run(_):
            raise error

        parser = argparse.Namespace(debug=False, run=run)
        monkeypatch.setattr(cli, "build_parser", lambda: SimpleNamespace(parse_args=lambda _: parser))

    return set_error


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in SUBCOMMANDS)])
def test_help_imports_nothing_heavy(arguments):
    code = f"""
import sys
from nnunet_cil.cli.main import main
try:
    main({arguments})
except SystemExit as end:
    status = end.code
print("LOADED", status, sorted({HEAVY} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED 0 []"


def test_help_names_every_subcommand(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"\n    {name} " in shown for name in SUBCOMMANDS)


@pytest.mark.parametrize("arguments", [[], ["no-such-subcommand"], ["env", "--persist", "--remove"]])
def test_wrong_arguments_end_with_2(arguments):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, FileExistsError, PermissionError, RuntimeError])
def test_errors_are_one_line_and_status_1(raising, capsys, kind):
    raising(kind("steps: got 0, expected 2."))
    assert main([]) == 1
    assert capsys.readouterr().err == "nnunet-cil: error: steps: got 0, expected 2.\n"


def test_a_programming_error_is_not_hidden(raising):
    raising(KeyError("a bug"))
    with pytest.raises(KeyError):
        main([])


def test_interrupt_ends_with_130(raising, capsys):
    raising(KeyboardInterrupt())
    assert main([]) == 130
    assert capsys.readouterr().err == "Interrupted. The same command goes on from here.\n"


SCHEDULED = {
    "run": [],
    "prepare": [],
    "status": [],
    "evaluate": [],
    "compare": [],
    "ablate": [],
    "gather": ["elsewhere"],
    "report": [],
    "audit": [],
    "export": ["model"],
}


@pytest.mark.parametrize("before_subcommand", [True, False])
def test_debug_shows_the_traceback(tmp_path, before_subcommand):
    command = ["status", str(tmp_path / "none.yaml")]
    arguments = ["--debug", *command] if before_subcommand else [*command, "--debug"]
    code = f"from nnunet_cil.cli.main import main; raise SystemExit(main({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "nnunet-cil: error:" in done.stderr.splitlines()[-1]


def test_which_commands_take_a_schedule():
    (subparsers,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    taking = {
        name
        for name, each in subparsers.choices.items()
        if "schedule" in [action.dest for action in each._actions if not action.option_strings]  # extend writes one
    }
    assert taking == set(SCHEDULED)


def test_a_mistake_in_the_schedule_is_told_before_pytorch_is_imported(tmp_path):
    (tmp_path / "bad.yaml").write_text("name: bad\nsteps: 3\n")
    commands = [[name, "bad.yaml", *more] for name, more in SCHEDULED.items()]
    code = f"""
import sys
from nnunet_cil.cli.main import main
for command in {commands!r}:
    print(command[0], main(command), {{"torch", "nnunetv2", "scipy", "matplotlib"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{name} 1 set()" for name in SCHEDULED]
    assert done.stderr.count("error: bad.yaml: ") == len(SCHEDULED)


def test_a_missing_schedule_is_one_line_on_stderr(tmp_path, capsys):
    assert main(["run", str(tmp_path / "none.yaml")]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "none.yaml" in shown.err
    assert "Traceback" not in shown.err


def test_own_messages_reach_stderr_and_foreign_chatter_does_not():
    code = """
import logging
from nnunet_cil.cli.main import main
main(["env"])
logging.getLogger("nnunet_cil.driver").info("step 1 of 2")
logging.getLogger("matplotlib").info("font cache")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "step 1 of 2\n"
    assert done.stdout.startswith("export nnUNet_extTrainer=")


@pytest.fixture(autouse=True)
def restore_log_level():
    logger = logging.getLogger("nnunet_cil")
    level = logger.level
    yield
    logger.setLevel(level)


def test_sigterm_is_an_interrupt_in_the_command_and_none_of_its_worker_processes():
    code = """
import os, signal, time
from types import SimpleNamespace
from nnunet_cil.cli import main as cli

def run(_):
    for seconds in (0, 0, 0, 0.2):  # also before Python has set up the worker, when it forgets a handler's signals
        if (child := os.fork()) == 0:
            time.sleep(5)
            os._exit(0)
        time.sleep(seconds)
        os.kill(child, signal.SIGTERM)
        print("worker ended by signal", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)

cli.build_parser = lambda: SimpleNamespace(parse_args=lambda _: SimpleNamespace(debug=False, run=run))
raise SystemExit(cli.main([]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == 4 * "worker ended by signal -15\n"
    assert done.returncode == 130
    assert done.stderr == "Interrupted. The same command goes on from here.\n"
