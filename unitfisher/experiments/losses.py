"""Losses of an ensemble's members; one that becomes NaN or infinite is warned of once."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from unitfisher.experiments.presets import Member, named


class DivergedError(ArithmeticError):
    """The losses of all members of an ensemble are NaN or infinite."""


class Losses:
    """Each member's loss, summed over the steps since the last evaluation.

    Args:
        members: The ensemble's members.
        device: Where the losses are computed.
        checkpoint: File of the last finite state, which an error names.
        aloud: Warn of members that diverge: all processes have the same losses.
    """

    def __init__(
        self, members: Sequence[Member], device: torch.device, checkpoint: Path, *, aloud: bool
    ) -> None:
        self.members, self.checkpoint, self.aloud = members, checkpoint, aloud
        self.sum = torch.zeros(len(members), device=device)
        self.diverged = torch.zeros(len(members), dtype=torch.bool)

    def add(self, loss: Float[Tensor, " m"]) -> None:
        self.sum += loss

    def means(self, steps: int) -> list[float]:
        """Return each member's mean over ``steps`` steps, NaN if 0, and reset the sums."""
        means: list[float] = (self.sum / steps).tolist()
        self.sum.zero_()
        return means

    def name_diverged(self, step: int) -> None:
        """Mark the members that have diverged by a step; warn of new ones.

        Raises:
            DivergedError: None is left.
        """
        before, self.diverged = self.diverged, self.diverged | ~self.sum.isfinite().cpu()
        news = self.diverged & ~before
        if self.diverged.all():
            kept = f"{self.checkpoint} was written when the loss was still finite"
            raise DivergedError(
                f"by step {step} the loss of {named(self.members)} is NaN or infinite; "
                f"{kept if self.checkpoint.exists() else 'no checkpoint was kept'}. "
                "Train with a smaller rate, in another folder"
            )
        if self.aloud and news.any():
            warnings.warn(
                f"{named(m for m, new in zip(self.members, news, strict=True) if new)} diverged "
                f"by step {step}: the loss is NaN or infinite, and is recorded so",
                stacklevel=3,
            )

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps."""
        return {"loss": self.sum, "diverged": self.diverged}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.sum.copy_(state["loss"])
        self.diverged = state["diverged"]
