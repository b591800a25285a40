"""The sizes of a layer in one pass, and the bytes that its cases take."""

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
from unitfisher.precision import measuring


class Shape(NamedTuple):
    """One layer in one pass: the sizes that its memory depends on."""

    samples: int
    positions: int
    inputs: int
    units: int
    groups: int
    itemsize: int
    columns: int  # of error, kept apart at every position (joint); 0 where they fold to D
    averaged: bool  # whether over positions: sharing="reduce"
    engine: str
    replicates: int = 0  # random columns, kept for standard errors
    folded: int = 0  # bytes of a padded input whose patches stay folded until needed

    @property
    def cases(self) -> int:
        return self.samples * (1 if self.columns or self.averaged else self.positions)

    @property
    def bytes_of_case(self) -> int:
        """Bytes of a case: activations, errors, their sums over positions, D, sample number."""
        of_sample = 8 * (self.replicates > 1)  # its number
        of_unit = self._places * self.bytes_of_errors + 8 * self.columns + 8
        return self.bytes_unfolded + of_unit * self.units + of_sample

    @property
    def bytes_unfolded(self) -> int:
        """Bytes of a case's activations."""
        item = 8 if self.averaged else self.itemsize
        return item * self._places * self.inputs * self.groups

    @property
    def _places(self) -> int:
        """Positions of a case."""
        return self.positions if self.columns else 1

    @property
    def bytes_of_pass(self) -> int:
        """Bytes of the cases of a pass, as they are held until they are solved."""
        unfolded = self.cases * self.bytes_of_case
        return unfolded - self.bytes_to_unfold + self.folded

    @property
    def bytes_to_unfold(self) -> int:
        """Bytes of a pass's patches unfolded; 0 if they are not folded."""
        return self.cases * self.bytes_unfolded * (self.folded > 0)

    @property
    def bytes_of_errors(self) -> int:
        """Bytes of a unit's errors at one position: columns, or √D."""
        return self.itemsize * (self.columns or self.replicates) or 8

    @property
    def bytes_observing(self) -> int:
        """Bytes held beside a pass's cases until its last errors have come back."""
        every = self.samples * self.positions
        activations = 0 if self.folded else self.itemsize * self.inputs * self.groups
        return every * (activations + self.bytes_of_errors * self.units)

    @property
    def bytes_of_results(self) -> int:
        """Bytes of E_q(a) and the corrected mean of every unit."""
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
    """Return the shape of every layer in a pass."""
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
    """Count the bytes of a convolution's padded input, which its patches view."""
    dtype = torch.float64 if itemsize == 8 else torch.float32
    x = torch.empty(call.x.shape, dtype=dtype, device="meta")
    patches = incoming(call.module, x, call.shape)
    assert isinstance(patches, Patches)
    return patches.view.untyped_storage().nbytes()


def bare(layer: nn.Module, units: Int[Tensor, " u"] | None) -> Shape:
    """Return what is known of a layer's shape before a pass: 0 samples."""
    (count, *of_unit), groups = weight_shape(layer), getattr(layer, "groups", 1)
    observed = count if units is None else len(units)
    groups = observed if groups > 1 and units is not None else groups
    device = next(layer.parameters()).device
    return Shape(0, 1, prod(of_unit), observed, groups, 4, 0, False, engine(measuring(device)))
