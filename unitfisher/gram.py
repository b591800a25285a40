"""Solve the systems diag(v) K diag(v) - x xᵀ + ε I of many units that share a Gram matrix K.

A kernel in C solves one unit in each lane of a vector; without it torch solves. Neither keeps a
factor: for small systems the kernel factors about as fast as it could read a stored factor.
"""

import ctypes
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from unitfisher import native
from unitfisher.memory import workspace
from unitfisher.native import Kernel
from unitfisher.solvers import factored, outer, rounding, substituted


class GramSolution(NamedTuple):
    """Solutions, NaN for units whose matrix is singular, and which units are regular."""

    Y: Float64[Tensor, "u r n"]
    regular: Bool[Tensor, " u"]
    products: Float64[Tensor, "u r 2*r"]  # of solutions with right-hand sides, and with one another


class System(NamedTuple):
    """The systems to solve, with one K for each of g groups of consecutive units."""

    K: Float[Tensor, "g n n"]
    v: Float[Tensor, "u n"]
    epsilon: Float[Tensor, " u"]
    rhs: Float[Tensor, "u r n"]
    x: Float[Tensor, "u n"]
    noise: Float[Tensor, "u n"]

    @property
    def group(self) -> int:
        return max(1, len(self.v) // len(self.K))

    def of_units(self, part: slice) -> "System":
        K = self.K
        if len(K) > 1:
            K = K[torch.arange(len(self.v), device=K.device)[part] // self.group]
        return System(K, *(each[part] for each in self[1:]))


class Task(native.Task):
    """The struct Task of solve_grams.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("K", "v", "own", "rhs", "x", "noise")),
        *((name, ctypes.c_void_p) for name in ("Y", "products", "L", "regular")),
        *((name, ctypes.c_int64) for name in ("u", "n", "r", "group", "known", "taken")),
    )


def solve_grams(
    K: Float[Tensor, "*g n n"],
    v: Float[Tensor, "u n"],
    epsilon: Float[Tensor, " u"],
    rhs: Float[Tensor, "u r n"],
    x: Float[Tensor, "u n"] | None = None,
    noise: Float[Tensor, "u n"] | None = None,
) -> GramSolution:
    """Solve (diag(v_u) K diag(v_u) - x_u x_uᵀ + ε_u I) Y_u = rhs_u for all units, in double.

    K is one matrix for all units, or one for each of g groups of consecutive units. A matrix is
    called regular if every pivot of its Cholesky factor is more than ``noise``, the error of the
    diagonal entry it began as, plus 64 eps of that entry before x xᵀ was subtracted.

    Raises:
        ValueError: The number of units is no multiple of the number of groups.
    """
    u, _, n = rhs.shape
    groups = len(K) if K.dim() == 3 else 1
    if u % groups:
        raise ValueError(f"{u} units cannot share {groups} Gram matrices evenly")
    zero = torch.zeros_like(v)
    x, noise = (zero if each is None else each for each in (x, noise))
    of_units = v.expand(u, n), epsilon.expand(u), rhs, x.expand(u, n), noise.expand(u, n)
    system = System(K.expand(groups, n, n), *of_units)
    kernel = native.kernel("solve_grams", *system)
    return _by_torch(system) if kernel is None else _by_kernel(kernel, system)


def solve_others(
    Y: Float64[Tensor, "u r n"],
    units: Bool[Tensor, " u"],
    K: Float64[Tensor, "g n n"],
    v: Float64[Tensor, "u n"],
    epsilon: Float64[Tensor, " u"],
    rhs: Float64[Tensor, "u r n"],
) -> Bool[Tensor, " u"]:
    """Solve the systems of ``units`` by Cholesky, into Y; return which are not singular."""
    regular, chosen = torch.ones_like(units), units.nonzero().flatten()
    if len(chosen):
        grams = K if len(K) == 1 else K[chosen * len(K) // len(v)]
        found = solve_grams(grams, v[chosen], epsilon[chosen], rhs[chosen])
        Y[chosen], regular[chosen] = found.Y, found.regular
    return regular


class Scaled(NamedTuple):
    """Systems diag(own) + diag(t) K diag(t), one per row, scaled to a unit diagonal."""

    own: Float64[Tensor, "w n"]
    t: Float64[Tensor, "w n"]

    @classmethod
    def of(
        cls,
        K: Float64[Tensor, "n n"],
        v: Float64[Tensor, "u n"],
        epsilon: Float64[Tensor, " u"],
    ) -> tuple["Scaled", Float64[Tensor, "u n"]]:
        """Return them, and the scale by which right-hand sides and solutions are to be divided."""
        square = torch.addcmul(epsilon[:, None], v**2, K.diagonal())
        return cls(epsilon[:, None] / square, v / square.sqrt()), square.sqrt()

    def at(self, rows: Int[Tensor, " w"]) -> "Scaled":
        return Scaled(self.own[rows], self.t[rows])

    def times(self, x: Float64[Tensor, "w n"], K: Float64[Tensor, "n n"]) -> Float64[Tensor, "w n"]:
        return torch.addcmul(self.own * x, self.t, (self.t * x) @ K)


def _by_kernel(kernel: Kernel, system: System) -> GramSolution:
    (K, v, epsilon, rhs, x, noise), (u, r, n) = system, system.rhs.shape
    ridge = epsilon[:, None].expand(u, n)
    inputs = [each.contiguous() for each in (K, v, ridge, rhs, x, noise)]
    found = GramSolution(
        rhs.new_empty(u, r, n), rhs.new_empty(u, dtype=torch.bool), rhs.new_empty(u, r, 2 * r)
    )
    pointers = [each.data_ptr() for each in (*inputs, found.Y, found.products)]
    task = Task(*pointers, None, found.regular.data_ptr(), u, n, r, system.group, False, 0)
    native.run(kernel, task, u * n**2 * (n // 3 + 4 * r))
    return found


def _by_torch(system: System) -> GramSolution:
    u, _, n = system.rhs.shape
    units = max(1, workspace() // (24 * max(1, n) ** 2))
    parts = (slice(start, start + units) for start in range(0, max(1, u), units))
    found = [_part_by_torch(system.of_units(part)) for part in parts]
    return GramSolution(*(torch.cat(x) for x in zip(*found, strict=True)))


def _part_by_torch(part: System) -> GramSolution:
    K, v, epsilon, rhs, x, noise = (each.double() for each in part)
    weighted = outer(v, v).mul(K)
    diagonal = weighted.diagonal(dim1=-2, dim2=-1) + epsilon[:, None]
    matrix = weighted - outer(x, x)
    matrix.diagonal(dim1=-2, dim2=-1).add_(epsilon[:, None])
    L, regular = factored(matrix, noise + rounding(torch.float64) * diagonal)
    Y = torch.where(regular[:, None, None], substituted(L, rhs.mT).mT, torch.nan)
    return GramSolution(Y, regular, products(Y, rhs))


def products(Y: Float64[Tensor, "u r n"], rhs: Float64[Tensor, "u r n"]) -> Tensor:
    """Multiply solutions with their right-hand sides, and with one another."""
    return torch.cat([Y @ rhs.mT, Y @ Y.mT], -1)
