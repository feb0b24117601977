"""Damage to files: to their bytes, to what JSON and YAML hold, and to the entries of zips. Each function copies."""

from __future__ import annotations

import copy
import io
import json
import math
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

NASTY_TEXTS = (
    "", " ", ".", "..", "../outside", "/outside", "a/../../outside", "a\\b", "a\0b", "-rf", ".hidden", "con", "x" * 300,
    "\ud800", "\u202e", "\x1b[2J", "a\nb", "*[", "%s{0}", "__class__", "0", "²", "1" * 5000, "liver",
)  # fmt: skip
NASTY_NUMBERS = (0, -1, 1, 3, 2**31, 2**63, 10**30, -0.5, 1.5, 1e308, math.nan, math.inf, -math.inf)
NASTY = (None, True, False, *NASTY_NUMBERS, *NASTY_TEXTS, [], {}, [[]], [None], {"": 1}, {"a": {}}, ["a", "a"])
INTERESTING_BYTES = (b"\0", b"\xff", b"\n", b'"', b"{", b"]", b":", b"&a ", b"*a", b"0x" + b"f" * 5000, b"9" * 5000)


def in_bytes(content: bytes, random: Random) -> bytes:
    """One to four edits: flip, remove, insert, repeat, overwrite, cut off."""
    content = bytearray(content)
    for _ in range(random.randint(1, 4)):
        at, length = random.randrange(len(content) + 1), random.randint(1, 16)
        edit = random.randrange(6)
        if edit == 0 and at < len(content):
            content[at] ^= 1 << random.randrange(8)
        elif edit == 1:
            del content[at : at + length]
        elif edit == 2:
            content[at:at] = random.choice(INTERESTING_BYTES)
        elif edit == 3:
            content[at:at] = content[at : at + 20 * length]
        elif edit == 4:
            content[at : at + length] = random.randbytes(length)
        elif random.random() < 0.3:
            del content[at:]
    return bytes(content)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Each entry of all lists and dicts within, as container and key."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in [(value, key), *_places(value[key])]]


def in_structure(value: Any, random: Random) -> Any:
    """One to three edits of JSON-able content: replace, remove, repeat, rename, move, nest."""
    top = [copy.deepcopy(value)]
    for _ in range(random.randint(1, 3)):
        places = _places(top)
        container, key = random.choice(places if random.random() < 0.98 else places[:1])
        edit = random.randrange(6)
        if edit == 0 and container is not top:
            del container[key]
        elif edit == 1 and isinstance(container, list) and container is not top:
            container.insert(key, copy.deepcopy(container[key]))
        elif edit == 1 and isinstance(container, dict):
            container[random.choice(NASTY_TEXTS)] = container.pop(key)
        elif edit == 2:
            other, other_key = random.choice(places)
            if other_key in other if isinstance(other, dict) else other_key < len(other):
                container[key] = copy.deepcopy(other[other_key])
        elif edit == 3:
            for _ in range(random.choice((1, 2, 200))):
                container[key] = [container[key]]
        else:
            container[key] = copy.deepcopy(random.choice(NASTY))
        if not top:
            top = [None]
    return top[0]


def in_json(content: bytes, random: Random) -> bytes:
    """Damage to what a JSON file holds, or to its bytes."""
    if random.random() < 0.2:
        return in_bytes(content, random)
    return json.dumps(in_structure(json.loads(content), random)).encode()


def in_zip(content: bytes, random: Random, in_entry: Callable[[str, bytes, Random], bytes]) -> bytes:
    """Damage to one entry of a zip: its content, name, kind or method; or to the bytes of the whole."""
    if random.random() < 0.2:
        return in_bytes(content, random)
    with zipfile.ZipFile(io.BytesIO(content)) as zipped:
        entries = [(info.filename, zipped.read(info)) for info in zipped.infolist()]
    chosen, edit = random.randrange(len(entries)), random.randrange(9)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as zipped, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that stand there twice
        for number, (name, data) in enumerate(entries):
            info = zipfile.ZipInfo(name)
            if number == chosen and edit == 0:
                continue
            if number == chosen and edit == 1:
                outside = random.choice(NASTY_TEXTS).encode(errors="ignore").decode() or "/"
                info.filename = info.orig_filename = random.choice((outside, f"{outside}/{name}", f"{name}/{outside}"))
            elif number == chosen and edit == 2:
                info.external_attr = random.choice((0o120777, 0o060666, 0o010666)) << 16
            elif number == chosen and edit == 3:
                info.compress_type = random.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
            elif number == chosen and edit == 4:
                zipped.writestr(zipfile.ZipInfo(name), data)
            elif number == chosen:
                data = in_entry(name, data, random)
            zipped.writestr(info, data)
    return packed.getvalue()


def in_file(path: Path, random: Random, damage: Callable[[bytes, Random], bytes]) -> None:
    """Damage a file in place; another one with the same content, to which it is linked, stays as it is."""
    content = damage(path.read_bytes(), random)
    path.unlink()
    path.write_bytes(content)
