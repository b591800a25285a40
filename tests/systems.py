"""Systems that share a Gram matrix, for what solves them by factors or by iterations."""

import pytest
import torch
from hypothesis import strategies as st
from strategies import mostly_ones, normal, seeds
from torch import Tensor

from unitfisher import gram
from unitfisher.gram import System, solve_grams

U, N = 6, 40


@st.composite
def systems(
    draw, shares: tuple[float, ...] = (1e-8, 1e-4, 1.0), scales: tuple[float, ...] = (1.0,)
) -> System:
    """Weights of heavy tails, a fifth of them zero; duplicates; ε as shares of what is largest."""
    generator, groups = draw(seeds), draw(st.sampled_from([1, 2, 3]))
    a = normal(generator, groups, N, draw(st.sampled_from([3, N, 4 * N])))
    a[:, 7] = a[:, 3]
    a[:, 11] = 0
    a *= draw(st.sampled_from(scales))
    v = (normal(generator, N, U) ** 3 * mostly_ones(generator, N, U)).T.contiguous()
    K = a @ a.mT
    largest = torch.linalg.eigvalsh(K).amax() * (v**2).amax(1)
    epsilon = largest * draw(st.sampled_from(shares))
    return System(K, v, epsilon, normal(generator, U, 3, N), *2 * [torch.zeros_like(v)])


def benign(condition: float = 1e3) -> System:
    generator = torch.Generator().manual_seed(3)
    a = normal(generator, 1, N, N // 2)
    v = 1 + torch.rand(U, N, generator=generator, dtype=torch.float64)
    K = a @ a.mT
    epsilon = torch.linalg.eigvalsh(K).amax().expand(U) / condition
    return System(K, v, epsilon.contiguous(), normal(generator, U, 2, N), 0 * v, 0 * v)


def factored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The units of each call, from now on, that asks for factors in double precision."""
    taken: list[int] = []

    def counted(K: Tensor, v: Tensor, epsilon: Tensor, rhs: Tensor) -> gram.GramSolution:
        taken.append(len(v))
        return solve_grams(K, v, epsilon, rhs)

    monkeypatch.setattr(gram, "solve_grams", counted)
    return taken
