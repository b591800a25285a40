"""Weighted cases as an operator: all that conjugate gradients need is products with vectors.

A solver is a generator that yields a vector and is sent its product; so it does not know whether
the cases lie in memory or are read again.
"""

from collections.abc import Generator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64
from torch import Tensor


class Solution(NamedTuple):
    """Solution of one system per unit; the residual is relative, in whitened coordinates."""

    x: Float64[Tensor, "u d"]
    residual: Float64[Tensor, " u"]


Solving = Generator[Tensor, Tensor, Solution]  # yields y, is sent Σ q ã ãᵀ y


@runtime_checkable
class CaseProducts(Protocol):
    """What conjugate gradients need of the cases, in memory or from a loader."""

    @property
    def support(self) -> Float[Tensor, " u"]:
        """Number of cases that carry weight for each unit."""

    def shared_moment(self) -> Float64[Tensor, "g d d"]:
        """Σ q̄ (a - origin)(a - origin)ᵀ; the nearer q̄ is to living units' mean, the faster."""

    def second_moment(self, unit: int) -> Float64[Tensor, "d d"]:
        """Σ q (a - origin)(a - origin)ᵀ of one unit."""

    def whitened(self, inverse: Float64[Tensor, "g d d"]) -> "CaseProducts":
        """Return ã = L⁻¹ (a - origin) instead."""

    def answer(self, solving: Solving) -> Solution:
        """Give a solver its products until it returns the solution."""


class Weighted(NamedTuple):
    """Cases about an origin, and their weights for each unit."""

    about: Float[Tensor, "g n d"]
    q: Float[Tensor, "g v n"]

    @classmethod
    def of(
        cls,
        a: Float[Tensor, "g n d"],
        D: Float64[Tensor, "n u"],
        origin: Float[Tensor, "g d"],
        total: Float64[Tensor, " u"],
    ) -> "Weighted":
        """Weigh by q = D / total; all is kept in the precision of the activations."""
        q = (D / torch.where(total > 0, total, 1.0)).to(a.dtype).T
        return cls(a - origin.unsqueeze(1), q.unflatten(0, (len(a), -1)).contiguous())

    @property
    def support(self) -> Float[Tensor, " u"]:
        return (self.q > 0).sum(-1).flatten().double()

    def mean(self) -> Float64[Tensor, "u d"]:
        return (self.q @ self.about).double().flatten(0, 1)

    def squares(self) -> Float64[Tensor, " u"]:
        """Σ q ‖a - origin‖²."""
        return (self.q @ self.about.square().sum(-1, keepdim=True)).double().flatten()

    def shared_moment(self) -> Float64[Tensor, "g d d"]:
        living = (self.q > 0).any(-1).double()
        return self.moment(living / living.sum(1, keepdim=True).clamp_min(1))

    def moment(self, share: Float64[Tensor, "g v"]) -> Float64[Tensor, "g d d"]:
        """Σ q̄ (a - origin)(a - origin)ᵀ, q̄ the sum of the units' q weighted by ``share``."""
        shared = share.unsqueeze(1).to(self.q.dtype) @ self.q
        return ((shared.mT * self.about).mT @ self.about).double()

    def second_moment(self, unit: int) -> Float64[Tensor, "d d"]:
        group, place = divmod(unit, self.q.shape[1])
        about = self.about[group]
        return ((self.q[group, place].unsqueeze(1) * about).mT @ about).double()

    def whitened(self, inverse: Float[Tensor, "g d d"]) -> "Weighted":
        return self._replace(about=self.about @ inverse.mT.to(self.about.dtype))

    def times(self, y: Float[Tensor, "g v d"]) -> Float[Tensor, "g v d"]:
        """Σ q a aᵀ y, in the precision of the cases."""
        return (y.to(self.about.dtype) @ self.about.mT).mul_(self.q) @ self.about

    def answer(self, solving: Solving) -> Solution:
        y = next(solving)
        while True:
            try:
                y = solving.send(self.times(y).double())
            except StopIteration as end:
                solution: Solution = end.value
                return solution
