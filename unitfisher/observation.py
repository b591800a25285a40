"""The observation of one layer in one pass: cases, averages of outputs, gradient."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from unitfisher.cases import UnitCases
from unitfisher.outputs import UnitMeans
from unitfisher.precision import measurable


class NonFiniteError(FloatingPointError):
    """Activations, logits or errors hold NaN or infinity."""


class Gradient(NamedTuple):
    """A layer's gradient, averaged over samples."""

    g: Float[Tensor, "u *d"]
    g0: Float[Tensor, " u"] | None  # None for a layer without bias

    def measurable(self) -> "Gradient":
        return Gradient(measurable(self.g), None if self.g0 is None else measurable(self.g0))

    def times(self, factor: float) -> "Gradient":
        return Gradient(factor * self.g, None if self.g0 is None else factor * self.g0)

    def plus(self, other: "Gradient") -> "Gradient":
        g0 = None if self.g0 is None or other.g0 is None else self.g0 + other.g0
        return Gradient(self.g + other.g, g0)

    def of_units(self, part: slice) -> "Gradient":
        return Gradient(self.g[part], None if self.g0 is None else self.g0[part])


@dataclass(frozen=True)
class Observation:
    """One layer in one pass: its cases, the averages of its outputs and its gradient."""

    cases: UnitCases
    means: UnitMeans  # of the units' outputs
    gradient: Gradient | None
    fault: str | None  # where NaN or infinity was found first; None: nowhere
    solver: str = "auto"  # how to solve the cases' systems, or their route

    @property
    def tensors(self) -> list[Tensor]:
        return self.cases.tensors


def require_finite(faults: Iterable[str | None]) -> None:
    for fault in faults:
        if fault is not None:
            raise NonFiniteError(
                f"{fault} hold NaN or infinity: nothing of this pass was recorded. "
                f"Lower the learning rate or look at the input; a Monitor with "
                f"on_nonfinite='record' keeps such measurements, marked as not finite"
            )
