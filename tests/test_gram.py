"""Systems that share a Gram matrix, compiled and in torch, against numpy on one at a time."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import forked, succeeded
from hypothesis import given
from hypothesis import strategies as st
from routes import by_torch, needs_compiler, per_route
from strategies import mostly_ones, normal, seeds
from torch import Generator, Tensor, nan

from unitfisher import gram, native
from unitfisher.gram import GramSolution, System, solve_grams
from unitfisher.memory import within

by_each_route = per_route(solve_grams)


def system(
    u: int,
    n: int,
    r: int,
    *,
    groups: int = 1,
    rank: int | None = None,
    generator: Generator | None = None,
    ridge: float = 1e-2,
) -> System:
    """Draw one with duplicated cases, and with about a fifth of the weights zero.

    What is subtracted, x xᵀ, is at most half of the first unit vector's part of diag(v) K diag(v).
    """
    generator = generator or Generator()
    a = normal(generator, groups, n, rank or n)
    a[:, n // 2] = a[:, 0]
    K = a @ a.mT / n
    v = (normal(generator, n, u) * mostly_ones(generator, n, u)).T.contiguous()
    epsilon = ridge * (1 + torch.rand(u, generator=generator, dtype=torch.float64))
    share = torch.rand(u, generator=generator, dtype=torch.float64) / 2
    first = a[..., 0].repeat_interleave(u // groups, 0) / n**0.5
    x = share[:, None] ** 0.5 * v * first
    return System(K, v, epsilon, normal(generator, u, r, n), x, torch.zeros_like(x))


@st.composite
def systems(draw) -> System:
    n = draw(st.sampled_from([1, 2, 7, 8, 9, 63, 64, 65, 130]))
    u, r = draw(st.sampled_from([1, 7, 8, 9, 33])), draw(st.sampled_from([1, 2, 3]))
    groups = draw(st.sampled_from([g for g in (1, 3, u) if u % g == 0]))
    rank, generator = draw(st.integers(1, n)), draw(seeds)
    return system(u, n, r, groups=groups, rank=rank, generator=generator)


def matrix(s: System, unit: int) -> Tensor:
    one = s.of_units(slice(unit, unit + 1))
    v = one.v[0]
    weighted = v[:, None] * one.K[0] * v - one.x[0].outer(one.x[0])
    return weighted + one.epsilon * torch.eye(len(v), dtype=v.dtype)


@pytest.fixture(autouse=True)
def kernels_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNITFISHER_NATIVE", "1")


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(native, "FLOP_PER_THREAD", 1)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native._library.cache_clear()
    yield tmp_path / "cache"
    native._library.cache_clear()


def assert_solves(found: GramSolution, s: System, rtol: float) -> None:
    for unit, y in enumerate(found.Y):
        expected = np.linalg.solve(matrix(s, unit).numpy(), s.rhs[unit].T.numpy()).T
        assert np.linalg.norm(y.numpy() - expected) <= rtol * np.linalg.norm(expected)


@by_each_route
@given(s=systems())
def test_every_unit_gets_its_own_solution(route, s):
    found = route(*s)
    assert found.regular.all()
    assert_solves(found, s, rtol=1e-11)


@by_each_route
@given(s=systems())
def test_products_are_of_solutions_with_right_hand_sides_and_with_one_another(route, s):
    found = route(*s)
    others = torch.cat([s.rhs, found.Y], 1)
    expected = torch.einsum("urn,usn->urs", found.Y, others)
    size = found.Y.norm(dim=-1)[:, :, None] * others.norm(dim=-1)[:, None]
    assert ((found.products - expected).abs() <= 1e-14 * size).all()


@by_each_route
def test_a_condition_of_1e8_costs_the_digits_it_must(route):
    s = system(9, 65, 2, rank=20, ridge=1e-10)
    assert torch.linalg.cond(matrix(s, 0)) > 1e8
    assert_solves(route(*s), s, rtol=1e-6)


@by_each_route
def test_no_ridge_is_needed_where_the_gram_matrix_is_regular(route):
    s = system(9, 13, 2)
    K = s.K + torch.eye(13, dtype=torch.float64)
    s = s._replace(K=K, v=1 + s.v**2, epsilon=0 * s.epsilon, x=0 * s.x)
    found = route(*s)
    assert found.regular.all()
    assert_solves(found, s, rtol=1e-11)


@by_each_route
def test_a_unit_without_errors_divides_by_its_ridge(route):
    s = system(9, 13, 2)
    s.v[4] = s.x[4] = 0
    assert torch.allclose(route(*s).Y[4], s.rhs[4] / s.epsilon[4], rtol=1e-14)


SPOILS = {
    "no ridge for a zero weight": lambda s, unit: (
        s.v[unit, 3:4].zero_() + s.x[unit, 3:4].zero_() + s.epsilon[unit].zero_()
    ),
    "no ridge for duplicates": lambda s, unit: (
        s.v[unit].fill_(1).mul(s.x[unit].zero_()) + s.epsilon[unit].zero_()
    ),
    "negative ridge": lambda s, unit: s.epsilon[unit].fill_(-1),
    "NaN weight": lambda s, unit: s.v[unit, 5].fill_(nan),
    "NaN ridge": lambda s, unit: s.epsilon[unit].fill_(nan),
}


@by_each_route
@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_irregular_units_are_named_and_leave_the_others_alone(route, spoil):
    s, spoiled = system(33, 13, 3), torch.tensor([0, 5, 17, 32])
    before = route(*s)
    for unit in spoiled:
        spoil(s, unit)
    found, kept = route(*s), torch.ones(33, dtype=torch.bool)
    kept[spoiled] = False
    assert torch.equal(found.regular, kept)
    assert torch.equal(found.Y[kept], before.Y[kept])
    assert found.Y[~kept].isnan().all()


def test_both_routes_draw_the_line_of_singular_at_the_same_pivot():
    K = torch.ones(1, 2, 2, dtype=torch.float64)
    epsilon = torch.tensor([2.0**-44, 2.0**-46, 2.0**-48], dtype=torch.float64)
    one, none = torch.ones(3, 2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    s = System(K, one, epsilon, normal(Generator(), 3, 1, 2), none, none)
    assert by_torch(solve_grams)(*s).regular.tolist() == [True, True, False]
    assert solve_grams(*s).regular.tolist() == [True, True, False]


@by_each_route
@pytest.mark.parametrize("off", [0.0, 2.0**-52, 2.0**-50])
def test_what_is_subtracted_leaves_nothing_but_rounding(route, off):
    K, one = torch.tensor([[[4.0, 0.0], [0.0, 1.0]]]).double(), torch.ones(1, 2).double()
    x = torch.tensor([[2 * (1 - off), 0.0]], dtype=torch.float64)  # whose square is K's first entry
    rhs, none = one.unsqueeze(1), torch.zeros_like(one)
    assert not route(K, one, none[:, 0], rhs, x, none).regular
    assert route(K, one, none[:, 0] + 1e-6, rhs, x, none).regular


@by_each_route
def test_a_pivot_must_be_more_than_the_noise_of_its_entry(route):
    s = system(9, 13, 2, ridge=1e-3)
    pivots = torch.stack([torch.linalg.cholesky(matrix(s, i)).diagonal() ** 2 for i in range(9)])
    below, above = s._replace(noise=0.99 * pivots), s._replace(noise=0.99 * pivots)
    above.noise[[2, 5], [0, 12]] = 1.01 * pivots[[2, 5], [0, 12]]
    assert route(*below).regular.all()
    assert (~route(*above).regular).nonzero().flatten().tolist() == [2, 5]


@pytest.mark.parametrize("pool", ["torch's", "python's"])
def test_threads_change_no_bit(two_threads, monkeypatch, pool):
    s = system(33, 65, 3)
    if pool == "python's":
        monkeypatch.setattr(native, "_torch_threads", lambda: None)
    together = solve_grams(*s)
    torch.set_num_threads(1)
    assert torch.equal(together.Y, solve_grams(*s).Y)


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_process_solves_on(two_threads):
    s = system(33, 65, 3)
    expected = solve_grams(*s).Y  # from now on a fork would wait for torch's threads without end
    assert succeeded(forked(lambda: torch.equal(solve_grams(*s).Y, expected)))


def test_one_gram_matrix_may_come_without_its_group():
    s = system(9, 13, 2)
    assert torch.equal(solve_grams(s.K[0], *s[1:]).Y, solve_grams(*s).Y)


def test_units_must_share_gram_matrices_evenly():
    s = system(9, 13, 2, groups=3)
    with pytest.raises(ValueError, match="8 units cannot share 3 Gram matrices evenly"):
        solve_grams(s.K, *(x[:8] for x in s[1:]))


@by_each_route
def test_memory_beside_the_system_is_left_alone(route):
    s = system(9, 13, 3)
    beside = [torch.cat([x.flatten(), torch.full((99,), nan)]) for x in s]
    inside = [x[: y.numel()].view(y.shape) for x, y in zip(beside, s, strict=True)]
    assert torch.equal(route(*inside).Y, route(*s).Y)


def test_torch_takes_units_in_parts_that_fit():
    s = system(9, 13, 2)
    whole = by_torch(solve_grams)(*s)
    with within(24 * 13**2 * 4):
        parts = by_torch(solve_grams)(*s).Y
    assert torch.allclose(parts, whole.Y, rtol=1e-12)


def test_what_is_not_plain_doubles_in_memory_goes_by_torch(monkeypatch):
    monkeypatch.setattr(gram, "_by_kernel", None)
    s = system(9, 13, 2)
    single = solve_grams(*(x.float() for x in s))
    assert single.Y.dtype == torch.float64
    v = s.v.clone().requires_grad_()
    (grad,) = torch.autograd.grad(solve_grams(s.K, v, s.epsilon, s.rhs).Y.sum(), v)
    assert grad.isfinite().all()


def test_the_environment_can_switch_the_kernel_off(monkeypatch):
    monkeypatch.setenv("UNITFISHER_NATIVE", "0")
    s = system(9, 13, 2)
    assert not native.compiled()
    assert torch.equal(solve_grams(*s).Y, gram._by_torch(s).Y)


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler", " "])
def test_a_compiler_that_fails_is_done_without(cache, monkeypatch, compiler):
    monkeypatch.setenv("CC", compiler)
    assert not native.compiled()
    assert_solves(solve_grams(*system(9, 13, 2)), system(9, 13, 2), rtol=1e-11)


def test_no_compiler_is_needed(cache, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(cache))
    assert not native.compiled()
    assert_solves(solve_grams(*system(9, 13, 2)), system(9, 13, 2), rtol=1e-11)


@needs_compiler
def test_a_compiler_is_made_use_of():
    assert native.compiled()


@needs_compiler
def test_the_kernel_is_compiled_once_and_kept(cache):
    assert native.compiled()
    (kept,) = (cache / "unitfisher").iterdir()
    before = kept.stat().st_mtime_ns
    native._library.cache_clear()
    assert native.compiled()
    assert kept.stat().st_mtime_ns == before


@needs_compiler
@pytest.mark.parametrize("spoil", ["not a folder", "not a library"])
def test_a_cache_that_cannot_be_used_is_done_without(cache, spoil):
    if spoil == "not a folder":
        cache.write_text("")
    else:
        assert native.compiled()
        (kept,) = (cache / "unitfisher").iterdir()
        kept.unlink()  # or what this process has loaded would lose its file
        kept.write_text("")
        native._library.cache_clear()
    assert native.compiled()
    assert_solves(solve_grams(*system(9, 13, 2)), system(9, 13, 2), rtol=1e-11)


@needs_compiler
@pytest.mark.filterwarnings("ignore:.*fork")
def test_two_processes_may_compile_at_the_same_time(cache):
    children = [forked(native.compiled) for _ in range(2)]
    assert all(map(succeeded, children))
    assert len(list((cache / "unitfisher").iterdir())) == 1
