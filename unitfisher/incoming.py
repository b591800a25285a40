"""What the units of a layer receive on average, in one pass over the activations."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unitfisher.solvers import dot

CACHED = 2**21  # bytes of activations: larger pieces leave the cache between two operations


class Incoming(NamedTuple):
    """E_p(a) and E_p‖a - E_p(a)‖², one for all units or, where groups see others, one a unit."""

    mean: Float[Tensor, "*g d"]
    trace_variance: Float[Tensor, "*g"]

    @classmethod
    def of(cls, a: Float[Tensor, "g m t d"], units: int) -> "Incoming":
        """Average over cases and positions, for so many units in all groups together."""
        groups, count = len(a), a.shape[1] * a.shape[2]
        first = a[:, :1, :1]  # about some case, or a large mean loses its digits
        total = squares = torch.zeros((), dtype=torch.float64, device=a.device)
        for piece in pieces(a):
            about = a[:, piece] - first
            total = total + about.sum(2).sum(1, dtype=torch.float64)
            squares = squares + about.square_().sum((1, 2, 3))
        shift = total / count
        spread = (squares / count - dot(shift, shift)).clamp_min(0.0)
        of_groups = first.double()[:, 0, 0] + shift, spread
        if groups == 1:
            return cls(*(x[0] for x in of_groups))
        return cls(*(x.repeat_interleave(units // groups, 0) for x in of_groups))

    def of_units(self, part: slice) -> "Incoming":
        return Incoming(*(x[part] for x in self))

    def by_group(self, groups: int) -> list["Incoming"]:
        """Part what is one for all units of a group."""
        first = self.of_units(slice(None, None, len(self.mean) // groups))
        return [Incoming(*own) for own in zip(*first, strict=True)]


def pieces(a: Float[Tensor, "g m t d"]) -> Iterator[slice]:
    """Part the cases so that on a CPU what is made of a piece stays in the cache."""
    count, case = a.shape[1], a[:, :1].nbytes
    piece = max(1, CACHED // case) if a.device.type == "cpu" else count
    return (slice(start, start + piece) for start in range(0, count, piece))
