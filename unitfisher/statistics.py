"""What one measurement says of one layer: the theorems' quantities for every unit."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from unitfisher.blocks import Block, blocks, joined_gradients
from unitfisher.cases import UnitCases
from unitfisher.diagnostics import cosine, mean_share
from unitfisher.fisher import Gradient, Observation
from unitfisher.products import Moments
from unitfisher.solvers import SingularFisherError, dot
from unitfisher.streaming import Cases, Streamed
from unitfisher.theorems import (
    bias_shift_correction,
    damping_share,
    unit_natural_gradient,
    weight_natural_gradient,
)
from unitfisher.uncertainty import StandardErrors


class LayerStep(NamedTuple):
    """Unit natural gradient in the shapes of the layer's weight and bias."""

    dw: Tensor
    dw0: Float[Tensor, " u"] | None  # None for a layer without bias


@dataclass(frozen=True)
class UnitStatistics:
    """One layer's measurement; tensors stay on the device of the model, without a graph.

    Theorem quantities of a dead unit (no error ever reaches it) are NaN. For a layer without bias
    s and k are those that its bias would have.

    Standard errors speak of what was drawn, not of the batch: of labels or signs (two columns or
    more tell), and of cases where ``rows=`` draws them. They are 0 where nothing was drawn and NaN
    where it cannot be told: from a single random column, of E_q(a), s and k with
    ``sharing="joint"`` or over a loader, and of s and k from drawn rows. Those of s and k are of
    first order in the spread of D: their bias, which may be larger, is not in them.
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
    residual: Float[
        Tensor, " u"
    ]  # relative, that conjugate gradients left; 0 where solved directly
    converged: Bool[Tensor, " u"]  # whether that is within the tolerance
    route: str  # how systems were solved: "rows", "sums", "products" or "passes"
    c_error: Float[Tensor, " u"]  # standard error
    mean_q_error: Float[Tensor, "u d"]
    s_error: Float[Tensor, " u"]
    k_error: Float[Tensor, " u"]
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
    block: Block = field(repr=False)  # the layers that were measured together with it
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
            LoaderError: The loader that has to be read again has changed, or the model has.
            SingularFisherError: A unit's Fisher has no inverse at this damping.
        """
        if g.flatten(1).shape != self.mean_q.shape or (g0 is None) == self.biased:
            bias = "its bias" if self.biased else "no bias"
            raise ValueError(
                f"layer {self.layer!r} measured {tuple(self.mean_q.shape)} weights and {bias}; "
                f"got a gradient of {tuple(g.shape)} and "
                f"{'no bias gradient' if g0 is None else tuple(g0.shape)}"
            )
        gradient = Gradient(g, g0)
        return in_shape_of(gradient, natural_gradient(self.alone, self.damping, gradient))

    def damped(self, damping: float) -> "UnitStatistics":
        """Return the same measurement at another relative damping."""
        found = theory(self.alone.damped(damping), damping, self.gradient)
        return replace(self, damping=damping, **found)

    @property
    def alone(self) -> Block:
        """This layer as a block of its own."""
        return Block((self.layer,), (self.units,), self.cases, self.finite)


def statistics(
    observations: Mapping[str, Observation] | Mapping[str, Streamed],
    layers: Mapping[str, nn.Module],
    *,
    step: int,
    units: Mapping[str, Int[Tensor, " u"]],
    damping: float,
    spare: int,
) -> dict[str, UnitStatistics]:
    """Compute every layer's statistics from what a pass showed of it.

    What was solved is kept for the gradient that may come, in so many bytes to spare.
    """
    biased = [name for name in observations if layers[name].bias is not None]
    measured = {}
    for block in blocks(observations, units, biased):
        cases = block.cases
        gradient = joined_gradients(observations[name].gradient for name in block.layers)
        found = theory(block, damping, gradient)
        of_units = {**found, "dead": cases.dead, "n_eff": cases.n_eff}
        parted = {key: block.split(x) for key, x in of_units.items()}
        solved = bytes_of(cases.tensors)
        if solved > spare:
            block.forget()
        else:
            spare -= solved
        parted["mean"] = block.split_shared(cases.mean)
        parted["mean_share"] = block.split_shared(mean_share(cases.mean, cases.trace_variance))
        for i, (layer, own) in enumerate(zip(block.layers, block.split_cases(), strict=True)):
            means = observations[layer].means
            every = layer not in units
            measured[layer] = UnitStatistics(
                layer=layer,
                step=step,
                units=block.units[i],
                damping=damping,
                route=cases.route,
                output_mean=means.mean if every else means.mean[block.units[i]],
                output_var=means.var if every else means.var[block.units[i]],
                nonlinearity=means.nonlinearity,
                finite=block.finite,
                biased=layer in biased,
                cases=own,
                block=block,
                gradient=observations[layer].gradient,
                **{key: x[i] for key, x in parted.items()},
            )
    return {name: measured[name] for name in observations}


