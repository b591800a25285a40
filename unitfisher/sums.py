"""Moments of one layer's units as sums: c, E_p(a), E_q(a) and second moments under q.

They add up over batches, and are small if a unit has few inputs. With fewer cases than inputs
`rows.UnitRows` keeps the cases instead.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unitfisher.gram import solve_grams
from unitfisher.moments import ConstantFit, damping_of, fit_by_solving, least_pivots, trace_Daa
from unitfisher.second_moments import second_moments
from unitfisher.solvers import dot, outer, require_regular, rounding, roundings


@dataclass(frozen=True)
class UnitMoments:
    """Sums over cases, taken about a fixed origin near the mean so that variances keep digits.

    D is the squared error signal E_y δ² of a unit in a case. Moments of parts with the same
    origin add up: ``m1 + m2``.

    >>> a, D = torch.randn(100, 3), torch.rand(100, 5)  # 100 cases, 3 inputs, 5 units
    >>> m = UnitMoments.of(a, D)
    >>> tuple(m.A.shape)
    (5, 3, 3)
    """

    origin: Float[Tensor, "*g d"]
    cases: Float[Tensor, ""]  # Σ 1 over samples and positions
    samples: Float[Tensor, ""]  # Σ 1 over samples
    sum_a: Float[Tensor, "*g d"]  # Σ (a - origin)
    sum_D: Float[Tensor, " u"]  # Σ D
    sum_DD: Float[Tensor, " u"]  # Σ D²
    support: Float[Tensor, " u"]  # Σ 1 over cases that carry weight: they bound the rank
    trace_Daa: Float[Tensor, " u"]  # see `moments.trace_Daa`
    sum_Da: Float[Tensor, "u d"]  # Σ D (a - origin)
    sum_Daa: Float[Tensor, "u d d"]  # Σ D (a - origin)(a - origin)ᵀ
    ridge: Float[Tensor, " u"]  # λ on the weight block of F
    bias_ridge: Float[Tensor, " u"]  # λ on the bias, which the sums already include
    eps: float  # relative rounding error of the activations
    noise: float  # bound on the relative error of second moments

    @classmethod
    def of(
        cls,
        a: Float[Tensor, "*g n d"],
        D: Float[Tensor, "n u"],
        *,
        origin: Float[Tensor, "*u d"] | None = None,
        samples: int | None = None,
    ) -> "UnitMoments":
        """Sum over cases.

        Args:
            a: Incoming activations. A leading axis g holds groups; each has u / g units.
            D: Squared error signals, not negative. Sums are kept in its precision, products are
                formed in that of ``a``.
            origin: A point near the mean of ``a``, or one per unit near its E_q(a). None: this
                batch's mean.
            samples: Number of samples that the cases are positions of. None: each is a sample.
        """
        units = D.shape[1]
        grouped = a.unsqueeze(0) if a.dim() == 2 else a
        center = grouped.detach().mean(1)
        if origin is None:
            origin = center[0] if len(center) == 1 else _repeated(center, units)
        sum_Da, sum_Daa, error = second_moments(grouped, D, origin)
        coarser = max(a.dtype, D.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        return cls(
            origin=origin.to(D.dtype),
            cases=D.new_tensor(len(D)),
            samples=D.new_tensor(len(D) if samples is None else samples),
            sum_a=_sum_about(origin.to(D.dtype), grouped, center),
            sum_D=D.sum(0),
            sum_DD=(D**2).sum(0),
            support=(D > 0).sum(0).to(D.dtype),
            trace_Daa=trace_Daa(grouped, D),
            sum_Da=sum_Da,
            sum_Daa=sum_Daa,
            ridge=D.new_zeros(units),
            bias_ridge=D.new_zeros(units),
            eps=torch.finfo(coarser).eps,
            noise=rounding(coarser, error),
        )

    @classmethod
    def of_gradients(
        cls,
        G: Float[Tensor, "r u d"],
        S: Float[Tensor, "r u"],
        mean: Float[Tensor, "*g d"],
        *,
        origin: Float[Tensor, "*g d"] | None = None,
        samples: int | None = None,
        eps: float = 0.0,
    ) -> "UnitMoments":
        """Sum over gradients that are already summed over positions (``sharing="joint"``).

        Args:
            G: Weight gradients Σ_t δ a, one row per sample and column of the label expectation.
            S: Bias gradients Σ_t δ.
            mean: E_p(a) over all positions.
            origin: A point near that mean. None: the mean itself.
            samples: Number of samples that the rows belong to. None: each row is a sample.
            eps: Relative rounding error of the activations that the gradients were formed from, if
                these were less precise than ``G``.
        """
        origin = mean if origin is None else origin
        about = G - S.unsqueeze(-1) * origin
        D = S**2
        count = S.new_tensor(len(S) if samples is None else samples)
        return cls(
            origin=origin,
            cases=count,
            samples=count,
            sum_a=(mean - origin) * count,
            sum_D=D.sum(0),
            sum_DD=(D**2).sum(0),
            support=((S != 0) | (G != 0).any(-1)).sum(0).to(S.dtype),
            trace_Daa=(G.detach() ** 2).sum((0, -1)),
            sum_Da=(S.unsqueeze(-1) * about).sum(0),
            sum_Daa=about.permute(1, 2, 0) @ about.transpose(0, 1),
            ridge=S.new_zeros(S.shape[1]),
            bias_ridge=S.new_zeros(S.shape[1]),
            eps=eps,
            noise=max((8 * eps) ** 2, rounding(S.dtype, roundings(len(S), len(S)))),
        )

    def __add__(self, other: "UnitMoments") -> "UnitMoments":
        """Return the moments of both sets of cases.

        Raises:
            ValueError: They were formed about different origins.
        """
        if self.origin.shape != other.origin.shape or not self.origin.equal(other.origin):
            raise ValueError(
                "moments add up about one origin: UnitMoments.of(..., origin=m.origin)"
            )
        sums = (
            "cases",
            "samples",
            "support",
            "trace_Daa",
            "sum_a",
            "sum_D",
            "sum_DD",
            "sum_Da",
            "sum_Daa",
        )
        total = {name: getattr(self, name) + getattr(other, name) for name in sums}
        for name in ("ridge", "bias_ridge"):
            one, two = (getattr(m, name) * m.samples for m in (self, other))
            total[name] = (one + two) / total["samples"]
        eps, noise = max(self.eps, other.eps), max(self.noise, other.noise)
        return replace(self, **total, eps=eps, noise=noise)

    def damped(self, damping: float, *, block: str = "weight") -> "UnitMoments":
        """Return the moments of F + λ diag(1, ..., 1, 0), λ = damping · trace(A) / d per unit.

        Only Var_q changes, by (λ/c) I; the theorems stay exact. ``block="full"`` damps the bias
        too, F + λI, by one more case a = 0 of D mass λ: c and E_q(a) change with it.

        Raises:
            ValueError: Damping is negative or not finite, or there is no such block.
        """
        ridge = self.c * damping_of(self, damping)
        damped = replace(self, ridge=self.ridge + ridge)
        if block == "weight":
            return damped
        if block != "full":
            raise ValueError(f"block must be 'weight' or 'full', got {block!r}")
        D, about = ridge * self.samples, -self.origin.expand_as(self.sum_Da)
        return replace(
            damped,
            bias_ridge=self.bias_ridge + ridge,
            sum_D=self.sum_D + D,
            sum_DD=self.sum_DD + D**2,
            support=self.support + (D > 0),
            sum_Da=self.sum_Da + D[:, None] * about,
            sum_Daa=self.sum_Daa + D[:, None, None] * outer(about, about),
        )

    @cached_property
    def alive(self) -> Bool[Tensor, " u"]:
        return self.sum_D > 0

    @property
    def c(self) -> Float[Tensor, " u"]:
        return self.sum_D / self.samples

    @property
    def n_eff(self) -> Float[Tensor, " u"]:
        return self.sum_D**2 / self.sum_DD

    @property
    def mu_p(self) -> Float[Tensor, "*g d"]:
        return self.origin + self.sum_a / self.cases

    @property
    def center(self) -> Float[Tensor, "g d"]:
        """E_p(a) of each of g groups of consecutive units."""
        return self.mu_p.unsqueeze(0) if self.mu_p.dim() == 1 else self.mu_p

    @cached_property
    def mu_q(self) -> Float[Tensor, "u d"]:
        return self.origin + self._mean

    @cached_property
    def mu_q_squared(self) -> Float[Tensor, " u"]:
        return dot(self.mu_q, self.mu_q)

    tolerance: ClassVar[float] = 0.0

    @property
    def residual(self) -> Float[Tensor, " u"]:
        """0: systems are solved directly."""
        return torch.zeros_like(self.c)

    @property
    def mu_q_double(self) -> Float[Tensor, "u d"]:
        """E_q(a) in double precision, not rounded to the precision of the sums."""
        return self.origin.double() + self._mean.double()

    @property
    def mean_shift(self) -> Float[Tensor, "u d"]:
        """E_q(a) - E_p(a), formed about the origin: no digits lost to a large mean."""
        return self._mean - self.sum_a / self.cases

    @property
    def Var_q(self) -> Float[Tensor, "u d d"]:
        weight = self._safe(self.sum_D)[:, None, None]
        eye = torch.eye(self.sum_Da.shape[-1], dtype=weight.dtype, device=weight.device)
        ridge = self.epsilon[:, None, None]
        return self.sum_Daa / weight - outer(self._mean, self._mean) + ridge * eye

    @cached_property
    def trace_Var_q(self) -> Float[Tensor, " u"]:
        trace = self.sum_Daa.diagonal(dim1=-2, dim2=-1).sum(-1) / self._safe(self.sum_D)
        d = self.sum_Da.shape[-1]
        return trace - dot(self._mean, self._mean) + d * self.epsilon

    @property
    def A(self) -> Float[Tensor, "u d d"]:
        A = self.c[:, None, None] * (self.Var_q + outer(self.mu_q, self.mu_q))
        if bool(self.alive.all()):
            return A
        bare = self.sum_Daa / self.samples  # joint: errors may cancel in c and not in A
        return torch.where(self.alive[:, None, None], A, bare)

    @property
    def b(self) -> Float[Tensor, "u d"]:
        return self.c[:, None] * self.mu_q

    @property
    def F(self) -> Float[Tensor, "u e e"]:
        """The Fisher itself, (u, d+1, d+1), bias last."""
        weights = torch.cat([self.A, self.b.unsqueeze(-1)], -1)
        bias = torch.cat([self.b, self.c.unsqueeze(-1)], -1)
        return torch.cat([weights, bias.unsqueeze(-2)], -2)

    def solve(self, rhs: Float[Tensor, "u d"]) -> Float[Tensor, "u d"]:
        """Return Var_q⁻¹ rhs; zero where a unit is dead.

        The first call solves for μ_q too, with the same factor, and keeps `mu_q_solved`.

        Raises:
            SingularFisherError: Var_q of some living unit is not positive definite.
        """
        if "mu_q_solved" in vars(self):
            return self._solve(rhs)[0]
        vars(self)["mu_q_solved"], x = self._solve(self.mu_q, rhs)
        return x

    @cached_property
    def mu_q_solved(self) -> Float[Tensor, "u d"]:
        """Var_q⁻¹ μ_q."""
        return self._solve(self.mu_q)[0]

    @cached_property
    def fit(self) -> ConstantFit:
        fit = fit_by_solving(self)
        of_bias = self.bias_ridge / self._safe(self.c) * fit.gain
        return fit._replace(damping_share=fit.damping_share + of_bias)

    @property
    def epsilon(self) -> Float[Tensor, " u"]:
        """λ / c; zero for a dead unit."""
        return self.ridge / self._safe(self.c)

    def _solve(self, *rhs: Float[Tensor, "u d"]) -> tuple[Tensor, ...]:
        K, v, epsilon, mean, least = self._system
        solved = solve_grams(K, v, epsilon, torch.stack(rhs, 1).to(K.dtype), mean, least)
        require_regular(solved.regular)
        alive = self.alive[:, None]
        return tuple(Y.to(x.dtype) * alive for Y, x in zip(solved.Y.unbind(1), rhs, strict=True))

    @cached_property
    def _system(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Var_q as `solve_grams` takes it; the identity for a unit whose solution is 0."""
        d, idle = self.sum_Da.shape[-1], ~self.alive | (self.trace_Daa == 0)
        require_regular((self.support > d) | (self.ridge > 0) | idle)
        scale = torch.where(idle, 0.0, self._safe(self.sum_D).rsqrt())
        epsilon = torch.where(idle, 1.0, self.epsilon)
        mean = torch.where(idle[:, None], 0.0, self._mean)
        undamped, least = epsilon == 0, None
        if bool(undamped.any()):
            squares = scale[:, None] ** 2 * self.sum_Daa.diagonal(dim1=-2, dim2=-1)
            least = least_pivots(squares, self.mu_q, self.eps, self.noise) * undamped[:, None]
        return self.sum_Daa, scale[:, None].expand_as(mean), epsilon, mean, least

    @cached_property
    def _mean(self) -> Float[Tensor, "u d"]:
        return self.sum_Da / self._safe(self.sum_D)[:, None]

    def _safe(self, weight: Float[Tensor, " u"]) -> Float[Tensor, " u"]:
        return torch.where(self.alive, weight, 1.0)


def _sum_about(
    origin: Float[Tensor, "*u d"], a: Float[Tensor, "g n d"], center: Float[Tensor, "g d"]
) -> Float[Tensor, "*u d"]:
    """Σ (a - origin), in the origin's precision even if the activations have less."""
    rest = (a - center.unsqueeze(1)).sum(1).to(origin.dtype)
    center = center.to(origin.dtype)
    if origin.dim() == 1:
        return rest[0] + a.shape[1] * (center[0] - origin)
    return _repeated(rest, len(origin)) + a.shape[1] * (_repeated(center, len(origin)) - origin)


def _repeated(x: Float[Tensor, "g ..."], units: int) -> Float[Tensor, "u ..."]:
    """Repeat each group's value for its units."""
    return x.expand(units, *x.shape[1:]) if len(x) == 1 else x.repeat_interleave(units // len(x), 0)
