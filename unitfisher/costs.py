"""Costs of the routes for solving a layer's systems: seconds, and bytes held at one time.

"rows" is Cholesky of the Gram matrix of the cases, n × n; "sums" is Cholesky of second moments,
d × d; "products" are conjugate gradients, which multiply with the cases in each iteration;
"passes" are conjugate gradients that read a loader again in each iteration, where "sums" do not
fit. The choice depends on sizes alone: it is the same in every run, however busy the machine.
"""

from math import log
from typing import NamedTuple

import torch

from unitfisher.memory import workspace
from unitfisher.native import compiled

ROUTES = ("rows", "sums", "products")
DAMPED = 1e-6  # relative; from here "rows" may take more cases than inputs, and "sums" fewer
HEAVY = 5.0  # cases that count as one, since their weights are heavy-tailed
BEFORE = 15  # iterations before convergence is linear
REFINED = 384  # cases; factors of this size or larger are in single precision, in half the time
CALLS = {"rows": 250, "sums": 250, "products": 100}  # operations per layer, whatever its size
REUSED = 2**25  # bytes: larger blocks of memory come from the system, page by page


class Rates(NamedTuple):
    """What a machine does in a second, and the overhead of an operation."""

    single: float  # FLOP of matrix products
    double: float
    cubic: float  # FLOP of a small matrix's Cholesky factor, n³ / 3 of them
    square: float  # entries of that matrix, n² of them, in all work but factoring
    moved: float  # bytes read or written by elementwise operations
    call: float  # seconds that an operation takes on tiny tensors


RATES = {  # results/calibration-cpu: one core of an AMD EPYC, torch 2.15.0; cuda: not measured
    "compiled": Rates(7.9e10, 3.2e10, 3.7e10, 1.1e9, 1.4e10, 5.1e-6),
    "torch": Rates(6.9e10, 2.8e10, 6.1e9, 3.9e7, 3.5e9, 6.5e-6),
    "cuda": Rates(5e13, 5e13, 5e11, 2e10, 4e12, 1e-5),
}


def engine(device: torch.device) -> str:
    """Return the key of a device's rates in RATES."""
    if device.type != "cpu":
        return "cuda"
    return "compiled" if compiled() else "torch"


class Sizes(NamedTuple):
    """Sizes of one layer's systems."""

    rows: int  # cases; in joint sharing samples times columns
    inputs: int
    units: int
    groups: int = 1  # sets of consecutive units, each with its own inputs
    joined: int = 0  # positions of all samples, in joint sharing
    itemsize: int = 4  # bytes of an activation
    engine: str = "compiled"

    @property
    def joint(self) -> bool:
        return self.joined > 0


