"""The interface of moments: what the theorems need of the units of one layer.

F = [[A, b], [bᵀ, c]] is summed over the positions of a sample and averaged over samples; means
and variances are averages over all cases, under p and under q ∝ D = E_y δ². Three classes
provide them: `sums.UnitMoments`, `rows.UnitRows` and `products.UnitProducts`.
"""

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unitfisher.choices import require_damping
from unitfisher.solvers import dot, squared


class ConstantFit(NamedTuple):
    """Ridge regression of the constant 1 on a unit's activations, its cases weighted by q.

    The residual ρ gives the theorems' scalars: 1 / E_q(ρ) = 1 + μ_qᵀ Var_q⁻¹ μ_q, and
    E_p(ρ) / E_q(ρ) = 1 + (μ_q - μ_p)ᵀ Var_q⁻¹ μ_q. E_q(ρ) is also the minimum of the objective.
    """

    gain: Float[Tensor, " u"]  # 1 / E_q(ρ)
    k: Float[Tensor, " u"]  # E_p(ρ) / E_q(ρ) - 1
    damping_share: Float[Tensor, " u"]  # the ridge's share of the objective's minimum


@runtime_checkable
class Moments(Protocol):
    """Moments of a layer's units, and solutions of systems with their Var_q."""

    def damped(self, damping: float) -> "Moments":
        """Return the moments of F + λ diag(1, ..., 1, 0), λ = damping · trace(A) / d per unit."""

    def solve(self, rhs: Float[Tensor, "u d"]) -> Float[Tensor, "u d"]:
        """Return Var_q⁻¹ rhs; zero where a unit is dead."""

    if TYPE_CHECKING:  # isinstance() would compute properties to see whether they exist

        @property
        def c(self) -> Float[Tensor, " u"]: ...
        @property
        def alive(self) -> Bool[Tensor, " u"]: ...
        @property
        def ridge(self) -> Float[Tensor, " u"]:
            """λ on the weight block of F."""

        @property
        def epsilon(self) -> Float[Tensor, " u"]:
            """λ / c; arbitrary for a unit whose solution is zero."""

        @property
        def center(self) -> Float[Tensor, "g d"]:
            """E_p(a) of each of g groups of consecutive units."""

        @property
        def mu_q(self) -> Float[Tensor, "u d"]: ...
        @property
        def mu_q_double(self) -> Float[Tensor, "u d"]:
            """E_q(a) in double precision, not rounded to the precision of the sums."""

        @property
        def mu_q_squared(self) -> Float[Tensor, " u"]: ...
        @property
        def mean_shift(self) -> Float[Tensor, "u d"]:
            """E_q(a) - E_p(a), formed without losing digits to a large mean."""

        @property
        def trace_Var_q(self) -> Float[Tensor, " u"]: ...
        @property
        def mu_q_solved(self) -> Float[Tensor, "u d"]:
            """Var_q⁻¹ μ_q."""

        @property
        def fit(self) -> ConstantFit: ...
        @property
        def residual(self) -> Float[Tensor, " u"]:
            """The largest relative residual of systems solved so far; 0 if solved directly."""

        @property
        def tolerance(self) -> float:
            """The residual up to which a unit counts as converged."""


class Part(NamedTuple):
    """Some units of a layer, treated together."""

    units: slice
    m: Moments
    damped: Moments


def fit_by_solving(m: Moments) -> ConstantFit:
    """Fit the constant, from x = Var_q⁻¹ μ_q."""
    x = m.mu_q_solved
    gain = 1 + dot(m.mu_q, x)
    return ConstantFit(gain, dot(m.mean_shift, x), m.epsilon * dot(x, x) / gain)


def corrected_mean(m: Moments, k: Float[Tensor, " u"]) -> Float[Tensor, "u d"]:
    """μ_p - (1 + k) μ_q, as Theorem 2 has it."""
    center = m.center
    factor, mu_q = (x.unflatten(0, (len(center), -1)) for x in (1 + k[:, None], m.mu_q))
    return torch.addcmul(center.unsqueeze(1), factor, mu_q, value=-1).flatten(0, 1)


def damping_of(m: Moments, damping: float) -> Float[Tensor, " u"]:
    """Return λ / c = damping · trace(A) / (c d) for each unit, to be added to its Var_q.

    Raises:
        ValueError: Damping is negative or not finite.
    """
    require_damping(damping)
    return damping * (m.trace_Var_q + m.mu_q_squared) / m.center.shape[-1]


def ridge_and_trace(m: Moments, damping: float) -> tuple[Tensor, Tensor]:
    """Return what damping changes: the ridge λ and the trace of Var_q."""
    more, d = damping_of(m, damping), m.center.shape[-1]
    return m.ridge + m.c * more, m.trace_Var_q + d * more * m.alive


def trace_Daa(a: Float[Tensor, "g m d"], D: Float[Tensor, "m u"]) -> Float[Tensor, " u"]:
    """Σ D ‖a‖²: exactly 0 for a unit whose inputs are 0 in every case that an error reaches.

    Then A is 0; means and variances, which are rounded, would not show it.
    """
    squares = squared(a.detach()).to(D.dtype).unsqueeze(1)
    return (squares @ D.detach().unflatten(-1, (len(a), -1)).movedim(1, 0)).flatten()


def least_pivots(
    squares: Float[Tensor, "*u d"], mu_q: Float[Tensor, "*u d"], eps: float, noise: float
) -> Float[Tensor, "*u d"]:
    """Return the variance that rounding alone can give to an input that is constant under q.

    It is ``noise`` times the second moment about the origin, plus the last digit of the mean. Only
    undamped units are compared with it: a damped matrix always has an inverse.
    """
    return torch.addcmul(noise * squares, mu_q, mu_q, value=eps**2)
