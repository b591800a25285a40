"""In which order each member of an ensemble sees the training cases."""

from collections.abc import Sequence
from typing import TypedDict

import torch
from jaxtyping import Int64
from torch import Tensor


class OrdersState(TypedDict):
    """The members' orders, and the position in them."""

    generators: list[Tensor]
    orders: Tensor
    position: int


class Orders:
    """Batches of case numbers, a new random order for each member and epoch.

    Args:
        cases: How many there are.
        size: Cases in a batch; the last batch of an epoch has what remains.
        generators: One for each member. Members of one seed share one, and see one order.
    """

    def __init__(self, cases: int, size: int, generators: Sequence[torch.Generator]) -> None:
        self.cases, self.size, self.generators = cases, size, generators
        self._distinct = list(dict.fromkeys(generators))
        self._row = torch.tensor([self._distinct.index(g) for g in generators])
        self._orders = torch.empty(len(self._distinct), 0, dtype=torch.int64)
        self._position = 0

    def __len__(self) -> int:
        """Count the batches of an epoch."""
        return -(-self.cases // self.size)

    def next(self) -> Int64[Tensor, "m b"]:
        """Return the next batch's case numbers for each member."""
        if self._position >= self._orders.shape[1]:
            drawn = [torch.randperm(self.cases, generator=g) for g in self._distinct]
            self._orders, self._position = torch.stack(drawn), 0
        batch = self._orders[self._row, self._position : self._position + self.size]
        self._position += self.size
        return batch

    def state(self) -> OrdersState:
        generators = [generator.get_state() for generator in self._distinct]
        return {"generators": generators, "orders": self._orders, "position": self._position}

    def load(self, state: OrdersState) -> None:
        for generator, saved in zip(self._distinct, state["generators"], strict=True):
            generator.set_state(saved)
        self._orders, self._position = state["orders"], state["position"]
