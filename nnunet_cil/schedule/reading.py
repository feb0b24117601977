"""A schedule file that is being read: what is wrong in it is collected, so that all of it is told at once."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_cil.untrusted import EXPECTED_PART, is_name, is_part


class Reading:
    """A file, its raw content, and the problems found so far, one a line.

    A check takes the key that it is of and the raw value, says what is wrong with it, and returns it. What it returns
    for a wrong value must not break later checks, and goes no further: no schedule is made of a file with problems.
    """

    def __init__(self, file: Path, raw: Any) -> None:
        self.file, self.raw = file, raw
        self.problems: list[str] = []

    def problem(self, key: str, got: Any, expected: str) -> None:
        self.problems.append(f"{self.file}: {key}: got {got}, expected {expected}.")

    def failed(self, key: str, error: Exception) -> None:
        """A problem in the words of what was raised."""
        self.problems.append(f"{self.file}: {key}: {error}")

    def known_keys(self, where: str, mapping: Mapping, known: Sequence[str]) -> None:
        for key in mapping:
            if key not in known:
                near = difflib.get_close_matches(str(key)[:100], known, 1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                self.problem(f"{where}{key}", f"an unknown key{hint}", f"one of {', '.join(known)}")

    def choice(self, key: str, value: Any, choices: Sequence[str]) -> str:
        if value not in choices or not isinstance(value, str):
            self.problem(key, repr(value), f"one of {', '.join(choices)}")
        return str(value)

    def mapping(self, key: str, value: Any, known: Sequence[str]) -> dict[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.problem(key, repr(value), f"a mapping with the keys {', '.join(known)}")
            return {}
        self.known_keys(f"{key}: ", value, known)
        return {k: v for k, v in value.items() if k in known}

    def class_of_nnunet(self, key: str, value: Any) -> str:
        if not isinstance(value, str) or not value.isidentifier() or not is_name(value):
            self.problem(key, repr(value), "text: the name of a class")
            return ""
        if not is_part(value):
            self.problem(key, repr(value), EXPECTED_PART)
        if value == "nnUNetTrainerJoint":
            self.problem(key, value, "the trainer of a method that goes step by step: the method `joint` needs no key")
        return value

    def path(self, key: str, value: Any) -> Path | None:
        if not isinstance(value, str) or not value:
            self.problem(key, repr(value), "a path")
            return None
        try:
            path = (self.file.parent / Path(value).expanduser()).absolute()
            path.exists()
        except (OSError, RuntimeError, ValueError) as error:  # a name too long, an unknown user after ~, a null byte
            self.problem(key, f"{value[:80]!r} ({getattr(error, 'strerror', None) or error})", "a path")
            return None
        return path

    def file_beside(self, key: str, value: Any, folder: Path | None, expected: str) -> Path | None:
        """A file beside the schedule; if there is none, in the folder of a dataset.

        Nothing is said of one that may lie in the folder of a source of which another problem is known.
        """
        path = self.path(key, value)
        if path is None:
            return None
        if not path.is_file() and folder is not None and (folder / value).is_file():
            path = folder / value
        if not path.is_file():
            if folder is not None or self.raw.get("source") is None:
                self.problem(key, f"no file {path}", expected)
            return None
        return path


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_float(value: Any) -> bool:
    return (isinstance(value, float) or is_int(value)) and abs(value) <= sys.float_info.max
