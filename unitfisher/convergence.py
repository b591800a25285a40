"""Whether iterations came near enough to the solutions, and a warning where they did not."""

import warnings
from collections.abc import Iterable
from types import MappingProxyType
from typing import Final, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unitfisher import products
from unitfisher.blocks import Block
from unitfisher.loader import named
from unitfisher.moments import Moments

INSTEAD: Final = MappingProxyType(
    {
        "products": "solve directly with solver='direct'",
        "passes": "allow more (memory=...) so that sums fit",
    }
)


class UnconvergedWarning(UserWarning):
    """Conjugate gradients stopped before every unit had converged."""


class Convergence(NamedTuple):
    """How well the systems of each unit were solved, those of its gradient among them."""

    residual: Float[Tensor, " u"]  # the largest one, relative; 0 where solved directly
    converged: Bool[Tensor, " u"]  # whether it is within the tolerance

    @classmethod
    def of(cls, m: Moments) -> "Convergence":
        """Look at all systems solved with these moments so far."""
        residual = m.residual
        return cls(residual, residual <= m.tolerance)

    @classmethod
    def unknown(cls, like: Float[Tensor, " u"]) -> "Convergence":
        """Nothing was solved: the pass was not finite."""
        return cls(torch.full_like(like, torch.nan), torch.zeros_like(like, dtype=torch.bool))

    def joined(self, other: "Convergence") -> "Convergence":
        """Join with further systems of the same units."""
        residual = torch.maximum(self.residual, other.residual)
        return Convergence(residual, self.converged & other.converged)


def warn_of_units(block: Block, converged: Bool[Tensor, " u"]) -> None:
    """Name the units of a layer that have not converged, if there are any."""
    if _left([(block, converged)]):
        which: Int[Tensor, " _"] = block.units[0][~converged]
        numbers = ", ".join(map(str, which.tolist()))
        _warn(f"units {numbers} of layer {block.layers[0]!r}", block.held.route)


def warn_of_layers(found: Iterable[tuple[Block, Bool[Tensor, " _"]]]) -> None:
    """Name the layers that were iterated, if some of their units have not converged.

    The text has no measured number: Python shows each text once.
    """
    if left := _left(found):
        layers = named(layer for block in left for layer in block.layers)
        which = "residual and converged, in statistics and record, say which"
        _warn(f"some units of layers {layers} ({which})", left[0].held.route)


def _left(found: Iterable[tuple[Block, Bool[Tensor, " _"]]]) -> list[Block]:
    """Return the blocks that were iterated, or none if all their units have converged."""
    iterated = [(b, converged) for b, converged in found if b.finite and b.held.route in INSTEAD]
    if all(bool(converged.all()) for _, converged in iterated):
        return []
    return [block for block, _ in iterated]


def _warn(where: str, route: str) -> None:
    warnings.warn(
        f"conjugate gradients have not converged after {products.ITERATIONS} iterations in "
        f"{where}: raise damping=, or {INSTEAD[route]}",
        UnconvergedWarning,
        stacklevel=3,
    )
