"""Selection of the layers to observe."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from unitfisher.attention import Projection, in_products, named_layers
from unitfisher.kinds import LayerSelectionError, supported

Selection = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Layers = None | Selection | Sequence[Selection]


class UncoveredLayersWarning(UserWarning):
    """Some modules with parameters, or some passes of the model, are not observed."""


def parametric(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that own trainable parameters, by their ``named_modules()`` name."""
    for name, module in named_layers(model):
        if any(p.requires_grad for p in _owned(module)):
            yield name, module


def select(model: nn.Module, layers: Layers) -> dict[str, nn.Module]:
    """Return the layers asked for, all of supported kinds, in the model's order.

    Raises:
        LayerSelectionError: A choice matches no module or only unsupported ones, or a layer is
            lazy, has complex weights, or lacks the attribute ``bias``.
    """
    found = match(model, layers)
    for name, layer in found.items():
        _require_real_weights(name, layer)
        if supported(layer) and not hasattr(layer, "bias"):
            raise LayerSelectionError(
                f"layer {name!r} ({type(layer).__name__}) has no attribute bias: set it to None"
            )
    uncovered = {name: m for name, m in found.items() if not supported(m)}
    if uncovered:
        kinds = ", ".join(sorted({type(m).__name__ for m in uncovered.values()}))
        raise LayerSelectionError(
            f"layers={layers!r} matches {_some(uncovered)} ({kinds}), which have no form as units "
            f"over shared inputs. {PER_SAMPLE}"
        )
    return found


def match(model: nn.Module, layers: Layers) -> dict[str, nn.Module]:
    """Return the modules that are chosen; None: every trainable layer of a supported kind.

    A choice selects among modules that own parameters; if it matches supported ones, only those.

    Raises:
        LayerSelectionError: A choice matches nothing.
    """
    if layers is None:
        chosen = {name: m for name, m in parametric(model) if supported(m)}
        if not chosen:
            kinds = sorted({type(m).__name__ for _, m in parametric(model)})
            raise LayerSelectionError(
                f"{type(model).__name__} has no trainable layer of a supported kind (Linear, "
                f"convolutions, transposed convolutions), only "
                f"{', '.join(kinds) or 'modules without any'}. {PER_SAMPLE}"
            )
        return chosen
    choices = _as_list(layers)
    if not choices:
        names = _some(name for name, _ in parametric(model))
        raise LayerSelectionError(f"layers={layers!r} chooses nothing; the model has {names}")
    chosen = {}
    for choice in choices:
        chosen |= _matching(model, choice)
    return {name: m for name, m in named_layers(model) if name in chosen}


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
    "layers=..., sharing='joint'), handle any module, by per-sample gradients"
)


def _matching(model: nn.Module, choice: Selection) -> dict[str, nn.Module]:
    if isinstance(choice, nn.Module) or not (isinstance(choice, str) or callable(choice)):
        raise LayerSelectionError(
            f"layers must be a name pattern, a module type or a predicate (name, module) -> bool, "
            f"or a list of these, got {choice!r}"
        )
    modules = {n: m for n, m in named_layers(model) if any(True for _ in _owned(m))}
    if isinstance(choice, str):
        found = {n: m for n, m in modules.items() if fnmatchcase(n, choice)}
    elif isinstance(choice, type):
        found = {n: m for n, m in modules.items() if isinstance(m, choice) or _inside(m, choice)}
    else:
        found = {n: m for n, m in modules.items() if choice(n, m)}
    if not found:
        near = get_close_matches(choice, modules, cutoff=0.4) if isinstance(choice, str) else []
        hint = f"near names: {', '.join(near)}" if near else f"its names: {_some(modules)}"
        raise LayerSelectionError(f"layers={choice!r} matches no layer of the model; {hint}")
    return {n: m for n, m in found.items() if supported(m)} or found


def _owned(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield a module's own parameters, and those that its parametrized ones are computed from.

    For an attention, only parameters that are in none of its products.
    """
    if isinstance(module, ParametrizationList):
        return
    elsewhere = in_products(module) if isinstance(module, nn.MultiheadAttention) else ()
    yield from (p for p in module.parameters(recurse=False) if p not in elsewhere)
    if is_parametrized(module):
        assert isinstance(module.parametrizations, nn.ModuleDict)
        yield from module.parametrizations.parameters()


def _inside(module: nn.Module, kind: type[nn.Module]) -> bool:
    return isinstance(module, Projection) and isinstance(module.attention, kind)


def _some(names: Iterable[str], most: int = 8) -> str:
    shown = [repr(n) for n in names]
    return ", ".join(shown[:most]) + (", ..." if len(shown) > most else "")
