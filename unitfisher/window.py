"""The newest measured batches of each layer, pooled: a single one may say little of s and k."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from jaxtyping import Int
from torch import Tensor

from unitfisher.cases import UnitCases
from unitfisher.observer import Observation
from unitfisher.patches import unfolded

State = dict[str, list[tuple[Tensor, Tensor, int, int, bool]]]


class Window:
    """Holds the cases of the newest batches that were finite, in order."""

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.newest: dict[str, deque[UnitCases]] = {}

    def pooled(self, observations: Mapping[str, Observation]) -> dict[str, Observation]:
        """Take a batch in and return its observations with the cases of all that are held.

        A batch with NaN or infinity is returned as it is and not held.
        """
        if self.batches == 1:
            return dict(observations)
        return {name: self._with_earlier(name, of) for name, of in observations.items()}

    def state(self) -> State:
        return {
            name: [
                (
                    unfolded(cases.received),
                    *(cases.delta, cases.samples, cases.replicates, cases.in_order),
                )
                for cases in held
            ]
            for name, held in self.newest.items()
        }

    def load(self, state: State) -> None:
        self.newest = {
            name: deque(
                (
                    UnitCases(a, delta, samples, replicates=k, in_order=all(in_order))
                    for a, delta, samples, k, *in_order in held
                ),
                self.batches,
            )
            for name, held in state.items()
        }

    @property
    def tensors(self) -> list[Tensor]:
        held = [cases for batches in self.newest.values() for cases in batches]
        return [t for cases in held for t in cases.tensors]

    def _with_earlier(self, name: str, observation: Observation) -> Observation:
        if observation.fault is not None:
            return observation
        held = self.newest.setdefault(name, deque(maxlen=self.batches))
        held.append(observation.cases)
        return replace(observation, cases=joined(list(held)))


def joined(batches: Sequence[UnitCases]) -> UnitCases:
    """Return the cases of several batches as those of one.

    Raises:
        ValueError: Their gradients are joined over different numbers of positions.
    """
    positions = {cases.delta.shape[2] for cases in batches}
    if len(positions) > 1:
        raise ValueError(
            f"batches of {sorted(positions)} positions cannot be pooled with sharing='joint': pad "
            f"sequences to one length, or use sharing='expand'"
        )
    return replace(
        batches[0],
        received=torch.cat([unfolded(cases.received) for cases in batches], 1),
        delta=torch.cat([cases.delta for cases in batches], 1),
        samples=sum(cases.samples for cases in batches),
        sample=_of_samples(batches),
        in_order=all(cases.in_order for cases in batches),
    )


def _of_samples(batches: Sequence[UnitCases]) -> Int[Tensor, " m"] | None:
    """Number samples through; None where all have as many cases, or nobody will ask."""
    lengths = {cases.delta.shape[1] / cases.samples for cases in batches}
    asked = batches[0].replicates > 1 and all(cases.attributed for cases in batches)
    if len(lengths) == 1 or not asked:
        return None
    before = accumulate((cases.samples for cases in batches), initial=0)
    return torch.cat([n + cases.of_sample for n, cases in zip(before, batches, strict=False)])
