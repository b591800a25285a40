"""The theorems' quantities for a block of layers, computed for parts of its units in turn."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unitfisher.blocks import Block, together
from unitfisher.cases import UnitCases
from unitfisher.convergence import Convergence
from unitfisher.diagnostics import mean_share
from unitfisher.moments import Moments, corrected_mean
from unitfisher.observation import Gradient
from unitfisher.solvers import SingularFisherError
from unitfisher.steps import Angles, LayerStep, joined_steps, natural_gradient, unit_steps
from unitfisher.streaming import Cases
from unitfisher.theorems import bias_shift_correction, damping_share
from unitfisher.uncertainty import StandardErrors


class Theory(NamedTuple):
    """The theorems' quantities for a layer's units, at one damping."""

    c: Float[Tensor, " u"]
    mean_q: Float[Tensor, "u d"]
    s: Float[Tensor, " u"]
    k: Float[Tensor, " u"]
    corrected_mean: Float[Tensor, "u d"]
    damping_share: Float[Tensor, " u"]
    mean_share_q: Float[Tensor, " u"]

    @classmethod
    def of(cls, m: Moments, damped: Moments, dead: Bool[Tensor, " u"]) -> "Theory":
        living = torch.where(dead, torch.nan, 1.0)
        s, k = (x * living for x in bias_shift_correction(damped))
        return cls(
            c=m.c.masked_fill(dead, 0.0),
            mean_q=m.mu_q * living[:, None],
            s=s,
            k=k,
            corrected_mean=corrected_mean(m, k),
            damping_share=damping_share(damped) * living,
            mean_share_q=mean_share(m.mu_q_squared, m.trace_Var_q) * living,
        )

    @classmethod
    def unknown(cls, cases: Cases) -> "Theory":
        """NaN for every quantity: the pass was not finite."""
        wide = cases.mean.new_full((cases.units, cases.inputs), torch.nan)
        of_inputs = ("mean_q", "corrected_mean")
        return cls(*(wide if name in of_inputs else wide[:, 0] for name in cls._fields))


class Found(NamedTuple):
    """The results for a block of layers."""

    theory: dict[str, Any]  # fields of UnitStatistics
    natural: LayerStep | None  # None without a gradient


def theory(block: Block, damping: float, gradient: Gradient | None) -> Found:
    """Compute the quantities of all units, part by part, and the natural gradient."""
    cases = block.cases
    if not block.finite:
        unknown = Theory.unknown(cases)
        errors = StandardErrors.alike(torch.nan, unknown.mean_q)
        angles, solved = Angles.unknown(unknown.c), Convergence.unknown(unknown.c)
        natural = None if gradient is None else natural_gradient(block, damping, gradient).step
        return Found(_fields(unknown, errors, angles, solved), natural)
    parts, steps = [], []
    for part, m, damped in block.held.damped_parts(damping):
        try:
            if gradient is None:
                angles = Angles.unknown(m.c)
            else:  # first, so that its factors serve the rest
                of_units = gradient.of_units(part)
                steps.append(unit_steps(damped, of_units, block.unmoved(part)))
                angles = Angles.of(block.center(part), of_units, steps[-1])
            of_part = Theory.of(m, damped, cases.dead[part])
            errors = _errors(cases, part, m, damped)
            parts.append(_fields(of_part, errors, angles, Convergence.of(damped)))
        except SingularFisherError as error:
            raise block.named(error, part) from None
    joined = {name: together([of_part[name] for of_part in parts]) for name in parts[0]}
    return Found(joined, joined_steps(steps) if steps else None)


def _fields(*parts: Theory | StandardErrors | Angles | Convergence) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part._asdict().items()}


def _errors(cases: Cases, part: slice, m: Moments, damped: Moments) -> StandardErrors:
    if isinstance(cases, UnitCases):
        return StandardErrors.of(cases.of_units(part), m, damped)
    if not cases.variance.any():
        return StandardErrors.alike(0.0, m.mu_q)
    return StandardErrors.of_c(cases.variance[part].sqrt() / cases.samples, m)
