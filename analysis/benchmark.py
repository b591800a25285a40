"""What does it cost to observe every unit? Each row of the table has a bar to reach.

    python analysis/benchmark.py

times each way of observing against one plain forward + backward pass of the same network and
batch, by turns in one process, and says which bars are met. Feeds the table of the README.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from benchmark_measure import measure_all
from benchmark_report import save
from benchmark_results import Result
from benchmark_rows import ROWS, Row
from benchmark_timing import Effort
from interrupts import INTERRUPTED
from tqdm import tqdm

from unitfisher.experiments import scripts

GUIDE = """\
Times what it costs to observe a training step in many ways, and says which meet their bars.

  measured    × plain: ratio of medians to one plain forward + backward pass of the same network
              and batch, in the same run, by turns. × faster: how often it fits into the time of
              its fastest rival. × result, × step's, GiB: peak of memory. exponent: growth of time
              with a size
  quartiles   of the same ratio, round by round
  of ms       the plain step, or the rival
  verdict     stretch, met, missed; disturbed: other work on the machine leaves nothing to conclude;
              failed, with the error. Empty where there is no bar

Other libraries are measured where they are installed (benchmark_peers.py says how). Leave the
machine alone meanwhile: two threads that share a core with something else wait for each other.

  python analysis/benchmark.py --list
  python analysis/benchmark.py --rows 'mnist-64/*' '*/memory'
  python analysis/benchmark.py --device cuda

On a GPU the rows without compiled kernels are left out, and larger networks are added.
"""


class BadUseError(ValueError):
    """A pattern that names no row, or options that do not go together."""


@dataclass(frozen=True)
class Config:
    """Time what it costs to observe every unit."""

    rows: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATTERN ...")] = ()
    """Which rows, as shell patterns on their names; default: all that --list shows."""
    list: bool = False
    """Print the names of the device's rows and stop."""
    quick: bool = False
    """A few rounds each: to see that everything runs, not how fast."""
    device: str = "cpu"
    """Where to run, as torch names it: cpu, cuda, ..."""
    threads: int | None = None
    """CPU threads; default torch's own choice, one per core."""
    seconds: float = 12.0
    """How long a group of rows takes turns, once each was called twice."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: this process's own time on the cores. On a busy machine --threads 1 --clock cpu still
    gives ratios that mean something, of one thread."""
    patience: float = 0.0
    """How long to wait, before each group, for other work on the machine to end."""
    out: Path | None = None
    """Folder of table and JSON; default runs/benchmark-<device>."""

    def __post_init__(self) -> None:
        if self.clock == "cpu" and (self.threads != 1 or self.device != "cpu"):
            raise BadUseError("--clock cpu needs --threads 1 --device cpu: threads that wait count")

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / f"benchmark-{self.device}"

    @property
    def effort(self) -> Effort:
        if self.quick:
            return Effort(0.0, 2, 2, cpu=self.clock == "cpu")
        return Effort(self.seconds, patience=self.patience, cpu=self.clock == "cpu")


def main(config: Config) -> int:
    """Measure the rows chosen, print and save the table; return the exit code."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    rows = choose(ROWS, config.rows, config.device)
    if config.list:
        print("\n".join(f"{row.key:26} {row.title}, {row.case.title}" for row in rows))
        return 0
    results: list[Result] = []
    try:
        for so_far in measured(rows, config):
            results = so_far
    except KeyboardInterrupt:
        print("\nInterrupted: what was measured so far is kept.")
    if results:
        words = (config.folder / "benchmark.md").read_text()
        print(f"\n{words}\nWritten to {config.folder}")
    return 0 if all_there(rows, results) else INTERRUPTED


def measured(rows: Sequence[Row], config: Config) -> Iterator[list[Result]]:
    """Measure group by group, and save after each; yield all results so far, in order."""
    start, results = time.perf_counter(), list[Result]()
    keys = [row.key for row in rows]
    order = [each.key for row in rows for each in (row, *row.rivals)]
    with tqdm(total=len(rows), unit="row") as bar:
        for found in measure_all(rows, config.device, config.effort):
            results = sorted([*results, *found], key=lambda result: order.index(result.key))
            save(results, config.folder, config, time.perf_counter() - start)
            bar.update(sum(result.key in keys for result in found))
            yield results


def all_there(rows: Sequence[Row], results: Sequence[Result]) -> bool:
    return {row.key for row in rows} <= {result.key for result in results}


def choose(rows: Sequence[Row], patterns: Sequence[str], device: str = "cpu") -> list[Row]:
    """Return the rows that match any pattern; without patterns, those of the device.

    Raises:
        BadUseError: A pattern matches none.
    """
    if not patterns:
        here = "cpu" if torch.device(device).type == "cpu" else "gpu"
        return [row for row in rows if row.only in ("", here)]
    for pattern in patterns:
        if not any(fnmatchcase(row.key, pattern) for row in rows):
            near = get_close_matches(pattern, [row.key for row in rows], cutoff=0.4)
            hint = f"near names: {', '.join(near)}" if near else "--list shows the names"
            raise BadUseError(f"no row is called {pattern!r}; {hint}")
    return [row for row in rows if any(fnmatchcase(row.key, p) for p in patterns)]


if __name__ == "__main__":
    scripts.run(lambda: main(tyro.cli(Config, description=GUIDE)), Config)
