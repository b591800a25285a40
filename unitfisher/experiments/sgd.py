"""Stochastic gradient descent on stacked parameters, with a learning rate for each member."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from unitfisher.choices import require_choice

Decayed = Literal["all", "weights"]


class SGD:
    """As torch.optim.SGD with momentum and L2 penalty, and a learning rate per member.

    torch.optim has one rate for a tensor; here a tensor holds all members' weights.

    Args:
        parameters: Each with the members as its first dimension.
        rates: Learning rate of each member.
        momentum: Heavy-ball momentum, without dampening.
        weight_decay: Factor of the L2 penalty's gradient.
        decayed: What the penalty is on: "all" parameters, or "weights", not what is a vector in
            each member: biases, γ and β of normalisation, PReLU's slope.

    Raises:
        ValueError: ``decayed`` is neither.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        rates: Float[Tensor, " m"],
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        decayed: str = "all",
    ) -> None:
        require_choice("decayed", decayed, get_args(Decayed))
        self.parameters, self.momentum, self.weight_decay = parameters, momentum, weight_decay
        self._decayed = [i for i, p in enumerate(parameters) if decayed == "all" or p.ndim > 2]
        self._one_rate = float(rates[0]) if (rates == rates[0]).all() else None
        self._rates = [rates.to(p).view(-1, *[1] * (p.ndim - 1)) for p in parameters]
        self.velocities = [torch.zeros_like(p) for p in parameters] if momentum else []

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], factor: float = 1.0) -> None:
        """Move the parameters; ``factor`` scales every rate, as a schedule says."""
        steps = list(gradients)
        if self.weight_decay:
            own, weights = ([of[i] for i in self._decayed] for of in (steps, self.parameters))
            penalised = torch._foreach_add(own, weights, alpha=self.weight_decay)
            for i, step in zip(self._decayed, penalised, strict=True):
                steps[i] = step
        if self.velocities:
            torch._foreach_mul_(self.velocities, self.momentum)
            torch._foreach_add_(self.velocities, steps)
            steps = self.velocities
        if self._one_rate is not None:
            torch._foreach_add_(self.parameters, steps, alpha=-self._one_rate * factor)
            return
        for parameter, step, rate in zip(self.parameters, steps, self._rates, strict=True):
            parameter.addcmul_(step, rate, value=-factor)

    def state(self) -> list[Tensor]:
        return self.velocities

    def load(self, state: Sequence[Tensor]) -> None:
        for velocity, saved in zip(self.velocities, state, strict=True):
            velocity.copy_(saved)
