"""The calls of the layers in one forward pass: what went in, what came out, where errors arrive."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import ReferenceType, ref

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from unitfisher.kinds import LayerSelectionError, at_units
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
    nonlinearity: str | None = None
    output: ReferenceType[Tensor] | None = None  # what was taken; None: no operation has followed
    lasting: Tensor | None = None  # the same, where nothing will change it: averaged when asked for
    taken: Taken | None = None

    @property
    def shape(self) -> torch.Size:
        return self.y.shape

    @property
    def activations(self) -> Tensor:
        return self.x.detach()

    def take(self, y: Tensor, nonlinearity: str | None = None, *, lasting: bool = False) -> None:
        """Take the units' outputs as they are now; copies, unless nothing will change them."""
        self.nonlinearity, self.output = nonlinearity, ref(y)
        self.lasting = y if lasting else None
        self.taken = None if lasting else self._taken(y, copied=True)

    def lose(self) -> None:
        """Take nothing: what the units put out cannot be told."""
        self.take(torch.full_like(self.y, torch.nan))

    def settled(self) -> Taken:
        """Return what was taken; the preactivations if nothing was."""
        if self.output is None:
            if version_of(self.y) == self.y_version:
                self.take(self.y, lasting=True)
            else:  # changed by what no function mode sees
                self.lose()
        if self.lasting is not None:
            self.taken, self.lasting = self._taken(self.lasting, copied=False), None
        assert self.taken is not None
        return self.taken

    def _taken(self, y: Tensor, *, copied: bool) -> Taken:
        output = at_units(self.module, y.detach())
        return Taken.of(self.layer, self.nonlinearity, output, copied=copied)

    def require_unchanged(self) -> None:
        if version_of(self.x) != self.version:
            raise LayerSelectionError(
                f"the input of layer {self.layer!r} was changed in place after the layer read it, "
                f"so its activations are gone; make that operation out of place, or leave the "
                f"layer out"
            )


class Unfit(NamedTuple):
    """Of which kind a layer is, and why a call of it cannot be observed."""

    kind: str
    why: str


@dataclass
class Seen:
    """The calls of one forward pass, in order."""

    calls: list[Call] = field(default_factory=list)
    unfit: dict[str, Unfit] = field(default_factory=dict)  # layers that cannot be observed in it
    retained: list[Tensor] = field(default_factory=list)  # on which forward called retain_grad
    row: list[Tensor] = field(default_factory=list)  # see `Chain`: what each layer's output became

    def forget_gradients(self) -> None:
        """Take back what sending errors through the graph has left on retained tensors."""
        for tensor in self.retained:
            tensor.grad = None

    def by_layer(self) -> dict[str, list[Call]]:
        found: dict[str, list[Call]] = {}
        for call in self.calls:
            found.setdefault(call.layer, []).append(call)
        return found

    @property
    def numbers(self) -> list[Tensor]:
        """What went into each layer and what came out."""
        return [x for call in self.calls for x in (call.activations, call.y.detach())]

    def fault(self) -> str | None:
        """Name the first place in the pass that holds NaN or infinity."""
        for i, x in enumerate(self.numbers):
            if not x.isfinite().all():
                place = "preactivations of" if i % 2 else "activations into"
                return f"the {place} layer {self.calls[i // 2].layer!r}"
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


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Look at the sums of tensors on whatever devices, so that the host waits but once.

    False is not certain: finite numbers may have an infinite sum.
    """
    sums = [total(x) for x in tensors]
    alike = len({(x.dtype, x.device) for x in sums}) <= 1
    first = sums[0].device
    together = torch.stack(sums if alike else [x.to(first, torch.float64) for x in sums])
    return bool(together.isfinite().all())


def total(x: Tensor) -> Float[Tensor, ""]:
    """In single precision at least: sums of half-precision numbers soon overflow."""
    return x.sum(dtype=torch.float32) if x.element_size() < 4 else x.sum()
