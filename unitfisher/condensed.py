"""A layer's cases, condensed to moments, for as many units at a time as memory allows."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_leaves

from unitfisher.cases import UnitCases
from unitfisher.costs import route_of, units_together
from unitfisher.joint import JointGradients
from unitfisher.moments import Moments, Part
from unitfisher.products import UnitProducts
from unitfisher.rows import UnitRows
from unitfisher.sums import UnitMoments
from unitfisher.weighted import Weighted


class SharedRows(NamedTuple):
    """Cases minus their mean, and their Gram matrix."""

    about: Float[Tensor, "g n d"]
    gram: Float[Tensor, "g n n"]

    @classmethod
    def of(cls, cases: UnitCases) -> "SharedRows":
        about = cases.a.squeeze(2) - cases.center.unsqueeze(1)
        return cls(about, about @ about.mT)


@dataclass
class Condensed:
    """The moments formed from a layer's cases, which are kept until `forget`."""

    cases: UnitCases
    solver: str = "auto"
    moments: Moments | None = field(default=None, init=False)  # of all units, if these fit
    solved: dict[float, Moments] = field(default_factory=dict, init=False)  # the newest damped ones
    shared: SharedRows | None = field(default=None, init=False)  # if all units are treated together

    @cached_property
    def route(self) -> str:
        """How systems are solved: "rows" or "sums", by Cholesky, or "products", by iteration."""
        return route_of(self.cases.sizes, self.solver)

    def parts(self) -> Iterator[tuple[slice, Moments]]:
        """Yield part after part of the units, as memory allows, with its moments."""
        for part in split(self.cases, self.route):
            if part != slice(None):
                yield part, self._formed(self.cases.of_units(part))
                continue
            if self.moments is None:
                self.moments = self._formed(self.cases)
            yield part, self.moments

    def damped_parts(self, damping: float) -> Iterator[Part]:
        """Yield the same with damped moments; those of all units at the newest damping are kept."""
        for part, m in self.parts():
            if part != slice(None):
                yield Part(part, m, m.damped(damping))
                continue
            if damping not in self.solved:
                self.solved = {damping: m.damped(damping)}
            yield Part(part, m, self.solved[damping])

    def forget(self) -> None:
        """Drop moments, solutions and unfolded patches; they are formed again on demand."""
        self.moments, self.solved, self.shared = None, {}, None
        self.cases.forget()

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors kept besides the cases."""
        formed = [vars(m) for m in [self.moments, *self.solved.values()] if m is not None]
        return [t for t in tree_leaves([formed, self.shared]) if isinstance(t, Tensor)]

    def _formed(self, cases: UnitCases) -> Moments:
        if self.route == "sums":
            return sums(cases)
        if self.route == "rows":
            rows = _joint_rows(cases) if cases.joint else _rows(cases, self._shared_by(cases))
            return replace(rows, iterates=self.solver != "direct")
        # iterate for the time that second moments would take; units not solved then get theirs
        patience = None if self.solver == "iterative" else max(20, cases.inputs // 4)
        return replace(_products(cases), patience=patience)

    def _shared_by(self, cases: UnitCases) -> SharedRows:
        """Return the rows that all units share, formed once if all have the same activations."""
        if cases.received is not self.cases.received:
            return SharedRows.of(cases)
        if self.shared is None:
            self.shared = SharedRows.of(cases)
        return self.shared


def split(cases: UnitCases, route: str) -> list[slice]:
    """Choose which units to treat together; ``slice(None)`` stands for all of them."""
    units, together = cases.units, units_together(cases.sizes, route)
    if together >= units:
        return [slice(None)]
    return [slice(start, start + together) for start in range(0, units, together)]


def sums(cases: UnitCases, origin: Float[Tensor, "*u d"] | None = None) -> UnitMoments:
    """Form the second moments of all units at once, u·d² numbers, about an origin near E_q(a)."""
    if cases.joint:
        return _joint_sums(cases, cases.rounded_mean if origin is None else origin)
    a = cases.a.squeeze(2)
    origin = _mean_q(cases) if origin is None else origin  # E_q(a) of each unit: centred
    m = UnitMoments.of(
        a.squeeze(0) if len(a) == 1 else a,
        cases.D,
        origin=origin.to(a.dtype),
        samples=cases.samples,
    )
    return replace(m, sum_a=(cases.mean - m.origin) * m.cases)


def _mean_q(cases: UnitCases) -> Float[Tensor, "u d"]:
    """E_q(a) in the precision of the activations."""
    q = cases.q.to(cases.a.dtype).T
    origin = cases.origin.unsqueeze(1)
    about = cases.a.squeeze(2) - origin
    mean = q.reshape(len(about), -1, q.shape[1]) @ about
    return (origin + mean).flatten(0, 1)


def _joint_sums(cases: UnitCases, origin: Float[Tensor, "*g d"]) -> UnitMoments:
    G, S, trace_Daa = JointGradients.of(cases, origin)
    m = UnitMoments.of_gradients(
        G,
        S,
        mean=cases.mean - origin,
        origin=torch.zeros_like(origin),  # G is about the origin already
        samples=cases.samples,
        eps=torch.finfo(cases.received.dtype).eps,
    )
    return replace(m, origin=origin, trace_Daa=trace_Daa)


def _rows(cases: UnitCases, shared: SharedRows) -> UnitRows:
    w = cases.q.sqrt_().T.contiguous()
    return UnitRows.of(cases.weight / cases.samples, cases.center, *shared, w, w, cases.trace_Daa)


def _joint_rows(cases: UnitCases) -> UnitRows:
    G, S, trace_Daa = JointGradients.of(cases, cases.mean)
    total = (S**2).sum(0)
    scale = torch.where(total > 0, total, 1.0).rsqrt()[:, None]
    about, w = G.transpose(0, 1), S.T * scale
    center = cases.mean.expand(cases.units, -1)  # every unit is its own group
    rows = about, about @ about.mT, scale.expand_as(w), w
    return UnitRows.of(total / cases.samples, center, *rows, trace_Daa)


def _products(cases: UnitCases) -> UnitProducts:
    weighted = Weighted.of(cases.a.squeeze(2), cases.D, cases.origin, cases.weight)
    c = cases.weight / cases.samples
    return UnitProducts.of(c, cases.center, cases.origin, cases.trace_Daa, weighted)
