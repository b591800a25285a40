"""The rows for GPUs, at reduced sizes, and what a large row reaches of the machine's rates."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from math import isfinite

import benchmark_apart as apart
import benchmark_cases as cases
import benchmark_measure as measuring
import benchmark_memory
import benchmark_reached as reaching
import pytest
import torch
from benchmark_results import Result
from benchmark_rows import ROWS, Row
from benchmark_timing import Effort
from benchmark_ways import measured_step
from torch import nn

from unitfisher.costs import Sizes
from unitfisher.experiments.convnets import pyramidal
from unitfisher.experiments.stacks import Conv, Maker

EFFORT = Effort(0.0, least=2, most=2)
ON_GPU = [row for row in ROWS if row.only == "gpu"]


def photographs() -> cases.Batch:
    chance = torch.Generator().manual_seed(0)
    model = pyramidal([(Conv(4, 6),), (Conv(5, 3), Conv(5, 3))], (6, 6), 20, Maker(chance))
    return model, torch.randn(3, 3, 24, 24, generator=chance), cases.labels(3, 20)


REDUCED = {
    "fc-4096": partial(cases.wide_layer, 12, 16),
    "conv-768-64": partial(cases.deep_convolution, 2, 4),
    "imagenet-15": photographs,
}


def reduced(row: Row) -> Row:
    return replace(row, case=row.case._replace(make=REDUCED[row.case.name]))


def measured_apart(row: Row, device: str) -> Result:
    if row.kind == "alone":
        return apart.alone(reduced(row), device, EFFORT)
    return apart.peak(reduced(row), device)


@pytest.fixture
def small_rates(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(reaching, "EDGE", 64)
    reaching.machine_rates.cache_clear()
    yield
    reaching.machine_rates.cache_clear()


every_row = pytest.mark.parametrize(
    "row", [row for row in ON_GPU if row.kind == "alone"], ids=lambda row: row.key
)


@every_row
@pytest.mark.usefixtures("small_rates", "as_users_run_it")
def test_rows_for_gpus_run_at_reduced_sizes(row: Row) -> None:
    check(measured_apart(row, "cpu"))


@every_row
@pytest.mark.gpu
@pytest.mark.usefixtures("small_rates", "as_users_run_it")
def test_rows_for_gpus_run_on_a_gpu(row: Row, device: torch.device) -> None:
    check(measured_apart(row, str(device)))


def check(found: Result) -> None:
    assert found.value > 1.0
    assert all(isfinite(share) for share in found.reached.values())
    assert found.reached["products"] > 0 < found.reached["bandwidth"]
    assert found.reached["plain_step"] == pytest.approx(1 / found.value)
    assert "GFLOP/s" in found.note


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("row", ON_GPU, ids=lambda row: row.key)
def test_rows_for_gpus_give_what_their_title_says(row: Row) -> None:
    small = reduced(row)
    with ExitStack() as after:
        run = small.prepare(small.case.on("cpu", after))
        found, options = run(), run.monitor.options
    assert len(found) == (6 if row.case.name == "imagenet-15" else 1)  # of all layers, or the first
    field = "dw" if "natural gradients" in row.title else "k"
    assert all(hasattr(each, field) for each in found.values())
    assert options.fisher == "rademacher"
    assert options.rows == (512 if "512 positions" in row.title else None)
    assert options.sharing == ("joint" if "joint" in row.title else "expand")


def test_rows_in_a_process_of_their_own_measure_those_for_gpus() -> None:
    assert {measuring.OTHERWISE[row.kind] for row in ON_GPU} == {measuring.apart}


def wide(at: cases.Setting, size: int) -> cases.Run:
    return lambda: (at.model, torch.ones(size).sum())


@pytest.mark.skipif(not benchmark_memory.CLEAR.exists(), reason="peaks are Linux's here")
def test_a_peak_is_counted_in_peaks_of_the_plain_step() -> None:
    def make() -> cases.Batch:
        return nn.Linear(4096, 2048), torch.zeros(1, 1), torch.zeros(1)

    case = cases.Case("tiny", "", make, partial(wide, size=3 * 2**23))
    row = Row(case, "row", "row", partial(wide, size=7 * 2**23), 2, kind="step")
    found = apart.peak(row, "cpu")
    assert found.value == pytest.approx((1 + 7) / (1 + 3), rel=0.05)  # the network is in both
    assert (found.verdict, found.unit) == ("met" if found.value <= 2 else "missed", "× step's")


@pytest.mark.slow
def test_the_network_for_photographs_is_the_papers() -> None:
    model, x, y = cases.photographs_net(1, 32)
    assert sum(len(p) for p in model.parameters() if p.dim() > 1) == 17_736
    assert model(x).shape == (1, 1000)
    assert len(y) == 1


def test_operations_of_solving_are_the_cost_models() -> None:
    n, d, u = 64, 128, 32
    rows = reaching.of_solving(Sizes(n, d, u), "rows")
    assert rows == pytest.approx(2 * n**2 * d + 6 * u * n * d + u * n**3 / 3)
    joint = reaching.of_solving(Sizes(n, d, u, joined=10 * n), "rows")
    assert joint == pytest.approx(rows + (u - 1) * 2 * n**2 * d + 2 * u * d * 10 * n)


def test_a_factor_that_iterations_replace_is_not_counted() -> None:
    n, d, u = 1024, 2048, 32
    assert reaching.of_solving(Sizes(n, d, u), "rows") == 2 * n**2 * d + 6 * u * n * d
    few = reaching.of_solving(Sizes(n, d, 31), "rows")
    assert few == pytest.approx(2 * n**2 * d + 31 * (6 * n * d + n**3 / 3))


def test_operations_needed_are_the_steps_and_the_systems() -> None:
    n, d = 12, 16
    case = cases.Case("tiny", "", REDUCED["fc-4096"], cases.plain_step)
    with ExitStack() as after:
        run = measured_step(case.on("cpu", after), layers=["0"], fisher="rademacher")
        found = reaching.needed(run)
        (plan,) = run.monitor.plan.layers
        moved = reaching.bytes_needed(run)
        held = run.monitor.plan.held
    step = 3 * 2 * n * d * (d + 10)
    probe = 2 * n * d * 10  # through the readout; there is nothing to observe before the layer
    assert found == step + probe + reaching.of_solving(plan.sizes, plan.route)
    assert moved == 3 * 4 * (d * (d + 1) + 10 * (d + 1)) + held


def test_what_is_reached_is_operations_over_time_over_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reaching, "needed", lambda run: 3e9)
    monkeypatch.setattr(reaching, "bytes_needed", lambda run: 2e8)
    monkeypatch.setattr(reaching, "share_of_solving", lambda run: 0.2)
    monkeypatch.setattr(reaching, "machine_rates", lambda device: reaching.Machine(1e11, 1e10))
    case = cases.Case("tiny", "", REDUCED["fc-4096"], cases.plain_step)
    row = Row(case, "row", "row", partial(measured_step, layers=["0"]), kind="alone")
    timed = Result("tiny/row", "row", "", None, None, "", "", ms=50.0, plain_ms=20.0)
    found = reaching.reached(row, timed, "cpu")
    assert found.reached == pytest.approx(
        {
            "products": 0.6,
            "bandwidth": 0.4,
            "plain_step": 0.4,
            "solving": 0.2,
            "observing": 0.4,
            "flop_per_second": 1e11,
            "bytes_per_second": 1e10,
        }
    )
    assert found.note == (
        "60% of 100 GFLOP/s, 40% of 10 GB/s; plain step 40% of the time, solving 20%, the rest 40%"
    )


def test_the_share_of_solving_is_of_the_whole_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 3.0, 4.0, 10.0, 13.0, 14.0])
    monkeypatch.setattr(reaching, "device_clock", lambda: next(now))
    case = cases.Case("tiny", "", REDUCED["fc-4096"], cases.plain_step)
    with ExitStack() as after:
        run = measured_step(case.on("cpu", after), layers=["0"])
        assert reaching.share_of_solving(run) == 0.25


def test_rates_of_the_machine_are_of_the_product_and_the_copy(
    monkeypatch: pytest.MonkeyPatch, small_rates: None
) -> None:
    monkeypatch.setattr(reaching, "medians", lambda runs, effort: {"product": 2.0, "copy": 4.0})
    assert reaching.machine_rates("cpu") == (2 * 64**3 / 2, 2 * 4 * 64**2 / 4)
