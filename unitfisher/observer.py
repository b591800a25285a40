"""From one forward pass to every layer's cases.

The pass may be the user's own, in training: the model is not called again, no gradient is stored,
and the graph is kept for the user's backward pass.
"""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from unitfisher.backward import Backward, bytes_of_column, columns_together
from unitfisher.calls import Call, Seen, Unfit, all_finite
from unitfisher.capture import capture
from unitfisher.cascade import Cascade
from unitfisher.cases import UnitCases
from unitfisher.chain import Chain
from unitfisher.chance import Chance
from unitfisher.columns import Estimator, columns
from unitfisher.forward import Pick, arguments, eagerly, pick_output
from unitfisher.kinds import convolves
from unitfisher.layers import UncoveredLayersWarning
from unitfisher.likelihoods import Classes, Output
from unitfisher.memory import within
from unitfisher.observation import Gradient, Observation
from unitfisher.observed import Folding, Observed
from unitfisher.planner import Planner
from unitfisher.precision import measurable
from unitfisher.reach import EmptyBatchError, UnseenLayersError, edges, told
from unitfisher.shapes import shapes_of
from unitfisher.untouched import undisturbed


@dataclass(frozen=True)
class Observer:
    """Which layers and units are observed, and how their Fisher is estimated."""

    layers: Mapping[str, nn.Module]
    estimator: Estimator
    units: Mapping[str, Int[Tensor, " u"]]
    chance: Chance
    output: Pick = None
    planner: Planner | None = None
    unfit: set[tuple[str, Unfit]] = field(default_factory=set)  # layers warned about

    def observe(self, result: Any, seen: Seen, targets: Tensor | None) -> dict[str, Observation]:
        """Return the observation of every layer that took part in a pass.

        Args:
            result: What the model's forward returned.
            seen: What `capture` saw of that forward.
            targets: Observed labels, for ``fisher="empirical"`` and for gradients; may be None.

        Raises:
            OutputError: The output does not fit the likelihood, or has no graph.
            LayerSelectionError: No observed layer was called, or one cannot be observed.
            MemoryBudgetError: The measurement would take too much.
        """
        with torch.enable_grad():  # a callable output= may compute
            output = pick_output(result, self.output)
        if output.numel() == 0:
            raise EmptyBatchError(f"the batch is empty: the output has shape {tuple(output.shape)}")
        z = measurable(self.estimator.likelihood.arrange(output.detach()))
        z = z.float() if z.element_size() < 4 else z  # small probabilities keep digits
        try:
            arriving = edges(output, seen)
        except UnseenLayersError as error:
            error.samples = 0 if seen.calls else len(z)
            raise
        self._name_unfit(seen)
        sound = self._sound(z)
        if isinstance(targets, Tensor):
            targets = targets.to(z.device)
        drawable = torch.where(sound, z, 0.0)  # labels can be drawn even from a faulty pass
        with self._planned(seen, z):
            cases, gradients = self._sent_back(output, drawable, arriving, seen, targets)
        means, faults = seen.means(), _faults(seen, z.masked_fill(sound, 0.0), cases)
        return {
            name: Observation(cases[name], means[name], gradients.get(name), faults.get(name))
            for name in cases
        }

    def _sent_back(
        self,
        output: Tensor,
        z: Output,
        arriving: Sequence[GradientEdge],
        seen: Seen,
        targets: Tensor | None,
    ) -> tuple[dict[str, UnitCases], dict[str, Gradient]]:
        """Send the columns back, and the score of the targets; return cases and gradients."""
        observed = self._observed(seen, samples=len(z))
        replicates = self.estimator.replicates
        foldings = {name: Folding(layer, replicates) for name, layer in observed.items()}
        column = bytes_of_column(z, seen, self.estimator)
        together = columns_together(output, column, self._convolutional)
        cascade = Cascade.of(seen, output) if replicates < 2 else None
        chance = self.chance.on(z.device)
        independent = cascade is not None
        blocks = columns(z, self.estimator, chance, targets, together, independent=independent)
        half = any(call.y.dtype == torch.float16 for call in seen.calls)
        backward = Backward(output, arriving, half)
        for grads in (backward.send_all_back if cascade is None else cascade.send)(blocks):
            for name, by_call in _by_layer(seen.calls, grads).items():
                foldings[name].add(observed[name].errors(by_call))
        gradients: dict[str, Gradient] = {}
        if targets is not None:
            score = self.estimator.likelihood.score(z, targets).unsqueeze(0)
            for name, by_call in _by_layer(seen.calls, backward.send_back(score)).items():
                g, g0 = observed[name].gradient(observed[name].errors(by_call))
                gradients[name] = Gradient(g, None if self.layers[name].bias is None else g0)
        return {name: folded.cases() for name, folded in foldings.items()}, gradients

    def _name_unfit(self, seen: Seen) -> None:
        """Warn once of each layer that is left out."""
        new = dict(seen.unfit.items() - self.unfit)
        self.unfit.update(new.items())
        for layers in told(new):
            warnings.warn(
                f"not observed: {layers}, or choose layers=... without them",
                UncoveredLayersWarning,
                stacklevel=2,
            )

    def _sound(self, z: Output) -> Bool[Tensor, "n t y"]:
        """Which logits are valid: finite ones, and -inf for a class of probability 0."""
        if isinstance(self.estimator.likelihood, Classes):
            return z.isfinite() | (z == -torch.inf)
        return z.isfinite()

    def _planned(self, seen: Seen, z: Output) -> AbstractContextManager[None]:
        """Plan the measurement and set its workspace; refuse it if it takes too much memory."""
        if self.planner is None:
            return nullcontext()
        shapes = shapes_of(seen, self.layers, self.units, self.estimator, z)
        column = bytes_of_column(z, seen, self.estimator)
        return within(self.planner.plan(shapes, column).workspace)

    def _observed(self, seen: Seen, samples: int) -> dict[str, Observed]:
        sharing = self.estimator.sharing
        return {
            name: Observed(name, self.layers[name], calls, samples, sharing, self.units.get(name))
            for name, calls in seen.by_layer().items()
        }

    @property
    def _convolutional(self) -> bool:
        return any(map(convolves, self.layers.values()))


