"""The paper's convolutional networks.

[R] marks what was read in the paper, [I] what it leaves open and is chosen here.
"""

from collections.abc import Sequence
from types import MappingProxyType
from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from unitfisher.experiments.models import HE
from unitfisher.experiments.stacks import Conv, Maker, Stack, set_dropout, stacks

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
# [R] the stacks, whose strides the paper does not name
IMAGENET15: Final[tuple[Stack, ...]] = (
    (Conv(96, 6),),
    (Conv(512, 3),) * 3,
    (Conv(768, 3),) * 5,
    (Conv(1024, 3),) * 3,
)
# [R] seven rates: the last is the 11-net's output's, [I] and the last hidden stack's of the 18-net
DROPOUT: Final = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.0)
# of each stack's last layer, by network
STACKS: Final = MappingProxyType(
    {"cifar11": DROPOUT[: len(CIFAR11)], "cifar18": DROPOUT, "imagenet15": (0.0,) * len(IMAGENET15)}
)
# [R] three levels; [I] their bins
PYRAMID: Final = (4, 2, 1)


class PyramidPool(nn.Module):
    """Spatial pyramid pooling: the maxima of 4×4, 2×2 and 1×1 bins of a map of any size.

    Args:
        bins: Of a side, level by level; others than 4, 2, 1 if given.

    References:
        He et al. (2014), Spatial pyramid pooling in deep convolutional networks, arXiv 1406.4729.
    """

    def __init__(self, bins: Sequence[int] = PYRAMID) -> None:
        super().__init__()
        self.bins = tuple(bins)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        return torch.cat([F.adaptive_max_pool2d(x, side).flatten(1) for side in self.bins], 1)

    def features(self, channels: int) -> int:
        return channels * sum(side**2 for side in self.bins)

    def extra_repr(self) -> str:
        return f"bins={self.bins}"


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
    bins: Sequence[int] = PYRAMID,
    dropout: float = 0.5,
) -> nn.Sequential:
    """Stack ``stack1``, ..., ``pyramid``, ``hidden1``, ``act1``, ``drop1``, ..., ``output``.

    Args:
        plan: The stacks of convolutions, without dropout.
        hidden: Units of the fully connected layers, each with dropout.
        classes: How many outputs (n, classes) the network has, for images of any size.
        make: Makes the layers.
        bins: Of the pyramid, as `PyramidPool` takes them.
        dropout: Rate of the fully connected layers.
    """
    parts = stacks(plan, make)
    parts["pyramid"] = pyramid = PyramidPool(bins)
    inputs = pyramid.features(plan[-1][-1].units)
    for i, units in enumerate(hidden, start=1):
        parts |= make.hidden(i, inputs, units)
        parts[f"drop{i}"] = nn.Dropout(dropout)
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
    weight_variance: float = HE,
    initial: str = "uniform",
) -> nn.Sequential:
    """The paper's network for CIFAR-100 curves: 11 convolutions, 1.67 million parameters.

    A batch (n, 3, 32, 32) becomes (n, classes). For the options and their errors see ``Maker``.
    """
    make = Maker(generator, activation, norm, padding, weight_variance, initial)
    return all_convolutional(CIFAR11, classes, make, STACKS["cifar11"])


def cifar18(
    classes: int,
    generator: torch.Generator,
    activation: str = "elu",
    *,
    norm: str = "none",
    padding: str = "caffe",
    weight_variance: float = HE,
    initial: str = "uniform",
) -> nn.Sequential:
    """The paper's best network for CIFAR: 18 convolutions and the output, 39.3 million parameters.

    A batch (n, 3, 32, 32) becomes (n, classes). For the options and their errors see ``Maker``.
    """
    make = Maker(generator, activation, norm, padding, weight_variance, initial)
    return all_convolutional(CIFAR18, classes, make, STACKS["cifar18"])


def imagenet15(
    classes: int,
    generator: torch.Generator,
    activation: str = "elu",
    *,
    norm: str = "none",
    padding: str = "caffe",
    weight_variance: float = HE,
    initial: str = "uniform",
    stride: int = 1,
    pyramid: Sequence[int] = PYRAMID,
    dropout: float = 0.5,
) -> nn.Sequential:
    """The paper's network for ImageNet: 15 layers, 165 million parameters for 1000 classes.

    A batch (n, 3, 224, 224), or of images of another size, becomes (n, classes). For the other
    options and their errors see ``Maker``.

    Args:
        stride: Of the first convolution; [I] 1.
        pyramid: Bins of the pyramid's levels. [R] three; [I] which.
        dropout: [R] Rate of the fully connected layers.
    """
    (first,), *others = IMAGENET15
    make = Maker(generator, activation, norm, padding, weight_variance, initial)
    plan = ((first._replace(stride=stride),), *others)
    return pyramidal(plan, (4096, 4096), classes, make, bins=pyramid, dropout=dropout)
