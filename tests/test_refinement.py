"""Factors in single precision, refined, give what factors in double precision give."""

import pytest
import torch
from hypothesis import given
from routes import kernels, per_native, per_route
from systems import benign, factored, systems
from torch import nn
from torch.testing import assert_close

from unitfisher import Monitor, gram, refinement
from unitfisher.gram import solve_grams
from unitfisher.refinement import solve_refined

by_each_route = per_route(solve_refined)


def assert_equal_solutions(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    size = torch.linalg.vector_norm(expected, dim=-1, keepdim=True)
    assert_close(found / size, expected / size, rtol=0, atol=tolerance)


@by_each_route
@given(system=systems(scales=(1e-25, 1.0, 1e25)))  # whose products no single number holds
def test_every_unit_gets_its_own_solution(route, system):
    found = route(*system[:4])
    assert found.regular.all()
    assert_equal_solutions(found.Y, solve_grams(*system).Y, 1e-7)


@by_each_route
@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_refinement_reaches_double_precision_by_itself(route, condition, monkeypatch):
    system = benign(condition)
    expected = solve_grams(*system).Y
    monkeypatch.setattr(gram, "solve_grams", None)
    assert_equal_solutions(route(*system[:4]).Y, expected, 1e-15 * condition)


@by_each_route
def test_only_who_is_too_ill_conditioned_gets_a_factor_in_double(route, monkeypatch):
    system = benign()
    system.epsilon[2] *= 1e-7  # to a condition of 3e10
    expected, taken = solve_grams(*system), factored(monkeypatch)
    found = route(*system[:4])
    assert taken == [1]
    assert_equal_solutions(found.Y, expected.Y, 1e-5)


SPOILS = {
    "no ridge": lambda s, unit: s.epsilon[unit].zero_(),
    "negative ridge": lambda s, unit: s.epsilon[unit].fill_(-1e9),
    "NaN weight": lambda s, unit: s.v[unit, 5].fill_(torch.nan),
}


@by_each_route
@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_irregular_units_are_named_and_leave_the_others_alone(route, spoil):
    system = benign()
    before = route(*system[:4])
    spoil(system, 4)
    found = route(*system[:4])
    assert found.regular.tolist() == [True, True, True, True, False, True]
    assert found.Y[4].isnan().all()
    assert_equal_solutions(found.Y[:4], before.Y[:4], 1e-14)


@by_each_route
def test_nothing_on_the_right_gives_nothing(route):
    system = benign()
    system.rhs[1] = 0
    found = route(*system[:4]).Y
    assert found[1].eq(0).all()
    assert_equal_solutions(found[2:], solve_grams(*system).Y[2:], 1e-12)


@by_each_route
def test_units_may_be_more_than_are_treated_together(route):
    s = benign()
    many = [x.repeat(9, *[1] * (x.dim() - 1)) for x in (s.v, s.epsilon, s.rhs)]
    assert len(many[0]) > refinement.TOGETHER * torch.get_num_threads()
    found = route(s.K, *many).Y
    assert_equal_solutions(found, route(*s[:4]).Y.repeat(9, 1, 1), 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_measurement_says_the_same(monkeypatch, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 16), nn.ELU(), nn.Linear(16, 3)).to(dtype)
    x, y = torch.rand(30, 50, dtype=dtype), torch.arange(30) % 3
    with Monitor(model, ["0"]) as monitor:
        expected = monitor.measure(x, y)["0"]
        direct = expected.natural_gradient(*expected.gradient)
    monkeypatch.setattr(refinement, "REFINED", 2)
    monkeypatch.setattr(gram, "solve_grams", None)
    with Monitor(model, ["0"]) as monitor:
        found = monitor.measure(x, y)["0"]
    assert found.route == "rows"
    for name in ("s", "k", "corrected_mean", "cosine", "damping_share"):
        assert_close(getattr(found, name), getattr(expected, name), rtol=1e-9, atol=1e-10)
    assert not found.s.equal(expected.s)  # it was another way
    step = found.natural_gradient(*expected.gradient)
    assert_close(step.dw, direct.dw, rtol=0, atol=1e-8 * float(direct.dw.abs().max()))


@per_native
@pytest.mark.parametrize("damping", [1e-3, 1e-6])
def test_natural_gradients_with_little_damping_are_those_of_factors_in_double(
    native, damping, monkeypatch
):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 16), nn.ELU(), nn.Linear(16, 3)).double()
    x = torch.randn(90, 100, dtype=torch.float64) * torch.logspace(0, -4, 100, dtype=torch.float64)

    def step() -> torch.Tensor:
        monitor = Monitor(model, ["0"], damping=damping, solver="direct")
        with monitor, kernels(native):
            found = monitor.measure(x, torch.arange(90) % 3)["0"]
            return found.natural_gradient(*found.gradient).dw

    expected = step()
    monkeypatch.setattr(refinement, "REFINED", 2)
    assert_equal_solutions(step(), expected, 1e-14 / damping)
