"""The cases of one layer: what its units received and the errors that came back.

A case is a sample (joint, reduce) or one position of a sample (expand), with r columns of error.
From them come the moments, for as many units at a time as memory allows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils._pytree import tree_leaves

from unitfisher.costs import Sizes, engine, route_of, units_together
from unitfisher.incoming import Incoming
from unitfisher.moments import Moments, Part, fed
from unitfisher.patches import FEW, Patches, Received, in_pieces, unfolded
from unitfisher.products import UnitProducts
from unitfisher.rows import UnitRows
from unitfisher.solvers import dot
from unitfisher.sums import UnitMoments
from unitfisher.weighted import Weighted


class Joined(NamedTuple):
    """Gradients per case and column, their positions summed."""

    weights: Float[Tensor, "r u d"]  # Σ_t δ (a - origin)
    bias: Float[Tensor, "r u"]  # Σ_t δ
    fed: Float[Tensor, " u"]  # Σ ‖Σ_t δ a‖², see `moments.fed`


@dataclass(frozen=True)
class UnitCases:
    """Activations and errors of a layer, from which any moments are formed.

    With one position a case, columns fold to D = Σ_r δ²; where nothing is learnt from how they
    differ, only one column √D is kept. With several positions (``sharing="joint"``) they may not:
    each column's gradient is Σ_t δ a, then squared.
    """

    received: Received  # what the units of a group see
    delta: Float[Tensor, "r m t u"]
    samples: int
    incoming: Incoming | None = None  # of all cases, where these are drawn from more
    solver: str = "auto"
    replicates: int = 0  # the last so many columns are estimates of D that average; 0: exact
    population: int = 0  # of how many cases these are drawn; 0: they are all
    sample: Int[Tensor, " m"] | None = None  # of which each case is; None: as many in a row of each
    in_order: bool = True  # else it is not known of which
    whole: "UnitCases | None" = None  # of whose units these are some

    @property
    def units(self) -> int:
        return self.delta.shape[-1]

    @property
    def inputs(self) -> int:
        return self.received.shape[-1]

    @property
    def groups(self) -> int:
        return self.received.shape[0]

    @cached_property
    def a(self) -> Float[Tensor, "g m t d"]:
        """Incoming activations; patches are unfolded once."""
        if self.whole is not None and self.whole.received is self.received:
            return self.whole.a
        return unfolded(self.received)

    @property
    def _for_one_pass(self) -> Received:
        """What is looked at but once need not be unfolded whole."""
        size = self.received.shape.numel() * self.received.dtype.itemsize
        return self.a if size <= FEW else self.received

    @property
    def shared(self) -> bool:
        """Whether a sample has several cases, whose errors were drawn for together."""
        return self._population > self.samples

    @property
    def attributed(self) -> bool:
        """Whether it is known of which sample a case is: not where time comes first."""
        return self.in_order or not self.shared

    @property
    def _population(self) -> int:
        return self.population or self.delta.shape[1]

    @property
    def of_sample(self) -> Int[Tensor, " m"]:
        """Of which sample each case is, where that is known."""
        if self.sample is not None:
            return self.sample
        count = self.delta.shape[1]
        return torch.arange(count, device=self.delta.device) // (count // self.samples)

    @property
    def dead(self) -> Bool[Tensor, " u"]:
        """No error reaches the unit in any case."""
        return self.weight == 0

    @property
    def tensors(self) -> list[Tensor]:
        """What is kept, caches too."""
        moments = [*vars(self).get("_damped", {}).values(), vars(self).get("_moments")]
        cached = [t for m in moments if m is not None for t in tree_leaves(vars(m))]
        cached += vars(self).get("_shared_rows", ())
        if isinstance(self.received, Patches):
            cached.append(self.received.view)
        return [t for t in [*vars(self).values(), *cached] if isinstance(t, Tensor)]

    def forget(self) -> None:
        """Drop what was solved or unfolded; it is formed again when it is asked for."""
        for kept in ("a", "_damped", "_moments", "_shared_rows"):
            vars(self).pop(kept, None)

    @property
    def rows(self) -> int:
        columns, cases, positions, _ = self.delta.shape
        return columns * cases if positions > 1 else cases  # alone, columns fold

    @cached_property
    def D(self) -> Float[Tensor, "m u"]:
        """Σ_r (Σ_t δ)²: how much a case weighs for a unit."""
        return (self._joined_errors() ** 2).sum(0)

    @cached_property
    def weight(self) -> Float[Tensor, " u"]:
        """Σ D."""
        return self.D.sum(0)

    @property
    def mean(self) -> Float[Tensor, "*g d"]:
        """E_p(a): one for all units, or one a unit where groups see different inputs."""
        return self._incoming.mean

    @property
    def center(self) -> Float[Tensor, "g d"]:
        """The same of each group of consecutive units."""
        mean = self.mean
        return mean.unsqueeze(0) if mean.dim() == 1 else mean[:: self.units // self.groups]

    @property
    def origin(self) -> Float[Tensor, "g d"]:
        """That in the precision of the activations, so that a - origin is exact."""
        return self.center.to(self.received.dtype)

    @property
    def trace_variance(self) -> Float[Tensor, "*g"]:
        """E_p‖a - E_p(a)‖²."""
        return self._incoming.trace_variance

    @cached_property
    def _incoming(self) -> Incoming:
        of = self._for_one_pass if self.delta.shape[2] > 1 else self.a
        return self.incoming or Incoming.of(of, self.units)

    @property
    def n_eff(self) -> Float[Tensor, " u"]:
        """1 / Σ w² of the cases' weights w ∝ D; NaN for a dead unit."""
        return self.weight**2 / (self.D**2).sum(0)

    def parts(self) -> Iterator[tuple[slice, Moments]]:
        """Yield the moments of part after part of the units, as memory allows."""
        for part in self.split():
            whole = part == slice(None)
            yield part, self._moments if whole else self.of_units(part)._moments

    def damped_parts(self, damping: float) -> Iterator[Part]:
        """Yield the same also damped; what was solved at the newest damping is kept."""
        for part, m in self.parts():
            if part != slice(None):
                yield Part(part, m, m.damped(damping))
                continue
            if damping not in self._damped:
                self._damped.clear()
                self._damped[damping] = m.damped(damping)
            yield Part(part, m, self._damped[damping])

    @cached_property
    def _damped(self) -> dict[float, Moments]:
        return {}

    def split(self) -> list[slice]:
        """Choose which units to treat together."""
        return parts(self.units, self.per_part)

    def sums(self, origin: Float[Tensor, "*u d"] | None = None) -> UnitMoments:
        """Form the second moments of all units at once, u·d² numbers, about an origin near them."""
        if self.delta.shape[2] == 1:
            a = self.a.squeeze(2)
            a = a.squeeze(0) if len(a) == 1 else a
            if origin is None:
                origin = self._mean_q()  # each unit's own: exactly centred
            origin = origin.to(a.dtype)
            m = UnitMoments.of(a, self.D, origin=origin, samples=self.samples)
            return replace(m, sum_a=(self.mean - m.origin) * m.cases)
        origin = self._rounded_mean if origin is None else origin
        G, S, fed_with = self.joined_gradients(origin)
        about = torch.zeros_like(origin)  # G is about the origin already
        joined = UnitMoments.of_gradients(
            *(G, S, self.mean - origin),
            origin=about,
            samples=self.samples,
            eps=torch.finfo(self.received.dtype).eps,
        )
        return replace(joined, origin=origin, fed=fed_with)

    def _mean_q(self) -> Float[Tensor, "u d"]:
        """E_q(a) in the precision of the activations."""
        total = self.weight
        q = (self.D / torch.where(total > 0, total, 1.0)).to(self.a.dtype).T
        origin = self.origin.unsqueeze(1)
        about = self.a.squeeze(2) - origin
        mean = q.reshape(len(about), -1, q.shape[1]) @ about
        return (origin + mean).flatten(0, 1)

    @property
    def sizes(self) -> Sizes:
        joint = self.delta.shape[2] > 1
        return Sizes(
            rows=self.rows,
            inputs=self.inputs,
            units=self.units,
            groups=self.groups,
            joined=self.delta.shape[1] * self.delta.shape[2] if joint else 0,
            itemsize=self.received.dtype.itemsize,
            engine=engine(self.delta.device),
        )

    @cached_property
    def route(self) -> str:
        """How systems are solved: "rows" or "sums", by Cholesky, or "products", by iteration."""
        return route_of(self.sizes, self.solver)

    @cached_property
    def _moments(self) -> Moments:
        route = self.route
        if route == "products":
            return self._products()
        return self.sums() if route == "sums" else self._weighted_rows()

    @property
    def per_part(self) -> int:
        """Units at a time, as the workspace allows."""
        return units_together(self.sizes, self.route)

    def by_group(self) -> list["UnitCases"]:
        """The cases of each group's units."""
        groups = self.groups
        given: Sequence[Incoming | None] = [None] * groups
        if self.incoming is not None:
            given = self.incoming.by_group(groups)
        parts = zip(self.a.split(1), self.delta.chunk(groups, -1), given, strict=True)
        return [
            replace(self, received=a, delta=delta, incoming=of_all) for a, delta, of_all in parts
        ]

    def drawn(self, rows: int, generator: torch.Generator) -> "UnitCases":
        """Return so many cases, each as likely, that stand for all: their Fisher is unbiased.

        E_p(a) and its variance stay those of all cases.
        """
        count, received = self.delta.shape[1], self._for_one_pass
        if rows >= count:
            return self
        chosen = torch.randperm(count, generator=generator, device=generator.device)[:rows]
        chosen = chosen.to(self.delta.device)
        asked = self.replicates > 1 and self.shared and self.attributed
        return replace(
            self,
            received=received.at(chosen) if isinstance(received, Patches) else received[:, chosen],
            delta=self.delta[:, chosen] * (count / rows) ** 0.5,
            incoming=self.incoming or Incoming.of(received, self.units),
            population=count,
            sample=self.of_sample[chosen] if asked else None,
        )

    def of_units(self, part: slice) -> "UnitCases":
        received, incoming = self.received, self.incoming
        if self.groups > 1:  # keep only the groups of these units, one each
            received = self.a.repeat_interleave(self.units // self.groups, 0)[part]
            incoming = incoming and incoming.of_units(part)
        delta = self.delta[..., part]
        return replace(self, received=received, delta=delta, incoming=incoming, whole=self)

    @cached_property
    def _shared_rows(self) -> tuple[Float[Tensor, "g n d"], Float[Tensor, "g n n"]]:
        """Cases about their mean, and their products: as long as all units see the same, once."""
        if self.whole is not None and self.whole.groups == 1:
            return self.whole._shared_rows
        about = self.a.squeeze(2).double() - self.center.unsqueeze(1)
        return about, about @ about.mT

    def _weighted_rows(self) -> UnitRows:
        if self.delta.shape[2] == 1:
            center, (about, gram), total = self.center, self._shared_rows, self.weight
            fed_with = self.fed
            v = w = (self.D / torch.where(total > 0, total, 1.0)).sqrt().T.contiguous()
        else:
            G, S, fed_with = self.joined_gradients(self.mean)
            total = (S**2).sum(0)
            scale = torch.where(total > 0, total, 1.0).rsqrt()[:, None]
            about, w = G.transpose(0, 1), S.T * scale
            gram = about @ about.mT
            center = self.mean.expand(self.units, -1)  # every unit is its own group
            v = scale.expand_as(w)
        rows = UnitRows.of(total / self.samples, center, about, gram, v, w, fed_with)
        return replace(rows, iterates=self.solver != "direct")

    def _products(self) -> UnitProducts:
        origin, total = self.origin, self.weight
        weighted = Weighted.of(self.a.squeeze(2), self.D, origin, total)
        moments = UnitProducts.of(total / self.samples, self.center, origin, self.fed, weighted)
        # as many iterations as cost what second moments cost; then these, for who needs them
        patience = None if self.solver == "iterative" else max(20, self.inputs // 4)
        return replace(moments, patience=patience)

    @property
    def fed(self) -> Float[Tensor, " u"]:
        """Σ D ‖a‖² of cases with one position; see `moments.fed`."""
        return fed(self.a.squeeze(2), self.D)

    def joined_gradients(self, origin: Float[Tensor, "*g d"]) -> Joined:
        """Join the positions of each case and column, about an origin.

        Products are formed in the precision of the activations, about a point near their mean.
        """
        groups, (columns, count, _, units) = self.groups, self.delta.shape
        delta = self.delta.to(self.received.dtype).unflatten(-1, (groups, -1)).movedim(2, -1)
        shape = columns, count, groups, units // groups, self.inputs
        G = self.delta.new_empty(shape, dtype=torch.float64)
        for piece, a in in_pieces(self._for_one_pass):
            about = (a - self.origin[:, None, None]).transpose(0, 1)  # m g t d
            G[:, piece] = delta[:, piece] @ about  # of r m g v t
        G, S = G.flatten(2, 3).flatten(0, 1), self._joined_errors().flatten(0, 1)
        G.addcmul_(S.unsqueeze(-1), origin - self._rounded_mean, value=-1)
        return Joined(G, S, self._fed_joined(G, S, origin))

    def _fed_joined(
        self, G: Float[Tensor, "r u d"], S: Float[Tensor, "r u"], origin: Float[Tensor, "*g d"]
    ) -> Float[Tensor, " u"]:
        """Σ ‖Σ_t δ a‖² from gradients about an origin; 0 where only rounding has left something."""
        along = torch.einsum("rud,ud->ru", G, origin.expand(G.shape[1:]))
        constant = S**2 * dot(origin, origin)
        total = (torch.linalg.vector_norm(G, dim=-1) ** 2 + 2 * S * along + constant).sum(0)
        eps, double = (torch.finfo(x.dtype).eps for x in (self.received, G))
        left = max((64 * eps) ** 2, 64 * double) * constant.sum(0)
        return torch.where(total > left, total, 0.0)

    def _joined_errors(self) -> Float[Tensor, "r m u"]:
        """Σ_t δ."""
        alone = self.delta.shape[2] == 1
        return (self.delta.squeeze(2) if alone else self.delta.sum(2)).double()

    @property
    def _rounded_mean(self) -> Float[Tensor, "*g d"]:
        """The origin, shaped as the mean."""
        return self.mean.to(self.received.dtype).double()


def parts(units: int, together: int) -> list[slice]:
    """Part so many units; the whole is one part that has no bounds."""
    if together >= units:
        return [slice(None)]
    return [slice(start, start + together) for start in range(0, units, together)]
