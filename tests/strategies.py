"""Hypothesis strategies for unit moments: sizes, scales and a seed are drawn, tensors follow."""

import os
from typing import NamedTuple

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Generator, Tensor

TOL = {"rtol": 1e-6, "atol": 1e-7}
EXACTLY = {"rtol": 0, "atol": 0}
SINGLE = {"rtol": 1e-4, "atol": 1e-5}  # two routes through a network in single precision
SHARINGS = ["expand", "joint", "reduce"]
CHECKED = 4  # examples of a law, the first of them as small as can be: their shapes are checked

settings.register_profile("dev", max_examples=15, deadline=None)
settings.register_profile("ci", max_examples=100, derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if "CI" in os.environ else "dev"))


class Batch(NamedTuple):
    """Cases of one layer, and a gradient for each of its units."""

    a: Tensor  # (n, d)
    D: Tensor  # (n, u), about a fifth of it zero
    g: Tensor  # (u, d)
    g0: Tensor  # (u,)


class Rows(NamedTuple):
    """Gradients G = Σ_t δ_t a_t and S = Σ_t δ_t of positions that share one weight."""

    G: Tensor  # (r, u, d)
    S: Tensor  # (r, u), signed, about a fifth of it zero
    mean: Tensor  # (d,)
    samples: int
    g: Tensor  # (u, d)
    g0: Tensor  # (u,)


class Problem(NamedTuple):
    """Activations and errors before a sharing has been chosen, and what the laws quantify over."""

    a: Tensor  # (n, t, d)
    delta: Tensor  # (n, y, t, u): √p(y) ∂ ln p(y) / ∂ preactivation
    g: Tensor  # (u, d)
    g0: Tensor  # (u,)
    x: Tensor  # (d,), any point of the space of activations
    M: Tensor  # (d, d), well-conditioned
    t: Tensor  # (d,)


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


all_sharings = pytest.mark.parametrize("sharing", SHARINGS)
any_sharing = st.sampled_from(SHARINGS)
seeds = st.integers(0, 2**32 - 1).map(seeded)
widths = st.integers(1, 5)
units = st.integers(1, 3)
means = st.floats(-4, 4)
spreads = st.floats(0.5, 2)


@st.composite
def batches(draw) -> Batch:
    generator, d, u = draw(seeds), draw(widths), draw(units)
    n = draw(st.integers(3 * (d + 1), 5 * (d + 1)))
    a = activations(generator, (n, d), draw(means), draw(spreads))
    D = normal(generator, n, u) ** 2 * mostly_ones(generator, n, u)
    return Batch(a, D, normal(generator, u, d), normal(generator, u))


@st.composite
def uncorrelated_batches(draw) -> Batch:
    """Draw one unit whose D has no covariance with a: residuals of a regression on (1, a)."""
    batch = draw(batches())
    ones = torch.ones(len(batch.a), 1, dtype=torch.float64)
    regressors = torch.cat([batch.a, ones], dim=1)
    D = batch.D[:, :1]
    residual = D - regressors @ torch.linalg.lstsq(regressors, D).solution
    D = residual - residual.min() + 0.1
    return Batch(batch.a, D, batch.g[:1], batch.g0[:1])


@st.composite
def rows(draw) -> Rows:
    generator, d, u = draw(seeds), draw(widths), draw(units)
    samples, labels, positions = draw(st.integers(2 * (d + 1), 4 * (d + 1))), 2, 3
    a = activations(generator, (samples, positions, d), draw(means), draw(spreads))
    delta = normal(generator, samples, labels, positions, u)
    opposed = 1 - mostly_ones(generator, samples * labels, u).reshape(samples, labels, 1, u)
    delta = delta - opposed * delta.mean(2, keepdim=True)  # a fifth of the sums is zero
    G = torch.einsum("nytu,ntd->nyud", delta, a).flatten(0, 1)
    S = delta.sum(2).flatten(0, 1)
    g, g0 = normal(generator, u, d), normal(generator, u)
    return Rows(G, S, a.flatten(0, 1).mean(0), samples, g, g0)


@st.composite
def problems(draw, positions: int | None = None) -> Problem:
    generator, d, u = draw(seeds), draw(widths), draw(units)
    n, labels = draw(st.integers(3 * (d + 1), 5 * (d + 1))), 2
    positions = positions or draw(st.integers(1, 3))
    a = activations(generator, (n, positions, d), draw(means), draw(spreads))
    silent = mostly_ones(generator, n, u).reshape(n, 1, 1, u)
    delta = normal(generator, n, labels, positions, u) * silent
    g, g0, x, t = (normal(generator, *size) for size in [(u, d), (u,), (d,), (d,)])
    stretch = torch.diag(0.5 + torch.rand(d, generator=generator, dtype=torch.float64))
    M = orthogonal(generator, d) @ stretch @ orthogonal(generator, d)
    return Problem(a, delta, g, g0, x, M, t)


def normal(generator: Generator, *size: int) -> Tensor:
    return torch.randn(size, generator=generator, dtype=torch.float64)


def activations(generator: Generator, size: tuple[int, ...], mean: float, spread: float) -> Tensor:
    direction = normal(generator, size[-1])
    return mean * direction + spread * normal(generator, *size)


def mostly_ones(generator: Generator, n: int, u: int) -> Tensor:
    """Return n × u ones with a fifth of each column, and never more, set to zero."""
    order = torch.rand(n, u, generator=generator, dtype=torch.float64).argsort(0)
    return (order >= n // 5).double()


def orthogonal(generator: Generator, d: int) -> Tensor:
    return torch.linalg.qr(normal(generator, d, d)).Q
