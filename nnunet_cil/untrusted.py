"""Files that others wrote: JSON is read within bounds, and no name in one leads out of its folder."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

MAX_JSON_BYTES = 100_000_000
MAX_MODEL_JSON_BYTES = 5_000_000  # a dataset.json that lists ten thousand cases
MAX_JSON_ENTRIES = 5_000_000  # each takes about a hundred bytes of memory
MAX_DEPTH = 100
MAX_NAME_BYTES = 150  # a file system's 255 less what is put around a name
EXPECTED_NAME = (
    f"at most {MAX_NAME_BYTES} bytes of printable text without / and \\ that begin with neither . nor -, as it becomes "
    "part of file names"
)
EXPECTED_PART = "a name without __ and without _ at its end, as nnU-Net's folders are TRAINER__PLANS__CONFIGURATION"
EXPECTED_ENDING = "an ending such as .nii.gz"
_OUTSIDE = re.compile(r"[/\\]|^[-. ]|[. ]$")
_DEVICE = re.compile(r"(con|prn|aux|nul|(com|lpt)\d)(\..*)?", re.IGNORECASE)  # of Windows, in any folder
_ENDING = re.compile(r"(\.[A-Za-z0-9]{1,8}){1,3}")


def is_name(value: Any) -> bool:
    """Whether a value can be one part of a path on any system, see ``EXPECTED_NAME``."""
    return (
        isinstance(value, str)
        and value.isprintable()
        and 0 < len(value.encode()) <= MAX_NAME_BYTES
        and not _OUTSIDE.search(value)
        and not _DEVICE.fullmatch(value)
    )


def is_part(value: str) -> bool:
    """Whether a name of trainer, plans or configuration can be told from the others, see ``EXPECTED_PART``."""
    return "__" not in f"{value}_"


def is_inside(value: Any) -> bool:
    """Whether a value is a relative path that stays in its folder."""
    path = PurePosixPath(value) if isinstance(value, str) else PurePosixPath("/")
    return bool(path.parts) and all(map(is_name, path.parts))


def is_ending(value: Any) -> bool:
    """Whether a value can be the ending of file names."""
    return isinstance(value, str) and _ENDING.fullmatch(value) is not None


def check_extent(content: Any, max_entries: int | None = None) -> None:
    """Refuse parsed JSON or YAML that no file of ours needs, and that would exhaust memory, stack or ``repr``.

    Args:
        max_entries: of all lists and mappings, written out: an alias in YAML repeats what it stands for.

    Raises:
        ValueError: too many levels, as in a list that holds itself, too many entries, or a number above 64 bits.
    """
    todo, n_entries = [([content], 0)], 0
    while todo:
        node, depth = todo.pop()
        n_entries += len(node)
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} levels")
        if max_entries is not None and n_entries > max_entries:
            raise ValueError(f"more than {max_entries} entries")
        for child in node.values() if isinstance(node, dict) else node:
            if isinstance(child, (dict, list)):
                todo.append((child, depth + 1))
            elif isinstance(child, int) and child.bit_length() > 64:
                raise ValueError("a number of more than 64 bits")


def parse_json(text: str | bytes, where: Any, expected: str, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object.

    Args:
        where: the file, for the message.
        expected: what it should be, for the message.
        max_bytes: that it may have.

    Raises:
        ValueError: it is none, too large or too deep.
    """
    try:
        if len(text) > max_bytes:
            raise ValueError(f"more than {max_bytes} bytes")
        if sum(text.count(mark if isinstance(text, str) else mark.encode()) for mark in ",[{") > MAX_JSON_ENTRIES:
            raise ValueError(f"more than {MAX_JSON_ENTRIES} entries")
        content = json.loads(text)
        check_extent(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: got no JSON that can be read ({error}), expected {expected}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where}: got {type(content).__name__}, expected {expected}.")
    return content


def read_json(path: Path, expected: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `parse_json`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: got no file, expected {expected}.")
    with path.open("rb") as file:
        return parse_json(file.read(MAX_JSON_BYTES + 1), path, expected)


def dataset_json_of(folder: Path) -> dict[str, Any]:
    """The ``dataset.json`` of a dataset or model of nnU-Net. Errors as `read_json`."""
    return read_json(folder / "dataset.json", "that of a dataset of nnU-Net")
