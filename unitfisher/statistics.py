"""What one measurement says of one layer: the theorems' quantities for every unit."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from unitfisher.diagnostics import bias_shift_share, cosine, mean_share, with_bias
from unitfisher.fisher import Gradient, Observation
from unitfisher.rows import Moments
from unitfisher.solvers import SingularFisherError
from unitfisher.streaming import Cases, Streamed
from unitfisher.theorems import (
    bias_shift_correction,
    damping_share,
    unit_natural_gradient,
    weight_natural_gradient,
)


class LayerStep(NamedTuple):
    """Unit natural gradient in the shapes of the layer's weight and bias."""

    dw: Tensor
    dw0: Float[Tensor, " u"] | None  # None for a layer without bias


@dataclass(frozen=True)
class UnitStatistics:
    """One layer's measurement; tensors stay on the device of the model, without a graph.

    Theorem quantities of a dead unit (no error ever reaches it) are NaN. For a layer without bias
    s and k are those that its bias would have.
    """

    layer: str
    step: int
    units: Int[Tensor, " u"]  # which units of the layer
    damping: float  # relative: λ = damping · trace(A) / d
    c: Float[Tensor, " u"]  # E_p(D)
    mean: Float[Tensor, "*g d"]  # E_p(a); (u, d) where groups see different inputs
    mean_q: Float[Tensor, "u d"]  # E_q(a)
    s: Float[Tensor, " u"]
    k: Float[Tensor, " u"]  # the poster's: the paper's is 1 + k
    corrected_mean: Float[Tensor, "u d"]  # E_p(a) - (1 + k) E_q(a)
    dead: Bool[Tensor, " u"]
    n_eff: Float[Tensor, " u"]  # 1 / Σ w², the effective number of cases under q
    damping_share: Float[Tensor, " u"]  # how much of s is made by the damping
    mean_share: Float[Tensor, "*g"]  # ‖E_p(a)‖² / E_p‖a‖²
    mean_share_q: Float[Tensor, " u"]  # ‖E_q(a)‖² / E_q‖a‖²
    output_mean: Float[Tensor, " u"]  # after the nonlinearity
    output_var: Float[Tensor, " u"]
    nonlinearity: str | None  # the function seen after the layer; None: linear
    finite: bool
    cosine: Float[Tensor, " u"]  # of gradient and unit natural gradient; NaN without gradient
    bias_shift_share_gradient: Float[Tensor, " u"]
    bias_shift_share_natural: Float[Tensor, " u"]
    biased: bool
    cases: Cases = field(repr=False)
    gradient: Gradient | None = field(repr=False)

    def natural_gradient(
        self, g: Float[Tensor, "u *d"], g0: Float[Tensor, " u"] | None = None
    ) -> LayerStep:
        """Return F⁻¹ (g, g0) for these units, in the shape and precision of the gradient given.

        Args:
            g: Gradient in the weights, (u, d) or the shape of ``weight``, averaged over samples.
            g0: The same for the bias; None for a layer without.

        Raises:
            ValueError: The gradient does not fit the layer.
            SingularFisherError: A unit's Fisher has no inverse at this damping.
        """
        if g.flatten(1).shape != self.mean_q.shape or (g0 is None) == self.biased:
            bias = "its bias" if self.biased else "no bias"
            raise ValueError(
                f"layer {self.layer!r} measured {tuple(self.mean_q.shape)} weights and {bias}; "
                f"got a gradient of {tuple(g.shape)} and "
                f"{'no bias gradient' if g0 is None else tuple(g0.shape)}"
            )
        if not self.finite:
            return LayerStep(torch.full_like(g, torch.nan), None if g0 is None else g0 * torch.nan)
        dw, dw0 = torch.zeros_like(self.mean_q), torch.zeros_like(self.c)
        for part, m in self.cases.damped_parts(self.damping):
            try:
                step = natural_gradient(m, Gradient(g, g0).of_units(part))
            except SingularFisherError as error:
                raise error.of_layer(self.layer, self.units[part]) from None
            dw[part], dw0[part] = step.dw, 0.0 if step.dw0 is None else step.dw0
        return LayerStep(dw.to(g.dtype).view_as(g), None if g0 is None else dw0.to(g0.dtype))

    def damped(self, damping: float) -> "UnitStatistics":
        """Return the same measurement at another relative damping."""
        if not self.finite:
            return replace(self, damping=damping)
        found, angles = theory(self.layer, self.units, self.cases, damping, self.gradient)
        return replace(self, damping=damping, **found._asdict(), **angles._asdict())

    def with_gradient(self, gradient: Gradient, natural: LayerStep) -> "UnitStatistics":
        """Return the same measurement with the angles and shares of this gradient and step."""
        angles = Angles.of(self.mean, gradient, natural)
        return replace(self, gradient=gradient, **angles._asdict())


def natural_gradient(m: Moments, gradient: Gradient) -> LayerStep:
    """Return F⁻¹ (g, g0) in double precision; without a bias A⁻¹ g."""
    g, g0 = gradient.g.flatten(1).to(m.mu_q.dtype), gradient.g0
    if g0 is None:
        return LayerStep(weight_natural_gradient(m, g), None)
    return LayerStep(*unit_natural_gradient(m, g, g0.to(m.mu_q.dtype)))


