"""Layers of equal shapes, measured together as the groups of one layer.

The cost of measuring small layers is the number of operations, not their size.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from unitfisher.cases import UnitCases
from unitfisher.condensed import Condensed
from unitfisher.costs import DAMPED, layers_together, route_of
from unitfisher.incoming import Incoming
from unitfisher.memory import workspace
from unitfisher.observation import Gradient, Observation
from unitfisher.patches import unfolded
from unitfisher.solvers import SingularFisherError
from unitfisher.streaming import Cases, Held, Streamed


@dataclass(frozen=True)
class Block:
    """The cases of one layer, or of several layers of one form end to end."""

    layers: tuple[str, ...]
    units: tuple[Int[Tensor, " u"], ...]  # for each layer, the numbers of its units
    cases: Cases
    held: Held  # moments formed from the cases
    finite: bool  # no NaN or infinity was met

    def split(self, x: Shaped[Tensor, "u ..."]) -> Sequence[Tensor]:
        """Split by layers a tensor with an entry for each unit."""
        return x.chunk(len(self.layers)) if len(self.layers) > 1 else [x]

    def split_shared(self, x: Float[Tensor, "..."]) -> Sequence[Tensor]:
        """Split by layers a tensor whose entry all units of a layer share."""
        return x[:: len(self.units[0])].unbind() if len(self.layers) > 1 else [x]

    def center(self, part: slice) -> Float[Tensor, "g d"]:
        """Return E_p(a) of these units: one for all, one per layer, or one per unit."""
        mean = self.cases.mean
        if mean.dim() == 1:
            return mean.unsqueeze(0)
        return mean[:: len(self.units[0])] if len(self.layers) > 1 else mean[part]

    def suited_to(self, damping: float) -> "Block":
        """Solve from sums, not rows, if rows outnumber inputs: undamped, their Gram is singular."""
        held = self.held
        if damping >= DAMPED or not isinstance(held, Condensed) or held.route != "rows":
            return self
        regular = held.cases.rows <= held.cases.inputs
        return self if regular else replace(self, held=Condensed(held.cases, "sums"))

    def apart(self) -> Sequence["Block"]:
        """Return each layer as a block of its own."""
        if not isinstance(self.held, Condensed) or len(self.layers) == 1:
            return [self]
        of_layers = zip(self.layers, self.units, self.held.cases.by_group(), strict=True)
        return [
            Block((layer,), (units,), cases, Condensed(cases, self.held.solver), self.finite)
            for layer, units, cases in of_layers
        ]

    def unmoved(self, part: slice) -> Bool[Tensor, " u"] | None:
        """Return which units of this part have a bias without effect; None: not determined."""
        unmoved = self.cases.unmoved
        return None if unmoved is None else unmoved[part]

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.cases.tensors, *self.held.tensors]

    def named(self, error: SingularFisherError, part: slice) -> SingularFisherError:
        """Name layer and unit in an error that was raised for this part of the units."""
        layer, unit = divmod((part.start or 0) + error.unit, len(self.units[0]))
        return error.of_layer(self.layers[layer], int(self.units[layer][unit]))


def blocks(
    observations: Mapping[str, Observation] | Mapping[str, Streamed],
    units: Mapping[str, Int[Tensor, " u"]],
    biased: Collection[str],
) -> Iterator[Block]:
    """Group layers of one form into blocks, as many in each as are treated at one time."""
    alike: dict[object, list[str]] = {}
    for name, observation in observations.items():
        form = _form(observation)
        alike.setdefault(name if form is None else (form, name in biased), []).append(name)
    for names in alike.values():
        most = _together(observations[names[0]]) if len(names) > 1 else 1
        for start in range(0, len(names), most):
            layers = tuple(names[start : start + most])
            cases, held = _held([observations[layer] for layer in layers])
            every = torch.arange(cases.units // len(layers), device=cases.mean.device)
            chosen = tuple(units.get(layer, every).to(every.device) for layer in layers)
            yield Block(layers, chosen, cases, held, observations[names[0]].fault is None)


def joined_gradients(gradients: Iterable[Gradient | None]) -> Gradient | None:
    """Concatenate the gradients of a block's layers, in double; None if one is missing."""
    found = list(gradients)
    present = [gradient for gradient in found if gradient is not None]
    if len(present) < len(found):
        return None
    g = [gradient.g.flatten(1).double() for gradient in present]
    g0 = [gradient.g0.double() for gradient in present if gradient.g0 is not None]
    return Gradient(together(g), together(g0) if g0 else None)


def together(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate; a single part is not copied."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def _form(of: Observation | Streamed) -> object:
    """Return a key that is equal for layers to measure together; None for a layer by itself."""
    cases, gradient = of.cases, of.gradient
    if of.fault or not isinstance(cases, UnitCases) or cases.sample is not None:
        return None  # each layer has drawn cases of its own
    received, delta = cases.received, cases.delta
    if cases.groups > 1 or received.shape[2] > 1:
        return None
    grads = None if gradient is None else (gradient.g.dtype, gradient.g0 is None)
    counts = cases.samples, cases.population
    return received.shape, received.dtype, delta.device, delta.shape, delta.dtype, counts, grads


def _together(of: Observation | Streamed) -> int:
    assert isinstance(of, Observation)
    cases = of.cases
    activations = cases.received.shape.numel() * cases.received.dtype.itemsize
    copied = 4 * (activations + cases.delta.nbytes)
    most = layers_together(cases.sizes, route_of(cases.sizes, of.solver))
    return max(1, min(most, workspace() // copied))


def _held(observed: Sequence[Observation | Streamed]) -> tuple[Cases, Held]:
    """Return the joined cases of layers of one form, and the moments formed from them."""
    first = observed[0]
    if isinstance(first, Streamed):
        return first.cases, first.held
    cases = _joined([each.cases for each in observed if isinstance(each, Observation)])
    return cases, Condensed(cases, first.solver)


def _joined(several: Sequence[UnitCases]) -> UnitCases:
    if len(several) == 1:
        return several[0]
    a = torch.cat([unfolded(each.received) for each in several])
    delta = torch.cat([each.delta for each in several], -1)
    u = several[0].units
    averaged = [each.incoming for each in several if each.incoming is not None]
    by_unit = [(mean.expand(u, -1), trace.expand(u)) for mean, trace in averaged]
    incoming = Incoming(*map(torch.cat, zip(*by_unit, strict=True))) if averaged else None
    return replace(several[0], received=a, delta=delta, incoming=incoming)
