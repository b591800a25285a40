"""Layers whose sums over a loader are too large: every iteration reads the loader again.

The first pass over the loader keeps u·d numbers of a layer, and one d·d matrix that all its units
share. Then each product of conjugate gradients is a pass over the loader, which serves all units
and right-hand sides of all such layers at once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor
from torch.utils._pytree import tree_leaves

from unitfisher.cases import UnitCases
from unitfisher.loader import Batches
from unitfisher.moments import Part
from unitfisher.observation import Gradient
from unitfisher.products import UnitProducts
from unitfisher.solvers import SingularFisherError, squared
from unitfisher.theorems import about_mu_q
from unitfisher.weighted import Solution, Solving, Weighted


@dataclass(frozen=True)
class Passed:
    """Cases of a layer that a loader yields again: each product with them is a pass over it."""

    batches: Batches
    layer: str
    origin: Float[Tensor, "g d"]
    weight: Float64[Tensor, " u"]  # Σ D
    support: Float64[Tensor, " u"]
    sum_aa: Float64[Tensor, "g d d"]  # Σ (a - origin)(a - origin)ᵀ, by weights that units share
    mass: Shaped[Tensor, " g"]  # Σ of those weights
    inverse: Float[Tensor, "g d d"] | None = None  # L⁻¹, which whitens; None: not whitened

    def shared_moment(self) -> Float64[Tensor, "g d d"]:
        """Return Σ q̄ (a - origin)(a - origin)ᵀ of the first pass, q̄ near the living units' mean."""
        return self.sum_aa / self.mass[:, None, None]

    def second_moment(self, unit: int) -> Float64[Tensor, "d d"]:
        total = torch.zeros_like(self.sum_aa[0])
        with self.batches.as_measured():
            for seen in self.batches.again([self.layer]):
                for cases in seen.values():
                    total += self.weighted(cases).second_moment(unit)
        return total

    def whitened(self, inverse: Float64[Tensor, "g d d"]) -> "Passed":
        return replace(self, inverse=inverse.to(self.origin.dtype))

    def weighted(self, cases: UnitCases) -> Weighted:
        """Return a batch's cases, whitened if that was asked for."""
        a = Weighted.of(cases.a.squeeze(2), cases.D, self.origin, self.weight)
        return a if self.inverse is None else a.whitened(self.inverse)

    def answer(self, solving: Solving) -> Solution:
        ((solution,),) = answers([(self, [solving])])
        return solution


def answers(asked: Sequence[tuple[Passed, Sequence[Solving]]]) -> list[list[Solution]]:
    """Solve several systems of one layer or more in the same passes."""
    busy = {(i, j): s for i, (_, solvers) in enumerate(asked) for j, s in enumerate(solvers)}
    y, found = {key: next(solving) for key, solving in busy.items()}, {}
    while busy:
        for key, product in _pass([cases for cases, _ in asked], y).items():
            try:
                y[key] = busy[key].send(product)
            except StopIteration as end:
                found[key] = end.value
                del busy[key], y[key]
    return [[found[i, j] for j in range(len(s))] for i, (_, s) in enumerate(asked)]


def _pass(
    layers: Sequence[Passed], y: Mapping[tuple[int, int], Float64[Tensor, "g v d"]]
) -> dict[tuple[int, int], Float64[Tensor, "g v d"]]:
    """Multiply vectors, by number of layer and system, in one pass over the loader."""
    total = {key: torch.zeros_like(vectors) for key, vectors in y.items()}
    batches, index = layers[0].batches, {layers[i].layer: i for i, _ in y}
    with batches.as_measured():
        for seen in batches.again(index):
            for name, cases in seen.items():
                rows = layers[index[name]].weighted(cases)
                for key in (key for key in y if key[0] == index[name]):
                    total[key] += rows.times(y[key])
                del rows, cases  # free them before the next batch
    return total


