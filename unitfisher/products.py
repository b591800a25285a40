"""The units of one layer, solved by conjugate gradients from products of cases with vectors.

With many inputs, and many more cases, most time goes into forming the u·d² sums of the units. Here
all units of a layer iterate at once, in two products an iteration with the activations that they
share. These are whitened first, by the second moment under the units' mean weights: iterations only
have to resolve how a unit's own weights differ from that mean.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from unitfisher.moments import (
    ConstantFit,
    fit_by_solving,
    least_pivots,
    ridge_and_trace,
)
from unitfisher.solvers import (
    SingularFisherError,
    factored,
    require_regular,
    rounding,
    roundings,
    squared,
    substituted,
)
from unitfisher.weighted import CaseProducts, Solution, Solving, Weighted
from unitfisher.whitening import Whitened, conjugate_gradients

ITERATIONS = 300  # at most
RESIDUAL = {torch.float32: 1e-6, torch.float64: 1e-11}  # relative, at which a system stops
SLACK = 100  # a unit has converged if its true residual is up to this many times larger


@dataclass(frozen=True)
class UnitProducts:
    """Each unit's cases, weighted by q with Σ q = 1; fields as in `rows.UnitRows`."""

    c: Float[Tensor, " u"]
    center: Float[Tensor, "g d"]  # μ_p
    origin: Float[Tensor, "g d"]  # near μ_p, in the precision of the activations
    mean_about: Float[Tensor, "u d"]  # μ_q - origin
    trace_Var_q: Float[Tensor, " u"]
    ridge: Float[Tensor, " u"]
    trace_Daa: Float[Tensor, " u"]  # see `moments.trace_Daa`
    cases: CaseProducts  # about the origin
    patience: int | None = None  # iterations before Cholesky solves the rest; None: it never does
    known: tuple[tuple[Tensor, Solution], ...] = ()  # right-hand sides solved for before

    @classmethod
    def of(
        cls,
        c: Float[Tensor, " u"],
        center: Float[Tensor, "g d"],
        origin: Float[Tensor, "g d"],
        trace_Daa: Float[Tensor, " u"],
        cases: Weighted,
    ) -> "UnitProducts":
        """Build from cases, without damping."""
        mean = cases.mean()
        trace = cases.squares() - squared(mean)
        return cls(c, center, origin, mean, trace, torch.zeros_like(c), trace_Daa, cases)

    @cached_property
    def alive(self) -> Bool[Tensor, " u"]:
        return self.c > 0

    @cached_property
    def mu_q(self) -> Float[Tensor, "u d"]:
        return self._about(-self.origin.double())

    @property
    def mean_shift(self) -> Float[Tensor, "u d"]:
        """μ_q - μ_p."""
        return self._about(self.center - self.origin.double())

    @property
    def mu_q_double(self) -> Float[Tensor, "u d"]:
        return self.mu_q

    @cached_property
    def mu_q_squared(self) -> Float[Tensor, " u"]:
        return squared(self.mu_q)

    def damped(self, damping: float) -> "UnitProducts":
        """Damp the weight block."""
        ridge, trace = ridge_and_trace(self, damping)
        return replace(self, ridge=ridge, trace_Var_q=trace, known=())

    def solve(self, rhs: Float[Tensor, "u d"]) -> Float[Tensor, "u d"]:
        """Return Var_q⁻¹ rhs; zero where a unit is dead.

        Raises:
            SingularFisherError: Some undamped living unit has no more weighted cases than inputs.
        """
        return self.solve_to_residual(rhs).x

    @cached_property
    def fit(self) -> ConstantFit:
        return fit_by_solving(self)

    @property
    def mu_q_solved(self) -> Float[Tensor, "u d"]:
        """Var_q⁻¹ μ_q."""
        return self._constant.x

    @cached_property
    def residual(self) -> Float[Tensor, " u"]:
        """The largest relative residual of the systems solved so far, or else of the constant's."""
        return self._constant.residual

    @property
    def tolerance(self) -> float:
        """The residual up to which a unit counts as converged."""
        return SLACK * RESIDUAL[self.origin.dtype]

    @cached_property
    def epsilon(self) -> Float[Tensor, " u"]:
        """λ / c; zero for a dead unit."""
        return self.ridge / torch.where(self.alive, self.c, 1.0)

    @cached_property
    def _constant(self) -> Solution:
        return self.solve_to_residual(self.mu_q)

    @property
    def _idle(self) -> Bool[Tensor, " u"]:
        return ~self.alive | (self.trace_Daa == 0)

    @cached_property
    def whitened(self) -> Whitened:
        enough_cases = self.cases.support > self.origin.shape[-1]
        require_regular(enough_cases | (self.ridge > 0) | self._idle)
        epsilon, busy = self._grouped(self.epsilon), self._grouped(~self._idle)
        moment = self.cases.shared_moment()
        mean = (epsilon * busy).sum(1, keepdim=True) / busy.sum(1, keepdim=True).clamp_min(1)
        moment.diagonal(dim1=-2, dim2=-1).add_(mean)
        eye = torch.eye(moment.shape[-1]).to(moment)
        moment[~busy.any(1)] = eye
        L, info = torch.linalg.cholesky_ex(moment)
        require_regular((info == 0).repeat_interleave(busy.shape[1]))
        del moment  # it may be large
        inverse = torch.linalg.solve_triangular(L, eye.expand_as(L), upper=False)
        return Whitened(
            L,
            mean_q=self._grouped(self.mean_about) @ inverse.mT,
            epsilon=epsilon.unsqueeze(-1),
            ridge=(inverse @ inverse.mT).to(self.origin.dtype),
            busy=busy.unsqueeze(-1),
            cases=self.cases.whitened(inverse),
        )

    def solve_to_residual(self, rhs: Float[Tensor, "u d"]) -> Solution:
        """Solve for all units at once, and keep the largest residual."""
        solution = self._known(rhs) or self.whitened.cases.answer(self.solving(rhs))
        before = vars(self).get("residual", solution.residual)
        vars(self)["residual"] = torch.maximum(before, solution.residual)
        return solution

    def solving(self, rhs: Float[Tensor, "u d"]) -> Solving:
        """Iterate on all units; with ``patience``, solve those that have not converged directly."""
        w, enough = self.whitened, RESIDUAL[self.origin.dtype]
        most = ITERATIONS if self.patience is None else self.patience
        r, size = w.scaled(rhs)
        y = yield from conjugate_gradients(r, w.completed, enough=enough, most=most)
        r, _ = w.scaled(rhs)
        r -= w.completed((yield y), y)
        residual = torch.linalg.vector_norm(r, dim=-1).flatten()
        x = w.back(y * size)
        if self.patience is not None:
            for unit in (~(residual <= self.tolerance)).nonzero().flatten().tolist():
                x[unit], residual[unit] = self._solved_directly(unit, rhs[unit].double()), 0.0
        x = torch.where(self._idle[:, None], rhs, x) * self.alive[:, None]
        return Solution(x, residual)

    def covariance(self, unit: int) -> Float64[Tensor, "d d"]:
        """Var_q of one unit, damped."""
        mean = self.mean_about[unit]
        V = self.cases.second_moment(unit) - torch.outer(mean, mean)
        V.diagonal().add_(self.epsilon[unit])
        return V

    def _known(self, rhs: Float[Tensor, "u d"]) -> Solution | None:
        for solved_rhs, solution in self.known:
            if solved_rhs.equal(rhs):
                return Solution(solution.x.clone(), solution.residual)  # callers scale x in place
        return None

    def _solved_directly(self, unit: int, rhs: Float64[Tensor, " d"]) -> Float64[Tensor, " d"]:
        V, dtype = self.covariance(unit), self.origin.dtype
        squares = V.diagonal() + self.mean_about[unit] ** 2  # as before the mean was subtracted
        least = rounding(torch.float64) * squares
        if not self.ridge[unit]:
            cases = int(self.cases.support[unit])
            noise = rounding(dtype, roundings(cases, cases))
            least = least_pivots(squares, self.mu_q[unit], torch.finfo(dtype).eps, noise)
        L, regular = factored(V.unsqueeze(0), least.unsqueeze(0))
        if not regular:
            raise SingularFisherError(unit)
        return substituted(L[0], rhs.unsqueeze(1)).squeeze(1)

    def _about(self, x: Float64[Tensor, "g d"]) -> Float64[Tensor, "u d"]:
        """E_q(a - origin) - x."""
        return (self._grouped(self.mean_about) - x.unsqueeze(1)).flatten(0, 1)

    def _grouped(self, x: Tensor) -> Tensor:
        grouped: Tensor = x.unflatten(0, (len(self.origin), -1))
        return grouped
