"""The identities behind the theorems, numbered as in the derivation, for every kind of sharing.

Where positions share the weights, "expand" and "reduce" keep q a probability over cases, so the
laws about cases hold; the gradient of a reduced layer need not be one of its cases (21). "joint"
makes q signed: the algebra holds, with Cov := b - c E_p(a), and averages over cases do not (1, 4,
21, second half of 22). Only "joint" is the curvature of the likelihood (24).
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import (
    DAMPING,
    any_block,
    assert_same,
    case_sharing,
    cases,
    damped,
    gradients,
    moments,
    ridge,
    weight_block,
)
from networks import Means
from reference import joined, outcomes, parameter_gradient, with_ones
from strategies import (
    TOL,
    Problem,
    any_sharing,
    batches,
    normal,
    problems,
    rows,
    seeded,
    seeds,
    uncorrelated_batches,
)
from torch import Tensor, nn
from torch.linalg import eigvalsh, inv, lstsq, slogdet
from torch.testing import assert_close

from unitfisher import (
    UnitMoments,
    bias_shift_correction,
    theorem_1,
    theorem_2,
    unit_natural_gradient,
)
from unitfisher.theorems import damping_share, weight_natural_gradient


def dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1)


def apply(matrix: Tensor, x: Tensor) -> Tensor:
    return (matrix @ x.unsqueeze(-1)).squeeze(-1)


def outer(x: Tensor) -> Tensor:
    return x[..., :, None] * x[..., None, :]


def mapped(p: Problem, M: Tensor, t: Tensor) -> Problem:
    g = p.g @ M.T + p.g0[:, None] * t
    return p._replace(a=p.a @ M.T + t, g=g)


def shifted(p: Problem, t: Tensor) -> Problem:
    return mapped(p, torch.eye(len(t), dtype=t.dtype), t)


# Moments


@given(sharing=any_sharing, p=problems(), block=any_block)
def test_identity_1_blocks_of_the_fisher_are_sums_over_positions_averaged_over_samples(
    sharing, p, block
):
    m, F = damped(p, sharing, block)
    assert_close(m.A, F[:, :-1, :-1], **TOL)
    assert_close(m.b, F[:, :-1, -1], **TOL)
    assert_close(m.c, F[:, -1, -1], **TOL)
    assert_close(m.F, F, **TOL)


@given(sharing=case_sharing, p=problems())
def test_identity_1_mu_q_and_Var_q_are_the_mean_and_covariance_under_q(sharing, p):
    m, (a, D) = moments(p, sharing), cases(p, sharing)
    q = D / D.sum(0)
    mu_q = q.T @ a
    V = torch.einsum("nu,nud,nue->ude", q, *2 * [a[:, None] - mu_q])
    assert_close(m.mu_q, mu_q, **TOL)
    assert_close(m.Var_q, V, **TOL)
    assert_close(m.n_eff, 1 / (q**2).sum(0), **TOL)
    assert_close(m.mu_p, a.mean(0), **TOL)


@given(sharing=case_sharing, p=problems())
def test_identity_2_mean_shift_is_the_covariance_of_D_with_the_activations(sharing, p):
    m, (a, D) = moments(p, sharing), cases(p, sharing)
    positions = len(a) / len(p.a)
    Cov = positions * (D - D.mean(0)).T @ (a - a.mean(0)) / len(a)
    assert_close(m.c[:, None] * m.mean_shift, Cov, **TOL)


@given(sharing=any_sharing, p=problems(), block=weight_block)
def test_identity_2_covariance_is_b_minus_c_times_the_incoming_mean(sharing, p, block):
    m, F = damped(p, sharing, block)
    nu = cases(p, "expand")[0].mean(0)
    assert_close(m.c[:, None] * m.mean_shift, F[:, :-1, -1] - F[:, -1, -1:] * nu, **TOL)


@given(sharing=any_sharing, p=problems(), block=any_block)
def test_identity_3_schur_complement_of_c_is_c_times_Var_q(sharing, p, block):
    m, F = damped(p, sharing, block)
    A, b, c = F[:, :-1, :-1], F[:, :-1, -1], F[:, -1, -1, None, None]
    assert_close(A - outer(b) / c, m.c[:, None, None] * m.Var_q, **TOL)
    assert (eigvalsh(F) > 0).all()
    assert (eigvalsh(m.Var_q) > 0).all()


@given(sharing=case_sharing, p=problems())
def test_identity_4_Var_q_from_moments_under_p(sharing, p):
    m, (a, D) = moments(p, sharing), cases(p, sharing)
    squares = outer(a - a.mean(0))
    Cov = torch.einsum("nu,nde->ude", D - D.mean(0), squares) / len(a)
    expected = squares.mean(0) + Cov / D.mean(0)[:, None, None] - outer(m.mu_q - a.mean(0))
    assert_close(m.Var_q, expected, **TOL)


# Theorem 1


@given(sharing=any_sharing, p=problems(), block=any_block)
def test_identity_5_s_is_the_corner_of_the_inverse_fisher(sharing, p, block):
    m, F = damped(p, sharing, block)
    s, _ = bias_shift_correction(m)
    b = F[:, :-1, -1]
    assert_close(s, inv(F)[:, -1, -1], **TOL)
    assert_close(s, 1 / (F[:, -1, -1] - dot(b, apply(inv(F[:, :-1, :-1]), b))), **TOL)


@given(sharing=any_sharing, p=problems(), block=any_block)
def test_identity_6_s_is_at_least_one_over_c(sharing, p, block):
    m, F = damped(p, sharing, block)
    s, _ = bias_shift_correction(m)
    coupling = dot(F[:, :-1, -1], apply(inv(F[:, :-1, :-1]), F[:, :-1, -1]))
    assert (s * F[:, -1, -1] >= 1 - 1e-12).all()
    assert (coupling >= 0).all()
    assert (coupling <= F[:, -1, -1]).all()


@given(sharing=any_sharing, p=problems(), block=any_block)
def test_identity_7_coupling_of_the_bias_is_m_over_one_plus_m(sharing, p, block):
    m, F = damped(p, sharing, block)
    b, c = F[:, :-1, -1], F[:, -1, -1]
    leverage = m.c * bias_shift_correction(m).s - 1
    assert_close(dot(b, apply(inv(F[:, :-1, :-1]), b)) / c, leverage / (1 + leverage), **TOL)


@given(sharing=case_sharing, p=problems())
def test_identity_7_s_c_is_the_variance_inflation_factor_of_the_bias(sharing, p):
    m, (a, D) = moments(p, sharing), cases(p, sharing)
    root = (D / D.sum(0)).sqrt().T.unsqueeze(-1)  # the column of ones under q
    unexplained = root - root * a @ lstsq(root * a, root).solution
    assert_close(m.c * bias_shift_correction(m).s, 1 / (unexplained**2).sum((1, 2)), **TOL)


@given(sharing=any_sharing, p=problems(), block=any_block)
def test_identity_8_blocks_of_the_inverse_fisher(sharing, p, block):
    m, F = damped(p, sharing, block)
    s, _ = bias_shift_correction(m)
    weights, column = inv(F)[:, :-1, :-1], inv(F)[:, :-1, -1]
    assert_close(weights, inv(m.Var_q) / m.c[:, None, None], **TOL)
    assert_close(column, -apply(inv(m.Var_q), m.mu_q) / m.c[:, None], **TOL)
    x = apply(inv(m.A), m.b)
    assert_close(weights, inv(m.A) + s[:, None, None] * outer(x), **TOL)
    assert_close(column, -s[:, None] * x, **TOL)


@given(sharing=any_sharing, p=problems(), block=any_block)
def test_theorem_1_solves_the_dense_system(sharing, p, block):
    m, F = damped(p, sharing, block)
    dense = torch.linalg.solve(F, joined(p.g, p.g0))
    dw, dw0 = theorem_1(m, p.g, p.g0)
    assert_close(dw, dense[:, :-1], **TOL)
    assert_close(dw0, dense[:, -1], **TOL)


@given(r=rows())
def test_theorem_1_counts_joint_gradients_that_cancel_in_the_bias(r):
    m = UnitMoments.of_gradients(r.G, r.S, r.mean, samples=r.samples)
    G = torch.cat([r.G, r.S[..., None]], dim=-1)
    F = torch.einsum("rud,rue->ude", G, G) / r.samples
    dense = torch.linalg.solve(F, joined(r.g, r.g0))
    assert ((r.S.abs() < 1e-12) & (r.G.abs().sum(-1) > 1e-3)).any()
    for dw, dw0 in (theorem_1(m, r.g, r.g0), unit_natural_gradient(m, r.g, r.g0)):
        assert_close(joined(dw, dw0), dense, **TOL)


@given(sharing=any_sharing, p=problems(), block=any_block)
def test_identity_9_centred_form_solves_the_dense_system(sharing, p, block):
    m, F = damped(p, sharing, block)
    dense = torch.linalg.solve(F, joined(p.g, p.g0))
    dw, dw0 = unit_natural_gradient(m, p.g, p.g0)
    assert_close(dw, dense[:, :-1], **TOL)
    assert_close(dw0, dense[:, -1], **TOL)


@given(sharing=any_sharing, p=problems(), block=any_block)
def test_identity_10_step_changes_the_q_mean_of_the_preactivation_by_g0_over_c(sharing, p, block):
    m, F = damped(p, sharing, block)
    dw, dw0 = unit_natural_gradient(m, p.g, p.g0)
    b, c = F[:, :-1, -1], F[:, -1, -1]
    assert_close(dot(b / c[:, None], dw) + dw0, p.g0 / c, **TOL)
    assert_close(dot(m.mu_p, dw) + dw0, p.g0 / c - dot(m.mean_shift, dw), **TOL)


@given(sharing=any_sharing, p=problems(), block=any_block)
def test_natural_gradient_of_the_weights_alone_solves_with_the_second_moment(sharing, p, block):
    m, F = damped(p, sharing, block)
    dense = torch.linalg.solve(F[:, :-1, :-1], p.g)
    assert_close(weight_natural_gradient(m, p.g), dense, **TOL)


# Theorem 2


@given(sharing=any_sharing, p=problems(), block=any_block)
def test_theorem_2_is_the_bias_shift_of_the_step(sharing, p, block):
    m, F = damped(p, sharing, block)
    nu = cases(p, "expand")[0].mean(0)
    dense = torch.linalg.solve(F, joined(p.g, p.g0))
    assert_close(theorem_2(m, p.g, p.g0), dense @ with_ones(nu), **TOL)


@given(sharing=any_sharing, p=problems(), block=any_block)
def test_theorem_2_corrects_the_shift_of_the_uncoupled_step(sharing, p, block):
    m, F = damped(p, sharing, block)
    _, k = bias_shift_correction(m)
    c, uncoupled = F[:, -1, -1], apply(inv(F[:, :-1, :-1]), p.g)
    without = dot(m.mu_p, uncoupled) + p.g0 / c
    change = -(1 + k) * dot(m.mu_q, uncoupled) + k * p.g0 / c
    assert_close(theorem_2(m, p.g, p.g0) - without, change, **TOL)
    share = 1 - dot(m.mu_p, apply(inv(F[:, :-1, :-1]), F[:, :-1, -1]))
    dw0 = unit_natural_gradient(m, p.g, p.g0).dw0
    assert_close(share * dw0, (1 + k) * (p.g0 / c - dot(m.mu_q, uncoupled)), **TOL)


@given(sharing=any_sharing, p=problems(), block=any_block)
def test_identity_11_three_forms_of_k(sharing, p, block):
    m, F = damped(p, sharing, block)
    s, k = bias_shift_correction(m)
    A, b, c, nu = F[:, :-1, :-1], F[:, :-1, -1], F[:, -1, -1], cases(p, "expand")[0].mean(0)
    mu, Cov = b / c[:, None], b - c[:, None] * nu
    V = A / c[:, None, None] - outer(mu)
    assert_close(k, s * c * dot(Cov, apply(inv(A), mu)), **TOL)
    assert_close(k, dot(Cov, apply(inv(V), mu)) / c, **TOL)
    assert_close(1 + k, s * c * (1 - dot(nu, apply(inv(A), b))), **TOL)


@given(sharing=any_sharing, p=problems(), block=any_block)
def test_identity_12_any_point_picks_a_row_of_the_inverse_fisher(sharing, p, block):
    m, F = damped(p, sharing, block)
    kappa = 1 + dot(m.mu_q - p.x, apply(inv(m.Var_q), m.mu_q))
    row = apply(inv(F), with_ones(p.x).expand(len(F), -1))
    assert_close(row[:, :-1], apply(inv(m.A), p.x - kappa[:, None] * m.mu_q), **TOL)
    assert_close(row[:, -1], kappa / m.c, **TOL)


@given(sharing=any_sharing, p=problems(), block=any_block)
def test_identity_13_leverage_of_a_point(sharing, p, block):
    m, F = damped(p, sharing, block)
    x, away = with_ones(p.x).expand(len(F), -1), p.x - m.mu_q
    leverage = (1 + dot(away, apply(inv(m.Var_q), away))) / m.c
    assert_close(dot(x, apply(inv(F), x)), leverage, **TOL)


@given(sharing=any_sharing, p=problems())
def test_identity_13_leverages_sum_to_the_number_of_parameters(sharing, p):
    m = moments(p, sharing)
    G, S = gradients(p, sharing).split([p.a.shape[-1], 1], dim=-1)
    away = G - S * m.mu_q
    leverage = (S.squeeze(-1) ** 2 + dot(away, apply(inv(m.Var_q), away))) / m.c
    assert_close(leverage.sum(0) / len(p.a), torch.full_like(m.c, p.a.shape[-1] + 1), **TOL)


@given(sharing=any_sharing, p=problems())
def test_identity_14_norm_of_the_step_splits_into_mean_and_variance(sharing, p):
    m, G = moments(p, sharing), gradients(p, sharing)
    dw, dw0 = unit_natural_gradient(m, p.g, p.g0)
    norm = dot(p.g, dw) + p.g0 * dw0
    change = dot(G, joined(dw, dw0))  # √D Δnet
    mean, variance = p.g0**2 / m.c, m.c * dot(dw, apply(m.Var_q, dw))
    centred = p.g - p.g0[:, None] * m.mu_q
    assert_close(norm, (change**2).sum(0) / len(p.a), **TOL)
    assert_close(norm, mean + variance, **TOL)
    assert_close(variance, dot(centred, apply(inv(m.Var_q), centred)) / m.c, **TOL)


@given(sharing=any_sharing, p=problems(), block=any_block)
def test_identity_15_determinant_of_the_fisher(sharing, p, block):
    m, F = damped(p, sharing, block)
    s, _ = bias_shift_correction(m)
    logdet = slogdet(F).logabsdet
    assert_close(logdet, slogdet(F[:, :-1, :-1]).logabsdet - s.log(), **TOL)
    assert_close(logdet, F.shape[-1] * m.c.log() + slogdet(m.Var_q).logabsdet, **TOL)


@given(sharing=any_sharing, p=problems(), block=weight_block)
def test_identity_16_centred_under_q_weights_and_bias_decouple(sharing, p, block):
    m, F = damped(shifted(p, -moments(p, sharing).mu_q[0]), sharing, block)
    s, k = bias_shift_correction(m)
    dw, dw0 = unit_natural_gradient(m, p.g, p.g0)
    c = F[0, -1, -1]
    assert_close(s[0], 1 / c, **TOL)
    assert_close(k[0], torch.zeros_like(c), **TOL)
    assert_close(dw0[0], p.g0[0] / c, **TOL)
    assert_close(dw[0], torch.linalg.solve(F[0, :-1, :-1], p.g[0]), **TOL)


@given(batch=uncorrelated_batches(), damping=st.sampled_from([0.0, 1e-2]))
def test_identity_17_without_covariance_the_incoming_mean_is_corrected_to_zero(batch, damping):
    m = UnitMoments.of(batch.a, batch.D).damped(damping)
    _, k = bias_shift_correction(m)
    assert_close(k, torch.zeros_like(k), **TOL)
    assert_close(m.mu_p - (1 + k)[:, None] * m.mu_q, torch.zeros_like(batch.g), **TOL)
    assert_close(theorem_2(m, batch.g, batch.g0), batch.g0 / batch.D.mean(0), **TOL)


@given(batch=batches(), D=st.floats(0.1, 10))
def test_identity_17_constant_D_has_no_covariance(batch, D):
    m = UnitMoments.of(batch.a, torch.full_like(batch.D, D))
    _, k = bias_shift_correction(m)
    assert_close(k, torch.zeros_like(k), **TOL)
    assert_close(theorem_2(m, batch.g, batch.g0), batch.g0 / D, **TOL)


@given(r=rows())
def test_identity_17_holds_for_joint_gradients_whose_mean_is_mu_q(r):
    m = UnitMoments.of_gradients(r.G[:, :1], r.S[:, :1], mean=r.mean, samples=r.samples)
    m = UnitMoments.of_gradients(r.G[:, :1], r.S[:, :1], mean=m.mu_q[0], samples=r.samples)
    _, k = bias_shift_correction(m)
    assert_close(k, torch.zeros_like(k), **TOL)
    assert_close(theorem_2(m, r.g[:1], r.g0[:1]), r.g0[:1] / m.c, **TOL)


@given(sharing=any_sharing, p=problems())
def test_identity_18_step_is_invariant_to_affine_maps_of_the_activations(sharing, p):
    image = mapped(p, p.M, p.t)
    m, m_image = moments(p, sharing), moments(image, sharing)
    dw, dw0 = unit_natural_gradient(m, p.g, p.g0)
    dw_image, dw0_image = unit_natural_gradient(m_image, image.g, image.g0)
    assert_close(dw_image @ p.M, dw, **TOL)
    assert_close(image.a @ dw_image.T + dw0_image, p.a @ dw.T + dw0, **TOL)
    assert_close(m_image.mu_q, m.mu_q @ p.M.T + p.t, **TOL)
    assert_close(m_image.Var_q, p.M @ m.Var_q @ p.M.T, **TOL)
    assert_close(m_image.mean_shift, m.mean_shift @ p.M.T, **TOL)
    assert_close(m_image.c, m.c, **TOL)


@given(sharing=any_sharing, p=problems())
def test_weight_damped_step_is_invariant_to_rotation_and_translation(sharing, p):
    R = torch.linalg.qr(p.M).Q
    first = p._replace(g=p.g[:1], g0=p.g0[:1], delta=p.delta[..., :1])
    image = mapped(first, R, p.t)
    same_ridge = (DAMPING * ridge(first, sharing) / ridge(image, sharing)).item()
    dw, dw0 = unit_natural_gradient(moments(first, sharing).damped(DAMPING), first.g, first.g0)
    m_image = moments(image, sharing).damped(same_ridge)
    dw_image, dw0_image = unit_natural_gradient(m_image, image.g, image.g0)
    assert_close(image.a @ dw_image.T + dw0_image, p.a @ dw.T + dw0, **TOL)


@given(sharing=any_sharing, p=problems())
def test_identity_19_s_and_k_are_invariant_to_linear_maps(sharing, p):
    image = mapped(p, p.M, torch.zeros_like(p.t))
    s, k = bias_shift_correction(moments(p, sharing))
    s_image, k_image = bias_shift_correction(moments(image, sharing))
    assert_close(s_image, s, **TOL)
    assert_close(k_image, k, **TOL)


@given(sharing=any_sharing, p=problems())
def test_identity_19_translation_changes_s_and_k(sharing, p):
    m = moments(p, sharing)
    doubled = moments(shifted(p, m.mu_q[0]), sharing)  # q-mean of the first unit times two
    s, k = bias_shift_correction(m)
    s_doubled, k_doubled = bias_shift_correction(doubled)
    assert_close(m.c[0] * s_doubled[0] - 1, 4 * (m.c[0] * s[0] - 1), **TOL)
    assert_close(k_doubled[0], 2 * k[0], **TOL)


@given(sharing=any_sharing, p=problems())
def test_identity_20_centring_under_q_removes_the_coupling_and_under_p_leaves_Cov(sharing, p):
    m = moments(p, sharing)
    centred = shifted(p, -m.mu_q[0])
    m_q, m_p = moments(centred, sharing), moments(shifted(p, -m.mu_p), sharing)
    dw, _ = unit_natural_gradient(m, p.g, p.g0)
    assert_close(m_q.b[0], torch.zeros_like(m_q.b[0]), **TOL)
    assert_close(dw[0], torch.linalg.solve(m_q.A[0], centred.g[0]), **TOL)
    assert_close(m_p.b, m.c[:, None] * m.mean_shift, **TOL)


@given(sharing=any_sharing, p=problems())
def test_identity_20_whitened_under_q_the_natural_gradient_is_the_gradient(sharing, p):
    m = moments(p, sharing)
    W = inv(torch.linalg.cholesky(m.Var_q[0]))
    white = mapped(p, W, -W @ m.mu_q[0])
    m_white, F = damped(white, sharing, None)
    dw, dw0 = unit_natural_gradient(m_white, white.g, white.g0)
    assert_close(F[0], m.c[0] * torch.eye(len(F[0]), dtype=F.dtype), **TOL)
    assert_close(dw[0], white.g[0] / m.c[0], **TOL)
    assert_close(dw0[0], white.g0[0] / m.c[0], **TOL)


@given(p=problems(), block=any_block)
def test_identity_21_step_is_a_weighted_regression_of_the_error_on_the_activations(p, block):
    m, _ = damped(p, "expand", block)
    a, D = cases(p, "expand")
    sign = (a @ p.x).sign()
    delta = D.sqrt() * sign[:, None]
    g = delta.T @ with_ones(a) / len(p.a)
    dw, dw0 = unit_natural_gradient(m, g[:, :-1], g[:, -1])
    penalty = torch.eye(a.shape[1] + 1, dtype=a.dtype)[: a.shape[1] + (block == "full")]
    weight = len(p.a) * ridge(p, "expand") * (block is not None)
    for i in range(len(g)):
        regressors = torch.cat([D[:, i, None].sqrt() * with_ones(a), weight[i].sqrt() * penalty])
        target = torch.cat([sign * (D[:, i] > 0), torch.zeros(len(penalty), dtype=a.dtype)])
        solution = lstsq(regressors, target[:, None]).solution.squeeze(1)
        assert_close(torch.cat([dw[i], dw0[i, None]]), solution, **TOL)


@given(sharing=any_sharing, p=problems(), block=any_block)
def test_identity_22_k_is_bounded(sharing, p, block):
    m, _ = damped(p, sharing, block)
    s, k = bias_shift_correction(m)
    distance = dot(m.mean_shift, apply(inv(m.Var_q), m.mean_shift))
    assert (k.abs() <= ((m.c * s - 1) * distance).sqrt() + 1e-9).all()


@given(sharing=case_sharing, p=problems())
def test_identity_22_distance_of_the_means_is_bounded_by_the_spread_of_D(sharing, p):
    m, (a, D) = moments(p, sharing), cases(p, sharing)
    Var_p = (a - a.mean(0)).T @ (a - a.mean(0)) / len(a)
    distance = dot(m.mean_shift, m.mean_shift @ inv(Var_p))
    assert (distance <= D.var(0, correction=0) / D.mean(0) ** 2 + 1e-9).all()


@given(sharing=any_sharing, p=problems(), block=any_block)
def test_identity_23_condition_bounds_the_angle_to_the_gradient(sharing, p, block):
    m, F = damped(p, sharing, block)
    dw, dw0 = unit_natural_gradient(m, p.g, p.g0)
    gradient = joined(p.g, p.g0)
    step = joined(dw, dw0)
    condition = eigvalsh(F)[:, -1] / eigvalsh(F)[:, 0]
    bound = 2 * condition.sqrt() / (condition + 1)
    assert (torch.cosine_similarity(gradient, step) >= bound - 1e-9).all()


def second_order_ratio(generator: torch.Generator, positions: int, sharing: str) -> float:
    """KL(p || p after a small step of one unit) over ½ Δᵀ F Δ."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), Means(), nn.Linear(3, 4)).double()
    for parameter in model.parameters():
        parameter.data = normal(generator, *parameter.shape) / 2
    x = normal(generator, 6, positions, 2)
    found = [(w, score) for one in x.split(1) for w, score in outcomes(model(one), "categorical")]
    G = torch.stack([w**0.5 * parameter_gradient(score, model[0]) for w, score in found])
    m = UnitMoments.of_gradients(G[..., :-1], G[..., -1], mean=x.mean((0, 1)), samples=len(x))
    if sharing == "expand":
        m = expanded_moments(model, x)
    g, g0 = normal(generator, 3, 2), normal(generator, 3)
    dw, dw0 = (part[0] for part in unit_natural_gradient(m, g, g0))
    norm = g[0] @ dw + g0[0] * dw0  # Δᵀ F Δ
    epsilon = 1e-3 / (x @ dw + dw0).abs().max()
    before, kl = model(x).log_softmax(-1).detach(), 0.0
    for change in (epsilon, -2 * epsilon):  # there and opposite: the third order cancels
        model[0].weight.data[0] += change * dw
        model[0].bias.data[0] += change * dw0
        after = model(x).log_softmax(-1).detach()
        kl += (before.exp() * (before - after)).sum(-1).mean()
    return (kl / (epsilon**2 * norm)).item()


