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
    """Of one system a unit, and the residual relative to the right-hand side, both whitened."""

    x: Float64[Tensor, "u d"]
    residual: Float64[Tensor, " u"]


Solving = Generator[Tensor, Tensor, Solution]  # yields y, is sent Σ q ã ãᵀ y


@runtime_checkable
class CaseProducts(Protocol):
    """What conjugate gradients ask of the cases, wherever those are."""

    @property
    def instead(self) -> str:
        """What to do where iterations do not come to an end."""

    @property
    def support(self) -> Float[Tensor, " u"]:
        """How many cases carry weight."""

    def shared_moment(self) -> Float64[Tensor, "g d d"]:
        """Σ q̄ (a - origin)(a - origin)ᵀ, q̄ near the mean of the living; how near is the speed."""

    def second_moment(self, unit: int) -> Float64[Tensor, "d d"]:
        """Σ q (a - origin)(a - origin)ᵀ of one unit."""

    def whitened(self, inverse: Float64[Tensor, "g d d"]) -> "CaseProducts":
        """Return ã = L⁻¹ (a - origin) instead."""

    def answer(self, solving: Solving) -> Solution:
        """Multiply until it is solved."""


class Weighted(NamedTuple):
    """Cases about an origin, and how much each weighs for each unit."""

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
        """Weigh by q = D / total; in the precision of the activations, as all that follows."""
        q = (D / torch.where(total > 0, total, 1.0)).to(a.dtype).T
        return cls(a - origin.unsqueeze(1), q.unflatten(0, (len(a), -1)).contiguous())

    @property
    def instead(self) -> str:
        return "solve directly with solver='direct'"

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
        """Σ q (a - origin)(a - origin)ᵀ of units that have these shares in it."""
        shared = share.unsqueeze(1).to(self.q.dtype) @ self.q
        return ((shared.mT * self.about).mT @ self.about).double()

    def second_moment(self, unit: int) -> Float64[Tensor, "d d"]:
        group, own = divmod(unit, self.q.shape[1])
        about = self.about[group]
        return ((self.q[group, own].unsqueeze(1) * about).mT @ about).double()

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
