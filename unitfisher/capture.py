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
from jaxtyping import Float, Float64
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


FEW = 2**16  # numbers: outputs are copied then, and averaged together with others


class UnitMeans(NamedTuple):
    """Mean and variance of each unit's own output over samples and positions."""

    mean: Float[Tensor, " u"]
    var: Float[Tensor, " u"]  # population variance
    cases: int
    nonlinearity: str | None  # the function that followed the layer; None: linear

    @classmethod
    def of(cls, y: Float[Tensor, "n t u"], nonlinearity: str | None) -> "UnitMeans":
        y = y if y.dtype == torch.float64 else y.float()
        mean = y.mean((0, 1))
        var = (y - mean).square_().mean((0, 1))  # faster than torch.var_mean over the first axes
        return cls(mean, var, y.shape[0] * y.shape[1], nonlinearity)

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
    module: nn.Module
    activations: Tensor  # as the layer received them
    version: int  # of that tensor: a later change in place would be seen
    net: Tensor  # the preactivations, as long as no nonlinearity changes them
    net_version: int
    net_sum: Float[Tensor, ""]  # NaN or infinite where any preactivation is
    edge: GradientEdge | None  # where ∂/∂net arrives; None when no graph is built
    nonlinearity: str | None = None
    output: Float[Tensor, "n t u"] | UnitMeans | None = None  # None: not taken yet

    @property
    def shape(self) -> torch.Size:
        return self.net.shape

    def take(self, y: Tensor, nonlinearity: str | None = None) -> None:
        """Take the units' outputs as they are now: later operations may change them in place."""
        at = at_units(self.module, y.detach())
        self.nonlinearity = nonlinearity
        self.output = at.clone() if at.numel() <= FEW else UnitMeans.of(at, nonlinearity)

    def settled(self) -> Float[Tensor, "n t u"] | UnitMeans:
        """Return what was taken; the preactivations if nothing was."""
        if self.output is None:
            changed = _version(self.net) != self.net_version  # by what no function mode sees
            self.take(torch.full_like(self.net, torch.nan) if changed else self.net)
        assert self.output is not None
        return self.output

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
        sums = one_look(x for call in self.calls for x in (call.activations.sum(), call.net_sum))
        if bool(sums.isfinite().all()):
            return None  # what follows looks again: a sum may overflow
        for call in self.calls:
            if not call.activations.isfinite().all():
                return f"the activations into layer {call.layer!r}"
            if not call.net_sum.isfinite():
                return f"the preactivations of layer {call.layer!r}"
        return None

    @property
    def net_numbers(self) -> int:
        """Count the preactivations of the pass: what one column of errors takes."""
        return sum(call.shape.numel() for call in self.calls)

    @property
    def largest(self) -> int:
        """Count the numbers of the largest tensor that goes into a layer or comes out of it."""
        return max(n for of in self.calls for n in (of.activations.numel(), of.shape.numel()))

    def means(self) -> dict[str, UnitMeans]:
        """Join each layer's calls."""
        joined: dict[str, UnitMeans] = {}
        for call, means in zip(self.calls, self._means_of_calls(), strict=True):
            first = joined.get(call.layer)
            joined[call.layer] = first.joined(means) if first else means
        return joined

    def _means_of_calls(self) -> list[UnitMeans]:
        """Outputs that were kept are averaged together: few operations for many small layers."""
        kept: dict[object, list[tuple[int, Call, Tensor]]] = {}
        found: dict[int, UnitMeans] = {}
        for i, call in enumerate(self.calls):
            output = call.settled()
            if isinstance(output, UnitMeans):
                found[i] = output
            else:
                form = output.shape[:2], output.dtype, output.device
                kept.setdefault(form, []).append((i, call, output))
        for alike in kept.values():
            outputs = [output for _, _, output in alike]
            together = UnitMeans.of(torch.cat(outputs, -1), None)
            units = [output.shape[-1] for output in outputs]
            parts = zip(together.mean.split(units), together.var.split(units), strict=True)
            for (i, call, _), (mean, var) in zip(alike, parts, strict=True):
                found[i] = UnitMeans(mean, var, together.cases, call.nonlinearity)
        return [found[i] for i in range(len(self.calls))]


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
        net = y.detach()
        call = Call(name, layer, x.detach(), _version(x), net, _version(y), _sum(net), edge)
        seen.calls.append(call)
        follow.start(y, call)

    return hook


class _Follow(TorchFunctionMode):
    """Follows each preactivation through normalisation and dropout to its nonlinearity.

    A function mode sees ``F.elu(x)``, ``x.relu_()`` and ``nn.ELU()(x)`` alike; module hooks would
    see only the last.
    """

    def __init__(self, retained: list[Tensor]) -> None:
        super().__init__()
        self.retained = retained
        self.open: dict[int, tuple[ReferenceType[Tensor], int, Call]] = {}

    def start(self, y: Tensor, call: Call) -> None:
        self.open[id(y)] = ref(y), _version(y), call

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        call = self._followed(args or kwargs.values())
        result = func(*args, **kwargs) if call is None else self._step(call, func, args, kwargs)
        if func is Tensor.retain_grad:
            self.retained.append(args[0])
        return result

    def _followed(self, args: Iterable[Any]) -> Call | None:
        """Whose preactivation is read? No one's any more once a sum in place has changed it."""
        for x in args:
            if id(x) in self.open:
                alive, version, call = self.open[id(x)]
                if isinstance(x, Tensor) and alive() is x and _version(x) == version:
                    return call
        return None

    def _step(
        self,
        call: Call,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        name = getattr(func, "__name__", "").rstrip("_")
        transparent, nonlinear = name in TRANSPARENT, name in NONLINEARITIES
        if (
            call.output is None
            and not nonlinear
            and not (transparent and _is_pure(func, args, kwargs))
        ):
            call.take(call.net)
        result = func(*args, **kwargs)
        if transparent:
            self.start(result, call)
        elif nonlinear and call.nonlinearity is None:
            whole = isinstance(result, Tensor) and result.shape == call.shape  # no ``max`` of rows
            call.take(result if whole else call.net, name if whole else None)
        return result


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def one_look(numbers: Iterable[Float[Tensor, ""]]) -> Float64[Tensor, " m"]:
    """Put numbers together, from whatever device, so that the host waits but once."""
    first, *others = numbers
    return torch.stack([x.to(first.device, torch.float64) for x in (first, *others)])


def _sum(x: Tensor) -> Float[Tensor, ""]:
    """In single precision at least: sums of half-precision numbers soon overflow."""
    return x.sum(dtype=torch.float32) if x.element_size() < 4 else x.sum()


def _is_pure(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Dropout may work in place: its fourth argument."""
    return not (func.__name__.endswith("_") or args[3:4] == (True,) or kwargs.get("inplace"))
