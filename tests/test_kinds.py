"""Every layer kind against the reference: what its units see, and where errors stand."""

import sys
from math import prod
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import reference
import torch
from drawn import CONVOLUTIONS, TRANSPOSED, Case, convolutions, linear_layers, transposed
from hypothesis import given
from hypothesis import strategies as st
from networks import filled
from strategies import TOL, any_sharing, normal, seeded
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

from unitfisher import LayerSelectionError, Monitor, unit_fisher
from unitfisher.kinds import at_units, incoming, join, supported, turning
from unitfisher.patches import unfolded
from unitfisher.steps import LayerStep


def classifier_on(case: Case) -> nn.Module:
    width = prod(case.layer(case.x).shape[1:])
    return nn.Sequential(case.layer, nn.Tanh(), nn.Flatten(), filled(nn.Linear(width, 3)))


def assert_units_give_the_output(layer: nn.Module, x: Tensor) -> None:
    y = layer(x)
    a = unfolded(incoming(layer, x, y.shape))
    weight = turning(layer)(layer.weight).flatten(1).unflatten(0, (len(a), -1))
    net = torch.einsum("gntd,gvd->ntgv", a, weight).flatten(2)
    bias = 0 if layer.bias is None else layer.bias
    assert_close(net + bias, at_units(layer, y), **TOL)


def assert_matches_reference(case: Case, sharing: str) -> None:
    model = classifier_on(case)
    found = unit_fisher(model, case.x, sharing=sharing)
    for name in ("0", "3"):
        assert_close(
            found[name], reference.unit_fisher(model, name, case.x, sharing=sharing), **TOL
        )


# Canonical form


@given(case=linear_layers(st.sampled_from([(), (1,), (3,), (2, 3)])))
def test_rows_of_a_linear_layer_times_its_weights_are_its_output(case):
    assert_units_give_the_output(*case)


@pytest.mark.parametrize("axes", CONVOLUTIONS)
@given(data=st.data())
def test_patches_times_flattened_weights_are_the_convolution(axes, data):
    assert_units_give_the_output(*data.draw(convolutions(axes)))


@pytest.mark.parametrize("axes", TRANSPOSED)
@given(data=st.data())
def test_patches_times_turned_weights_are_the_transposed_convolution(axes, data):
    layer, x = data.draw(transposed(axes))
    assert_units_give_the_output(layer, x)
    turn = turning(layer)
    assert turn(turn(layer.weight)).equal(layer.weight)


def test_the_size_that_a_call_asks_a_transposed_convolution_for_is_its_own():
    layer, x = nn.ConvTranspose1d(1, 1, 2, stride=3), torch.ones(1, 1, 2)
    for size in (5, 6, 7):
        a = unfolded(incoming(layer, x, layer(x, output_size=[size]).shape))
        assert a.sum(-1).flatten().tolist() == [*[0] * (size - 5), 1, 1, 0, 1, 1]


def test_positions_and_units_of_a_convolution_keep_their_order():
    layer, x = nn.Conv2d(2, 4, (1, 2), groups=2), torch.arange(12.0).reshape(1, 2, 2, 3)
    y = torch.arange(16.0).reshape(1, 4, 2, 2)
    a, y = unfolded(incoming(layer, x, y.shape)), at_units(layer, y)
    assert a[0, 0].tolist() == [[0, 1], [1, 2], [3, 4], [4, 5]]
    assert a[1, 0].tolist() == [[6, 7], [7, 8], [9, 10], [10, 11]]
    assert y[0, :, 1].tolist() == [4, 5, 6, 7]


# The Fisher of every kind against one backward pass per sample and class


@given(case=linear_layers(st.sampled_from([(), (3,), (2, 3)])), sharing=any_sharing)
def test_fisher_of_a_linear_layer_is_the_reference(case, sharing):
    assert_matches_reference(case, sharing)


@pytest.mark.parametrize("axes", CONVOLUTIONS)
@given(data=st.data(), sharing=any_sharing)
def test_fisher_of_a_convolution_is_the_reference(axes, data, sharing):
    assert_matches_reference(data.draw(convolutions(axes)), sharing)


@pytest.mark.parametrize("axes", TRANSPOSED)
@given(data=st.data(), sharing=any_sharing)
def test_fisher_of_a_transposed_convolution_is_the_reference(axes, data, sharing):
    assert_matches_reference(data.draw(transposed(axes)), sharing)


# Weights with units along another axis than the first


class Conv1D(nn.Module):
    """What GPT-2 has for linear layers: weight (inputs, units)."""

    def __init__(self, units: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.empty(inputs, units)),
            nn.Parameter(torch.empty(units)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(0, -2) @ self.weight + self.bias).unflatten(0, x.shape[:-1])


