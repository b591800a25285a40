"""Which calls are the product of a layer's weight and its input: of others errors say nothing."""

from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from unitfisher.kinds import incoming, weight_of

OTHER_FORM: Final = (
    "whose forward returns something else than their weight times their input, and bias (it pads, "
    "scales, normalises, or ends in a nonlinearity): errors there say nothing of the weight. Give "
    "the product a module of its own"
)
UNDECIDED: Final = (
    "whose forward is their own, and of which it cannot be told, while weight or input are zero or "
    "not finite, whether it is weight times input: they are looked at again in the next measured "
    "pass"
)
SHAPELESS: Final = (
    "that are called on sparse or nested tensors, or without a batch axis: give them dense batches"
)
METHODS: Final = {"forward", "_conv_forward"}  # that say what a layer does


def shapeless(layer: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Say whether a call from x to y has no cases."""
    axes = 2 + len(getattr(layer, "kernel_size", ()))
    return not (_is_dense(x) and _is_dense(y) and x.dim() >= axes)


def other_form(layer: nn.Module, x: Tensor, y: Tensor) -> str | None:
    """Say why a call from x to y is no product of weight and input; None: it is one.

    A layer with a forward of its own may pad, scale or standardise, now or later.
    """
    own = type(layer)
    kind = next(each for each in own.__mro__ if each in incoming.registry)
    usual = own is kind or all(getattr(own, m, None) is getattr(kind, m, None) for m in METHODS)
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
    """What a layer of this kind returns that has nothing of its own but weight and bias."""
    bare, bias = kind.__new__(kind), cast(Tensor | None, layer.bias)
    vars(bare).update({name: x for name, x in vars(layer).items() if name not in METHODS})
    given = {"weight": weight, "bias": None if bias is None else bias.detach()}
    bare._parameters = {**layer._parameters, **given}
    with torch.no_grad():
        product: Tensor = kind.forward(bare, x)
    return product


def _close(y: Tensor, expected: Tensor) -> bool:
    size, off = expected.abs().max(), (y - expected).abs().max()
    return bool(off <= torch.finfo(y.dtype).eps ** 0.5 * size)
