"""Mean and variance over cases in one pass over the data: by a kernel in C, or in torch."""

import ctypes
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from unitfisher import native
from unitfisher.memory import workspace
from unitfisher.native import Kernel

CACHED = 2**22  # bytes: larger pieces leave the cache between two operations


class Average(NamedTuple):
    """Averages over samples and positions."""

    mean: Float64[Tensor, "g u"]
    var: Float64[Tensor, "g u"]  # population variance


class Task(native.Task):
    """The struct Task of averages.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("y", "mean", "var")),
        *((name, ctypes.c_int64) for name in ("u", "n", "t", "to_n", "to_t", "to_u", "taken")),
    )


def averages(y: Float[Tensor, "g n t u"]) -> Average:
    """Return mean and variance of u numbers in g groups over n samples of t positions."""
    kernel = native.kernel("averages", y, dtype=torch.float32)
    if kernel is None or not y.numel():
        return _by_torch(y if y.dtype == torch.float64 else y.float())
    return _by_kernel(kernel, y)


def pieces(y: Float[Tensor, "g n ..."]) -> Iterator[slice]:
    """Split the samples into slices; on a CPU the temporaries of a slice stay in the cache."""
    count, case = y.shape[1], max(1, y[:, :1].nbytes)
    piece = max(1, (CACHED if y.device.type == "cpu" else workspace()) // case)
    return (slice(start, start + piece) for start in range(0, count, piece))


def _by_kernel(kernel: Kernel, y: Float[Tensor, "g n t u"]) -> Average:
    (groups, n, t, u), (to_group, *strides) = y.shape, y.stride()
    found = y.new_empty(2, groups, u, dtype=torch.float64)
    start, (mean, var) = y.data_ptr(), (x.data_ptr() for x in found)
    for group in range(groups):
        pointers = start + 4 * to_group * group, mean + 8 * u * group, var + 8 * u * group
        native.run(kernel, Task(*pointers, u, n, t, *strides, 0), 4 * n * t * u)
    return Average(*found)


def _by_torch(y: Float[Tensor, "g n t u"]) -> Average:
    first, count = y[:, :1, :1], y.shape[1] * y.shape[2]
    # sums are about the first case: about 0, a large mean would lose digits
    total = squares = torch.zeros((), dtype=torch.float64, device=y.device)
    for piece in pieces(y):
        about = y[:, piece] - first
        total = total + about.sum(2).sum(1, dtype=torch.float64)
        squares = squares + about.square_().sum(2).sum(1, dtype=torch.float64)
    shift = total / count
    return Average(first[:, 0, 0] + shift, (squares / count - shift**2).clamp_min(0.0))
