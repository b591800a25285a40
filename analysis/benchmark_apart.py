"""Rows that need a process of their own: peaks of memory, and rows that may need too much of it.

    python analysis/benchmark_apart.py ROW DEVICE THREADS EFFORT

prints one result as JSON. The process gets no more than CEILING bytes, so that a measurement that
does not fit fails instead of taking the machine down.
"""

import json
import sys
from contextlib import ExitStack
from dataclasses import asdict, replace

import torch
from benchmark_measure import take_turns
from benchmark_memory import limit_memory, taken
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
    if row.kind == "alone":
        (found,) = take_turns([row], device, replace(Effort(**json.loads(effort)), least=2))
    else:
        found = peak(row, device)
    print(json.dumps(asdict(found)))


def peak(row: Row, device: str) -> Result:
    """Measure how much memory a call needs at its peak, after a first call."""
    with ExitStack() as after:
        row.case.plain(row.case.on(device, after))()
        held, result = taken(row.prepare(row.case.on(device, after)))
    if row.kind == "GiB":
        return counted(row, held / 2**30)
    size = sum(t.nbytes for t in tree_leaves(result) if isinstance(t, torch.Tensor))
    return counted(row, held / size, f"of {size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main(*sys.argv[1:])
