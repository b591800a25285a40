"""Mean and variance of a layer's incoming activations, in one pass over them."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unitfisher.averages import Average, averages
from unitfisher.patches import Received, in_pieces


class Incoming(NamedTuple):
    """E_p(a) and E_p‖a - E_p(a)‖², one for all units, or one per unit if there are groups."""

    mean: Float[Tensor, "*g d"]
    trace_variance: Float[Tensor, "*g"]

    @classmethod
    def of(cls, received: Received, units: int) -> "Incoming":
        """Average over cases and positions; ``units`` counts those of all groups together."""
        mean, var = _averages(received)
        of_groups = mean, var.sum(-1)
        if len(mean) == 1:
            return cls(*(x[0] for x in of_groups))
        return cls(*(x.repeat_interleave(units // len(mean), 0) for x in of_groups))

    def of_units(self, part: slice) -> "Incoming":
        return Incoming(*(x[part] for x in self))

    def by_group(self, groups: int) -> list["Incoming"]:
        """Split by groups, in each of which all units have the same values."""
        first = self.of_units(slice(None, None, len(self.mean) // groups))
        return [Incoming(*values) for values in zip(*first, strict=True)]


def _averages(received: Received) -> Average:
    """Average; patches are unfolded piece by piece, so that each piece stays in the cache."""
    if isinstance(received, Tensor):
        return averages(received)
    found = [(a.shape[1], *averages(a)) for _, a in in_pieces(received)]
    counts, *of_pieces = zip(*found, strict=True)
    mean, var = map(torch.stack, of_pieces)
    share = mean.new_tensor(counts)[:, None, None] / sum(counts)
    whole = (share * mean).sum(0)
    return Average(whole, (share * (var + (mean - whole) ** 2)).sum(0))
