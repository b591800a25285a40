"""The result of a row, and its verdict against the bar."""

from dataclasses import dataclass, field, replace
from typing import Literal

from benchmark_rows import Kind, Row
from benchmark_scaling import Growth
from benchmark_timing import Ratio

Names = tuple[str, str, str, float | None, float | None, str]  # the first fields of a `Result`
Verdict = Literal["stretch", "met", "missed", "disturbed", "failed", ""]
UNITS: dict[Kind, str] = {
    "turns": "× plain",
    "total": "× plain",
    "alone": "× plain",
    "contest": "× faster",
    "result": "× result",
    "step": "× step's",
    "GiB": "GiB",
    "scaling": "exponent",
}


@dataclass(frozen=True)
class Result:
    """A line of the table."""

    key: str
    title: str
    case: str
    bar: float | None
    stretch: float | None
    unit: str
    verdict: Verdict
    value: float | None = None
    low: float | None = None  # quartiles
    high: float | None = None
    ms: float | None = None
    plain_ms: float | None = None  # of the plain step, or of the rival
    rounds: int = 0
    discarded: int = 0
    note: str = ""
    bound: str = ""  # what bounds it, if it misses its bar
    points: dict[str, float] = field(default_factory=dict)  # ms by size
    predicted_points: dict[str, float] = field(default_factory=dict)
    predicted: float | None = None  # exponent
    reached: dict[str, float] = field(default_factory=dict)  # see benchmark_reached.py


def timed(row: Row, ratio: Ratio, note: str = "") -> Result:
    """A row whose value is a ratio of times."""
    return replace(compared(_names(row), ratio, judge(row, ratio.value), note), bound=row.bound)


def compared(names: Names, ratio: Ratio, verdict: Verdict, note: str = "") -> Result:
    """Make a result from a ratio; a disturbed one gets that as its verdict."""
    return Result(
        *names,
        verdict="disturbed" if ratio.disturbed else verdict,
        value=ratio.value,
        low=ratio.low,
        high=ratio.high,
        ms=ratio.ms,
        plain_ms=ratio.of_ms,
        rounds=ratio.rounds,
        discarded=ratio.discarded,
        note=note,
    )


def counted(row: Row, value: float, note: str = "") -> Result:
    """A row whose value is not a time."""
    verdict = judge(row, value)
    return Result(*_names(row), verdict=verdict, value=value, note=note, bound=row.bound)


def grown(row: Row, growth: Growth) -> Result:
    """A row whose value is an exponent."""
    sizes = list(map(str, growth.sizes))
    points = dict(zip(sizes, growth.ms, strict=True))
    predicted = dict(zip(sizes, growth.predicted_ms, strict=True))
    times = ", ".join(f"{s}: {points[s]:.3g} ms ({predicted[s]:.3g})" for s in sizes)
    return Result(
        *_names(row),
        verdict="",
        value=growth.measured,
        note=f"predicted {growth.predicted:.2f}; {times}",
        points=points,
        predicted_points=predicted,
        predicted=growth.predicted,
    )


def failed(row: Row, error: str) -> Result:
    return Result(*_names(row), verdict="failed", note=error, bound=row.bound)


def judge(row: Row, value: float) -> Verdict:
    """Say which bar is reached; more is better in a contest, less elsewhere."""
    more = row.kind == "contest"
    if row.stretch is not None and judged(value, row.stretch, more=more) == "met":
        return "stretch"
    return judged(value, row.bar, more=more)


def judged(value: float, bar: float | None, *, more: bool) -> Verdict:
    """Compare with a bar, if there is one."""
    if bar is None:
        return ""
    return "met" if value == bar or (value > bar) == more else "missed"


def _names(row: Row) -> Names:
    return row.key, row.title, row.case.title, row.bar, row.stretch, UNITS[row.kind]
