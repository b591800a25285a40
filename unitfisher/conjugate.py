"""Systems diag(v) K diag(v) + ε I of many cases, by conjugate gradients for all units at once.

A factor costs n³/3 multiplications a unit, an iteration 4n² a right-hand side in products that the
units share. Each unit's system is scaled to a diagonal of ones; what is left differs by how a
unit's weights differ from the units' mean, whose inverse preconditions them all. Where activations
are nearly of lower rank that takes too long: who is not on the way in time is given to Cholesky.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from unitfisher.gram import Scaled, solve_others
from unitfisher.solvers import dot, require_regular

MANY_CASES = 1024  # from so many on iterations can be faster, if there are
MANY_UNITS = 32  # that share the preconditioner
PACE = 40  # the cases by this: iterations that cost about as much as three fifths of a factor
RESIDUAL = 1e-11  # relative, at which a unit stops
SLACK = 10  # a unit has converged if its true residual is up to so many times larger
LOOK = 4  # iterations from one look at which units are still busy to the next


class Iterated(NamedTuple):
    """Solutions, and the residual relative to the right-hand side: 0 where solved directly."""

    Y: Float64[Tensor, "u r n"]
    residual: Float64[Tensor, " u"]


def mean_inverse(scaled: Scaled, K: Float64[Tensor, "n n"]) -> Float64[Tensor, "n n"]:
    """Invert what a unit of mean squared weights would have."""
    square = (scaled.t**2).mean(0)
    t = square.sqrt()
    mean = t[:, None] * K * t
    mean.diagonal().add_(1 - square * K.diagonal())
    L, info = torch.linalg.cholesky_ex(mean)
    return torch.cholesky_inverse(L) if int(info) == 0 else torch.eye(len(K)).to(K)


def pays(K: Float[Tensor, "g n n"], units: int) -> bool:
    """Say whether iterations may be faster than factors."""
    return K.shape[-1] >= MANY_CASES and units >= MANY_UNITS * len(K)


def solve_by_iterations(
    K: Float64[Tensor, "g n n"],
    v: Float64[Tensor, "u n"],
    epsilon: Float64[Tensor, " u"],
    rhs: Float64[Tensor, "u r n"],
) -> Iterated:
    """Solve (diag(v_u) K diag(v_u) + ε_u I) Y_u = rhs_u, ε > 0, with one K for each group of units.

    Raises:
        SingularFisherError: Rounding hides that a unit's matrix has an inverse.
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
    """Return solutions, of those rows that came to an end in time."""
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
