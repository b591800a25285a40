"""What fraction of the machine's rates a large row reaches, and where the rest of its time goes.

Multiplications: those of the step and of the column sent back are counted, those of solving are the
cost model's. Bytes: parameters three times, cases and results once. Both are the least needed, and
both are divided by the row's whole time.
"""

from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from math import inf
from statistics import median
from typing import NamedTuple

import torch
from benchmark_results import Result
from benchmark_rows import Row
from benchmark_timing import Effort, device_clock
from benchmark_ways import MeasuredStep
from calibrate import medians
from torch.utils.flop_counter import FlopCounterMode

from unitfisher.conjugate import MANY_CASES, MANY_UNITS
from unitfisher.costs import SECONDS, Rates, Sizes
from unitfisher.precision import exactly

EDGE = 4096  # of the matrices multiplied, and a quarter of them as many floats copied
ONE_EACH = Rates(1, 1, 1, inf, inf, 0)  # seconds are then multiplications and additions


class Machine(NamedTuple):
    """Rates of one large product in full float32, and of one large copy."""

    flop: float  # a second
    moved: float  # bytes read or written in a second


def reached(row: Row, found: Result, device: str) -> Result:
    """Add to a row's result what it reaches; nothing to one that is not a `MeasuredStep`."""
    with ExitStack() as after:
        run = row.prepare(row.case.on(device, after))
        if not isinstance(run, MeasuredStep) or found.ms is None or found.plain_ms is None:
            return found
        flop, moved, solving = needed(run), bytes_needed(run), share_of_solving(run)
    machine, seconds = machine_rates(device), found.ms / 1e3
    step = found.plain_ms / found.ms
    shares = {
        "products": flop / seconds / machine.flop,
        "bandwidth": moved / seconds / machine.moved,
        "plain_step": step,
        "solving": solving,
        "observing": 1 - step - solving,
    }
    rates = {"flop_per_second": machine.flop, "bytes_per_second": machine.moved}
    return replace(found, note=_note(machine, shares), reached=shares | rates)


def needed(run: MeasuredStep) -> float:
    """Count the multiplications and additions, after a first run, which plans the measurement."""
    run()
    with FlopCounterMode(display=False) as counter:
        run.observe()
    run.solve()
    layers = run.monitor.plan.layers
    return counter.get_total_flops() + sum(of_solving(x.sizes, x.route) for x in layers)


def of_solving(s: Sizes, route: str) -> float:
    """Count for one layer; of conjugate gradients in place of factors, not their iterations."""
    iterates = route == "rows" and s.rows >= MANY_CASES and s.units >= MANY_UNITS * s.groups
    rates = ONE_EACH._replace(cubic=inf) if iterates and not s.joint else ONE_EACH
    gradients = 2 * s.units * s.inputs * s.joined
    return gradients + SECONDS[route](s._replace(engine="torch"), rates)


def bytes_needed(run: MeasuredStep) -> int:
    parameters = sum(p.nbytes for p in run.at.model.parameters())
    return 3 * parameters + run.monitor.plan.held


def share_of_solving(run: MeasuredStep) -> float:
    shares = []
    for _ in range(2):
        start = device_clock()
        run.observe()
        between = device_clock()
        run.solve()
        end = device_clock()
        shares.append((end - between) / (end - start))
    return median(shares)


@cache
def machine_rates(device: str) -> Machine:
    x, y = torch.randn(2, EDGE, EDGE, device=device)
    result = torch.empty_like(x)
    runs = {"product": lambda: torch.mm(x, y, out=result), "copy": lambda: result.copy_(x)}
    with exactly(torch.device(device)):
        took = medians(runs, Effort(0.0, least=3))
    return Machine(2 * EDGE**3 / took["product"], 2 * x.nbytes / took["copy"])


def _note(machine: Machine, shares: dict[str, float]) -> str:
    part = {name: f"{share:.0%}" for name, share in shares.items()}
    return (
        f"{part['products']} of {machine.flop / 1e9:.3g} GFLOP/s, {part['bandwidth']} of "
        f"{machine.moved / 1e9:.3g} GB/s; plain step {part['plain_step']} of the time, solving "
        f"{part['solving']}, the rest {part['observing']}"
    )
