"""Conjugate gradients for all units of a layer at once, preconditioned by their mean system.

In coordinates whitened by the mean over units, the systems L⁻¹ Var_q L⁻ᵀ are near the identity:
iterations only have to resolve how a unit's own weights differ from the mean.
"""

from collections.abc import Callable, Generator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from unitfisher.solvers import dot
from unitfisher.weighted import CaseProducts


class Whitened(NamedTuple):
    """Coordinates ã = L⁻¹ (a - origin), in which Σ q̄ ã ãᵀ + ε̄ L⁻¹ L⁻ᵀ = I for mean weights q̄."""

    L: Float64[Tensor, "g d d"]
    mean_q: Float64[Tensor, "g v d"]  # E_q(ã)
    epsilon: Float64[Tensor, "g v 1"]
    ridge: Float[Tensor, "g d d"]  # L⁻¹ L⁻ᵀ, in the precision of the cases
    busy: Bool[Tensor, "g v 1"]  # units for which there is something to solve
    cases: CaseProducts

    def scaled(
        self, rhs: Float[Tensor, "u d"]
    ) -> tuple[Float64[Tensor, "g v d"], Float64[Tensor, "g v 1"]]:
        """Whiten right-hand sides and divide them by their norms; 0 for units that are not busy."""
        b = rhs.double().unflatten(0, self.busy.shape[:2]).mT
        b = torch.linalg.solve_triangular(self.L, b, upper=False).mT
        size = torch.linalg.vector_norm(b, dim=-1, keepdim=True)
        busy = self.busy & (size > 0)
        size = torch.where(busy, size, 1.0)
        return b / size * busy, size

    def completed(
        self, product: Float64[Tensor, "g v d"], y: Float64[Tensor, "g v d"]
    ) -> Float64[Tensor, "g v d"]:
        """Return L⁻¹ Var_q L⁻ᵀ y from Σ q ã ãᵀ y, in place."""
        product.addcmul_(self.mean_q, dot(self.mean_q, y).unsqueeze(-1), value=-1)
        ridge = (y.to(self.ridge.dtype) @ self.ridge).double()
        return product.addcmul_(self.epsilon, ridge)

    def back(self, y: Float64[Tensor, "g v d"]) -> Float64[Tensor, "u d"]:
        """Return L⁻ᵀ y."""
        x: Tensor = torch.linalg.solve_triangular(self.L.mT, y.mT, upper=True)
        return x.mT.flatten(0, 1)


def conjugate_gradients(
    r: Float64[Tensor, "g v d"],
    completed: Callable[[Tensor, Tensor], Tensor],
    *,
    enough: float,
    most: int,
) -> Generator[Tensor, Tensor, Tensor]:
    """Yield vectors, be sent their products, and return the solutions of all systems.

    Args:
        r: Right-hand sides of norm 1 or 0; overwritten by the residuals.
        completed: Turns the product of a vector, and the vector, into the product of the system.
        enough: Norm of the residual at which a system stops.
        most: The largest number of iterations.
    """
    y, p, rr, least = torch.zeros_like(r), r.clone(), r.square().sum(-1, keepdim=True), enough**2
    for _ in range(most):
        if bool((rr <= least).all()):
            break
        Ap = completed((yield p), p)
        curvature = dot(p, Ap).unsqueeze(-1)
        still = (rr > least) & (curvature > 0)
        step = torch.where(still, rr / torch.where(still, curvature, 1.0), 0.0)
        y.addcmul_(step, p)
        r.addcmul_(step, Ap, value=-1)
        new = r.square().sum(-1, keepdim=True)
        p.mul_(torch.where(still, new / torch.where(rr > 0, rr, 1.0), 1.0))
        p.addcmul_(still.double(), r)
        rr = torch.where(still, new, rr)
    return y
