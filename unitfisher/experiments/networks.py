"""Every convolutional network by its name."""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from types import MappingProxyType
from typing import Final

import torch
from torch import nn

from unitfisher.experiments.comparisons import all_cnn_c, cuda_convnet, dsn, maxout, nin
from unitfisher.experiments.convnets import cifar11, cifar18, imagenet15
from unitfisher.experiments.packages import PACKAGES, model_of

NETWORKS: Final = MappingProxyType[str, Callable[..., nn.Module]](
    {
        "cifar11": cifar11,
        "cifar18": cifar18,
        "imagenet15": imagenet15,
        "cuda-convnet": cuda_convnet,
        "nin": nin,
        "dsn": dsn,
        "maxout": maxout,
        "all-cnn-c": all_cnn_c,
    }
)


def require_known(name: str, also: Sequence[str] = ()) -> None:
    """Refuse what names no network.

    Args:
        name: A key of ``NETWORKS``, or "torchvision:NAME" or "timm:NAME".
        also: Other names that are allowed.

    Raises:
        ValueError: It is none of these.
    """
    package, _, model = name.partition(":")
    if name not in (*also, *NETWORKS) and not (package in PACKAGES and model):
        forms = ", ".join([*also, *NETWORKS, *(f"{package}:NAME" for package in PACKAGES)])
        raise ValueError(f"no network {name!r}; there are {forms} (as in torchvision:resnet18)")


def build(
    name: str,
    classes: int,
    activation: str | None,
    generator: torch.Generator,
    *,
    norm: str | None = None,
    padding: str | None = None,
    weight_variance: float | None = None,
    initial: str | None = None,
    stride: int | None = None,
    pyramid: Sequence[int] | None = None,
    dropout: float | None = None,
) -> nn.Module:
    """Build a network by its name; an option that is None is the network's own.

    Args:
        name: A key of ``NETWORKS``, or "torchvision:NAME" or "timm:NAME" for a model of these
            packages, with their initial weights.
        classes: How many outputs the network has.
        activation: A key of ``ACTIVATIONS``. In a package's model it takes the place of every
            ``nn.ReLU`` module; activations that the model calls as functions stay.
        generator: Draws the weights.
        norm: As in ``Maker``, like the next three, if the network's builder takes it.
        padding: "caffe" or "same".
        weight_variance: Of the initial weights, times fan-in.
        initial: Distribution of the initial weights.
        stride: As in ``imagenet15``, like the next two.
        pyramid: Bins of the pyramid's levels.
        dropout: Rate of the fully connected layers.

    Raises:
        ValueError: The name is unknown, or the network does not take one of the options.
        ModuleNotFoundError: The package is not installed.
    """
    require_known(name)
    package, _, model = name.partition(":")
    builder = NETWORKS.get(name) or partial(model_of, package, model)
    given: dict[str, object] = {"activation": activation, "norm": norm, "padding": padding}
    given |= {"weight_variance": weight_variance, "initial": initial}
    given |= {"stride": stride, "pyramid": pyramid, "dropout": dropout}
    options = {option: value for option, value in given.items() if value is not None}
    refused = [option for option in options if option not in signature(builder).parameters]
    if refused:
        raise ValueError(f"{name} has its own {' and '.join(refused)}: leave None there")
    return builder(classes, generator, **options)
