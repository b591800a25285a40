"""What the ways of solving a layer's systems cost: seconds, and bytes held at one time.

"rows" solves by Cholesky on the cases' side, "sums" by Cholesky from second moments, "products"
by conjugate gradients, of which each iteration multiplies with the cases. Which one is taken
follows from sizes alone: it is the same in every run, however busy the machine. "passes" are
conjugate gradients over a loader whose cases are not kept, where "sums" do not fit.
"""

from math import log
from typing import NamedTuple

import torch

from unitfisher.memory import workspace
from unitfisher.native import compiled

ROUTES = ("rows", "sums", "products")
DAMPED = 1e-6  # relative damping with which rows may be more than inputs, and sums of fewer cases
HEAVY = 5.0  # times more cases than inputs it takes for iterations to converge at all


class Rates(NamedTuple):
    """What a machine does in a second, and what it takes to ask for it."""

    single: float  # FLOP of matrix products
    double: float
    cubic: float  # FLOP of the factor of a small matrix, n³ / 3
    square: float  # of its n² entries, for all that is not the factor
    moved: float  # bytes read or written, one by one
    call: float  # seconds of an operation that has nothing to do


RATES = {  # by analysis/calibrate.py, one core of an AMD EPYC, torch 2.15.0; cuda: not measured
    "compiled": Rates(7e10, 3.2e10, 4.4e10, 1.6e9, 1.7e10, 4.2e-6),
    "torch": Rates(7e10, 3.2e10, 1.9e10, 4.1e7, 1.7e10, 4.2e-6),
    "cuda": Rates(5e13, 5e13, 5e11, 2e10, 4e12, 1e-5),
}


def engine(device: torch.device) -> str:
    """Which rates are those of a device."""
    if device.type != "cpu":
        return "cuda"
    return "compiled" if compiled() else "torch"


class Sizes(NamedTuple):
    """Of one layer's systems."""

    rows: int  # cases; in joint sharing samples times columns
    inputs: int
    units: int
    groups: int = 1  # sets of inputs that are seen by consecutive units
    joined: int = 0  # positions whose gradients are summed in joint sharing, all samples'
    itemsize: int = 4  # bytes of an activation
    engine: str = "compiled"

    @property
    def joint(self) -> bool:
        return self.joined > 0


def route_of(s: Sizes, solver: str = "auto", damping: float = 0.0) -> str:
    """Choose the fastest way to solve among those that are exact, and that fit if any does.

    Args:
        solver: "auto", "direct" or "iterative"; or a route, which is then taken.
        damping: The least that will be asked for.
    """
    if solver in ROUTES:
        return solver
    routes = admissible(s, damping)
    if solver == "iterative" and s.rows > s.inputs and not s.joint:
        return "products"
    if solver != "auto":
        routes = [route for route in routes if route != "products"]
    fitting = [route for route in routes if least(s, route) <= workspace()]
    if not fitting:
        return min(routes, key=lambda route: least(s, route))
    return min(fitting, key=lambda route: seconds(s, route))


def admissible(s: Sizes, damping: float) -> list[str]:
    """Which routes give the answer, whatever they cost."""
    few, damped = s.rows <= s.inputs, damping >= DAMPED
    allowed = {
        "rows": few or (damped and s.rows <= 2 * s.inputs),
        "sums": damped or not few,
        "products": (damped or not few) and not s.joint,
    }
    return [route for route in ROUTES if allowed[route]]


