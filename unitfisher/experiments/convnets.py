"""The paper's convolutional networks, from its notation: layers × units × receptive field.

[R] marks what was read in the paper, [I] what it leaves open and is chosen here. Open everywhere:
the padding (both common conventions are here), the initialisation (uniform, biases 0, as the
authors' framework has it; He's variance, or another), and that dropout stands between activation
and pooling.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Final, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from unitfisher.errors import require_choice
from unitfisher.experiments.models import ACTIVATIONS

Parts = OrderedDict[str, nn.Module]
Weighted = TypeVar("Weighted", nn.Conv2d, nn.Linear)


class Conv(NamedTuple):
    """A convolution in the paper's notation; ``pad`` zeros a side, None: as the convention says."""

    units: int
    size: int
    stride: int = 1
    pad: int | None = None


Stack = tuple[Conv, ...]

# [R] all stacks but the last, 1 × classes × 1, which is the output
CIFAR11: Final[tuple[Stack, ...]] = (
    (Conv(192, 5),),
    (Conv(192, 1), Conv(240, 3)),
    (Conv(240, 1), Conv(260, 2)),
    (Conv(260, 1), Conv(280, 2)),
    (Conv(280, 1), Conv(300, 2)),
    (Conv(300, 1),),
)
# [R] these and the output are 19 layers: the paper's 18 leave one out, [I] the output
CIFAR18: Final[tuple[Stack, ...]] = (
    (Conv(384, 3),),
    (Conv(384, 1), Conv(384, 2), *[Conv(640, 2)] * 2),
    (Conv(640, 1), *[Conv(768, 2)] * 3),
    (Conv(768, 1), *[Conv(896, 2)] * 2),
    (Conv(896, 3), *[Conv(1024, 2)] * 2),
    (Conv(1024, 1), Conv(1152, 2)),
    (Conv(1152, 1),),
)
# [R] the stacks; [I] no stride, since the paper names none
IMAGENET15: Final[tuple[Stack, ...]] = (
    (Conv(96, 6),),
    (Conv(512, 3),) * 3,
    (Conv(768, 3),) * 5,
    (Conv(1024, 3),) * 3,
)
# [R] seven rates: the last is the 11-net's output's, [I] and the last hidden stack's of the 18-net
RATES: Final = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.0)


@dataclass(frozen=True)
class Maker:
    """Makes the layers of one network: what they have in common, and who draws their weights.

    One seed gives the same initial weights for every activation, normalisation and padding.

    Args:
        generator: Draws the weights from a uniform distribution about 0; biases start at 0.
        activation: A key of ``ACTIVATIONS``.
        norm: "none" or "batch", before the activation.
        padding: "caffe" (⌊size / 2⌋ zeros on every side, so that even sizes enlarge the map;
            pooling rounds up) or "same" (the map's size stays; pooling rounds down).
        weight_variance: Of the weights, times fan-in: 2 as of He.

    Raises:
        ValueError: One of the names is unknown.
    """

    generator: torch.Generator
    activation: str = "elu"
    norm: str = "none"
    padding: str = "caffe"
    weight_variance: float = 2.0

    def __post_init__(self) -> None:
        require_choice("activation", self.activation, tuple(ACTIVATIONS))
        require_choice("norm", self.norm, ("none", "batch"))
        require_choice("padding", self.padding, ("caffe", "same"))

    def draw(self, layer: Weighted) -> Weighted:
        """Give a layer that was made on the meta device its initial weights."""
        bound = sqrt(3 * self.weight_variance / layer.weight[0].numel())
        weight = torch.empty(layer.weight.shape)
        weight.uniform_(-bound, bound, generator=self.generator)
        layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(torch.zeros(len(weight)))
        return layer

    def convolution(self, i: int, channels: int, conv: Conv) -> Parts:
        """Make ``conv{i}`` and what follows it; before it ``pad{i}``, if sides differ."""
        units, size, stride, pad = conv
        parts = Parts()
        if pad is None and self.padding == "same" and size % 2 == 0:
            less, more = size // 2 - 1, size // 2  # shared out as by torch's padding="same"
            parts[f"pad{i}"] = nn.ZeroPad2d((less, more, less, more))
            pad = 0
        pad = size // 2 if pad is None else pad
        layer = nn.Conv2d(channels, units, size, stride, pad, device="meta")
        parts[f"conv{i}"] = self.draw(layer)
        return parts | self.activated(i, nn.BatchNorm2d(units))

    def hidden(self, i: int, inputs: int, units: int) -> Parts:
        """Make the fully connected ``hidden{i}`` and what follows it."""
        layer = self.draw(nn.Linear(inputs, units, device="meta"))
        return Parts({f"hidden{i}": layer}) | self.activated(i, nn.BatchNorm1d(units))

    def activated(self, i: int, norm: nn.Module) -> Parts:
        """Make ``norm{i}``, if there is one, and ``act{i}``."""
        parts = Parts({f"norm{i}": norm} if self.norm == "batch" else {})
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


