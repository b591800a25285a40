"""What the theorems ask of the units of one layer, however it is known.

F = [[A, b], [bᵀ, c]] is summed over the positions of a sample and averaged over samples; means
and variances are averages over all cases, under p and under q ∝ D = E_y δ². Three classes hold
them: `sums.UnitMoments`, `rows.UnitRows` and `products.UnitProducts`.
"""

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unitfisher.choices import require_damping
from unitfisher.solvers import dot, squared


class ConstantFit(NamedTuple):
    """Ridge regression of the constant 1 on a unit's activations, its cases weighted by q.

    What the fit leaves, ρ, carries the theorems: 1 / E_q(ρ) = 1 + μ_qᵀ Var_q⁻¹ μ_q, and
    E_p(ρ) / E_q(ρ) = 1 + (μ_q - μ_p)ᵀ Var_q⁻¹ μ_q.
    """

    gain: Float[Tensor, " u"]  # 1 / E_q(ρ)
    k: Float[Tensor, " u"]  # E_p(ρ) / E_q(ρ) - 1
    damping_share: Float[Tensor, " u"]  # of E_q(ρ): the ridge's part of the objective


@runtime_checkable
class Moments(Protocol):
    """Moments of units, and what solves with their Var_q."""

    def damped(self, damping: float) -> "Moments":
        """Return the moments of F + λ diag(1, ..., 1, 0), λ = damping · trace(A) / d per unit."""

    def solve(self, rhs: Float[Tensor, "u d"]) -> Float[Tensor, "u d"]:
        """Return Var_q⁻¹ rhs; zero where a unit is dead."""

    if TYPE_CHECKING:  # a check at run time would compute them, to see whether they are there

        @property
        def c(self) -> Float[Tensor, " u"]: ...
        @property
        def alive(self) -> Bool[Tensor, " u"]: ...
        @property
        def ridge(self) -> Float[Tensor, " u"]:
            """λ on the weight block of F."""

        @property
        def epsilon(self) -> Float[Tensor, " u"]:
            """λ / c; any number for a unit whose answer is zero."""

        @property
        def center(self) -> Float[Tensor, "g d"]:
            """E_p(a) of each g of consecutive units."""

        @property
        def mu_q(self) -> Float[Tensor, "u d"]: ...
        @property
        def mu_q_double(self) -> Float[Tensor, "u d"]:
            """E_q(a) as it is known about the origin, not rounded to the precision of the sums."""

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
            """What iterations left of the systems that s and k come from, relative."""

        @property
        def tolerance(self) -> float:
            """A residual up to which a unit counts as solved."""


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
    """Return what damping changes: the ridge λ, and the trace of Var_q that it adds to."""
    more, d = damping_of(m, damping), m.center.shape[-1]
    return m.ridge + m.c * more, m.trace_Var_q + d * more * m.alive


def fed(a: Float[Tensor, "g m d"], D: Float[Tensor, "m u"]) -> Float[Tensor, " u"]:
    """Σ D ‖a‖²: exactly 0 for a unit that sees nothing but zeros wherever an error reaches it.

    Then its A is 0, where of means and variances rounding would leave something.
    """
    squares = squared(a.detach()).to(D.dtype).unsqueeze(1)
    return (squares @ D.detach().unflatten(-1, (len(a), -1)).movedim(1, 0)).flatten()


def least_pivots(
    squares: Float[Tensor, "*u d"], mu_q: Float[Tensor, "*u d"], eps: float, noise: float
) -> Float[Tensor, "*u d"]:
    """Return the variance that rounding alone can give to an input that is constant under q.

    It is ``noise`` times the second moment about the origin, plus the last digit of the mean. Only
    units without damping are compared with it: damped matrices have an inverse anyhow.
    """
    return torch.addcmul(noise * squares, mu_q, mu_q, value=eps**2)
