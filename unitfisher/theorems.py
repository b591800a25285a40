"""Theorems 1 and 2 of the ELU paper, for all units of a layer at once.

The unit natural gradient (Δw, Δw₀) solves F (Δw, Δw₀) = (g, g₀) with F = [[A, b], [bᵀ, c]] the
Fisher of one unit's weights and bias. k is the poster's; the arXiv paper's is 1 + k.

References:
    Clevert, Unterthiner, Hochreiter (2016), arXiv 1511.07289, section 2, Theorems 1 and 2.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unitfisher.moments import Moments
from unitfisher.solvers import dot, solve
from unitfisher.sums import UnitMoments


class BiasShiftCorrection(NamedTuple):
    """The two scalars of the theorems, per unit; NaN for a dead unit."""

    s: Float[Tensor, " u"]  # scales the bias update
    k: Float[Tensor, " u"]  # corrects the incoming mean by -(1 + k) E_q(a)


class UnitStep(NamedTuple):
    """An update of each unit's weights and bias, not yet scaled by a learning rate."""

    dw: Float[Tensor, "u d"]
    dw0: Float[Tensor, " u"]


def bias_shift_correction(m: Moments) -> BiasShiftCorrection:
    """Compute s = (1 + μ_qᵀ Var_q⁻¹ μ_q) / c and k = (μ_q - μ_p)ᵀ Var_q⁻¹ μ_q.

    Raises:
        SingularFisherError: Var_q of some living unit is not positive definite.
    """
    c = torch.where(m.alive, m.c, 1.0)
    s, k = (torch.where(m.alive, x, torch.nan) for x in (m.fit.gain / c, m.fit.k))
    return BiasShiftCorrection(s, k)


def theorem_1(m: UnitMoments, g: Float[Tensor, "u d"], g0: Float[Tensor, " u"]) -> UnitStep:
    """Solve F (Δw, Δw₀) = (g, g₀) block by block, as printed.

    Δw = A⁻¹ (g - Δw₀ b) and Δw₀ = s (g₀ - bᵀ A⁻¹ g). For living units; to compute
    with, prefer `unit_natural_gradient`.

    Raises:
        SingularFisherError: A of some unit is not positive definite.
    """
    s, _ = bias_shift_correction(m)
    dw0 = s * (g0 - dot(m.b, solve(m.A, g)))
    dw = solve(m.A, g - dw0[:, None] * m.b)
    return UnitStep(dw, dw0)


def theorem_2(
    m: UnitMoments, g: Float[Tensor, "u d"], g0: Float[Tensor, " u"]
) -> Float[Tensor, " u"]:
    """Return the bias shift μ_pᵀ Δw + Δw₀ of Theorem 1's step, by a corrected incoming mean.

    It is (μ_p - (1 + k) μ_q)ᵀ A⁻¹ g + (1 + k) g₀ / c, for living units.

    Raises:
        SingularFisherError: A of some unit is not positive definite.
    """
    _, k = bias_shift_correction(m)
    corrected_mean = m.mu_p - (1 + k)[:, None] * m.mu_q
    return dot(corrected_mean, solve(m.A, g)) + (1 + k) * g0 / m.c


def unit_natural_gradient(m: Moments, g: Float[Tensor, "u d"], g0: Float[Tensor, " u"]) -> UnitStep:
    """Turn each unit's gradient into its natural gradient: F⁻¹ (g, g₀).

    Theorem 1 in coordinates centred at μ_q, where F is block diagonal: one solve per unit and no
    cancellation. A dead unit gets a zero step.

    Args:
        m: Moments; damp them unless there are more cases than inputs.
        g: Gradient in the weights, averaged over samples.
        g0: The same for the bias.

    Raises:
        SingularFisherError: Var_q of some living unit is not positive definite.
    """
    c, mu_q = torch.where(m.alive, m.c, 1.0), m.mu_q_double
    dw = m.solve(about_mu_q(m, g, g0)).div_(c[:, None])
    dw0 = g0.double() / c - dot(mu_q, dw.double())
    return UnitStep(dw, (dw0 * m.alive).to(g.dtype))


def about_mu_q(
    m: Moments, g: Float[Tensor, "u d"], g0: Float[Tensor, " u"]
) -> Float[Tensor, "u d"]:
    """Compute g - g₀ μ_q, in double precision: for a large mean the terms nearly cancel."""
    return torch.addcmul(g.double(), g0.double()[:, None], m.mu_q_double, value=-1).to(g.dtype)


def weight_natural_gradient(m: Moments, g: Float[Tensor, "u d"]) -> Float[Tensor, "u d"]:
    """Compute A⁻¹ g = Var_q⁻¹ (g - μ_q μ_qᵀ Var_q⁻¹ g / (1 + μ_qᵀ Var_q⁻¹ μ_q)) / c.

    The natural gradient of a unit without bias; zero for a dead unit.
    """
    y, x = m.solve(g), m.mu_q_solved
    correction = dot(m.mu_q, y) / (1 + dot(m.mu_q, x))
    return (y - correction[:, None] * x) / torch.where(m.alive, m.c, 1.0)[:, None]


def damping_share(m: Moments) -> Float[Tensor, " u"]:
    """The share of s due to the damping: ε ‖x‖² / (1 + μ_qᵀ x), x = Var_q⁻¹ μ_q, ε = λ/c.

    In [0, 1): near 1, s and k say more about the damping than about the data. Where the bias is
    damped too, (1 + μ_qᵀ x) λ/c is added. NaN for a dead unit.
    """
    return m.fit.damping_share * torch.where(m.alive, 1.0, torch.nan)
