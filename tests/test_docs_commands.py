"""Every block of commands in README and docs is parsed by the programs that it names, and run on made-up data.

A page is a session: its blocks run in their order in one shell, in a folder that has what the page takes for given.
Files that a page shows, in blocks that begin with ``# NAME.yaml`` or the like, lie in that folder. Trainings are short:
see `quick_command`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points, metadata
from pathlib import Path

import pytest
import torch

from nnunet_cil.cli.main import build_parser
from nnunet_cil.phantom import LABELS, write_phantom
from tests import shell
from tests.convert.made_up import MAKERS
from tests.pages import PAGES, ROOT, Block, blocks, text_of

LANGUAGES = {"bash", "yaml", "json", "csv", "python", "text"}
COMMANDS = [block for page in PAGES for block in blocks(page, "bash")]
BIN = Path(sys.executable).parent

ONLY_PARSED = {  # by the first line of the block
    "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/nnunet-cil demo": "installs: .ci/run does, too",
    "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest": "installs: .ci/run does, too",
    "python3 -m venv .venv && . .venv/bin/activate": "installs: .ci/run does, too",
    "nnunet-cil compare examples/hippocampus.yaml --methods pgcd finetune --seeds 0 1 2": "takes an hour",
    "nnunet-cil compare examples/chaos_2-2.yaml --seeds 0 1 2 \\": "needs a public set, takes hours",
    "nnunet-cil compare examples/hippocampus_long.yaml --methods pgcd pseudo_kd joint": "takes an hour",
    "nnunet-cil compare examples/chaos_2-2_long.yaml --methods pgcd pseudo_kd joint --seeds 0 1 2": "takes hours",
    "nnunet-cil compare examples/hippocampus_methods.yaml \\": "needs a public set, takes hours",
    "nnunet-cil compare examples/chaos_1-1-1-1.yaml --methods pgcd pseudo_kd pseudo joint --seeds 0 1 2": "takes days",
    "nnunet-cil compare examples/openkbp_3-2-2.yaml --methods pgcd pseudo_kd pseudo joint --seeds 0 1 2": "takes a day",
    "nnunet-cil ablate examples/chaos_ablation.yaml": "needs a public set, takes hours",
    "nnunet-cil compare abdomen.yaml --launcher slurm": "needs a Slurm: test_launcher.py starts one",
    "nnunet-cil run plans/btcv_4-4.yaml": "needs a public set, takes days; convert/test_plans.py loads the schedule",
}


# Parsing

SHELL = {"export", "eval", "cd", "."}


def commands(text: str) -> Iterator[list[str]]:
    """Each command of a block as words, without assignments before it; those within ``$(...)`` too."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            for inner in re.findall(r"\$\((.*)\)", word):
                yield from commands(inner)
            if not re.fullmatch("[;&|]+", word):
                if command or not re.match(r"\w+=", word):
                    command.append(word)
            elif command:
                yield command
                command = []


class ParsedError(Exception):
    """Ends a program of nnU-Net once it has taken its arguments."""


