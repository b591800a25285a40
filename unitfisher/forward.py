"""One forward pass of the user's model: its arguments and its output."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from unitfisher.capture import capture
from unitfisher.layers import Layers, select
from unitfisher.likelihoods import OutputError
from unitfisher.outputs import UnitMeans
from unitfisher.untouched import undisturbed

Pick = None | int | str | Callable[[Any], Tensor]


def activation_statistics(
    model: nn.Module, inputs: Any, layers: Layers = None
) -> dict[str, UnitMeans]:
    """Return mean and variance of every unit's output, after its nonlinearity.

    One forward pass in eval mode, without a graph; the model is left as it was.

    Args:
        model: Any module.
        inputs: A tensor, a tuple of arguments or a mapping of keyword arguments.
        layers: Patterns, types or a predicate, as for `Monitor`.

    Returns:
        By layer name, `UnitMeans` over samples and positions, (u,) each and in double precision.

    Raises:
        LayerSelectionError: A choice matches no layer, or layers that cannot be observed.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Linear(4, 2))
    >>> tuple(activation_statistics(model, torch.randn(10, 3))["0"].mean.shape)
    (4,)
    """
    args, kwargs = arguments(inputs)
    watched = capture(select(model, layers), look=False)
    with undisturbed(model), torch.no_grad(), eagerly(), watched as seen:
        model(*args, **kwargs)
    return seen.means()


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return (args, kwargs) of a tensor, a tuple of arguments or a mapping of keyword arguments.

    Tensors made in inference mode are copied: autograd refuses them.
    """
    with torch.inference_mode(False):
        inputs = tree_map_only(Tensor, lambda x: x.clone() if x.is_inference() else x, inputs)
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def eagerly() -> AbstractContextManager[Any]:
    """Run compiled code eagerly, so that its layers' hooks are called."""
    compiling = "torch._dynamo" in sys.modules  # else nothing is compiled, and it is slow to import
    return torch.compiler.set_stance("force_eager") if compiling else nullcontext()


def pick_output(result: Any, pick: Pick) -> Tensor:
    """Return the logits among what forward returned.

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
    entries = _entries(result)
    if pick in entries:
        return entries[pick]
    try:
        return getattr(result, pick) if isinstance(pick, str) else result[pick]
    except (AttributeError, KeyError, IndexError, TypeError):
        raise OutputError(
            f"output={pick!r} is not in the {type(result).__name__} that the model returns "
            f"{_contents(result)}"
        ) from None


def _entries(result: Any) -> dict[Any, Any]:
    if isinstance(result, Mapping):
        return dict(result)
    if is_dataclass(result):
        return {field.name: getattr(result, field.name) for field in fields(result)}
    if isinstance(result, tuple) and hasattr(result, "_asdict"):
        return dict(result._asdict())
    if isinstance(result, Sequence):
        return dict(enumerate(result))
    return dict(getattr(result, "__dict__", {}))


def _contents(result: Any) -> str:
    entries = _entries(result)
    return "with " + ", ".join(map(repr, entries)) if entries else "without entries"
