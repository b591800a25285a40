"""What a Monitor may be attached to, and observe."""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from unitfisher.attention import Projection
from unitfisher.kinds import LayerSelectionError, weight_shape
from unitfisher.layers import PER_SAMPLE, UncoveredLayersWarning, parametric
from unitfisher.live import STANDING


class TiedWeightsWarning(UserWarning):
    """Observed layers whose weight other modules use, too."""


def unwrapped(model: nn.Module) -> nn.Module:
    """See through DataParallel and DistributedDataParallel.

    Raises:
        LayerSelectionError: It is no module, or compiled: a compiled model calls no hooks.
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
    chance = torch.Generator().manual_seed(seed)
    sampled = {}
    for name, layer in layers.items():
        count = weight_shape(layer)[0]
        sampled[name] = torch.randperm(count, generator=chance)[:units].sort().values
    return sampled


def require_unobserved(chosen: Mapping[str, nn.Module]) -> None:
    """Refuse layers that another Monitor observes, whichever module that one stands on."""
    observed = {layer for live in STANDING for layer in live.layers.values()}
    twice = [name for name, layer in chosen.items() if layer in observed]
    if twice:
        raise LayerSelectionError(
            f"layers {', '.join(map(repr, twice))} are observed by a Monitor already: "
            f"detach() that one first, or choose other layers"
        )


def require_told_apart(chosen: Mapping[str, nn.Module], record: object) -> None:
    """Refuse a run in which layers of the same names are written: rows tell only names."""
    written = {name for live in STANDING if live.run and live.run is record for name in live.layers}
    if both := [name for name in chosen if name in written]:
        raise LayerSelectionError(
            f"layers of the names {', '.join(map(repr, both))} are written to this run by another "
            f"Monitor, and its rows could not be told from these: give each model a run of its own"
        )


def name_tied(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """Say which layers share their weight with other modules: a Fisher is of one layer's calls."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name)
    observed = {layer._parameters.get("weight") for layer in chosen.values()}
    tied = [
        names for parameter, names in owners.items() if len(names) > 1 and parameter in observed
    ]
    if tied:
        warnings.warn(
            f"one parameter is {'; '.join(' and '.join(names) for names in tied)}: each layer is "
            f"measured by its own calls, as if its weight were its own, while .grad, and what "
            f"natural_gradient() makes of it, is of all uses together. measure(x, targets=y) takes "
            f"each layer's own part of the gradient",
            TiedWeightsWarning,
            stacklevel=3,
        )


def _kind(layer: nn.Module) -> str:
    layer = layer.attention if isinstance(layer, Projection) else layer
    return ("nn." if type(layer).__module__.startswith("torch.nn") else "") + type(layer).__name__


def name_uncovered(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """Say once which modules with parameters are not observed, and what to do about it."""
    left = {n: m for n, m in parametric(model) if n not in chosen}
    if left:
        by_kind: dict[str, list[str]] = {}
        for name, module in left.items():
            by_kind.setdefault(_kind(module), []).append(name or "the model itself")
        named = "; ".join(f"{kind} {', '.join(names)}" for kind, names in by_kind.items())
        kinds = ", ".join(sorted({_kind(m) for m in chosen.values()}))
        warnings.warn(
            f"not observed, having no form as units over shared inputs: {named}. To leave them "
            f"out without this note name the layers to observe: layers=({kinds},). {PER_SAMPLE}",
            UncoveredLayersWarning,
            stacklevel=3,
        )
