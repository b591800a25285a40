"""Models of torchvision and timm, where these are installed."""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import Final

import torch
from torch import nn

from unitfisher.experiments.stacks import Maker


def model_of(
    package: str,
    model: str,
    classes: int,
    generator: torch.Generator,
    activation: str | None = None,
) -> nn.Module:
    """Let a package build one of its models, with its initial weights as the generator draws them.

    Args:
        package: A key of ``PACKAGES``.
        model: As the package names it.
        classes: How many outputs the model has.
        generator: Seeds torch's global generator while the package draws from it.
        activation: A key of ``ACTIVATIONS``, in place of every ``nn.ReLU`` module; None: its own.

    Raises:
        ValueError: The package has no such model, or the model no ``nn.ReLU`` to replace.
        ModuleNotFoundError: The package is not installed.
    """
    make = Maker(generator, activation or "relu")
    create = PACKAGES[package](model)
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]):  # models are made on the CPU
        torch.default_generator.manual_seed(seed)
        network = create(model, num_classes=classes)
    if activation is not None:
        _replace_relus(network, make)
    return network


def _replace_relus(network: nn.Module, make: Maker) -> None:
    modules = network.named_modules(remove_duplicate=False)
    names = [name for name, module in modules if type(module) is nn.ReLU]
    if not names:
        raise ValueError(
            f"{type(network).__name__} has no nn.ReLU to replace: leave it its own activation, "
            "None (in a preset, activations=('own',))"
        )
    for name in names:
        network.set_submodule(name, make.act())


def _torchvision(model: str) -> Callable[..., nn.Module]:
    models = _installed("torchvision.models")
    _require_known(model, models.list_models(module=models))
    create: Callable[..., nn.Module] = models.get_model
    return create


def _timm(model: str) -> Callable[..., nn.Module]:
    timm = _installed("timm")
    _require_known(model, timm.list_models())
    create: Callable[..., nn.Module] = timm.create_model
    return create


PACKAGES: Final = MappingProxyType({"torchvision": _torchvision, "timm": _timm})


def _installed(module: str) -> ModuleType:
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"networks named {package}:NAME need the package ({error}): pip install {package}"
        ) from error


def _require_known(model: str, models: Sequence[str]) -> None:
    if model not in models:
        near = ", ".join(get_close_matches(model, models)) or f"{len(models)} others"
        raise ValueError(f"the package has no model {model!r}; there are {near}")
