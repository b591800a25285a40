"""Which rows stand in the table where, what they call, and what bounds them."""

from collections.abc import Iterable
from contextlib import ExitStack

import benchmark
import benchmark_bounds as bounds
import benchmark_cases as cases
import benchmark_report as report
import benchmark_results as results
import pytest
from benchmark_measure import measure_all
from benchmark_rows import KERNELS, LARGE, ROWS, Row, both
from benchmark_timing import Effort, Ratio

from unitfisher import native


def keys(rows: Iterable[Row]) -> set[str]:
    return {row.key for row in rows}


def test_the_table_of_a_gpu_has_larger_networks_and_no_row_without_kernels() -> None:
    here, there = (keys(benchmark.choose(ROWS, (), device)) for device in ("cpu", "cuda:1"))
    assert here - there == {row.key for row in ROWS if row.key.endswith("-torch")}
    assert there - here == {
        "fc-4096/natural",
        "conv-768-64/natural-joint",
        *(f"imagenet-15/{name}" for name in ("measure", "natural", "natural-joint", "memory")),
    }


def test_a_row_asked_for_is_measured_anywhere() -> None:
    assert keys(benchmark.choose(ROWS, ["fc-4096/nat*"], "cpu")) == {"fc-4096/natural"}
    assert keys(benchmark.choose(ROWS, ["*/d-sign-torch"], "cuda")) == {
        "mnist-64/d-sign-torch",
        "conv-64/d-sign-torch",
    }


def test_bars_for_larger_networks_are_the_ones_agreed_on() -> None:
    bars = {row.key: row.bar for row in ROWS if row.only == "gpu"}
    assert bars.pop("fc-4096/natural") == 3.0
    assert bars.pop("conv-768-64/natural-joint") == 2.2
    assert bars == {
        "imagenet-15/measure": 20,
        "imagenet-15/natural": 60,
        "imagenet-15/natural-joint": 60,
        "imagenet-15/memory": 2,
    }


SMALL = [row for row in KERNELS if row.case in (cases.MNIST_64, cases.CONV_64, cases.FIFTY)]


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    "row", [row for row in SMALL if row.name != "natural-expand"], ids=lambda row: row.key
)
def test_kernels_run_in_the_row_and_not_in_the_one_beside_it(
    row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran, run = [], native.run
    monkeypatch.setattr(native, "run", lambda *given: ran.append(given) or run(*given))
    counts = []
    for each in both(row):
        ran.clear()
        with ExitStack() as after:
            each.prepare(each.case.on("cpu", after))()
            counts.append(len(ran))  # closing a Monitor solves what is left
    assert counts[0] > 0
    assert counts[1] == 0


@pytest.mark.parametrize("row", [*KERNELS, *LARGE], ids=lambda row: row.key)
def test_the_row_without_kernels_stands_beside_the_other(row: Row) -> None:
    at = ROWS.index(row)
    assert ROWS[at + 1].key == f"{row.key}-torch"
    assert ROWS[at + 1].bar is None
    assert (ROWS[at + 1].kind, row.kind) in {
        *((kind, kind) for kind in ("turns", "total", "alone")),
        ("turns", "contest"),
    }


@pytest.mark.parametrize("key", bounds.BOUNDS)
def test_what_bounds_a_row_is_short_and_belongs_to_a_row_with_a_bar(key: str) -> None:
    (row,) = benchmark.choose(ROWS, [key])
    assert row.bar is not None
    assert row.bound == bounds.BOUNDS[key]
    assert 0 < len(row.bound) < 90


RATIO = Ratio(2.0, 2.0, 2.0, 2.0, 1.0, 9, 0)


@pytest.mark.parametrize(("verdict", "noted"), [("missed", "said; two hooks"), ("met", "said")])
def test_a_missed_bar_shows_what_bounds_it(
    verdict: str, noted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bounds.BOUNDS, "tiny/row", "two hooks")
    row = Row(cases.Case("tiny", "", None, None), "row", "row", None, 1.5 + (verdict == "met"))
    found = results.timed(row, RATIO, "said")
    assert (found.verdict, found.bound) == (verdict, "two hooks")
    assert report.table([found]).rstrip().endswith(f"| {noted}{' ' * max(0, 4 - len(noted))} |")


def test_what_bounds_a_row_is_in_every_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bounds.BOUNDS, "mnist-64/hooks", "two hooks")
    (row,) = benchmark.choose(ROWS, ["mnist-64/hooks"])
    assert results.counted(row, 1.0).bound == results.failed(row, "no").bound == "two hooks"
    ((found,),) = measure_all([row], "cpu", Effort(0.0, least=2, most=2))
    assert (found.bound, found.rounds) == ("two hooks", 2)