def with_gradients(
    measured: Mapping[str, UnitStatistics], gradients: Mapping[str, Gradient]
) -> tuple[dict[str, LayerStep], dict[str, UnitStatistics]]:
    """Return the natural gradients of these, and measurements with their angles and shares."""
    steps: dict[str, LayerStep] = {}
    completed = dict(measured)
    for block in {id(of.block): of.block for of in measured.values()}.values():
        given = [name for name in block.layers if name in gradients]
        whole = len(given) == len(block.layers)
        for part in [block] if whole else [measured[name].alone for name in given]:
            gradient = joined_gradients(gradients[name] for name in part.layers)
            assert gradient is not None
            natural = natural_gradient(part, measured[part.layers[0]].damping, gradient)
            angles = map(part.split, Angles.of(part.center(slice(None)), gradient, natural))
            split = zip(*map(part.split, (t for t in natural if t is not None)), strict=True)
            for name, step, own in zip(part.layers, split, zip(*angles, strict=True), strict=True):
                dw, dw0 = step if len(step) == 2 else (*step, None)
                steps[name] = in_shape_of(gradients[name], LayerStep(dw, dw0))
                known = Angles(*own)._asdict()
                completed[name] = replace(measured[name], gradient=gradients[name], **known)
    return steps, completed


def natural_gradient(block: Block, damping: float, gradient: Gradient) -> LayerStep:
    """Return F⁻¹ (g, g0) of a block's units in double precision, (u, d) and (u,)."""
    dw = block.cases.mean.new_full((block.cases.units, block.cases.inputs), torch.nan)
    dw0 = dw[:, 0].clone()
    for part, m in block.cases.damped_parts(damping) if block.finite else ():
        try:
            step = unit_steps(m, gradient.of_units(part))
        except SingularFisherError as error:
            raise block.named(error, part) from None
        dw[part], dw0[part] = step.dw, 0.0 if step.dw0 is None else step.dw0
    return LayerStep(dw, None if gradient.g0 is None else dw0)


def in_shape_of(gradient: Gradient, step: LayerStep) -> LayerStep:
    (g, g0), (dw, dw0) = gradient, step
    bias = None if g0 is None or dw0 is None else dw0.to(g0.dtype)
    return LayerStep(dw.to(g.dtype).view_as(g), bias)


def unit_steps(m: Moments, gradient: Gradient) -> LayerStep:
    """Return F⁻¹ (g, g0) in double precision; without a bias A⁻¹ g."""
    g, g0 = gradient.g.flatten(1).to(m.mu_q.dtype), gradient.g0
    if g0 is None:
        return LayerStep(weight_natural_gradient(m, g), None)
    return LayerStep(*unit_natural_gradient(m, g, g0.to(m.mu_q.dtype)))


