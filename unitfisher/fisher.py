"""From one forward pass to every layer's cases, and to materialised unit Fishers.

The pass may be the user's own, in training: nothing is called twice, no gradient is stored, and
the graph is left for the user's backward.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unitfisher.capture import Call, Seen, capture
from unitfisher.cases import Folding, Observed, UnitCases
from unitfisher.errors import Estimator, columns, columns_together, send_all_back, send_back
from unitfisher.layers import LayerSelectionError, Layers, select
from unitfisher.likelihoods import Likelihood, OutputError, likelihood_of

Pick = None | int | str | Callable[[Any], Tensor]


class NonFiniteError(FloatingPointError):
    """Activations, logits or errors hold NaN or infinity."""


class Gradient(NamedTuple):
    """Gradient of the mean log-likelihood of observed labels, per unit."""

    g: Float[Tensor, "u d"]
    g0: Float[Tensor, " u"]

    @classmethod
    def of(cls, g: Float[Tensor, "u *d"], g0: Float[Tensor, " u"] | None) -> "Gradient":
        """Take a layer's own gradient; zero stands for the bias it does not have."""
        return cls(g.flatten(1), g.new_zeros(len(g)) if g0 is None else g0)


class Chance:
    """Our own source of chance, one generator a device: the global ones are never touched."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generators: dict[str, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        name = str(device)
        if name not in self.generators:
            self.generators[name] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[name]

    def state(self) -> dict[str, Tensor]:
        return {name: g.get_state() for name, g in self.generators.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, saved in state.items():
            self.on(torch.device(name)).set_state(saved.cpu())


@dataclass(frozen=True)
class Observation:
    """What one pass says of one layer."""

    cases: UnitCases
    gradient: Gradient | None
    finite: bool


@dataclass(frozen=True)
class Observer:
    """Which layers and units are observed, and how their Fisher is estimated."""

    layers: Mapping[str, nn.Module]
    estimator: Estimator
    units: Mapping[str, Int[Tensor, " u"]]
    chance: Chance
    output: Pick = None

    def observe(self, result: Any, seen: Seen, targets: Tensor | None) -> dict[str, Observation]:
        """Turn a pass into the cases of every layer that took part in it.

        Args:
            result: What the model's forward returned.
            seen: What `capture` saw of that forward.
            targets: Observed labels, for ``fisher="empirical"`` and for gradients; may be None.

        Raises:
            OutputError: The output does not fit the likelihood, or has no graph.
            LayerSelectionError: A layer's part in the pass cannot be told.
        """
        output = pick_output(result, self.output)
        z = self.estimator.likelihood.arrange(output.detach())
        _require_graph(output, seen)
        observed = self._observed(seen, samples=len(z))
        edges = [call.edge for call in seen.calls]
        foldings = {name: Folding(layer) for name, layer in observed.items()}
        together = columns_together(output, seen.net_numbers, self._convolutional)
        blocks = columns(z, self.estimator, self.chance.on(z.device), targets, together)
        for grads in send_all_back(output, edges, blocks):
            for name, by_call in _by_layer(seen.calls, grads).items():
                foldings[name].add(observed[name].errors(by_call))
        gradients = {} if targets is None else self._gradients(output, z, seen, observed, targets)
        return {
            name: _checked(folding.cases(), gradients.get(name), bool(z.isfinite().all()))
            for name, folding in foldings.items()
        }

    def _observed(self, seen: Seen, samples: int) -> dict[str, Observed]:
        sharing = self.estimator.sharing
        return {
            name: Observed(name, self.layers[name], calls, samples, sharing, self.units.get(name))
            for name, calls in seen.by_layer().items()
        }

    def _gradients(
        self,
        output: Tensor,
        z: Tensor,
        seen: Seen,
        observed: Mapping[str, Observed],
        targets: Tensor,
    ) -> dict[str, Gradient]:
        score = self.estimator.likelihood.score(z, targets).unsqueeze(0)
        grads = send_back(output, [call.edge for call in seen.calls], score)
        return {
            name: Gradient(*observed[name].gradient(observed[name].errors(by_call)))
            for name, by_call in _by_layer(seen.calls, grads).items()
        }

    @property
    def _convolutional(self) -> bool:
        return any(not isinstance(layer, nn.Linear) for layer in self.layers.values())


def unit_fisher(
    model: nn.Module,
    inputs: Any,
    *,
    layers: Layers = None,
    likelihood: str | Likelihood = "categorical",
    fisher: str = "exact",
    sharing: str = "expand",
    targets: Tensor | None = None,
    output: Pick = None,
    samples: int = 1,
    seed: int = 0,
) -> dict[str, Float[Tensor, "u e e"]]:
    """Materialise every unit's Fisher block, weights in ``weight[i].flatten()`` order, bias last.

    The model runs in eval mode and is left as it was. A layer without bias gives (u, d, d). This
    takes u·(d+1)² numbers a layer; `Monitor` gives the theorems' quantities without them.

    Args:
        model: Any module; its forward is called once.
        inputs: The model's input, or a tuple of its arguments.
        layers: Patterns, types or a predicate, as for `Monitor`.
        likelihood: "categorical", "bernoulli", "gaussian" or a Likelihood object.
        fisher: "exact", "mc", "rademacher" or "empirical".
        sharing: "expand", "joint" or "reduce" (positions that share weights).
        targets: Observed labels, for ``fisher="empirical"``.
        output: Picks the logits from what forward returns.
        samples: Columns for "mc" and "rademacher".
        seed: Of the drawn labels or signs.

    Raises:
        LayerSelectionError, OutputError, NonFiniteError: With the layer or shape and a way out.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 2))
    >>> {name: tuple(F.shape) for name, F in unit_fisher(model, torch.randn(10, 3)).items()}
    {'0': (4, 4, 4), '2': (2, 5, 5)}
    """
    chosen = select(model, layers)
    estimator = Estimator(likelihood_of(likelihood), fisher, samples, sharing)
    observer = Observer(chosen, estimator, {}, Chance(seed), output)
    _, observations = observe_now(model, inputs, observer, targets)
    blocks = {}
    for name, observation in observations.items():
        require_finite(name, observation)
        m = observation.cases.sums()
        blocks[name] = m.A if chosen[name].bias is None else m.F
    return blocks


def observe_now(
    model: nn.Module, inputs: Any, observer: Observer, targets: Tensor | None
) -> tuple[Seen, dict[str, Observation]]:
    """Run the model once in eval mode and observe that pass; leave the model as it was.

    Inputs are a tensor, a tuple of arguments or a mapping of keyword arguments.
    """
    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
    args = inputs if isinstance(inputs, tuple) else () if kwargs else (inputs,)
    with undisturbed(model), torch.inference_mode(False):
        with torch.enable_grad(), capture(observer.layers) as seen:
            result = model(*args, **kwargs)
        return seen, observer.observe(result, seen, targets)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode; at the end restore modes, buffers and random states."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(b, b._version, b.clone()) for b in model.buffers()]
    device = device_of(model)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, version, saved in buffers:
                if buffer._version != version:
                    buffer.copy_(saved)


def pick_output(result: Any, pick: Pick) -> Tensor:
    """Find the logits in what forward returned.

    Raises:
        OutputError: There is no such entry, it is no tensor, or the choice is ambiguous.
    """
    if callable(pick):
        found = pick(result)
    elif pick is None:
        found = _only_tensor(result)
    else:
        found = _entry(result, pick)
    if not isinstance(found, Tensor):
        raise OutputError(
            f"output={pick!r} gave {type(found).__name__}, not a tensor, from a "
            f"{type(result).__name__} {_contents(result)}"
        )
    return found


def _only_tensor(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result
    entries = _entries(result)
    tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    if "logits" in tensors:
        return tensors["logits"]
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    raise OutputError(
        f"the model returns a {type(result).__name__} {_contents(result)}: say which entry holds "
        f"the logits with output=, an index, key, attribute name or callable"
    )


def _entry(result: Any, pick: int | str) -> Any:
    try:
        return getattr(result, pick) if isinstance(pick, str) else result[pick]
    except (AttributeError, KeyError, IndexError, TypeError):
        entries = _entries(result)
    if pick in entries:
        return entries[pick]
    raise OutputError(
        f"output={pick!r} is not in the {type(result).__name__} that the model returns "
        f"{_contents(result)}"
    )


def _entries(result: Any) -> dict[Any, Any]:
    if isinstance(result, Mapping):
        return dict(result)
    if isinstance(result, Sequence):
        return dict(enumerate(result))
    return dict(vars(result)) if is_dataclass(result) or hasattr(result, "__dict__") else {}


def _contents(result: Any) -> str:
    entries = _entries(result)
    return "with " + ", ".join(map(repr, entries)) if entries else "without entries"


def _require_graph(output: Tensor, seen: Seen) -> None:
    if not seen.calls:
        raise LayerSelectionError(
            "none of the observed layers was called in this forward pass; a compiled model calls "
            "none: attach to the plain model and run that"
        )
    if not output.requires_grad:
        raise OutputError("the model's output has no graph: does forward detach it?")
    for call in seen.calls:
        if call.edge is None:
            raise LayerSelectionError(
                f"layer {call.layer!r} ran without a graph (no_grad, frozen with frozen inputs, or "
                f"reentrant checkpointing), so no error reaches it: leave it out with layers=..., "
                f"or use torch.utils.checkpoint(use_reentrant=False)"
            )


def _by_layer(
    calls: Sequence[Call], grads: Sequence[Tensor | None]
) -> dict[str, list[Tensor | None]]:
    found: dict[str, list[Tensor | None]] = {}
    for call, grad in zip(calls, grads, strict=True):
        found.setdefault(call.layer, []).append(grad)
    return found


def _checked(cases: UnitCases, gradient: Gradient | None, finite: bool) -> Observation:
    known = cases.a.isfinite().all() & cases.delta.isfinite().all()
    return Observation(cases, gradient, finite and bool(known))


def require_finite(name: str, observation: Observation) -> None:
    if not observation.finite:
        cases = observation.cases
        what = "the activations into" if not cases.a.isfinite().all() else "the errors at"
        raise NonFiniteError(
            f"{what} layer {name!r} hold NaN or infinity: nothing of this pass was recorded. "
            f"Lower the learning rate or look at the input; "
            f"on_nonfinite='record' keeps such measurements, marked as not finite"
        )


def device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
