"""The cases of one layer: the activations into its units, and the errors sent back to them.

A case is a sample (joint, reduce) or one position of a sample (expand), with r columns of error.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unitfisher.costs import Sizes, engine
from unitfisher.incoming import Incoming
from unitfisher.moments import trace_Daa
from unitfisher.patches import UNFOLDED_WHOLE, Patches, Received, unfolded
from unitfisher.solvers import rounding


@dataclass(frozen=True)
class UnitCases:
    """Activations and errors of a layer, from which all moments are formed.

    With one position per case only D = Σ_r δ² matters: one column √D is kept, or several random
    columns, whose spread gives standard errors. With several positions (``sharing="joint"``) all
    columns are kept: the gradient of each is Σ_t δ a, and only then squared.
    """

    received: Received  # activations into the units of a group
    delta: Float[Tensor, "r m t u"]
    samples: int
    incoming: Incoming | None = None  # means over all cases, if these were drawn from more
    replicates: int = 0  # number of random columns, which are the last; 0: nothing is drawn
    population: int = 0  # number of cases these were drawn from; 0: nothing was drawn
    sample: Int[Tensor, " m"] | None = None  # sample of each case; None: in order, equally many
    in_order: bool = True  # samples are the layer's first axis; else a case's sample is unknown
    whole: "UnitCases | None" = None  # the layer's cases, if these are a part of its units

    @property
    def units(self) -> int:
        return self.delta.shape[-1]

    @property
    def inputs(self) -> int:
        return self.received.shape[-1]

    @property
    def groups(self) -> int:
        return self.received.shape[0]

    @property
    def joint(self) -> bool:
        """Whether a case has several positions, whose gradients are summed."""
        return self.delta.shape[2] > 1

    @cached_property
    def a(self) -> Float[Tensor, "g m t d"]:
        """Incoming activations; patches are unfolded once."""
        if self.whole is not None and self.whole.received is self.received:
            return self.whole.a
        return unfolded(self.received)

    @property
    def for_one_pass(self) -> Received:
        """The activations, for reading them once: large patches are not unfolded as a whole."""
        size = self.received.shape.numel() * self.received.dtype.itemsize
        return self.a if size <= UNFOLDED_WHOLE else self.received

    @property
    def shared(self) -> bool:
        """Whether a sample has several cases, whose errors come from the same random draws."""
        return self._population > self.samples

    @property
    def _population(self) -> int:
        return self.population or self.delta.shape[1]

    @property
    def of_sample(self) -> Int[Tensor, " m"]:
        """The sample that each case belongs to, where that is known."""
        if self.sample is not None:
            return self.sample
        count = self.delta.shape[1]
        return torch.arange(count, device=self.delta.device) // (count // self.samples)

    @property
    def dead(self) -> Bool[Tensor, " u"]:
        """Units without error in any case or, if joint, whose errors cancel over positions."""
        return self.weight == 0 if self.unmoved is None else self.unmoved

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors held, caches included."""
        folded = [self.received.view] if isinstance(self.received, Patches) else []
        return [t for t in [*vars(self).values(), *folded] if isinstance(t, Tensor)]

    def forget(self) -> None:
        """Drop the unfolded patches; they are unfolded again on demand."""
        vars(self).pop("a", None)

    @property
    def rows(self) -> int:
        """Number of rows Z with Zᵀ Z = F for a unit."""
        columns, cases, *_ = self.delta.shape
        return columns * cases if self.joint else cases  # with one position, columns fold into D

    @cached_property
    def D(self) -> Float[Tensor, "m u"]:
        """Σ_r (Σ_t δ)²: the weight of a case for a unit."""
        errors = self.joint_errors
        return errors[0].square() if len(errors) == 1 else errors.square().sum(0)

    @cached_property
    def weight(self) -> Float[Tensor, " u"]:
        """Σ D over cases."""
        return self.D.sum(0)

    @property
    def q(self) -> Float[Tensor, "m u"]:
        """D / Σ D: the distribution q over a unit's cases; zero for a dead unit."""
        return self.D / torch.where(self.weight > 0, self.weight, 1.0)

    @property
    def mean(self) -> Float[Tensor, "*g d"]:
        """E_p(a): one for all units, or one per unit if there are several groups."""
        return self._incoming.mean

    @property
    def center(self) -> Float[Tensor, "g d"]:
        """E_p(a) of each group of consecutive units."""
        mean = self.mean
        return mean.unsqueeze(0) if mean.dim() == 1 else mean[:: self.units // self.groups]

    @property
    def origin(self) -> Float[Tensor, "g d"]:
        """E_p(a) of each group, rounded to the precision of the activations, as a - origin is."""
        return self.center.to(self.received.dtype)

    @property
    def trace_variance(self) -> Float[Tensor, "*g"]:
        """E_p‖a - E_p(a)‖²."""
        return self._incoming.trace_variance

    @cached_property
    def _incoming(self) -> Incoming:
        received = self.for_one_pass if self.joint else self.a
        return self.incoming or Incoming.of(received, self.units)

    @property
    def n_eff(self) -> Float[Tensor, " u"]:
        """1 / Σ q², the effective number of cases; NaN for a dead unit."""
        return (self.weight**2 / (self.D**2).sum(0)).masked_fill(self.dead, torch.nan)

    @property
    def sizes(self) -> Sizes:
        return Sizes(
            rows=self.rows,
            inputs=self.inputs,
            units=self.units,
            groups=self.groups,
            joined=self.delta.shape[1] * self.delta.shape[2] if self.joint else 0,
            itemsize=self.received.dtype.itemsize,
            engine=engine(self.delta.device),
        )

    def by_group(self) -> list["UnitCases"]:
        """Split into the cases of each group's units."""
        groups = self.groups
        means: Sequence[Incoming | None] = [None] * groups
        if self.incoming is not None:
            means = self.incoming.by_group(groups)
        parts = zip(self.a.split(1), self.delta.chunk(groups, -1), means, strict=True)
        return [replace(self, received=a, delta=delta, incoming=mean) for a, delta, mean in parts]

    def drawn(self, rows: int, generator: torch.Generator) -> "UnitCases":
        """Return ``rows`` cases, drawn uniformly without replacement; all if there are no more.

        Errors are scaled so that the Fisher is unbiased. E_p(a) and its variance stay those of
        all cases.
        """
        count = self.delta.shape[1]
        if rows >= count:
            return self
        received = self.for_one_pass
        chosen = torch.randperm(count, generator=generator, device=generator.device)[:rows]
        chosen = chosen.to(self.delta.device)
        by_sample = self.replicates > 1 and self.shared and self.in_order
        return replace(
            self,
            received=received.at(chosen) if isinstance(received, Patches) else received[:, chosen],
            delta=self.delta[:, chosen] * (count / rows) ** 0.5,
            incoming=self.incoming or Incoming.of(received, self.units),
            population=count,
            sample=self.of_sample[chosen] if by_sample else None,
        )

    def of_units(self, part: slice) -> "UnitCases":
        """Return the cases of a part of the units."""
        if part == slice(None):
            return self
        received, incoming = self.received, self._incoming  # averaged once, not for each part
        if self.groups > 1:  # each of these units becomes a group
            received = self.a.repeat_interleave(self.units // self.groups, 0)[part]
            incoming = incoming.of_units(part)
        delta = self.delta[..., part]
        return replace(self, received=received, delta=delta, incoming=incoming, whole=self)

    @property
    def trace_Daa(self) -> Float[Tensor, " u"]:
        """Σ D ‖a‖² of cases with one position; see `moments.trace_Daa`."""
        return trace_Daa(self.a.squeeze(2), self.D)

    @property
    def joint_errors(self) -> Float[Tensor, "r m u"]:
        """Σ_t δ."""
        return self._summed if self.joint else self.delta.squeeze(2).double()

    @cached_property
    def _summed(self) -> Float[Tensor, "r m u"]:
        return self.delta.sum(2).double()

    @cached_property
    def unmoved(self) -> Bool[Tensor, " u"] | None:
        """Units whose bias has no effect: Σ_t δ is zero up to rounding. None unless joint.

        Units before an instance normalisation are examples, and the keys of attention.
        """
        if not self.joint:
            return None
        size = torch.linalg.vector_norm(self.delta, dim=2).double()
        left = rounding(self.delta.dtype, 256.0) ** 2 * self.delta.shape[2]
        return self.weight <= left * size.square().sum((0, 1))

    @property
    def rounded_mean(self) -> Float[Tensor, "*g d"]:
        """The origin in double, in the shape of the mean."""
        return self.mean.to(self.received.dtype).double()
