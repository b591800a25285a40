"""Memory limits: of a measurement, and of each piece of its work (the workspace)."""

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

DEFAULT = 4 * 2**30
AMPLE = 192 * 2**20  # larger pieces of work are no faster on a CPU
AMPLE_ON_GPU = 2 * 2**30  # nor, so it is assumed, on a GPU
HEEDED = 31 * 2**20  # bytes; glibc's threshold adapts only to freed blocks below 32 MiB
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
WRITTEN = re.compile(r"\s*(\d+(?:\.\d+)?(?:e\+?\d+)?)\s*(?:([KMGT])(i?)B?|B)?\s*", re.IGNORECASE)

_workspace = ContextVar("workspace", default=AMPLE)


def workspace() -> int:
    """Return the bytes that units, columns or systems treated together may take."""
    return _workspace.get()


@contextmanager
def within(size: int) -> Iterator[None]:
    """Set the workspace to ``size`` bytes; work that cannot be split takes what it needs."""
    before = _workspace.set(size)
    try:
        yield
    finally:
        _workspace.reset(before)


@functools.cache
def retain_freed() -> None:
    """Let the process keep the memory that a measurement frees, for the next one.

    glibc returns large blocks to the system, which maps and clears them anew each time. Freeing a
    block raises the size from which it does so (mallopt(3), M_MMAP_THRESHOLD); the one freed here
    is never written to. A process that only trains can go further: `experiments.allocation`.
    """
    torch.empty(HEEDED, dtype=torch.uint8)


def bytes_in(memory: object) -> int:
    """Parse a budget: bytes, or text such as "2 GiB" or "500 MB"."""
    if isinstance(memory, int | float) and memory is not True and memory >= 1 and memory % 1 == 0:
        return int(memory)  # also 2e9
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
