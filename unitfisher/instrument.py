"""Measurement of passes: they are observed, pooled and subsampled, and the newest is kept."""

import warnings
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from unitfisher.calls import Seen
from unitfisher.history import History
from unitfisher.layers import UncoveredLayersWarning
from unitfisher.loader import Batches
from unitfisher.measurement import Measurement, Observations
from unitfisher.observation import Observation, require_finite
from unitfisher.observer import Observer, observe_now
from unitfisher.options import Options
from unitfisher.plan import Plan
from unitfisher.planner import Planner
from unitfisher.precision import exactly
from unitfisher.reach import EmptyBatchError, UnseenLayersError
from unitfisher.statistics import bytes_of
from unitfisher.streaming import observe_all
from unitfisher.untouched import device_of, kept
from unitfisher.window import Window


class Instrument:
    """Measures a model with these options, and hands the measurements to a history.

    Args:
        model: The model whose passes are measured.
        options: How to measure.
        observer: Observes the layers; it has a planner for training passes.
        history: Receives every measurement.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        observer: Observer,
        history: History,
    ) -> None:
        self.model, self.options, self.observer, self.history = model, options, observer, history
        self.window = Window(options.window)
        self.newest: Measurement | None = None
        self._uncalled: set[str] = set()
        self._said: set[str] = set()

    @property
    def plan(self) -> Plan:
        """The plan of the newest measurement; before the first, as much of it as is known."""
        assert self._planner.newest is not None
        return self._planner.newest if self.newest is None else self.newest.plan

    @property
    def _planner(self) -> Planner:
        assert self.observer.planner is not None
        return self.observer.planner

    def measure_pass(self, seen: Seen, result: Any, targets: Tensor | None, step: int) -> None:
        """Measure a training pass before its graph is used; ignore an empty batch."""
        with exactly(device_of(self.model)):
            self._make_room()
            try:
                with kept(self.model):
                    observations = self.observer.observe(result, seen, targets)
            except EmptyBatchError:
                return
            except UnseenLayersError as error:
                self._say_once(f"a training pass is not measured: {error}")
                if error.samples:
                    self.window.pass_by(error.samples)
                return
            finally:
                seen.forget_gradients()
            pooled = self.window.pooled(observations)
            self._keep(self._prepared(pooled, self._planner), self._planner, step, "train")

    def measure_input(self, inputs: Any, targets: Tensor | None, step: int) -> None:
        """Run the model on an input, and measure that pass."""
        with exactly(device_of(self.model)):
            self._make_room()
            planner = self._planner.within(
                self._planner.budget.alone(pooled=bytes_of(self.window.tensors))
            )
            observer = replace(self.observer, planner=planner)
            observations = observe_now(self.model, inputs, observer, targets)
            self._keep(self._prepared(observations, planner), planner, step, "measure")

    def measure_loader(self, loader: Any, step: int) -> None:
        """Run the model on batch after batch, and measure all batches as one."""
        with exactly(device_of(self.model)), torch.random.fork_rng([]):  # loaders draw from it
            self._make_room()
            planner = self._planner.within(
                self._planner.budget.over_batches(beside=self.bytes_of_newest())
            )
            batches = Batches(self.model, loader, replace(self.observer, planner=planner))
            streamed = observe_all(batches, self.options.damping)
            self._keep(streamed, planner, step, "measure")

    def bytes_of_newest(self) -> int:
        return 0 if self.newest is None else bytes_of(self.newest.tensors)

    def _prepared(
        self, observations: dict[str, Observation], planner: Planner
    ) -> dict[str, Observation]:
        """Draw the rows asked for, and set the solver that is planned for each layer."""
        prepared = {}
        for name, observation in observations.items():
            cases = observation.cases
            if (rows := planner.budget.rows) is not None:
                cases = cases.drawn(rows, self.observer.chance.on(cases.delta.device))
            prepared[name] = replace(observation, cases=cases, solver=planner.solver_of(name))
        return prepared

    def _make_room(self) -> None:
        """Free what the newest measurement has solved: it is solved again on demand."""
        self.history.commit()
        if self.newest is not None:
            self.newest.forget_solved()

    def _keep(self, observations: Observations, planner: Planner, step: int, phase: str) -> None:
        assert planner.newest is not None
        if self.options.on_nonfinite == "raise":
            require_finite(observation.fault for observation in observations.values())
        self._name_uncalled(observations)
        measurement = Measurement(
            observations,
            self.observer.layers,
            self.observer.units,
            step,
            phase,
            self.options.damping,
            planner.newest,
            device_of(self.model),
        )
        if phase == "measure":
            measurement.statistics()  # in training wait: a gradient may come
        self.newest = measurement
        self.history.hold(measurement)

    def _name_uncalled(self, observations: Collection[str]) -> None:
        missing = self.observer.layers.keys() - set(observations) - self._uncalled
        missing -= {layer for layer, _ in self.observer.unfit}
        if missing:
            self._uncalled |= missing
            self._say_once(
                f"layers {', '.join(sorted(map(repr, missing)))} were not called in a measured "
                f"pass, or without a graph: they have no rows for it. (Frozen layers on frozen "
                f"inputs, no_grad and reentrant checkpointing leave no graph; compiled blocks, and "
                f"functions that read a layer's weight, do not call the layer)"
            )

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, UncoveredLayersWarning, stacklevel=2)
