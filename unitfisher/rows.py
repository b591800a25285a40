"""The cases of one layer's units as weighted rows: exact and cheap for fewer cases than inputs.

There the sums of `moments.UnitMoments` would be large and singular without damping; a system on
the cases' side is small, and in double precision loses nothing.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unitfisher.moments import UnitMoments, idle
from unitfisher.solvers import cholesky, cholesky_solve, dot, outer, require_regular


@dataclass(frozen=True)
class UnitRows:
    """Var_q = Σ_n z zᵀ + (λ/c) I of each unit, with rows z = v a - w m solved on the cases' side.

    One set of cases a serves all units of a group; what differs is how they weigh. Cases and the
    mean m = E_q(a) are given about a common origin.
    """

    c: Float[Tensor, " u"]
    mu_p: Float[Tensor, "*p d"]
    mu_q: Float[Tensor, "u d"]
    mean_shift: Float[Tensor, "u d"]
    a: Float[Tensor, "g n d"]
    m: Float[Tensor, "u d"]
    v: Float[Tensor, "u n"]
    w: Float[Tensor, "u n"]
    ridge: Float[Tensor, " u"]

    @property
    def alive(self) -> Bool[Tensor, " u"]:
        return self.c > 0

    @property
    def mu_q_double(self) -> Float[Tensor, "u d"]:
        return self.mu_q

    @property
    def epsilon(self) -> Float[Tensor, " u"]:
        return self.ridge / torch.where(self.alive, self.c, 1.0)

    @cached_property
    def trace_Var_q(self) -> Float[Tensor, " u"]:
        squares = self._of_group((self.a**2).sum(-1))
        products = dot(self.v * self.w, self._times(self.m))
        trace = (
            (self.v**2 * squares).sum(-1) - 2 * products + dot(self.w, self.w) * dot(self.m, self.m)
        )
        return trace + self.a.shape[-1] * self.epsilon

    def damped(self, damping: float) -> "UnitRows":
        """Damp the weight block; see UnitMoments.damped."""
        trace = self.trace_Var_q + dot(self.mu_q, self.mu_q)
        return replace(self, ridge=self.ridge + damping * self.c * trace / self.a.shape[-1])

    def solve(self, rhs: Float[Tensor, "u d"]) -> Float[Tensor, "u d"]:
        """Return Var_q⁻¹ rhs = (rhs - Zᵀ (Z Zᵀ + ε I)⁻¹ Z rhs) / ε; zero where a unit is dead."""
        factor, epsilon = self._factor
        y = self.v * self._times(rhs) - self.w * dot(self.m, rhs)[:, None]  # Z rhs
        y = cholesky_solve(factor, y)
        back = self._transposed(self.v * y) - self.m * dot(self.w, y)[:, None]  # Zᵀ y
        return (rhs - back) / epsilon[:, None] * self.alive[:, None]

    @cached_property
    def _factor(self) -> tuple[Float[Tensor, "u n n"], Float[Tensor, " u"]]:
        """Cholesky factor of Z Zᵀ + ε I, and ε; ε = 1 where a unit is idle."""
        epsilon = torch.where(idle(self.alive, self.trace_Var_q, self.mu_q), 1.0, self.epsilon)
        require_regular(epsilon > 0)
        gram = self._gram()
        gram.diagonal(dim1=-2, dim2=-1).add_(epsilon[:, None])
        return cholesky(gram), epsilon

    def _gram(self) -> Float[Tensor, "u n n"]:
        """Z Zᵀ from the one a aᵀ that the units of a group share."""
        gram = outer(self.v, self.v) * self._of_group(self.a @ self.a.mT)
        half = self.v * self._times(self.m) - self.w * (dot(self.m, self.m) / 2)[:, None]
        cross = outer(half, self.w)
        return gram.sub_(cross).sub_(cross.mT)

    def _times(self, x: Float[Tensor, "u d"]) -> Float[Tensor, "u n"]:
        grouped = x.reshape(len(self.a), -1, x.shape[-1])
        return (grouped @ self.a.mT).flatten(0, 1)

    def _transposed(self, y: Float[Tensor, "u n"]) -> Float[Tensor, "u d"]:
        grouped = y.reshape(len(self.a), -1, y.shape[-1])
        return (grouped @ self.a).flatten(0, 1)

    def _of_group(self, x: Float[Tensor, "g ..."]) -> Float[Tensor, "..."]:
        return x if len(x) == 1 else x.repeat_interleave(len(self.v) // len(x), 0)


Moments = UnitMoments | UnitRows
