"""The networks that the paper's table compares with.

For images of 32×32, layer by layer as in the file that each function names; the weights are drawn
as for the paper's own networks, not as in these files. Pooling rounds up, as in all of them.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from unitfisher.experiments.stacks import Conv, Maker, Modules, Stack

NIN: Final[tuple[Stack, ...]] = (
    (Conv(192, 5), Conv(160, 1), Conv(96, 1)),
    (Conv(192, 5), Conv(192, 1), Conv(192, 1)),
    (Conv(192, 3), Conv(192, 1)),
)
ALL_CNN_C: Final[tuple[Stack, ...]] = (
    (Conv(96, 3), Conv(96, 3), Conv(96, 3, stride=2)),
    (Conv(192, 3), Conv(192, 3), Conv(192, 3, stride=2)),
    (Conv(192, 3, pad=0), Conv(192, 1)),
)
CUDA_CONVNET: Final[tuple[tuple[int, Callable[..., nn.Module]], ...]] = (
    (32, nn.MaxPool2d),
    (32, nn.AvgPool2d),
    (64, nn.AvgPool2d),
)
MAXOUT: Final = ((Conv(96, 8, pad=4), 4), (Conv(192, 8, pad=3), 4), (Conv(192, 5, pad=3), 2))


class LocalNorm(nn.Module):
    """Local response normalisation x / (1 + α mean x²)^β, the mean over 3×3 of one map.

    References:
        cuda-convnet's layer "rnorm"; torch's LocalResponseNorm goes across maps.
    """

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        y: Tensor = x / (1 + 5e-5 * F.avg_pool2d(x.square(), 3, stride=1, padding=1)) ** 0.75
        return y


class Maxout(nn.Module):
    """The largest of every ``pieces`` channels in a row."""

    def __init__(self, pieces: int) -> None:
        super().__init__()
        self.pieces = pieces

    def forward(self, x: Float[Tensor, "n p ..."]) -> Float[Tensor, "n u ..."]:
        pieces: Tensor = x.unflatten(1, (-1, self.pieces))
        return pieces.amax(2)

    def extra_repr(self) -> str:
        return f"pieces={self.pieces}"


class Supervised(NamedTuple):
    """What DSN returns in training mode; a Monitor takes the ``logits``."""

    logits: Float[Tensor, "*m n c"]
    companions: tuple[Float[Tensor, "*m n c"], ...]


def classifiers(outputs: Any) -> tuple[Tensor, ...]:
    """Return the logits of every classifier that is trained: the network's, then its companions'.

    Raises:
        ValueError: The network returns something else.
    """
    if isinstance(outputs, Supervised):
        return outputs.logits, *outputs.companions
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"the network returns {type(outputs).__name__} in training; what can be trained "
            "returns a tensor, or Supervised"
        )
    return (outputs,)


class DSN(nn.Module):
    """A trunk of stacks, and a companion classifier on each stack's first convolution.

    Training mode returns ``Supervised``, eval mode the logits alone, as torchvision's GoogLeNet
    does. The companions see the convolution before its activation. They do not act on the logits:
    let a Monitor observe "trunk.*".
    """

    def __init__(self, trunk: nn.Sequential, companions: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.trunk = trunk
        self.companions = nn.ModuleList(companions)

    def forward(self, x: Float[Tensor, "n 3 32 32"]) -> Supervised | Float[Tensor, "n c"]:
        answers: list[Tensor] = []
        for part in self.trunk:
            if self.training and isinstance(part, nn.Sequential):
                x = part[0](x)
                answers.append(self.companions[len(answers)](x.flatten(1)))
                part = part[1:]
            x = part(x)
        return Supervised(x, tuple(answers)) if self.training else x


def cuda_convnet(
    classes: int, generator: torch.Generator, activation: str = "relu"
) -> nn.Sequential:
    """The table's "AlexNet": cuda-convnet's 18 % network (layers-18pct.cfg).

    The file has the first activation behind the pooling, which is the same while it is monotone.
    """
    make = Maker(generator, activation)
    parts = Modules()
    channels = 3
    for i, (units, pool) in enumerate(CUDA_CONVNET, start=1):
        parts |= make.convolution(i, channels, Conv(units, 5))
        parts[f"pool{i}"] = pool(3, 2, ceil_mode=True)
        parts[f"lrn{i}"] = LocalNorm()
        channels = units
    del parts["lrn3"]
    parts["flatten"] = nn.Flatten()
    parts["output"] = make.draw(nn.Linear(channels * 4 * 4, classes, device="meta"))
    return nn.Sequential(parts)


def nin(
    classes: int, generator: torch.Generator, activation: str = "relu", *, norm: str = "none"
) -> nn.Sequential:
    """Network in network (mavenlin/cuda-convnet, NIN/cifar-10_def), its class maps activated too.

    The authors' Caffe model for CIFAR-10 has an average in its second pooling.
    """
    make = Maker(generator, activation, norm)
    return nn.Sequential(_class_maps(NIN, classes, make, pooled=True) | _average(make.act()))


def dsn(
    classes: int, generator: torch.Generator, activation: str = "relu", *, norm: str = "none"
) -> DSN:
    """Deeply-supervised net (s9xie/DSN, best_cifar10_9.65): NIN's layers and three companions."""
    make = Maker(generator, activation, norm)
    trunk = nn.Sequential(_class_maps(NIN, classes, make, pooled=True) | _average())
    inputs = [stack[0].units * side**2 for stack, side in zip(NIN, (32, 16, 8), strict=True)]
    return DSN(trunk, [make.draw(nn.Linear(d, classes, device="meta")) for d in inputs])


