"""Every way of solving gives the reference's answer, and the model prefers the cheaper one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import quantities
from strategies import normal, seeded, seeds
from torch import Tensor, nn

import unitfisher.condensed
from unitfisher import Monitor, conjugate, refinement
from unitfisher.cases import UnitCases
from unitfisher.condensed import Condensed
from unitfisher.convergence import Convergence
from unitfisher.costs import (
    DAMPED,
    RATES,
    ROUTES,
    Sizes,
    admissible,
    bytes_of_group,
    iterations,
    route_of,
    seconds,
)
from unitfisher.memory import within
from unitfisher.observation import Gradient
from unitfisher.rows import UnitRows
from unitfisher.steps import unit_steps
from unitfisher.theory import Theory

D, U = 6, 4
COUNTS = {"far-fewer": 2, "as-many": D, "somewhat-more": 9, "many": 40, "far-more": 200}


ROWS = ("factored", "refined", "iterated")  # how the systems of route "rows" are solved


class Drawn(NamedTuple):
    cases: UnitCases
    damping: float
    route: str
    rows: str
    g: Tensor


@st.composite
def drawn(draw) -> Drawn:
    n, generator = draw(st.sampled_from(list(COUNTS.values()))), draw(seeds)
    spread = draw(st.sampled_from([0.0, 4.0]))  # a second moment of condition 1e8
    a = normal(generator, n, D) * 10 ** torch.linspace(0, -spread, D, dtype=torch.float64)
    a = a @ torch.linalg.qr(normal(generator, D, D)).Q + draw(st.sampled_from([0.0, 2.0]))
    if draw(st.booleans()):
        a[:, 1] = a[:, 0]  # given twice
    delta = normal(generator, 1, n, 1, U) ** 3
    if draw(st.booleans()):
        delta[..., 2] = 0.0  # dead
    damping = draw(st.sampled_from([DAMPED, 1e-4, 1e-2]))
    route = draw(st.sampled_from(admissible(Sizes(n, D, U), damping)))
    cases = UnitCases(a[None, :, None], delta, n)
    return Drawn(cases, damping, route, draw(st.sampled_from(ROWS)), normal(generator, U, D + 1))


@contextmanager
def rows_solved(how: str) -> Iterator[None]:
    """Solve systems of any size as large ones are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conjugate, "pays", lambda *_: how == "iterated")
        patch.setattr(refinement, "pays", lambda *_: how == "refined")
        yield


def fishers(cases: UnitCases, damping: float) -> np.ndarray:
    """Damped, from their definition."""
    a = np.concatenate([cases.a[0, :, 0].numpy(), np.ones((cases.rows, 1))], 1)
    F = np.einsum("nu,ni,nj->uij", cases.delta[0, :, 0].numpy() ** 2, a, a) / cases.samples
    weights = range(D)
    F[:, weights, weights] += damping * F[:, weights, weights].mean(1, keepdims=True)
    return F


@given(of=drawn())
def test_every_route_gives_what_the_dense_fisher_gives(of):
    held = Condensed(of.cases, of.route)
    ((_, m, damped),) = held.damped_parts(of.damping)
    with rows_solved(of.rows):
        found = Theory.of(m, damped, of.cases.dead)
        steps = unit_steps(damped, Gradient(of.g[:, :D], of.g[:, D]))
    assert held.route == of.route
    assert bool(Convergence.of(damped).converged.all())
    for unit, F in enumerate(fishers(of.cases, of.damping)):
        if of.cases.dead[unit]:
            assert found.s[unit].isnan()
            assert not steps.dw[unit].any()
            continue
        expected = quantities(F, of.cases.a[0, :, 0].mean(0))
        assert float(found.s[unit]) == pytest.approx(expected["s"], rel=1e-5)
        assert float(found.k[unit]) == pytest.approx(expected["k"], rel=1e-5, abs=1e-5)
        step = np.append(steps.dw[unit], steps.dw0[unit])
        solved = np.linalg.solve(F, of.g[unit].numpy())
        assert np.linalg.norm(step - solved) <= 1e-5 * np.linalg.norm(solved)


