"""A problem under a sharing, damped or not: its moments, and the Fishers they must stand for."""

import torch
from hypothesis import strategies as st
from reference import with_ones
from strategies import TOL, Problem
from torch import Tensor
from torch.testing import assert_close

from unitfisher import UnitMoments, bias_shift_correction, unit_natural_gradient

DAMPING = 1e-2
case_sharing = st.sampled_from(["expand", "reduce"])
any_block = st.sampled_from([None, "weight", "full"])
weight_block = st.sampled_from([None, "weight"])


def cases(p: Problem, sharing: str) -> tuple[Tensor, Tensor]:
    if sharing == "reduce":
        return p.a.mean(1), (p.delta.sum(2) ** 2).sum(1)
    return p.a.flatten(0, 1), (p.delta**2).sum(1).flatten(0, 1)


def gradients(p: Problem, sharing: str) -> Tensor:
    """Rows (r, u, d+1) with F = Σ row rowᵀ / samples."""
    if sharing == "joint":
        return torch.einsum("nytu,ntd->nyud", p.delta, with_ones(p.a)).flatten(0, 1)
    a, D = cases(p, sharing)
    return D.sqrt()[:, :, None] * with_ones(a)[:, None, :]


def moments(p: Problem, sharing: str, origin: Tensor | None = None) -> UnitMoments:
    if sharing == "joint":
        G, mean = gradients(p, sharing), p.a.flatten(0, 1).mean(0)
        return UnitMoments.of_gradients(
            G[..., :-1], G[..., -1], mean, origin=origin, samples=len(p.a)
        )
    return UnitMoments.of(*cases(p, sharing), origin=origin, samples=len(p.a))


def ridge(p: Problem, sharing: str) -> Tensor:
    G = gradients(p, sharing)[..., :-1]
    return DAMPING * (G**2).sum((0, 2)) / len(p.a) / G.shape[-1]


def damped(p: Problem, sharing: str, block: str | None) -> tuple[UnitMoments, Tensor]:
    """Moments under test, and the Fisher matrices they must stand for."""
    G, m = gradients(p, sharing), moments(p, sharing)
    F = torch.einsum("rud,rue->ude", G, G) / len(p.a)
    if block is None:
        return m, F
    diagonal = torch.ones(F.shape[-1], dtype=F.dtype)
    diagonal[-1] = block == "full"
    F = F + ridge(p, sharing)[:, None, None] * torch.diag(diagonal)
    return m.damped(DAMPING, block=block), F


def everything(m: UnitMoments, g: Tensor, g0: Tensor) -> list[Tensor]:
    return [*bias_shift_correction(m), *unit_natural_gradient(m, g, g0)]


def assert_same(m: UnitMoments, other: UnitMoments) -> None:
    for name in ("c", "mu_p", "mu_q", "mean_shift", "b", "A", "Var_q", "n_eff", "alive", "ridge"):
        assert_close(getattr(m, name), getattr(other, name), **TOL, msg=lambda s, n=name: n + s)
