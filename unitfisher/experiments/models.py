"""The paper's fully connected networks, alike in everything but the activation."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import sqrt
from types import MappingProxyType
from typing import Final, Literal, NamedTuple, TypeVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unitfisher.choices import require_choice

Initial = Literal["uniform", "normal"]
ActivationName = Literal["relu", "lrelu", "srelu", "elu", "prelu", "gelu", "silu", "selu"]
Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)
HE: Final = 2.0  # variance of initial weights, times fan-in


class SReLU(nn.Module):
    """The shifted rectifier max(-1, x): ELU's negative value with a ReLU's corner."""

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return x.clamp(min=-1)


class Activation(NamedTuple):
    """An activation function: its name in tables, and how to make one."""

    label: str
    module: Callable[[], nn.Module]


ACTIVATIONS: Final = MappingProxyType(
    {
        "relu": Activation("ReLU", nn.ReLU),
        "lrelu": Activation("LReLU", lambda: nn.LeakyReLU(0.1)),
        "srelu": Activation("SReLU", SReLU),
        "elu": Activation("ELU", nn.ELU),
        "prelu": Activation("PReLU", nn.PReLU),
        "gelu": Activation("GELU", nn.GELU),
        "silu": Activation("SiLU", nn.SiLU),
        "selu": Activation("SELU", nn.SELU),
    }
)


def mlp(
    sizes: Sequence[int],
    activation: str,
    generator: torch.Generator,
    *,
    weight_variance: float = HE,
    norm: str = "none",
    initial: str = "uniform",
) -> nn.Sequential:
    """Stack ``hidden1``, ``act1``, ``hidden2``, ..., ``output``.

    One seed gives the same initial weights for every activation, as in the paper.

    Args:
        sizes: Inputs, hidden units layer by layer, outputs.
        activation: A key of ``ACTIVATIONS``.
        generator: Draws the weights; biases start at 0.
        weight_variance: Of the weights, times fan-in: 1/3 is that of torch's own layers.
        norm: "none", or "batch": normalisation ``norm1``, ... before each activation.
        initial: Distribution of the weights about 0, "uniform" or "normal".

    Raises:
        ValueError: There is no such activation, normalisation or distribution.
    """
    require_choice("norm", norm, ("none", "batch"))
    if activation not in ACTIVATIONS:
        raise ValueError(f"no activation {activation!r}; there are {', '.join(ACTIVATIONS)}")
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes[:-1]), start=1):
        layer = nn.Linear(fan_in, fan_out, device="meta")
        parts[f"hidden{i}"] = drawn(layer, weight_variance, generator, initial)
        if norm == "batch":
            parts[f"norm{i}"] = nn.BatchNorm1d(fan_out)
        parts[f"act{i}"] = ACTIVATIONS[activation].module()
    output = nn.Linear(sizes[-2], sizes[-1], device="meta")
    parts["output"] = drawn(output, weight_variance, generator, initial)
    return nn.Sequential(parts)


def drawn(
    layer: Layer, variance: float, generator: torch.Generator, initial: str = "uniform"
) -> Layer:
    """Give a layer its initial weights: of mean 0 and that variance times fan-in, and biases of 0.

    The layer is made on the meta device, where it takes nothing from the global generator.
    """
    require_choice("initial", initial, get_args(Initial))
    weight, fan_in = torch.empty(layer.weight.shape), layer.weight[0].numel()
    if initial == "normal":
        weight.normal_(0, sqrt(variance / fan_in), generator=generator)
    else:
        bound = sqrt(3 * variance / fan_in)
        weight.uniform_(-bound, bound, generator=generator)
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(torch.zeros(len(weight)))
    return layer