def expanded_moments(model: nn.Module, x: Tensor) -> UnitMoments:
    z, pi = model[0](x).detach(), model(x).detach().softmax(-1)
    root = pi.sqrt()[:, :, None] * (torch.eye(4).double() - pi[:, None, :])  # rows √p (e_y - p)
    back = root @ model[3].weight.detach() / x.shape[1]
    delta = back[:, :, None] * (1 - z.tanh() ** 2)[:, None]
    return UnitMoments.of(x.flatten(0, 1), (delta**2).sum(1).flatten(0, 1), samples=len(x))


@pytest.mark.parametrize(("positions", "sharing"), [(1, "joint"), (1, "expand"), (3, "joint")])
@given(generator=seeds)
def test_identity_24_fisher_norm_is_the_divergence_of_the_step(positions, sharing, generator):
    assert second_order_ratio(generator, positions, sharing) == pytest.approx(1, abs=1e-3)


def test_identity_24_fails_when_positions_with_one_label_are_expanded():
    generators = [seeded(seed) for seed in range(8)]
    ratios = [second_order_ratio(generator, 3, "expand") for generator in generators]
    assert min(abs(ratio - 1) for ratio in ratios) > 0.05


# Damping


@given(sharing=any_sharing, p=problems())
def test_weight_damping_adds_to_Var_q_only(sharing, p):
    m, weak = moments(p, sharing), moments(p, sharing).damped(DAMPING)
    d = p.a.shape[-1]
    strength = DAMPING * m.A.diagonal(dim1=1, dim2=2).sum(1) / d
    assert_close(weak.ridge, strength, **TOL)
    eye = torch.eye(d, dtype=torch.float64)
    assert_close(weak.Var_q, m.Var_q + (strength / m.c)[:, None, None] * eye, **TOL)
    for name in ("c", "b", "mu_p", "mu_q", "mean_shift", "n_eff"):
        assert_close(getattr(weak, name), getattr(m, name), rtol=0, atol=0)


