"""Checkpoints are read bit for bit, and nothing in one is run."""

from __future__ import annotations

import os
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_cil import nnunet_api
from nnunet_cil.checkpoint import read_checkpoint
from nnunet_cil.evaluate import count_parameters
from nnunet_cil.teacher import load_teacher
from tests.fuzz.test_files import Hostile, write_given
from tests.test_exact_resume import equal
from tests.test_trainer import fold_of, make_chain, module_patch, trainer_of  # noqa: F401  (a fixture)

WEIGHTS = {"decoder.weight": torch.arange(6.0).reshape(2, 3)}


def like_nnunets() -> dict:
    """What nnU-Net and our trainer store, in kind."""
    numbers = [dtype(1.5) for dtype in (np.float16, np.float32, np.float64)]
    numbers += [dtype(1) for dtype in (np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint64)]
    return {
        "network_weights": dict(WEIGHTS),
        "optimizer_state": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.01}]},
        "grad_scaler_state": None,
        "logging": {"numbers": numbers, "dice": [[np.float64(0.1)], [np.float64("nan")]], "lrs": [0.01]},
        "_best_ema": np.float64(0.25),
        "init_args": {"device": torch.device("cuda", 0), "fold": "all", "plans": {"a": [1, None, "é"]}},
        "cil": {
            "random": {
                "python": random.getstate(),
                "numpy": np.random.get_state(),
                "torch": torch.get_rng_state(),
            },
            "arrays": [np.arange(6, dtype=">i4").reshape(2, 3, order="F"), np.zeros((0, 2)), np.array(3.0)],
        },
    }


def same(a, b) -> bool:
    """Equal, and every number of the same type."""
    if isinstance(a, np.ndarray):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.generic):
        return type(a) is type(b) and a.tobytes() == b.tobytes()
    return equal(a, b)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("numpy_core", ["numpy._core", "numpy.core"])
def test_everything_that_training_stores_is_read(tmp_path, mapped, numpy_core):
    """Also what was written with NumPy 1, whose functions have other names."""
    path = tmp_path / "a.pth"
    torch.save(like_nnunets(), path)
    written = torch.load(path, weights_only=False)
    with zipfile.ZipFile(path) as zipped:
        entries = {name: zipped.read(name) for name in zipped.namelist()}
    pickled = next(name for name in entries if name.endswith("data.pkl"))
    assert numpy_core == "numpy.core" or b"numpy._core" in entries[pickled] or np.__version__ < "2"
    entries[pickled] = entries[pickled].replace(b"cnumpy._core.", f"c{numpy_core}.".encode())
    with zipfile.ZipFile(path, "w") as zipped:
        for name, content in entries.items():
            zipped.writestr(name, content)
    read = read_checkpoint(path, mapped=mapped and numpy_core == "numpy._core")
    assert same(written, read)
    before = np.random.get_state()[1].tolist()
    np.random.set_state(read["cil"]["random"]["numpy"])
    assert np.random.get_state()[1].tolist() == before


def test_what_was_read_can_be_stored_again_for_stock_nnunet(tmp_path):
    torch.save(like_nnunets(), tmp_path / "a.pth")
    torch.save(read_checkpoint(tmp_path / "a.pth"), tmp_path / "b.pth")
    again = torch.load(tmp_path / "b.pth", weights_only=False)
    assert same(like_nnunets()["logging"], again["logging"])
    assert {type(array) for array in again["cil"]["arrays"]} == {np.ndarray}


class Flagged:
    """A type of float64 whose state says that its bytes are pointers to objects: NumPy's own function takes it."""

    def __reduce__(self) -> tuple:
        return np.dtype, ("f8", False, True), (3, "<", None, None, None, -1, -1, 63)


class Pointers:
    """An array of it, whose items would be objects at any address."""

    def __reduce__(self) -> tuple:
        make, arguments, _ = np.zeros(0).__reduce__()
        return make, arguments, (1, (1,), Flagged(), False, bytes(8))


class Addresses:
    """An array of objects at addresses that stand in its buffer, here at none."""

    def __reduce__(self) -> tuple:
        return np.ndarray, ((1,), "O", bytes(8))