def observe_now(
    model: nn.Module, inputs: Any, observer: Observer, targets: Tensor | None
) -> dict[str, Observation]:
    """Run the model once in eval mode and observe that pass; leave the model as it was.

    Inputs are a tensor, a tuple of arguments or a mapping of keyword arguments.
    """
    args, kwargs = arguments(inputs)
    with undisturbed(model), torch.inference_mode(False):
        with torch.enable_grad(), eagerly(), capture(observer.layers) as seen:
            result = model(*args, **kwargs)
        Chain().settle(seen, result)
        return observer.observe(result, seen, targets)


def _by_layer(
    calls: Sequence[Call], grads: Sequence[Tensor | None]
) -> dict[str, list[Tensor | None]]:
    found: dict[str, list[Tensor | None]] = {}
    for call, grad in zip(calls, grads, strict=True):
        found.setdefault(call.layer, []).append(grad)
    return found


def _faults(seen: Seen, unsound: Output, cases: Mapping[str, UnitCases]) -> dict[str, str]:
    """Name where NaN or infinity is, for each layer it reaches; the host waits once if none is."""
    errors = {name: layer_cases.delta for name, layer_cases in cases.items()}
    if all_finite([*seen.numbers, unsound, *errors.values()]):
        return {}
    fault = seen.fault() or (None if all_finite([unsound]) else "the logits after the last layer")
    if fault is not None:
        return dict.fromkeys(cases, fault)
    return {n: f"the errors at layer {n!r}" for n, x in errors.items() if not x.isfinite().all()}
