"""Mean and variance of many units over their cases, in one pass: a kernel in C, or torch alone."""

import ctypes

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from unitfisher import native


class Task(native.Task):
    """As in averages.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("y", "mean", "var")),
        *((name, ctypes.c_int64) for name in ("u", "n", "t", "to_n", "to_t", "to_u", "taken")),
    )


def averages(
    y: Float[Tensor, "n t u"],
) -> tuple[Float64[Tensor, " u"], Float64[Tensor, " u"]]:
    """Return mean and population variance of each unit over samples and positions."""
    kernel = native.kernel("averages", y, dtype=torch.float32)
    if kernel is None or not y.numel():
        y = y if y.dtype == torch.float64 else y.float()
        mean = y.mean((0, 1))
        var = (y - mean).square_().mean((0, 1))  # faster than torch.var_mean over the first axes
        return mean.double(), var.double()
    n, t, u = y.shape
    found = y.new_empty(2, u, dtype=torch.float64)
    pointers = y.data_ptr(), found[0].data_ptr(), found[1].data_ptr()
    native.run(kernel, Task(*pointers, u, n, t, *y.stride(), 0), 4 * y.numel())
    return found[0], found[1]
