"""Mean and variance of units' outputs, for many small layers in few operations."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from unitfisher.averages import averages
from unitfisher.precision import measurable

FEW = 2**16  # numbers up to which outputs are kept, and averaged together with others


class UnitMeans(NamedTuple):
    """Mean and variance of each unit's own output over samples and positions."""

    mean: Float64[Tensor, " u"]
    var: Float64[Tensor, " u"]  # population variance
    cases: int  # samples times positions
    nonlinearity: str | None  # the function that followed the layer; None: linear

    @classmethod
    def of(cls, y: Float[Tensor, "n t u"], nonlinearity: str | None) -> "UnitMeans":
        mean, var = averages(measurable(y).unsqueeze(0))
        return cls(mean[0], var[0], y.shape[0] * y.shape[1], nonlinearity)

    def joined(self, other: "UnitMeans") -> "UnitMeans":
        """Return the statistics of both sets of cases together."""
        cases = self.cases + other.cases
        p, q = self.cases / cases, other.cases / cases
        shift = other.mean - self.mean
        var = p * self.var + q * other.var + p * q * shift**2
        return UnitMeans(self.mean + q * shift, var, cases, self.nonlinearity)


class Taken(NamedTuple):
    """The outputs of a layer's call or, where they are many, their averages."""

    layer: str
    nonlinearity: str | None
    output: Float[Tensor, "n t u"] | UnitMeans

    @classmethod
    def of(
        cls, layer: str, nonlinearity: str | None, y: Float[Tensor, "n t u"], *, copied: bool
    ) -> "Taken":
        """Take outputs as they are now; ``copied`` if later operations may change them in place."""
        if y.numel() > FEW:
            return cls(layer, nonlinearity, UnitMeans.of(y, nonlinearity))
        return cls(layer, nonlinearity, y.clone() if copied else y)

    @property
    def form(self) -> object:
        """Outputs with the same key can be averaged together; None: averaged already."""
        y = self.output
        return None if isinstance(y, UnitMeans) else (y.shape[:2], y.dtype, y.device)


class Averages(NamedTuple):
    """Mean and variance of the outputs of several layers, concatenated over units."""

    layers: tuple[tuple[str, int], ...]  # name and number of units
    mean: Float64[Tensor, " u"]
    var: Float64[Tensor, " u"]

    @classmethod
    def of(cls, taken: Sequence[Taken]) -> "Averages":
        """Average each layer's outputs over all of its calls."""
        names = [one.layer for one in taken]
        if len(set(names)) == len(names) and len(_alike(taken)) == 1 and taken[0].form:
            together, units = _together(taken)
            return cls(tuple(zip(names, units, strict=True)), together.mean, together.var)
        found = means(taken)
        mean = end_to_end([averaged.mean for averaged in found.values()])
        var = end_to_end([averaged.var for averaged in found.values()])
        return cls(tuple((name, len(x.mean)) for name, x in found.items()), mean, var)


def means(taken: Sequence[Taken]) -> dict[str, UnitMeans]:
    """Average each layer's outputs, over all of its calls."""
    joined: dict[str, UnitMeans] = {}
    for one, found in zip(taken, _each(taken), strict=True):
        first = joined.get(one.layer)
        joined[one.layer] = first.joined(found) if first else found
    return joined


def end_to_end(xs: Sequence[Float[Tensor, " _"]]) -> Float[Tensor, " u"]:
    """Concatenate values per unit, on the first one's device."""
    return torch.cat([x.to(xs[0].device) for x in xs])


def _each(taken: Sequence[Taken]) -> list[UnitMeans]:
    """Average each call's outputs; calls of the same form together."""
    found = {i: one.output for i, one in enumerate(taken) if isinstance(one.output, UnitMeans)}
    for form, calls in _alike(taken).items():
        if form is None:
            continue
        together, units = _together([taken[i] for i in calls])
        parts = zip(calls, together.mean.split(units), together.var.split(units), strict=True)
        for i, mean, var in parts:
            found[i] = UnitMeans(mean, var, together.cases, taken[i].nonlinearity)
    return [found[i] for i in range(len(taken))]


def _alike(taken: Sequence[Taken]) -> dict[object, list[int]]:
    alike: dict[object, list[int]] = {}
    for i, one in enumerate(taken):
        alike.setdefault(one.form, []).append(i)
    return alike


def _together(taken: Sequence[Taken]) -> tuple[UnitMeans, list[int]]:
    """Average outputs of one form in few operations; return the number of units of each, too."""
    outputs = [one.output for one in taken if isinstance(one.output, Tensor)]
    together = UnitMeans.of(torch.cat(outputs, -1), None)
    return together, [output.shape[-1] for output in outputs]
