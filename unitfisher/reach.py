"""Finds the calls of a pass that errors can be sent back to, or why there are none."""

from collections.abc import Iterator, Mapping

from torch import Tensor
from torch.autograd.graph import GradientEdge

from unitfisher.calls import Call, Seen, Unfit
from unitfisher.cascade import ELEMENTWISE, operation
from unitfisher.forms import OTHER_FORM
from unitfisher.kinds import LayerSelectionError
from unitfisher.likelihoods import OutputError


class NothingObservedError(ValueError):
    """Nothing can be observed in this pass; another pass may differ."""

    samples = 0  # of the pass, if it called no observed layer


class EmptyBatchError(NothingObservedError, OutputError):
    """The batch has no cases."""


class UnseenLayersError(NothingObservedError, LayerSelectionError):
    """Errors reach none of the observed layers."""


def edges(output: Tensor, seen: Seen) -> list[GradientEdge]:
    """Return where errors arrive, for every call that can be observed.

    Calls without a graph, or of unfit layers, are removed from ``seen``.

    Raises:
        UnseenLayersError: No observed layer was called, or all are frozen.
        LayerSelectionError: No call has a graph, or no layer is fit.
        OutputError: The output has no graph.
    """
    _note_endings(seen)
    if not seen.calls:
        _require_fit(seen)
        raise UnseenLayersError(
            "none of the observed layers was called in this forward pass (it took another way; or "
            "they are compiled, and compiled code calls no hooks: attach to the model that was "
            "compiled, and run that. Calls inside vmap are not seen)"
        )
    frozen = not any(p.requires_grad for call in seen.calls for p in _parameters(call))
    if not output.requires_grad:
        if frozen:
            raise UnseenLayersError("the observed layers are frozen, and there is no graph to them")
        raise OutputError("the model's output has no graph: does forward detach it?")
    with_graph = [call for call in seen.calls if call.edge is not None]
    if not with_graph:
        kind = UnseenLayersError if frozen else LayerSelectionError
        raise kind(
            f"layer {seen.calls[0].layer!r} ran without a graph (no_grad, frozen with frozen "
            f"inputs, or reentrant checkpointing), so no error reaches it: leave it out with "
            f"layers=..., or use torch.utils.checkpoint(use_reentrant=False)"
        )
    fit = [call for call in with_graph if call.layer not in seen.unfit]
    if not fit:
        _require_fit(seen)
    if len(fit) < len(seen.calls):
        seen.calls, seen.row = fit, []
    return [call.edge for call in fit if call.edge is not None]


def _parameters(call: Call) -> list[Tensor]:
    return [p for p in call.module._parameters.values() if p is not None]


def _note_endings(seen: Seen) -> None:
    """Note as unfit layers whose own forward ends in a nonlinearity, even if it changed nothing."""
    for call in seen.calls:
        custom = not type(call.module).__module__.startswith("torch.nn.modules.")
        if custom and call.edge is not None and operation(call.edge.node) in ELEMENTWISE:
            seen.unfit[call.layer] = Unfit(type(call.module).__name__, OTHER_FORM)


def _require_fit(seen: Seen) -> None:
    """Refuse a pass whose layers are all unfit, for good or only in this pass."""
    if not seen.unfit:
        return
    always = all(unfit.why == OTHER_FORM for unfit in seen.unfit.values())
    raise (LayerSelectionError if always else UnseenLayersError)(
        f"no layer is left to observe: {'; '.join(told(seen.unfit))}"
    )


def told(unfit: Mapping[str, Unfit]) -> Iterator[str]:
    """Describe unfit layers and their kinds, those with the same reason together."""
    for why in dict.fromkeys(each.why for each in unfit.values()):
        named = (f"{layer!r} ({each.kind})" for layer, each in unfit.items() if each.why == why)
        yield f"layers {', '.join(named)}, {why}"
