"""The unit natural gradients of a block of layers, and their angles to the gradients."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unitfisher.blocks import Block, together
from unitfisher.convergence import Convergence
from unitfisher.diagnostics import cosine
from unitfisher.kinds import Turn
from unitfisher.moments import Moments
from unitfisher.observation import Gradient
from unitfisher.solvers import SingularFisherError, dot, squared
from unitfisher.theorems import unit_natural_gradient, weight_natural_gradient


class LayerStep(NamedTuple):
    """Unit natural gradient of a layer in the shapes of weight and bias, without learning rate."""

    dw: Tensor
    dw0: Float[Tensor, " u"] | None  # None for a layer without bias

    def turned(self, turn: Turn) -> "LayerStep":
        """Give dw, one row per unit, the shape of the layer's weight."""
        return LayerStep(turn(self.dw), self.dw0)

    def on(self, device: torch.device) -> "LayerStep":
        return LayerStep(self.dw.to(device), None if self.dw0 is None else self.dw0.to(device))


class Solved(NamedTuple):
    """A block's step, and how well its systems were solved."""

    step: LayerStep
    convergence: Convergence


def natural_gradient(block: Block, damping: float, gradient: Gradient) -> Solved:
    """Return F⁻¹ (g, g0) of a block's units in double precision, (u, d) and (u,)."""
    if not block.finite:
        dw = block.cases.mean.new_full((block.cases.units, block.cases.inputs), torch.nan)
        step = LayerStep(dw, None if gradient.g0 is None else dw[:, 0])
        return Solved(step, Convergence.unknown(dw[:, 0]))
    steps, solved = [], []
    for part, _, damped in block.held.damped_parts(damping):
        try:
            steps.append(unit_steps(damped, gradient.of_units(part), block.unmoved(part)))
        except SingularFisherError as error:
            raise block.named(error, part) from None
        solved.append(Convergence.of(damped))
    convergence = Convergence(*(together(parts) for parts in zip(*solved, strict=True)))
    return Solved(joined_steps(steps), convergence)


def joined_steps(parts: Sequence[LayerStep]) -> LayerStep:
    """Concatenate the steps of consecutive parts of the units."""
    dw0 = [step.dw0 for step in parts if step.dw0 is not None]
    return LayerStep(together([step.dw for step in parts]), together(dw0) if dw0 else None)


def in_shapes_of(gradients: Mapping[str, Gradient], natural: LayerStep) -> dict[str, LayerStep]:
    """Split a block's step by layers, each in the shape and precision of its gradient."""
    count = len(gradients)
    parted = zip(*(t.chunk(count) for t in natural if t is not None), strict=True)
    return {
        name: in_shape_of(gradient, LayerStep(step[0], step[1] if len(step) > 1 else None))
        for (name, gradient), step in zip(gradients.items(), parted, strict=True)
    }


def in_shape_of(gradient: Gradient, step: LayerStep) -> LayerStep:
    (g, g0), (dw, dw0) = gradient, step
    bias = None if g0 is None or dw0 is None else dw0.to(g0.dtype)
    return LayerStep(dw.to(g.dtype).view_as(g), bias)


def unit_steps(
    m: Moments, gradient: Gradient, unmoved: Bool[Tensor, " u"] | None = None
) -> LayerStep:
    """Return F⁻¹ (g, g0) in double precision; A⁻¹ g without a bias, or if it has no effect."""
    g, g0 = gradient.g.flatten(1).to(m.mu_q.dtype), gradient.g0
    if g0 is None:
        return LayerStep(weight_natural_gradient(m, g), None)
    dw, dw0 = unit_natural_gradient(m, g, g0.to(m.mu_q.dtype))
    if unmoved is None or not bool(unmoved.any()):
        return LayerStep(dw, dw0)
    alone = weight_natural_gradient(m, g)
    return LayerStep(torch.where(unmoved[:, None], alone, dw), dw0.masked_fill(unmoved, 0.0))


class Angles(NamedTuple):
    """Cosine of a gradient and its unit natural gradient, and the bias-shift shares of both."""

    cosine: Float[Tensor, " u"]
    bias_shift_share_gradient: Float[Tensor, " u"]
    bias_shift_share_natural: Float[Tensor, " u"]

    @classmethod
    def of(cls, mean: Float[Tensor, "g d"], gradient: Gradient, natural: LayerStep) -> "Angles":
        """Compute them; there is one mean for each of g groups of consecutive units."""
        g, dw = gradient.g.flatten(1).to(mean), natural.dw
        gg, nn, gn = squared(g), squared(dw), dot(g, dw)
        mm, mg, mn = (
            squared(mean).repeat_interleave(len(g) // len(mean)),
            _with_mean(mean, g),
            _with_mean(mean, dw),
        )
        if gradient.g0 is not None and natural.dw0 is not None:
            g0, dw0 = gradient.g0.to(mean), natural.dw0
            gg, nn, gn = gg + g0**2, nn + dw0**2, gn + g0 * dw0
            mm, mg, mn = mm + 1, mg + g0, mn + dw0
        return cls(cosine(gn, gg, nn), cosine(mg, mm, gg).abs(), cosine(mn, mm, nn).abs())

    @classmethod
    def unknown(cls, like: Float[Tensor, " u"]) -> "Angles":
        """NaN: there was no gradient."""
        return cls(*[torch.full_like(like, torch.nan)] * 3)


def _with_mean(mean: Float[Tensor, "g d"], x: Float[Tensor, "u d"]) -> Float[Tensor, " u"]:
    """Multiply each unit's vector with its group's mean."""
    grouped: Tensor = x.unflatten(0, (len(mean), -1))
    return (grouped @ mean.unsqueeze(-1)).flatten()