def test_without_damping_only_what_is_exact_is_admissible():
    assert admissible(Sizes(rows=5, inputs=6, units=1), 0.0) == ["rows"]
    assert admissible(Sizes(rows=7, inputs=6, units=1), 0.0) == ["sums", "products"]
    assert "products" not in admissible(Sizes(rows=7, inputs=6, units=1, joined=7), 1.0)
    assert "rows" not in admissible(Sizes(rows=13, inputs=6, units=1), 1.0)


CHOICES = {
    "few-cases": (Sizes(64, 784, 128), "rows"),
    "a-few-more-cases": (Sizes(192, 128, 128), "rows"),
    "small": (Sizes(120, 5, 4), "sums"),
    "some-more-cases": (Sizes(512, 128, 128), "sums"),
    "wide-convolution": (Sizes(12544, 576, 128), "products"),
    "joint": (Sizes(12544, 576, 128, joined=12544), "sums"),
}


@pytest.mark.parametrize(("sizes", "route"), CHOICES.values(), ids=CHOICES)
def test_the_fastest_route_is_chosen_and_the_solver_asked_for_is_obeyed(sizes, route):
    assert route_of(sizes, "auto", 1e-3) == route
    assert route_of(sizes, "direct", 1e-3) != "products"
    more = sizes.rows > sizes.inputs and not sizes.joint
    assert (route_of(sizes, "iterative", 1e-3) == "products") == more
    assert [route_of(sizes, given) for given in ROUTES] == list(ROUTES)


def test_what_does_not_fit_is_not_chosen():
    sizes = Sizes(4096, 1024, 256)
    assert route_of(sizes, "auto", 1e-3) == "sums"
    with within(30 * 1024**2):
        assert route_of(sizes, "auto", 1e-3) == "products"


TAKES = [(route, size) for route in ROUTES for size in ("rows", "inputs", "units", "groups")]
TAKES.remove(("sums", "groups"))  # sums are of units, whatever they share


@pytest.mark.parametrize(("route", "size"), TAKES)
def test_more_of_anything_takes_longer(route, size):
    sizes = Sizes(2048, 128, 64)
    more = sizes._replace(**{size: 2 * getattr(sizes, size)})
    assert seconds(more, route) > seconds(sizes, route)


def test_more_cases_of_the_same_inputs_take_fewer_iterations():
    few, many = iterations(Sizes(1024, 128, 1)), iterations(Sizes(8192, 128, 1))
    assert 1 < many < few


def test_less_damping_afterwards_is_solved_by_a_route_that_bears_it():
    model = nn.Sequential(nn.Linear(20, 6), nn.ELU(), nn.Linear(6, 3)).double()
    x = torch.randn(36, 20, dtype=torch.float64)
    with Monitor(model, "0") as monitor:
        damped = monitor.measure(x)["0"]
    with Monitor(model, "0", damping=0.0) as monitor:
        undamped = monitor.measure(x)["0"]
    assert (damped.route, undamped.route) == ("rows", "sums")
    torch.testing.assert_close(damped.damped(0.0).k, undamped.k, rtol=1e-6, atol=1e-6)


def test_all_parts_of_a_layer_go_the_way_that_is_told(monkeypatch):
    monkeypatch.setattr(unitfisher.condensed, "units_together", lambda *_: 3)
    monkeypatch.setattr(
        unitfisher.condensed, "route_of", lambda sizes, _: "rows" if sizes.units == U else "sums"
    )
    generator = seeded(0)
    held = Condensed(UnitCases(normal(generator, 1, 9, 1, D), normal(generator, 1, 9, 1, U), 9))
    assert [type(m) for _, m in held.parts()] == [UnitRows, UnitRows]
    assert held.route == "rows"


@pytest.mark.parametrize("route", ROUTES)
def test_only_kernels_need_memory_for_each_thread(route, monkeypatch):
    of_threads = []
    for threads in (1, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        of_threads.append([bytes_of_group(Sizes(300, 200, 9, engine=e), route) for e in RATES])
    grown = {e for e, few, many in zip(RATES, *of_threads, strict=True) if many > few}
    assert grown <= {"compiled"}
