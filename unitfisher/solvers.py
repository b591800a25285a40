"""Batched symmetric positive definite systems, one per unit.

Only Cholesky and triangular solves: batched LU on CPU (torch 2.13 and 2.15, two threads, from
256×256) raises or is silently wrong.
"""

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
        """Say the same of a Monitor's layer, by the unit's number there."""
        return SingularFisherError(
            unit, f" in layer {layer!r}", "damp it: Monitor(..., damping=1e-3)"
        )


def cholesky(matrix: Float[Tensor, "u m m"]) -> Float[Tensor, "u m m"]:
    """Factor one symmetric positive definite matrix per unit.

    Raises:
        SingularFisherError: A matrix is not positive definite; names the first such unit.
    """
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    pivots, diagonal = (x.diagonal(dim1=-2, dim2=-1) for x in (factor, matrix))
    noise = 64 * torch.finfo(matrix.dtype).eps  # a pivot that rounding has made of zero
    require_regular((info == 0) & (pivots**2 > noise * diagonal).all(-1))
    return factor


def require_regular(regular: Bool[Tensor, " u"]) -> None:
    """Raise SingularFisherError for the first unit that is not."""
    if not bool(regular.all()):
        raise SingularFisherError(int((~regular).nonzero()[0]))


def cholesky_solve(
    factor: Float[Tensor, "u m m"], rhs: Float[Tensor, "u m"]
) -> Float[Tensor, "u m"]:
    """Solve with a factor from `cholesky`."""
    y = torch.linalg.solve_triangular(factor, rhs.unsqueeze(-1), upper=False)
    x: Tensor = torch.linalg.solve_triangular(factor.mT, y, upper=True)
    return x.squeeze(-1)


def solve(matrix: Float[Tensor, "u m m"], rhs: Float[Tensor, "u m"]) -> Float[Tensor, "u m"]:
    return cholesky_solve(cholesky(matrix), rhs)


def dot(x: Float[Tensor, "*u d"], y: Float[Tensor, "*v d"]) -> Float[Tensor, "*w"]:
    return (x * y).sum(-1)


def outer(x: Float[Tensor, "u d"], y: Float[Tensor, "u d"]) -> Float[Tensor, "u d d"]:
    return x.unsqueeze(-1) * y.unsqueeze(-2)
