"""Which calls are the product of a layer's weight and its input: of others errors say nothing."""

from typing import Any, Final
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
KINDS: Final = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
PRODUCTS: Final[WeakSet[nn.Module]] = WeakSet()  # with a forward of their own, seen to be one


def unfit(layer: nn.Module, x: Tensor, y: Tensor) -> str | None:
    """Say why a call from x to y cannot be observed; None: it can.

    A layer with a forward of its own, which may pad, scale or standardise, is looked at until it is
    seen to be a product; the shape of what it returns, at every call.
    """
    axes = 2 + len(getattr(layer, "kernel_size", ()))
    if not (_is_dense(x) and _is_dense(y) and x.dim() >= axes):
        return SHAPELESS
    usual = any(type(layer).forward is kind.forward for kind in KINDS)
    weight = layer._parameters.get("weight")
    if (usual and "forward" not in vars(layer)) or weight is None or not isinstance(layer, KINDS):
        return None
    known, x, y = layer in PRODUCTS, x.detach(), y.detach()
    if not known and not all(t.isfinite().all() and t.any() for t in (x, weight)):
        return UNDECIDED
    try:
        fits = _product(layer, x, "meta").shape == y.shape
        fits = fits and (known or _close(y, _product(layer, x, x.device)))
    except RuntimeError:  # shapes or types do not fit
        return OTHER_FORM
    if fits:
        PRODUCTS.add(layer)
    return None if fits else OTHER_FORM


def _is_dense(x: Tensor) -> bool:
    return x.layout is torch.strided and not x.is_nested


def _product(layer: nn.Module, x: Tensor, device: torch.device | str) -> Tensor:
    """Weight times input, and bias, as torch has it for this kind of layer."""
    own = (layer._parameters.get(name) for name in ("weight", "bias"))
    parameters: Any = (None if p is None else p.detach().to(device) for p in own)
    if isinstance(layer, nn.Linear):
        return F.linear(x.to(device), *parameters)
    kind: Any = next(kind for kind in KINDS if isinstance(layer, kind))
    product: Tensor = kind._conv_forward(layer, x.to(device), *parameters)
    return product


def _close(y: Tensor, expected: Tensor) -> bool:
    size, off = expected.abs().max(), (y - expected).abs().max()
    return bool(off <= torch.finfo(y.dtype).eps ** 0.5 * size)
