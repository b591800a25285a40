"""Dropout whose masks each member of an ensemble draws as if it trained alone."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unitfisher.experiments.presets import Member
from unitfisher.experiments.seeds import MASKS, mixed


def generators_of(
    members: Sequence[Member], device: torch.device, rank: int
) -> list[torch.Generator]:
    """Make a generator for each member, from its seed, and of each process its own."""
    seeds = [mixed(member.seed, MASKS, rank) for member in members]
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


class MemberDropout(nn.Module):
    """One dropout layer of every member; rates may change between steps.

    A compiled model draws from torch's global generator: a generator cannot be passed to it.

    Args:
        drops: The members' own layers, which say the rates.
        chances: The members' generators, which all their layers draw from; on the device of their
            activations.
    """

    def __init__(self, drops: Sequence[nn.Dropout], chances: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.drops, self.chances = list(drops), list(chances)

    def forward(self, x: Float[Tensor, "m n ..."]) -> Float[Tensor, "m n ..."]:
        rates = [drop.p for drop in self.drops]
        if not self.training or not any(rates):
            return x
        mask = torch.empty_like(x)
        for of_member, rate, chance in zip(mask, rates, self.chances, strict=True):
            kept = 1 - rate
            drawn_by = None if torch.compiler.is_compiling() else chance
            of_member.bernoulli_(kept, generator=drawn_by).div_(kept)
        return x * mask
