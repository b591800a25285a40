"""Layers measured together say what each says alone."""

from dataclasses import fields
from itertools import pairwise

import pytest
import torch
from reference import joined
from torch import Tensor, nn
from torch.testing import assert_close

import unitfisher.blocks
from unitfisher import Monitor
from unitfisher.blocks import Block
from unitfisher.cases import UnitCases
from unitfisher.condensed import Condensed
from unitfisher.memory import within
from unitfisher.solvers import SingularFisherError
from unitfisher.theory import theory

ALIKE = [4, 5, 5, 5, 5, 3]  # inputs and units: three layers of one form
TOL = {"rtol": 1e-9, "atol": 1e-12}
BATCHES = {"fewer-cases": 3, "more-cases": 20}


def network(*, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    sizes = pairwise(ALIKE)
    layers = [each for d, u in sizes for each in (nn.Linear(d, u, bias=bias), nn.ELU())]
    return nn.Sequential(*layers[:-1]).double()


def batch(n: int) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(1)
    x = torch.randn(n, ALIKE[0], generator=chance, dtype=torch.float64)
    return x, torch.randint(ALIKE[-1], (n,), generator=chance)


@pytest.fixture
def apart(monkeypatch):
    """Take every layer by itself."""
    return lambda: monkeypatch.setattr(unitfisher.blocks, "_form", lambda of: None)


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, m in expected.items():
        for field in fields(m):
            value, got = getattr(m, field.name), getattr(found[name], field.name)
            if isinstance(value, Tensor):
                assert_close(got, value, equal_nan=True, **TOL)
            elif field.name not in ("alone", "block", "gradient"):
                assert got == value, field.name


def trained_once(model: nn.Module, monitor: Monitor, x: Tensor, y: Tensor):
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    return monitor.natural_gradient()


@pytest.mark.parametrize("n", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("units", [None, 2])
def test_alike_layers_together_are_those_layers_alone(apart, n, bias, units):
    model, (x, y) = network(bias=bias), batch(n)
    monitor = Monitor(model, units=units, every=1)
    together = monitor.measure(x, y)
    assert max(len(m.block.layers) for m in together.values()) >= 3
    step, latest = trained_once(model, monitor, x, y), monitor.latest
    table = monitor.to_pandas()
    monitor.detach()
    apart()
    monitor = Monitor(model, units=units, every=1)
    alone = monitor.measure(x, y)
    assert all(len(m.block.layers) == 1 for m in alone.values())
    assert_same(together, alone)
    for name, expected in trained_once(model, monitor, x, y).items():
        for got, want in zip(step[name], expected, strict=True):
            assert (got is None) == (want is None)
            assert want is None or torch.allclose(got, want, **TOL)
    assert_same(latest, monitor.latest)
    other = monitor.to_pandas()
    assert table[["step", "layer", "unit"]].equals(other[["step", "layer", "unit"]])


def test_a_layer_of_a_block_goes_by_itself_too():
    model, (x, y) = network(), batch(20)
    monitor = Monitor(model)
    m = monitor.measure(x, y)["4"]
    assert len(m.block.layers) == 3
    alone = m.natural_gradient(*m.gradient)
    angle = nn.functional.cosine_similarity(joined(*m.gradient), joined(*alone))
    assert_close(angle, m.cosine, **TOL)
    assert_close(m.damped(m.damping).k, m.k, **TOL)


def test_gradients_of_some_layers_of_a_block_are_taken_alone():
    model, (x, y) = network(), batch(20)
    monitor = Monitor(model, every=1)
    whole = trained_once(model, monitor, x, y)
    model[4].weight.grad = None
    some = monitor.natural_gradient()
    assert list(some) == [name for name in whole if name != "4"]
    for name, step in some.items():
        assert_close(step.dw, whole[name].dw, **TOL)


def test_a_singular_unit_is_named_in_its_own_layer():
    model, (x, _) = network(), batch(20)
    with torch.no_grad():
        model[2].weight[0] = 0.0  # a constant: the next layer's Var_q is singular
    with pytest.raises(ValueError, match="unit 0 in layer '4'"):
        Monitor(model, damping=0.0).measure(x)


def test_a_singular_unit_is_named_also_in_a_later_part():
    chance = torch.Generator().manual_seed(0)
    a = torch.randn(1, 20, 1, 3, generator=chance, dtype=torch.float64)
    delta = torch.randn(1, 20, 1, 4, generator=chance, dtype=torch.float64)
    delta[:, 3:, :, 2] = 0.0  # as many weighted cases as inputs
    cases, units = UnitCases(a, delta, 20), torch.tensor([5, 6, 7, 8])
    alone = Block(("fc",), (units,), cases, Condensed(cases), finite=True)
    with pytest.raises(SingularFisherError, match="unit 7 in layer 'fc'"), within(1):
        theory(alone, 0.0, None)


def test_memory_bounds_how_many_go_together(monkeypatch):
    model, (x, _) = network(), batch(20)
    whole = Monitor(model).measure(x)
    two = 2 * 4 * (8 * 20 * 5 + 8 * 20 * 5)  # copies of activations and errors
    monkeypatch.setattr(unitfisher.blocks, "workspace", lambda: two)
    blocks = [len(m.block.layers) for m in Monitor(network()).measure(x).values()]
    assert blocks == [1, 2, 2, 1, 1]
    assert_same(Monitor(network()).measure(x), whole)
