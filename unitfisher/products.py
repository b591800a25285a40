"""The cases of one layer's units, known by their products with vectors: conjugate gradients.

Where there are many more cases than inputs, and many inputs, forming every unit's u·d² sums is
what costs. Here all units of a layer iterate at once, each step two products with the activations
that they share. Those are whitened first, by the second moment under the units' mean weights: what
is left to iterate on is how a unit's own weights differ from that mean.
"""

import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unitfisher.moments import ConstantFit, UnitMoments, idle
from unitfisher.rows import UnitRows
from unitfisher.solvers import dot, require_regular, solve

ITERATIONS = 300  # at most
ENOUGH = {torch.float32: 1e-6, torch.float64: 1e-11}  # of the relative residual, to stop at
ROUNDING = 100  # times more may be left in truth


class UnconvergedWarning(UserWarning):
    """Conjugate gradients stopped before they had the answer for every unit."""


class Whitened(NamedTuple):
    """Activations about their mean, ã = L⁻¹ (a - μ_p), so that Σ q̄ ã ãᵀ + ε̄ L⁻¹ L⁻ᵀ = I."""

    rows: Float[Tensor, "g n d"]
    L: Float[Tensor, "g d d"]
    mean_q: Float[Tensor, "g v d"]  # of the rows
    ridge: Float[Tensor, "g d d"]  # L⁻¹ L⁻ᵀ


class Solution(NamedTuple):
    """Of one system a unit, and the residual relative to the right-hand side, both whitened."""

    x: Float[Tensor, "u d"]
    residual: Float[Tensor, " u"]