@given(sharing=case_sharing, p=problems())
def test_full_damping_is_2d_pseudo_cases(sharing, p):
    a, D = cases(p, sharing)
    d = a.shape[1]
    axes = d**0.5 * torch.eye(d, dtype=a.dtype)
    mass = (len(p.a) * ridge(p, sharing) / (2 * d)).expand(2 * d, -1)
    padded = UnitMoments.of(
        torch.cat([a, axes, -axes]), torch.cat([D, mass]), origin=a.mean(0), samples=len(p.a)
    )
    full = UnitMoments.of(a, D, samples=len(p.a)).damped(DAMPING, block="full")
    for name in ("c", "b", "A", "mu_q", "Var_q"):
        assert_close(getattr(full, name), getattr(padded, name), **TOL)
    assert_close(full.mu_p, a.mean(0), **TOL)
    assert_close(full.mean_shift, padded.mu_q - a.mean(0), **TOL)


@given(sharing=any_sharing, p=problems(), block=st.sampled_from(["weight", "full"]))
def test_damping_share_is_its_part_of_what_the_constant_s_fit_leaves(sharing, p, block):
    m, F = damped(p, sharing, block)
    corner = inv(F)[:, :, -1]
    ridge_of = ridge(p, sharing)[:, None] * torch.ones_like(corner)
    ridge_of[:, -1] *= block == "full"
    assert_close(damping_share(m), (ridge_of * corner**2).sum(-1) / corner[:, -1], **TOL)


