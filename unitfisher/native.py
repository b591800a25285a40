"""Kernels in C for what is slow in torch; they treat several units at once.

They are compiled when first needed, by the user's compiler, and kept in the user's cache. Where
that is not possible (no compiler, tensors on another device, UNITFISHER_NATIVE=0), the caller
computes the same in torch, more slowly.
"""

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "native"
SOURCES = sorted(FOLDER.glob("*.c"))
# generic: tuned for certain processors, gcc 12 reloads operands from memory
FLAGS = ["-O3", "-march=native", "-mtune=generic", "-fno-math-errno", "-fPIC", "-shared"]
FLOP_PER_THREAD = 2**21  # fewer are done before another thread wakes up
PROCESS = os.getpid()

Kernel = Callable[[Any], None]


class Task(ctypes.Structure):
    """A kernel's argument, as in its C source: u units, of which threads took the first ones."""

    u: int
    taken: int


def kernel(name: str, *operands: Tensor, dtype: torch.dtype = torch.float64) -> Kernel | None:
    """Return the compiled kernel; None if there is none, or if it cannot read the operands."""
    if not all(plain(x, dtype) for x in operands) or not compiled():
        return None
    found: Kernel = getattr(_library(), name)
    return found


def compiled() -> bool:
    """Whether the compiled kernels are in use; compiles them if necessary."""
    return os.environ.get("UNITFISHER_NATIVE") != "0" and _library() is not None


def plain(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether x is an ordinary CPU tensor of this type, whose memory a kernel can read."""
    usual = type(x) is Tensor and x.layout is torch.strided and x.device.type == "cpu"
    return usual and x.dtype is dtype and not (x.requires_grad or x.is_neg())


def run(entry: Kernel, task: Task, flop: int) -> None:
    """Run a kernel on all units, in as many threads as ``flop`` operations are worth.

    Raises:
        MemoryError: No thread got the memory it needs.
    """
    _on_threads(entry, task, min(torch.get_num_threads(), 1 + flop // FLOP_PER_THREAD))
    if task.taken < task.u:
        raise MemoryError(f"no memory for what {type(task).__name__} needs beside its operands")


def _on_threads(entry: Kernel, task: Task, threads: int) -> None:
    """Use torch's own threads: others would compete with them for the cores."""
    pool = _torch_threads() if os.getpid() == PROCESS else None  # it does not survive a fork
    if threads == 1:
        entry(ctypes.byref(task))
    elif pool is not None:
        pool(entry, ctypes.byref(task), threads, 0)
    else:
        with ThreadPoolExecutor(threads) as executor:
            list(executor.map(entry, [ctypes.byref(task)] * threads))


@functools.cache
def _torch_threads() -> Callable[..., None] | None:
    """Return GOMP_parallel of the OpenMP library that torch itself is linked with, if any."""
    try:
        pool = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return None
    pool.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    pool.restype = None
    return pool


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Load the kernels, compiled once for these sources, this compiler and this processor."""
    chosen = os.environ.get("CC")
    source = b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.[ch]")))
    for command in [chosen] if chosen else ["cc", "gcc", "clang"]:
        compiler = [*command.split(), *FLAGS]
        try:
            target = _output(*compiler, "-dM", "-E", "-x", "c", os.devnull)
            key = hashlib.sha256(source + repr(compiler).encode() + target)
            return _load(compiler, f"kernels-{key.hexdigest()[:16]}.so")
        except (OSError, subprocess.SubprocessError):
            continue
    return None


def _load(compiler: list[str], name: str) -> ctypes.CDLL:
    try:
        folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        path = Path(folder, "unitfisher", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _compile(compiler, path)
        return _opened(path)
    except (OSError, RuntimeError):  # no cache, or it cannot be written to or loaded from
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            path = Path(folder, name)
            _compile(compiler, path)
            return _opened(path)


def _opened(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for source in SOURCES:
        entry = getattr(library, source.stem)
        entry.argtypes, entry.restype = (ctypes.c_void_p,), None
    return library


def _compile(compiler: list[str], path: Path) -> None:
    """Move the library into place when it is complete: other processes may compile it too."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder, path.name)
        _output(*compiler, *map(str, SOURCES), "-o", str(made))
        made.replace(path)


def _output(*command: str) -> bytes:
    return subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
