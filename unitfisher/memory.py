"""How many bytes a measurement may take at one time, and how many a piece of its work."""

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

DEFAULT = 4 * 2**30
AMPLE = 192 * 2**20  # larger pieces of work are no faster
HEEDED = 31 * 2**20  # bytes; of blocks from 32 MiB on glibc learns nothing
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
WRITTEN = re.compile(r"\s*(\d+(?:\.\d+)?(?:e\+?\d+)?)\s*(?:([KMGT])(i?)B?|B)?\s*", re.IGNORECASE)

_workspace = ContextVar("workspace", default=AMPLE)


def workspace() -> int:
    """Bytes for what is held while units, columns or systems are treated together."""
    return _workspace.get()


@contextmanager
def within(size: int) -> Iterator[None]:
    """Let pieces of work take so many bytes; those that cannot be parted take what they must."""
    before = _workspace.set(size)
    try:
        yield
    finally:
        _workspace.reset(before)


@functools.cache
def retain_freed() -> None:
    """Let the process keep the memory that a measurement frees, for the next one.

    glibc hands it back to the system, to be mapped and cleared anew each time, unless it has seen
    larger blocks freed (mallopt(3), M_MMAP_THRESHOLD): this one nobody touches. A process that
    only trains may go further: `experiments.allocation`.
    """
    torch.empty(HEEDED, dtype=torch.uint8)


def bytes_in(memory: object) -> int:
    """Read a budget: bytes, or text as "2 GiB", "500 MB"."""
    if isinstance(memory, int | float) and memory is not True and memory >= 1 and memory % 1 == 0:
        return int(memory)  # 2e9, too
    written = WRITTEN.fullmatch(memory) if isinstance(memory, str) else None
    if written is None or not float(written[1]):
        raise ValueError(f"memory must be a number of bytes or as '2 GiB', got {memory!r}")
    power = "kmgt".index(written[2].lower()) + 1 if written[2] else 0
    return int(float(written[1]) * (1024 if written[3] else 1000) ** power)


def readable(size: int | float) -> str:
    """Write 1.5 * 2**30 as "1.5 GiB"."""
    power = 0
    while abs(size) >= 999.5 and power < len(UNITS) - 1:
        size, power = size / 1024, power + 1
    return f"{size:.3g} {UNITS[power]}"