class Angles(NamedTuple):
    """How a gradient stands to its unit natural gradient and to the incoming mean."""

    cosine: Float[Tensor, " u"]
    bias_shift_share_gradient: Float[Tensor, " u"]
    bias_shift_share_natural: Float[Tensor, " u"]

    @classmethod
    def of(cls, mean: Float[Tensor, "g d"], gradient: Gradient, natural: LayerStep) -> "Angles":
        """Means are one for each of g groups of consecutive units."""
        g, dw = gradient.g.flatten(1).to(mean), natural.dw
        gg, nn, gn = dot(g, g), dot(dw, dw), dot(g, dw)
        mm, mg, mn = (
            dot(mean, mean).repeat_interleave(len(g) // len(mean)),
            _with_mean(mean, g),
            _with_mean(mean, dw),
        )
        if gradient.g0 is not None and natural.dw0 is not None:
            g0, dw0 = gradient.g0.to(mean), natural.dw0
            gg, nn, gn = gg + g0**2, nn + dw0**2, gn + g0 * dw0
            mm, mg, mn = mm + 1, mg + g0, mn + dw0
        return cls(cosine(gn, gg, nn), cosine(mg, mm, gg).abs(), cosine(mn, mm, nn).abs())

    @classmethod
    def unknown(cls, cases: Cases) -> "Angles":
        """NaN: there was no gradient."""
        return cls(*[torch.full_like(cases.n_eff, torch.nan)] * 3)


def _with_mean(mean: Float[Tensor, "g d"], x: Float[Tensor, "u d"]) -> Float[Tensor, " u"]:
    """Multiply what stands at units with their group's mean."""
    grouped: Tensor = x.unflatten(0, (len(mean), -1))
    return (grouped @ mean.unsqueeze(-1)).flatten()


class Theory(NamedTuple):
    """What the theorems say of a layer's units at one damping."""

    c: Float[Tensor, " u"]
    mean_q: Float[Tensor, "u d"]
    s: Float[Tensor, " u"]
    k: Float[Tensor, " u"]
    corrected_mean: Float[Tensor, "u d"]
    damping_share: Float[Tensor, " u"]
    residual: Float[Tensor, " u"]
    converged: Bool[Tensor, " u"]
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
            corrected_mean=m.from_mu_p((1 + k)[:, None] * m.mu_q),
            damping_share=damping_share(damped),
            residual=damped.residual,
            converged=damped.residual <= damped.tolerance,
            mean_share_q=m.mu_q_squared / (m.mu_q_squared + m.trace_Var_q) * living,
        )

    @classmethod
    def unknown(cls, cases: Cases) -> "Theory":
        """NaN for every quantity: the pass was not finite."""
        wide = cases.mean.new_full((cases.units, cases.inputs), torch.nan)
        of_inputs = ("mean_q", "corrected_mean")
        nothing = cls(*(wide if name in of_inputs else wide[:, 0] for name in cls._fields))
        return nothing._replace(converged=torch.zeros_like(cases.dead))


def theory(block: Block, damping: float, gradient: Gradient | None) -> dict[str, Any]:
    """Compute what the theorems say, part after part of the units: fields of UnitStatistics."""
    cases = block.cases
    if not block.finite:
        unknown = Theory.unknown(cases)
        errors = StandardErrors.alike(torch.nan, unknown.mean_q)
        return {**unknown._asdict(), **errors._asdict(), **Angles.unknown(cases)._asdict()}
    found = []
    for (part, m), (_, damped) in zip(cases.parts(), cases.damped_parts(damping), strict=True):
        try:
            of_part = {
                **Theory.of(m, damped)._asdict(),
                **_errors(cases, part, m, damped)._asdict(),
            }
            if gradient is not None:
                own = gradient.of_units(part)
                angles = Angles.of(block.center(part), own, unit_steps(damped, own))
                of_part |= angles._asdict()
        except SingularFisherError as error:
            raise block.named(error, part) from None
        found.append(of_part)
    joined = {name: together([of_part[name] for of_part in found]) for name in found[0]}
    return joined if gradient is not None else joined | Angles.unknown(cases)._asdict()


def _errors(cases: Cases, part: slice, m: Moments, damped: Moments) -> StandardErrors:
    if isinstance(cases, UnitCases):
        own = cases if part == slice(None) else cases.of_units(part)  # which may copy activations
        return StandardErrors.of(own, m, damped)
    if not cases.variance.any():
        return StandardErrors.alike(0.0, m.mu_q)
    return StandardErrors.of_c(cases.variance[part].sqrt() / cases.samples, m)


def together(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def tensors_of(measured: UnitStatistics) -> list[Tensor]:
    """List the tensors that a measurement keeps, for counting their memory."""
    own = [getattr(measured, f.name) for f in fields(measured)]
    kept: list[object] = [
        *own,
        *measured.cases.tensors,
        *measured.block.cases.tensors,
        *(measured.gradient or ()),
    ]
    return [t for t in kept if isinstance(t, Tensor)]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Count storages once, however many tensors view them."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
