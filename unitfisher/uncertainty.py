"""Standard errors of estimates from drawn labels or signs, and from drawn cases.

c and E_q(a) are made of sums over cases of D times something; s and k are smooth functions of such
sums. To first order each changes with the D of a case by a slope, the influence of that case. The
uncertainty of D shows in how the random columns of a sample differ. Draws for different samples are
independent, so variances add up over samples. The choice of the batch is not included.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unitfisher.cases import UnitCases
from unitfisher.memory import workspace
from unitfisher.moments import Moments
from unitfisher.solvers import dot

N_EFF_PER_INPUT = 5  # of drawn cases at least: fewer are overfitted, and errors look too small

# squares(x, together): Σ x² over columns and cases; together: a sample's cases are summed first
Squares = Callable[[Float[Tensor, "k m u"], bool], Float[Tensor, "..."]]


class StandardErrors(NamedTuple):
    """Standard errors: zero where nothing was drawn, NaN where they are unknown."""

    c_error: Float[Tensor, " u"]
    mean_q_error: Float[Tensor, "u d"]
    s_error: Float[Tensor, " u"]
    k_error: Float[Tensor, " u"]

    @classmethod
    def of(cls, cases: UnitCases, m: Moments, damped: Moments) -> "StandardErrors":
        """Compute them from units' cases, and their moments without and with damping.

        From one random column and all cases, none are known; with ``sharing="joint"`` only that of
        c. From drawn cases, those of s and k are known only if n_eff is at least
        ``N_EFF_PER_INPUT`` times the inputs.
        """
        if (unknown := _unknown(cases)) is not None:
            return cls.alike(unknown, m.mu_q)
        found = cls.of_c(variance_of_sum(cases).sqrt() / cases.samples, m)
        if cases.joint:
            return found
        weight = torch.where(m.alive, cases.samples * m.c, torch.nan)
        found = found._replace(mean_q_error=_variance_of_mean(cases, m).sqrt() / weight[:, None])
        least = N_EFF_PER_INPUT * cases.inputs if cases.population else 0
        if cases.delta.shape[1] < least:
            return found
        s, k = (_variance_of(cases, slope) for slope in _influence(cases, m, damped))
        living = torch.where(m.alive & (cases.n_eff >= least), 1.0, torch.nan)
        return found._replace(s_error=s.sqrt() * living, k_error=k.sqrt() * living)

    @classmethod
    def of_c(cls, error: Float[Tensor, " u"], m: Moments) -> "StandardErrors":
        """Only the error of c is known."""
        return cls.alike(torch.nan, m.mu_q)._replace(c_error=error)

    @classmethod
    def alike(cls, value: float, like: Float[Tensor, "u d"]) -> "StandardErrors":
        """Give every unit and quantity one value."""
        one = torch.full((len(like),), value, dtype=torch.float64, device=like.device)
        return cls(one, one[:, None].expand_as(like), one, one)


def _unknown(cases: UnitCases) -> float | None:
    """Return 0 if nothing was drawn, NaN if errors are unknown, None if they can be estimated."""
    if cases.replicates > 1 and not cases.in_order:
        return torch.nan
    if cases.replicates > 1 or cases.population:
        return None
    return torch.nan if cases.replicates else 0.0


def variance_of_sum(cases: UnitCases) -> Float[Tensor, " u"]:
    """Variance of Σ D = N c, by drawn labels or signs and drawn cases."""
    if (unknown := _unknown(cases)) is not None:
        return torch.full_like(cases.D[0], unknown)
    return _variance_of(cases, torch.ones_like(cases.D))


def _variance_of(cases: UnitCases, slope: Float[Tensor, "m u"]) -> Float[Tensor, " u"]:
    """Variance of a quantity whose derivative by the D of each case is ``slope``."""

    def squares(x: Float[Tensor, "k m u"], together: bool) -> Float[Tensor, " u"]:
        return (_by_sample(cases, x) if together else x).square().sum((0, 1))

    moved = cases.D * slope
    return _variance(cases, moved - moved.mean(0), squares, slope)


def _variance_of_mean(cases: UnitCases, m: Moments) -> Float[Tensor, "u d"]:
    """Variance of Σ D (a - E_q(a)): (N c)² times that of E_q(a), to first order."""
    return _variance(cases, cases.D, partial(_squares, cases, m))


def _variance(
    cases: UnitCases,
    D: Float[Tensor, "m u"],
    squares: Squares,
    slope: Float[Tensor, "m u"] | None = None,
) -> Float[Tensor, "..."]:
    """Variance of a sum over cases drawn without replacement, whose D are estimates themselves.

    The two-stage estimate (Cochran 1977, 10.3): the spread of the cases, less the part of it due to
    labels, plus the variance due to labels, for which the cases of a sample are summed first. From
    a single random column only an upper bound is known, the variance for drawing with replacement;
    NaN if samples have several cases.
    """
    labels = by_case = torch.zeros(())
    if cases.replicates > 1:
        x = _deviations(cases) if slope is None else _deviations(cases) * slope
        labels = by_case = _over_columns(cases, squares(x, cases.shared))
        if cases.population and cases.shared:
            by_case = _over_columns(cases, squares(x, False))
    if not cases.population:
        return labels
    count = cases.delta.shape[1]
    more = count / (count - 1) if count > 1 else torch.nan
    spread = squares(D.unsqueeze(0), False)
    if cases.replicates == 1:
        return spread * (torch.nan if cases.shared else more)
    spread = (more * (spread - by_case + labels) - labels).clamp_min(0.0)
    return (1 - count / cases.population) * spread + labels


class _Influence(NamedTuple):
    """The derivatives of s and k by the D of a case, on which the damping depends too."""

    s: Float[Tensor, "m u"]
    k: Float[Tensor, "m u"]


def _influence(cases: UnitCases, m: Moments, damped: Moments) -> _Influence:
    """From F⁻¹ (0, 1) = (-x, 1 + μ_qᵀ x) / c and F⁻¹ (μ_p, 1) = (-y, 1 + μ_qᵀ y) / c.

    Here x = Var_q⁻¹ μ_q and y = Var_q⁻¹ (μ_q - μ_p); s is the corner of F⁻¹, and 1 + k is
    c (μ_p, 1)ᵀ F⁻¹ (0, 1). Damping adds λ to A, in proportion to its trace Σ D ‖a‖² / N.
    """
    about, shift = _about(cases), _mean_about(cases, m)
    c = torch.where(m.alive, m.c, 1.0)
    x, y = damped.mu_q_solved, damped.solve(m.mean_shift)
    p, t = (1 + dot(shift, v) - _products(about, v) for v in (x, y))
    trace = c * (m.trace_Var_q + m.mu_q_squared)
    ridge = damped.ridge / torch.where(trace > 0, trace, 1.0)
    squared = ridge * _products(cases.a.squeeze(2).square(), torch.ones_like(x))
    s = -(p**2 + dot(x, x) * squared) / c**2
    k = (1 + damped.fit.k - p * t - dot(x, y) * squared) / c
    return _Influence(s / cases.samples, k / cases.samples)


def _deviations(cases: UnitCases) -> Float[Tensor, "k m u"]:
    """Each random column's part of D, less the mean over columns."""
    delta = cases.delta[len(cases.delta) - cases.replicates :]
    D = delta.sum(2, dtype=torch.float64) ** 2
    return D - D.mean(0)


