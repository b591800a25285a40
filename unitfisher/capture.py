"""Capture of one forward pass: the activations into each layer, and where its errors will arrive.

The layers have hooks for that pass only. No attribute is set on the user's modules, and a gradient
edge taken at once survives in-place activations, which break module backward hooks.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from unitfisher.attention import Projection, WatchedLinear
from unitfisher.calls import Call, Seen, Unfit, version_of
from unitfisher.following import Follow
from unitfisher.forms import SHAPELESS, other_form, shapeless
from unitfisher.kinds import LayerSelectionError


class Hook:
    """A hook that does nothing in copies and pickles of its module."""

    def __init__(self, act: Callable[..., None]) -> None:
        self.act = act

    def __call__(self, *args: Any) -> None:
        self.act(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")  # does nothing, and unpickles anywhere


@contextmanager
def capture(
    layers: Mapping[str, nn.Module], *, follow: bool = True, look: bool = True
) -> Iterator[Seen]:
    """WatchedLinear these layers, and the nonlinearity that follows each, until the block ends.

    Args:
        layers: The layers to watch, by name.
        follow: Follow function calls to find the nonlinearities; not needed if a `Chain` is known.
        look: Check that layers multiply weight and input; not needed for averages of outputs.
    """
    seen = Seen()
    following = Follow(seen.retained) if follow else None
    handles = [
        layer.register_forward_hook(
            Hook(partial(_note, name, seen, following, look)), prepend=True, with_kwargs=True
        )
        for name, layer in layers.items()
    ]
    watches = _watches(layers, seen, following)
    for watch in watches:
        attention = watch.attention
        handles += [
            attention.register_forward_pre_hook(Hook(watch.begin)),
            attention.register_forward_hook(Hook(watch.end), always_call=True),
        ]
    try:
        with following or nullcontext():
            yield seen
    finally:
        for handle in handles:
            handle.remove()
        for watch in watches:
            watch.end()  # in case the pass was interrupted


def _watches(
    layers: Mapping[str, nn.Module], seen: Seen, following: Follow | None
) -> list[WatchedLinear]:
    """Return a watch for each attention whose products are among the layers."""

    def note(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        _note(name, seen, following, False, layer, (x,), {}, y)

    def refuse(name: str, why: str) -> None:
        seen.unfit[name] = Unfit("MultiheadAttention", why)

    of_attention: dict[nn.Module, dict[str, Projection]] = {}
    for name, layer in layers.items():
        if isinstance(layer, Projection):
            of_attention.setdefault(layer.attention, {})[name] = layer
    return [WatchedLinear(projections, note, refuse) for projections in of_attention.values()]


def _note(
    name: str,
    seen: Seen,
    following: Follow | None,
    look: bool,
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    y: Any,
) -> None:
    """Note a call of a layer, as its forward hook."""
    if seen.paused or torch._C._functorch.peek_interpreter_stack() is not None:
        return  # inside vmap or grad: these tensors are not those of the pass
    if not isinstance(y, Tensor):
        raise LayerSelectionError(
            f"layer {name!r} ({type(layer).__name__}) returns a {type(y).__name__}, not the "
            f"preactivations of its units: leave it out with layers=..."
        )
    with torch._C.DisableTorchFunction():  # hides what is done here from `Follow`
        if y.numel() == 0:
            return  # for example an expert that receives no rows
        x = args[0] if args else _only_input(name, layer, kwargs)
        if shapeless(layer, x, y):
            seen.unfit[name] = Unfit(type(layer).__name__, SHAPELESS)
            return
        if look and (why := other_form(layer, x, y)):
            seen.unfit[name] = Unfit(type(layer).__name__, why)
        edge = get_gradient_edge(y) if y.requires_grad else None
        call = Call(name, layer, x, version_of(x), y, version_of(y), edge)
        seen.calls.append(call)
        if following is not None:
            following.open[id(y)] = call, call.y_version, y


def _only_input(name: str, layer: nn.Module, kwargs: Mapping[str, Any]) -> Tensor:
    tensors = [value for value in kwargs.values() if isinstance(value, Tensor)]
    if len(tensors) != 1:
        raise LayerSelectionError(
            f"layer {name!r} ({type(layer).__name__}) is called with {', '.join(kwargs)}, "
            f"and which of these its units receive is not known: leave it out with layers=..."
        )
    return tensors[0]
