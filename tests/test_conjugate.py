"""Many cases: conjugate gradients give what Cholesky gives, and leave to it what they cannot."""

import pytest
import torch
from hypothesis import given
from systems import N, U, benign, factored, systems
from torch import nn
from torch.testing import assert_close

from unitfisher import Monitor, conjugate, gram
from unitfisher.condensed import Condensed
from unitfisher.conjugate import solve_by_iterations
from unitfisher.gram import System, solve_grams
from unitfisher.memory import within
from unitfisher.rows import UnitRows
from unitfisher.solvers import SingularFisherError


@pytest.fixture(autouse=True)
def any_number(monkeypatch):
    monkeypatch.setattr(conjugate, "MANY_CASES", 2)
    monkeypatch.setattr(conjugate, "MANY_UNITS", 1)
    monkeypatch.setattr(conjugate, "PACE", 1)  # as many iterations as cases


def assert_solved(found: conjugate.Iterated, system: System) -> None:
    expected = solve_grams(*system).Y
    size = torch.linalg.vector_norm(expected, dim=-1, keepdim=True)
    assert_close(found.Y / size, expected / size, rtol=0, atol=1e-7)
    assert (found.residual <= conjugate.SLACK * conjugate.RESIDUAL).all()


@given(system=systems())
def test_iterations_solve_as_cholesky_does(system):
    assert_solved(solve_by_iterations(*system[:4]), system)


@given(system=systems(shares=(0.03, 0.3)))
def test_iterations_alone_solve_what_is_well_conditioned(system):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram, "solve_grams", None)
        patch.setattr(conjugate, "LOOK", N)  # nobody is late
        found = solve_by_iterations(*system[:4])
    assert_solved(found, system)


def test_what_converges_needs_no_factor(monkeypatch):
    system = benign(3)
    expected = solve_grams(*system).Y
    monkeypatch.setattr(gram, "solve_grams", None)
    found = solve_by_iterations(*system[:4])
    assert (found.residual > 0).all()
    assert_close(found.Y, expected, rtol=1e-9, atol=1e-10)


def test_only_who_is_late_gets_a_factor(monkeypatch):
    system, taken = benign(3), factored(monkeypatch)
    system.v[2] = torch.logspace(-8, 4, N, dtype=torch.float64)  # far from the others
    monkeypatch.setattr(conjugate, "PACE", 2)
    found = solve_by_iterations(*system[:4])
    assert taken == [1]
    assert found.residual.eq(0).tolist() == [unit == 2 for unit in range(U)]
    assert_close(found.Y, solve_grams(*system).Y, rtol=1e-7, atol=1e-9)


def test_an_early_look_ends_what_is_not_on_the_way(monkeypatch):
    system, steps = benign(3), []
    times = conjugate.Scaled.times
    monkeypatch.setattr(
        conjugate.Scaled, "times", lambda self, x, K: steps.append(len(x)) or times(self, x, K)
    )
    monkeypatch.setattr(conjugate, "RESIDUAL", 1e-300)
    found = solve_by_iterations(*system[:4])
    assert len(steps) == 2 * conjugate.LOOK + 1  # and once for the residual
    assert found.residual.eq(0).all()
    assert_close(found.Y, solve_grams(*system).Y, rtol=1e-12, atol=0)


def test_dead_units_and_zero_right_hand_sides_get_zero():
    system = benign(3)
    system.v[1], system.rhs[1] = 0.0, 0.0
    found = solve_by_iterations(*system[:4])
    assert found.Y[1].eq(0).all()
    assert found.residual[1] == 0
    assert_close(found.Y, solve_grams(*system).Y, rtol=1e-9, atol=1e-10)


def test_a_matrix_that_rounding_makes_singular_is_named():
    system = benign(3)
    system.K[:, 1], system.K[:, :, 1] = system.K[:, 0], system.K[:, :, 0]
    system.epsilon[4] = 1e-30
    with pytest.raises(SingularFisherError, match="unit 4"):
        solve_by_iterations(*system[:4])


def convolution() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    head = nn.Flatten(), nn.Linear(4 * 9, 3)
    model = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.ELU(), *head).double()
    return model, torch.randn(4, 8, 3, 3, dtype=torch.float64)


@pytest.mark.parametrize("damping", [1e-4, 1e-2])
def test_a_monitor_iterates_where_there_are_many_cases(damping):
    model, x = convolution()
    y = torch.zeros(4, dtype=torch.long)
    with Monitor(model, layers="0", damping=damping, solver="direct") as monitor:
        direct = monitor.measure(x, y)["0"]
    with Monitor(model, layers="0", damping=damping) as monitor:
        found = monitor.measure(x, y)["0"]
    assert found.route == "rows"
    assert 0 < found.residual.max() <= conjugate.SLACK * conjugate.RESIDUAL
    assert found.converged.all()
    assert direct.residual.eq(0).all()
    for name in ("s", "k", "damping_share", "cosine", "bias_shift_share_natural"):
        assert_close(getattr(found, name), getattr(direct, name), rtol=1e-7, atol=1e-10)
    step = found.natural_gradient(*found.gradient).dw
    expected = direct.natural_gradient(*direct.gradient).dw
    assert_close(step, expected, rtol=0, atol=1e-7 * float(expected.abs().max()))


def test_parts_of_the_units_share_one_gram_matrix():
    model, x = convolution()
    monitor = Monitor(model, layers="0")
    cases = monitor.measure(x)["0"].cases
    ((_, together),) = Condensed(cases).parts()
    with within(2 * 64 * (72 + 36)):  # of two units
        apart = [m for _, m in Condensed(cases).parts()]
    assert [len(m.c) for m in apart] == [2, 2]
    assert all(isinstance(m, UnitRows) for m in apart)
    assert apart[0].gram is apart[1].gram
    assert_close(torch.cat([m.mu_q for m in apart]), together.mu_q, rtol=1e-12, atol=1e-12)
