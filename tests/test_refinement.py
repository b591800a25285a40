"""Factors in single precision, refined, give what factors in double precision give."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import mostly_ones, normal, seeds
from torch import nn
from torch.testing import assert_close

from unitfisher import Monitor, gram, refinement
from unitfisher.gram import GramSolution, System, solve_grams
from unitfisher.native import compiled
from unitfisher.refinement import solve_refined

U, N = 6, 40

per_route = pytest.mark.parametrize(
    "solve",
    [
        pytest.param(
            solve_refined,
            marks=pytest.mark.skipif(not compiled(), reason="NOT TESTED COMPILED: no C compiler"),
        ),
        lambda *system: by_torch(*system),
    ],
    ids=["compiled", "torch"],
)


def by_torch(*system: torch.Tensor) -> GramSolution:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNITFISHER_NATIVE", "0")
        return solve_refined(*system)


@st.composite
def systems(draw) -> System:
    """Weights of heavy tails, a fifth of them zero; duplicates; all conditions up to 1e8."""
    generator, groups = draw(seeds), draw(st.sampled_from([1, 2, 3]))
    a = normal(generator, groups, N, draw(st.sampled_from([3, N, 4 * N])))
    a[:, 7] = a[:, 3]
    a[:, 11] = 0
    a *= draw(st.sampled_from([1e-25, 1.0, 1e25]))  # whose products no single number holds
    v = (normal(generator, N, U) ** 3 * mostly_ones(generator, N, U)).T.contiguous()
    K = a @ a.mT
    largest = torch.linalg.eigvalsh(K).amax() * (v**2).amax(1)
    epsilon = largest * draw(st.sampled_from([1e-8, 1e-4, 1.0]))
    return System(K, v, epsilon, normal(generator, U, 3, N), *2 * [torch.zeros_like(v)])


def benign(condition: float = 1e3) -> System:
    generator = torch.Generator().manual_seed(3)
    a = normal(generator, 1, N, N // 2)
    v = 1 + torch.rand(U, N, generator=generator, dtype=torch.float64)
    K = a @ a.mT
    epsilon = torch.linalg.eigvalsh(K).amax().expand(U) / condition
    return System(K, v, epsilon.contiguous(), normal(generator, U, 2, N), 0 * v, 0 * v)


def assert_equal_solutions(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    size = torch.linalg.vector_norm(expected, dim=-1, keepdim=True)
    assert_close(found / size, expected / size, rtol=0, atol=tolerance)


@per_route
@given(system=systems())
def test_every_unit_gets_its_own_solution(solve, system):
    found = solve(*system[:4])
    assert found.regular.all()
    assert_equal_solutions(found.Y, solve_grams(*system).Y, 1e-7)


@per_route
@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_refinement_reaches_double_precision_by_itself(solve, condition, monkeypatch):
    system = benign(condition)
    expected = solve_grams(*system).Y
    monkeypatch.setattr(gram, "solve_grams", None)
    assert_equal_solutions(solve(*system[:4]).Y, expected, 1e-15 * condition)


@per_route
def test_only_who_is_too_ill_conditioned_gets_a_factor_in_double(solve, monkeypatch):
    system, taken = benign(), []
    system.epsilon[2] *= 1e-7  # to a condition of 3e10
    expected = solve_grams(*system)

    def counted(K, v, epsilon, rhs):
        taken.append(len(v))
        return solve_grams(K, v, epsilon, rhs)

    monkeypatch.setattr(gram, "solve_grams", counted)
    found = solve(*system[:4])
    assert taken == [1]
    assert_equal_solutions(found.Y, expected.Y, 1e-5)


SPOILS = {
    "no ridge": lambda s, unit: s.epsilon[unit].zero_(),
    "negative ridge": lambda s, unit: s.epsilon[unit].fill_(-1e9),
    "NaN weight": lambda s, unit: s.v[unit, 5].fill_(torch.nan),
}


@per_route
@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_irregular_units_are_named_and_leave_the_others_alone(solve, spoil):
    system = benign()
    before = solve(*system[:4])
    spoil(system, 4)
    found = solve(*system[:4])
    assert found.regular.tolist() == [True, True, True, True, False, True]
    assert found.Y[4].isnan().all()
    assert_equal_solutions(found.Y[:4], before.Y[:4], 1e-14)


@per_route
def test_nothing_on_the_right_gives_nothing(solve):
    system = benign()
    system.rhs[1] = 0
    found = solve(*system[:4]).Y
    assert found[1].eq(0).all()
    assert_equal_solutions(found[2:], solve_grams(*system).Y[2:], 1e-12)


@per_route
def test_units_may_be_more_than_are_treated_together(solve):
    s = benign()
    many = [x.repeat(9, *[1] * (x.dim() - 1)) for x in (s.v, s.epsilon, s.rhs)]
    assert len(many[0]) > refinement.TOGETHER * torch.get_num_threads()
    found = solve(s.K, *many).Y
    assert_equal_solutions(found, solve(*s[:4]).Y.repeat(9, 1, 1), 1e-13)


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