def statistics(
    layer: str,
    module: nn.Module,
    observation: Observation | Streamed,
    *,
    step: int,
    units: Int[Tensor, " u"] | None,
    damping: float,
) -> UnitStatistics:
    """Compute a layer's statistics from what a pass showed of it."""
    cases, means, gradient = observation.cases, observation.means, observation.gradient
    finite = observation.fault is None
    device = cases.mean.device
    units = torch.arange(cases.units, device=device) if units is None else units.to(device)
    if finite:
        found, angles = theory(layer, units, cases, damping, gradient)
    else:
        found, angles = Theory.unknown(cases), Angles.unknown(cases)
    return UnitStatistics(
        layer=layer,
        step=step,
        units=units,
        damping=damping,
        mean=cases.mean,
        dead=cases.dead,
        n_eff=cases.n_eff,
        mean_share=mean_share(cases.mean, cases.trace_variance),
        output_mean=means.mean[units],
        output_var=means.var[units],
        nonlinearity=means.nonlinearity,
        finite=finite,
        biased=module.bias is not None,
        cases=cases,
        gradient=gradient,
        **found._asdict(),
        **angles._asdict(),
    )


class Angles(NamedTuple):
    """How a gradient stands to its unit natural gradient and to the incoming mean."""

    cosine: Float[Tensor, " u"]
    bias_shift_share_gradient: Float[Tensor, " u"]
    bias_shift_share_natural: Float[Tensor, " u"]

    @classmethod
    def of(cls, mean: Float[Tensor, "*g d"], gradient: Gradient, natural: LayerStep) -> "Angles":
        g, g0 = gradient.g.flatten(1).to(mean), gradient.g0
        dw, dw0 = natural.dw.flatten(1).to(mean), natural.dw0
        if g0 is None or dw0 is None:
            return cls(
                cosine(g, dw), bias_shift_share(mean, g, None), bias_shift_share(mean, dw, None)
            )
        g0, dw0 = g0.to(mean), dw0.to(mean)
        return cls(
            cosine(with_bias(g, g0), with_bias(dw, dw0)),
            bias_shift_share(mean, g, g0),
            bias_shift_share(mean, dw, dw0),
        )

    @classmethod
    def unknown(cls, cases: Cases) -> "Angles":
        """NaN: there was no gradient."""
        return cls(*[torch.full_like(cases.n_eff, torch.nan)] * 3)


class Theory(NamedTuple):
    """What the theorems say of a layer's units at one damping."""

    c: Float[Tensor, " u"]
    mean_q: Float[Tensor, "u d"]
    s: Float[Tensor, " u"]
    k: Float[Tensor, " u"]
    corrected_mean: Float[Tensor, "u d"]
    damping_share: Float[Tensor, " u"]
    mean_share_q: Float[Tensor, " u"]

    @classmethod
    def of(cls, m: Moments, damped: Moments) -> "Theory":
        s, k = bias_shift_correction(damped)
        living = torch.where(m.alive, 1.0, torch.nan)
        return cls(
            c=m.c,
            mean_q=m.mu_q * living[:, None],
            s=s,
            k=k,
            corrected_mean=m.mu_p - (1 + k)[:, None] * m.mu_q,
            damping_share=damping_share(damped),
            mean_share_q=mean_share(m.mu_q, m.trace_Var_q) * living,
        )

    @classmethod
    def unknown(cls, cases: Cases) -> "Theory":
        """NaN for every quantity: the pass was not finite."""
        wide = cases.mean.new_full((cases.units, cases.inputs), torch.nan)
        return cls(
            *(wide if name in ("mean_q", "corrected_mean") else wide[:, 0] for name in cls._fields)
        )


def theory(
    layer: str,
    units: Int[Tensor, " u"],
    cases: Cases,
    damping: float,
    gradient: Gradient | None,
) -> tuple[Theory, Angles]:
    """Compute what the theorems say, part after part of the units."""
    found, angles = [], []
    undamped = cases.parts()
    for part, damped in cases.damped_parts(damping):
        _, m = next(undamped)
        try:
            found.append(Theory.of(m, damped))
            if gradient is not None:
                own = gradient.of_units(part)
                angles.append(Angles.of(m.mu_p, own, natural_gradient(damped, own)))
        except SingularFisherError as error:
            raise error.of_layer(layer, units[part]) from None
    joined = Theory(*map(torch.cat, zip(*found, strict=True)))
    if not angles:
        return joined, Angles.unknown(cases)
    return joined, Angles(*map(torch.cat, zip(*angles, strict=True)))


def tensors_of(measured: UnitStatistics) -> list[Tensor]:
    """List the tensors that a measurement keeps, for counting their memory."""
    own = [getattr(measured, f.name) for f in fields(measured)]
    kept: list[object] = [*own, *measured.cases.tensors, *(measured.gradient or ())]
    return [t for t in kept if isinstance(t, Tensor)]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Count storages once, however many tensors view them."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