def route_of(
    s: Sizes, solver: str = "auto", damping: float = 0.0, *, smallest: bool = False
) -> str:
    """Choose the fastest exact route that fits into the workspace; if none fits, the smallest.

    Args:
        solver: "auto", "direct" or "iterative"; or a route, which is returned.
        damping: The least relative damping that will be asked for.
        smallest: Choose the route that takes least beside the workspace instead of the fastest.
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
    return min(fitting, key=lambda route: (bytes_of_group if smallest else seconds)(s, route))


def admissible(s: Sizes, damping: float) -> list[str]:
    """Return the routes that give the exact answer, whatever they cost."""
    few, damped = s.rows <= s.inputs, damping >= DAMPED
    allowed = {
        "rows": few or (damped and s.rows <= 2 * s.inputs),
        "sums": damped or not few,
        "products": (damped or not few) and not s.joint,
    }
    return [route for route in ROUTES if allowed[route]]


def seconds(s: Sizes, route: str) -> float:
    """Predict the seconds for s, k and the corrected mean of all units."""
    rates = RATES[s.engine]
    return CALLS[route] * rates.call + SECONDS[route](s, rates)


def _of_rows(s: Sizes, rates: Rates) -> float:
    n, d, u = s.rows, s.inputs, s.units
    grams = (u if s.joint else s.groups) * 2 * n**2 * d
    refined = n >= REFINED and s.engine == "compiled" and not s.joint
    factors = n**3 / 3 / rates.cubic / (1 + refined) + n**2 / rates.square
    return (grams + 6 * u * n * d) / rates.double + u * factors


def _of_sums(s: Sizes, rates: Rates) -> float:
    n, d, u, compiled = s.rows, s.inputs, s.units, s.engine == "compiled"
    tile = 24 if compiled else 64  # edge of the square blocks that make up a triangle
    triangle = 1.0 if d <= 256 and not compiled else 0.5 + tile / d
    passed = 400 if not compiled or 8 * u * d**2 > REUSED else 100  # bytes moved per entry
    return (
        2 * u * n * d**2 * triangle / (rates.double if s.joint else _gemm(s, rates))
        + 2 * s.itemsize * u * n * d / rates.moved
        + u * (d**3 / 3 / rates.cubic + d**2 / rates.square + passed * d**2 / rates.moved)
    )


def _of_products(s: Sizes, rates: Rates) -> float:
    n, d, u, gemm = s.rows, s.inputs, s.units, _gemm(s, rates)
    once = s.groups * (4 * n * d**2 / gemm + 3 * d**3 / rates.double)
    each = 4 * u * n * d / gemm + 2 * u * d**2 / rates.double
    each += u * (3 * s.itemsize * n + 100 * d) / rates.moved + 50 * rates.call
    return once + iterations(s) * each


SECONDS = {"rows": _of_rows, "sums": _of_sums, "products": _of_products}


def _gemm(s: Sizes, rates: Rates) -> float:
    return rates.single if s.itemsize == 4 else rates.double


def iterations(s: Sizes) -> float:
    """Estimate the iterations of conjugate gradients, for cases of heavy-tailed weights.

    Whitened by the mean over units, a random second moment has its spectrum within (1 ± r)²,
    r² = inputs / cases (Marčenko and Pastur), and an iteration multiplies the error by r. Heavy
    tails reduce the effective number of cases; close to r = 1 the estimate is a guess.
    """
    r = min(0.97, HEAVY * s.inputs / s.rows) ** 0.5
    return BEFORE + log(2e6 if s.itemsize == 4 else 2e11) / log(1 / r)


def layers_together(s: Sizes, route: str) -> int:
    """Return how many layers of these sizes to treat together, as the groups of one."""
    shared = bytes_of_group(s, route)
    # sums take four blocks of memory, each of which is to stay below REUSED
    room = min(workspace(), 2 * REUSED) if route == "sums" else workspace()
    return max(1, (room + shared) // (s.units * bytes_of_unit(s, route) + shared))


def units_together(s: Sizes, route: str) -> int:
    """Return how many units to treat at one time: all, or as many as fit into the workspace."""
    unit, others = bytes_of_unit(s, route), (s.groups - 1) * bytes_of_group(s, route)
    if others + s.units * unit <= workspace():
        return s.units
    alone = bytes_of_group(s, route) if s.groups > 1 else 0  # a unit in a part gets its own copy
    return max(1, min(s.units, workspace() // (unit + alone)))


def least(s: Sizes, route: str) -> int:
    """Return the bytes of workspace that a single unit needs."""
    alone = bytes_of_group(s, route) if s.groups > 1 else 0
    return bytes_of_unit(s, route) + alone


def bytes_of_unit(s: Sizes, route: str) -> int:
    """Return the bytes held for each unit that is treated at the same time."""
    n, d = s.rows, s.inputs
    gradients = 24 * n * d if s.joint else 0
    if route == "products":
        return 3 * s.itemsize * n + 128 * d
    if route == "sums":
        return gradients + 34 * d**2 + 64 * d
    return gradients + 64 * (n + d) + (24 * n**2 if s.joint else 0)


def bytes_of_group(s: Sizes, route: str) -> int:
    """Return the bytes that a group's units share: copies of the centred cases, their products."""
    n, d, item = s.rows, s.inputs, s.itemsize
    threads = torch.get_num_threads() if s.engine == "compiled" else 0
    kernel = 32 * threads * (d if route == "sums" else n) ** 2
    if s.joint:
        return 2 * item * s.joined * d + kernel
    if route == "rows":
        return (16 + item) * n * d + 8 * n**2 + kernel
    if route == "sums":
        return 4 * item * n * d + 16 * d**2 + kernel
    return 4 * item * n * d + 96 * d**2


def bytes_of_sums(s: Sizes) -> int:
    """Return the bytes of all units' sums, which are kept from batch to batch."""
    return 8 * s.units * s.inputs * (s.inputs + 3)


def bytes_of_passes(s: Sizes) -> int:
    """Return the bytes kept if systems are solved by passes over a loader, and those of solving.

    They hold the vectors of conjugate gradients for two right-hand sides, E_q(a) in its several
    forms, the whitened cases and weights of a batch, and four matrices for each group.
    """
    n, d, u = s.rows, s.inputs, s.units
    return 136 * u * d + 32 * u * n + s.groups * (2 * s.itemsize * n * d + 32 * d**2)
