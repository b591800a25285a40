"""Fewer cases, drawn at random, stand for all of a measurement."""

import pytest
import torch
from networks import inputs
from reference import damped, joined
from torch import Tensor, nn
from torch.testing import assert_close

import unitfisher.condensed
from unitfisher import Monitor, UnitStatistics, bias_shift_correction
from unitfisher.cases import UnitCases
from unitfisher.condensed import Condensed
from unitfisher.fisher import materialised

TOL = {"rtol": 1e-9, "atol": 1e-12}
SHARINGS = ["expand", "joint"]


def dense() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = nn.Linear(5, 4), nn.ELU(), nn.Linear(4, 4), nn.ELU(), nn.Linear(4, 4), nn.Linear(4, 3)
    return nn.Sequential(*layers).double(), inputs(9, 5)


def convolutional() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    head = nn.Flatten(), nn.Linear(4 * 9, 3)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ELU(), *head)
    return model.double(), inputs(6, 2, 3, 3)


NETWORKS = {"dense": dense, "convolution-in-groups": convolutional}


def fishers(m: UnitStatistics) -> Tensor:
    return materialised(m.cases, biased=True)


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.usefixtures("as_users_run_it")
def test_the_fisher_of_one_case_drawn_is_right_on_average(make, sharing):
    model, x = make()
    whole = Monitor(model, sharing=sharing).measure(x)["0"]
    found: dict[bytes, Tensor] = {}
    for seed in range(500):
        drawn = whole.cases.drawn(1, torch.Generator().manual_seed(seed))
        F = materialised(drawn, biased=True)
        found[F.numpy().tobytes()] = F
    count = whole.cases.a.shape[1]
    assert len(found) == count  # every case was drawn
    assert_close(torch.stack(list(found.values())).mean(0), fishers(whole), **TOL)


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("rows", [4, 5])
def test_all_is_solved_from_the_rows_drawn(make, sharing, rows):
    model, x = make()
    monitor = Monitor(model, rows=rows, sharing=sharing, damping=1e-2)
    y = torch.zeros(len(x), dtype=torch.long)
    for m in monitor.measure(x, y).values():
        F, g = damped(fishers(m), 1e-2), joined(*m.gradient)
        step = m.natural_gradient(*m.gradient)
        assert_close(joined(*step), torch.linalg.solve(F, g), **TOL)
        assert_close(m.c, F[:, -1, -1], **TOL)
        assert_close(m.s, torch.linalg.inv(F)[:, -1, -1], **TOL)  # Theorem 1
        assert int((m.cases.D.sum(1) > 0).sum()) == min(rows, m.cases.a.shape[1])


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_means_stay_those_of_all_cases(make):
    model, x = make()
    whole = Monitor(model).measure(x)
    for name, m in Monitor(make()[0], rows=4).measure(x).items():
        assert_close(m.mean, whole[name].mean, **TOL)
        assert_close(m.mean_share, whole[name].mean_share, **TOL)
        assert_close(m.output_mean, whole[name].output_mean, **TOL)
        assert (m.n_eff <= 4 + 1e-9).all()


def test_as_many_rows_as_cases_are_all_of_them():
    model, x = dense()
    whole = Monitor(model).measure(x)
    for name, m in Monitor(dense()[0], rows=9).measure(x).items():
        assert_close(m.s, whole[name].s, **TOL)


@pytest.mark.parametrize("solver", ["rows", "sums", "products"])
def test_units_of_groups_may_be_taken_one_at_a_time(solver, monkeypatch):
    a, delta = inputs(2, 20, 1, 3), inputs(1, 20, 1, 6)
    held = Condensed(UnitCases(a, delta, 20).drawn(18, torch.Generator()), solver)
    ((_, _, together),) = held.damped_parts(1e-2)
    monkeypatch.setattr(unitfisher.condensed, "units_together", lambda *_: 1)
    apart = [bias_shift_correction(damped) for *_, damped in held.damped_parts(1e-2)]
    assert len(apart) == 6
    for found, expected in zip(
        zip(*apart, strict=True), bias_shift_correction(together), strict=True
    ):
        assert_close(torch.cat(found), expected, **TOL)


def test_the_seed_decides_which():
    _, x = dense()
    first, again, other = (Monitor(dense()[0], rows=3, seed=s).measure(x)["2"].s for s in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)


def test_training_passes_and_windows_draw_too():
    model, x = dense()
    monitor = Monitor(model, rows=4, every=1, window=3)
    for _ in range(3):
        model(x)
    assert all(m.cases.a.shape[1] == 4 for m in monitor.latest.values())
    assert len({id(m.block) for m in monitor.latest.values()}) < len(monitor.latest)


def test_a_loader_sums_over_all_cases():
    model, x = dense()
    whole = Monitor(model).measure([x[:5], x[5:]])
    for name, m in Monitor(dense()[0], rows=2).measure([x[:5], x[5:]]).items():
        assert_close(m.s, whole[name].s, **TOL)
