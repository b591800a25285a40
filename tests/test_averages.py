"""Mean and variance of units over cases, compiled and in torch, against a plain sum in double."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routes import needs_compiler, per_route
from strategies import normal, seeds
from torch import Tensor
from torch.testing import assert_close

from unitfisher import native
from unitfisher.averages import averages

by_each_route = per_route(averages)
ORDERS = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0)]  # how (n, t, u) may lie in memory


@st.composite
def outputs(draw) -> Tensor:
    """Some cases of units, side by side in memory or not, that fill vectors or do not."""
    shape = [draw(st.sampled_from([1, 2, 7, 40])), draw(st.sampled_from([1, 3, 16, 33]))]
    shape.append(draw(st.sampled_from([1, 4, 8, 15, 16, 17, 40])))
    order = draw(st.sampled_from(ORDERS))
    y = normal(draw(seeds), *(shape[axis] for axis in order)).float()
    part = y[:, :, :: draw(st.sampled_from([1, 2]))]
    return grouped(part.permute(*(order.index(axis) for axis in range(3))))


def grouped(y: Tensor) -> Tensor:
    """Two groups that differ."""
    return torch.stack([y, 3 * y - 1]) if y.is_contiguous() else y.unsqueeze(0)


@by_each_route
@given(y=outputs())
def test_every_unit_gets_its_own_mean_and_variance(route, y):
    mean, var = route(y)
    assert mean.dtype == var.dtype == torch.float64
    assert_close(mean, y.double().mean((1, 2)), rtol=1e-5, atol=1e-6)
    assert_close(var, y.double().var((1, 2), correction=0), rtol=1e-5, atol=1e-6)


@by_each_route
@pytest.mark.parametrize("units", [1, 16, 20])
def test_a_large_mean_costs_no_digits(route, units):
    y = (1e4 + normal(torch.Generator(), 1, 64, 9, units)).float()
    _, var = route(y)
    assert_close(var, y.double().var((1, 2), correction=0), rtol=1e-3, atol=0.0)


@by_each_route
def test_a_constant_has_no_variance(route):
    mean, var = route(torch.full((1, 50, 3, 20), 0.1))
    assert_close(mean, torch.full((1, 20), 0.1, dtype=torch.float64), rtol=1e-6, atol=0.0)
    assert (var >= 0).all()
    assert (var < 1e-12).all()


@by_each_route
def test_nan_stays_with_its_unit(route):
    y = normal(torch.Generator(), 1, 8, 3, 17).float()
    y[0, 5, 1, 2] = torch.nan
    for found in route(y):
        assert found.isnan().nonzero().tolist() == [[0, 2]]


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 40, 1, 100), (2, 40, 30, 5)])
def test_threads_change_no_bit(monkeypatch, shape):
    monkeypatch.setattr(native, "FLOP_PER_THREAD", 1)
    y, found = normal(torch.Generator(), *shape).float(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(torch.stack(averages(y)))
    torch.set_num_threads(1)
    assert torch.equal(*found)


@by_each_route
def test_double_and_half_precision_are_averaged_too(route):
    y = normal(torch.Generator(), 1, 30, 2, 9)
    assert_close(route(y)[1], y.var((1, 2), correction=0), rtol=1e-12, atol=0.0)
    half = y.bfloat16()
    assert_close(route(half)[0], half.double().mean((1, 2)), rtol=1e-4, atol=1e-5)