def all_cnn_c(
    classes: int, generator: torch.Generator, activation: str = "relu", *, norm: str = "none"
) -> nn.Sequential:
    """All-CNN-C (mateuszbuda/ALL-CNN): strides for pooling, its class maps activated too."""
    make = Maker(generator, activation, norm)
    parts = Modules({"drop0": nn.Dropout(0.2)}) | _class_maps(ALL_CNN_C, classes, make)
    return nn.Sequential(parts | _average(make.act()))


def maxout(classes: int, generator: torch.Generator) -> nn.Sequential:
    """Maxout network (lisa-lab/pylearn2, papers/maxout/cifar10.yaml), which is its own activation.

    The file does not scale up what its input dropout leaves; here it is scaled, as usual.
    """
    make = Maker(generator)
    parts = Modules({"drop0": nn.Dropout(0.2)})
    channels = 3
    for i, ((units, size, _, pad), pool) in enumerate(MAXOUT, start=1):
        layer = nn.Conv2d(channels, 2 * units, size, padding=pad or 0, device="meta")
        parts[f"conv{i}"], parts[f"maxout{i}"] = make.draw(layer), Maxout(2)
        parts[f"pool{i}"] = nn.MaxPool2d(pool, 2, ceil_mode=True)
        parts[f"drop{i}"] = nn.Dropout(0.5)
        channels = units
    parts["flatten"] = nn.Flatten()
    parts["hidden4"] = make.draw(nn.Linear(channels * 5 * 5, 5 * 500, device="meta"))
    parts["maxout4"], parts["drop4"] = Maxout(5), nn.Dropout(0.5)
    parts["output"] = make.draw(nn.Linear(500, classes, device="meta"))
    return nn.Sequential(parts)


def _class_maps(
    plan: Sequence[Stack], classes: int, make: Maker, *, pooled: bool = False
) -> Modules:
    """Make ``stack1``, ``pool1``, ``drop1``, ..., ``output``, which is 1×1."""
    parts = Modules()
    channels = 3
    for s, convs in enumerate(plan, start=1):
        stack = Modules()
        for i, conv in enumerate(convs, start=1):
            stack |= make.convolution(i, channels, conv)
            channels = conv.units
        parts[f"stack{s}"] = nn.Sequential(stack)
        if s < len(plan) and pooled:
            parts[f"pool{s}"] = nn.MaxPool2d(3, 2, ceil_mode=True)
        if s < len(plan):
            parts[f"drop{s}"] = nn.Dropout(0.5)
    parts["output"] = make.draw(nn.Conv2d(channels, classes, 1, device="meta"))
    return parts


def _average(act: nn.Module | None = None) -> Modules:
    parts = Modules({"act": act} if act is not None else {})
    return parts | {"average": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
