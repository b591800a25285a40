"""Checks that a call is weight times input: else errors do not give the weight's gradient."""

from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from unitfisher.kinds import incoming, weight_of

OTHER_FORM: Final = (
    "whose forward returns something else than weight times input plus bias (it pads, scales, "
    "normalises, or ends in a nonlinearity), so that errors there do not give the gradient of the "
    "weight. Give the product a module of its own"
)
UNDECIDED: Final = (
    "whose class overrides forward, and of which it cannot be told, while weight or input are all "
    "zero or not finite, whether they return weight times input: they are checked again in the "
    "next measured pass"
)
SHAPELESS: Final = (
    "that are called on sparse or nested tensors, or without a batch axis: give them dense batches"
)
METHODS: Final = {"forward", "_conv_forward"}  # that define what a layer computes


def shapeless(layer: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Return whether x or y is not a dense batch, so that the call has no cases."""
    axes = 2 + len(getattr(layer, "kernel_size", ()))
    return not (_is_dense(x) and _is_dense(y) and x.dim() >= axes)


def other_form(layer: nn.Module, x: Tensor, y: Tensor) -> str | None:
    """Return why a call from x to y is not weight times input plus bias; None: it is.

    Only layers that override forward are checked, each time: they may pad, scale or standardise.
    """
    cls = type(layer)
    kind = next(each for each in cls.__mro__ if each in incoming.registry)
    usual = cls is kind or all(getattr(cls, m, None) is getattr(kind, m, None) for m in METHODS)
    if usual and METHODS.isdisjoint(vars(layer)):
        return None
    weight, x, y = weight_of(layer), x.detach(), y.detach()
    if not all(t.isfinite().all() and t.any() for t in (x, weight)):
        return UNDECIDED
    try:
        product = _product(kind, layer, weight, x)
        return None if product.shape == y.shape and _close(y, product) else OTHER_FORM
    except RuntimeError:  # shapes or types do not fit
        return OTHER_FORM


def _is_dense(x: Tensor) -> bool:
    return x.layout is torch.strided and not x.is_nested


def _product(kind: Any, layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    """Return what the plain layer of this kind computes from the same weight and bias."""
    bare, bias = kind.__new__(kind), cast(Tensor | None, layer.bias)
    vars(bare).update({name: x for name, x in vars(layer).items() if name not in METHODS})
    detached = {"weight": weight, "bias": None if bias is None else bias.detach()}
    bare._parameters = {**layer._parameters, **detached}
    with torch.no_grad():
        product: Tensor = kind.forward(bare, x)
    return product


def _close(y: Tensor, expected: Tensor) -> bool:
    size, error = expected.abs().max(), (y - expected).abs().max()
    return bool(error <= torch.finfo(y.dtype).eps ** 0.5 * size)
