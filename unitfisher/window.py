"""The newest measured batches, pooled: one alone may have too few cases for s and k."""

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
    """The cases of each layer that a batch has reached."""

    samples: int
    cases: dict[str, UnitCases]


class Window:
    """Holds the cases of the newest batches that were finite, in order."""

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.newest: deque[Batch] = deque(maxlen=batches)

    def pooled(self, observations: Mapping[str, Observation]) -> dict[str, Observation]:
        """Add a batch, and return its observations with the cases of all batches held.

        A batch with NaN or infinity is returned as it is and not held.
        """
        if self.batches == 1 or any(each.fault for each in observations.values()):
            return dict(observations)
        cases = {name: each.cases for name, each in observations.items()}
        self.newest.append(Batch(next(iter(cases.values())).samples, cases))
        return {name: replace(x, cases=self._joined(name)) for name, x in observations.items()}

    def pass_by(self, samples: int) -> None:
        """Count a batch that has reached no layer."""
        self.newest.append(Batch(samples, {}))

    def state(self) -> State:
        return [
            (
                batch.samples,
                {
                    name: (unfolded(cases.received), cases.delta, cases.replicates, cases.in_order)
                    for name, cases in batch.cases.items()
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
        return [t for batch in self.newest for x in batch.cases.values() for t in x.tensors]

    def _joined(self, name: str) -> UnitCases:
        """Join a layer's cases; batches that have not reached it count in the number of samples."""
        whole = joined([batch.cases[name] for batch in self.newest if name in batch.cases])
        samples = sum(batch.samples for batch in self.newest)
        share = whole.samples / samples
        return whole if share == 1 else replace(whole, delta=whole.delta * share**0.5)


def joined(batches: Sequence[UnitCases]) -> UnitCases:
    """Return the cases of several batches as those of one.

    Raises:
        ValueError: Their gradients are sums over different numbers of positions.
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
    """Number the samples of all batches; None if each has as many cases, or it is not needed."""
    lengths = {cases.delta.shape[1] / cases.samples for cases in batches}
    asked = batches[0].replicates > 1 and all(cases.in_order for cases in batches)
    if len(lengths) == 1 or not asked:
        return None
    before = accumulate((cases.samples for cases in batches), initial=0)
    return torch.cat([n + cases.of_sample for n, cases in zip(before, batches, strict=False)])
