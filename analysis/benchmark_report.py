"""The benchmark's table, its figure and its record.

    python analysis/benchmark_report.py results/benchmark-cpu

writes table and figure again from the record, with what is now known to bound missed rows; nothing
is measured.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch
from benchmark_bounds import BOUNDS
from benchmark_peers import DISTRIBUTIONS
from benchmark_results import Result
from benchmark_scaling import Sizes
from matplotlib.ticker import LogLocator, ScalarFormatter

from unitfisher.experiments.markdown import markdown_table
from unitfisher.experiments.panels import finish, panels
from unitfisher.experiments.panels import write as write_figure
from unitfisher.native import compiled
from unitfisher.provenance import plain, provenance, version_of

HEADINGS = (
    "row",
    "on",
    "bar",
    "stretch",
    "measured",
    "quartiles",
    "ms",
    "of ms",
    "verdict",
    "note",
)
LINE: Final = {"markersize": 3.2, "linewidth": 1.1}
SIZES = {"n": "cases", "d": "inputs", "u": "units", "C": "classes", "P": "positions"}


def table(results: Sequence[Result]) -> str:
    """Lay the results out in Markdown."""
    return markdown_table(HEADINGS, map(_cells, results))


def save(results: Sequence[Result], folder: Path, config: Any, seconds: float) -> None:
    """Write benchmark.json, benchmark.md and scaling.png."""
    record = provenance(plain(replace(config, out=None))) | conditions(seconds)
    record["versions"] |= {name: version_of(name) for name in DISTRIBUTIONS}
    publish(results, folder, record)


def publish(results: Sequence[Result], folder: Path, record: Mapping[str, Any]) -> None:
    write(results, folder, record, sentence(record, results))
    draw([result for result in results if result.points], folder, machine(record))


def write(
    results: Sequence[Result], folder: Path, record: Mapping[str, Any], preamble: str
) -> None:
    """Write benchmark.json, and benchmark.md with its conditions as a preamble."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = json.dumps({**record, "rows": plain(results)}, indent=2, ensure_ascii=False)
    (folder / "benchmark.json").write_text(f"{whole}\n")
    (folder / "benchmark.md").write_text(f"{preamble}\n\n{table(results)}")


def conditions(seconds: float) -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "compiled_kernel": compiled(),
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "seconds": round(seconds, 1),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def sentence(record: Mapping[str, Any], results: Sequence[Result]) -> str:
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("torch", "unitfisher"))
    rounds = sum(result.rounds for result in results)
    discarded = sum(result.discarded for result in results)
    clock = "time on the cores" if record["config"]["clock"] == "cpu" else "wall clock"
    kernel = "with" if record["compiled_kernel"] else "without"
    return (
        f"{record['device']}; {versions}, {kernel} a compiled kernel; {record['finished']}, "
        f"{record['seconds']:.0f} s. Ratios are of medians ({clock}) to one plain forward + "
        f"backward pass of the same network and batch (random data) unless said, with quartiles "
        f"over rounds; {discarded} of {rounds} turns were disturbed and thrown away."
    )


def draw(grown: Sequence[Result], folder: Path, where: str) -> None:
    """Plot the time of one measurement over each size, measured and predicted."""
    if not grown:
        return
    figure, (axes,) = panels(1, len(grown), 1.5, sharey="all")
    for ax, result in zip(axes, grown, strict=True):
        sizes, size = [int(each) for each in result.points], result.title.split()[-1]
        found, expected = (list(x.values()) for x in (result.points, result.predicted_points))
        lines = ax.loglog(sizes, found, "o-", label="measured", **LINE)
        lines += ax.loglog(sizes, expected, "o--", label="predicted", markerfacecolor="w", **LINE)
        title = f"{result.value:.2f} ({result.predicted:.2f})"
        ax.set(xlabel=f"{SIZES[size]} {size}", title=title)
        ax.set_xticks(sizes, map(str, sizes))
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes[0].yaxis.set_major_formatter(ScalarFormatter())
    axes[0].set_ylabel("one measurement (ms)")
    fixed = ", ".join(f"{name} = {size}" for name, size in asdict(Sizes()).items())
    finish(
        figure,
        lines,
        f"above: slope of the least-squares line through log time over log size, measured "
        f"(predicted); {fixed} where not varied; medians, one thread; predicted: the cost model "
        f"at this run's rates, the passes, and a constant that a tiny layer gives; {where}",
    )
    write_figure(figure, folder / "scaling")


def machine(record: Mapping[str, Any]) -> str:
    return f"{record['device']}, torch {record['versions']['torch'].split('+')[0]}"


def _cells(result: Result) -> tuple[str, ...]:
    spread = "" if result.low is None else f"{short(result.low)}-{short(result.high)}"
    value = "" if result.value is None else f"{short(result.value)} {result.unit}"
    return (
        result.title,
        result.case,
        short(result.bar),
        short(result.stretch),
        value,
        spread,
        short(result.ms),
        short(result.plain_ms),
        result.verdict,
        noted(result),
    )


def noted(result: Result) -> str:
    """The note, and what bounds a row that misses its bar."""
    bound = result.bound if result.verdict == "missed" else ""
    return "; ".join(text for text in (result.note, bound) if text)


def short(number: float | None) -> str:
    """Write three significant digits, or all those before the point if there are more."""
    if number is None:
        return ""
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"


def again(folder: Path) -> None:
    """Write table, figure and bounds again from a record."""
    record = json.loads((folder / "benchmark.json").read_text())
    rows = [Result(**row) for row in record.pop("rows")]
    publish([replace(row, bound=BOUNDS.get(row.key, "")) for row in rows], folder, record)


if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]):
        again(folder)
