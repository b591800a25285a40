"""One layer in one forward pass, from its calls and the errors sent back to its cases."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from unitfisher.calls import Call
from unitfisher.cases import UnitCases
from unitfisher.kinds import LayerSelectionError, at_units, convolves, incoming, weight_shape
from unitfisher.patches import Patches, Received, unfolded
from unitfisher.precision import measurable

MANY = 2**18  # numbers from which checking their range is cheaper than using double precision
FAINT, FIERCE = 1e-24, 1e36  # a unit's ΣD: beyond, float32 squares may under- or overflow


@dataclass(frozen=True)
class Observed:
    """One layer in one forward pass; further calls count as further positions."""

    name: str
    layer: nn.Module
    calls: Sequence[Call]
    samples: int
    sharing: str
    units: Int[Tensor, " u"] | None = None  # the observed ones; None: all

    @cached_property
    def received(self) -> Received:
        """The calls' incoming activations, in single precision at least."""
        for call in self.calls:
            call.require_unchanged()
        seen = [self._received_by(call) for call in self.calls]
        if stays_folded(self.calls, self.samples, self.units):
            return seen[0]
        a = _end_to_end([self._by_sample(unfolded(x)) for x in seen])
        groups = len(a)
        if groups == 1 or self.units is None:
            return a
        return a[self.units.to(a.device) // (weight_shape(self.layer)[0] // groups)]

    def _received_by(self, call: Call) -> Received:
        """Return a call's activations; a view of its input, which may change, is copied."""
        x = measurable(call.activations)
        x = x if x.dtype == torch.float64 else x.float()
        seen = incoming(self.layer, x, call.shape)
        held = seen.view if isinstance(seen, Patches) else seen
        viewed = held.untyped_storage().data_ptr() == call.x.untyped_storage().data_ptr()
        if viewed and len(self.calls) == 1:
            return incoming(self.layer, x.clone(), call.shape)
        return seen

    def errors(self, grads: Sequence[Tensor | None]) -> Float[Tensor, "r n t u"]:
        """Arrange a block of columns, (r, *output.shape) for each call.

        None stands for a call that the model's output does not depend on: its errors are 0.
        """
        columns = next((g.shape[0] for g in grads if g is not None), 1)
        parts = []
        for call, grad in zip(self.calls, grads, strict=True):
            if grad is None:
                grad = call.activations.new_zeros(columns, *call.shape)
            delta = at_units(self.layer, measurable(grad).flatten(0, 1))
            parts.append(self._by_sample(delta.view(columns, -1, *delta.shape[1:])))
        delta = _end_to_end(parts)
        return delta if self.units is None else delta[..., self.units.to(delta.device)]

    def gradient(
        self, delta: Float[Tensor, "1 n t u"]
    ) -> tuple[Float[Tensor, "u d"], Float[Tensor, " u"]]:
        """Return (g, g0), averaged over samples, from one column of errors."""
        a = unfolded(self.received).flatten(1, 2)
        origin = a.mean(1, keepdim=True)
        by_group = delta.flatten(0, 2).unflatten(-1, (len(a), -1)).permute(1, 2, 0)  # g v n
        g0 = by_group.sum(-1, keepdim=True, dtype=torch.float64)
        about = (by_group.to(a.dtype) @ (a - origin)).double()
        g = about + g0 * origin.double()  # in double: g - g0 μ_q nearly cancels for a large mean
        return g.flatten(0, 1) / self.samples, g0.flatten() / self.samples

    def _by_sample(self, x: Tensor) -> Tensor:
        """Put samples on the second axis and positions on the third.

        Rows that samples do not divide evenly (an expert may see only some samples) become cases
        whose sample is not known.
        """
        rows = x.shape[1] * x.shape[2]
        if x.shape[1] == self.samples:
            return x
        if self.sharing != "expand":
            raise LayerSelectionError(
                f"layer {self.name!r} was called on {x.shape[1]} rows where the model's output "
                f"has {self.samples} samples: which rows belong to which sample is not known. "
                f"Keep the samples on the first axis, leave the layer out with layers=..., or "
                f"take each row as a case with sharing='expand'"
            )
        even = rows % self.samples == 0
        return x.reshape(len(x), self.samples if even else rows, -1, x.shape[-1])


def _end_to_end(calls: Sequence[Float[Tensor, "g _n _t d"]]) -> Float[Tensor, "g n t d"]:
    """Join calls: as positions of the same samples, or else as further cases."""
    if len({x.shape[1] for x in calls}) == 1:
        return torch.cat(list(calls), 2) if len(calls) > 1 else calls[0]
    return torch.cat([x.flatten(1, 2) for x in calls], 1).unsqueeze(2)


def stays_folded(calls: Sequence[Call], samples: int, units: Tensor | None) -> bool:
    """Whether patches can stay folded: one call, on all samples, with all units of its groups."""
    (call, *others), groups = calls, getattr(calls[0].module, "groups", 1)
    patches = convolves(call.module)
    return patches and not others and len(call.x) == samples and (groups == 1 or units is None)


class Folding:
    """Gathers a layer's errors block by block; sums squared columns where sharing permits.

    A single column is kept as it is: its square is D. Several random columns are kept too: standard
    errors come from their differences.
    """

    def __init__(self, observed: Observed, replicates: int = 0) -> None:
        self.observed, self.replicates = observed, replicates
        self.D: Tensor | None = None
        self.columns: list[Tensor] = []

    def add(self, delta: Float[Tensor, "r n t u"]) -> None:
        delta = delta if delta.dtype == torch.float64 else delta.float()
        if self.observed.sharing == "reduce":
            delta = delta.sum(2, keepdim=True)
        self.columns.append(delta)
        apart = self.observed.sharing == "joint" and delta.shape[2] > 1
        several = self.D is not None or len(self.columns) + delta.shape[0] > 2
        if several and not apart and self.replicates < 2:
            self._fold()

    def _fold(self) -> None:
        for delta in self.columns:
            D = _squared(delta)
            self.D = D if self.D is None else self.D.add_(D)
        self.columns.clear()

    def cases(self) -> UnitCases:
        """Return the layer's cases: activations and errors."""
        received, samples = self.observed.received, self.observed.samples
        if self.observed.sharing == "reduce":
            received = unfolded(received).mean(2, keepdim=True, dtype=torch.float64)
        if self.D is not None:
            delta = self.D.sqrt().unsqueeze(0)
        else:
            assert self.columns, "no column was sent back"
            delta = torch.cat(self.columns) if len(self.columns) > 1 else self.columns[0]
        if self.observed.sharing == "expand":
            delta = _cases(delta)
            received = received.cases() if isinstance(received, Patches) else _cases(received)
        in_order = all(len(call.x) == samples for call in self.observed.calls)
        return UnitCases(received, delta, samples, replicates=self.replicates, in_order=in_order)


def _cases(x: Float[Tensor, "r n t d"]) -> Float[Tensor, "r m 1 d"]:
    """Make every position a case; if copied, the cases of one input are contiguous."""
    if x.shape[2] == 1:
        return x
    return x.movedim(-1, 1).flatten(2).mT.unsqueeze(2)


def _squared(delta: Float[Tensor, "r n t u"]) -> Float64[Tensor, "n t u"]:
    """Σ_r δ²; if large, on a CPU, in single precision where a unit's squares are in its range."""
    if delta.dtype == torch.float64 or delta.device.type != "cpu" or delta.numel() < MANY:
        return delta.double().square().sum(0)  # not in place: autograd may share it
    squares = delta.square()
    D = squares.sum(0) if len(delta) > 1 else squares[0]
    total = D.sum((0, 1))
    far = ~((total > FAINT) & (total < FIERCE))
    D = D.double()
    if far.any():
        D[..., far] = delta[..., far].double().square().sum(0)
    return D
