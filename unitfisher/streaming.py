"""A whole data set measured batch by batch: sums that add up, in memory that does not grow."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from unitfisher.cases import UnitCases
from unitfisher.fisher import Gradient, Observation, Observer, observe_now
from unitfisher.memory import within
from unitfisher.moments import UnitMoments
from unitfisher.outputs import UnitMeans
from unitfisher.passes import device_of
from unitfisher.uncertainty import variance_of_sum


@dataclass
class UnitSums:
    """What `UnitCases` says of a layer, as sums over batches: u·d² numbers, cases not kept."""

    held: list[tuple[slice, UnitMoments]]  # part after part of the units
    mean: Float[Tensor, "*g d"]
    trace_variance: Float[Tensor, "*g"]
    weight: Float[Tensor, " u"]  # Σ D
    weight_squared: Float[Tensor, " u"]  # Σ D²
    variance: Float[Tensor, " u"]  # of Σ D, from drawn labels or signs
    count: int  # of positions

    @classmethod
    def of(cls, cases: UnitCases) -> "UnitSums":
        held = [(part, cases.of_units(part).sums()) for part in cases.split()]
        D = cases.D
        moments = cases.mean, cases.trace_variance, D.sum(0), (D**2).sum(0)
        return cls(held, *moments, variance_of_sum(cases), _count(cases))

    def add(self, cases: UnitCases) -> None:
        """Add a batch, about the origins that the first one chose; part after part in place."""
        for i, (part, m) in enumerate(self.held):
            self.held[i] = part, m + cases.of_units(part).sums(m.origin)
        total = self.count + _count(cases)
        q, shift = _count(cases) / total, cases.mean - self.mean
        variance = (1 - q) * self.trace_variance + q * cases.trace_variance
        self.mean = self.mean + q * shift
        self.trace_variance = variance + q * (1 - q) * (shift**2).sum(-1)
        self.weight = self.weight + cases.D.sum(0)
        self.weight_squared = self.weight_squared + (cases.D**2).sum(0)
        self.variance = self.variance + variance_of_sum(cases)
        self.count = total

    def parts(self) -> Iterator[tuple[slice, UnitMoments]]:
        return iter(self.held)

    def damped_parts(self, damping: float) -> Iterator[tuple[slice, UnitMoments]]:
        return ((part, m.damped(damping)) for part, m in self.held)

    route = "sums"

    @property
    def units(self) -> int:
        return len(self.weight)

    @property
    def inputs(self) -> int:
        return self.mean.shape[-1]

    @property
    def dead(self) -> Bool[Tensor, " u"]:
        return self.weight == 0

    @property
    def n_eff(self) -> Float[Tensor, " u"]:
        return self.weight**2 / self.weight_squared

    @property
    def tensors(self) -> list[Tensor]:
        sums = [t for _, m in self.held for t in vars(m).values() if isinstance(t, Tensor)]
        known = self.mean, self.trace_variance, self.weight, self.weight_squared, self.variance
        return [*known, *sums]


Cases = UnitCases | UnitSums


@dataclass
class Streamed:
    """What all batches say of one layer; as `Observation` for one pass."""

    cases: UnitSums
    samples: int
    means: UnitMeans
    gradient: Gradient | None
    fault: str | None

    @classmethod
    def of(cls, first: Observation) -> "Streamed":
        cases = UnitSums.of(first.cases)
        return cls(cases, first.cases.samples, first.means, first.gradient, first.fault)

    def add(self, other: Observation) -> None:
        """Add a batch; after one with NaN or infinity nothing counts any more."""
        self.fault = self.fault or other.fault
        if self.fault:
            return
        self.samples += other.cases.samples
        self.cases.add(other.cases)
        self.means = self.means.joined(other.means)
        share = other.cases.samples / self.samples
        self.gradient = _averaged(self.gradient, other.gradient, share)


def is_loader(inputs: Any) -> bool:
    """Say whether this is an iterable of batches, not the input of one pass."""
    single = isinstance(inputs, Tensor | tuple | Mapping)
    return isinstance(inputs, Iterable) and not single


def observe_all(
    model: nn.Module, batches: Iterable[Any], observer: Observer
) -> dict[str, Streamed]:
    """Observe batch after batch in eval mode, and keep sums.

    Args:
        model: Left as it was.
        batches: Each one the model's input, or a pair of input and observed labels.
        observer: Which layers, units and Fisher.

    Raises:
        ValueError: There is no batch.
        MemoryBudgetError: The sums of these layers would take too much.
    """
    total: dict[str, Streamed] = {}
    for batch in batches:
        batch = tree_map_only(Tensor, lambda t: t.to(device_of(model)), batch)
        inputs, targets = batch if _is_pair(batch) else (batch, None)
        for name, one in observe_now(model, inputs, observer, targets).items():
            one = replace(one, cases=replace(one.cases, solver="sums"))
            with within(observer.workspace):
                if name in total:
                    total[name].add(one)
                else:
                    total[name] = Streamed.of(one)
    if not total:
        raise ValueError("the loader yields no batch (an iterator that was used up?)")
    return total


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, list | tuple) and len(batch) == 2


def _count(cases: UnitCases) -> int:
    return cases.a.shape[1] * cases.a.shape[2]


def _averaged(g: Gradient | None, other: Gradient | None, q: float) -> Gradient | None:
    if g is None or other is None:
        return None
    g0 = None if g.g0 is None or other.g0 is None else (1 - q) * g.g0 + q * other.g0
    return Gradient((1 - q) * g.g + q * other.g, g0)
