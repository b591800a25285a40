"""The quantities that carry the paper's claim, for all units at once.

Mean share and the gradient's bias-shift share have no damping in them; the cosine and the natural
gradient's share do, and belong beside the damping share and n_eff.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from unitfisher.solvers import dot


def mean_share(
    mean: Float[Tensor, "*u d"], trace_variance: Float[Tensor, "*u"]
) -> Float[Tensor, "*u"]:
    """‖mean‖² / (‖mean‖² + trace of the variance): how much of the second moment is the mean."""
    squared = dot(mean, mean)
    return squared / (squared + trace_variance)


def with_bias(w: Float[Tensor, "*u d"], w0: Float[Tensor, "*v"]) -> Float[Tensor, "*u e"]:
    """Append the bias coordinate."""
    return torch.cat([w, w0.expand(w.shape[:-1]).unsqueeze(-1)], -1)


def cosine(v: Float[Tensor, "*u d"], w: Float[Tensor, "*v d"]) -> Float[Tensor, "*w"]:
    """vᵀw / (‖v‖ ‖w‖), NaN where one of them is zero."""
    return dot(v, w) / (dot(v, v) * dot(w, w)).sqrt()


def bias_shift_share(
    mean: Float[Tensor, "*g d"], v: Float[Tensor, "u d"], v0: Float[Tensor, " u"] | None
) -> Float[Tensor, " u"]:
    """|νᵀv + v0| / (‖(ν; 1)‖ ‖(v; v0)‖): the part of an update that moves E_p[net] only.

    Without a bias (v0 None): |νᵀv| / (‖ν‖ ‖v‖).
    """
    if v0 is None:
        return cosine(mean, v).abs()
    return cosine(with_bias(mean, v0.new_ones(())), with_bias(v, v0)).abs()