class PyramidPool(nn.Module):
    """Spatial pyramid pooling: the maxima of 4×4, 2×2 and 1×1 bins of a map of any size.

    References:
        He et al. (2014), Spatial pyramid pooling in deep convolutional networks, arXiv 1406.4729.
    """

    def __init__(self, bins: Sequence[int] = (4, 2, 1)) -> None:
        super().__init__()
        self.bins = tuple(bins)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        return torch.cat([F.adaptive_max_pool2d(x, side).flatten(1) for side in self.bins], 1)

    def features(self, channels: int) -> int:
        return channels * sum(side**2 for side in self.bins)

    def extra_repr(self) -> str:
        return f"bins={self.bins}"


def stacks(plan: Sequence[Stack], make: Maker, *, channels: int = 3) -> Parts:
    """Make ``stack1``, ..., each of ``conv1``, ``act1``, ``drop1``, ``conv2``, ..., ``pool``.

    Every layer has its dropout, of rate 0 until ``set_dropout`` says otherwise.
    """
    parts = Parts()
    for s, convs in enumerate(plan, start=1):
        stack = Parts()
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


def all_convolutional(
    plan: Sequence[Stack], classes: int, make: Maker, rates: Sequence[float]
) -> nn.Sequential:
    """Stack ``stack1``, ``stack2``, ..., ``output``, ``pool``, ``average``, ``flatten``.

    The output is the paper's last stack, 1 × classes × 1, its pooling included. Average pooling
    changes nothing at 32×32, where one position is left; larger images need it.

    Args:
        plan: The stacks before the output.
        classes: How many outputs (n, classes) the network has.
        make: Makes the layers.
        rates: Dropout rate of each stack's last layer.

    Raises:
        ValueError: There are not as many rates as stacks.
    """
    parts = stacks(plan, make)
    parts["output"] = make.draw(nn.Conv2d(plan[-1][-1].units, classes, 1, device="meta"))
    parts["pool"] = make.pool()
    parts["average"], parts["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    network = nn.Sequential(parts)
    set_dropout(network, rates)
    return network


def pyramidal(
    plan: Sequence[Stack],
    hidden: Sequence[int],
    classes: int,
    make: Maker,
    *,
    bins: Sequence[int] = (4, 2, 1),
) -> nn.Sequential:
    """Stack ``stack1``, ..., ``pyramid``, ``hidden1``, ``act1``, ``drop1``, ..., ``output``.

    Args:
        plan: The stacks of convolutions, without dropout.
        hidden: Units of the fully connected layers, each with dropout of rate 0.5.
        classes: How many outputs (n, classes) the network has, for images of any size.
        make: Makes the layers.
        bins: A side of each level of the pyramid.
    """
    parts = stacks(plan, make)
    parts["pyramid"] = pyramid = PyramidPool(bins)
    inputs = pyramid.features(plan[-1][-1].units)
    for i, units in enumerate(hidden, start=1):
        parts |= make.hidden(i, inputs, units)
        parts[f"drop{i}"] = nn.Dropout(0.5)
        inputs = units
    parts["output"] = make.draw(nn.Linear(inputs, classes, device="meta"))
    return nn.Sequential(parts)


def cifar11(
    classes: int,
    generator: torch.Generator,
    activation: str = "elu",
    *,
    norm: str = "none",
    padding: str = "caffe",
    weight_variance: float = 2.0,
) -> nn.Sequential:
    """The paper's network for CIFAR-100 curves: 11 convolutions, 1.67 million parameters.

    A batch (n, 3, 32, 32) becomes (n, classes). Options as of ``Maker``, which raises for them.
    """
    make = Maker(generator, activation, norm, padding, weight_variance)
    return all_convolutional(CIFAR11, classes, make, RATES[: len(CIFAR11)])


def cifar18(
    classes: int,
    generator: torch.Generator,
    activation: str = "elu",
    *,
    norm: str = "none",
    padding: str = "caffe",
    weight_variance: float = 2.0,
) -> nn.Sequential:
    """The paper's best network for CIFAR: 18 convolutions and the output, 39.3 million parameters.

    A batch (n, 3, 32, 32) becomes (n, classes). Options as of ``Maker``, which raises for them.
    """
    make = Maker(generator, activation, norm, padding, weight_variance)
    return all_convolutional(CIFAR18, classes, make, RATES)


def imagenet15(
    classes: int,
    generator: torch.Generator,
    activation: str = "elu",
    *,
    norm: str = "none",
    padding: str = "caffe",
    weight_variance: float = 2.0,
) -> nn.Sequential:
    """The paper's network for ImageNet: 15 layers, 165 million parameters for 1000 classes.

    A batch (n, 3, 224, 224), or of images of another size, becomes (n, classes). [R] three levels
    of the pyramid; [I] their bins and a stride of 1: ``pyramidal`` takes others. Options as of
    ``Maker``, which raises for them.
    """
    make = Maker(generator, activation, norm, padding, weight_variance)
    return pyramidal(IMAGENET15, (4096, 4096), classes, make)
