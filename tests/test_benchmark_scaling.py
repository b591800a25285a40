import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import benchmark
import benchmark_report as report
import benchmark_results as results
import benchmark_scaling as scaling
import pytest
from benchmark_rows import ROWS
from benchmark_scaling import Growth, Sizes, slope
from benchmark_timing import Effort

from unitfisher import Monitor, costs
from unitfisher.costs import Rates


def test_slope_is_the_exponent_of_a_power_law() -> None:
    assert slope([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2.0)


ALL_SIZES = [replace(Sizes(), **{v: size}) for v, sizes in scaling.VARIED.items() for size in sizes]


@pytest.mark.parametrize("sizes", ALL_SIZES, ids=str)
def test_the_predicted_route_is_the_one_planned(sizes: Sizes) -> None:
    with ExitStack() as after:
        at = scaling.case_of(sizes).on("cpu", after)
        monitor = after.enter_context(Monitor(at.model, ["0"]))
        monitor.measure(at.x)
        (plan,) = monitor.plan.layers
    assert (plan.sizes, plan.route) == (sizes.systems("cpu"), sizes.route("cpu"))


RATES = Rates(1e11, 5e10, 4e10, 1e9, 1e10, 5e-6)


def test_prediction_grows_with_every_size() -> None:
    base = Sizes().seconds("cpu", RATES)
    for variable, sizes in scaling.VARIED.items():
        larger = replace(Sizes(), **{variable: sizes[-1]})
        assert larger.seconds("cpu", RATES) > 1.05 * base, variable


def test_prediction_is_the_cost_models_and_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(costs.RATES, "compiled", RATES)
    s = replace(Sizes(), C=3, P=2)
    forward, back = 2 * 256 * 256 * 64 / 1e11, 2 * 2 * 128 * 64 * 3 / 1e11
    moved = 2 * scaling.BYTES * (128 * 3 + 256 * 64) / 1e10
    solving = costs.seconds(costs.Sizes(256, 256, 64, engine="compiled"), "rows")
    monkeypatch.setattr(scaling, "engine", lambda device: "compiled")
    assert s.seconds("cpu", RATES) == pytest.approx(solving + forward + back + moved)


def test_the_constant_is_what_a_tiny_measurement_takes_besides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scaling, "rates_of", lambda device, cpu: RATES)
    monkeypatch.setattr(scaling, "medians", lambda runs, effort: dict.fromkeys(runs, 7.0))
    grown = scaling.growth("d", lambda at: lambda: None, "cpu", Effort(0.0, least=2))
    tiny = scaling.TINY.seconds("cpu", RATES)
    expected = [7e3 + 1e3 * (Sizes(d=d).seconds("cpu", RATES) - tiny) for d in grown.sizes]
    assert grown.predicted_ms == pytest.approx(expected)
    assert grown.measured == pytest.approx(0.0)


def test_a_growths_row_states_both_exponents() -> None:
    (row,) = benchmark.choose(ROWS, ["scaling/n"])
    found = results.grown(row, Growth([64, 128], [1.0, 4.0], [2.0, 4.0]))
    assert (found.value, found.predicted) == pytest.approx((2.0, 1.0))
    assert found.note == "predicted 1.00; 64: 1 ms (2), 128: 4 ms (4)"
    assert (found.points, found.predicted_points) == (
        {"64": 1.0, "128": 4.0},
        {"64": 2.0, "128": 4.0},
    )


def test_the_figure_shows_measured_and_predicted_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(report, "write_figure", lambda figure, stem: drawn.append(figure))
    (row,) = benchmark.choose(ROWS, ["scaling/n"])
    report.draw([results.grown(row, Growth([64, 128], [1.0, 4.0], [2.0, 4.0]))], tmp_path, "here")
    (ax,) = drawn[0].axes
    assert [list(line.get_ydata()) for line in ax.get_lines()] == [[1.0, 4.0], [2.0, 4.0]]
    assert ax.get_title() == "2.00 (1.00)"
    assert [t.get_text() for t in drawn[0].legends[0].get_texts()] == ["measured", "predicted"]


def test_a_record_is_written_again_with_what_bounds_its_rows_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Path(report.__file__).parents[1] / "results" / "benchmark-cpu"
    for name in ("benchmark.json", "benchmark.md"):
        shutil.copy(recorded / name, tmp_path)
    report.again(tmp_path)
    for name in ("benchmark.json", "benchmark.md"):
        assert (tmp_path / name).read_text() == (recorded / name).read_text()
    monkeypatch.setattr(report, "BOUNDS", {"mnist-64/d-exact": "the weather"})
    report.again(tmp_path)
    assert (tmp_path / "benchmark.md").read_text().count("the weather") == 1
    assert (tmp_path / "scaling.png").exists()
