"""The networks of a preset's members."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from unitfisher.experiments.models import HE, mlp
from unitfisher.experiments.networks import build
from unitfisher.experiments.presets import Member, Preset
from unitfisher.experiments.sources import Source
from unitfisher.experiments.tasks import TASKS


def networks_of(
    preset: Preset,
    members: Sequence[Member],
    generators: Sequence[torch.Generator],
    source: Source,
) -> list[nn.Sequential]:
    """Build each member's network, with the weights that its seed draws.

    Raises:
        ValueError: The package has no such network, or the network no ReLU to replace.
        ModuleNotFoundError: The package is not installed.
    """
    networks = []
    for member, generator in zip(members, generators, strict=True):
        generator.manual_seed(member.seed)  # members of a seed share it: all begin alike
        networks.append(_network(preset, member, generator, source))
    return networks


def _network(
    preset: Preset, member: Member, generator: torch.Generator, source: Source
) -> nn.Sequential:
    if preset.network == "mlp":
        inputs = source.shape.numel()
        sizes = [inputs, *preset.hidden, TASKS[preset.task].outputs(inputs, source.classes)]
        variance = HE if preset.weight_variance is None else preset.weight_variance
        return mlp(
            sizes,
            member.activation,
            generator,
            weight_variance=variance,
            norm=preset.norm,
            initial=preset.initial or "uniform",
        )
    norm = preset.norm if preset.norm != "none" else None
    built = build(
        preset.network,
        source.classes,
        member.activation if member.activation != "own" else None,
        generator,
        norm=norm,
        padding=preset.padding,
        weight_variance=preset.weight_variance,
        initial=preset.initial,
        stride=preset.stride,
        pyramid=preset.pyramid,
        dropout=preset.dropout,
    )
    return built if isinstance(built, nn.Sequential) else nn.Sequential(OrderedDict(network=built))
