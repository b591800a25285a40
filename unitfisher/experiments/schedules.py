"""How learning rate and dropout change through a training."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from unitfisher.experiments.options import PHASE_RANGES, require_ranges


class Phase(NamedTuple):
    """Learning rate and dropout from a step on, until the next phase."""

    start: int
    factor: float = 1.0  # of the learning rate
    dropout: tuple[float, ...] = ()  # a rate for each stack; empty: unchanged
    dropped: Literal["last", "all"] = "last"  # layers of a stack


def phase_at(phases: Sequence[Phase], iteration: int) -> Phase:
    """Return the phase at a step; dropout that it does not set is that of earlier phases."""
    now = Phase(0)
    for phase in phases:
        if phase.start <= iteration:
            as_it_was = now._replace(start=phase.start, factor=phase.factor)
            now = phase if phase.dropout else as_it_was
    return now


def require_schedule(phases: Sequence[Phase]) -> None:
    """Refuse phases that are out of order, or have numbers out of their range.

    Raises:
        ValueError: Names the first of them.
    """
    for i, phase in enumerate(phases):
        require_ranges(phase._asdict(), PHASE_RANGES, f"phases.{i}.")
    starts = [phase.start for phase in phases]
    if starts != sorted(set(starts)):
        raise ValueError(f"phases start at {starts}: name them in order, once each")
