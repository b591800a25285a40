"""Every supported layer kind in one form, for which the mathematics is written once.

Incoming activations become (g, n, t, d): groups, samples, positions that share the weights, and
the inputs of a unit in the order of its flattened weight; those of a convolution stay `Patches`
until needed. Preactivations, errors and outputs become (n, t, u). `join` adds a kind.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial, singledispatch
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from unitfisher.patches import Patches, Received
from unitfisher.untouched import undisturbed

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Turn = Callable[[Tensor], Tensor]


class LayerSelectionError(ValueError):
    """The layers asked for cannot be observed; the message says which and what to do."""


@singledispatch
def incoming(layer: nn.Module, x: Tensor, out: torch.Size) -> Received:
    """Return the units' inputs, each position a row; they may be a view of x.

    Args:
        layer: A layer of a supported kind.
        x: Its input.
        out: The shape of its output.
    """
    raise LayerSelectionError(f"{type(layer).__name__} has no form as units over shared inputs")


@singledispatch
def at_units(layer: nn.Module, y: Tensor) -> Float[Tensor, "n t u"]:
    """Rearrange a tensor of the layer's output shape, so that it has one column per unit."""
    raise LayerSelectionError(f"{type(layer).__name__} has no form as units over shared inputs")


@singledispatch
def turning(layer: nn.Module) -> Turn:
    """Return a function that puts a weight's units first, and that undoes it when called again."""
    return as_it_is


def as_it_is(weight: Tensor) -> Tensor:
    return weight


def join(
    kinds: Sequence[type[nn.Module]],
    into: Callable[..., Received],
    out_of: Callable[..., Tensor],
    turn: Callable[..., Turn] | None = None,
) -> None:
    """Make layers of these classes observable.

    Args:
        kinds: Classes whose layers have ``weight``, and ``bias``, which may be None.
        into: Their `incoming`.
        out_of: Their `at_units`.
        turn: Their `turning`, if the first axis of the weight is not units.
    """
    for kind in kinds:
        incoming.register(kind, into)
        at_units.register(kind, out_of)
        if turn is not None:
            turning.register(kind, turn)


def _into_linear(layer: nn.Module, x: Tensor, out: torch.Size) -> Float[Tensor, "g n t d"]:
    return x.reshape(1, x.shape[0], -1, x.shape[-1])  # len(x) costs as much as the rest


def _out_of_linear(layer: nn.Module, y: Tensor) -> Float[Tensor, "n t u"]:
    return y.reshape(y.shape[0], -1, y.shape[-1])


join([nn.Linear], _into_linear, _out_of_linear)


def _into_convolution(layer: Conv, x: Tensor, out: torch.Size) -> Patches:
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    return _patches(layer, x, layer.stride)


def _patches(layer: Conv | Transposed, x: Tensor, strides: Sequence[int]) -> Patches:
    """View a padded input as the patch of kernel taps at each position."""
    taps = zip(layer.kernel_size, strides, layer.dilation, strict=True)
    for axis, (size, stride, dilation) in enumerate(taps, start=2):
        x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    s = len(layer.kernel_size)
    x = x.unflatten(1, (layer.groups, -1))  # n g c, s axes of positions, s axes of taps
    return Patches(x.permute(1, 0, *range(3, 3 + s), 2, *range(3 + s, 3 + 2 * s)), axes=s)


def _out_of_convolution(layer: Conv, y: Tensor) -> Float[Tensor, "n t u"]:
    return y.flatten(2).mT


join([nn.Conv1d, nn.Conv2d, nn.Conv3d], _into_convolution, _out_of_convolution)


def _into_transposed(layer: Transposed, x: Tensor, out: torch.Size) -> Patches:
    """Spread the input by the stride, in reverse order, or the kernel's taps would be reversed."""
    strides: tuple[int, ...] = layer.stride
    sizes = [(size - 1) * by + 1 for size, by in zip(x.shape[2:], strides, strict=True)]
    spread, places = x.new_zeros(*x.shape[:2], *sizes), [slice(None, None, by) for by in strides]
    spread[:, :, *places] = x.flip(*range(2, x.dim()))
    margins: list[int] = []
    for axis in reversed(range(len(strides))):
        padding, taps = int(layer.padding[axis]), layer.kernel_size[axis]
        before = out[2 + axis] + padding - sizes[axis]
        margins += [before, layer.dilation[axis] * (taps - 1) - padding]
    return _patches(layer, F.pad(spread, margins), [1] * len(strides))


def _out_of_transposed(layer: Transposed, y: Tensor) -> Float[Tensor, "n t u"]:
    return y.flip(*range(2, y.dim())).flatten(2).mT


def _turned(groups: int, weight: Tensor) -> Tensor:
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def _turning_transposed(layer: Transposed) -> Turn:
    return partial(_turned, layer.groups)


TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
join(TRANSPOSED, _into_transposed, _out_of_transposed, _turning_transposed)


def _join_gpt2() -> None:
    """Join GPT-2's linear layer, whose weight is (inputs, units), if transformers is imported."""
    library = sys.modules.get("transformers.pytorch_utils")
    if library is not None and library.Conv1D not in incoming.registry:
        join([library.Conv1D], _into_linear, _out_of_linear, lambda layer: torch.t)


def convolves(layer: nn.Module) -> bool:
    """Return whether the units of this layer receive patches."""
    return isinstance(layer, Conv | Transposed)


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Return the shape of a layer's weight, units first."""
    if layer._parameters.get("weight") is None:
        if isinstance(layer, nn.Linear):
            return layer.out_features, layer.in_features
        if isinstance(layer, Conv | Transposed):
            return layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size
    return tuple(turning(layer)(weight_of(layer)).shape)


def weight_of(layer: nn.Module) -> Tensor:
    """Return a layer's weight, detached; to compute it does not change the layer's state."""
    given = {**vars(layer), **layer._parameters}.get("weight")  # a pruned weight is an attribute
    if given is not None:
        return given.detach()
    with undisturbed(layer), torch.no_grad():  # else spectral norm would take a power iteration
        return cast(Tensor, layer.weight).detach()


def supported(layer: nn.Module) -> bool:
    """Return whether the layer has a canonical form, and is called.

    The module ``out_proj`` inside ``nn.MultiheadAttention`` is not: see `attention.Projection`.
    """
    _join_gpt2()
    kind = incoming.dispatch(type(layer))
    known = kind is not incoming.dispatch(nn.Module)
    return known and not isinstance(layer, NonDynamicallyQuantizableLinear)
