"""How the time of one measurement grows with each size, fitted as a power law.

One layer of u units with d inputs under a readout of C classes, on n samples of P positions; one
size is varied at a time, in one thread. Beside it stands what the package's cost model predicts for
solving, by the planned route and at rates measured in this run, plus what it leaves out: the
passes, and a constant, which is what a measurement of sizes TINY takes beyond that sum.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from math import log
from statistics import linear_regression
from typing import NamedTuple

import torch
from benchmark_cases import Batch, Case, Run, Setting, fixed_seed, labels, plain_step
from benchmark_timing import Effort, threads_of
from calibrate import measured_rates, medians
from torch import Tensor, nn

from unitfisher.costs import CALLS, DAMPED, SECONDS, Rates, engine, route_of
from unitfisher.costs import Sizes as Systems

BYTES = 100  # moved for each number of a root, and each error: some ten operations in double


@dataclass(frozen=True)
class Sizes:
    """Sizes of one measurement: samples n, inputs d, units u, classes C, positions P."""

    n: int = 128
    d: int = 256
    u: int = 64
    C: int = 10
    P: int = 1

    def systems(self, device: str) -> Systems:
        """The layer's systems, as the cost model describes them."""
        return Systems(self.n * self.P, self.d, self.u, engine=engine(torch.device(device)))

    def route(self, device: str) -> str:
        """The route that a Monitor with its usual damping plans for these."""
        return route_of(self.systems(device), damping=DAMPED)

    def seconds(self, device: str, rates: Rates) -> float:
        """Predict the seconds of solving and of the passes, without the constant."""
        route = self.route(device)
        solving = CALLS[route] * rates.call + SECONDS[route](self.systems(device), rates)
        return solving + self.passes(rates)

    def passes(self, rates: Rates) -> float:
        """Predict the forward pass, and all columns on their way from the root to D."""
        columns, errors = self.C - 1, self.n * self.P * self.u
        flop = 2 * errors * self.d + 2 * columns * self.n * self.u * self.C
        return flop / rates.single + columns * BYTES * (self.n * self.C + errors) / rates.moved


TINY = Sizes(n=8, d=4, u=2, C=2)
VARIED = {
    "n": (64, 128, 256, 512),
    "d": (64, 128, 256, 512),
    "u": (32, 64, 128, 256),
    "C": (5, 10, 20, 40),
    "P": (1, 2, 4, 8),
}


class Growth(NamedTuple):
    """Times of one measurement at each size, measured and predicted."""

    sizes: Sequence[int]
    ms: Sequence[float]
    predicted_ms: Sequence[float]

    @property
    def measured(self) -> float:
        return slope(self.sizes, self.ms)

    @property
    def predicted(self) -> float:
        return slope(self.sizes, self.predicted_ms)


class MeanOverPositions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def growth(variable: str, prepare: Callable[[Setting], Run], device: str, effort: Effort) -> Growth:
    """Time the measurement at each size and at TINY, by turns, and predict it."""
    varied = VARIED[variable]
    shapes = [replace(Sizes(), **{variable: size}) for size in varied]
    with threads_of(1), ExitStack() as after:  # the cost model's rates are of one core
        runs = {str(s): prepare(case_of(s).on(device, after)) for s in (TINY, *shapes)}
        took, rates = medians(runs, effort), rates_of(device, effort.cpu)
        constant = took[str(TINY)] - TINY.seconds(device, rates)
        predicted = [constant + s.seconds(device, rates) for s in shapes]
    return Growth(varied, [1e3 * took[str(s)] for s in shapes], [1e3 * s for s in predicted])


@cache
def rates_of(device: str, cpu: bool) -> Rates:
    """Measure the machine's rates, as `calibrate` does; once in a run."""
    return measured_rates(Effort(1.0, least=3, cpu=cpu), device)


def case_of(sizes: Sizes) -> Case:
    return Case("scaling", "one layer", partial(network, sizes), plain_step)


def network(sizes: Sizes) -> Batch:
    """The layer that is measured, a mean over its positions, a readout."""
    with fixed_seed():
        layer, readout = nn.Linear(sizes.d, sizes.u), nn.Linear(sizes.u, sizes.C)
        model = nn.Sequential(layer, nn.ELU(), MeanOverPositions(), readout)
        return model, torch.randn(sizes.n, sizes.P, sizes.d), labels(sizes.n, sizes.C)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent of the power law through these points."""
    return linear_regression([log(v) for v in x], [log(v) for v in y]).slope


SCALING = case_of(Sizes())
