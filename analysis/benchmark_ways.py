"""Ways of observing a training step, one small function each.

Each prepares a Setting and returns what is timed: a whole training step with what it observes,
unless its name says otherwise.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch.nn.functional as F
from benchmark_cases import Run, Setting, plain_training, training_step

import unitfisher
from unitfisher.capture import capture
from unitfisher.chain import Chain
from unitfisher.chance import Chance
from unitfisher.columns import Estimator
from unitfisher.layers import select
from unitfisher.likelihoods import likelihood_of
from unitfisher.observer import Observer
from unitfisher.precision import exactly
from unitfisher.untouched import device_of


def idle_hooks(at: Setting) -> Run:
    """A Monitor that never measures."""
    at.after.enter_context(unitfisher.Monitor(at.model, every=lambda step: False))
    return partial(training_step, at)


def activation_statistics(at: Setting) -> Run:
    """The mean and variance of every unit's output, of the training pass itself, recorded."""
    recording(at, every=lambda step: False, activations=1)
    return partial(training_step, at)


def keep(at: Setting) -> Run:
    """Keep activations by `capture`, and δ from the training's own backward pass."""
    layers, chain = select(at.model, None), Chain()

    def run() -> object:
        kept: list[object] = []
        at.model.zero_grad()
        with capture(layers, follow=not chain.links) as seen:
            logits = at.model(at.x)
        chain.settle(seen, logits)
        for call in seen.calls:
            assert call.edge is not None
            call.edge.node.register_prehook(kept.extend)
        F.cross_entropy(logits, at.y).backward()
        return seen, kept

    return run


def squared_errors(at: Setting, fisher: str) -> Run:
    """D = E_y δ² of all units from the step's own graph; nothing is solved."""
    estimator = Estimator(likelihood_of("categorical"), fisher)
    observer, chain = Observer(select(at.model, None), estimator, {}, Chance(0)), Chain()
    device = device_of(at.model)

    def run() -> object:
        at.model.zero_grad()
        with capture(observer.layers, follow=not chain.links) as seen:
            logits = at.model(at.x)
        chain.settle(seen, logits)
        with exactly(device):
            observed = observer.observe(logits, seen, None)
        F.cross_entropy(logits, at.y).backward()
        return observed

    return run


def everything(at: Setting, fisher: str) -> Run:
    """Every unit's c, E_q(a), s, k, corrected mean and n_eff, written to a record."""
    recording(at, fisher=fisher, every=1)
    return partial(training_step, at)


def natural_gradients(at: Setting, fisher: str, rows: int | None = None) -> Run:
    """The same, and the unit natural gradients of all units of all layers."""
    monitor = recording(at, fisher=fisher, rows=rows, every=1)

    def run() -> object:
        training_step(at)
        return monitor.natural_gradient()

    return run


def training_observed(at: Setting) -> Run:
    """Fifty training steps of which the first is measured and recorded."""
    recording(at, every=50)
    return plain_training(at, steps=50)


def training_with_overhead(at: Setting) -> Run:
    """Training in which the Monitor uses all of the overhead that it is allowed."""
    recording(at, overhead=0.05)
    return plain_training(at, steps=250)


def torch_only(prepare: Callable[[Setting], Run], at: Setting) -> Run:
    """The same without the compiled kernels."""
    run = prepare(at)

    def plainly() -> object:
        with patch.dict(os.environ, UNITFISHER_NATIVE="0"):
            return run()

    return plainly


def recording(at: Setting, **options: Any) -> unitfisher.Monitor:
    folder = at.after.enter_context(tempfile.TemporaryDirectory())
    monitor = unitfisher.Monitor(at.model, record=f"{folder}/run", **options)
    return at.after.enter_context(monitor)


@dataclass(frozen=True)
class MeasuredStep:
    """A training step that a Monitor observes, and then solves."""

    at: Setting
    monitor: unitfisher.Monitor
    solve: Callable[[], object]

    def __call__(self) -> object:
        self.observe()
        return self.solve()

    def observe(self) -> None:
        training_step(self.at)


def measured_step(at: Setting, **options: Any) -> MeasuredStep:
    """s, k and the rest of all units, without a record."""
    monitor = at.after.enter_context(unitfisher.Monitor(at.model, every=1, **options))
    return MeasuredStep(at, monitor, lambda: monitor.latest)


def natural_gradients_alone(at: Setting, **options: Any) -> MeasuredStep:
    """As `natural_gradients`, without a record."""
    measured = measured_step(at, **options)
    return replace(measured, solve=measured.monitor.natural_gradient)


def unit_fishers(at: Setting) -> Run:
    """Materialised exact blocks of all units, without a training step."""
    return partial(unitfisher.unit_fisher, at.model, at.x)


def per_sample_gradients(at: Setting) -> Run:
    """Gradients of every parameter for each sample, without a training step."""
    return partial(unitfisher.per_sample_gradients, at.model, at.x, at.y)


def measured_now(at: Setting) -> Run:
    """Everything of all units of the first layer, exact, without a training step."""
    monitor = unitfisher.Monitor(at.model, ["0"], every=lambda step: False)
    return partial(at.after.enter_context(monitor).measure, at.x)
