"""The cases of one layer's units as weighted rows: exact and cheap for fewer cases than inputs.

There the sums of `moments.UnitMoments` would be large and singular without damping; a system on
the cases' side is small, and in double precision loses nothing.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unitfisher.moments import idle
from unitfisher.solvers import ADVICE, SingularFisherError, cholesky, cholesky_solve, dot


@dataclass(frozen=True)
class UnitRows:
    """Weighted centred cases Z of each unit, Var_q = ZᵀZ + (λ/c) I, solved on the cases' side."""

    c: Float[Tensor, " u"]
    mu_p: Float[Tensor, "*g d"]
    mu_q: Float[Tensor, "u d"]
    mean_shift: Float[Tensor, "u d"]
    Z: Float[Tensor, "u n d"]
    ridge: Float[Tensor, " u"]

    @property
    def alive(self) -> Bool[Tensor, " u"]:
        return self.c > 0

    @property
    def epsilon(self) -> Float[Tensor, " u"]:
        return self.ridge / torch.where(self.alive, self.c, 1.0)

    @property
    def trace_Var_q(self) -> Float[Tensor, " u"]:
        return (self.Z**2).sum((1, 2)) + self.Z.shape[-1] * self.epsilon

    def damped(self, damping: float) -> "UnitRows":
        """Damp the weight block; see UnitMoments.damped."""
        trace = self.trace_Var_q + dot(self.mu_q, self.mu_q)
        return replace(self, ridge=self.ridge + damping * self.c * trace / self.Z.shape[-1])

    def solve(self, rhs: Float[Tensor, "u d"]) -> Float[Tensor, "u d"]:
        """Return Var_q⁻¹ rhs = (rhs - Zᵀ (Z Zᵀ + ε I)⁻¹ Z rhs) / ε; zero where a unit is dead."""
        factor, epsilon = self._factor
        y = cholesky_solve(factor, (self.Z @ rhs.unsqueeze(-1)).squeeze(-1))
        back = (y.unsqueeze(1) @ self.Z).squeeze(1)
        return (rhs - back) / epsilon[:, None] * self.alive[:, None]

    @cached_property
    def _factor(self) -> tuple[Float[Tensor, "u n n"], Float[Tensor, " u"]]:
        """Cholesky factor of Z Zᵀ + ε I, and ε; ε = 1 where a unit is idle."""
        epsilon = torch.where(idle(self), 1.0, self.epsilon)
        if bool((epsilon == 0).any()):
            raise SingularFisherError(
                f"the Fisher of unit {int((epsilon == 0).nonzero()[0])} is singular: "
                f"{self.Z.shape[1]} cases for {self.Z.shape[2]} inputs; {ADVICE}"
            )
        eye = torch.eye(self.Z.shape[1], dtype=self.Z.dtype, device=self.Z.device)
        return cholesky(self.Z @ self.Z.mT + epsilon[:, None, None] * eye), epsilon
