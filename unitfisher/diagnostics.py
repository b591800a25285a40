"""The quantities that carry the paper's claim, for all units at once.

Mean share and the gradient's bias-shift share have no damping in them; the cosine and the natural
gradient's share do, and belong beside the damping share and n_eff.
"""

from jaxtyping import Float
from torch import Tensor

from unitfisher.solvers import dot


def mean_share(
    mean: Float[Tensor, "*u d"], trace_variance: Float[Tensor, "*u"]
) -> Float[Tensor, "*u"]:
    """‖mean‖² / (‖mean‖² + trace of the variance): how much of the second moment is the mean."""
    squared = dot(mean, mean)
    return squared / (squared + trace_variance)


def cosine(
    v: Float[Tensor, "*u d"],
    w: Float[Tensor, "*v d"],
    v0: Tensor | None = None,
    w0: Tensor | None = None,
) -> Float[Tensor, "*w"]:
    """vᵀw / (‖v‖ ‖w‖), NaN where one of them is zero; v0 and w0 are the bias coordinates."""
    vw, vv, ww = dot(v, w), dot(v, v), dot(w, w)
    if v0 is not None and w0 is not None:
        vw, vv, ww = vw + v0 * w0, vv + v0**2, ww + w0**2
    return vw / (vv * ww).sqrt()


def bias_shift_share(
    mean: Float[Tensor, "*g d"], v: Float[Tensor, "u d"], v0: Float[Tensor, " u"] | None
) -> Float[Tensor, " u"]:
    """|νᵀv + v0| / (‖(ν; 1)‖ ‖(v; v0)‖): the part of an update that moves E_p[net] only.

    Without a bias (v0 None): |νᵀv| / (‖ν‖ ‖v‖).
    """
    one = None if v0 is None else v0.new_ones(())
    return cosine(mean, v, one, v0).abs()
