import os
import shlex
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

from nnunet_cil import environment
from nnunet_cil.cli.main import main
from nnunet_cil.environment import VARIABLE, export_line, persist, trainer_path_variable, trainers_dir

SCRIPTS = ("bin/activate", "bin/activate.fish", "bin/activate.csh")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in (VARIABLE, "VIRTUAL_ENV", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def trainers(tmp_path, monkeypatch) -> Path:
    """A trainers folder whose name needs quoting in every shell."""
    folder = tmp_path / "it's a $HOME" / "trainers"
    folder.mkdir(parents=True)
    monkeypatch.setattr(environment, "trainers_dir", lambda: folder)
    return folder


@pytest.fixture
def active_venv(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "active venv"
    venv.create(folder, with_pip=False)
    monkeypatch.setenv("VIRTUAL_ENV", str(folder))
    return folder


@pytest.fixture
def active_conda(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "conda"
    folder.mkdir()
    monkeypatch.setenv("CONDA_PREFIX", str(folder))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shell(program: list[str], script: str, **variables: str) -> list[str]:
    """Lines that the script prints; the shell sees no variables of ours but those given. Skips an absent shell."""
    if shutil.which(program[0]) is None:
        pytest.skip(f"{program[0]} is not installed")
    clean = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    done = subprocess.run([*program, script], env=clean | variables, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_trainers_dir_holds_the_trainers():
    assert trainers_dir().is_absolute()
    assert (trainers_dir() / "nnUNetTrainerPGCD.py").is_file()


def test_trainers_dir_names_the_missing_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "nnunet_cil" / "environment.py"))
    with pytest.raises(FileNotFoundError, match="nnunet_cil/trainers: got no trainers"):
        trainers_dir()


def test_variable_keeps_other_folders_and_has_ours_once(trainers, monkeypatch):
    assert trainer_path_variable() == str(trainers)
    monkeypatch.setenv(VARIABLE, os.pathsep.join(["/mine", f"{trainers}/", "", "/theirs", str(trainers)]))
    assert trainer_path_variable().split(os.pathsep) == [str(trainers), "/mine", "/theirs"]


def test_command_prints_a_line_that_a_shell_understands(trainers, capsys):
    assert main(["env"]) == 0
    line = capsys.readouterr().out.strip()
    assert line == export_line()
    assert shell(["sh", "-c"], f'{line}; echo "$nnUNet_extTrainer"') == [str(trainers)]


def test_persist_twice_is_once_and_remove_restores_every_byte(trainers, active_venv):
    before = contents(active_venv)
    changed = persist()
    assert changed == [active_venv / script for script in SCRIPTS]
    after = contents(active_venv)
    assert {name for name in after if after[name] != before[name]} == set(SCRIPTS)
    assert persist() == []
    assert contents(active_venv) == after
    assert persist(remove=True) == changed
    assert contents(active_venv) == before
    assert persist(remove=True) == []


def test_persist_follows_a_moved_package(trainers, active_venv, monkeypatch):
    persist()
    monkeypatch.setattr(environment, "trainers_dir", lambda: Path("/elsewhere/trainers"))
    persist()
    text = (active_venv / "bin" / "activate").read_text(encoding="utf-8")
    assert "/elsewhere/trainers" in text
    assert shlex.quote(str(trainers)) not in text


@pytest.mark.parametrize("original", [b"", b"echo no newline at the end", b"\xff\r\n\n\n", b"deactivate () {\n:\n}\n"])
def test_remove_restores_odd_scripts(trainers, active_venv, original):
    script = active_venv / "bin" / "activate"
    script.write_bytes(original)
    script.chmod(0o750)
    persist()
    assert script.read_bytes() != original
    assert script.stat().st_mode & 0o777 == 0o750
    persist(remove=True)
    assert script.read_bytes() == original


def test_remove_keeps_what_the_user_added_since(trainers, active_venv):
    script = active_venv / "bin" / "activate"
    before = script.read_bytes()
    persist()
    script.write_bytes(script.read_bytes() + b"export MINE=1\n")
    persist(remove=True)
    assert script.read_bytes() == before + b"export MINE=1\n"


@pytest.mark.parametrize("program", [["bash", "-c"], ["dash", "-c"], ["zsh", "-c"]])
@pytest.mark.parametrize("before", ["", "/mine"])
def test_activation_and_deactivation_in_posix_shells(trainers, active_venv, program, before):
    persist()
    activate = f". {shlex.quote(str(active_venv / 'bin' / 'activate'))}"
    show = 'echo "${nnUNet_extTrainer-unset}"'
    lines = shell(
        program,
        f"{activate}; {show}; {activate}; {show}; deactivate; {show}",
        **({VARIABLE: before} if before else {}),
    )
    within = f"{trainers}:{before}" if before else str(trainers)
    assert lines == [within, within, before or "unset"]


@pytest.mark.parametrize("before", ["", "/mine:/theirs"])
def test_activation_and_deactivation_in_fish(trainers, active_venv, before):
    persist()
    activate = f"source {shlex.quote(str(active_venv / 'bin' / 'activate.fish'))}"
    show = 'set -q nnUNet_extTrainer; and echo "$nnUNet_extTrainer"; or echo unset'
    lines = shell(
        ["fish", "-c"],
        f"{activate}; {show}; {activate}; {show}; deactivate; {show}",
        **({VARIABLE: before} if before else {}),
    )
    within = f"{trainers}:{before}" if before else str(trainers)
    assert lines == [within, within, before or "unset"]


@pytest.mark.parametrize("before", ["", "/mine"])
def test_activation_in_tcsh(trainers, active_venv, before):
    persist()
    activate = f"source {shlex.quote(str(active_venv / 'bin' / 'activate.csh'))}"
    lines = shell(
        ["tcsh", "-f", "-c"],
        f'set prompt = ""; {activate}; echo "$nnUNet_extTrainer"; {activate}; echo "$nnUNet_extTrainer"',
        **({VARIABLE: before} if before else {}),
    )
    within = f"{trainers}:{before}" if before else str(trainers)
    assert lines == [within, within]


def test_conda_scripts_switch_on_and_off_and_go(trainers, active_conda):
    changed = persist()
    assert persist() == []
    assert active_conda / "etc" / "conda" / "activate.d" / "nnunet_cil.sh" in changed
    on, off = (
        f". {shlex.quote(str(active_conda / 'etc' / 'conda' / f'{event}.d' / 'nnunet_cil.sh'))}"
        for event in ("activate", "deactivate")
    )
    show = 'echo "${nnUNet_extTrainer-unset}"'
    assert shell(["sh", "-c"], f"{on}; {show}; {off}; {show}") == [str(trainers), "unset"]
    assert shell(["sh", "-c"], f"{on}; {show}; {off}; {show}", nnUNet_extTrainer="/mine") == [
        f"{trainers}:/mine",
        "/mine",
    ]
    assert persist(remove=True) == changed
    assert contents(active_conda) == {}


def test_a_venv_goes_before_conda(trainers, active_conda, active_venv):
    persist()
    assert contents(active_conda) == {}
    assert str(trainers.name) in (active_venv / "bin" / "activate").read_text(encoding="utf-8")


def test_no_active_environment_is_an_error(trainers, capsys):
    assert main(["env", "--persist"]) == 1
    assert "nnunet-cil: error: VIRTUAL_ENV, CONDA_PREFIX: got neither" in capsys.readouterr().err


def test_a_folder_that_is_no_venv_is_an_error(trainers, tmp_path, monkeypatch):
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="got no activation script"):
        persist()


@pytest.mark.parametrize("place", ["bin/activate.csh", "bin"])
def test_read_only_is_an_error_and_changes_nothing(trainers, active_venv, place):
    before = contents(active_venv)
    mode = (active_venv / place).stat().st_mode
    (active_venv / place).chmod(mode & ~0o222)
    try:
        with pytest.raises(PermissionError, match="got a read-only place"):
            persist()
    finally:
        (active_venv / place).chmod(mode)
    assert contents(active_venv) == before


def test_half_a_block_is_an_error(trainers, active_venv):
    persist()
    script = active_venv / "bin" / "activate"
    damaged = script.read_bytes().replace(b"# <<< nnunet-cil <<<", b"", 1)
    script.write_bytes(damaged)
    with pytest.raises(ValueError, match="got half a block"):
        persist(remove=True)
    assert script.read_bytes() == damaged


def test_a_failed_write_leaves_the_script_whole(trainers, active_venv, monkeypatch):
    before = contents(active_venv)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(environment.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        persist()
    assert contents(active_venv) == before
