"""The quantities that carry the paper's claim, for all units at once.

Mean share and the gradient's bias-shift share do not depend on damping. The cosine and the natural
gradient's bias-shift share do: read them beside the damping share and n_eff.
"""

from jaxtyping import Float
from torch import Tensor


def mean_share(
    mean_squared: Float[Tensor, "*u"], trace_variance: Float[Tensor, "*u"]
) -> Float[Tensor, "*u"]:
    """‖mean‖² / (‖mean‖² + trace of the variance): the mean's share of the second moment."""
    return mean_squared / (mean_squared + trace_variance)


def cosine(
    vw: Float[Tensor, " u"], vv: Float[Tensor, " u"], ww: Float[Tensor, " u"]
) -> Float[Tensor, " u"]:
    """vᵀw / (‖v‖ ‖w‖) from the three products, NaN where v or w is zero.

    With v = (ν; 1), ν = E_p(a), and w an update of weights and bias, its absolute value is the
    bias-shift share |νᵀΔw + Δw₀| / (‖(ν; 1)‖ ‖(Δw; Δw₀)‖), the part that only shifts E_p[net].
    """
    return vw / (vv * ww).sqrt()
