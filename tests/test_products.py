"""Conjugate gradients give what Cholesky gives, or say so."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import unitfisher.condensed
import unitfisher.planner
import unitfisher.products
from unitfisher import Monitor, UnconvergedWarning
from unitfisher.cases import UnitCases
from unitfisher.condensed import Condensed
from unitfisher.solvers import SingularFisherError
from unitfisher.theorems import bias_shift_correction, damping_share, unit_natural_gradient

TOL = {"rtol": 1e-7, "atol": 1e-9}
N, D, U = 160, 6, 8


def layer(
    seed: int, *, groups: int = 1, spread: float = 0.0, mean: float = 0.0, dtype=torch.float64
) -> UnitCases:
    """Cases whose inputs differ in scale by 10**spread, of units that weigh them very unevenly."""
    chance = torch.Generator().manual_seed(seed)
    a = torch.randn(groups, N, 1, D, generator=chance, dtype=torch.float64)
    a = (a @ torch.randn(D, D, generator=chance, dtype=torch.float64)) * 10 ** torch.linspace(
        0, -spread, D, dtype=torch.float64
    )
    delta = torch.randn(1, N, 1, U, generator=chance, dtype=torch.float64) ** 3
    return UnitCases((a + mean).to(dtype), delta, N)


def both(cases: UnitCases, damping: float):
    ((_, _, iterated),) = Condensed(cases, "iterative").damped_parts(damping)
    ((_, _, solved),) = Condensed(cases, "direct").damped_parts(damping)
    assert type(iterated) is not type(solved)
    return iterated, solved


def assert_same_theory(iterated, solved, *, rtol: float, atol: float = 0.0):
    tol = {"rtol": rtol, "atol": atol, "equal_nan": True}
    for found, expected in zip(
        bias_shift_correction(iterated), bias_shift_correction(solved), strict=True
    ):
        assert_close(found, expected, **tol)
    assert_close(damping_share(iterated), damping_share(solved), **tol)
    g = torch.randn(U, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    dw, dw0 = unit_natural_gradient(iterated, g, g[:, 0])
    expected = unit_natural_gradient(solved, g, g[:, 0])
    size = expected.dw.norm(dim=1, keepdim=True) + 1e-300
    assert_close(dw / size, expected.dw / size, rtol=0, atol=rtol)
    assert_close(dw0, expected.dw0, rtol=rtol, atol=rtol * float(expected.dw0.abs().max()))
    for name in ("c", "mu_q", "mu_q_squared", "trace_Var_q", "mean_shift"):
        assert_close(getattr(iterated, name), getattr(solved, name), rtol=1e-9, atol=1e-10)


@given(
    seed=st.integers(0, 2**31),
    groups=st.sampled_from([1, 2, 4]),
    spread=st.sampled_from([0.0, 2.0, 4.0]),
    mean=st.sampled_from([0.0, 3.0]),
    damping=st.sampled_from([1e-12, 1e-6, 1e-3, 1.0]),
)
def test_iterations_reach_what_cholesky_gives(seed, groups, spread, mean, damping):
    iterated, solved = both(layer(seed, groups=groups, spread=spread, mean=mean), damping)
    assert (iterated.residual <= iterated.tolerance).all()
    assert_same_theory(iterated, solved, rtol=1e-6, atol=1e-6)


def test_single_precision_keeps_four_digits():
    iterated, solved = both(layer(3, spread=2.0, dtype=torch.float32), 1e-4)
    for found, expected in zip(
        bias_shift_correction(iterated), bias_shift_correction(solved), strict=True
    ):
        assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_large_mean_that_single_precision_rounds_shifts_nothing():
    cases = layer(3, mean=1000.3, dtype=torch.float32)
    iterated, _ = both(cases, 1e-4)
    exact = UnitCases(cases.a.double(), cases.delta, N)
    expected, _ = both(exact, 1e-4)
    assert_close(iterated.mean_shift, expected.mean_shift, rtol=0, atol=2e-6)
    assert_close(iterated.mu_q, expected.mu_q, rtol=0, atol=2e-6)


def test_the_dead_and_what_sees_nothing_get_what_cholesky_gives_them():
    cases = layer(0, groups=2)
    delta, a = cases.delta.clone(), cases.a.clone()
    delta[..., 1] = 0.0  # a dead unit
    a[1] = 0.0  # a group that is fed with zeros
    iterated, solved = both(UnitCases(a, delta, N), 1e-3)
    assert_same_theory(iterated, solved, rtol=1e-6, atol=1e-9)
    assert iterated.solve(torch.ones(U, D, dtype=torch.float64))[1].eq(0).all()


def test_inputs_that_are_given_twice():
    cases = layer(0)
    a = cases.a.clone()
    a[..., 1] = a[..., 0]
    iterated, solved = both(UnitCases(a, cases.delta, N), 1e-3)
    assert_same_theory(iterated, solved, rtol=1e-6, atol=1e-8)
    iterated, _ = both(UnitCases(a, cases.delta, N), 0.0)
    with pytest.raises(SingularFisherError):
        iterated.fit  # noqa: B018


def test_a_unit_of_few_cases_is_singular_without_damping():
    cases = layer(0)
    delta = cases.delta.clone()
    delta[:, D:, :, 2] = 0.0
    iterated, _ = both(UnitCases(cases.a, delta, N), 0.0)
    with pytest.raises(SingularFisherError, match="unit 2"):
        iterated.fit  # noqa: B018
    iterated, solved = both(UnitCases(cases.a, delta, N), 1e-3)
    assert_same_theory(iterated, solved, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("solver", ["sums", "products"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.3, 1.0, 3.0])
def test_an_input_that_is_constant_where_a_unit_has_errors_makes_it_singular(solver, dtype, value):
    cases = layer(0)
    delta, a = cases.delta.clone(), cases.a.clone()
    delta[:, 40:, :, 2], a[:, :40, :, 0] = 0.0, value
    cases = UnitCases(a.to(dtype), delta.to(dtype), N)
    ((_, _, m),) = Condensed(cases, solver).damped_parts(0.0)
    with pytest.raises(SingularFisherError, match="unit 2 "):
        m.fit  # noqa: B018


def convolution() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    head = nn.Flatten(), nn.Linear(4 * 36, 3)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ELU(), *head).double()
    return model, torch.randn(10, 2, 6, 6, dtype=torch.float64)


def test_a_monitor_iterates_where_that_was_planned(monkeypatch):
    model, x = convolution()
    with Monitor(model, layers="0", solver="direct") as monitor:
        direct = monitor.measure(x)["0"]
    assert direct.route == "sums"
    monkeypatch.setattr(unitfisher.planner, "route_of", lambda *_, **__: "products")
    with Monitor(model, layers="0") as monitor:
        found = monitor.measure(x)["0"]
        assert found.route == "products"
        assert_close(found.k, direct.k, **TOL)
        assert_close(found.s, direct.s, **TOL)
        assert found.converged.all()
        assert 0 < found.residual.max() <= 1e-9
        assert direct.residual.eq(0).all()
        assert_close(found.damped(0.1).s, direct.damped(0.1).s, **TOL)
    monkeypatch.setattr(unitfisher.condensed, "units_together", lambda *_: 2)
    with Monitor(model, layers="0") as monitor:
        assert_close(monitor.measure(x)["0"].k, direct.k, **TOL)


@given(seed=st.integers(0, 2**31), damping=st.sampled_from([1e-6, 1e-3]))
def test_cholesky_solves_what_would_take_too_many_iterations(seed, damping):
    cases = layer(seed, groups=2, spread=2.0, mean=3.0)
    _, solved = both(cases, damping)
    ((_, _, iterated),) = Condensed(cases, "iterative").damped_parts(damping)
    impatient = replace(iterated, patience=1)
    assert (replace(iterated, patience=None).residual > 0).all()
    assert impatient.residual.eq(0).any()
    assert (impatient.residual <= impatient.tolerance).all()
    assert_same_theory(impatient, solved, rtol=1e-6, atol=1e-6)


def test_what_did_not_converge_says_so(monkeypatch, tmp_path):
    model, x = convolution()
    monkeypatch.setattr(unitfisher.products, "ITERATIONS", 2)
    monitor = Monitor(model, layers="0", solver="iterative", record=tmp_path / "run")
    with pytest.warns(UnconvergedWarning, match=r"after 2 iterations in some units"):
        found = monitor.measure(x)["0"]
    assert not found.converged.all()
    table = monitor.to_pandas()
    assert table["converged"].tolist() == found.converged.tolist()
    assert (table["residual"] > 1e-9).any()
    with pytest.warns(UnconvergedWarning, match=r"units 0, 1, 2, 3 of layer '0': .*direct"):
        found.natural_gradient(torch.ones(4, 18), torch.ones(4))


def halves_in_opposite_units() -> tuple[nn.Module, Tensor, Tensor]:
    """A layer whose constant is easy and whose gradient is not.

    Half of the cases repeat the others with the last inputs' sign turned: E_q(a) lies in the other
    inputs, where all units agree, the gradient in the last ones, where they do not.
    """
    torch.manual_seed(0)
    n, common, own, units = 100, 2, 78, 6
    shared, turned = torch.randn(n, common) / 2 + 1, torch.randn(n, own) / 2 + 1
    x = torch.cat([torch.cat([shared, turned], 1), torch.cat([shared, -turned], 1)]).double()
    model = nn.Sequential(
        nn.Linear(common + own, units), nn.Tanh(), nn.Linear(units, 6, bias=False)
    )
    readout = torch.randn(3, units)
    with torch.no_grad():
        model[0].weight.zero_()[:, common:] = torch.randn(units, own) * 3 / own**0.5
        model[0].bias.zero_()
        model[2].weight.copy_(torch.cat([readout, -readout]))
    return model.double(), x, torch.randint(6, (2 * n,))


@pytest.mark.parametrize("asked_later", [False, True])
def test_a_gradient_that_did_not_converge_says_so(asked_later):
    model, x, y = halves_in_opposite_units()
    monitor = Monitor(model, ["0"], solver="iterative", every=1, damping=1e-5)
    loss = F.cross_entropy(model(x), y)
    if asked_later:
        assert monitor.latest["0"].converged.all()
        loss.backward()
        with pytest.warns(UnconvergedWarning, match="layers '0'"):
            monitor.natural_gradient()
    else:
        loss.backward()
        with pytest.warns(UnconvergedWarning, match="layers '0'"):
            monitor.natural_gradient()
    found = monitor.latest["0"]
    assert found.residual.max() > 1e-9
    assert not found.converged.all()
    assert monitor.to_pandas()["converged"].tolist() == found.converged.tolist()


def test_the_warning_of_it_has_one_text_which_python_shows_once(monkeypatch):
    model, x = convolution()
    monkeypatch.setattr(unitfisher.products, "ITERATIONS", 2)
    monitor = Monitor(model, layers="0", solver="iterative")
    with pytest.warns(UnconvergedWarning) as first:
        monitor.measure(x)
    with pytest.warns(UnconvergedWarning) as later:
        monitor.measure(2 * x.flip(0))
    assert str(first[0].message) == str(later[0].message)


def test_a_pass_that_was_not_finite_did_not_converge():
    model, x = convolution()
    with warnings.catch_warnings():
        found = Monitor(model, on_nonfinite="record").measure(x * torch.inf)["0"]
    assert not found.converged.any()
