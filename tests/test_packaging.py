import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("nnunet_cil", "trainers", "plans", "setup.py", "pyproject.toml", "LICENSE", "README.md")
TRAINERS = sorted(path for path in (ROOT / "trainers").iterdir() if path.name != "__pycache__")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of the tree, built from a copy so that no build folder is left in it."""
    if find_spec("pip") is None or find_spec("setuptools") is None:
        pytest.skip("pip and setuptools are needed to build a wheel")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).is_file():
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "-w", str(out), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("nnunet_cil-*.whl"))


def test_trainers_holds_nothing_but_trainers():
    assert TRAINERS
    assert [
        path.name for path in TRAINERS if not (path.name.startswith("nnUNetTrainer") and path.suffix == ".py")
    ] == []


@pytest.mark.parametrize("path", TRAINERS, ids=lambda path: path.stem)
def test_trainer_files_are_short_and_define_their_class(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 20
    assert f"class {path.stem}(" in text


def test_wheel_holds_all_modules_trainers_and_plans(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("nnunet_cil/")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "nnunet_cil").rglob("*.py")}
    trainers = {f"nnunet_cil/trainers/{path.name}" for path in TRAINERS}
    plans = {f"nnunet_cil/plans/{path.name}" for path in (ROOT / "plans").glob("*.yaml")}
    assert plans
    assert names == modules | trainers | plans


def test_wheel_says_what_it_needs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        texts = {Path(name).name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    metadata = texts["METADATA"].splitlines()
    assert "Name: nnunet-cil" in metadata
    assert "Requires-Python: <3.14,>=3.10" in metadata
    assert "Requires-Dist: nnunetv2<2.9,>=2.8.1" in metadata
    assert "nnunet-cil = nnunet_cil.cli.main:main" in texts["entry_points.txt"]
    assert "Apache License" in texts["LICENSE"]


def test_unpacked_wheel_works_from_another_folder(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path / "installed")!r})
from nnunet_cil.environment import trainers_dir
from nnunet_cil.trainers import nnUNetTrainerPGCD
print(trainers_dir())
print(nnUNetTrainerPGCD.__file__)
"""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=elsewhere, capture_output=True, text=True, check=True)
    folder = tmp_path / "installed" / "nnunet_cil" / "trainers"
    assert done.stdout.splitlines() == [str(folder), str(folder / "nnUNetTrainerPGCD.py")]
