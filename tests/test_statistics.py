"""A layer's statistics against the same numbers in numpy, from the reference's Fisher."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import TOL, normal, seeds
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import unitfisher.cases
from unitfisher import Gaussian, Monitor, SingularFisherError, UnitStatistics

SHARINGS = ["expand", "joint", "reduce"]
all_sharings = pytest.mark.parametrize("sharing", SHARINGS)


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.double().parameters():
        fan_in = max(parameter.shape[1:], default=1)
        parameter.data = normal(generator, *parameter.shape) / fan_in**0.5
    return model


def inputs(*size: int, seed: int = 1) -> Tensor:
    """With a mean of its own for every feature, and different spreads."""
    generator = torch.Generator().manual_seed(seed)
    mean, spread = normal(generator, *size[1:]), 0.5 + normal(generator, *size[1:]).abs()
    return mean + spread * normal(generator, *size)


def measure(model: nn.Module, x: Tensor, y: Tensor | None = None, **options) -> dict:
    with Monitor(model, **options) as monitor:
        return monitor.measure(x, targets=y)


class Means(nn.Module):
    """The mean over all positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, -2).mean(1)


def mlp(d: int, *, bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(d, 4, bias=bias), nn.ELU(), nn.Linear(4, 3))


def sequence(*, bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh(), Means(), nn.Linear(4, 3))


def convolution(groups: int = 1, *, bias: bool = True) -> nn.Module:
    layer = nn.Conv2d(2, 4, 2, groups=groups, bias=bias)
    return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))


class Setting(NamedTuple):
    model: nn.Module
    x: Tensor
    damping: float = 1e-3


SETTINGS = {
    "more-cases-than-inputs": Setting(mlp(3), inputs(12, 3)),
    "no-damping": Setting(mlp(3), inputs(12, 3), damping=0.0),
    "fewer-cases-than-inputs": Setting(mlp(6), inputs(4, 6), damping=1e-2),
    "as-many-cases-as-inputs": Setting(mlp(4), inputs(4, 4), damping=1e-2),
    "one-case": Setting(mlp(3), inputs(1, 3), damping=1e-2),
    "no-bias": Setting(mlp(3, bias=False), inputs(12, 3)),
    "no-bias-fewer-cases": Setting(mlp(6, bias=False), inputs(4, 6), damping=1e-2),
    "sequence": Setting(sequence(), inputs(8, 4, 3)),
    "sequence-no-bias": Setting(sequence(bias=False), inputs(8, 4, 3)),
    "convolution": Setting(convolution(), inputs(6, 2, 3, 3)),
    "convolution-fewer-cases": Setting(convolution(), inputs(1, 2, 3, 3), damping=1e-2),
    "groups": Setting(convolution(groups=2), inputs(8, 2, 3, 3)),
    "groups-no-bias": Setting(convolution(groups=2, bias=False), inputs(8, 2, 3, 3)),
    "groups-fewer-cases": Setting(convolution(groups=2), inputs(1, 2, 3, 3), damping=1e-2),
}
for found in SETTINGS.values():
    filled(found.model)
each_setting = pytest.mark.parametrize(("model", "x", "damping"), SETTINGS.values(), ids=SETTINGS)


class Expected(NamedTuple):
    """What the reference says of the first layer."""

    F: np.ndarray  # (u, d+1, d+1), damped
    undamped: np.ndarray
    ridge: np.ndarray  # (u,)
    a: list[np.ndarray]  # (n, d) of every unit
    D: np.ndarray  # (n, u)


def expected_of(model: nn.Module, x: Tensor, damping: float, sharing: str) -> Expected:
    model = copy.deepcopy(model)
    if model[0].bias is None:  # its Fisher beside that of the bias it does not have
        model[0].bias = nn.Parameter(torch.zeros(len(model[0].weight)).double())
    F = reference.unit_fisher(model, "0", x, sharing=sharing).numpy()
    kind = "reduce" if sharing == "joint" else sharing
    a, D = (part.numpy() for part in reference.cases(model, "0", x, sharing=kind))
    units, d = len(F), F.shape[1] - 1
    a = [a if a.ndim == 2 else a[i * len(a) // units] for i in range(units)]
    ridge = damping * np.trace(F[:, :-1, :-1], axis1=1, axis2=2) / d
    block = np.diag([1.0] * d + [0.0])
    return Expected(F + ridge[:, None, None] * block, F, ridge, a, D)


def assert_equal_to(found: Tensor, expected: np.ndarray | list) -> None:
    assert_close(found, torch.as_tensor(np.asarray(expected)), **TOL)


# The theorems' quantities


@all_sharings
@each_setting
def test_theorem_quantities_are_those_of_the_damped_reference_fisher(model, x, damping, sharing):
    found = measure(model, x, damping=damping, sharing=sharing)["0"]
    expected = expected_of(model, x, damping, sharing)
    means = [a.mean(0) for a in expected.a]
    units = [reference.quantities(*pair) for pair in zip(expected.F, means, strict=True)]
    assert_equal_to(found.mean.expand(len(means), -1), means)
    assert_equal_to(found.mean_q, [q["mu_q"] for q in units])
    for name in ("c", "s", "k", "corrected_mean"):
        assert_equal_to(getattr(found, name), [q[name] for q in units])
    assert not found.dead.any()


@all_sharings
@each_setting
def test_natural_gradient_solves_the_damped_reference_fisher(model, x, damping, sharing):
    found = measure(model, x, damping=damping, sharing=sharing)["0"]
    F = expected_of(model, x, damping, sharing).F
    generator = torch.Generator().manual_seed(2)
    weight, bias = model[0].weight, model[0].bias
    g = normal(generator, *weight.shape)
    g0 = None if bias is None else normal(generator, *bias.shape)
    dw, dw0 = found.natural_gradient(g, g0)
    assert dw.shape == weight.shape
    if g0 is None:
        solved = [np.linalg.solve(block, row) for block, row in zip(F[:, :-1, :-1], g, strict=True)]
        assert dw0 is None
    else:
        rows = zip(F, g.flatten(1), g0, strict=True)
        solved, solved0 = zip(*(reference.natural_gradient(*row) for row in rows), strict=True)
        assert_equal_to(dw0, solved0)
    assert_equal_to(dw.flatten(1), solved)
