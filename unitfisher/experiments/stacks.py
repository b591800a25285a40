"""Layers of convolutional networks, from the paper's notation: layers × units × receptive field.

The paper leaves open the padding (both common conventions are here), the initialisation (uniform,
biases 0, as the authors' framework has it, or normal; He's variance, or another), and that dropout
stands between activation and pooling.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from unitfisher.choices import require_choice
from unitfisher.experiments.models import ACTIVATIONS, HE, Initial, Layer, drawn

Modules = OrderedDict[str, nn.Module]


class Conv(NamedTuple):
    """A convolution in the paper's notation; ``pad`` zeros on each side, None: by convention."""

    units: int
    size: int
    stride: int = 1
    pad: int | None = None


Stack = tuple[Conv, ...]


@dataclass(frozen=True)
class Maker:
    """Makes the layers of one network, with common options and a generator for their weights.

    One seed gives the same initial weights for every activation, normalisation and padding.

    Args:
        generator: Draws the weights; biases start at 0.
        activation: A key of ``ACTIVATIONS``.
        norm: "none" or "batch", before the activation.
        padding: "caffe" (⌊size / 2⌋ zeros on every side, so that even sizes enlarge the map;
            pooling rounds up) or "same" (the map's size stays; pooling rounds down).
        weight_variance: Of the weights, times fan-in.
        initial: Distribution of the weights about 0, "uniform" or "normal".

    Raises:
        ValueError: One of the names is unknown.
    """

    generator: torch.Generator
    activation: str = "elu"
    norm: str = "none"
    padding: str = "caffe"
    weight_variance: float = HE
    initial: str = "uniform"

    def __post_init__(self) -> None:
        require_choice("activation", self.activation, tuple(ACTIVATIONS))
        require_choice("norm", self.norm, ("none", "batch"))
        require_choice("padding", self.padding, ("caffe", "same"))
        require_choice("initial", self.initial, get_args(Initial))

    def draw(self, layer: Layer) -> Layer:
        """Give a layer that was made on the meta device its initial weights."""
        return drawn(layer, self.weight_variance, self.generator, self.initial)

    def convolution(self, i: int, channels: int, conv: Conv) -> Modules:
        """Make ``conv{i}`` and what follows it; before it ``pad{i}``, if sides differ."""
        units, size, stride, pad = conv
        parts = Modules()
        if pad is None and self.padding == "same" and size % 2 == 0:
            less, more = size // 2 - 1, size // 2  # as torch's padding="same" has it
            parts[f"pad{i}"] = nn.ZeroPad2d((less, more, less, more))
            pad = 0
        pad = size // 2 if pad is None else pad
        layer = nn.Conv2d(channels, units, size, stride, pad, device="meta")
        parts[f"conv{i}"] = self.draw(layer)
        return parts | self.activated(i, nn.BatchNorm2d(units))

    def hidden(self, i: int, inputs: int, units: int) -> Modules:
        """Make the fully connected ``hidden{i}`` and what follows it."""
        layer = self.draw(nn.Linear(inputs, units, device="meta"))
        return Modules({f"hidden{i}": layer}) | self.activated(i, nn.BatchNorm1d(units))

    def activated(self, i: int, norm: nn.Module) -> Modules:
        """Make ``norm{i}``, if there is one, and ``act{i}``."""
        parts = Modules({f"norm{i}": norm} if self.norm == "batch" else {})
        parts[f"act{i}"] = self.act()
        return parts

    def act(self) -> nn.Module:
        return ACTIVATIONS[self.activation].module()

    def pool(self) -> nn.Module:
        return HalvingPool("ceil" if self.padding == "caffe" else "floor")


class HalvingPool(nn.Module):
    """2×2 max-pooling with stride 2, which leaves an axis of length one as it is."""

    def __init__(self, rounding: str) -> None:
        super().__init__()
        self.rounding = rounding

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h2 w2"]:
        window = [min(2, size) for size in x.shape[2:]]
        return F.max_pool2d(x, window, ceil_mode=self.rounding == "ceil")

    def extra_repr(self) -> str:
        return self.rounding


def stacks(plan: Sequence[Stack], make: Maker) -> Modules:
    """Make ``stack1``, ..., each of ``conv1``, ``act1``, ``drop1``, ``conv2``, ..., ``pool``.

    Every layer has its dropout, of rate 0 until ``set_dropout`` says otherwise.
    """
    parts, channels = Modules(), 3  # red, green and blue
    for s, convs in enumerate(plan, start=1):
        stack = Modules()
        for i, conv in enumerate(convs, start=1):
            stack |= make.convolution(i, channels, conv)
            stack[f"drop{i}"] = nn.Dropout(0.0)
            channels = conv.units
        parts[f"stack{s}"] = nn.Sequential(stack | {"pool": make.pool()})
    return parts


def set_dropout(network: nn.Module, rates: Sequence[float], *, layers: str = "last") -> None:
    """Set the dropout rate of each stack, before training or between its phases.

    Args:
        network: Made of ``stacks``.
        rates: One for each stack.
        layers: "last", or "all" layers of a stack, as the 18-net has them in its last phases.

    Raises:
        ValueError: There are not as many rates as stacks, or ``layers`` is neither.
    """
    require_choice("layers", layers, ("last", "all"))
    drops = [[m for m in stack.children() if type(m) is nn.Dropout] for stack in network.children()]
    drops = [stack for stack in drops if stack]
    if len(drops) != len(rates):
        raise ValueError(f"{len(rates)} dropout rates for {len(drops)} stacks: give one for each")
    for stack, rate in zip(drops, rates, strict=True):
        for drop in stack:
            drop.p = rate if layers == "all" or drop is stack[-1] else 0.0
