"""One measurement: what a pass showed, solved when somebody asks for it.

Until then a gradient may come, with the backward pass of the same step: the factors that s and k
need give its natural gradient too.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from unitfisher.kinds import turning
from unitfisher.memory import within
from unitfisher.observation import Gradient, Observation
from unitfisher.plan import Plan
from unitfisher.precision import exactly
from unitfisher.statistics import UnitStatistics, statistics, tensors_of, with_gradients
from unitfisher.steps import LayerStep
from unitfisher.streaming import Streamed

Observations = Mapping[str, Observation] | Mapping[str, Streamed]


@dataclass
class Measurement:
    """Of all layers that took part in a pass."""

    observations: Observations | None  # None: solved
    layers: Mapping[str, nn.Module]
    units: Mapping[str, Int[Tensor, " u"]]  # which are observed, of layers that are sampled
    step: int
    phase: str
    damping: float
    plan: Plan
    device: torch.device
    known: dict[str, UnitStatistics] = field(default_factory=dict)

    def statistics(self) -> dict[str, UnitStatistics]:
        """Return what it says of each layer.

        Raises:
            SingularFisherError: A unit's Fisher has no inverse at this damping.
        """
        if self.observations is not None:
            spare = self._spare if self.phase == "measure" else 0  # training seldom asks again
            self._solve(self.observations, spare)
        return self.known

    def natural_gradients(self) -> dict[str, LayerStep]:
        """Return those of the current ``.grad``, and learn how gradients stand to them.

        Raises:
            ValueError: No layer has a gradient.
            SingularFisherError: A unit's Fisher has no inverse at this damping.
        """
        gradients = {name: g for name, g in self._gradients() if g is not None}
        if not gradients:
            raise ValueError(
                "no observed layer has a gradient: call loss.backward() first (a weight that is "
                "computed, by a parametrisation, has none)"
            )
        if self.observations is None:
            with exactly(self.device), within(self.plan.workspace):
                self.known, steps = with_gradients(self.known, gradients, self._spare)
            return self._like_weights(steps)
        given: Any = {
            name: replace(of, gradient=gradients.get(name, of.gradient))
            for name, of in self.observations.items()
        }
        steps = self._solve(given, spare=0)
        return self._like_weights({name: steps[name] for name in gradients})

    def forget_solved(self) -> None:
        """Make room for another measurement: what was solved can be solved again."""
        for measured in self.known.values():
            measured.block.held.forget()
            measured.alone.held.forget()

    @property
    def tensors(self) -> list[Tensor]:
        """What is held."""
        pending = [t for of in (self.observations or {}).values() for t in of.tensors]
        return pending + [t for of in self.known.values() for t in tensors_of(of)]

    @property
    def _spare(self) -> int:
        return self.plan.memory - self.plan.total

    def _solve(self, observations: Observations, spare: int) -> dict[str, LayerStep]:
        with exactly(self.device), within(self.plan.workspace):
            self.known, steps = statistics(
                observations,
                self.layers,
                step=self.step,
                units=self.units,
                damping=self.damping,
                spare=spare,
            )
        self.observations = None
        return steps

    def _like_weights(self, steps: Mapping[str, LayerStep]) -> dict[str, LayerStep]:
        """Turn them to the shapes of the weights; of some units there is one row each."""
        return {
            name: step if name in self.units else step.turned(turning(self.layers[name]))
            for name, step in steps.items()
        }

    def _gradients(self) -> Iterator[tuple[str, Gradient | None]]:
        """Copy the current ``.grad`` of the observed units; None where it is missing or half.

        A bias that is not trained has none: then the weights alone are corrected.
        """
        for name in self.observations or self.known:
            own, of = self.layers[name]._parameters, self.units.get(name, slice(None))
            weight, bias = own.get("weight"), own.get("bias")
            g, g0 = (None if p is None else p.grad for p in (weight, bias))
            if g is None or (g0 is None and bias is not None and bias.requires_grad):
                yield name, None
            else:
                rows = turning(self.layers[name])(g)
                yield name, Gradient(rows[of].clone(), None if g0 is None else g0[of].clone())