@pytest.mark.parametrize("kind", [Flagged, Pointers, Addresses])
def test_bytes_do_not_become_pointers_where_nnunet_unpickles_the_file_afterwards(tmp_path, kind):
    torch.save({"network_weights": WEIGHTS, "a": kind()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="holds code, which is not run"):
        read_checkpoint(tmp_path / "a.pth")
    if kind is Addresses:
        array = torch.load(tmp_path / "a.pth", weights_only=False)["a"]
        assert array.dtype.hasobject, "NumPy itself makes them"


REFUSED = {
    "an object": lambda folder: Path("x"),
    "array of objects": lambda folder: np.array([None], dtype=object),
    "structured array": lambda folder: np.zeros(1, dtype=[("a", "f8")]),
    "text array": lambda folder: np.array(["a"]),
    "time": lambda folder: np.datetime64("2020-01-01"),
    "a function": lambda folder: os.mkdir,
    "a call": lambda folder: Hostile(folder / "written"),
    "a call within": lambda folder: {"a": [1, (Hostile(folder / "written"),)]},
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("key", ["cil", "network_weights"])
def test_anything_else_is_refused_and_not_run(tmp_path, kind, key):
    torch.save({"network_weights": WEIGHTS, key: REFUSED[kind](tmp_path)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="holds code, which is not run"):
        read_checkpoint(tmp_path / "a.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
    if "call" in kind:
        torch.load(tmp_path / "a.pth", weights_only=False)
        assert (tmp_path / "written").is_dir(), "without the restriction it runs"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"text", "cannot be read"),
        ([1], "got no network_weights"),
        ({"weights": WEIGHTS}, "got no network_weights"),
        ({"network_weights": {}}, "got no network_weights"),
        ({"network_weights": {"a": 1}}, "whose 'a' is no tensor"),
        ({"network_weights": {1: torch.ones(1)}}, "whose 1 is no tensor"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, content, message):
    path = tmp_path / "a.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="expected a checkpoint"):
        read_checkpoint(tmp_path / "b.pth")


def repack(path: Path, packing: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as zipped:
        entries = {name: zipped.read(name) for name in zipped.namelist()}
    with zipfile.ZipFile(path, "w", packing) as zipped:
        for name, content in entries.items():
            zipped.writestr(name, content)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_small_file_that_takes_much_memory_is_refused(tmp_path, mapped):
    path = tmp_path / "a.pth"
    torch.save({"network_weights": {"a": torch.zeros(10**6)}}, path)
    repack(path)
    assert read_checkpoint(path, mapped)["network_weights"]["a"].numel() == 10**6
    repack(path, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**4
    with pytest.raises(ValueError, match="a zip that is packed as PyTorch packs none"):
        read_checkpoint(path, mapped)


def test_a_zip_that_two_readers_take_for_different_ones_is_refused(tmp_path):
    for name in ("a.pth", "b.pth"):
        torch.save({"network_weights": WEIGHTS}, tmp_path / name)
    with (tmp_path / "a.pth").open("ab") as file:
        file.write((tmp_path / "b.pth").read_bytes())
    with pytest.raises(ValueError, match="a zip that is packed as PyTorch packs none"):
        read_checkpoint(tmp_path / "a.pth")


def test_the_older_format_of_pytorch_is_read(tmp_path):
    torch.save({"network_weights": WEIGHTS}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert same(read_checkpoint(tmp_path / "a.pth"), {"network_weights": WEIGHTS})


def make_hostile(path: Path, written: Path) -> None:
    """A checkpoint that is one in all else."""
    content = torch.load(path, weights_only=True)
    torch.save({**content, "cil": Hostile(written)}, path)


def test_nothing_that_reads_a_model_runs_it(tmp_path):
    """The teacher, the number of parameters, and prediction, where nnU-Net itself unpickles."""
    model, written = write_given(tmp_path), tmp_path / "written"
    path = model / "fold_all" / "checkpoint_final.pth"
    assert count_parameters(path) > 0
    assert load_teacher(model, "all", path.name, torch.device("cpu")).class_names == ("liver",)
    make_hostile(path, written)
    for read in (
        lambda: load_teacher(model, "all", path.name, torch.device("cpu")),
        lambda: count_parameters(path),
        lambda: nnunet_api.predict(model, ["all"], "3d_fullres", {}, tmp_path, tmp_path / "out", torch.device("cpu")),
    ):
        with pytest.raises(ValueError, match="holds code, which is not run"):
            read()
    assert not written.exists()


@pytest.mark.parametrize("key", ["init_args", "network_weights", "trainer_name"])
@pytest.mark.parametrize("instead", [torch.ones(3), [], "text", None, 7, {"configuration": [1]}])
def test_a_checkpoint_with_something_else_in_a_place_is_refused_in_words(tmp_path, key, instead):
    model = write_given(tmp_path)
    path = model / "fold_all" / "checkpoint_final.pth"
    torch.save({**torch.load(path, weights_only=True), key: instead}, path)
    with pytest.raises(ValueError, match=r"^teacher: got|checkpoint_final.pth: got"):
        load_teacher(model, "all", path.name, torch.device("cpu"))


def test_no_training_goes_on_from_it(tmp_path, module_patch):  # noqa: F811
    chain = make_chain(tmp_path, module_patch, methods=("pgcd",))
    folder = fold_of(chain, 1)
    folder.mkdir(parents=True)
    torch.save({"network_weights": WEIGHTS, "cil": Hostile(tmp_path / "written")}, folder / "checkpoint_latest.pth")
    with pytest.raises(ValueError, match="holds code, which is not run"):
        trainer_of(chain, 1, resume=True)
    assert not (tmp_path / "written").exists()
