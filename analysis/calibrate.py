"""Measure the rates of unitfisher's cost model, and what choosing by it loses.

    python analysis/calibrate.py

prints the constants for ``unitfisher/costs.py`` and a table: over a grid of sizes, the time of
every route, the one predicted to be fastest, and how much longer it takes than the one that is.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import geometric_mean, median
from unittest.mock import patch

import numpy as np
import torch
import tyro
from benchmark_timing import Candidate, Effort, interleave

from unitfisher import costs
from unitfisher.cases import UnitCases
from unitfisher.condensed import Condensed
from unitfisher.costs import ROUTES, Rates, Sizes, admissible, iterations, seconds
from unitfisher.experiments import scripts
from unitfisher.gram import solve_grams
from unitfisher.precision import exactly
from unitfisher.provenance import device
from unitfisher.theory import Theory

Run = Callable[[], object]
GRID = (  # cases and inputs: first sizes at which rows are fastest, last those for iterations
    (64, 128), (96, 64), (192, 128), (320, 256), (512, 384), (512, 128), (2048, 64),
    (2048, 256), (4096, 576), (8192, 128), (8192, 288),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Rates of the machine, and the regret of the choices they lead to."""

    seconds: float = 1.0  # for each comparison
    damping: float = 1e-3
    rates: bool = True
    grid: bool = True


def main(config: Config) -> None:
    torch.set_num_threads(1)
    print(f"{device()}, torch {torch.__version__}, time of the processor")
    effort = Effort(config.seconds, least=3, cpu=True)  # cpu: other work does not count
    if config.rates:
        for engine in ("compiled", "torch"):
            with patch.dict(os.environ, UNITFISHER_NATIVE=str(int(engine == "compiled"))):
                costs.RATES[engine] = measured_rates(effort)
            numbers = ", ".join(f"{x:.2g}" for x in costs.RATES[engine])
            print(f'    "{engine}": Rates({numbers}),')
    if config.grid:
        for engine in ("compiled", "torch"):
            with patch.dict(os.environ, UNITFISHER_NATIVE=str(int(engine == "compiled"))):
                regrets(engine, config.damping, effort)


def measured_rates(effort: Effort, where: str = "cpu") -> Rates:
    """Time each kernel alone, at typical shapes."""
    x, y = torch.randn(2, 512, 512, device=where)
    big = torch.randn(2**22, device=where)
    runs: dict[str, Run] = {
        "single": partial(torch.mm, x, y),
        "double": partial(torch.mm, x.double(), y.double()),
        "moved": partial(torch.add, big, 1.0),
        "call": partial(torch.add, torch.zeros(1, device=where), 1.0),
    }
    with exactly(torch.device(where)):
        took = medians(runs, effort)
        cubic, square = factor_rates(effort, where)
    flop = 2 * 512**3
    return Rates(
        flop / took["single"],
        flop / took["double"],
        cubic,
        square,
        2 * big.nbytes / took["moved"],
        took["call"],
    )


def factor_rates(effort: Effort, where: str = "cpu") -> tuple[float, float]:
    """Fit u (n³ / 3 / cubic + n² / square) to systems of several sizes, by relative error."""
    sizes = {n: max(16, 2**21 // n**2) for n in (32, 64, 128, 256, 512)}
    took = medians({str(n): systems(n, u, where) for n, u in sizes.items()}, effort)
    design = np.array([[u * n**3 / 3, u * n**2] for n, u in sizes.items()])
    each = np.array([took[str(n)] for n in sizes])
    cubic, square = np.linalg.lstsq(design / each[:, None], np.ones(len(each)), rcond=None)[0]
    return 1 / max(cubic, 1e-15), 1 / max(square, 1e-15)


def systems(n: int, u: int, where: str) -> Run:
    a, v, rhs = (
        torch.randn(*shape, dtype=torch.float64, device=where)
        for shape in ((n, n), (u, n), (u, 2, n))
    )
    epsilon = torch.ones_like(v[:, 0])
    return partial(solve_grams, a @ a.mT / n, v, epsilon, rhs)


def regrets(engine: str, damping: float, effort: Effort) -> None:
    print(f"\n{engine}: milliseconds (predicted), * chosen")
    lost = []
    for (n, d), u in product(GRID, (16, 128)):
        s = Sizes(n, d, u, engine=engine)
        routes = [r for r in admissible(s, damping) if seconds(s, r) < 1.0]
        if len(routes) < 2:
            continue  # fewer than two routes are quick enough to time
        cases = heavy_cases(n, d, u)
        took = medians({r: solving(cases, r, damping) for r in routes}, effort)
        chosen = min(routes, key=partial(seconds, s))
        lost.append(took[chosen] / min(took.values()))
        print(f"n {n:5} d {d:4} u {u:4}  {shown(s, took, chosen)}  {lost[-1]:.2f}")
    print(f"chosen over fastest: mean {geometric_mean(lost):.2f}, most {max(lost):.2f}")


def shown(s: Sizes, took: Mapping[str, float], chosen: str) -> str:
    parts = [
        f"{r} {1e3 * took[r]:8.2f} ({1e3 * seconds(s, r):8.2f}){'*' if r == chosen else ' '}"
        if r in took
        else " " * 27
        for r in ROUTES
    ]
    return "  ".join([*parts, f"{iterations(s):4.0f} iterations expected"])


def heavy_cases(n: int, d: int, u: int) -> UnitCases:
    """Activations with a mean and unequal scales, errors as heavy-tailed as trained nets have."""
    chance = torch.Generator().manual_seed(0)
    a = torch.randn(1, n, 1, d, generator=chance) * torch.logspace(0, -1, d) + 0.5
    delta = torch.randn(1, n, 1, u, generator=chance, dtype=torch.float64) ** 2
    return UnitCases(a, delta, n)


def solving(cases: UnitCases, route: str, damping: float) -> Run:
    def run() -> object:
        fresh = Condensed(UnitCases(cases.a, cases.delta, cases.samples), route)
        with exactly(torch.device("cpu")):
            dead = fresh.cases.dead
            return [Theory.of(m, to, dead[part]) for part, m, to in fresh.damped_parts(damping)]

    return run


def medians(runs: Mapping[str, Run], effort: Effort) -> dict[str, float]:
    times = interleave({name: Candidate.warmed(run) for name, run in runs.items()}, effort)
    return {name: median(rounds) for name, rounds in times.items()}


if __name__ == "__main__":
    scripts.run(lambda: main(tyro.cli(Config)), Config)
