"""The newest measured batches of each layer, pooled: a single one may say little of s and k."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from unitfisher.cases import UnitCases
from unitfisher.observation import Observation
from unitfisher.patches import unfolded

State = list[tuple[int, dict[str, tuple[Tensor, Tensor, int, bool]]]]


class Batch(NamedTuple):
    """The cases of each layer that a batch has come to."""

    samples: int
    cases: dict[str, UnitCases]


class Window:
    """Holds the cases of the newest batches that were finite, in order."""

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.newest: deque[Batch] = deque(maxlen=batches)

    def pooled(self, observations: Mapping[str, Observation]) -> dict[str, Observation]:
        """Take a batch in and return its observations with the cases of all that are held.

        A batch with NaN or infinity is returned as it is and not held.
        """
        if self.batches == 1 or any(of.fault for of in observations.values()):
            return dict(observations)
        cases = {name: of.cases for name, of in observations.items()}
        self.newest.append(Batch(next(iter(cases.values())).samples, cases))
        return {name: replace(of, cases=self._joined(name)) for name, of in observations.items()}

    def pass_by(self, samples: int) -> None:
        """Count a batch that has come to no layer."""
        self.newest.append(Batch(samples, {}))

    def state(self) -> State:
        return [
            (
                batch.samples,
                {
                    name: (unfolded(of.received), of.delta, of.replicates, of.in_order)
                    for name, of in batch.cases.items()
                },
            )
            for batch in self.newest
        ]

    def load(self, state: State) -> None:
        self.newest.clear()
        for samples, held in state:
            cases = {
                name: UnitCases(a, delta, samples, replicates=k, in_order=in_order)
                for name, (a, delta, k, in_order) in held.items()
            }
            self.newest.append(Batch(samples, cases))

    @property
    def tensors(self) -> list[Tensor]:
        return [t for batch in self.newest for of in batch.cases.values() for t in of.tensors]

    def _joined(self, name: str) -> UnitCases:
        """Join a layer's cases; batches that have not come to it count with their samples."""
        whole = joined([batch.cases[name] for batch in self.newest if name in batch.cases])
        samples = sum(batch.samples for batch in self.newest)
        share = whole.samples / samples
        return whole if share == 1 else replace(whole, delta=whole.delta * share**0.5)


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
    asked = batches[0].replicates > 1 and all(cases.in_order for cases in batches)
    if len(lengths) == 1 or not asked:
        return None
    before = accumulate((cases.samples for cases in batches), initial=0)
    return torch.cat([n + cases.of_sample for n, cases in zip(before, batches, strict=False)])
