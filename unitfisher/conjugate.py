"""Systems diag(v) K diag(v) + ε I of many cases, by conjugate gradients for all units at once.

A Cholesky factor costs n³/3 multiplications per unit, an iteration 4n² per right-hand side, in
products over all units. Each unit's system is scaled to a unit diagonal. One preconditioner serves
all units, the inverse of the system with their mean squared weights. Where activations are nearly
of lower rank convergence is slow: units that fall behind are solved by Cholesky.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from unitfisher.gram import Scaled, solve_others
from unitfisher.solvers import dot, require_regular

MANY_CASES = 1024  # iterations can be faster with at least this many cases,
MANY_UNITS = 32  # and this many units for each preconditioner
PACE = 40  # n / PACE iterations, the most there are, cost about three fifths of a factor
RESIDUAL = 1e-11  # relative residual at which a system stops
SLACK = 10  # a unit has converged if its true residual is at most this many times RESIDUAL
LOOK = 4  # iterations between two checks of which systems have stopped


class Iterated(NamedTuple):
    """Solutions, and residuals relative to the right-hand side: 0 where solved by Cholesky."""

    Y: Float64[Tensor, "u r n"]
    residual: Float64[Tensor, " u"]


def mean_inverse(scaled: Scaled, K: Float64[Tensor, "n n"]) -> Float64[Tensor, "n n"]:
    """Invert the scaled matrix of a unit with the mean squared weights; identity if singular."""
    square = (scaled.t**2).mean(0)
    t = square.sqrt()
    mean = t[:, None] * K * t
    mean.diagonal().add_(1 - square * K.diagonal())
    L, info = torch.linalg.cholesky_ex(mean)
    return torch.cholesky_inverse(L) if int(info) == 0 else torch.eye(len(K)).to(K)


def pays(K: Float[Tensor, "g n n"], units: int) -> bool:
    """Return whether iterations may be faster than Cholesky factors."""
    return K.shape[-1] >= MANY_CASES and units >= MANY_UNITS * len(K)


def solve_by_iterations(
    K: Float64[Tensor, "g n n"],
    v: Float64[Tensor, "u n"],
    epsilon: Float64[Tensor, " u"],
    rhs: Float64[Tensor, "u r n"],
) -> Iterated:
    """Solve (diag(v_u) K diag(v_u) + ε_u I) Y_u = rhs_u, ε > 0, with one K for each group of units.

    Raises:
        SingularFisherError: A unit's matrix is singular up to rounding.
    """
    groups = zip(K, *(x.chunk(len(K)) for x in (v, epsilon, rhs)), strict=True)
    found = [_of_group(*group) for group in groups]
    Y, residual = (torch.cat(parts) for parts in zip(*found, strict=True))
    late = ~(residual <= SLACK * RESIDUAL)
    require_regular(solve_others(Y, late, K, v, epsilon, rhs))
    residual[late] = 0.0
    return Iterated(Y, residual)


def _of_group(
    K: Float64[Tensor, "n n"],
    v: Float64[Tensor, "u n"],
    epsilon: Float64[Tensor, " u"],
    rhs: Float64[Tensor, "u r n"],
) -> Iterated:
    scaled, root = Scaled.of(K, v, epsilon)
    b = rhs / root.unsqueeze(1)
    size = torch.linalg.vector_norm(b, dim=-1, keepdim=True)
    b = (b / torch.where(size > 0, size, 1.0)).flatten(0, 1)
    inverse = mean_inverse(scaled, K)
    scaled = scaled.at(torch.arange(len(b), device=b.device) // rhs.shape[1])
    x = _iterate(K, inverse, scaled, b)
    residual = torch.linalg.vector_norm(b - scaled.times(x, K), dim=-1)
    Y = x.view_as(rhs) * size / root.unsqueeze(1)
    return Iterated(Y, residual.view(len(rhs), -1).amax(1))


def _iterate(
    K: Float64[Tensor, "n n"],
    inverse: Float64[Tensor, "n n"],
    scaled: Scaled,
    b: Float64[Tensor, "w n"],
) -> Float64[Tensor, "w n"]:
    """Return each row's last iterate, whether it has converged or has fallen behind."""
    found, patience = torch.zeros_like(b), len(K) // PACE
    busy = b.any(1).nonzero().flatten()
    system, r = scaled.at(busy), b[busy]
    x, p = torch.zeros_like(r), r @ inverse
    rz = dot(r, p).unsqueeze(1)
    for i in range(1, patience + 1):
        Ap = system.times(p, K)
        step = rz / dot(p, Ap).unsqueeze(1)
        x.addcmul_(step, p)
        r.addcmul_(step, Ap, value=-1)
        if i % LOOK == 0:
            left = torch.linalg.vector_norm(r, dim=-1)
            late = (i >= 2 * LOOK) & (left > RESIDUAL ** (i / patience))
            on = ((left > RESIDUAL) & ~late).nonzero().flatten()
            if len(on) < len(busy):
                found[busy] = x
                busy, system, x, r, p, rz = busy[on], system.at(on), x[on], r[on], p[on], rz[on]
            if len(busy) == 0:
                break
        z = r @ inverse
        new = dot(r, z).unsqueeze(1)
        p = torch.addcmul(z, new / rz, p)
        rz = new
    found[busy] = x
    return found
