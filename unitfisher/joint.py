"""Gradients of cases with several positions, summed over positions before they are squared."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unitfisher.cases import UnitCases
from unitfisher.patches import in_pieces
from unitfisher.solvers import squared


class JointGradients(NamedTuple):
    """A gradient for each case and column, summed over positions."""

    weights: Float[Tensor, "r u d"]  # Σ_t δ (a - origin)
    bias: Float[Tensor, "r u"]  # Σ_t δ
    trace_Daa: Float[Tensor, " u"]  # Σ ‖Σ_t δ a‖², see `moments.trace_Daa`

    @classmethod
    def of(cls, cases: UnitCases, origin: Float[Tensor, "*g d"]) -> "JointGradients":
        """Sum δ (a - origin) over the positions of each case and column.

        Products are formed in the precision of the activations, about a point near their mean, and
        then moved to ``origin`` in double.
        """
        groups, (columns, count, _, units) = cases.groups, cases.delta.shape
        delta = cases.delta.to(cases.received.dtype).unflatten(-1, (groups, -1))
        delta = delta.permute(1, 3, 0, 4, 2)  # n g r v t
        shape = columns, count, groups, units // groups, cases.inputs
        G = cases.delta.new_empty(shape, dtype=torch.float64)
        for piece, a in in_pieces(cases.for_one_pass):
            about = (a - cases.origin[:, None, None]).transpose(0, 1)  # m g t d
            product = delta[piece].flatten(2, 3) @ about  # (m g rv t) @ (m g t d)
            G[:, piece] = product.unflatten(2, (columns, -1)).movedim(2, 0)
        G, S = G.flatten(2, 3).flatten(0, 1), cases.joint_errors.flatten(0, 1)
        G.addcmul_(S.unsqueeze(-1), origin - cases.rounded_mean, value=-1)
        return cls(G, S, _fed(G, S, origin, torch.finfo(cases.received.dtype).eps))


def _fed(
    G: Float[Tensor, "r u d"], S: Float[Tensor, "r u"], origin: Float[Tensor, "*g d"], eps: float
) -> Float[Tensor, " u"]:
    """Σ ‖Σ_t δ a‖² from gradients about an origin; 0 where it is no more than rounding."""
    along = torch.einsum("rud,ud->ru", G, origin.expand(G.shape[1:]))
    constant = S**2 * squared(origin)
    total = (squared(G) + 2 * S * along + constant).sum(0)
    left = max((64 * eps) ** 2, 64 * torch.finfo(G.dtype).eps) * constant.sum(0)
    return torch.where(total > left, total, 0.0)
