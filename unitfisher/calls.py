"""The calls of the layers in one forward pass: inputs, outputs, and where errors arrive."""

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
from unitfisher.precision import measuring


@dataclass(slots=True)
class Call:
    """One call of a layer."""

    layer: str
    module: nn.Module
    x: Tensor  # as the layer received it
    version: int  # of x: a later in-place change raises it
    y: Tensor  # the preactivations, until a nonlinearity changes them in place
    y_version: int
    edge: GradientEdge | None  # where ∂/∂net arrives; None when no graph is built
    nonlinearity: str | None = None
    output: ReferenceType[Tensor] | None = None  # the tensor that was taken; None: none yet
    lasting: Tensor | None = None  # the same, if nothing will change it: averaged on demand
    taken: Taken | None = None  # its values, or their averages

    @property
    def shape(self) -> torch.Size:
        return self.y.shape

    @property
    def activations(self) -> Tensor:
        return self.x.detach()

    def take(self, y: Tensor, nonlinearity: str | None = None, *, lasting: bool = False) -> None:
        """Take the units' outputs, copied unless ``lasting``, when nothing will change them."""
        self.nonlinearity, self.output = nonlinearity, ref(y)
        self.lasting = y if lasting else None
        self.taken = None if lasting else self._taken(y, copied=True)

    def lose(self) -> None:
        """Take NaN for outputs, as the units' outputs cannot be determined."""
        self.take(torch.full_like(self.y, torch.nan))

    def settled(self) -> Taken:
        """Return the outputs taken; the preactivations if none were."""
        if self.output is None:
            if version_of(self.y) == self.y_version:
                self.take(self.y, lasting=True)
            else:  # changed in place, unseen by function modes
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
    """A layer's kind, and the reason why its call cannot be observed."""

    kind: str
    why: str


@dataclass
class Seen:
    """The calls of one forward pass, in order."""

    calls: list[Call] = field(default_factory=list)
    paused: bool = False  # the model runs inside its own pass, without being trained there
    unfit: dict[str, Unfit] = field(default_factory=dict)  # layers not observable in this pass
    retained: list[Tensor] = field(default_factory=list)  # where forward called retain_grad
    row: list[Tensor] = field(default_factory=list)  # in a `Chain`: what the next layer received

    def forget_gradients(self) -> None:
        """Clear the ``.grad`` that sending errors back has left on retained tensors."""
        for tensor in self.retained:
            tensor.grad = None

    def by_layer(self) -> dict[str, list[Call]]:
        found: dict[str, list[Call]] = {}
        for call in self.calls:
            found.setdefault(call.layer, []).append(call)
        return found

    @property
    def numbers(self) -> list[Tensor]:
        """Input and output of each call, one after the other."""
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
        """The number of preactivations in the pass, which is the size of a column of errors."""
        return sum(call.shape.numel() for call in self.calls)

    @property
    def largest(self) -> int:
        """The size of the largest input or output of a layer."""
        return max(n for call in self.calls for n in (call.x.numel(), call.shape.numel()))

    def means(self) -> dict[str, UnitMeans]:
        """Average every layer's outputs."""
        return means([call.settled() for call in self.calls])

    def averages(self) -> Averages:
        """Average every layer's outputs; return the layers' averages concatenated."""
        return Averages.of([call.settled() for call in self.calls])


def version_of(x: Tensor) -> int:
    try:
        return x._version
    except RuntimeError:  # tensors of inference mode have none
        return 0


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether the sums of tensors are finite; the host waits for the devices only once.

    False is not certain: finite numbers may have an infinite sum.
    """
    sums = [total(x) for x in tensors]
    alike = len({(x.dtype, x.device) for x in sums}) <= 1
    place = measuring(sums[0].device)
    together = torch.stack(sums if alike else [x.to(place).double() for x in sums])
    return bool(together.isfinite().all())


def total(x: Tensor) -> Float[Tensor, ""]:
    """Sum, in single precision at least, as half precision soon overflows."""
    return x.sum(dtype=torch.float32) if x.element_size() < 4 else x.sum()
