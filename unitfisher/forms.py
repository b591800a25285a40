"""Which calls are the product of a layer's weight and its input: of others errors say nothing."""

from typing import Any, Final
from weakref import WeakSet

import torch
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
KINDS: Final = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
METHODS: Final = {"forward", "_conv_forward"}  # that say what a layer does
PRODUCTS: Final[WeakSet[nn.Module]] = WeakSet()  # with a forward of their own, seen to be one


def unfit(layer: nn.Module, x: Tensor, y: Tensor) -> str | None:
    """Say why a call from x to y cannot be observed; None: it can.

    A layer with a forward of its own, which may pad, scale or standardise, is looked at until it is
    seen to be a product; the shape of what it returns, at every call.
    """
    axes = 2 + len(getattr(layer, "kernel_size", ()))
    if not (_is_dense(x) and _is_dense(y) and x.dim() >= axes):
        return SHAPELESS
    usual = _is_usual(type(layer)) and METHODS.isdisjoint(vars(layer))
    weight = layer._parameters.get("weight")
    if usual or weight is None or not isinstance(layer, KINDS):
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


def _is_usual(kind: type[nn.Module]) -> bool:
    """Say whether layers of this class do what those of torch do."""
    return any(
        all(getattr(kind, name, None) is getattr(usual, name, None) for name in METHODS)
        for usual in KINDS
    )


def _is_dense(x: Tensor) -> bool:
    return x.layout is torch.strided and not x.is_nested


def _product(layer: nn.Module, x: Tensor, device: torch.device | str) -> Tensor:
    """Weight times input, and bias, as torch has it for this kind of layer."""
    kind: Any = next(kind for kind in KINDS if isinstance(layer, kind))
    bare, own = kind.__new__(kind), layer._parameters.items()
    vars(bare).update({name: x for name, x in vars(layer).items() if name not in METHODS})
    bare._parameters = {name: None if p is None else p.detach().to(device) for name, p in own}
    product: Tensor = kind.forward(bare, x.to(device))
    return product


def _close(y: Tensor, expected: Tensor) -> bool:
    size, off = expected.abs().max(), (y - expected).abs().max()
    return bool(off <= torch.finfo(y.dtype).eps ** 0.5 * size)
