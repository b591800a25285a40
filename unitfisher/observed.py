"""One layer in one forward pass, from its calls and the errors sent back to its cases."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unitfisher.capture import Call
from unitfisher.cases import UnitCases
from unitfisher.layers import LayerSelectionError, at_units, incoming


@dataclass(frozen=True)
class Observed:
    """One layer in one forward pass; several calls are further positions of the same weights."""

    name: str
    layer: nn.Module
    calls: Sequence[Call]
    samples: int
    sharing: str
    units: Int[Tensor, " u"] | None = None  # which of the layer's; None: all

    @cached_property
    def activations(self) -> Float[Tensor, "g n t d"]:
        """The calls' incoming activations, in single precision at least."""
        for call in self.calls:
            call.require_unchanged()
        seen = [incoming(self.layer, call.activations) for call in self.calls]
        parts = [self._by_sample(x) for x in seen]
        a = torch.cat(parts, 2) if len(parts) > 1 else _own(parts[0], self.calls[0].activations)
        a = a if a.dtype == torch.float64 else a.float()
        if len(a) == 1 or self.units is None:
            return a
        return a[self.units.to(a.device) // (self.layer.get_parameter("weight").shape[0] // len(a))]

    def errors(self, grads: Sequence[Tensor | None]) -> Float[Tensor, "r n t u"]:
        """Arrange a block of columns, (r, *output.shape) for each call.

        None stands for a call that the model's output does not depend on: no error.
        """
        columns = next((len(g) for g in grads if g is not None), 1)
        parts = []
        for call, grad in zip(self.calls, grads, strict=True):
            if grad is None:
                grad = call.activations.new_zeros(columns, *call.shape)
            delta = at_units(self.layer, grad.flatten(0, 1)).unflatten(0, (columns, -1))
            parts.append(self._by_sample(delta))
        delta = torch.cat(parts, 2)
        return delta if self.units is None else delta[..., self.units.to(delta.device)]

    def gradient(
        self, delta: Float[Tensor, "1 n t u"]
    ) -> tuple[Float[Tensor, "u d"], Float[Tensor, " u"]]:
        """Return (g, g0) of the mean over samples whose errors these are."""
        a = self.activations.flatten(1, 2)
        origin = a.mean(1, keepdim=True)
        by_group = delta.flatten(0, 2).unflatten(-1, (len(a), -1)).permute(1, 2, 0)  # g v n
        g0 = by_group.sum(-1, keepdim=True, dtype=torch.float64)
        about = (by_group.to(a.dtype) @ (a - origin)).double()
        g = about + g0 * origin.double()  # in double: g - g0 μ_q nearly cancels for a large mean
        return g.flatten(0, 1) / self.samples, g0.flatten() / self.samples

    def _by_sample(self, x: Tensor) -> Tensor:
        """Give the second axis the samples and the third the positions."""
        rows = x.shape[1] * x.shape[2]
        if x.shape[1] == self.samples:
            return x
        if rows % self.samples or self.sharing != "expand":
            raise LayerSelectionError(
                f"layer {self.name!r} was called on {x.shape[1]} rows where the model's output "
                f"has {self.samples} samples: which rows belong to which sample is not known. "
                f"Keep the samples on the first axis, leave the layer out with layers=..., or, "
                f"when the rows divide evenly, use sharing='expand'"
            )
        return x.reshape(len(x), self.samples, -1, x.shape[-1])


def _own(x: Tensor, given: Tensor) -> Tensor:
    """Return x, or a copy if it is but a view of what was given, which its owner may change."""
    viewed = x.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
    return x.clone() if viewed else x


class Folding:
    """Gathers a layer's errors block by block; folds columns as soon as sharing permits.

    Several columns that estimate the same are kept: how they differ is their standard error.
    """

    def __init__(self, observed: Observed, replicates: int = 0) -> None:
        self.observed, self.replicates = observed, replicates
        self.D: Tensor | None = None
        self.columns: list[Tensor] = []

    def add(self, delta: Float[Tensor, "r n t u"]) -> None:
        if self.observed.sharing == "joint" and delta.shape[2] > 1:
            self.columns.append(delta)
            return
        if self.observed.sharing == "reduce":
            delta = delta.sum(2, keepdim=True)
        if self.replicates > 1:
            self.columns.append(delta.flatten(1, 2).unsqueeze(2))
            return
        D = (delta.double() ** 2).sum(0)
        self.D = D if self.D is None else self.D.add_(D)

    def cases(self) -> UnitCases:
        """Put the errors beside the activations."""
        a, samples = self.observed.activations, self.observed.samples
        if self.columns:
            delta = torch.cat(self.columns)
        else:
            assert self.D is not None, "no column was sent back"
            delta = self.D.sqrt().flatten(0, 1)[None, :, None]
        if self.observed.sharing == "reduce":
            a = a.mean(2, keepdim=True, dtype=torch.float64)
        if delta.shape[2] == 1:
            a = a.flatten(1, 2).unsqueeze(2)
        return UnitCases(a, delta, samples, replicates=self.replicates)
