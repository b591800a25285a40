"""A budget of memory holds, by the profiler's count, or is refused before anything is allocated."""

import logging
import platform
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measured import peak
from torch import Tensor, nn

from unitfisher import MemoryBudgetError, Monitor
from unitfisher.memory import bytes_in, readable, within, workspace


def dense(d: int, u: int, classes: int = 10) -> nn.Sequential:
    inner = nn.Linear(d, u), nn.ELU(), nn.Linear(u, u), nn.ELU(), nn.Linear(u, u), nn.ELU()
    return nn.Sequential(*inner, nn.Linear(u, classes))


def convolutional(groups: int = 1) -> nn.Sequential:
    inner = nn.Conv2d(8, 24, 3, padding=1), nn.ELU(), nn.Conv2d(24, 24, 3, groups=groups), nn.ELU()
    return nn.Sequential(*inner, nn.Flatten(), nn.Linear(24 * 36, 10))


IMAGES = (16, 8, 8, 8)
SETTINGS = {
    "fewer-cases": (lambda: dense(700, 96), (64, 700), {}),
    "refined-factors": (lambda: dense(700, 96), (400, 700), {}),
    "more-cases": (lambda: dense(48, 64), (400, 48), {}),
    "many-classes": (lambda: dense(16, 16, 300), (64, 16), {}),
    "many-classes-signs": (lambda: dense(16, 16, 300), (64, 16), {"fisher": "rademacher"}),
    "convolution": (convolutional, IMAGES, {}),
    "iterations": (convolutional, IMAGES, {"solver": "iterative"}),
    "groups": (lambda: convolutional(8), IMAGES, {}),
    "joint": (convolutional, IMAGES, {"sharing": "joint"}),
    "window": (lambda: dense(60, 32), (64, 60), {"window": 3}),
    "drawn-rows": (convolutional, IMAGES, {"rows": 128}),
}
per_setting = pytest.mark.parametrize(("make", "size", "options"), SETTINGS.values(), ids=SETTINGS)


def bytes_used(model: nn.Module, x: Tensor, **options: object) -> tuple[int, Monitor]:
    """What a training pass, a measurement and natural gradients hold beside the pass.

    In a steady state: the ones before are held too.
    """
    _, of_pass = peak(lambda: model(x))
    monitor = Monitor(model, every=1, **options)
    for _ in range(options.get("window", 1)):
        model(x).sum().backward()
    runs = lambda: model(x), monitor.natural_gradient, lambda: monitor.measure(x)
    of_passes = of_pass, 0, of_pass
    held = []
    for run, beside in zip((*runs, runs[1]), (*of_passes, 0), strict=True):
        before = held_by(monitor)
        held.append(before + peak(run)[0] - beside)
    monitor.detach()
    return max(held), monitor


def least(model: nn.Module, x: Tensor, **options: object) -> int:
    """A twentieth more than the least that can be planned."""
    with Monitor(model, every=1, **options) as monitor:
        model(x)
    return monitor.plan.least * 21 // 20


def held_by(monitor: Monitor) -> int:
    usage = monitor.memory_usage()
    return usage["latest"] + usage["window"]


@pytest.mark.usefixtures("as_users_run_it")  # the type checker holds what functions are given
@per_setting
def test_what_a_measurement_holds_at_one_time_is_within_the_budget(make, size, options):
    torch.manual_seed(0)
    model, x = make(), torch.randn(size)
    used, monitor = bytes_used(model, x, memory=least(model, x, **options), **options)
    assert used <= monitor.plan.total <= monitor.plan.memory
    assert used > monitor.plan.memory // 4  # what is planned is not far from what is used


@pytest.mark.parametrize("name", ["more-cases", "joint"])
def test_the_same_takes_more_where_it_may(name):
    make, size, options = SETTINGS[name]
    model, x = make(), torch.randn(size)
    used, _ = bytes_used(model, x, **options)
    assert used > least(model, x, **options)


def test_a_loader_is_measured_within_the_budget():
    torch.manual_seed(0)
    model, x = dense(100, 64), torch.randn(300, 100)
    monitor = Monitor(model, memory="24 MiB")
    used, _ = peak(lambda: monitor.measure(list(x.split(100))))
    assert 2**22 < used <= 24 * 2**20
    assert max(of.parts for of in monitor.plan.layers) > 1


@pytest.mark.parametrize("loader", [False, True], ids=["batch", "loader"])
def test_what_cannot_hold_is_refused_before_anything_is_allocated(loader):
    model, x = dense(48, 64), torch.randn(4000, 48)
    _, of_pass = peak(lambda: model(x))
    monitor = Monitor(model, memory="8 MiB")
    with pytest.raises(MemoryBudgetError, match=r"8 MiB; most of it '\d'.*memory=") as told:
        monitor.measure([x] if loader else x)
    assert ("rows=" in str(told.value)) is not loader
    assert not monitor.latest

    def refused() -> None:
        with pytest.raises(MemoryBudgetError):
            monitor.measure([x] if loader else x)

    assert peak(refused)[0] < of_pass + 2**22  # half the budget: a look at the outputs


def test_a_batch_that_is_not_pooled_is_not_planned_as_a_window():
    torch.manual_seed(0)
    x = torch.randn(64, 60)
    with Monitor(dense(60, 32)) as monitor:
        monitor.measure(x)
    alone = monitor.plan
    with Monitor(dense(60, 32), window=20, memory=2 * alone.least) as pooling:
        pooling.measure(x)
    assert [of.sizes for of in pooling.plan.layers] == [of.sizes for of in alone.layers]
    assert pooling.plan.known


