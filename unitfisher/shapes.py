"""The sizes of a layer's part in one pass, and the bytes that these take."""

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from unitfisher.calls import Call, Seen
from unitfisher.columns import Estimator
from unitfisher.costs import Sizes, engine
from unitfisher.kinds import at_units, incoming, weight_shape
from unitfisher.likelihoods import Output
from unitfisher.observed import stays_folded
from unitfisher.patches import Patches


class Shape(NamedTuple):
    """What one pass shows of a layer."""

    samples: int
    positions: int
    inputs: int
    units: int
    groups: int
    itemsize: int
    columns: int  # of errors that are kept apart, position by position; 0 where they fold
    averaged: bool  # over positions: sharing="reduce"
    engine: str
    replicates: int = 0  # columns kept to tell their spread
    folded: int = 0  # bytes of patches that are not unfolded before they are asked for

    @property
    def cases(self) -> int:
        return self.samples * (1 if self.columns or self.averaged else self.positions)

    @property
    def bytes_of_case(self) -> int:
        """Activations, errors, their sums over positions and D, and whose they are."""
        of_sample = 8 * (self.replicates > 1)  # which one it is of
        of_unit = self._places * self.bytes_of_errors + 8 * self.columns + 8
        return self.bytes_unfolded + of_unit * self.units + of_sample

    @property
    def bytes_unfolded(self) -> int:
        """Of a case's activations."""
        item = 8 if self.averaged else self.itemsize
        return item * self._places * self.inputs * self.groups

    @property
    def _places(self) -> int:
        """Positions of a case."""
        return self.positions if self.columns else 1

    @property
    def bytes_of_pass(self) -> int:
        """The cases of one pass, as they are held until they are solved."""
        unfolded = self.cases * self.bytes_of_case
        return unfolded - self.bytes_to_unfold + self.folded

    @property
    def bytes_to_unfold(self) -> int:
        """Of a pass's patches, if they are still folded."""
        return self.cases * self.bytes_unfolded * (self.folded > 0)

    @property
    def bytes_of_errors(self) -> int:
        """Of a unit at one position: columns, or the square root of their sum of squares."""
        return self.itemsize * (self.columns or self.replicates) or 8

    @property
    def bytes_observing(self) -> int:
        """What a pass holds beside its cases until its last error has come back."""
        every = self.samples * self.positions
        activations = 0 if self.folded else self.itemsize * self.inputs * self.groups
        return every * (activations + self.bytes_of_errors * self.units)

    @property
    def bytes_of_results(self) -> int:
        """E_q(a) and the corrected mean of every unit."""
        return 16 * self.units * self.inputs

    def sizes(self, cases: int) -> Sizes:
        return Sizes(
            rows=cases * max(1, self.columns),
            inputs=self.inputs,
            units=self.units,
            groups=self.groups,
            joined=cases * self.positions if self.columns else 0,
            itemsize=8 if self.averaged else self.itemsize,
            engine=self.engine,
        )


def shapes_of(
    seen: Seen,
    layers: Mapping[str, nn.Module],
    units: Mapping[str, Int[Tensor, " u"]],
    estimator: Estimator,
    z: Output,
) -> dict[str, Shape]:
    """Read off a pass what its measurement will have to hold."""
    shapes = {}
    for name, calls in seen.by_layer().items():
        samples = len(z)
        nets = [at_units(call.module, call.y) for call in calls]
        positions = -(-sum(net.shape[0] * net.shape[1] for net in nets) // samples)
        several, sharing = positions > 1, estimator.sharing
        itemsize = 8 if calls[0].activations.dtype == torch.float64 else 4
        folded = sharing != "reduce" and stays_folded(calls, samples, units.get(name))
        shapes[name] = bare(layers[name], units.get(name))._replace(
            samples=samples,
            positions=positions,
            itemsize=itemsize,
            folded=_folded(calls[0], itemsize) if folded else 0,
            columns=estimator.count(z) if several and sharing == "joint" else 0,
            averaged=sharing == "reduce",
            replicates=estimator.count(z) if estimator.replicates > 1 else 0,
        )
    return shapes


def _folded(call: Call, itemsize: int) -> int:
    """Count the bytes of a convolution's input, padded, as it is held for its patches."""
    dtype = torch.float64 if itemsize == 8 else torch.float32
    x = torch.empty(call.x.shape, dtype=dtype, device="meta")
    patches = incoming(call.module, x, call.shape)
    assert isinstance(patches, Patches)
    return patches.view.untyped_storage().nbytes()


def bare(layer: nn.Module, units: Int[Tensor, " u"] | None) -> Shape:
    (count, *of_unit), groups = weight_shape(layer), getattr(layer, "groups", 1)
    observed = count if units is None else len(units)
    own = observed if groups > 1 and units is not None else groups
    device = next(layer.parameters()).device
    return Shape(0, 1, prod(of_unit), observed, own, 4, 0, False, engine(device))
