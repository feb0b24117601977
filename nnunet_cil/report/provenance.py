"""What a report tells about how it was made, without names of machines, people or folders."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

PACKAGES = ("nnunet-cil", "nnunetv2", "torch", "numpy", "scipy", "SimpleITK", "monai", "batchgenerators", "matplotlib")
_CPU_INFO = Path("/proc/cpuinfo")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, as installed now."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str]:
    """Kind of system, processor and its cores of this machine; no host name, no user name."""
    return {
        "System": platform.system(),
        "Processor": _processor(),
        "Processor cores": str(os.cpu_count() or "unknown"),
    }


def _processor() -> str:
    text = _CPU_INFO.read_text(errors="replace") if _CPU_INFO.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def without_folders(value: Any) -> Any:
    """Settings in which a path from the root of a file system, or a home, is replaced by its last part."""
    if isinstance(value, Mapping):
        return {key: without_folders(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(entry) for entry in value]
    if not isinstance(value, (str, Path)):
        return value
    text = str(value)
    if PureWindowsPath(text).drive or text.startswith("\\"):
        return PureWindowsPath(text).name
    if text.startswith(("/", "~")):
        return PurePosixPath(text).name
    return text
