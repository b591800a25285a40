"""The calls of the layers in one forward pass: what went in, what came out, where errors arrive."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import ReferenceType, ref

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from unitfisher.layers import LayerSelectionError, at_units
from unitfisher.outputs import Averages, Taken, UnitMeans, means


@dataclass(slots=True)
class Call:
    """One call of a layer."""

    layer: str
    module: nn.Module
    x: Tensor  # as the layer received it
    version: int  # of that tensor: a later change in place would be seen
    y: Tensor  # the preactivations, as long as no nonlinearity changes them
    y_version: int
    edge: GradientEdge | None  # where ∂/∂net arrives; None when no graph is built
    y_sum: Float[Tensor, ""] | None  # NaN or infinite where any preactivation is
    taken: Taken | None = None  # None: no operation has followed yet
    nonlinearity: str | None = None
    output: ReferenceType[Tensor] | None = None  # what was taken

    @property
    def shape(self) -> torch.Size:
        return self.y.shape

    @property
    def activations(self) -> Tensor:
        return self.x.detach()

    def take(self, y: Tensor, nonlinearity: str | None = None, *, lasting: bool = False) -> None:
        """Take the units' outputs as they are now; copies, unless nothing will change them."""
        self.nonlinearity, self.output = nonlinearity, ref(y)
        output = at_units(self.module, y.detach())
        self.taken = Taken.of(self.layer, nonlinearity, output, copied=not lasting)

    def lose(self) -> None:
        """Take nothing: what the units put out cannot be told."""
        self.take(torch.full_like(self.y, torch.nan))

    def settled(self) -> Taken:
        """Return what was taken; the preactivations if nothing was."""
        if self.taken is None:
            if version_of(self.y) == self.y_version:
                self.take(self.y, lasting=True)
            else:  # changed by what no function mode sees
                self.lose()
        assert self.taken is not None
        return self.taken

    def require_unchanged(self) -> None:
        if version_of(self.x) != self.version:
            raise LayerSelectionError(
                f"the input of layer {self.layer!r} was changed in place after the layer read it, "
                f"so its activations are gone; make that operation out of place, or leave the "
                f"layer out"
            )


@dataclass
class Seen:
    """The calls of one forward pass, in order."""

    calls: list[Call] = field(default_factory=list)
    retained: list[Tensor] = field(default_factory=list)  # on which forward called retain_grad

    def forget_gradients(self) -> None:
        """Take back what sending errors through the graph has left on retained tensors."""
        for tensor in self.retained:
            tensor.grad = None

    def by_layer(self) -> dict[str, list[Call]]:
        found: dict[str, list[Call]] = {}
        for call in self.calls:
            found.setdefault(call.layer, []).append(call)
        return found

    def fault(self) -> str | None:
        """Name the first place in the pass that holds NaN or infinity."""
        sums = [x for call in self.calls for x in (call.activations.sum(), call.y_sum)]
        if all_finite(sums):
            return None  # what follows looks again: a sum may overflow
        for call in self.calls:
            if not call.activations.isfinite().all():
                return f"the activations into layer {call.layer!r}"
            if call.y_sum is not None and not call.y_sum.isfinite():
                return f"the preactivations of layer {call.layer!r}"
        return None

    @property
    def net_numbers(self) -> int:
        """Count the preactivations of the pass: what one column of errors takes."""
        return sum(call.shape.numel() for call in self.calls)

    @property
    def largest(self) -> int:
        """Count the numbers of the largest tensor that goes into a layer or comes out of it."""
        return max(n for call in self.calls for n in (call.x.numel(), call.shape.numel()))

    def means(self) -> dict[str, UnitMeans]:
        """Average every layer's outputs."""
        return means([call.settled() for call in self.calls])

    def averages(self) -> Averages:
        """Return the same, all layers end to end."""
        return Averages.of([call.settled() for call in self.calls])


def version_of(x: Tensor) -> int:
    try:
        return x._version
    except RuntimeError:  # tensors of inference mode have none
        return 0


def all_finite(numbers: Sequence[Float[Tensor, ""] | None]) -> bool:
    """Look at numbers from whatever device so that the host waits but once."""
    given = [x for x in numbers if x is not None]
    alike = len({(x.dtype, x.device) for x in given}) <= 1
    first = given[0].device
    together = torch.stack(given if alike else [x.to(first, torch.float64) for x in given])
    return bool(together.isfinite().all())


def total(x: Tensor) -> Float[Tensor, ""]:
    """In single precision at least: sums of half-precision numbers soon overflow."""
    return x.sum(dtype=torch.float32) if x.element_size() < 4 else x.sum()
