"""Every supported layer kind, brought to one form, after which the mathematics is written once.

Incoming activations become (g, n, t, d): groups, samples, positions that share the weights,
inputs of a unit in the order of ``weight[i].flatten()``; those of a convolution stay `Patches`
until they are asked for. What stands at the units (preactivation, error, output) becomes (n, t, u).
A new kind joins with ``incoming.register`` and ``at_units.register``.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import singledispatch
from math import prod

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from unitfisher.patches import Patches, Received

Selection = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Layers = None | Selection | Sequence[Selection]
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


class LayerSelectionError(ValueError):
    """The layers asked for cannot be observed; the message says which and what to do."""


class UncoveredLayersWarning(UserWarning):
    """Modules with parameters that are not observed."""


@singledispatch
def incoming(layer: nn.Module, x: Tensor) -> Received:
    """Return what the units of the layer see, each position a row; it may be a view of x."""
    raise LayerSelectionError(f"{type(layer).__name__} has no form as units over shared inputs")


@singledispatch
def at_units(layer: nn.Module, y: Tensor) -> Float[Tensor, "n t u"]:
    """Return a tensor of the layer's output shape with one column per unit."""
    raise LayerSelectionError(f"{type(layer).__name__} has no form as units over shared inputs")


@incoming.register
def _(layer: nn.Linear, x: Tensor) -> Float[Tensor, "g n t d"]:
    return x.reshape(1, x.shape[0], -1, x.shape[-1])  # len(x) costs as much as the rest


@at_units.register
def _(layer: nn.Linear, y: Tensor) -> Float[Tensor, "n t u"]:
    return y.reshape(y.shape[0], -1, y.shape[-1])


@incoming.register(nn.Conv1d)
@incoming.register(nn.Conv2d)
@incoming.register(nn.Conv3d)
def _(layer: Conv, x: Tensor) -> Patches:
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    taps = zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
    for axis, (size, stride, dilation) in enumerate(taps, start=2):
        x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    s = len(layer.kernel_size)
    x = x.unflatten(1, (layer.groups, -1))  # n g c, s axes of positions, s axes of taps
    return Patches(x.permute(1, 0, *range(3, 3 + s), 2, *range(3 + s, 3 + 2 * s)), axes=s)


@at_units.register(nn.Conv1d)
@at_units.register(nn.Conv2d)
@at_units.register(nn.Conv3d)
def _(layer: Conv, y: Tensor) -> Float[Tensor, "n t u"]:
    return y.flatten(2).mT


def padded(layer: nn.Module, shape: Sequence[int]) -> int:
    """Count the numbers of a convolution's input of this shape, padding included."""
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    added = layer._reversed_padding_repeated_twice[::-1]
    sides = zip(shape[2:], added[::2], added[1::2], strict=True)
    return prod(shape[:2]) * prod(map(sum, sides))


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Return (units, ...) of a layer's weight.

    One that is computed, by a parametrisation, is not asked for: that may change its state.
    """
    weight = layer._parameters.get("weight")
    if weight is not None:
        return tuple(weight.shape)
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size


def supported(layer: nn.Module) -> bool:
    """Say whether the layer has a canonical form.

    The output projection inside ``nn.MultiheadAttention`` looks like a linear layer but is never
    called: attention reads its weight directly.
    """
    kind = incoming.dispatch(type(layer))
    known = kind is not incoming.dispatch(nn.Module)
    return known and not isinstance(layer, NonDynamicallyQuantizableLinear)


def parametric(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that own trainable parameters, by their ``named_modules()`` name."""
    for name, module in model.named_modules():
        if any(p.requires_grad for p in _owned(module)):
            yield name, module


