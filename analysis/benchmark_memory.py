"""Peaks of memory of the process, or of the device."""

import ctypes
import gc
import re
import resource
import sys
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
    """Let the peak be what is held now, with what was freed given back."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR.exists():
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text("5")


def limit_memory(ceiling: int) -> None:
    """Refuse this process more memory than that, where the system can."""
    if sys.platform == "linux":
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (ceiling, hard))
