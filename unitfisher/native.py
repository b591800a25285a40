"""What torch has no fast form of, in C, with units side by side.

The user's compiler makes the kernels when one is first needed, and the user's cache keeps them.
Whatever stands in the way (no compiler, tensors on another device, UNITFISHER_NATIVE=0), the caller
does the same in torch alone, more slowly.
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

SOURCES = sorted((Path(__file__).parent / "native").glob("*.c"))
# generic: tuned for some processors, gcc 12 reads operands from memory again and again
FLAGS = ["-O3", "-march=native", "-mtune=generic", "-fno-math-errno", "-fPIC", "-shared"]
FLOP_PER_THREAD = 2**21  # less is done before another thread has woken up
PROCESS = os.getpid()

Kernel = Callable[[Any], None]


class Task(ctypes.Structure):
    """What a kernel works on: fields as in its source, among them the units u and those taken."""

    u: int
    taken: int


def kernel(name: str, *operands: Tensor, dtype: torch.dtype = torch.float64) -> Kernel | None:
    """Return the compiled kernel; None where there is none, or it cannot read these numbers."""
    if not all(plain(x, dtype) for x in operands) or not compiled():
        return None
    found: Kernel = getattr(_library(), name)
    return found


def compiled() -> bool:
    """Tell whether the compiled kernels are in use, compiling them if need be."""
    return os.environ.get("UNITFISHER_NATIVE") != "0" and _library() is not None


def plain(x: Tensor, dtype: torch.dtype) -> bool:
    """Nothing but numbers in memory."""
    usual = type(x) is Tensor and x.layout is torch.strided and x.device.type == "cpu"
    return usual and x.dtype is dtype and not (x.requires_grad or x.is_neg())


def run(kernel: Kernel, task: Task, flop: int) -> None:
    """Let as many threads as pay take units, until none is left.

    Raises:
        MemoryError: No thread had memory.
    """
    _on_threads(kernel, task, min(torch.get_num_threads(), 1 + flop // FLOP_PER_THREAD))
    if task.taken < task.u:
        raise MemoryError(f"no memory for what {type(task).__name__} needs beside its operands")


def _on_threads(kernel: Kernel, task: Task, threads: int) -> None:
    """Run on torch's own threads: others would have to share the cores with them."""
    pool = _torch_threads() if os.getpid() == PROCESS else None  # it does not survive a fork
    if threads == 1:
        kernel(ctypes.byref(task))
    elif pool is not None:
        pool(kernel, ctypes.byref(task), threads, 0)
    else:
        with ThreadPoolExecutor(threads) as executor:
            list(executor.map(kernel, [ctypes.byref(task)] * threads))


@functools.cache
def _torch_threads() -> Callable[..., None] | None:
    """GOMP_parallel of the OpenMP library that torch itself is linked with."""
    try:
        pool = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return None
    pool.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    pool.restype = None
    return pool


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Load what this compiler makes of these sources on this processor; compile them only once."""
    chosen = os.environ.get("CC")
    source = b"".join(path.read_bytes() for path in SOURCES)
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
    except (OSError, RuntimeError):  # no cache, or none to write to or to run programs from
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
    """Let the file appear whole or not at all: other processes may be compiling it as well."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder, path.name)
        _output(*compiler, *map(str, SOURCES), "-o", str(made))
        made.replace(path)


def _output(*command: str) -> bytes:
    return subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
