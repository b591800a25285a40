"""One measurement: the observations of a pass, solved when a result is first asked for.

By then the backward pass of the same step may have left a gradient: the factorisations that give s
and k give its natural gradient too.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from unitfisher.kinds import turning, weight_of
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
    """The layers called in a pass: their statistics, or the observations to solve them from."""

    observations: Observations | None  # None: solved
    layers: Mapping[str, nn.Module]
    units: Mapping[str, Int[Tensor, " u"]]  # the observed ones, of layers that are sampled
    step: int
    phase: str
    damping: float
    plan: Plan
    device: torch.device
    known: dict[str, UnitStatistics] = field(default_factory=dict)

    def statistics(self) -> dict[str, UnitStatistics]:
        """Return the statistics of each layer; the first call solves for them.

        Raises:
            SingularFisherError: A unit's Fisher has no inverse at this damping.
        """
        if self.observations is not None:
            # after a training pass, solved systems are seldom used again
            spare = self._spare if self.phase == "measure" else 0
            self._solve(self.observations, spare)
        return self.known

    def natural_gradients(self) -> dict[str, LayerStep]:
        """Return natural gradients of the current ``.grad``; add the angles to the statistics.

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
        completed: Any = {
            name: replace(observation, gradient=gradients.get(name, observation.gradient))
            for name, observation in self.observations.items()
        }
        steps = self._solve(completed, spare=0)
        return self._like_weights({name: steps[name] for name in gradients})

    def forget_solved(self) -> None:
        """Free moments, factorisations and unfolded patches; they are formed again when needed."""
        for measured in self.known.values():
            measured.block.held.forget()
            measured.alone.held.forget()

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors held, to count their memory."""
        pending = [t for each in (self.observations or {}).values() for t in each.tensors]
        return pending + [t for each in self.known.values() for t in tensors_of(each)]

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
        """Give steps the shapes and devices of weights; a sample of units keeps one row a unit."""
        turned = {
            name: step if name in self.units else step.turned(turning(self.layers[name]))
            for name, step in steps.items()
        }
        return {name: step.on(weight_of(self.layers[name]).device) for name, step in turned.items()}

    def _gradients(self) -> Iterator[tuple[str, Gradient | None]]:
        """Copy the current ``.grad`` of the observed units; None where weight or bias lacks one.

        A bias that is not trained needs none: the step is then that of the weights alone, A⁻¹ g.
        """
        for name in self.observations or self.known:
            parameters = self.layers[name]._parameters
            weight, bias = parameters.get("weight"), parameters.get("bias")
            g, g0 = (None if p is None else p.grad for p in (weight, bias))
            if g is None or (g0 is None and bias is not None and bias.requires_grad):
                yield name, None
            else:
                rows, units = turning(self.layers[name])(g), self.units.get(name, slice(None))
                copied = Gradient(rows[units].clone(), None if g0 is None else g0[units].clone())
                yield name, copied.measurable()