@dataclass(frozen=True)
class UnitProducts:
    """Weighted cases of each unit, Σ q = 1; see `rows.UnitRows` for what the names mean."""

    c: Float[Tensor, " u"]
    center: Float[Tensor, "g d"]  # μ_p
    about: Float[Tensor, "g n d"]  # a less μ_p rounded to the precision of the activations
    q: Float[Tensor, "g v n"]
    mean_about: Float[Tensor, "u d"]  # of these under q
    mean_shift: Float[Tensor, "u d"]  # μ_q - μ_p
    trace_Var_q: Float[Tensor, " u"]
    ridge: Float[Tensor, " u"]
    patience: int | None = None  # iterations before Cholesky solves the rest; None: it never does

    @classmethod
    def of(
        cls,
        c: Float[Tensor, " u"],
        center: Float[Tensor, "g d"],
        a: Float[Tensor, "g n d"],
        q: Float[Tensor, "g v n"],
    ) -> "UnitProducts":
        """Take cases as they are, without damping."""
        origin = center.to(a.dtype)
        about = a - origin.unsqueeze(1)
        mean = (q @ about).double()
        shift = mean - (center - origin.double()).unsqueeze(1)
        squares = (q @ about.square().sum(-1, keepdim=True)).double().flatten()
        mean, shift = mean.flatten(0, 1), shift.flatten(0, 1)
        trace = squares - dot(mean, mean)
        return cls(c, center, about, q, mean, shift, trace, torch.zeros_like(c))

    @property
    def alive(self) -> Bool[Tensor, " u"]:
        return self.c > 0

    @cached_property
    def mu_q(self) -> Float[Tensor, "u d"]:
        return (self._grouped(self.mean_shift) + self.center.unsqueeze(1)).flatten(0, 1)

    @property
    def mu_q_double(self) -> Float[Tensor, "u d"]:
        return self.mu_q

    @cached_property
    def mu_q_squared(self) -> Float[Tensor, " u"]:
        return dot(self.mu_q, self.mu_q)

    def from_mu_p(self, x: Float[Tensor, "u d"]) -> Float[Tensor, "u d"]:
        """Return μ_p - x."""
        return (self.center.unsqueeze(1) - self._grouped(x)).flatten(0, 1)

    def damped(self, damping: float) -> "UnitProducts":
        """Damp the weight block; see UnitMoments.damped."""
        d = self.about.shape[-1]
        more = damping * (self.trace_Var_q + self.mu_q_squared) / d
        ridge, trace = self.ridge + self.c * more, self.trace_Var_q + d * more * self.alive
        return replace(self, ridge=ridge, trace_Var_q=trace)

    def solve(self, rhs: Float[Tensor, "u d"]) -> Float[Tensor, "u d"]:
        """Return Var_q⁻¹ rhs; zero where a unit is dead.

        Raises:
            SingularFisherError: Some living unit has no more weighted cases than inputs, undamped.
        """
        return self.solve_to_residual(rhs).x

    @cached_property
    def fit(self) -> ConstantFit:
        gain = 1 + dot(self.mu_q, self._constant.x)
        squared = self.epsilon * dot(self._constant.x, self._constant.x)
        return ConstantFit(gain, dot(self.mean_shift, self._constant.x), squared / gain)

    @property
    def residual(self) -> Float[Tensor, " u"]:
        """What conjugate gradients left of the system that s and k come from, relative."""
        return self._constant.residual

    @property
    def tolerance(self) -> float:
        """A residual up to which a unit counts as solved."""
        return ROUNDING * ENOUGH[self.about.dtype]

    @cached_property
    def epsilon(self) -> Float[Tensor, " u"]:
        """λ / c; zero for the dead."""
        return self.ridge / torch.where(self.alive, self.c, 1.0)

    @cached_property
    def _constant(self) -> Solution:
        return self.solve_to_residual(self.mu_q)

    @cached_property
    def _idle(self) -> Bool[Tensor, " u"]:
        return idle(self.alive, self.trace_Var_q, self.mu_q_squared)

    @cached_property
    def _whitened(self) -> Whitened:
        epsilon, busy = self._grouped(self.epsilon), self._grouped(~self._idle)
        units = busy.sum(1, keepdim=True).clamp_min(1)
        shared = (self.q * busy.unsqueeze(-1)).sum(1).unsqueeze(-1) / units.unsqueeze(-1)
        moment = ((shared * self.about).mT @ self.about).double()
        eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
        mean_ridge = ((epsilon * busy).sum(1, keepdim=True) / units).unsqueeze(-1)
        none = ~busy.any(1)[:, None, None]
        L, info = torch.linalg.cholesky_ex(torch.where(none, eye, moment + mean_ridge * eye))
        require_regular((info == 0).repeat_interleave(busy.shape[1]))
        inverse = torch.linalg.solve_triangular(L, eye.expand_as(L), upper=False)
        rows = self.about @ inverse.mT.to(self.about.dtype)
        mean_q = self._grouped(self.mean_about) @ inverse.mT
        return Whitened(rows, L, mean_q, inverse @ inverse.mT)

    def solve_to_residual(self, rhs: Float[Tensor, "u d"]) -> Solution:
        """Solve for all units at once; each stops to change when its residual is small enough."""
        some = (self.q > 0).sum(-1).flatten() > self.about.shape[-1]
        require_regular(some | (self.ridge > 0) | self._idle)
        w, enough = self._whitened, ENOUGH[self.about.dtype] ** 2
        b = torch.linalg.solve_triangular(w.L, self._grouped(rhs.double()).mT, upper=False).mT
        size = torch.linalg.vector_norm(b, dim=-1, keepdim=True)
        busy = self._grouped(~self._idle).unsqueeze(-1) & (size > 0)
        scale = torch.where(busy, size, 1.0)
        y, r = torch.zeros_like(b), b / scale * busy
        p, rr = r.clone(), r.square().sum(-1, keepdim=True)
        for i in range(ITERATIONS if self.patience is None else self.patience):
            if i % 4 == 0 and bool((rr <= enough).all()):
                break
            Ap = self._times(p)
            curvature = dot(p, Ap).unsqueeze(-1)
            still = (rr > enough) & (curvature > 0)
            step = torch.where(still, rr / torch.where(still, curvature, 1.0), 0.0)
            y, r = y + step * p, r - step * Ap
            new = r.square().sum(-1, keepdim=True)
            p = torch.where(still, r + new / torch.where(rr > 0, rr, 1.0) * p, p)
            rr = torch.where(still, new, rr)
        residual = torch.linalg.vector_norm(b / scale * busy - self._times(y), dim=-1).flatten()
        x = torch.linalg.solve_triangular(w.L.mT, (y * scale).mT, upper=True).mT.flatten(0, 1)
        if self.patience is not None:
            for unit in (residual > self.tolerance).nonzero().flatten().tolist():
                x[unit], residual[unit] = self._directly(unit, rhs[unit]), 0.0
        x = torch.where(self._idle[:, None], rhs, x) * self.alive[:, None]
        self._name_unconverged(residual)
        return Solution(x, residual)

    def _directly(self, unit: int, rhs: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """Solve one unit's system from its second moments."""
        group, own = divmod(unit, self.q.shape[1])
        about, mean = self.about[group], self.mean_about[unit]
        second = ((self.q[group, own].unsqueeze(1) * about).mT @ about).double()
        V = second - torch.outer(mean, mean)
        V.diagonal().add_(self.epsilon[unit])
        return solve(V.unsqueeze(0), rhs.double().unsqueeze(0))[0]

    def _name_unconverged(self, residual: Float[Tensor, " u"]) -> None:
        bad = int((~(residual <= self.tolerance)).sum())
        if bad:
            warnings.warn(
                f"conjugate gradients left a residual of up to {float(residual.max()):.1e}, not "
                f"{self.tolerance:.0e}, in {bad} of {residual.numel()} units after {ITERATIONS} "
                f"iterations: raise damping=, or solve directly with solver='direct'",
                UnconvergedWarning,
                stacklevel=2,
            )

    def _times(self, y: Float[Tensor, "g v d"]) -> Float[Tensor, "g v d"]:
        """Multiply by L⁻¹ Var_q L⁻ᵀ; products with the cases in their own precision."""
        w = self._whitened
        z = y.to(w.rows.dtype) @ w.rows.mT
        products = (z.mul_(self.q) @ w.rows).double()
        mean = w.mean_q * dot(w.mean_q, y).unsqueeze(-1)
        return products - mean + self._grouped(self.epsilon).unsqueeze(-1) * (y @ w.ridge)

    def _grouped(self, x: Tensor) -> Tensor:
        grouped: Tensor = x.unflatten(0, (len(self.about), -1))
        return grouped


Moments = UnitMoments | UnitRows | UnitProducts
