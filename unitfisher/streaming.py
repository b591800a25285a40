"""A whole data set measured batch by batch: sums that add up, in memory that does not grow."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from unitfisher.cases import UnitCases
from unitfisher.fisher import Gradient, Observation, Observer, observe_now
from unitfisher.moments import UnitMoments
from unitfisher.outputs import UnitMeans
from unitfisher.passes import device_of
from unitfisher.uncertainty import variance_of_sum

SUMS_BYTES = 4 * 2**30  # what the second moments of all layers may take


@dataclass(frozen=True)
class UnitSums:
    """What `UnitCases` says of a layer, as sums over batches: u·d² numbers, cases not kept."""

    held: tuple[tuple[slice, UnitMoments], ...]  # part after part of the units
    mean: Float[Tensor, "*g d"]
    trace_variance: Float[Tensor, "*g"]
    weight: Float[Tensor, " u"]  # Σ D
    weight_squared: Float[Tensor, " u"]  # Σ D²
    variance: Float[Tensor, " u"]  # of Σ D, from drawn labels or signs
    count: int  # of positions

    @classmethod
    def of(cls, cases: UnitCases) -> "UnitSums":
        held = tuple((part, cases.of_units(part).sums()) for part in cases.split())
        D = cases.D
        moments = cases.mean, cases.trace_variance, D.sum(0), (D**2).sum(0)
        return cls(held, *moments, variance_of_sum(cases), _count(cases))

    def joined(self, cases: UnitCases) -> "UnitSums":
        """Add a batch, about the origins that the first one chose."""
        held = tuple((part, m + cases.of_units(part).sums(m.origin)) for part, m in self.held)
        total = self.count + _count(cases)
        q, shift = _count(cases) / total, cases.mean - self.mean
        variance = (1 - q) * self.trace_variance + q * cases.trace_variance
        return UnitSums(
            held=held,
            mean=self.mean + q * shift,
            trace_variance=variance + q * (1 - q) * (shift**2).sum(-1),
            weight=self.weight + cases.D.sum(0),
            weight_squared=self.weight_squared + (cases.D**2).sum(0),
            variance=self.variance + variance_of_sum(cases),
            count=total,
        )

    def parts(self) -> Iterator[tuple[slice, UnitMoments]]:
        return iter(self.held)

    def damped_parts(self, damping: float) -> Iterator[tuple[slice, UnitMoments]]:
        return ((part, m.damped(damping)) for part, m in self.held)

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


@dataclass(frozen=True)
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

    def joined(self, other: Observation) -> "Streamed":
        if self.fault or other.fault:
            return replace(self, fault=self.fault or other.fault)
        samples = self.samples + other.cases.samples
        return Streamed(
            cases=self.cases.joined(other.cases),
            samples=samples,
            means=self.means.joined(other.means),
            gradient=_averaged(self.gradient, other.gradient, other.cases.samples / samples),
            fault=self.fault or other.fault,
        )


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
        ValueError: There is no batch, or the sums of these layers would take too much memory.
    """
    total: dict[str, Streamed] = {}
    for batch in batches:
        batch = tree_map_only(Tensor, lambda t: t.to(device_of(model)), batch)
        inputs, targets = batch if _is_pair(batch) else (batch, None)
        observations = observe_now(model, inputs, observer, targets)
        if not total:
            require_memory(observations)
        for name, one in observations.items():
            total[name] = total[name].joined(one) if name in total else Streamed.of(one)
    if not total:
        raise ValueError("the loader yields no batch (an iterator that was used up?)")
    return total


def require_memory(observations: Mapping[str, Observation]) -> None:
    """Refuse sums that do not fit, naming the layers that take most."""
    takes = {n: 8 * o.cases.units * o.cases.inputs**2 for n, o in observations.items()}
    if sum(takes.values()) > SUMS_BYTES:
        largest = sorted(takes, key=lambda name: -takes[name])[:3]
        named = ", ".join(f"{name!r} {takes[name] / 2**30:.1f} GiB" for name in largest)
        raise ValueError(
            f"second moments over a loader would take {sum(takes.values()) / 2**30:.1f} GiB of at "
            f"most {SUMS_BYTES / 2**30:.0f}, most of it {named}: observe fewer units "
            f"(units=...), leave layers out (layers=...), or measure one large batch"
        )


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, list | tuple) and len(batch) == 2


def _count(cases: UnitCases) -> int:
    return cases.a.shape[1] * cases.a.shape[2]


def _averaged(g: Gradient | None, other: Gradient | None, q: float) -> Gradient | None:
    if g is None or other is None:
        return None
    g0 = None if g.g0 is None or other.g0 is None else (1 - q) * g.g0 + q * other.g0
    return Gradient((1 - q) * g.g + q * other.g, g0)
