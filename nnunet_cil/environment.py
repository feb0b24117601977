"""Where nnU-Net finds our trainers: the variable ``nnUNet_extTrainer``, for one command or for every new shell."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "nnUNet_extTrainer"
_START, _END = "# >>> nnunet-cil >>>", "# <<< nnunet-cil <<<"
_BLOCK = re.compile(rf"\n[ \t]*{re.escape(_START)}(?:(?!{re.escape(_START)}).)*?{re.escape(_END)}", re.DOTALL)


def trainers_dir() -> Path:
    """Folder of the trainer files: ``nnunet_cil/trainers`` once installed, ``trainers`` beside it in a source tree.

    Raises:
        FileNotFoundError: neither holds nnUNetTrainerPGCD.py.
    """
    package = Path(__file__).absolute().parent
    for folder in (package / "trainers", package.parent / "trainers"):
        if (folder / "nnUNetTrainerPGCD.py").is_file():
            return folder
    raise FileNotFoundError(f"{package / 'trainers'}: got no trainers, expected nnUNetTrainer*.py. Install again.")


def trainer_path_variable() -> str:
    """Value for ``nnUNet_extTrainer``: our folder first and once, then the folders that are in it already."""
    own = trainers_dir()
    others = [part for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part and Path(part) != own]
    return os.pathsep.join([str(own), *others])


def export_line() -> str:
    """The line that sets ``nnUNet_extTrainer`` in a POSIX shell, quoted."""
    return f"export {VARIABLE}={shlex.quote(trainer_path_variable())}"


@dataclass(frozen=True)
class _Shell:
    """One shell: its activation script, the line in it that opens ``deactivate``, and what to run on and off.

    csh has no functions, its ``deactivate`` is a one-line alias: there the variable stays until the shell ends.
    """

    script: str
    suffix: str
    deactivate: str
    on: str
    off: str | None


_SHELLS = (
    _Shell(
        script="bin/activate",
        suffix=".sh",
        deactivate=r"^deactivate ?\(\) ?\{[ \t]*$",
        on="""\
case ":${{nnUNet_extTrainer:-}}:" in
    *:{folder}:*) ;;
    *)
        _OLD_NNUNET_EXTTRAINER="${{nnUNet_extTrainer:-}}"
        export nnUNet_extTrainer={folder}"${{nnUNet_extTrainer:+:$nnUNet_extTrainer}}"
        ;;
esac""",
        off="""\
if [ -n "${{_OLD_NNUNET_EXTTRAINER+set}}" ]; then
    export nnUNet_extTrainer="$_OLD_NNUNET_EXTTRAINER"
    [ -n "$nnUNet_extTrainer" ] || unset nnUNet_extTrainer
    unset _OLD_NNUNET_EXTTRAINER
fi""",
    ),
    _Shell(
        script="bin/activate.fish",
        suffix=".fish",
        deactivate=r"^function deactivate\b.*$",
        on="""\
if not contains -- {folder} (string split : -- "$nnUNet_extTrainer")
    set -g _OLD_NNUNET_EXTTRAINER "$nnUNet_extTrainer"
    set -gx nnUNet_extTrainer (string join : -- {folder} (string split --no-empty : -- "$nnUNet_extTrainer"))
end""",
        off="""\
if set -q _OLD_NNUNET_EXTTRAINER
    set -gx nnUNet_extTrainer "$_OLD_NNUNET_EXTTRAINER"
    test -n "$nnUNet_extTrainer"; or set -e nnUNet_extTrainer
    set -e _OLD_NNUNET_EXTTRAINER
end""",
    ),
    _Shell(
        script="bin/activate.csh",
        suffix=".csh",
        deactivate="",
        on="""\
if ( ! $?nnUNet_extTrainer ) then
    setenv nnUNet_extTrainer {folder}
else if ( ":${{nnUNet_extTrainer}}:" !~ *:{folder}:* ) then
    setenv nnUNet_extTrainer {folder}:"${{nnUNet_extTrainer}}"
endif""",
        off=None,
    ),
)


def persist(remove: bool = False) -> list[Path]:
    """Have the active environment set ``nnUNet_extTrainer`` on activation and restore it on deactivation, or undo that.

    A venv's activation scripts get a marked block; a conda environment gets scripts of ours in ``etc/conda``. Folders
    that are in the variable at activation stay in it. Doing it twice changes nothing, and ``remove`` restores every
    file byte for byte.

    Returns:
        The files that changed; none if all was as wanted.

    Raises:
        ValueError: no venv and no conda environment is active, or a marked block is damaged.
        FileNotFoundError: the venv has no activation script.
        PermissionError: a file or folder is read-only. Nothing is changed then.
    """
    if prefix := os.environ.get("VIRTUAL_ENV"):
        contents = _venv_contents(Path(prefix), remove)
    elif prefix := os.environ.get("CONDA_PREFIX"):
        contents = _conda_contents(Path(prefix), remove)
    else:
        raise ValueError(
            "VIRTUAL_ENV, CONDA_PREFIX: got neither, expected an active environment. Activate your venv or conda "
            f"environment, or put this line into your shell's start-up file:\n  {export_line()}"
        )
    changes = {path: wanted for path, wanted in contents.items() if wanted != _read(path)}
    for path in changes:
        _check_writable(path)
    for path, wanted in changes.items():
        _replace(path, wanted)
    return list(changes)


def _venv_contents(prefix: Path, remove: bool) -> dict[Path, bytes | None]:
    scripts = {shell: (prefix / shell.script).resolve() for shell in _SHELLS}
    found = {shell: path for shell, path in scripts.items() if path.is_file()}
    if not found:
        raise FileNotFoundError(f"{prefix / 'bin' / 'activate'}: got no activation script, expected one of a venv.")
    return {path: _with_blocks(path, shell, remove) for shell, path in found.items()}


def _conda_contents(prefix: Path, remove: bool) -> dict[Path, bytes | None]:
    folder = prefix / "etc" / "conda"
    return {
        folder / f"{event}.d" / f"nnunet_cil{shell.suffix}": None if remove else f"{_filled(text)}\n".encode()
        for shell in _SHELLS
        for event, text in (("activate", shell.on), ("deactivate", shell.off))
        if text
    }


def _filled(text: str) -> str:
    return text.format(folder=shlex.quote(str(trainers_dir())))


def _with_blocks(path: Path, shell: _Shell, remove: bool) -> bytes:
    text = _BLOCK.sub("", _read(path).decode(errors="surrogateescape"))
    if _START in text or _END in text:
        raise ValueError(f"{path}: got half a block of nnunet-cil, expected {_START} ... {_END}. Delete its lines.")
    if not remove:
        text = _insert(text, len(text) - text.endswith("\n"), _filled(shell.on))
        if shell.off and (opening := re.search(shell.deactivate, text, re.MULTILINE)):
            text = _insert(text, opening.end(), _filled(shell.off), indent="    ")
    return text.encode(errors="surrogateescape")


def _insert(text: str, position: int, body: str, indent: str = "") -> str:
    block = "".join(f"\n{indent}{line}" for line in (_START, *body.split("\n"), _END))
    return text[:position] + block + text[position:]


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _check_writable(path: Path) -> None:
    nearest = next(folder for folder in path.parents if folder.exists())
    for place in (path, nearest):
        if place.exists() and not (place.stat().st_mode & stat.S_IWUSR and os.access(place, os.W_OK)):
            raise PermissionError(f"{place}: got a read-only place, expected one that can be changed. chmod u+w it.")


def _replace(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.nnunet_cil.tmp")
    try:
        beside.write_bytes(content)
        if path.exists():
            shutil.copymode(path, beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
