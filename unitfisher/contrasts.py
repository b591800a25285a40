"""A root of the softmax Fisher from contrasts: each class against the mean of the later ones.

Tanabe and Sagae (1992), equation 4, as `likelihoods.Categorical` uses it.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def contrasts(pi: Float[Tensor, "n t y"]) -> tuple[Float[Tensor, "n t r"], Float[Tensor, "n t r"]]:
    """Return √(π_j r_j / (π_j + r_j)) and r_j, the mass after j, for all classes but the last.

    Tails are sums of positive numbers: a saturated softmax keeps its digits.
    """
    tail = pi.flip(-1).cumsum(-1).flip(-1)
    root = tail.sqrt()
    scale = pi[..., :-1].sqrt() * root[..., 1:] / positive(root[..., :-1])
    return scale, positive(tail[..., 1:])  # s and r


def signed_contrasts(
    pi: Float[Tensor, "n t y"], signs: Float[Tensor, "r n t"]
) -> Float[Tensor, "n t y"]:
    """Return Σ_j ε_j column_j by prefix sums; entry i is ε_i s_i - π_i Σ_{j<i} ε_j s_j / r_j."""
    scale, rest = contrasts(pi)
    signed = scale * signs.movedim(0, -1)
    earlier = (signed / rest).cumsum(-1)
    return F.pad(signed, (0, 1)) - pi * F.pad(earlier, (1, 0))


def most_probable(
    z: Float[Tensor, "n t y"],
) -> tuple[Float[Tensor, "n t y"], Bool[Tensor, "n t y"]]:
    """Return the probabilities, and a mask of the largest; of several that tie, one is chosen."""
    pi = z.double().softmax(-1)
    classes = torch.arange(z.shape[-1], device=z.device)
    return pi, classes == pi.argmax(-1, keepdim=True)


def positive(x: Tensor) -> Tensor:
    return x.clamp_min(torch.finfo(x.dtype).tiny)
