"""Members of an ensemble whose loss has come to NaN or infinity: named once, then left alone."""

import warnings
from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Bool, Float
from torch import Tensor

from unitfisher.experiments.presets import Member, named


class DivergedError(ArithmeticError):
    """Every training of an ensemble has come to a loss that is NaN or infinite."""


def diverged(
    before: Bool[Tensor, " m"],
    loss: Float[Tensor, " m"],
    members: Sequence[Member],
    *,
    step: int,
    checkpoint: Path,
    aloud: bool,
) -> Bool[Tensor, " m"]:
    """Mark the members that have diverged, those of before among them; warn aloud of new ones.

    Raises:
        DivergedError: None is left.
    """
    found = before | ~loss.isfinite().cpu()
    news = found & ~before
    if found.all():
        raise DivergedError(
            f"by step {step} the loss of {named(members)} is NaN or infinite; "
            f"{checkpoint} holds the last finite state that was kept. "
            "Train with a smaller rate, in another folder"
        )
    if aloud and news.any():
        warnings.warn(
            f"{named(m for m, new in zip(members, news, strict=True) if new)} diverged "
            f"by step {step}: the loss is NaN or infinite, and is recorded so",
            stacklevel=4,
        )
    return found
