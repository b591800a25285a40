"""Second moments of weighted cases about an origin, Σ D (a - o)(a - o)ᵀ, for many units at once.

A kernel in C computes them while a unit's cases and sums are in the cache. Without it torch does,
through weighted copies of the cases. Products are formed in the precision of the activations.
"""

import ctypes
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unitfisher import native
from unitfisher.memory import workspace
from unitfisher.native import Kernel
from unitfisher.solvers import roundings

ROWS = 64  # cases that the kernel adds up at a time in single precision, as in second_moments.c
BLOCK = 128  # rows of a symmetric product, of which only one triangle is formed


class SecondMoments(NamedTuple):
    """Sums about an origin, in the precision of the weights."""

    first: Float[Tensor, "u d"]  # Σ D (a - o)
    second: Float[Tensor, "u d d"]  # Σ D (a - o)(a - o)ᵀ
    error: float  # of the sums, in roundings of the activations


class Task(native.Task):
    """The kernel's argument, as in second_moments.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "w", "origin", "scale", "first", "second")),
        *((name, ctypes.c_int64) for name in ("u", "n", "d", "group", "own", "taken")),
    )


def second_moments(
    a: Float[Tensor, "g n d"], D: Float[Tensor, "n u"], origin: Float[Tensor, "*u d"]
) -> SecondMoments:
    """Sum over cases; g groups have u / g units each; there is one origin, or one per unit."""
    scale = D.detach().amax(0).clamp_min(torch.finfo(D.dtype).tiny)
    weight = (D / scale).T  # so that tiny D keep their digits
    kernel = native.kernel("second_moments", D) if _single(a, origin) else None
    if kernel is not None:
        return _by_kernel(kernel, a, weight, origin, scale)
    together = max(1, workspace() // (8 * a[0].nbytes))
    parts = (
        _by_torch(a, weight.to(a.dtype), origin, slice(start, start + together))
        for start in range(0, D.shape[1], together)
    )
    first, second = (torch.cat(sums).to(D.dtype) for sums in zip(*parts, strict=True))
    return SecondMoments(
        first * scale[:, None], second * scale[:, None, None], roundings(len(D), len(D))
    )


def _single(*operands: Tensor) -> bool:
    return all(native.plain(x, torch.float32) for x in operands)


def _by_kernel(
    kernel: Kernel,
    a: Float[Tensor, "g n d"],
    weight: Float[Tensor, "u n"],
    origin: Float[Tensor, "*u d"],
    scale: Float[Tensor, " u"],
) -> SecondMoments:
    u, (groups, n, d) = len(weight), a.shape
    root = weight.sqrt().to(a.dtype, memory_format=torch.contiguous_format)
    a, origin = a.contiguous(), origin.contiguous()
    found = SecondMoments(scale.new_empty(u, d), scale.new_empty(u, d, d), roundings(n, ROWS))
    pointers = [x.data_ptr() for x in (a, root, origin, scale, found.first, found.second)]
    task = Task(*pointers, u, n, d, max(1, u // groups), origin.dim() - 1, 0)
    native.run(kernel, task, u * n * d**2)
    return found


def _by_torch(
    a: Float[Tensor, "g n d"],
    weight: Float[Tensor, "u n"],
    origin: Float[Tensor, "*u d"],
    part: slice,
) -> tuple[Float[Tensor, "v d"], Float[Tensor, "v d d"]]:
    if origin.dim() == 1:
        about = a - origin
    else:
        group = torch.arange(len(weight), device=a.device)[part] * len(a) // len(weight)
        about = (a if len(a) == 1 else a[group]) - origin[part].unsqueeze(1)
    D = weight[part].unsqueeze(1)
    return (D @ about).squeeze(1), _symmetric(D * about.mT, about)


def _symmetric(x: Float[Tensor, "u d n"], y: Float[Tensor, "v n d"]) -> Float[Tensor, "u d d"]:
    """The product x y, which must be symmetric; there is one y, or one per unit."""
    d = x.shape[1]
    if d <= 2 * BLOCK:
        return x @ y if len(y) > 1 else (x.flatten(0, 1) @ y[0]).unflatten(0, x.shape[:2])
    stops = [min(start + BLOCK, d) for start in range(0, d, BLOCK)]
    lower = [
        F.pad(x[:, start:stop] @ y[..., :stop], (0, d - stop))
        for start, stop in zip([0, *stops], stops, strict=False)
    ]
    L = torch.cat(lower, 1).tril()
    return L + L.tril(-1).mT
