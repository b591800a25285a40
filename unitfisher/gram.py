"""Solve the systems diag(v) K diag(v) + ε I of many units that share a Gram matrix K.

A kernel in C does it with one unit in each lane of a vector. The user's compiler makes it when it
is first needed, and the user's cache keeps it. Whatever stands in the way (no compiler, tensors on
another device, UNITFISHER_NATIVE=0), torch alone gives the same numbers, more slowly.

Neither keeps a factor: the kernel factors about as fast as memory would return what was kept.
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
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from unitfisher.memory import workspace
from unitfisher.solvers import outer

SOURCE = Path(__file__).parent / "native" / "gram.c"
# generic: tuned for some processors, gcc 12 reads operands from memory again and again
FLAGS = ["-O3", "-march=native", "-mtune=generic", "-fno-math-errno", "-fPIC", "-shared"]
FLOP_PER_THREAD = 2**21  # less is done before another thread has woken up
PROCESS = os.getpid()

Kernel = Callable[[Any], None]


class GramSolution(NamedTuple):
    """Solutions, and which units' matrices have an inverse; NaN for the others."""

    Y: Float64[Tensor, "u n r"]
    regular: Bool[Tensor, " u"]


class System(NamedTuple):
    """What is to be solved: one K for each g of consecutive units."""

    K: Float[Tensor, "g n n"]
    v: Float[Tensor, "u n"]
    epsilon: Float[Tensor, " u"]
    rhs: Float[Tensor, "u n r"]

    @property
    def group(self) -> int:
        return max(1, len(self.v) // len(self.K))

    def of_units(self, part: slice) -> "System":
        K = self.K
        if len(K) > 1:
            K = K[torch.arange(len(self.v), device=K.device)[part] // self.group]
        return System(K, self.v[part], self.epsilon[part], self.rhs[part])


class Task(ctypes.Structure):
    """As in gram.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("K", "v", "epsilon", "rhs", "Y", "regular")),
        *((name, ctypes.c_int64) for name in ("u", "n", "r", "group", "taken")),
    )


def solve_grams(
    K: Float[Tensor, "*g n n"],
    v: Float[Tensor, "u n"],
    epsilon: Float[Tensor, " u"],
    rhs: Float[Tensor, "u n r"],
) -> GramSolution:
    """Solve (diag(v_u) K diag(v_u) + ε_u I) Y_u = rhs_u for every unit, in double precision.

    K is one for all units, or one for each of g groups of consecutive units. A matrix is called
    regular if every pivot of its Cholesky factor is more than 64 roundings of the diagonal entry
    that it began as.
    """
    u, n, _ = rhs.shape
    groups = len(K) if K.dim() == 3 else 1
    if u % groups:
        raise ValueError(f"{u} units cannot share {groups} Gram matrices evenly")
    system = System(K.expand(groups, n, n), v.expand(u, n), epsilon.expand(u), rhs)
    kernel = _kernel() if all(map(_readable, system)) and compiled() else None
    return _by_torch(system) if kernel is None else _by_kernel(kernel, system)


def compiled() -> bool:
    """Tell whether the compiled kernel is in use, compiling it if need be."""
    return os.environ.get("UNITFISHER_NATIVE") != "0" and _kernel() is not None


def _readable(x: Tensor) -> bool:
    """Nothing but numbers in memory."""
    usual = type(x) is Tensor and x.layout is torch.strided and x.device.type == "cpu"
    return usual and x.dtype is torch.float64 and not (x.requires_grad or x.is_neg())


def _by_kernel(kernel: Kernel, system: System) -> GramSolution:
    s = System(*(x.contiguous() for x in system))
    u, n, r = s.rhs.shape
    found = GramSolution(torch.empty_like(s.rhs), s.rhs.new_empty(u, dtype=torch.bool))
    task = Task(*(x.data_ptr() for x in (*s, *found)), u, n, r, s.group, 0)
    flop = u * n**2 * (n // 3 + 4 * r)
    _on_threads(kernel, task, min(torch.get_num_threads(), 1 + flop // FLOP_PER_THREAD))
    if task.taken < u:
        raise MemoryError(f"no memory for a factor of {n} by {n}")
    return found


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


def _by_torch(system: System) -> GramSolution:
    u, n, _ = system.rhs.shape
    units = max(1, workspace() // (24 * max(1, n) ** 2))
    parts = (slice(start, start + units) for start in range(0, max(1, u), units))
    found = [_part_by_torch(system.of_units(part)) for part in parts]
    return GramSolution(*(torch.cat(x) for x in zip(*found, strict=True)))


def _part_by_torch(part: System) -> GramSolution:
    K, v, epsilon, rhs = (x.double() for x in part)
    matrix = outer(v, v).mul(K)
    matrix.diagonal(dim1=-2, dim2=-1).add_(epsilon[:, None])
    factor, info = torch.linalg.cholesky_ex(matrix)
    pivots, diagonal = (x.diagonal(dim1=-2, dim2=-1) for x in (factor, matrix))
    noise = 64 * torch.finfo(matrix.dtype).eps
    regular = (info == 0) & (pivots**2 > noise * diagonal).all(-1)
    y = torch.linalg.solve_triangular(factor, rhs, upper=False)
    Y = torch.linalg.solve_triangular(factor.mT, y, upper=True)
    return GramSolution(torch.where(regular[:, None, None], Y, torch.nan), regular)


@functools.cache
def _kernel() -> Kernel | None:
    """Load what this compiler makes of this source on this processor; compile it only once."""
    chosen = os.environ.get("CC")
    for command in [chosen] if chosen else ["cc", "gcc", "clang"]:
        compiler = [*command.split(), *FLAGS]
        try:
            target = _output(*compiler, "-dM", "-E", "-x", "c", os.devnull)
            key = hashlib.sha256(SOURCE.read_bytes() + repr(compiler).encode() + target)
            return _load(compiler, f"gram-{key.hexdigest()[:16]}.so")
        except (OSError, subprocess.SubprocessError):
            continue
    return None


def _load(compiler: list[str], name: str) -> Kernel:
    try:
        folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        path = Path(folder, "unitfisher", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _compile(compiler, path)
        kernel = ctypes.CDLL(str(path)).solve_grams
    except (OSError, RuntimeError):  # no cache, or none to write to or to run programs from
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            path = Path(folder, name)
            _compile(compiler, path)
            kernel = ctypes.CDLL(str(path)).solve_grams
    kernel.argtypes, kernel.restype = (ctypes.c_void_p,), None
    return kernel


def _compile(compiler: list[str], path: Path) -> None:
    """Let the file appear whole or not at all: other processes may be compiling it as well."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder, path.name)
        _output(*compiler, str(SOURCE), "-o", str(made))
        made.replace(path)


def _output(*command: str) -> bytes:
    return subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
