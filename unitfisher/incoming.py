"""What the units of a layer receive on average, in one pass over the activations."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from unitfisher.averages import averages


class Incoming(NamedTuple):
    """E_p(a) and E_p‖a - E_p(a)‖², one for all units or, where groups see others, one a unit."""

    mean: Float[Tensor, "*g d"]
    trace_variance: Float[Tensor, "*g"]

    @classmethod
    def of(cls, a: Float[Tensor, "g m t d"], units: int) -> "Incoming":
        """Average over cases and positions, for so many units in all groups together."""
        mean, var = averages(a)
        of_groups = mean, var.sum(-1)
        if len(a) == 1:
            return cls(*(x[0] for x in of_groups))
        return cls(*(x.repeat_interleave(units // len(a), 0) for x in of_groups))

    def of_units(self, part: slice) -> "Incoming":
        return Incoming(*(x[part] for x in self))

    def by_group(self, groups: int) -> list["Incoming"]:
        """Part what is one for all units of a group."""
        first = self.of_units(slice(None, None, len(self.mean) // groups))
        return [Incoming(*own) for own in zip(*first, strict=True)]
