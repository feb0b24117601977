"""Memory that work on a CPU would give back to the system and take again in every iteration."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
DEFAULT_TRIM_THRESHOLD, DEFAULT_MMAP_MAX = 128 * 1024, 65536


def keep_freed_memory() -> None:
    """Let this process keep what it frees, instead of giving each large block back to Linux and waiting for a new one.

    A training step frees and takes the same maps again and again, at a page fault for every 4 KiB. The process then
    holds its peak until it ends. This is glibc's setting; with another allocator or system nothing happens.
    """
    if libc := _glibc():
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


@contextmanager
def keeping_freed_memory(wanted: bool = True) -> Iterator[None]:
    """`keep_freed_memory` for a while, if ``wanted``; then all that is free goes back to the system."""
    if not wanted:
        yield
        return
    keep_freed_memory()
    try:
        yield
    finally:
        if libc := _glibc():
            libc.mallopt(M_MMAP_MAX, DEFAULT_MMAP_MAX)
            libc.mallopt(M_TRIM_THRESHOLD, DEFAULT_TRIM_THRESHOLD)
            libc.malloc_trim(0)


def _glibc() -> Any:
    """The C library of this process if it has glibc's two functions, else None."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None  # musl has neither