def parse_nnunet(program: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (entry,) = entry_points(group="console_scripts", name=program)
    whole = sys.modules["argparse"].ArgumentParser.parse_args

    def parse(parser, *_):
        whole(parser, arguments)
        raise ParsedError

    monkeypatch.setattr("argparse.ArgumentParser.parse_args", parse)
    monkeypatch.setattr("sys.argv", [program, *arguments])
    with pytest.raises(ParsedError):
        entry.load()()
    monkeypatch.undo()


def test_every_block_is_of_a_known_language():
    for page in PAGES:
        found = blocks(page)
        assert 2 * len(found) == text_of(page).count("```"), f"{page.name}: a block that is indented or has no end"
        assert [str(block) for block in found if block.language not in LANGUAGES] == []


@pytest.mark.parametrize("block", COMMANDS, ids=str)
def test_programs_take_their_arguments(block, monkeypatch):
    found = list(commands(block.text))
    assert found
    for program, *arguments in found:
        name = Path(program).name or program
        if name == "nnunet-cil":
            build_parser().parse_args(arguments)
        elif name.startswith("nnUNetv2_"):
            parse_nnunet(name, arguments, monkeypatch)
        elif name == "pip":
            extras = re.findall(r"\[(\w+)\]", " ".join(arguments))
            assert arguments[:2] == ["install", "-e"]
            assert set(extras) <= set(metadata("nnunet-cil").get_all("Provides-Extra"))
        else:
            assert name in SHELL or [name, *arguments] in (["pytest"], ["python3", "-m", "venv", ".venv"]), block.text


def test_what_is_only_parsed_is_there():
    assert set(ONLY_PARSED) == {block.title for block in COMMANDS} & set(ONLY_PARSED)


# Running


class User:
    """Somebody with a shell, nnU-Net's three folders and programs that train for two iterations."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {
            k: v for k, v in os.environ.items() if not k.startswith(("nnUNet_", "VIRTUAL_ENV", "CONDA"))
        }
        self.environment |= {name: str(root / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        self.environment |= {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "2", "HOME": str(root)}
        self.environment["PATH"] = f"{root / 'bin'}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}"
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "bin"):
            (root / name).mkdir(exist_ok=True)
        lines = {"nnunet-cil": f'"{sys.executable}" "{ROOT / "tests" / "quick_command.py"}" "$@"'}
        on_cpu = "" if torch.cuda.is_available() else "-device cpu"
        for program in ("nnUNetv2_train", "nnUNetv2_predict", "nnUNetv2_predict_from_modelfolder"):
            lines[program] = f'"{BIN / program}" "$@" {on_cpu}'
        for program, line in lines.items():
            (root / "bin" / program).write_text(f"#!/bin/sh\nexec {line}\n")
            (root / "bin" / program).chmod(0o755)

    def types(self, script: str) -> str:
        """What a new shell prints for a script, each command of which has to end with status 0."""
        done = shell.run(["bash", "-e", "-c", script], self.root, self.environment, seconds=1200)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def phantom(self, name: str, n_train: int = 4, n_test: int = 1, **labels: int) -> Path:
        """A raw dataset of made-up abdomens, whose labels may get other names."""
        folder = self.root / "nnUNet_raw" / name
        write_phantom(folder, n_train, n_test, seed=int(name[7:10]), shape=(16, 32, 40))
        content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        content["labels"] = {"background": 0, **labels} if labels else dict(LABELS)
        (folder / "dataset.json").write_text(json.dumps(content))
        return folder


SCHEDULE = """
name: abdomen
source: Dataset111_Abdomen
images: disjoint
test: split.json
steps:
  - [liver, spleen]
  - [right_kidney, left_kidney]
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> User:
    """Ran a chain of two steps to its end, and gave its last model away."""
    user = User(tmp_path_factory.mktemp("trained"))
    user.phantom("Dataset111_Abdomen")
    (user.root / "abdomen.yaml").write_text(SCHEDULE)
    user.types("nnunet-cil run abdomen.yaml && nnunet-cil export abdomen.yaml exported")
    return user


@pytest.fixture
def user(tmp_path) -> User:
    return User(tmp_path)


def like(trained: User, user: User) -> None:
    """Give a user all that another one has."""
    shutil.copytree(trained.root, user.root, dirs_exist_ok=True, symlinks=True, ignore=shutil.ignore_patterns("bin"))


MODEL = "nnUNetTrainer__nnUNetPlans__3d_fullres"


def readme(user: User, trained: User) -> dict[str, str]:
    user.phantom("Dataset111_Abdomen")
    images = user.phantom("Dataset222_Pancreas", pancreas=1, spleen=2, cyst=3, stone=4) / "imagesTr"
    (given,) = trained.root.glob(f"exported/*/{MODEL}")
    shutil.copytree(given, user.root / "nnUNet_results" / "Dataset001_X" / MODEL)
    return {"IMAGES": str(images)}


def datasets(user: User, trained: User) -> dict[str, str]:
    for make in MAKERS.values():
        make(user.root)
    return {}


def developing(user: User, trained: User) -> dict[str, str]:
    user.phantom("Dataset111_Abdomen")
    return {}


def quickstart(user: User, trained: User) -> dict[str, str]:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        del user.environment[name]  # the page sets them
        (user.root / name).rmdir()
    return {}


def extend(user: User, trained: User) -> dict[str, str]:
    images = user.phantom("Dataset222_Pancreas", pancreas=1, duct=2, liver=3, cyst=4) / "imagesTr"
    user.phantom("Dataset223_Test", 2, 0, liver=1, spleen=2, pancreas=3, left_kidney=4)
    user.phantom("Dataset224_Duodenum", duodenum=1, jejunum=2, ileum=3, colon=4)
    shutil.copy(trained.root / "exported.zip", user.root / "abdomen.zip")
    (given,) = trained.root.glob(f"exported/*/{MODEL}")
    shutil.copytree(given, user.root / "nnUNet_results" / "Dataset007_Abdomen" / MODEL)
    return {"IMAGES": str(images)}


def chain_elsewhere(user: User) -> None:
    there = user.root / "elsewhere" / "chain_abdomen"
    shutil.copytree(user.root / "nnUNet_results" / "chain_abdomen", there, symlinks=True)


def cluster(user: User, trained: User) -> dict[str, str]:
    like(trained, user)
    chain_elsewhere(user)
    return {}


def schedule(user: User, trained: User) -> dict[str, str]:
    like(trained, user)
    user.phantom("Dataset222_Pancreas", pancreas=1, spleen=2, cyst=3, stone=4)
    chain_elsewhere(user)
    words = {"SCHEDULE": "abdomen.yaml", "MODEL": "exported.zip", "DATASET": "222", "NAME=LABEL": "pancreas=1"}
    return words | {"TARGET": "target", "FOLDER": "elsewhere/chain_abdomen"}


def privacy(user: User, trained: User) -> dict[str, str]:
    like(trained, user)
    return {"SCHEDULE": "abdomen.yaml"}


def reliability(user: User, trained: User) -> dict[str, str]:
    like(trained, user)
    shutil.copy(user.root / "abdomen.yaml", user.root / "schedule.yaml")
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        shutil.copytree(user.root / name, user.root / "elsewhere" / name, symlinks=True)
    return {"/elsewhere": "elsewhere"}


# By page: makes what the page takes for given, and returns what stands for the words that readers replace.
SESSIONS: dict[str, Callable[[User, User], dict[str, str]]] = {
    "README.md": readme,
    "cluster.md": cluster,
    "datasets.md": datasets,
    "developing.md": developing,
    "extend.md": extend,
    "privacy.md": privacy,
    "quickstart.md": quickstart,
    "reliability.md": reliability,
    "schedule.md": schedule,
}


def named_files(page: Path) -> dict[str, Block]:
    """Blocks of a page that are files, by name."""
    found = {re.match(r"# ([\w/-]+\.\w+)$", block.title): block for block in blocks(page, "yaml", "python")}
    return {match[1]: block for match, block in found.items() if match}


def to_run(page: Path) -> list[Block]:
    return [block for block in blocks(page, "bash") if block.title not in ONLY_PARSED]


def test_every_page_with_commands_is_a_session():
    assert {page.name for page in PAGES if to_run(page)} == set(SESSIONS)


def test_files_that_a_page_shows_are_used_in_its_commands():
    for page in PAGES:
        text = "\n".join(block.text for block in to_run(page))
        assert [name for name in named_files(page) if name.split("/")[0] not in text] == []
        if page.name != "schedule.md":  # test_docs_schedule.py loads its examples
            assert len(named_files(page)) == len(blocks(page, "yaml", "python")), f"{page.name}: a file without a name"


@pytest.mark.slow
@pytest.mark.chain
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("page", [page for page in PAGES if page.name in SESSIONS], ids=lambda page: page.name)
def test_commands_of_a_page_run(page, user, trained):
    replaced = SESSIONS[page.name](user, trained)
    for name, block in named_files(page).items():
        (user.root / name).parent.mkdir(exist_ok=True)
        (user.root / name).write_text(block.text)
    script = "\n".join(f"echo '### {block}' >&2\n{block.text}" for block in to_run(page))
    for word, value in replaced.items():
        script = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", value, script)
    user.types(script)
