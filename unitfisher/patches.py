"""What the units of a convolution receive: patches of its input, which overlap and are held once.

Unfolded, each number stands there as often as patches share it: nine times for a kernel of 3×3.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unitfisher.averages import pieces

UNFOLDED_WHOLE = 2**26  # bytes at most; more are unfolded piece by piece where that will do


@dataclass(frozen=True)
class Patches:
    """A view of a layer's input: groups, samples, axes of positions, axes of a unit's inputs."""

    view: Tensor
    axes: int  # of positions
    flat: bool = False  # is every position a case?

    @property
    def shape(self) -> torch.Size:
        """(g, n, t, d), of the patches unfolded; (g, n·t, 1, d) where every position is a case."""
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
        """Copy them out, a row of positions at a time; the cases of one input stay together."""
        inputs = range(2 + self.axes, self.view.dim())
        x = self.view.permute(0, *inputs, *range(1, 2 + self.axes)).flatten(1, len(inputs))
        return x.flatten(2).mT.unsqueeze(2) if self.flat else x.flatten(3).permute(0, 2, 3, 1)

    def at(self, cases: Int[Tensor, " m"]) -> Float[Tensor, "g m t d"]:
        """Copy some of them out."""
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
    """Yield which cases, and them: patches unfolded by so many samples as stay in the cache."""
    if not isinstance(x, Patches):
        yield from ((piece, x[:, piece]) for piece in pieces(x))
        return
    each = x.shape[1] // x.view.shape[1]  # cases of a sample
    for part in pieces(x.view):
        yield slice(part.start * each, part.stop * each), x.of_samples(part).unfolded()
