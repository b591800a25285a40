"""The cases of one layer's units as weighted rows: exact and cheap for fewer cases than inputs.

There the sums of `moments.UnitMoments` would be large and singular without damping; a system on
the cases' side is small, and in double precision loses nothing. The theorems' scalars come from
one ridge regression of the constant 1 on the rows, without any vector as long as a unit's inputs.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unitfisher.gram import solve_grams
from unitfisher.moments import ConstantFit, UnitMoments, idle
from unitfisher.solvers import dot, require_regular


@dataclass(frozen=True)
class UnitRows:
    """Rows z = v (a - μ_p) of each unit, with Zᵀ Z = E_q (a - μ_p)(a - μ_p)ᵀ and Zᵀ w = μ_q - μ_p.

    One set of cases serves all units of a group; what differs is how they weigh. In joint sharing
    the cases are each unit's own gradients, and v = 1, up to the scale.
    """

    c: Float[Tensor, " u"]
    mu_p: Float[Tensor, "*p d"]
    mean_shift: Float[Tensor, "u d"]  # μ_q - μ_p
    trace_Var_q: Float[Tensor, " u"]
    about: Float[Tensor, "g n d"]  # a - μ_p, or gradients about it
    v: Float[Tensor, "u n"]
    w: Float[Tensor, "u n"]  # Σ w² = 1
    ridge: Float[Tensor, " u"]

    @classmethod
    def of(
        cls,
        c: Float[Tensor, " u"],
        mu_p: Float[Tensor, "*p d"],
        about: Float[Tensor, "g n d"],
        v: Float[Tensor, "u n"],
        w: Float[Tensor, "u n"],
    ) -> "UnitRows":
        """Take rows as they are, without damping."""
        mean_shift = _of_rows(about, v * w)
        squares = _per_unit((about**2).sum(-1), len(c))
        trace = (v**2 * squares).sum(-1) - dot(mean_shift, mean_shift)
        return cls(c, mu_p, mean_shift, trace, about, v, w, torch.zeros_like(c))

    @property
    def alive(self) -> Bool[Tensor, " u"]:
        return self.c > 0

    @cached_property
    def mu_q(self) -> Float[Tensor, "u d"]:
        return self.mu_p + self.mean_shift

    @property
    def mu_q_double(self) -> Float[Tensor, "u d"]:
        return self.mu_q

    @cached_property
    def epsilon(self) -> Float[Tensor, " u"]:
        """λ / c; 1 where a unit is idle, whose answer is 0 at any rate."""
        still = idle(self.alive, self.trace_Var_q, self.mu_q)
        epsilon = torch.where(still, 1.0, self.ridge / self.c)
        require_regular(epsilon > 0)
        return epsilon

    def damped(self, damping: float) -> "UnitRows":
        """Damp the weight block; see UnitMoments.damped."""
        d = self.about.shape[-1]
        more = damping * (self.trace_Var_q + dot(self.mu_q, self.mu_q)) / d
        ridge, trace = self.ridge + self.c * more, self.trace_Var_q + d * more * self.alive
        return replace(self, ridge=ridge, trace_Var_q=trace)

    def solve(self, rhs: Float[Tensor, "u d"]) -> Float[Tensor, "u d"]:
        """Return Var_q⁻¹ rhs; zero where a unit is dead.

        (Zᵀ Z + ε I)⁻¹ rhs = (rhs - Zᵀ (Z Zᵀ + ε I)⁻¹ Z rhs) / ε, and one rank more for the mean
        that Var_q is about (Sherman and Morrison).
        """
        y, _, e = self._constant
        z = self.v * _times_rows(self.about, rhs)  # Z rhs
        (solved,) = self._solve(z)
        z = solved - y * (self.epsilon * dot(y, z) / e)[:, None]
        x = (rhs - _of_rows(self.about, self.v * z)) / self.epsilon[:, None]
        return x * self.alive[:, None]

    @cached_property
    def fit(self) -> ConstantFit:
        """Fit the constant. Every product is one of vectors over cases.

        With α = (Zᵀ Z + ε I)⁻¹ (μ_q - μ_p) and β the same of μ_p, Var_q⁻¹ μ_q = r α + β where
        r = (1 + μ_pᵀ α) / e and e = 1 - (μ_q - μ_p)ᵀ α is what the fit leaves of the constant.
        """
        epsilon, mu_p, (y, t, e) = self.epsilon, self.mu_p, self._constant
        h = dot(self._mean, y)  # μ_pᵀ α
        b = (dot(mu_p, mu_p) - dot(self._mean, t)) / epsilon  # μ_pᵀ β
        r = (1 + h) / e
        gain = r * (1 + h) + b
        alpha, alpha_beta = dot(y, self.w - epsilon[:, None] * y), dot(y, t)  # ‖α‖², αᵀ β
        squared = epsilon * (r**2 * alpha + 2 * r * alpha_beta) + b - dot(t, t)  # ε ‖r α + β‖²
        return ConstantFit(gain, r - 1, squared / gain)

    @cached_property
    def _mean(self) -> Float[Tensor, "u n"]:
        """Z μ_p."""
        points = self.mu_p if self.mu_p.dim() == 2 else self.mu_p.expand(len(self.about), -1)
        return self.v * _times_rows(self.about, points)

    @cached_property
    def _constant(self) -> tuple[Float[Tensor, "u n"], Float[Tensor, "u n"], Float[Tensor, " u"]]:
        """Return y and t, solved for w and Z μ_p, so that α = Zᵀ y, and e = ε wᵀ y > 0."""
        y, t = self._solve(self.w, self._mean)
        return y, t, torch.where(self.alive, self.epsilon * dot(self.w, y), 1.0)

    @cached_property
    def _gram(self) -> Float[Tensor, "g n n"]:
        return self.about @ self.about.mT

    def _solve(self, *rhs: Float[Tensor, "u n"]) -> tuple[Float[Tensor, "u n"], ...]:
        """Return (Z Zᵀ + ε I)⁻¹ rhs, from the one product that the units of a group share."""
        solved = solve_grams(self._gram, self.v, self.epsilon, torch.stack(rhs, -1))
        require_regular(solved.regular)
        return solved.Y.unbind(-1)


def _times_rows(about: Float[Tensor, "g n d"], x: Float[Tensor, "v d"]) -> Float[Tensor, "v n"]:
    """Multiply each unit's vector, or each group's, with the rows of the group."""
    grouped = x.reshape(len(about), -1, x.shape[-1])
    return (grouped @ about.mT).flatten(0, 1)


def _of_rows(about: Float[Tensor, "g n d"], y: Float[Tensor, "u n"]) -> Float[Tensor, "u d"]:
    """Sum the rows of each unit's group with its coefficients."""
    grouped = y.reshape(len(about), -1, y.shape[-1])
    return (grouped @ about).flatten(0, 1)


def _per_unit(x: Float[Tensor, "g ..."], units: int) -> Float[Tensor, "..."]:
    return x if len(x) == 1 else x.repeat_interleave(units // len(x), 0)


Moments = UnitMoments | UnitRows
