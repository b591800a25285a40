"""The results of one measurement for one layer: the theorems' quantities of every unit."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from unitfisher.blocks import Block, blocks, joined_gradients
from unitfisher.convergence import Convergence, warn_of_layers, warn_of_units
from unitfisher.diagnostics import mean_share
from unitfisher.kinds import Turn, as_it_is, turning
from unitfisher.observation import Gradient, Observation
from unitfisher.solvers import squared
from unitfisher.steps import Angles, LayerStep, in_shape_of, in_shapes_of, natural_gradient
from unitfisher.streaming import Cases, Streamed
from unitfisher.theory import theory


@dataclass(frozen=True, eq=False)
class UnitStatistics:
    """One layer's measurement; tensors stay on the device of the model, without a graph.

    Where the device has no double precision (Apple's GPUs), they are on the CPU.

    The theorems' quantities are NaN for a dead unit: no error reaches it or, with "joint", its
    errors cancel over the positions of every sample. For a layer without bias, s and k are those
    that a bias would have.

    Standard errors are due to random draws, of labels or signs and, with ``rows=``, of cases; they
    do not cover the choice of the batch. They are 0 where nothing was drawn, and NaN where they are
    unknown: with a single random column (unless ``rows=`` draws samples), if the samples are not
    the first axis of a layer's input, for E_q(a), s and k with ``sharing="joint"`` or over a
    loader, and for s and k from drawn rows where n_eff is below five times the inputs. Those of s
    and k are first order in the spread of D: the bias of s and k, which may be larger, is not in
    them.
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
    damping_share: Float[Tensor, " u"]  # the share of s that is due to the damping
    residual: Float[Tensor, " u"]  # the largest, relative; 0 where systems were solved directly
    converged: Bool[Tensor, " u"]  # whether it is within the tolerance, the gradient's included
    route: str  # how systems were solved: "rows", "sums", "products" or "passes"
    c_error: Float[Tensor, " u"]  # standard error
    mean_q_error: Float[Tensor, "u d"]
    s_error: Float[Tensor, " u"]
    k_error: Float[Tensor, " u"]
    mean_share: Float[Tensor, "*g"]  # ‖E_p(a)‖² / E_p‖a‖²
    mean_share_q: Float[Tensor, " u"]  # ‖E_q(a)‖² / E_q‖a‖²
    output_mean: Float[Tensor, " u"]  # of the unit, after the nonlinearity
    output_var: Float[Tensor, " u"]
    nonlinearity: str | None  # the function seen after the layer; None: linear
    finite: bool  # whether there was neither NaN nor infinity
    cosine: Float[Tensor, " u"]  # of gradient and unit natural gradient; NaN without gradient
    bias_shift_share_gradient: Float[Tensor, " u"]
    bias_shift_share_natural: Float[Tensor, " u"]
    biased: bool  # whether the layer has a bias
    alone: Block = field(repr=False)  # this layer as a block by itself
    block: Block = field(repr=False)  # the layers that were measured together with it
    gradient: Gradient | None = field(repr=False)  # of ln p, by targets; or of the loss, from .grad
    turn: Turn = field(repr=False)  # to rows of units and back, if all are observed

    def natural_gradient(
        self, g: Float[Tensor, "*weight"], g0: Float[Tensor, " u"] | None = None
    ) -> LayerStep:
        """Return F⁻¹ (g, g0) for these units, in the shape and precision of the gradient given.

        Args:
            g: Gradient in the weights, averaged over samples, in the shape of ``weight``; with
                ``units=`` one row per unit. If units come first in the weight, (u, d) will do.
            g0: The same for the bias, (u,); None for a layer without bias.

        Raises:
            ValueError: The gradient does not fit the layer.
            LoaderError: The loader that has to be read again has changed, or the model has.
            SingularFisherError: A unit's Fisher has no inverse at this damping.
        """
        rows = self.turn(g)
        if rows.flatten(1).shape != self.mean_q.shape or (g0 is None) == self.biased:
            bias = "its bias" if self.biased else "no bias"
            raise ValueError(
                f"layer {self.layer!r} measured {tuple(self.mean_q.shape)} weights and {bias}; "
                f"got a gradient of {tuple(g.shape)} and "
                f"{'no bias gradient' if g0 is None else tuple(g0.shape)}"
            )
        gradient = Gradient(rows, g0).measurable()
        solved = natural_gradient(self.alone, self.damping, gradient)
        warn_of_units(self.alone, solved.convergence.converged)
        return in_shape_of(gradient, solved.step).turned(self.turn).on(g.device)

    def damped(self, damping: float) -> "UnitStatistics":
        """Return the same measurement at another relative damping.

        Raises:
            ValueError: The damping is negative or not finite.
            LoaderError: The loader that has to be read again has changed, or the model has.
            SingularFisherError: A unit's Fisher has no inverse at this damping.
        """
        suited = self.alone.suited_to(damping)
        found = theory(suited, damping, self.gradient)
        warn_of_units(suited, found.theory["converged"])
        return replace(self, damping=damping, **found.theory)

    @property
    def convergence(self) -> Convergence:
        return Convergence(self.residual, self.converged)

    @property
    def cases(self) -> Cases:
        """The cases of the layer; over a loader, sums of them."""
        return self.alone.cases


class Measured(NamedTuple):
    """Statistics by layer, and natural gradients of the layers that had a gradient."""

    statistics: dict[str, UnitStatistics]
    steps: dict[str, LayerStep]


def statistics(
    observations: Mapping[str, Observation] | Mapping[str, Streamed],
    layers: Mapping[str, nn.Module],
    *,
    step: int,
    units: Mapping[str, Int[Tensor, " u"]],
    damping: float,
    spare: int,
) -> Measured:
    """Compute every layer's statistics from its observation.

    Solved systems are kept for a later gradient, up to ``spare`` bytes.
    """
    biased = [name for name in observations if layers[name].bias is not None]
    measured: dict[str, UnitStatistics] = {}
    steps: dict[str, LayerStep] = {}
    solved: list[tuple[Block, Tensor]] = []
    for block in blocks(observations, units, biased):
        cases = block.cases
        gradients = {name: observations[name].gradient for name in block.layers}
        found, natural = theory(block, damping, joined_gradients(gradients.values()))
        solved.append((block, found["converged"]))
        of_units = {**found, "dead": cases.dead, "n_eff": cases.n_eff}
        parted = {key: block.split(x) for key, x in of_units.items()}
        spare -= _kept(block, spare)
        parted["mean"] = block.split_shared(cases.mean)
        shared = mean_share(squared(cases.mean), cases.trace_variance)
        parted["mean_share"] = block.split_shared(shared)
        for i, (layer, alone) in enumerate(zip(block.layers, block.apart(), strict=True)):
            means = observations[layer].means
            every = layer not in units
            measured[layer] = UnitStatistics(
                layer=layer,
                step=step,
                units=block.units[i],
                damping=damping,
                route=block.held.route,
                output_mean=means.mean if every else means.mean[block.units[i]],
                output_var=means.var if every else means.var[block.units[i]],
                nonlinearity=means.nonlinearity,
                finite=block.finite,
                biased=layer in biased,
                alone=alone,
                block=block,
                gradient=gradients[layer],
                turn=turning(layers[layer]) if every else as_it_is,
                **{key: x[i] for key, x in parted.items()},
            )
        if natural is not None:
            steps |= in_shapes_of({n: g for n, g in gradients.items() if g is not None}, natural)
    warn_of_layers(solved)
    return Measured({name: measured[name] for name in observations}, steps)


def with_gradients(
    measured: Mapping[str, UnitStatistics], gradients: Mapping[str, Gradient], spare: int
) -> Measured:
    """Return the gradients' natural gradients, and measurements with their angles and shares.

    Solved systems are kept for the next gradients, up to ``spare`` bytes.
    """
    steps: dict[str, LayerStep] = {}
    completed = dict(measured)
    solved: list[tuple[Block, Tensor]] = []
    for block in {id(each.block): each.block for each in measured.values()}.values():
        given = {name: gradients[name] for name in block.layers if name in gradients}
        whole = len(given) == len(block.layers)
        for part in [block] if whole else [measured[name].alone for name in given]:
            gradient = joined_gradients(given[name] for name in part.layers)
            assert gradient is not None
            natural, convergence = natural_gradient(
                part, measured[part.layers[0]].damping, gradient
            )
            solved.append((part, convergence.converged))
            steps |= in_shapes_of({name: given[name] for name in part.layers}, natural)
            angles = Angles.of(part.center(slice(None)), gradient, natural)
            parted = (zip(*map(part.split, of), strict=True) for of in (angles, convergence))
            for name, of_layer, now in zip(part.layers, *parted, strict=True):
                joined = Convergence(*now).joined(measured[name].convergence)
                known = Angles(*of_layer)._asdict() | joined._asdict()
                completed[name] = replace(measured[name], gradient=gradients[name], **known)
            spare -= _kept(part, spare)
    warn_of_layers(solved)
    return Measured(completed, steps)


def _kept(block: Block, spare: int) -> int:
    """Return the bytes of solved systems; drop these, and return 0, if they exceed ``spare``."""
    if spare > 0 and (solved := bytes_of(block.tensors)) <= spare:
        return solved
    block.held.forget()
    return 0


def tensors_of(measured: UnitStatistics) -> list[Tensor]:
    """List the tensors that a measurement keeps, for counting their memory."""
    values = [getattr(measured, f.name) for f in fields(measured)]
    kept: list[object] = [
        *values,
        *measured.alone.tensors,
        *measured.block.tensors,
        *(measured.gradient or ()),
    ]
    return [t for t in kept if isinstance(t, Tensor)]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Count the bytes of tensors, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
