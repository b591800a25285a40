"""Peaks of memory of the process, or of the device."""

import ctypes
import gc
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_now() -> int:
    """The most bytes held since `forget_peak`."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if STATUS.exists():  # unlike ru_maxrss, this peak is not inherited from the parent process
        (kibibytes,) = re.findall(r"VmHWM:\s*(\d+)", STATUS.read_text())
        return 1024 * int(kibibytes)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> None:
    """Return freed memory to the system, and reset the peak to what is held now."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR.exists():
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text("5")


def taken(run: Callable[[], object]) -> tuple[int, object]:
    """Call it twice; return the bytes that the second call needs beyond those held, and its result.

    The first call loads and prepares.
    """
    run()
    forget_peak()
    before = peak_now()
    result = run()
    return peak_now() - before, result


def limit_memory(ceiling: int) -> None:
    """Limit this process to ``ceiling`` bytes, where the system can."""
    if sys.platform == "linux":
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (ceiling, hard))
