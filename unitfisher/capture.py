"""What one forward pass shows: the activations into each layer, and where its errors will arrive.

Hooks stand on the layers for the length of one pass. Nothing is set on the user's modules, and a
gradient edge taken at once survives the in-place activations that break module backward hooks.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from unitfisher.layers import LayerSelectionError, at_units
from unitfisher.outputs import Averages, Taken, UnitMeans, means

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


@dataclass(slots=True)
class Call:
    """One call of a layer."""

    layer: str
    module: nn.Module
    x: Tensor  # as the layer received it
    version: int  # of that tensor: a later change in place would be seen
    y: Tensor  # the preactivations, as long as no nonlinearity changes them
    y_version: int
    edge: GradientEdge | None  # where ∂/∂net arrives; None when no graph is built
    y_sum: Float[Tensor, ""] | None  # NaN or infinite where any preactivation is
    taken: Taken | None = None  # None: no operation has followed yet
    nonlinearity: str | None = None

    @property
    def shape(self) -> torch.Size:
        return self.y.shape

    @property
    def activations(self) -> Tensor:
        return self.x.detach()

    def take(self, y: Tensor, nonlinearity: str | None = None) -> None:
        """Take the units' outputs as they are now: later operations may change them in place."""
        self.nonlinearity = nonlinearity
        self.taken = Taken.of(self.layer, nonlinearity, at_units(self.module, y.detach()))

    def settled(self) -> Taken:
        """Return what was taken; the preactivations if nothing was."""
        if self.taken is None:
            changed = _version(self.y) != self.y_version  # by what no function mode sees
            self.take(torch.full_like(self.y, torch.nan) if changed else self.y)
        assert self.taken is not None
        return self.taken

    def require_unchanged(self) -> None:
        if _version(self.x) != self.version:
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
        sums = [x for call in self.calls for x in (call.activations.sum(), call.y_sum)]
        if all_finite(sums):
            return None  # what follows looks again: a sum may overflow
        for call in self.calls:
            if not call.activations.isfinite().all():
                return f"the activations into layer {call.layer!r}"
            if call.y_sum is not None and not call.y_sum.isfinite():
                return f"the preactivations of layer {call.layer!r}"
        return None

    @property
    def net_numbers(self) -> int:
        """Count the preactivations of the pass: what one column of errors takes."""
        return sum(call.shape.numel() for call in self.calls)

    def means(self) -> dict[str, UnitMeans]:
        """Average every layer's outputs."""
        return means([call.settled() for call in self.calls])

    def averages(self) -> Averages:
        """Return the same, all layers end to end."""
        return Averages.of([call.settled() for call in self.calls])


@contextmanager
def capture(layers: Mapping[str, nn.Module], *, errors: bool = True) -> Iterator[Seen]:
    """Watch these layers, and the nonlinearity that follows each, until the block ends.

    Args:
        layers: By name.
        errors: Whether errors are to be sent back, for which all must be finite.
    """
    seen = Seen()
    follow = _Follow(seen.retained)
    handles = [
        layer.register_forward_hook(
            _watch(name, seen, follow, errors), prepend=True, with_kwargs=True
        )
        for name, layer in layers.items()
    ]
    try:
        with follow:
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def _watch(name: str, seen: Seen, follow: "_Follow", errors: bool) -> Callable[..., None]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return  # inside vmap or grad: shapes and levels are not those of the pass
        with torch._C.DisableTorchFunction():  # no need to follow what is done here
            if y.numel() == 0:
                return  # an expert to which no row was sent
            x = args[0] if args else kwargs["input"]
            edge = get_gradient_edge(y) if y.requires_grad else None
            total = _sum(y.detach()) if errors else None
            call = Call(name, layer, x, _version(x), y, _version(y), edge, total)
            seen.calls.append(call)
            follow.open[id(y)] = call, call.y_version, y

    return hook


class _Follow(TorchFunctionMode):
    """Follows each preactivation through normalisation and dropout to its nonlinearity.

    A function mode sees ``F.elu(x)``, ``x.relu_()`` and ``nn.ELU()(x)`` alike; module hooks would
    see only the last.
    """

    def __init__(self, retained: list[Tensor]) -> None:
        super().__init__()
        self.retained = retained
        self.open: dict[int, tuple[Call, int, Tensor]] = {}  # by id: held, so that it stays theirs

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        call = self._followed(args or kwargs.values()) if self.open else None
        result = func(*args, **kwargs) if call is None else self._step(call, func, args, kwargs)
        if func is Tensor.retain_grad:
            self.retained.append(args[0])
        return result

    def _followed(self, args: Iterable[Any]) -> Call | None:
        """Whose preactivation is read? No one's any more once a sum in place has changed it."""
        for x in args:
            if id(x) in self.open:
                call, version, y = self.open[id(x)]
                if _version(y) == version:
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
            call.taken is None
            and not nonlinear
            and not (transparent and _is_pure(func, args, kwargs))
        ):
            call.take(call.y)
        result = func(*args, **kwargs)
        if transparent:
            self.open[id(result)] = call, _version(result), result
        elif nonlinear and call.nonlinearity is None:
            whole = isinstance(result, Tensor) and result.shape == call.shape  # no ``max`` of rows
            call.take(result if whole else call.y, name if whole else None)
            if whole:
                self.open = {i: held for i, held in self.open.items() if held[0] is not call}
        return result


def _version(x: Tensor) -> int:
    try:
        return x._version
    except RuntimeError:  # tensors of inference mode have none
        return 0


def all_finite(numbers: Sequence[Float[Tensor, ""] | None]) -> bool:
    """Look at numbers from whatever device so that the host waits but once."""
    given = [x for x in numbers if x is not None]
    alike = len({(x.dtype, x.device) for x in given}) <= 1
    first = given[0].device
    together = torch.stack(given if alike else [x.to(first, torch.float64) for x in given])
    return bool(together.isfinite().all())


def _sum(x: Tensor) -> Float[Tensor, ""]:
    """In single precision at least: sums of half-precision numbers soon overflow."""
    return x.sum(dtype=torch.float32) if x.element_size() < 4 else x.sum()


def _is_pure(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Dropout may work in place: its fourth argument."""
    return not (func.__name__.endswith("_") or args[3:4] == (True,) or kwargs.get("inplace"))
