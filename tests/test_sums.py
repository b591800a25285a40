"""Sums of units: adding up, gradients through them, dead units, precision, singular cases."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import (
    DAMPING,
    any_block,
    assert_same,
    damped,
    everything,
    moments,
    weight_block,
)
from routes import kernels, per_native
from strategies import (
    TOL,
    activations,
    any_sharing,
    batches,
    means,
    normal,
    problems,
    rows,
    seeded,
    seeds,
    spreads,
)
from torch.testing import assert_close

import unitfisher
from unitfisher import (
    SingularFisherError,
    UnitMoments,
    bias_shift_correction,
    theorem_2,
    unit_natural_gradient,
)
from unitfisher.costs import DAMPED

# Adding up


@given(sharing=any_sharing, p=problems(), block=weight_block)
def test_moments_of_parts_add_up(sharing, p, block):
    half = len(p.a) // 2
    parts = [p._replace(a=p.a[i:j], delta=p.delta[i:j]) for i, j in pairwise([0, half, len(p.a)])]
    first, second = (moments(part, sharing, origin=p.x) for part in parts)
    whole, _ = damped(p, sharing, block)
    total = first + second
    assert_same(total if block is None else total.damped(DAMPING), whole)
    assert_same(first + second, second + first)


@given(r=rows(), damping=st.floats(0, 0.1), block=st.sampled_from(["weight", "full"]))
def test_damped_parts_add_up_to_the_mean_of_their_fishers(r, damping, block):
    first, second = (
        UnitMoments.of_gradients(G, S, r.mean, samples=n)
        for G, S, n in [(r.G[::2], r.S[::2], 5), (r.G[1::2], r.S[1::2], 7)]
    )
    weak = second.damped(damping, block=block)
    assert_close((first + weak).F, (5 * first.F + 7 * weak.F) / 12, **TOL)


@given(batch=batches())
def test_moments_about_different_origins_do_not_add_up(batch):
    m = UnitMoments.of(batch.a, batch.D)
    other = UnitMoments.of(batch.a, batch.D, origin=m.origin + 1)
    with pytest.raises(ValueError, match="origin"):
        m + other


@given(sharing=any_sharing, p=problems(), block=any_block)
def test_origin_is_invisible(sharing, p, block):
    m, elsewhere = moments(p, sharing), moments(p, sharing, origin=p.x)
    if block is not None:
        m, elsewhere = m.damped(DAMPING, block=block), elsewhere.damped(DAMPING, block=block)
    assert_same(elsewhere, m)
    assert_close(theorem_2(elsewhere, p.g, p.g0), theorem_2(m, p.g, p.g0), **TOL)


@given(batch=batches())
def test_order_and_repetition_of_cases_are_invisible(batch):
    a, D = torch.cat([batch.a, batch.a]).flip(0), torch.cat([batch.D, batch.D]).flip(0)
    found = bias_shift_correction(UnitMoments.of(a, D))
    assert_close(found, bias_shift_correction(UnitMoments.of(batch.a, batch.D)), **TOL)


@given(batch=batches(), exponent=st.integers(-30, 6))
def test_scale_of_D_divides_s_and_the_step_and_leaves_k(batch, exponent):
    scale = 10.0**exponent
    m, scaled = UnitMoments.of(batch.a, batch.D), UnitMoments.of(batch.a, scale * batch.D)
    s, k = bias_shift_correction(m.damped(DAMPING))
    s_scaled, k_scaled = bias_shift_correction(scaled.damped(DAMPING))
    assert_close(scale * s_scaled, s, **TOL)
    assert_close(k_scaled, k, **TOL)
    dw, dw0 = unit_natural_gradient(m, batch.g, batch.g0)
    dw_scaled, dw0_scaled = unit_natural_gradient(scaled, batch.g, batch.g0)
    assert_close(scale * dw_scaled, dw, **TOL)
    assert_close(scale * dw0_scaled, dw0, **TOL)
    assert_close(scaled.mu_q, m.mu_q, **TOL)
    assert_close(scaled.Var_q, m.Var_q, **TOL)


@given(batch=batches())
def test_units_of_a_group_see_the_activations_of_their_group(batch):
    groups = torch.stack([batch.a, batch.a.flip(0) + 1])
    D = torch.cat([batch.D, batch.D.flip(1)], dim=1)
    g, g0 = torch.cat([batch.g, batch.g]), torch.cat([batch.g0, batch.g0])
    halves = zip(groups, D.chunk(2, dim=1), strict=True)
    apart = [everything(UnitMoments.of(a, part), batch.g, batch.g0) for a, part in halves]
    together = everything(UnitMoments.of(groups, D), g, g0)
    for found, first, second in zip(together, *apart, strict=True):
        assert_close(found, torch.cat([first, second]), **TOL)


# Gradients, dead units, precision, singular cases


@pytest.mark.parametrize("quantity", ["bias_shift_correction", "unit_natural_gradient"])
@pytest.mark.parametrize("damping", [0.0, 1e-2])
def test_gradients_flow_to_activations_and_errors(quantity, damping):
    generator = seeded(0)
    a = activations(generator, (8, 2), 1.0, 1.0).requires_grad_()
    D = (0.1 + normal(generator, 8, 2) ** 2).requires_grad_()
    arguments = [normal(generator, 2, 2), normal(generator, 2)]
    arguments = arguments if quantity == "unit_natural_gradient" else []

    def function(a, D):
        return getattr(unitfisher, quantity)(UnitMoments.of(a, D).damped(damping), *arguments)

    assert torch.autograd.gradcheck(function, (a, D))


@given(batch=batches(), damping=st.sampled_from([0.0, 1e-2]))
def test_dead_unit_is_reported_and_gets_no_step(batch, damping):
    D = torch.cat([torch.zeros_like(batch.D[:, :1]), batch.D], dim=1)
    g, g0 = torch.cat([batch.g[:1], batch.g]), torch.cat([batch.g0[:1], batch.g0])
    m = UnitMoments.of(batch.a, D).damped(damping)
    alive = UnitMoments.of(batch.a, batch.D).damped(damping)
    s, k, dw, dw0 = found = everything(m, g, g0)
    assert m.alive.tolist() == [False] + [True] * batch.D.shape[1]
    assert torch.stack([s[0], k[0]]).isnan().all()
    assert not torch.cat([dw[0], dw0[:1]]).any()
    for part, expected in zip(found, everything(alive, batch.g, batch.g0), strict=True):
        assert_close(part[1:], expected, **TOL)


@pytest.mark.parametrize("gradient", ["any", "of the same errors"])
@given(generator=seeds)
def test_float32_keeps_its_digits_at_a_mean_of_a_thousand(gradient, generator):
    a = (1000 + normal(generator, 64, 5)).float()
    delta = normal(generator, 64, 3).float()
    g, g0 = delta.T @ a / 64, delta.mean(0)  # g - g0 μ cancels three digits
    if gradient == "any":
        g, g0 = normal(generator, 3, 5).float(), normal(generator, 3).float()
    found = everything(UnitMoments.of(a, delta**2), g, g0)
    double = UnitMoments.of(a.double(), delta.double() ** 2)
    for x, y in zip(found, everything(double, g.double(), g0.double()), strict=True):
        assert x.dtype == torch.float32
        assert (x - y).norm() <= 1e-4 * y.norm()


@given(
    generator=seeds,
    n=st.integers(1, 8),
    more=st.integers(0, 3),
    mean=means,
    spread=spreads,
)
def test_no_more_cases_than_inputs_raise_and_damping_is_the_way_out(
    generator, n, more, mean, spread
):
    d = n + more
    a = 0.1 + activations(generator, (n, d), mean, spread)
    g, g0 = normal(generator, 2, d), normal(generator, 2)
    m = UnitMoments.of(a, normal(generator, n, 2) ** 2)
    with pytest.raises(SingularFisherError, match=r"unit 0 .*damped"):
        bias_shift_correction(m)
    with pytest.raises(SingularFisherError, match=r"unit 0 .*damped"):
        unit_natural_gradient(m, g, g0)
    assert all(part.isfinite().all() for part in everything(m.damped(1e-3), g, g0))


@given(batch=batches())
def test_singular_unit_is_named(batch):
    lone = torch.zeros_like(batch.D[:, :1])
    lone[0] = 1  # one case cannot have a variance
    D = torch.cat([batch.D, lone], dim=1)
    with pytest.raises(SingularFisherError, match=f"unit {batch.D.shape[1]} "):
        bias_shift_correction(UnitMoments.of(batch.a, D))


@given(batch=batches())
def test_an_input_that_is_constant_under_q_makes_the_fisher_singular(batch):
    constant = torch.ones_like(batch.a[:, :1])  # A is positive definite all the same
    m = UnitMoments.of(torch.cat([batch.a, constant], dim=1), batch.D)
    with pytest.raises(SingularFisherError, match="unit 0 "):
        bias_shift_correction(m)


ORIGINS = {
    "of the batch": lambda a, D: None,
    "of each unit": lambda a, D: ((D / D.sum(0)).T.to(a.dtype) @ (a - a.mean(0))) + a.mean(0),
    "elsewhere": lambda a, D: a.mean(0) + 1,
}


@pytest.mark.parametrize("origin", ORIGINS.values(), ids=ORIGINS)
@per_native
@given(
    generator=seeds,
    n=st.sampled_from([40, 300, 3000]),
    value=st.floats(-4, 4),
    of_a=st.sampled_from([torch.float32, torch.float64]),
    of_D=st.sampled_from([torch.float32, torch.float64]),
)
def test_rounding_hides_no_constant_input(origin, native, generator, n, value, of_a, of_D):
    a, D = activations(generator, (n, 4), 1.0, 1.0).to(of_a), normal(generator, n, 2).to(of_D) ** 4
    last_digit = torch.finfo(of_a).eps * torch.randint(0, 2, (n,), generator=generator)
    a[:, 2] = value * (1 - last_digit / 2)  # as of a function that is saturated
    with kernels(native):
        m = UnitMoments.of(a, D, origin=origin(a, D))
        with pytest.raises(SingularFisherError, match="unit 0 "):
            bias_shift_correction(m)
        enough = max(1e-6, m.noise)  # what rounding took from the variance may be that much
        assert bias_shift_correction(m.damped(enough)).s.isfinite().all()


@given(
    generator=seeds,
    value=st.floats(0.5, 4),
    dtypes=st.permutations([torch.float32, torch.float64]),
)
def test_rounding_of_any_part_hides_no_constant_input(generator, value, dtypes):
    parts = []
    for dtype in dtypes:
        a, D = activations(generator, (40, 3), 0.0, 1.0).to(dtype), normal(generator, 40, 1) ** 2
        a[:, 1] = torch.tensor(value).float()
        parts.append(UnitMoments.of(a, D, origin=torch.zeros(3, dtype=dtype)))
    with pytest.raises(SingularFisherError, match="unit 0 "):
        bias_shift_correction(parts[0] + parts[1])


@given(r=rows(), value=st.floats(0.5, 4))
def test_rounding_hides_no_constant_input_of_joint_gradients(r, value):
    G, mean = r.G.clone(), r.mean.clone()
    G[..., 0], mean[0] = value * r.S, value
    G = G.float().double()
    eps = torch.finfo(torch.float32).eps
    m = UnitMoments.of_gradients(G, r.S, mean, samples=r.samples, eps=eps)
    with pytest.raises(SingularFisherError, match="unit 0 "):
        bias_shift_correction(m)
    assert bias_shift_correction(m.damped(1e-6)).s.isfinite().all()


@per_native
@given(generator=seeds)
def test_an_input_that_others_nearly_tell_is_not_taken_for_constant(native, generator):
    a, D = normal(generator, 100, 3), normal(generator, 100, 2) ** 2
    a[:, 2] = a[:, 0] + a[:, 1] + 5e-3 * a[:, 2]
    with kernels(native):
        s, _ = bias_shift_correction(UnitMoments.of(a.float(), D))
    assert_close(s, bias_shift_correction(UnitMoments.of(a, D)).s, rtol=0.3, atol=0)


@per_native
@given(generator=seeds, d=st.integers(4, 40), more=st.integers(-3, 3), mean=means)
def test_little_damping_makes_up_for_few_cases_in_single_precision(
    native, generator, d, more, mean
):
    a = activations(generator, (d + more, d), mean, 1.0)
    D = normal(generator, d + more, 3) ** 2
    with kernels(native):
        s, _ = bias_shift_correction(UnitMoments.of(a.float(), D).damped(DAMPED))
    exact, _ = bias_shift_correction(UnitMoments.of(a, D).damped(DAMPED))
    assert_close(s, exact, rtol=1.0, atol=0)


def test_two_cases_and_one_input_worked_by_hand():
    a, D = torch.tensor([[1.0], [3.0]]).double(), torch.tensor([[3.0], [1.0]]).double()
    m = UnitMoments.of(a, D)  # c = 2, μ_p = 2, μ_q = 3/2, Var_q = 3/4
    np.testing.assert_allclose([m.c.item(), m.mu_q.item(), m.Var_q.item()], [2, 1.5, 0.75])
    s, k = bias_shift_correction(m)
    np.testing.assert_allclose([s.item(), k.item()], [2.0, -1.0])
    dw, dw0 = unit_natural_gradient(m, torch.ones(1, 1).double(), torch.ones(1).double())
    np.testing.assert_allclose([dw.item(), dw0.item()], [-1 / 3, 1.0])
    shift = theorem_2(m, torch.ones(1, 1).double(), torch.ones(1).double())
    np.testing.assert_allclose(shift.item(), 2 * dw.item() + dw0.item())