def select(model: nn.Module, layers: Layers) -> dict[str, nn.Module]:
    """Return the layers asked for that have a canonical form, in the model's order.

    Raises:
        LayerSelectionError: One of the choices matches no module, or none that is supported.
    """
    found = match(model, layers)
    for name, layer in found.items():
        _require_real_weights(name, layer)
    uncovered = {name: m for name, m in found.items() if not supported(m)}
    if uncovered:
        kinds = ", ".join(sorted({type(m).__name__ for m in uncovered.values()}))
        raise LayerSelectionError(
            f"layers={layers!r} matches {_some(uncovered)} ({kinds}), which have no form as units "
            f"over shared inputs. {PER_SAMPLE}"
        )
    return found


def match(model: nn.Module, layers: Layers) -> dict[str, nn.Module]:
    """Return the modules that the choice names; None: every trainable layer that is supported.

    A choice means modules that own parameters, and of those the supported ones where it matches
    any.

    Raises:
        LayerSelectionError: A choice matches nothing.
    """
    if layers is None:
        chosen = {name: m for name, m in parametric(model) if supported(m)}
        if not chosen:
            kinds = sorted({type(m).__name__ for _, m in parametric(model)})
            raise LayerSelectionError(
                f"{type(model).__name__} has no trainable layer of a supported kind (Linear, "
                f"Conv1d, Conv2d, Conv3d), only {', '.join(kinds) or 'modules without any'}. "
                f"{PER_SAMPLE}"
            )
        return chosen
    choices = _as_list(layers)
    if not choices:
        names = _some(name for name, _ in parametric(model))
        raise LayerSelectionError(f"layers={layers!r} chooses nothing; the model has {names}")
    chosen = {}
    for choice in choices:
        chosen |= _matching(model, choice)
    return {name: m for name, m in model.named_modules() if name in chosen}


def _require_real_weights(name: str, layer: nn.Module) -> None:
    for parameter in layer.parameters(recurse=False):
        if nn.parameter.is_lazy(parameter):
            raise LayerSelectionError(
                f"layer {name!r} is lazy and has no size yet: run the model once before attaching"
            )
        if parameter.is_complex():
            raise LayerSelectionError(
                f"layer {name!r} has complex weights, and units are real here: leave it out with "
                f"layers=..."
            )


def _as_list(layers: Selection | Sequence[Selection]) -> list[Selection]:
    if isinstance(layers, str | type) or callable(layers) or not isinstance(layers, Iterable):
        return [layers]
    return list(layers)


PER_SAMPLE = (
    "unitfisher.per_sample_gradients(model, x), and unitfisher.unit_fisher(model, x, "
    "layers=..., sharing='joint'), take any module by the per-sample route"
)


def _matching(model: nn.Module, choice: Selection) -> dict[str, nn.Module]:
    if isinstance(choice, nn.Module) or not (isinstance(choice, str) or callable(choice)):
        raise LayerSelectionError(
            f"layers must be a name pattern, a module type or a predicate (name, module) -> bool, "
            f"or a list of these, got {choice!r}"
        )
    modules = {n: m for n, m in model.named_modules() if any(True for _ in _owned(m))}
    if isinstance(choice, str):
        found = {n: m for n, m in modules.items() if fnmatchcase(n, choice)}
    elif isinstance(choice, type):
        found = {n: m for n, m in modules.items() if isinstance(m, choice)}
    else:
        found = {n: m for n, m in modules.items() if choice(n, m)}
    if not found:
        near = get_close_matches(choice, modules, cutoff=0.4) if isinstance(choice, str) else []
        hint = f"near names: {', '.join(near)}" if near else f"its names: {_some(modules)}"
        raise LayerSelectionError(f"layers={choice!r} matches no layer of the model; {hint}")
    return {n: m for n, m in found.items() if supported(m)} or found


def _owned(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield a module's own parameters; those that its weight is computed from are its, too."""
    if isinstance(module, ParametrizationList):
        return
    yield from module.parameters(recurse=False)
    if is_parametrized(module):
        assert isinstance(module.parametrizations, nn.ModuleDict)
        yield from module.parametrizations.parameters()


def _some(names: Iterable[str], most: int = 8) -> str:
    shown = [repr(n) for n in names]
    return ", ".join(shown[:most]) + (", ..." if len(shown) > most else "")