@dataclass
class Rounds:
    """What the first pass keeps of a layer: sums over cases, about an origin near their mean."""

    route: ClassVar = "passes"
    batches: Batches
    layer: str
    origin: Float[Tensor, "g d"]
    cases: int
    samples: int
    sum_a: Float64[Tensor, "g d"]
    sum_D: Float64[Tensor, " u"]
    support: Float64[Tensor, " u"]  # Σ 1 over cases that carry weight
    sum_Da: Float64[Tensor, "u d"]
    sum_Dss: Float64[Tensor, " u"]  # Σ D ‖a - origin‖²
    trace_Daa: Float64[Tensor, " u"]  # see `moments.trace_Daa`
    sum_aa: Float64[Tensor, "g d d"]  # Σ (a - origin)(a - origin)ᵀ, by weights that units share
    solved: dict[float, UnitProducts] = field(default_factory=dict)  # at the newest damping

    @classmethod
    def of(cls, batches: Batches, layer: str, cases: UnitCases) -> "Rounds":
        center = cases.center
        groups, d = center.shape
        sum_D, support, sum_Dss, trace_Daa = center.new_zeros(4, cases.units)
        start = cls(
            batches,
            layer,
            origin=center.to(cases.received.dtype),
            cases=0,
            samples=0,
            sum_a=torch.zeros_like(center),
            sum_D=sum_D,
            support=support,
            sum_Da=center.new_zeros(cases.units, d),
            sum_Dss=sum_Dss,
            trace_Daa=trace_Daa,
            sum_aa=center.new_zeros(groups, d, d),
        )
        start.add(cases)
        return start

    def average_over(self, samples: int) -> None:
        """Average over this many samples, though only some of them have reached the layer."""
        self.samples = samples

    def add(self, cases: UnitCases) -> None:
        """Add a batch.

        In ``sum_aa`` all units should count alike. Their weights are scaled by the Σ D so far, for
        the total is known only at the end.
        """
        D = cases.D
        weight = D.sum(0)
        rows = Weighted.of(cases.a.squeeze(2), D, self.origin, weight)
        self.cases += len(D)
        self.samples += cases.samples
        self.sum_a += rows.about.sum(1, dtype=torch.float64)
        self.sum_D += weight
        self.support += (D > 0).sum(0)
        self.sum_Da += weight[:, None] * rows.mean()
        self.sum_Dss += weight * rows.squares()
        self.trace_Daa += cases.trace_Daa
        share = weight / torch.where(self.sum_D > 0, self.sum_D, 1.0) * self.cases
        self.sum_aa += rows.moment(share.unflatten(0, (len(self.origin), -1)))

    @property
    def moments(self) -> UnitProducts:
        """The moments of the layer's units, without damping."""
        alive = self.sum_D > 0
        weight = torch.where(alive, self.sum_D, 1.0)
        mass = self.cases * alive.unflatten(0, (len(self.origin), -1)).sum(1).clamp_min(1)
        mean = self.sum_Da / weight[:, None]
        known = self.batches, self.layer, self.origin, self.sum_D, self.support
        return UnitProducts(
            c=self.sum_D / self.samples,
            center=self.origin.double() + self.sum_a / self.cases,
            origin=self.origin,
            mean_about=mean,
            trace_Var_q=self.sum_Dss / weight - squared(mean),
            ridge=torch.zeros_like(weight),
            trace_Daa=self.trace_Daa,
            cases=Passed(*known, self.sum_aa, mass),
        )

    def parts(self) -> Iterator[tuple[slice, UnitProducts]]:
        yield slice(None), self.moments

    def damped_parts(self, damping: float) -> Iterator[Part]:
        m = self.moments
        if damping not in self.solved:
            self.solved = {damping: m.damped(damping)}
        yield Part(slice(None), m, self.solved[damping])

    def forget(self) -> None:
        """Drop the solved systems."""
        self.solved = {}

    @property
    def tensors(self) -> list[Tensor]:
        leaves = [
            *vars(self).values(),
            *(x for m in self.solved.values() for x in vars(m).values()),
        ]
        return [t for t in tree_leaves(leaves) if isinstance(t, Tensor)]


def solve_together(layers: Sequence[tuple[Rounds, Gradient | None]], damping: float) -> None:
    """Solve the systems of these layers at once, for the constant and for their gradients.

    Raises:
        SingularFisherError: A unit's Fisher has no inverse; names layer and unit.
    """
    wanted = [_wanted(layer, gradient, damping) for layer, gradient in layers]
    found = answers([(rows, [m.solving(b) for b in rhs]) for m, rows, rhs in wanted])
    for (layer, _), (m, _, rhs), solutions in zip(layers, wanted, found, strict=True):
        layer.solved = {damping: replace(m, known=tuple(zip(rhs, solutions, strict=True)))}


def _wanted(
    of: Rounds, gradient: Gradient | None, damping: float
) -> tuple[UnitProducts, Passed, list[Float64[Tensor, "u d"]]]:
    """Return a layer's systems, the cases to multiply with, and the right-hand sides."""
    m = of.moments.damped(damping)
    try:
        rows = m.whitened.cases
    except SingularFisherError as error:
        units = of.batches.observer.units.get(of.layer)
        unit = error.unit if units is None else int(units[error.unit])
        raise error.of_layer(of.layer, unit) from None
    assert isinstance(rows, Passed)
    if gradient is None:
        return m, rows, [m.mu_q]
    g, g0 = gradient.g.flatten(1).double(), gradient.g0
    return m, rows, [m.mu_q, g if g0 is None else about_mu_q(m, g, g0.double())]