def _by_sample(cases: UnitCases, x: Float[Tensor, "k m u"]) -> Float[Tensor, "k n u"]:
    """Sum over the cases of each sample, which share its drawn labels or signs."""
    if not cases.shared:
        return x
    columns, _, units = x.shape
    return x.new_zeros(columns, cases.samples, units).index_add_(1, cases.of_sample, x)


def _squares(
    cases: UnitCases, m: Moments, x: Float[Tensor, "k m u"], together: bool
) -> Float[Tensor, "u d"]:
    """Σ (x (a - E_q(a)))² over columns and cases; together: a sample's cases are summed first."""
    about, shift = _about(cases), _mean_about(cases, m)
    if not together:
        weight = x.square().sum(0)
        first, second = _weighted(about, weight), _weighted(about.square(), weight)
        squares = second - 2 * shift * first + weight.sum(0)[:, None] * shift**2
        return squares.clamp_min(0.0)
    places, there = _places(cases)
    width = places.shape[1] * (x.shape[-1] + len(about) * about.shape[-1])
    samples = max(1, workspace() // (64 * shift.numel() + 16 * width))  # to treat together
    total = torch.zeros_like(shift)
    for index, real in zip(places.split(samples), there.split(samples), strict=True):
        a = about[:, index]
        for column in x:
            weight = column[index] * real.unsqueeze(-1)
            sums = _weighted(a, weight) - weight.sum(1)[..., None] * shift
            total += sums.square().sum(0)
    return total


def _places(cases: UnitCases) -> tuple[Int[Tensor, "n t"], Bool[Tensor, "n t"]]:
    """List the cases of each sample that has any, padded to one length; and which are real."""
    sample = cases.of_sample
    counts = sample.bincount()
    counts = counts[counts > 0]
    there = torch.arange(int(counts.max()), device=sample.device) < counts[:, None]
    places = torch.zeros_like(there, dtype=torch.int64)
    places[there] = sample.argsort(stable=True)
    return places, there


def _weighted(
    a: Float[Tensor, "g *n m d"], weight: Float[Tensor, "*n m u"]
) -> Float[Tensor, "*n u d"]:
    tiny = torch.finfo(weight.dtype).tiny
    scale = weight.abs().amax(-2, keepdim=True).clamp_min(tiny)  # small ones keep their digits
    grouped: Tensor = (weight / scale).to(a.dtype).mT.unflatten(-2, (len(a), -1))
    sums: Tensor = (grouped @ a.movedim(0, -3)).flatten(-3, -2)
    return sums.double() * scale.mT


def _products(a: Float[Tensor, "g m d"], v: Float[Tensor, "u d"]) -> Float[Tensor, "m u"]:
    """aᵀ v for the cases of each unit's group."""
    grouped: Tensor = v.to(a.dtype).unflatten(0, (len(a), -1))
    return (grouped @ a.mT).flatten(0, 1).T.double()


def _about(cases: UnitCases) -> Float[Tensor, "g m d"]:
    return cases.a.squeeze(2) - cases.origin.unsqueeze(1)


def _mean_about(cases: UnitCases, m: Moments) -> Float[Tensor, "u d"]:
    """E_q(a) about the origin of the cases."""
    mu_q: Tensor = m.mu_q_double.unflatten(0, (cases.groups, -1))
    return (mu_q - cases.origin.unsqueeze(1)).flatten(0, 1)


def _over_columns(cases: UnitCases, squares: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Variance of the sum of two or more columns, from the squares of their deviations."""
    return squares * (cases.replicates / (cases.replicates - 1))
