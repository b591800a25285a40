"""Rows that need a process of their own: peaks of memory, and rows that may need too much of it.

    python analysis/benchmark_apart.py ROW DEVICE THREADS EFFORT

prints one result as JSON. The process gets no more than CEILING bytes, so that a measurement that
does not fit fails instead of taking the machine down.
"""

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial

import torch
from benchmark_cases import Run, Setting
from benchmark_measure import take_turns
from benchmark_memory import forget_peak, limit_memory, peak_now, taken
from benchmark_reached import reached
from benchmark_results import Result, counted
from benchmark_rows import ROWS, Row
from benchmark_timing import Effort
from torch.utils._pytree import tree_leaves

CEILING = 12 * 2**30


def main(key: str, device: str, threads: str, effort: str) -> None:
    torch.set_num_threads(int(threads))
    if device == "cpu":
        limit_memory(CEILING)
    row = next(row for row in ROWS if row.key == key)
    asked = Effort(**json.loads(effort))
    found = alone(row, device, asked) if row.kind == "alone" else peak(row, device)
    print(json.dumps(asdict(found)))


def alone(row: Row, device: str, effort: Effort) -> Result:
    """Time a row against the plain step, and say what it reaches of the machine's rates."""
    (found,) = take_turns([row], device, replace(effort, least=2))
    return reached(row, found, device)


def peak(row: Row, device: str) -> Result:
    """Measure how much memory a call needs at its peak, after a first call."""
    if row.kind == "step":
        return counted(row, in_steps(row, device))
    with ExitStack() as after:
        row.case.plain(row.case.on(device, after))()
        held, result = taken(row.prepare(row.case.on(device, after)))
    if row.kind == "GiB":
        return counted(row, held / 2**30)
    size = sum(t.nbytes for t in tree_leaves(result) if isinstance(t, torch.Tensor))
    return counted(row, held / size, f"of {size / 2**20:.0f} MiB")


def in_steps(row: Row, device: str) -> float:
    """Divide the peak by the plain step's; network, batch and gradients are part of both."""
    _, usual, measured = (  # the first call loads libraries
        whole_peak(partial(row.case.on, device), prepare)
        for prepare in (row.case.plain, row.case.plain, row.prepare)
    )
    return measured / usual


def whole_peak(make: Callable[[ExitStack], Setting], prepare: Callable[[Setting], Run]) -> int:
    """Return the bytes that all of it needs at its peak, once it was called."""
    forget_peak()
    before = peak_now()
    with ExitStack() as after:
        run = prepare(make(after))
        run()
        forget_peak()
        run()
        return peak_now() - before


if __name__ == "__main__":
    main(*sys.argv[1:])
