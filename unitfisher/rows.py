"""The cases of one layer's units as weighted rows: exact and cheap for fewer cases than inputs.

There the sums of `sums.UnitMoments` would be large, and singular without damping. A system on the
cases' side, n × n, is small, and accurate in double precision. The theorems' scalars come from one
ridge regression of the constant 1 on the rows, which needs no vector as long as a unit's inputs.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unitfisher import conjugate, refinement
from unitfisher.gram import products, solve_grams
from unitfisher.moments import ConstantFit, ridge_and_trace
from unitfisher.solvers import dot, require_regular, squared


class Solved(NamedTuple):
    """Solutions Y = (Z Zᵀ + ε I)⁻¹ rhs, their products Y rhsᵀ and Y Yᵀ, and residuals."""

    Y: Float[Tensor, "u r n"]
    with_rhs: Float[Tensor, "u r r"]
    with_Y: Float[Tensor, "u r r"]
    residual: Float[Tensor, " u"]  # relative; 0 where solved directly


@dataclass(frozen=True)
class UnitRows:
    """Rows z = v (a - μ_p) of each unit, with Zᵀ Z = E_q (a - μ_p)(a - μ_p)ᵀ and Zᵀ w = μ_q - μ_p.

    The units of a group share the cases and differ in the weights v. With ``sharing="joint"`` each
    unit is a group: its rows are its own gradients, and v is the same for all of these.
    """

    c: Float[Tensor, " u"]
    center: Float[Tensor, "g d"]  # μ_p
    about: Float[Tensor, "g n d"]  # a - μ_p, or gradients about it
    gram: Float[Tensor, "g n n"]  # inner products of these
    v: Float[Tensor, "u n"]
    w: Float[Tensor, "u n"]  # Σ w² = 1
    mean_rows: Float[Tensor, "u n"]  # Z μ_p
    mu_q: Float[Tensor, "u d"]
    mu_q_squared: Float[Tensor, " u"]
    trace_Var_q: Float[Tensor, " u"]
    ridge: Float[Tensor, " u"]
    trace_Daa: Float[Tensor, " u"]  # see `moments.trace_Daa`
    iterates: bool = True  # by conjugate gradients, where cases are many

    @classmethod
    def of(
        cls,
        c: Float[Tensor, " u"],
        center: Float[Tensor, "g d"],
        about: Float[Tensor, "g n d"],
        gram: Float[Tensor, "g n n"],
        v: Float[Tensor, "u n"],
        w: Float[Tensor, "u n"],
        trace_Daa: Float[Tensor, " u"],
    ) -> "UnitRows":
        """Build from rows, without damping."""
        groups = len(about)
        mean_rows = v.unflatten(0, (groups, -1)) * (about @ center.unsqueeze(-1)).mT
        shift = (v * w).unflatten(0, (groups, -1)) @ about  # μ_q - μ_p
        squares = v.unflatten(0, (groups, -1)) ** 2 @ gram.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        trace_Var_q = squares.squeeze(-1) - squared(shift)
        mu_q = shift.add_(center.unsqueeze(1)).flatten(0, 1)
        return cls(
            c=c,
            center=center,
            about=about,
            gram=gram,
            v=v,
            w=w,
            mean_rows=mean_rows.flatten(0, 1),
            mu_q=mu_q,
            mu_q_squared=squared(mu_q),
            trace_Var_q=trace_Var_q.flatten(),
            ridge=torch.zeros_like(c),
            trace_Daa=trace_Daa,
        )

    @cached_property
    def alive(self) -> Bool[Tensor, " u"]:
        return self.c > 0

    tolerance: ClassVar[float] = conjugate.SLACK * conjugate.RESIDUAL

    @property
    def residual(self) -> Float[Tensor, " u"]:
        """Relative residual of the first systems solved; 0 if solved directly."""
        return self._constant.residual

    @property
    def mu_q_double(self) -> Float[Tensor, "u d"]:
        return self.mu_q

    @property
    def mean_shift(self) -> Float[Tensor, "u d"]:
        """μ_q - μ_p."""
        return (self.mu_q.unflatten(0, (len(self.center), -1)) - self.center[:, None]).flatten(0, 1)

    @cached_property
    def epsilon(self) -> Float[Tensor, " u"]:
        """λ / c; 1 where a unit is dead or all its inputs are 0: its solution is 0 anyway."""
        epsilon = torch.where(self.alive & (self.trace_Daa > 0), self.ridge / self.c, 1.0)
        require_regular(epsilon > 0)
        return epsilon

    def damped(self, damping: float) -> "UnitRows":
        """Damp the weight block."""
        ridge, trace = ridge_and_trace(self, damping)
        return replace(self, ridge=ridge, trace_Var_q=trace)

    def solve(self, rhs: Float[Tensor, "u d"]) -> Float[Tensor, "u d"]:
        """Return Var_q⁻¹ rhs; zero where a unit is dead.

        (Zᵀ Z + ε I)⁻¹ rhs = (rhs - Zᵀ (Z Zᵀ + ε I)⁻¹ Z rhs) / ε, and a term of rank one, as Var_q
        is about μ_q (Sherman and Morrison). The first call solves for the constant too, with the
        same factor, and keeps that solution.
        """
        grouped = rhs.unflatten(0, (len(self.about), -1))
        z = self.v * (grouped @ self.about.mT).flatten(0, 1)  # Z rhs
        if "_constant" in vars(self):
            x, yz = self._solve(z).Y[:, 0], dot(self._constant.Y[:, 0], z)
        else:
            solved = vars(self)["_constant"] = self._solve(self.w, self.mean_rows, z)
            x, yz = solved.Y[:, 2], solved.with_rhs[:, 0, 2]
        z = self.v * (x - self._constant.Y[:, 0] * (self.epsilon * yz / self._left)[:, None])
        return self._from_rows(grouped, z).mul_((self.alive / self.epsilon)[:, None])

    @cached_property
    def mu_q_solved(self) -> Float[Tensor, "u d"]:
        """Var_q⁻¹ μ_q = r α + β, as in `fit`."""
        y, t = self._constant.Y[:, 0], self._constant.Y[:, 1]
        z = self.v * (t - (self.epsilon * (1 + self.fit.k))[:, None] * y)
        grouped = self.center.unsqueeze(1).expand(-1, len(z) // len(self.center), -1)
        return self._from_rows(grouped, z).mul_((self.alive / self.epsilon)[:, None])

    def _from_rows(
        self, x: Float[Tensor, "g v d"], z: Float[Tensor, "u n"]
    ) -> Float[Tensor, "u d"]:
        """Return x - Σ z (a - μ_p)."""
        return torch.baddbmm(x, z.unflatten(0, x.shape[:2]), self.about, alpha=-1).flatten(0, 1)

    @cached_property
    def fit(self) -> ConstantFit:
        """Fit the constant, by products of vectors over cases only.

        Let y and t be the solutions for w and Z μ_p. Then α = (Zᵀ Z + ε I)⁻¹ (μ_q - μ_p) = Zᵀ y,
        and β = (Zᵀ Z + ε I)⁻¹ μ_p comes from t. Var_q⁻¹ μ_q = r α + β, with r = (1 + μ_pᵀ α) / e
        and e = 1 - (μ_q - μ_p)ᵀ α, the mean residual of the fit to a - μ_p under q.
        """
        epsilon, (_, with_rhs, with_Y, _) = self.epsilon, self._constant
        center_squared = squared(self.center).unsqueeze(-1)
        mean_squared = center_squared.expand(-1, len(self.c) // len(self.center)).flatten()
        h = with_rhs[:, 0, 1]  # μ_pᵀ α
        b = (mean_squared - with_rhs[:, 1, 1]) / epsilon  # μ_pᵀ β
        r = (1 + h) / self._left
        gain = r * (1 + h) + b
        alpha, alpha_beta = with_rhs[:, 0, 0] - epsilon * with_Y[:, 0, 0], with_Y[:, 0, 1]
        size = epsilon * (r**2 * alpha + 2 * r * alpha_beta) + b - with_Y[:, 1, 1]  # ε ‖r α + β‖²
        return ConstantFit(gain, r - 1, size / gain)

    @cached_property
    def _left(self) -> Float[Tensor, " u"]:
        """e = 1 - (μ_q - μ_p)ᵀ α = ε wᵀ y > 0, as in `fit`."""
        return torch.where(self.alive, self.epsilon * self._constant.with_rhs[:, 0, 0], 1.0)

    @cached_property
    def _constant(self) -> Solved:
        """Solutions for w and Z μ_p; another right-hand side may have been solved with them."""
        return self._solve(self.w, self.mean_rows)

    def _solve(self, *rhs: Float[Tensor, "u n"]) -> Solved:
        """Solve with Z Zᵀ + ε I, from the Gram matrix that the units of a group share."""
        system = self.gram, self.v, self.epsilon, torch.stack(rhs, 1)
        if self.iterates and conjugate.pays(self.gram, len(self.v)):
            Y, residual = conjugate.solve_by_iterations(*system)
            found = products(Y, system[-1])
        else:
            pays = refinement.pays(self.gram, len(self.v))
            Y, regular, found = (refinement.solve_refined if pays else solve_grams)(*system)
            require_regular(regular)
            residual = torch.zeros_like(self.c)
        with_rhs, with_Y = found.split(len(rhs), -1)
        return Solved(Y, with_rhs, with_Y, residual)
