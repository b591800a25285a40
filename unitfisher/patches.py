"""The inputs of a convolution's units: overlapping patches, held as a view of the layer's input.

Unfolding copies a number into every patch that contains it: nine times for a kernel of 3×3.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unitfisher.averages import pieces

UNFOLDED_WHOLE = 2**26  # bytes; more are unfolded piece by piece where possible


@dataclass(frozen=True)
class Patches:
    """A view of a layer's input with axes for groups, samples, positions and a unit's inputs."""

    view: Tensor
    axes: int  # how many are those of positions
    flat: bool = False  # whether every position is a case

    @property
    def shape(self) -> torch.Size:
        """(g, n, t, d) of the unfolded patches; (g, n·t, 1, d) where every position is a case."""
        groups, samples = self.view.shape[:2]
        positions, inputs = self.positions.numel(), self.view.shape[2 + self.axes :].numel()
        cases = (samples * positions, 1) if self.flat else (samples, positions)
        return torch.Size((groups, *cases, inputs))

    @property
    def positions(self) -> torch.Size:
        return self.view.shape[2 : 2 + self.axes]

    @property
    def dtype(self) -> torch.dtype:
        return self.view.dtype

    @property
    def device(self) -> torch.device:
        return self.view.device

    def cases(self) -> "Patches":
        """Make every position a case."""
        return replace(self, flat=True)

    def of_samples(self, part: slice) -> "Patches":
        return replace(self, view=self.view[:, part])

    def unfolded(self) -> Float[Tensor, "g m t d"]:
        """Copy the patches out; in the copy, the cases of one input are contiguous."""
        inputs = range(2 + self.axes, self.view.dim())
        x = self.view.permute(0, *inputs, *range(1, 2 + self.axes)).flatten(1, len(inputs))
        return x.flatten(2).mT.unsqueeze(2) if self.flat else x.flatten(3).permute(0, 2, 3, 1)

    def at(self, cases: Int[Tensor, " m"]) -> Float[Tensor, "g m t d"]:
        """Copy out the patches of these cases."""
        if not self.flat:
            chosen = self.view[:, cases]
            return chosen.flatten(2, 1 + self.axes).flatten(3)
        sample, position = cases // self.positions.numel(), cases % self.positions.numel()
        place = torch.unravel_index(position, self.positions)
        where: Any = (slice(None), sample, *place)
        return self.view[where].flatten(2).unsqueeze(2)


Received = Float[Tensor, "g m t d"] | Patches


def unfolded(x: Received) -> Float[Tensor, "g m t d"]:
    return x.unfolded() if isinstance(x, Patches) else x


def in_pieces(x: Received) -> Iterator[tuple[slice, Float[Tensor, "g m t d"]]]:
    """Yield slices of cases and their activations, unfolded in pieces that fit the cache."""
    if not isinstance(x, Patches):
        yield from ((piece, x[:, piece]) for piece in pieces(x))
        return
    each = x.shape[1] // x.view.shape[1]  # cases of a sample
    for part in pieces(x.view):
        yield slice(part.start * each, part.stop * each), x.of_samples(part).unfolded()
