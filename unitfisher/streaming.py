"""A whole data set measured batch by batch, as sums whose memory does not grow."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unitfisher.cases import UnitCases
from unitfisher.condensed import Condensed, split, sums
from unitfisher.loader import Batches
from unitfisher.memory import within
from unitfisher.moments import Part
from unitfisher.observation import Gradient, Observation
from unitfisher.outputs import UnitMeans
from unitfisher.rounds import Rounds, solve_together
from unitfisher.sums import UnitMoments
from unitfisher.uncertainty import variance_of_sum


@dataclass
class PartSums:
    """Second moments of the units, in parts."""

    route: ClassVar = "sums"
    held: list[tuple[slice, UnitMoments]]

    @classmethod
    def of(cls, cases: UnitCases) -> "PartSums":
        return cls([(part, sums(cases.of_units(part))) for part in split(cases, "sums")])

    def add(self, cases: UnitCases) -> None:
        """Add a batch, about the origins of the first one, replacing one part after another."""
        for i, (part, m) in enumerate(self.held):
            self.held[i] = part, m + sums(cases.of_units(part), m.origin)

    def average_over(self, samples: int) -> None:
        """Average over this many samples, though only some of them have reached the layer."""
        count = self.held[0][1].samples.new_tensor(samples)
        self.held = [(part, replace(m, samples=count)) for part, m in self.held]

    def parts(self) -> Iterator[tuple[slice, UnitMoments]]:
        return iter(self.held)

    def damped_parts(self, damping: float) -> Iterator[Part]:
        return (Part(part, m, m.damped(damping)) for part, m in self.held)

    def forget(self) -> None:
        """Do nothing: no solved systems are kept."""

    @property
    def tensors(self) -> list[Tensor]:
        return [t for _, m in self.held for t in vars(m).values() if isinstance(t, Tensor)]


@dataclass
class UnitSums:
    """The summaries that `UnitCases` gives of a layer, over batches whose cases are not kept."""

    mean: Float[Tensor, "*g d"]
    trace_variance: Float[Tensor, "*g"]
    weight: Float[Tensor, " u"]  # Σ D
    weight_squared: Float[Tensor, " u"]  # Σ D²
    variance: Float[Tensor, " u"]  # of Σ D, from drawn labels or signs
    samples: int
    count: int  # of samples times positions
    unmoved: Bool[Tensor, " u"] | None  # whose bias has no effect in any batch; None: unknown

    @classmethod
    def of(cls, cases: UnitCases) -> "UnitSums":
        """Begin with a batch."""
        D = cases.D
        moments = cases.mean, cases.trace_variance, D.sum(0), (D**2).sum(0)
        return cls(*moments, variance_of_sum(cases), cases.samples, _count(cases), cases.unmoved)

    def add(self, cases: UnitCases) -> None:
        """Add a batch."""
        total = self.count + _count(cases)
        q, shift = _count(cases) / total, cases.mean - self.mean
        variance = (1 - q) * self.trace_variance + q * cases.trace_variance
        self.mean = self.mean + q * shift
        self.trace_variance = variance + q * (1 - q) * (shift**2).sum(-1)
        self.weight = self.weight + cases.D.sum(0)
        self.weight_squared = self.weight_squared + (cases.D**2).sum(0)
        self.variance = self.variance + variance_of_sum(cases)
        self.samples, self.count = self.samples + cases.samples, total
        known, others = self.unmoved, cases.unmoved
        self.unmoved = None if known is None or others is None else known & others

    @property
    def units(self) -> int:
        return len(self.weight)

    @property
    def inputs(self) -> int:
        return self.mean.shape[-1]

    @property
    def dead(self) -> Bool[Tensor, " u"]:
        return self.weight == 0 if self.unmoved is None else self.unmoved

    @property
    def n_eff(self) -> Float[Tensor, " u"]:
        return (self.weight**2 / self.weight_squared).masked_fill(self.dead, torch.nan)

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in vars(self).values() if isinstance(t, Tensor)]


Cases = UnitCases | UnitSums
Held = Condensed | PartSums | Rounds


@dataclass
class Streamed:
    """One layer over all batches, as `Observation` is one layer in one pass."""

    cases: UnitSums
    held: PartSums | Rounds
    means: UnitMeans
    gradient: Gradient | None
    fault: str | None

    @classmethod
    def of(cls, batches: Batches, layer: str, first: Observation) -> "Streamed":
        cases = replace(first.cases)  # a copy, so that what it caches is freed with it
        passing = layer in batches.planner.budget.passing
        held = Rounds.of(batches, layer, cases) if passing else PartSums.of(cases)
        return cls(UnitSums.of(cases), held, first.means, first.gradient, first.fault)

    def add(self, other: Observation) -> None:
        """Add a batch; from one with NaN or infinity on, only that fault is kept."""
        self.fault = self.fault or other.fault
        if self.fault:
            return
        cases = replace(other.cases)  # as above
        self.held.add(cases)
        self.cases.add(cases)
        self.means = self.means.joined(other.means)
        share = other.cases.samples / self.cases.samples
        self.gradient = _averaged(self.gradient, other.gradient, share)

    def average_over(self, samples: int) -> None:
        """Average over all samples of all batches: some may not have reached this layer."""
        reached, self.cases.samples = self.cases.samples, samples
        if reached < samples:
            self.held.average_over(samples)  # not the gradient: only its direction is used

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.cases.tensors, *self.held.tensors]


def observe_all(batches: Batches, damping: float) -> dict[str, Streamed]:
    """Observe batch after batch and keep sums; solve layers whose sums are too large.

    Raises:
        ValueError: There is no batch.
        LoaderError: A loader that had to be read again gave other batches.
        MemoryBudgetError: What is kept of these layers would exceed the budget.
    """
    total: dict[str, Streamed] = {}
    for observations in batches.once():
        with within(batches.planner.workspace):
            for name, one in observations.items():
                if name in total:
                    total[name].add(one)
                else:
                    total[name] = Streamed.of(batches, name, one)
    for layer in total.values():
        layer.average_over(batches.samples)
    sound = [(layer.held, layer.gradient) for layer in total.values() if not layer.fault]
    passing = [(held, gradient) for held, gradient in sound if isinstance(held, Rounds)]
    if passing:
        solve_together(passing, damping)
    return total


def _count(cases: UnitCases) -> int:
    return cases.delta.shape[1] * cases.delta.shape[2]


def _averaged(g: Gradient | None, other: Gradient | None, q: float) -> Gradient | None:
    if g is None or other is None:
        return None
    return g.times(1 - q).plus(other.times(q))
