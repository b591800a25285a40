"""Checks of the model and layers that a Monitor is attached to, and warnings about them."""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from unitfisher.attention import Projection
from unitfisher.kinds import LayerSelectionError, weight_shape
from unitfisher.layers import PER_SAMPLE, UncoveredLayersWarning, parametric
from unitfisher.live import STANDING


class TiedWeightsWarning(UserWarning):
    """An observed layer shares its weight with other modules."""


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside DataParallel or DistributedDataParallel; any other as it is.

    Raises:
        LayerSelectionError: The argument is not a module, or is compiled: that calls no hooks.
    """
    if not isinstance(model, nn.Module):
        raise LayerSelectionError(f"attach to an nn.Module, not to a {type(model).__name__}")
    if hasattr(model, "_orig_mod") or model._compiled_call_impl is not None:
        raise LayerSelectionError(
            "this model is compiled, and compiled code calls no hooks: attach to the model that "
            "was compiled and call monitor.measure(x) on it between steps"
        )
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        warnings.warn(
            f"DataParallel runs copies of the model on {len(model.device_ids)} devices, and no "
            f"pass of a copy is measured: use DistributedDataParallel, or monitor.measure(x)",
            UncoveredLayersWarning,
            stacklevel=3,
        )
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return model.module if isinstance(model, wrappers) else model


def sample_units(
    layers: Mapping[str, nn.Module], units: int | None, seed: int
) -> dict[str, Tensor]:
    if units is None:
        return {}
    generator = torch.Generator().manual_seed(seed)
    sampled = {}
    for name, layer in layers.items():
        count = weight_shape(layer)[0]
        sampled[name] = torch.randperm(count, generator=generator)[:units].sort().values
    return sampled


def require_unobserved(chosen: Mapping[str, nn.Module]) -> None:
    """Refuse layers that another Monitor observes, to whichever module that one is attached."""
    observed = {layer for live in STANDING for layer in live.layers.values()}
    twice = [name for name, layer in chosen.items() if layer in observed]
    if twice:
        raise LayerSelectionError(
            f"layers {', '.join(map(repr, twice))} are observed by a Monitor already: "
            f"detach() that one first (unitfisher.detach_all(model) where you have lost it), or "
            f"choose other layers"
        )


def require_told_apart(chosen: Mapping[str, nn.Module], record: object) -> None:
    """Refuse a run to which another Monitor writes layers of these names: rows tell names only."""
    written = {name for live in STANDING if live.run and live.run is record for name in live.layers}
    if both := [name for name in chosen if name in written]:
        raise LayerSelectionError(
            f"layers of the names {', '.join(map(repr, both))} are written to this run by another "
            f"Monitor, and its rows could not be told from these: give each model a run of its own"
        )


def name_tied(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """Warn of layers that share their weight with others: only their own calls are measured."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name)
    observed = {layer._parameters.get("weight") for layer in chosen.values()}
    tied = [
        names for parameter, names in owners.items() if len(names) > 1 and parameter in observed
    ]
    if tied:
        warnings.warn(
            f"these names share one parameter: "
            f"{'; '.join(' and '.join(names) for names in tied)}. Each layer is measured by its "
            f"own calls, as if the weight were not shared, while .grad, from which "
            f"natural_gradient() is computed, is the sum over all uses. measure(x, targets=y) "
            f"computes each layer's own part of the gradient",
            TiedWeightsWarning,
            stacklevel=3,
        )


def _kind(layer: nn.Module) -> str:
    layer = layer.attention if isinstance(layer, Projection) else layer
    return ("nn." if type(layer).__module__.startswith("torch.nn") else "") + type(layer).__name__


def name_uncovered(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """Warn which modules with parameters are not observed, and what to do about it."""
    left = {n: m for n, m in parametric(model) if n not in chosen}
    if left:
        by_kind: dict[str, list[str]] = {}
        for name, module in left.items():
            by_kind.setdefault(_kind(module), []).append(name or "the model itself")
        named = "; ".join(f"{kind} {', '.join(names)}" for kind, names in by_kind.items())
        kinds = ", ".join(sorted({_kind(m) for m in chosen.values()}))
        warnings.warn(
            f"not observed, having no form as units over shared inputs: {named}. To leave them out "
            f"without this warning, name the layers to observe: layers=({kinds},). {PER_SAMPLE}",
            UncoveredLayersWarning,
            stacklevel=3,
        )
