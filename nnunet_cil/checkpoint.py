"""nnU-Net's checkpoints, read without running anything in them.

A checkpoint is a pickle, which can call any function when it is loaded. PyTorch's restricted unpickler knows tensors,
plain containers and numbers, but not NumPy's numbers, which nnU-Net's logs hold. Its advice is to allow NumPy's own
functions; but ``numpy.dtype`` takes flags from a pickle that let bytes be used as pointers, and so does
``numpy.ndarray``, called with a buffer. So these names lead to functions of ours here, which know numbers and arrays of
numbers, and refuse what would be more to NumPy's own, as nnU-Net unpickles the same file afterwards.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

_NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_PLAIN = (3, None, None, None, -1, -1, 0)
"""State of the type of a number, without its byte order."""


class _NumberType:
    """In place of ``numpy.dtype``."""

    def __init__(self, code: str, *_: Any) -> None:
        if code not in _NUMBERS:
            raise UnpicklingError(f"NumPy's type {code!r}, which is no number")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if (*state[:1], *state[2:]) != _PLAIN:
            raise UnpicklingError(f"NumPy's type {self.dtype.str!r} with fields or flags, which is no number")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """In place of ``numpy.ndarray``."""

    def __new__(cls) -> _Array:
        return np.empty(0, np.uint8).view(cls)

    def __setstate__(self, state: tuple) -> None:
        version, shape, number_type, is_fortran, data = state
        super().__setstate__((version, shape, number_type.dtype, is_fortran, data))

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.view(np.ndarray).__reduce_ex__(protocol)


def _number(number_type: _NumberType, data: bytes) -> Any:
    """In place of ``numpy.core.multiarray.scalar``."""
    (number,) = np.frombuffer(data, number_type.dtype)
    return number


def _empty(*_: Any) -> _Array:
    """In place of ``numpy.core.multiarray._reconstruct``; its state comes after it."""
    return _Array()


_ALLOWED = [
    (bytes, "builtins.bytes"),  # of an empty array
    (_NumberType, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    *((_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_empty, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]


def _check_packing(path: Path) -> None:
    """Refuse a zip that takes more memory than it has bytes, or that another reader might take for another one."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":  # as PyTorch tells its older format from a zip
            return
    with zipfile.ZipFile(path) as zipped:
        entries = zipped.infolist()
    is_stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    begins = min((entry.header_offset for entry in entries), default=0) == 0
    if not (is_stored and begins and sum(entry.file_size for entry in entries) <= path.stat().st_size):
        raise UnpicklingError("a zip that is packed as PyTorch packs none")


def read_checkpoint(path: Path, mapped: bool = False) -> dict[str, Any]:
    """A checkpoint that nnU-Net wrote, its tensors on the CPU. Nothing in it is called.

    Args:
        mapped: leave the tensors in the file, which must not change meanwhile, instead of reading them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds anything but tensors, containers, text and numbers, would unpack to more than its size, is
            damaged, or no checkpoint.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: got no file, expected a checkpoint of nnU-Net.")
    try:
        _check_packing(path)
        with torch.serialization.safe_globals(_ALLOWED):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged file makes PyTorch raise a dozen kinds
        said = str(error).rpartition("WeightsUnpickler error: ")[2].strip().split("\n")[0].split(" was not an ")[0]
        raise ValueError(
            f"{path}: got a file that cannot be read as numbers and tensors ({type(error).__name__}: {said}), expected "
            "a checkpoint written by nnU-Net. It is damaged, of another program, or holds code, which is not run."
        ) from error
    weights = content.get("network_weights") if isinstance(content, dict) else None
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(f"{path}: got no network_weights, expected a checkpoint written by nnU-Net.")
    if odd := [key for key, each in weights.items() if not isinstance(key, str) or not isinstance(each, torch.Tensor)]:
        raise ValueError(f"{path}: got network_weights whose {odd[0]!r} is no tensor, expected those of nnU-Net.")
    return content
