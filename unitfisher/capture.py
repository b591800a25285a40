"""What one forward pass shows: the activations into each layer, and where its errors will arrive.

Hooks stand on the layers for the length of one pass. Nothing is set on the user's modules, and a
gradient edge taken at once survives the in-place activations that break module backward hooks.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from unitfisher.layers import LayerSelectionError, at_units

NONLINEARITIES = frozenset(
    [
        "celu",
        "clamp",
        "clamp_min",
        "clip",
        "elu",
        "gelu",
        "hardshrink",
        "hardsigmoid",
        "hardswish",
        "hardtanh",
        "leaky_relu",
        "logsigmoid",
        "max",
        "maximum",
        "minimum",
        "mish",
        "prelu",
        "relu",
        "relu6",
        "rrelu",
        "selu",
        "sigmoid",
        "silu",
        "softplus",
        "softshrink",
        "softsign",
        "tanh",
        "tanhshrink",
        "threshold",
        "where",
    ]
)
TRANSPARENT = frozenset(
    [
        "alpha_dropout",
        "batch_norm",
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "feature_alpha_dropout",
        "group_norm",
        "instance_norm",
        "layer_norm",
        "rms_norm",
    ]
)


class UnitMeans(NamedTuple):
    """Mean and variance of each unit's own output over samples and positions."""

    mean: Float[Tensor, " u"]
    var: Float[Tensor, " u"]  # population variance
    cases: int
    nonlinearity: str | None  # the function that followed the layer; None: linear

    @classmethod
    def of(cls, y: Float[Tensor, "n t u"], nonlinearity: str | None) -> "UnitMeans":
        y = y.flatten(0, 1)
        y = y if y.dtype == torch.float64 else y.float()
        mean = y.mean(0)
        var = ((y - mean) ** 2).mean(0)  # a tenth of torch.var_mean's time over the first axis
        return cls(mean, var, len(y), nonlinearity)

    def joined(self, other: "UnitMeans") -> "UnitMeans":
        """Return the statistics of both sets of cases together."""
        cases = self.cases + other.cases
        p, q = self.cases / cases, other.cases / cases
        shift = other.mean - self.mean
        var = p * self.var + q * other.var + p * q * shift**2
        return UnitMeans(self.mean + q * shift, var, cases, self.nonlinearity)


@dataclass
class Call:
    """One call of a layer."""

    layer: str
    activations: Tensor  # as the layer received them
    version: int  # of that tensor: a later change in place would be seen
    shape: torch.Size  # of the layer's output
    edge: GradientEdge | None  # where ∂/∂net arrives; None when no graph is built
    net: Float[Tensor, " u"]  # mean preactivation, NaN or infinite where any is
    means: UnitMeans  # of the preactivation, until a nonlinearity follows

    def require_unchanged(self) -> None:
        if _version(self.activations) != self.version:
            raise LayerSelectionError(
                f"the input of layer {self.layer!r} was changed in place after the layer read it, "
                f"so its activations are gone; make that operation out of place, or leave the "
                f"layer out"
            )


@dataclass
class Seen:
    """The calls of one forward pass, in order."""

    calls: list[Call] = field(default_factory=list)
    retained: list[Tensor] = field(default_factory=list)  # on which forward called retain_grad

    def forget_gradients(self) -> None:
        """Take back what sending errors through the graph has left on retained tensors."""
        for tensor in self.retained:
            tensor.grad = None

    def by_layer(self) -> dict[str, list[Call]]:
        found: dict[str, list[Call]] = {}
        for call in self.calls:
            found.setdefault(call.layer, []).append(call)
        return found

    def fault(self) -> str | None:
        """Name the first place in the pass that holds NaN or infinity."""
        sums = [total for call in self.calls for total in (call.activations.sum(), call.net.sum())]
        if bool(torch.stack([total.double() for total in sums]).isfinite().all()):
            return None  # one look at all; what follows looks again, where a sum may overflow too
        for call in self.calls:
            if not call.activations.isfinite().all():
                return f"the activations into layer {call.layer!r}"
            if not call.net.isfinite().all():
                return f"the preactivations of layer {call.layer!r}"
        return None

    @property
    def net_numbers(self) -> int:
        """Count the preactivations of the pass: what one column of errors takes."""
        return sum(call.shape.numel() for call in self.calls)

    def means(self) -> dict[str, UnitMeans]:
        """Join each layer's calls."""
        joined: dict[str, UnitMeans] = {}
        for call in self.calls:
            first = joined.get(call.layer)
            joined[call.layer] = first.joined(call.means) if first else call.means
        return joined


@contextmanager
def capture(layers: Mapping[str, nn.Module]) -> Iterator[Seen]:
    """Watch these layers, and the nonlinearity that follows each, until the block ends."""
    seen = Seen()
    follow = _Follow(seen.retained)
    handles = [
        layer.register_forward_hook(_watch(name, seen, follow), prepend=True, with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        with follow:
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def _watch(name: str, seen: Seen, follow: "_Follow") -> Callable[..., None]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return  # inside vmap or grad: shapes and levels are not those of the pass
        with torch._C.DisableTorchFunction():  # no need to follow what is done here
            see(layer, args[0] if args else kwargs["input"], y)

    def see(layer: nn.Module, x: Tensor, y: Tensor) -> None:
        if y.numel() == 0:
            return  # an expert to which no row was sent
        edge = get_gradient_edge(y) if y.requires_grad else None
        means = UnitMeans.of(at_units(layer, y.detach()), nonlinearity=None)
        call = Call(name, x.detach(), _version(x), y.shape, edge, means.mean, means)
        seen.calls.append(call)
        follow.start(y, layer, call)

    return hook


class _Follow(TorchFunctionMode):
    """Follows each preactivation through normalisation and dropout to its nonlinearity.

    A function mode sees ``F.elu(x)``, ``x.relu_()`` and ``nn.ELU()(x)`` alike; module hooks would
    see only the last.
    """

    def __init__(self, retained: list[Tensor]) -> None:
        super().__init__()
        self.retained = retained
        self.open: dict[int, tuple[ReferenceType[Tensor], int, nn.Module, Call]] = {}

    def start(self, y: Tensor, layer: nn.Module, call: Call) -> None:
        self.open[id(y)] = ref(y), _version(y), layer, call

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        followed = self._followed(args or (kwargs or {}).values())
        result = func(*args, **(kwargs or {}))
        if func is Tensor.retain_grad:
            self.retained.append(args[0])
        if followed is not None:
            self._step(getattr(func, "__name__", "").rstrip("_"), result, *followed)
        return result

    def _followed(self, args: Iterable[Any]) -> tuple[nn.Module, Call] | None:
        """Whose preactivation is read? No one's any more once a sum in place has changed it."""
        for x in args:
            if id(x) in self.open:
                alive, version, layer, call = self.open[id(x)]
                if isinstance(x, Tensor) and alive() is x and _version(x) == version:
                    return layer, call
        return None

    def _step(self, name: str, result: Any, layer: nn.Module, call: Call) -> None:
        if name in TRANSPARENT:
            self.start(result, layer, call)
        elif name in NONLINEARITIES and call.means.nonlinearity is None:
            if not isinstance(result, Tensor) or result.shape != call.shape:
                return  # ``max`` over an axis, say
            call.means = UnitMeans.of(at_units(layer, result.detach()), nonlinearity=name)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