def seconds(s: Sizes, route: str) -> float:
    """Predict the time of s, k and the corrected mean of all units."""
    n, d, u, g, rates = s.rows, s.inputs, s.units, s.groups, RATES[s.engine]
    gemm = rates.single if s.itemsize == 4 else rates.double
    if route == "rows":
        grams = (u if s.joint else g) * 2 * n**2 * d
        return (
            (grams + 6 * u * n * d) / rates.double
            + u * (n**3 / 3 / rates.cubic + n**2 / rates.square)
            + 60 * rates.call
        )
    if route == "sums":
        triangle = 1.0 if d <= 256 else 0.5 + 64 / d
        return (
            2 * u * n * d**2 * triangle / (rates.double if s.joint else gemm)
            + 2 * s.itemsize * u * n * d / rates.moved
            + u * (d**3 / 3 / rates.cubic + d**2 / rates.square + 400 * d**2 / rates.moved)
            + 80 * rates.call
        )
    once = g * (4 * n * d**2 / gemm + 3 * d**3 / rates.double)
    each = 4 * u * n * d / gemm + 2 * u * d**2 / rates.double
    each += u * (3 * s.itemsize * n + 100 * d) / rates.moved + 20 * rates.call
    return once + iterations(s) * each + 80 * rates.call


def iterations(s: Sizes) -> float:
    """How many conjugate gradients take where the weights of cases are heavy-tailed.

    Whitened by the mean over units, a random second moment has its spectrum within (1 ± r)²,
    r² = inputs / cases (Marčenko and Pastur), where an iteration leaves r of the error. Heavy
    weights make the cases count as fewer; close to r = 1 all of it is guesswork.
    """
    r = min(0.97, HEAVY * s.inputs / s.rows) ** 0.5
    return log(2e6 if s.itemsize == 4 else 2e11) / log(1 / r)


def layers_together(s: Sizes, route: str) -> int:
    """How many layers of this form are treated as the groups of one."""
    shared = bytes_of_group(s, route)
    return max(1, (workspace() + shared) // (s.units * bytes_of_unit(s, route) + shared))


def units_together(s: Sizes, route: str) -> int:
    """How many units are treated at one time; all, or as many as fit into the workspace."""
    own, others = bytes_of_unit(s, route), (s.groups - 1) * bytes_of_group(s, route)
    if others + s.units * own <= workspace():
        return s.units
    alone = bytes_of_group(s, route) if s.groups > 1 else 0  # parts give each unit its own copy
    return max(1, min(s.units, workspace() // (own + alone)))


def least(s: Sizes, route: str) -> int:
    """Bytes of workspace without which not even one unit can be treated."""
    alone = bytes_of_group(s, route) if s.groups > 1 else 0
    return bytes_of_unit(s, route) + alone


def bytes_of_unit(s: Sizes, route: str) -> int:
    """What is held for each of the units that are treated together."""
    n, d = s.rows, s.inputs
    gradients = 24 * n * d if s.joint else 0
    if route == "products":
        return 3 * s.itemsize * n + 128 * d
    if route == "sums":
        return gradients + 34 * d**2 + 64 * d
    return gradients + 64 * (n + d) + (24 * n**2 if s.joint else 0)


def bytes_of_group(s: Sizes, route: str) -> int:
    """What units of one group share: copies of the cases about their mean, products of these."""
    n, d, item = s.rows, s.inputs, s.itemsize
    kernel = 32 * torch.get_num_threads() * (d if route == "sums" else n) ** 2
    if s.joint:
        return 2 * item * s.joined * d + kernel
    if route == "rows":
        return (16 + item) * n * d + 8 * n**2 + kernel
    if route == "sums":
        return 4 * item * n * d + 16 * d**2 + kernel
    return 4 * item * n * d + 96 * d**2


def bytes_of_sums(s: Sizes) -> int:
    """What is kept of all units from batch to batch."""
    return 8 * s.units * s.inputs * (s.inputs + 3)


def bytes_of_passes(s: Sizes) -> int:
    """The same where systems are solved by passes over a loader, and what solving takes.

    Of two right-hand sides the vectors that conjugate gradients keep, of the sums E_q(a) in its
    forms, of a batch the whitened cases and how they weigh; of what units share, four matrices.
    """
    n, d, u = s.rows, s.inputs, s.units
    return 136 * u * d + 32 * u * n + s.groups * (2 * s.itemsize * n * d + 32 * d**2)