@given(sharing=case_sharing, p=problems())
def test_n_eff_of_full_damping_counts_one_more_case(sharing, p):
    m, (_, D) = damped(p, sharing, "full")[0], cases(p, sharing)
    more = torch.cat([D, len(p.a) * ridge(p, sharing)[None]])
    assert_close(m.n_eff, more.sum(0) ** 2 / (more**2).sum(0), **TOL)


@given(sharing=any_sharing, p=problems(), block=st.sampled_from(["weight", "full"]))
def test_no_damping_is_no_change(sharing, p, block):
    m = moments(p, sharing)
    assert_same(m.damped(0.0, block=block), m)


@given(batch=batches())
def test_negative_damping_and_unknown_blocks_are_refused(batch):
    m = UnitMoments.of(batch.a, batch.D)
    with pytest.raises(ValueError, match="damping must be 0 or more"):
        m.damped(-1e-3)
    with pytest.raises(ValueError, match="block"):
        m.damped(1e-3, block="bias")


def test_a_dead_unit_leaves_the_others_their_gradients():
    generator = torch.Generator().manual_seed(0)
    a, D = normal(generator, 30, 4).requires_grad_(), normal(generator, 30, 3).square()
    D[:, 1] = 0

    def gradients(units: list[int]) -> tuple[Tensor, ...]:
        m = UnitMoments.of(a, D[:, units]).damped(1e-3)
        s, k = bias_shift_correction(m)
        return torch.autograd.grad(s.nansum() + k.nansum(), a)

    assert_close(gradients([0, 1, 2]), gradients([0, 2]), **TOL)
