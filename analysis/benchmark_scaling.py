"""How the time of one measurement grows with each size, fitted as a power law.

One layer of u units with d inputs under a readout of C classes, on n samples of P positions; one
size is varied at a time. The floor is the least number of operations known for the same thing.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from math import log
from statistics import linear_regression, median
from typing import NamedTuple

import torch
from benchmark_cases import Batch, Case, Run, Setting, fixed_seed, labels, plain_step
from benchmark_timing import Candidate, Effort, interleave
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """Sizes of one measurement: samples n, inputs d, units u, classes C, positions P."""

    n: int = 128
    d: int = 256
    u: int = 64
    C: int = 10
    P: int = 1

    def floor(self) -> float:
        """Count operations of the forward pass, exact backward columns and the cheaper solve."""
        rows = self.n * self.P
        layer = 2 * rows * self.d * self.u
        samples = rows**2 * self.d + self.u * (rows**3 / 3 + 2 * rows**2) + layer
        weights = rows * self.d**2 * self.u + self.u * self.d**3 / 3
        probes = (self.C - 1) * 2 * self.n * self.u * self.C
        return layer + probes + min(samples, weights)


VARIED = {
    "n": (64, 128, 256, 512),
    "d": (64, 128, 256, 512),
    "u": (32, 64, 128, 256),
    "C": (5, 10, 20, 40),
    "P": (1, 2, 4, 8),
}


class Growth(NamedTuple):
    """Times of one measurement at each size, and the exponents."""

    sizes: Sequence[int]
    ms: Sequence[float]
    measured: float
    floor: float


class MeanOverPositions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def growth(variable: str, prepare: Callable[[Setting], Run], device: str, effort: Effort) -> Growth:
    """Time the measurement at each size, by turns, and fit the exponent."""
    varied = VARIED[variable]
    shapes = [replace(Sizes(), **{variable: size}) for size in varied]
    with ExitStack() as after:
        runs = {str(s): prepare(case_of(s).on(device, after)) for s in shapes}
        times = interleave({name: Candidate.warmed(run) for name, run in runs.items()}, effort)
    seconds = [median(times[str(s)]) for s in shapes]
    floor = slope(varied, [s.floor() for s in shapes])
    return Growth(varied, [1e3 * s for s in seconds], slope(varied, seconds), floor)


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