@pytest.fixture
def gpt2(monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    """Its class, in the library's place, unless the library is there."""
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", SimpleNamespace(Conv1D=Conv1D))
    return Conv1D


def test_the_linear_layer_of_gpt2_is_one_with_its_weight_turned(gpt2):
    generator = seeded(0)
    layer, x = filled(gpt2(4, 4), generator), normal(generator, 5, 2, 4)
    assert supported(layer)
    assert_units_give_the_output(layer, x)
    plain = filled(nn.Linear(4, 4), generator)
    plain.weight.data, plain.bias.data = layer.weight.T.detach(), layer.bias.detach()
    models = [classifier_on(Case(each, x)) for each in (layer, plain)]
    found, expected = (measured(model, x) for model in models)
    assert_close(found.step.dw, expected.step.dw.T, **TOL)
    assert_close(found.again.dw, found.step.dw, **TOL)
    assert_close((found.step.dw0, found.k), (expected.step.dw0, expected.k), **TOL)


class Halves(nn.Module):
    """A layer of one's own: inputs, and their halves, into two units."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(2, 6)), None

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x / 2], -1) @ self.weight.T


def test_a_kind_of_ones_own_can_join():
    generator = seeded(0)
    layer, x = filled(Halves(), generator), normal(generator, 5, 3)
    assert not supported(layer)
    join([Halves], lambda layer, x, out: torch.cat([x, x / 2], -1)[None, :, None], at_units_of_rows)
    assert_units_give_the_output(layer, x)
    F = unit_fisher(classifier_on(Case(layer, x)), x, sharing="joint")["0"]
    expected = reference.unit_fisher(classifier_on(Case(layer, x)), "0", x, sharing="joint")
    assert_close(F, expected, **TOL)


def test_a_kind_of_ones_own_must_say_that_it_has_no_bias():
    class Unbiased(nn.Module):
        pass

    join([Unbiased], lambda layer, x, out: x[None, :, None], at_units_of_rows)
    layer = Unbiased()
    layer.weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(LayerSelectionError, match=r"'0' \(Unbiased\) has no attribute bias"):
        Monitor(nn.Sequential(layer))


def at_units_of_rows(layer: nn.Module, y: Tensor) -> Tensor:
    return y.unsqueeze(1)


@pytest.mark.parametrize(
    "compute",
    [
        lambda layer: prune.random_unstructured(layer, "weight", 0.3),
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
    ],
    ids=["pruned", "weight-norm", "spectral-norm"],
)
def test_a_turned_weight_may_be_computed(gpt2, compute):
    torch.manual_seed(0)
    layer, x = filled(gpt2(3, 4), seeded(0)), torch.randn(5, 4).double()
    model = nn.Sequential(compute(layer), nn.Tanh(), nn.Linear(3, 3).double())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with Monitor(model):
        assert_close(model.state_dict(), before, rtol=0, atol=0)
        F = unit_fisher(model, x, sharing="joint")["0"]
    plain = nn.Linear(4, 3).double()
    plain.weight.data, plain.bias.data = layer.eval().weight.T.detach(), layer.bias.detach()
    expected = reference.unit_fisher(nn.Sequential(plain, *model[1:]), "0", x)
    assert_close(F, expected, **TOL)


class Measured(NamedTuple):
    """Of the first layer: k, and the natural gradient by the Monitor and by the statistics."""

    k: Tensor
    step: LayerStep
    again: LayerStep


def measured(model: nn.Module, x: Tensor, **options: object) -> Measured:
    layer = model[0]
    with Monitor(model, every=1, damping=1e-2, **options) as monitor:
        model(x).square().sum(-1).mean().backward()
        step, of = monitor.natural_gradient()["0"], monitor.latest["0"]
        whole = "units" not in options
        again = of.natural_gradient(layer.weight.grad, layer.bias.grad) if whole else step
        return Measured(of.k, step, again)


@pytest.mark.parametrize("axes", TRANSPOSED)
def test_natural_gradients_of_transposed_convolutions_have_the_shape_of_their_weights(axes):
    generator = seeded(axes)
    layer = filled(TRANSPOSED[axes](4, 6, 2, stride=2, groups=2), generator)
    x = normal(generator, 6, 4, *[2] * axes)
    model = classifier_on(Case(layer, x))
    _, (dw, dw0), again = measured(model, x, sharing="joint")
    assert again.dw.equal(dw)
    F = reference.unit_fisher(model, "0", x, sharing="joint")
    for unit, own in enumerate(reference.damped(F, 1e-2)):
        g = reference.weight_of_unit(layer, layer.weight.grad, unit).flatten()
        step = torch.linalg.solve(own, torch.cat([g, layer.bias.grad[unit, None]]))
        found = reference.weight_of_unit(layer, dw, unit).flatten()
        assert_close(torch.cat([found, dw0[unit, None]]), step, rtol=1e-7, atol=1e-9)


def test_of_some_units_there_is_one_row_each():
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2)
    model, x = nn.Sequential(layer, nn.Flatten(), nn.Linear(6 * 16, 3)), torch.randn(5, 4, 2, 2)
    _, whole, _ = measured(model, x, sharing="joint")
    model.zero_grad()
    _, some, _ = measured(model, x, sharing="joint", units=3)
    rows = turning(layer)(whole.dw)
    assert some.dw.shape == (3, 2, 3, 3)
    assert all(any(torch.allclose(own, row, rtol=1e-3) for row in rows) for own in some.dw)


def test_layer_without_canonical_form_says_so():
    layer, x = nn.LSTM(2, 2), torch.zeros(1, 2)
    for form, given_to in ((incoming, (x, x.shape)), (at_units, (x,))):
        with pytest.raises(LayerSelectionError, match="LSTM has no form"):
            form(layer, *given_to)
