"""Batched symmetric positive definite systems, one per unit.

Only Cholesky and triangular solves: batched LU on CPU (torch 2.13 and 2.15, two threads, from
256×256) raises or is silently wrong.
"""

from math import sqrt
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class SingularFisherError(ValueError):
    """The Fisher matrix of some unit has no inverse."""

    def __init__(
        self, unit: int, where: str = "", advice: str = "damp it: moments.damped(1e-3)"
    ) -> None:
        self.unit = unit
        super().__init__(
            f"the Fisher of unit {unit}{where} is singular; observe more samples, or {advice}"
        )

    def of_layer(self, layer: str, unit: int) -> "SingularFisherError":
        """Return the same error for a unit of a Monitor's layer."""
        return SingularFisherError(
            unit, f" in layer {layer!r}", "damp it: Monitor(..., damping=1e-3)"
        )


class Factored(NamedTuple):
    """Cholesky factors, and which units' matrices have an inverse."""

    L: Float[Tensor, "u m m"]
    regular: Bool[Tensor, " u"]


def factored(matrix: Float[Tensor, "u m m"], least: Float[Tensor, "u m"]) -> Factored:
    """Factor one symmetric positive definite matrix per unit.

    A matrix is regular if every squared pivot is more than ``least``, usually `rounding` times the
    diagonal entry: a smaller one may be a zero with rounding errors.
    """
    L, info = torch.linalg.cholesky_ex(matrix)
    pivots = L.diagonal(dim1=-2, dim2=-1)
    return Factored(L, (info == 0) & (pivots**2 > least).all(-1))


def rounding(dtype: torch.dtype, most: float = 64.0) -> float:
    """Return ``most`` rounding errors of this precision, relative to a number."""
    eps: float = torch.finfo(dtype).eps
    return most * eps


def roundings(cases: int, together: int) -> float:
    """Bound the error of a sum over cases, in rounding errors of one term.

    Blocks of ``together`` cases are added in working precision, and the blocks exactly. Within a
    block the error grows as √together; over blocks errors average out.
    """
    return 2 * max(1.0, min(together, cases) / sqrt(max(1, cases)))


def require_regular(regular: Bool[Tensor, " u"]) -> None:
    """Raise SingularFisherError for the first unit that is not regular."""
    if not bool(regular.all()):
        raise SingularFisherError(int((~regular).nonzero()[0]))


def substituted(
    L: Float[Tensor, "*u m m"], rhs: Float[Tensor, "*u m r"]
) -> Float[Tensor, "*u m r"]:
    """Return (L Lᵀ)⁻¹ rhs."""
    y = torch.linalg.solve_triangular(L, rhs, upper=False)
    x: Tensor = torch.linalg.solve_triangular(L.mT, y, upper=True)
    return x


def solve(matrix: Float[Tensor, "u m m"], rhs: Float[Tensor, "u m"]) -> Float[Tensor, "u m"]:
    """Solve for one right-hand side per unit.

    Raises:
        SingularFisherError: A matrix is not positive definite; names the first such unit.
    """
    L, regular = factored(matrix, rounding(matrix.dtype) * matrix.diagonal(dim1=-2, dim2=-1))
    require_regular(regular)
    return substituted(L, rhs.unsqueeze(-1)).squeeze(-1)


def dot(x: Float[Tensor, "*u d"], y: Float[Tensor, "*v d"]) -> Float[Tensor, "*w"]:
    return (x * y).sum(-1)


def squared(x: Float[Tensor, "*u d"]) -> Float[Tensor, "*u"]:
    """‖x‖², without a copy of x; its second derivative at zero is NaN, where that of `dot` is 2."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return norm**2


def outer(x: Float[Tensor, "u d"], y: Float[Tensor, "u d"]) -> Float[Tensor, "u d d"]:
    return x.unsqueeze(-1) * y.unsqueeze(-2)
