"""Faults of disks, folders, names, clocks and people, in whole runs of a tiny chain."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.chains import FOLDERS, Kill, TinyChain, results, unreadable

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mounts disks and forks commands as Linux does")

ENOUGH_BYTES = 64 * 2**20
FULL_AT = (0.1, 0.3, 0.5, 0.7, 0.9)  # of what the chain needs


def mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


@contextmanager
def own_disk(folder: Path) -> Iterator[None]:
    """A folder on a disk of its own."""
    folder.mkdir()
    if not mount("-t", "tmpfs", "-o", f"size={ENOUGH_BYTES}", "tmpfs", str(folder)):
        pytest.skip("no file system can be mounted here: not root, or not allowed")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """Where a chain ran to which nothing happened."""
    root = tmp_path_factory.mktemp("undisturbed")
    chain = TinyChain(root)
    assert chain.types("run") == 0, chain.said()
    return root


@pytest.fixture(scope="module")
def expected(undisturbed) -> dict:
    return results(undisturbed)


def used_bytes(folder: Path) -> int:
    """On a disk of its own, to which images cannot be linked by hard links."""
    found = (path.stat() for path in folder.rglob("*") if "images" not in path.parent.name and path.is_file())
    return sum({s.st_ino: 512 * s.st_blocks for s in found}.values())


def check_goes_on(chain: TinyChain, expected: dict) -> None:
    assert chain.types("run") == 0, chain.said()
    assert results(chain.root) == expected
    assert unreadable(chain.root, ended=True) == []
    assert chain.types("verify") == 0, chain.said()


def one_error(chain: TinyChain) -> str:
    said = chain.said()
    assert said.count("nnunet-cil: error: ") == 1, said
    return said[said.index("nnunet-cil: error: ") :]


@pytest.mark.faults("full disk", "one error that names the full folder; with room, the same command goes on", "nothing")
@pytest.mark.parametrize("full", FOLDERS)
def test_a_full_disk(tmp_path, undisturbed, expected, full):
    needed = used_bytes(undisturbed / full)
    with own_disk(tmp_path / full):
        chain = TinyChain(tmp_path)
        for share in FULL_AT:
            assert mount("-o", f"remount,size={int(share * needed)}", str(tmp_path / full))
            assert chain.types("run") == 1, chain.said()
            assert f"{full}: {tmp_path / full} has 0." in one_error(chain)
            assert "Make room" in one_error(chain)
            assert unreadable(tmp_path, ended=False) == []
        assert mount("-o", f"remount,size={ENOUGH_BYTES}", str(tmp_path / full))
        check_goes_on(chain, expected)


@pytest.mark.faults("read-only results folder", "refused at once, before anything starts", "nothing")
def test_a_read_only_results_folder(tmp_path, expected):
    results_folder = tmp_path / "nnUNet_results"
    with own_disk(results_folder):
        chain = TinyChain(tmp_path)
        assert mount("-o", "remount,ro", str(results_folder))
        assert chain.types("run") == 1
        assert "Read-only file system" in one_error(chain)
        assert str(results_folder) in one_error(chain)
        assert not list((tmp_path / "nnUNet_raw").glob("*"))
        assert mount("-o", "remount,rw", str(results_folder))
        check_goes_on(chain, expected)


@pytest.mark.faults("folders with spaces and non-ASCII names", "as with any other name", "nothing")
def test_spaces_and_non_ascii_names(tmp_path, expected):
    root = tmp_path / "Größe 5 µm – 雪 'a\"b'"
    root.mkdir()
    chain = TinyChain(root, environment={"LC_ALL": "C"})
    check_goes_on(chain, expected)
    assert chain.types("report") == 0, chain.said()
    assert chain.types("audit") == 0, chain.said()


@pytest.mark.faults("symlinked folders", "followed", "nothing")
def test_symlinked_folders(tmp_path, expected):
    for name in FOLDERS:
        (tmp_path / "elsewhere" / name).mkdir(parents=True)
        (tmp_path / name).symlink_to(tmp_path / "elsewhere" / name)
    chain = TinyChain(tmp_path)
    (tmp_path / "source").rename(tmp_path / "elsewhere" / "source")
    (tmp_path / "source").symlink_to(tmp_path / "elsewhere" / "source")
    images = tmp_path / "elsewhere" / "images"
    (tmp_path / "elsewhere" / "source" / "imagesTr").rename(images)
    (tmp_path / "source" / "imagesTr").symlink_to(images)
    check_goes_on(chain, expected)


@pytest.mark.faults("clock that jumps", "nothing goes by time stamps: no file is made anew", "nothing")
def test_a_clock_that_jumps(tmp_path, expected):
    chain = TinyChain(tmp_path)
    assert chain.types("prepare") == 0, chain.said()
    set_times(tmp_path)
    check_goes_on(chain, expected)
    set_times(tmp_path)
    before = {path: path.stat() for path in files(tmp_path) if path.suffix in (".pth", ".npz", ".b2nd")}
    check_goes_on(chain, expected)
    after = {path: path.stat() for path in before}
    assert [(s.st_ino, s.st_mtime) for s in after.values()] == [(s.st_ino, s.st_mtime) for s in before.values()]
    assert chain.types("status") == 0
    assert chain.said().count("done") == 2


def set_times(root: Path) -> None:
    """Some files into 1990, some into 2090."""
    for number, path in enumerate(files(root)):
        seconds = (1990 + 100 * (number % 2) - 1970) * 31557600
        os.utime(path, (seconds, seconds))


def files(root: Path) -> list[Path]:
    return sorted(path for name in (*FOLDERS, "source") for path in (root / name).rglob("*") if path.is_file())


@pytest.mark.faults("vanished image", "refused by name; once it is back, the same command goes on", "nothing")
@pytest.mark.parametrize("where", ["source", "test set"])
def test_an_image_that_vanishes_after_the_preparation(tmp_path, expected, where):
    chain = TinyChain(tmp_path)
    assert chain.types("prepare") == 0, chain.said()
    folder = tmp_path / ("source/imagesTr" if where == "source" else "nnUNet_results/chain_tiny/test/images")
    image = folder / "case_4_0000.nii.gz"
    kept = shutil.copyfile(image, tmp_path / image.name)
    image.unlink()
    assert chain.types("run") == 1
    assert "case_4" in one_error(chain)
    shutil.copyfile(kept, image)
    check_goes_on(chain, expected)


@pytest.mark.faults("two runs at once", "the second is refused; the first ends as if alone", "nothing")
def test_two_runs_at_once(tmp_path, expected):
    chain = TinyChain(tmp_path)
    in_step_2 = Kill("nnunet_cil.pseudo_labels:PseudoLabelCache._add", 2)
    assert chain.types("run", kill=in_step_2) == -9, chain.said()  # so that one training is left for the two
    command = [Path(sys.executable).with_name("nnunet-cil"), "run", chain.schedule]
    with subprocess.Popen(command, env=chain.environment, stderr=subprocess.PIPE, text=True) as first:
        assert any(line.startswith("chain tiny in ") for line in iter(first.stderr.readline, ""))
        for each in ("run", "prepare"):
            assert chain.types(each) == 1
            assert "another nnunet-cil is working on" in one_error(chain)
        assert first.poll() is None, "the second came too late"
        said = first.communicate()[1]
        assert first.returncode == 0, said
    assert results(tmp_path) == expected
    check_goes_on(chain, expected)