def test_nor_is_one_that_follows_a_training_pass_of_its_shape():
    model, x = dense(30, 32), torch.randn(20, 30)
    monitor = Monitor(model, window=5, every=1)
    model(x)
    for _ in range(2):
        monitor.measure(x)
        assert {of.sizes.rows for of in monitor.plan.layers} == {20}


def test_a_training_pass_after_a_loader_is_planned_as_before_it():
    model, x = dense(40, 32), torch.randn(30, 40)
    monitor = Monitor(model, every=1)
    plans = []
    for _ in range(2):
        model(x)
        plans.append(str(monitor.plan))
        monitor.measure([x])
        assert {of.route for of in monitor.plan.layers} == {"sums"}
    assert plans[0] == plans[1]
    assert "rows" in plans[0]


def test_results_that_cannot_hold_are_refused_at_attach():
    model = nn.Sequential(nn.Linear(400, 300), nn.ELU(), nn.Linear(300, 3))
    with pytest.raises(MemoryBudgetError, match=r"1 MiB; most of it '0' .*units="):
        Monitor(model, memory="1 MiB")
    Monitor(model, memory="1 MiB", units=8)  # nothing is left on the model


def test_a_budget_that_nobody_asked_for_refuses_nothing(monkeypatch):
    monkeypatch.setattr("unitfisher.options.DEFAULT", 2**20)
    monitor = Monitor(nn.Sequential(nn.Linear(300, 200), nn.ELU(), nn.Linear(200, 5)), every=1)
    monitor.model(torch.randn(400, 300))
    assert monitor.latest["0"].k.isfinite().all()
    assert monitor.plan.memory > 2**20


def test_a_tight_budget_changes_no_number():
    torch.manual_seed(0)
    model, x = dense(40, 64).double(), torch.randn(200, 40, dtype=torch.float64)
    with Monitor(model) as monitor:
        ample = monitor.measure(x)
    with Monitor(model, memory=monitor.plan.least) as tight:
        found = tight.measure(x)
    assert max(of.parts for of in tight.plan.layers) > 1
    for name, m in ample.items():
        torch.testing.assert_close(found[name].k, m.k, rtol=1e-9, atol=1e-9)


def test_the_plan_is_told_at_attach_and_at_the_first_measurement_only(caplog):
    model, x = dense(5, 4), torch.randn(9, 5)
    with caplog.at_level(logging.WARNING, "unitfisher"):
        monitor = Monitor(model, every=1, memory="1 GiB")
        assert "cases not known" in caplog.text
        for _ in range(3):
            model(x)
    assert [str(monitor.plan)] == [r.getMessage() for r in caplog.records[1:]]
    assert "rows" in str(monitor.plan)


def test_the_plan_is_silent_where_no_budget_was_asked_for(caplog):
    with caplog.at_level(logging.WARNING, "unitfisher"):
        Monitor(dense(5, 4), every=1).model(torch.randn(9, 5))
    assert not caplog.records


def test_the_plan_says_what_is_done_and_stands_in_the_record(tmp_path):
    model = convolutional()
    monitor = Monitor(model, every=1, record=tmp_path / "run")
    for n in (16, 16, 3):
        model(torch.randn(n, *IMAGES[1:]))
        for of in monitor.plan.layers:
            found = monitor.latest[of.layer]
            assert (of.sizes, of.route) == (found.cases.sizes, found.route)
    table = monitor.to_pandas("plan")
    assert table["step"].tolist() == [0, 0, 0, 2, 2, 2]
    assert table["cases"].tolist() == [16 * 64, 16 * 36, 16, 3 * 64, 3 * 36, 3]
    routes = monitor.to_pandas().query("step == 2").groupby("layer")["route"].unique()
    assert dict(zip(table["layer"][3:], table["route"][3:], strict=True)) == {
        layer: route for layer, (route,) in routes.items()
    }


@pytest.mark.parametrize(
    ("written", "size"),
    [
        *(("2 GiB", 2**31), ("1.5gib", 3 * 2**29), ("500 MB", 5 * 10**8), ("1e", None)),
        *(("7", 7), ("7 B", 7), ("3k", 3000), (12, 12), ("-1 GiB", None), (True, None)),
        *((2e9, 2 * 10**9), (1.5, None), (float("inf"), None), (float("nan"), None)),
    ],
)
def test_a_budget_is_read_as_it_is_written(written, size):
    if size is None:
        with pytest.raises(ValueError, match="memory must be"):
            bytes_in(written)
    else:
        assert bytes_in(written) == size


@given(st.integers(1, 2**50))
def test_a_size_reads_as_it_was_written_up_to_rounding(size):
    assert bytes_in(readable(size)) == pytest.approx(size, rel=1e-2)


def test_the_workspace_is_given_back():
    before = workspace()
    with within(17), within(5):
        assert workspace() == 5
    assert workspace() == before


FAULTS = """
import resource
import torch
from torch import nn
from unitfisher import Monitor

torch.set_num_threads(1)
hidden = [nn.Linear(128, 128) for _ in range(7)]
model = nn.Sequential(nn.Linear(784, 128), *hidden, nn.Linear(128, 10))
monitor, x = Monitor(model, every=1), torch.randn(64, 784)

def faults():
    for _ in range(10):
        model(x).logsumexp(-1).mean().backward()
        monitor.natural_gradient()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

print((-faults() + faults()) // 10)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's way with freed memory")
def test_a_measurement_takes_the_memory_that_the_one_before_has_freed():
    """Or some thousand pages would be mapped and cleared each time; rows kept take 60."""
    found = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True)
    assert int(found.stdout) < 400
