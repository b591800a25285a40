"""What the ways of solving a layer's systems cost: bytes held at one time.

"rows" solves by Cholesky on the cases' side, "sums" by Cholesky from second moments, "products"
by conjugate gradients, of which each iteration multiplies with the cases.
"""

from typing import NamedTuple

import torch

from unitfisher.memory import workspace

ROUTES = ("rows", "sums", "products")
MANY_CASES = 8  # times the inputs: then iterations converge soon
MANY_INPUTS = 256  # then some tens of iterations cost less than second moments


class Sizes(NamedTuple):
    """Of one layer's systems."""

    rows: int  # cases; in joint sharing samples times columns
    inputs: int
    units: int
    groups: int = 1  # sets of inputs that are seen by consecutive units
    joined: int = 0  # positions whose gradients are summed in joint sharing, all samples'
    itemsize: int = 4  # bytes of an activation
    compiled: bool = True  # is the kernel of `gram` in use?

    @property
    def joint(self) -> bool:
        return self.joined > 0


def route_of(s: Sizes, solver: str = "auto") -> str:
    """Choose how systems are solved; a solver may be one of the routes."""
    if solver in ROUTES:
        return solver
    if s.rows <= s.inputs:
        return "rows"
    if s.joint or solver == "direct":
        return "sums"
    pays = s.rows >= MANY_CASES * s.inputs and s.inputs >= MANY_INPUTS
    return "products" if pays or solver == "iterative" else "sums"


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
    return 4 * item * n * d + 64 * d**2
