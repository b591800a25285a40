"""Every layer kind against the reference: what units see, where errors stand, which are chosen."""

from math import prod
from typing import NamedTuple

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import TOL, normal, seeds
from torch import Tensor, nn
from torch.testing import assert_close

from unitfisher import LayerSelectionError, unit_fisher
from unitfisher.layers import at_units, incoming, parametric, select, supported
from unitfisher.patches import unfolded

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
any_sharing = st.sampled_from(["expand", "joint", "reduce"])


class Case(NamedTuple):
    """A layer and an input of two samples for it."""

    layer: nn.Module
    x: Tensor


@st.composite
def linear_layers(draw, leading: st.SearchStrategy) -> Case:
    d, units, generator = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(seeds)
    layer = nn.Linear(d, units, bias=draw(st.booleans()))
    return Case(filled(layer, generator), normal(generator, 2, *draw(leading), d))


@st.composite
def convolutions(draw, axes: int) -> Case:
    few = 2 if axes == 3 else 3
    per_axis = st.lists(st.integers(1, few), min_size=axes, max_size=axes).map(tuple)
    kernel, dilation, stride, margin = (draw(per_axis) for _ in range(4))
    dilation = tuple(min(rate, 2) for rate in dilation)
    size = [r * (k - 1) + m for r, k, m in zip(dilation, kernel, margin, strict=True)]
    padding = draw(st.sampled_from(["same", "valid", "numbers"]))
    if padding == "same":
        stride = (1,) * axes
    if padding == "numbers":
        padding = tuple(draw(st.integers(0, min(2, length - 1))) for length in size)
    groups, c_in, c_out = draw(st.sampled_from([(1, 2, 2), (2, 4, 2), (2, 2, 4), (3, 3, 3)]))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    options |= {"padding_mode": mode, "bias": draw(st.booleans())}
    generator = draw(seeds)
    layer = CONVOLUTIONS[axes](c_in, c_out, kernel, **options)
    return Case(filled(layer, generator), normal(generator, 2, c_in, *size))


def filled(model: nn.Module, generator: torch.Generator) -> nn.Module:
    for parameter in model.double().parameters():
        parameter.data = normal(generator, *parameter.shape)
    return model


def classifier_on(case: Case) -> nn.Module:
    width = prod(case.layer(case.x).shape[1:])
    head = filled(nn.Linear(width, 3), torch.Generator().manual_seed(0))
    head.weight.data /= width**0.5
    return nn.Sequential(case.layer, nn.Tanh(), nn.Flatten(), head)


def assert_units_give_the_output(layer: nn.Module, x: Tensor) -> None:
    a = unfolded(incoming(layer, x))
    weight = layer.weight.flatten(1).unflatten(0, (len(a), -1))
    net = torch.einsum("gntd,gvd->ntgv", a, weight).flatten(2)
    bias = 0 if layer.bias is None else layer.bias
    assert_close(net + bias, at_units(layer, layer(x)), **TOL)


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


def test_positions_and_units_of_a_convolution_keep_their_order():
    layer, x = nn.Conv2d(2, 4, (1, 2), groups=2), torch.arange(12.0).reshape(1, 2, 2, 3)
    a, y = unfolded(incoming(layer, x)), at_units(layer, torch.arange(16.0).reshape(1, 4, 2, 2))
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


# Choice of layers


def network() -> nn.Sequential:
    stem = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
    return nn.Sequential(stem, nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))


CHOICES = {
    "everything-supported": (None, ["0.0", "2", "4"]),
    "name": ("4", ["4"]),
    "pattern": ("0.*", ["0.0"]),
    "type": (nn.Linear, ["2", "4"]),
    "predicate": (lambda name, module: name > "1", ["2", "4"]),
    "several": (["4", nn.Conv2d], ["0.0", "4"]),
    "overlapping": (("*", nn.Linear), ["0.0", "2", "4"]),
}


@pytest.mark.parametrize(("layers", "names"), CHOICES.values(), ids=CHOICES)
def test_layers_are_chosen_in_the_order_of_the_model(layers, names):
    model = network()
    found = select(model, layers)
    assert list(found) == names
    assert all(found[name] is model.get_submodule(name) for name in names)


def test_frozen_layers_are_left_out_unless_they_are_named():
    model = network()
    model[2].requires_grad_(False)
    assert list(select(model, None)) == ["0.0", "4"]
    assert list(select(model, ["2", "4"])) == ["2", "4"]


REFUSALS = {
    "near-name": ("0.00", r"'0\.00' matches no layer.*near names.*0\.0"),
    "nothing-near": ("encoder", r"'encoder' matches no layer.*names: '0\.0', '0\.1', '2'"),
    "name-without-parameters": ("3", "'3' matches no layer"),
    "absent-type": (nn.Conv3d, "Conv3d.*matches no layer"),
    "empty-predicate": (lambda name, module: False, "matches no layer"),
    "unsupported-kind": (nn.BatchNorm2d, r"'0\.1' \(BatchNorm2d\).*no form.*per-sample"),
    "one-of-several": (["4", "nowhere"], "'nowhere' matches no layer"),
}


@pytest.mark.parametrize(("layers", "message"), REFUSALS.values(), ids=REFUSALS)
def test_choice_that_observes_nothing_is_refused(layers, message):
    with pytest.raises(LayerSelectionError, match=message):
        select(network(), layers)


@pytest.mark.parametrize("layers", [[], ()], ids=["list", "tuple"])
def test_choice_of_no_layers_is_refused(layers):
    with pytest.raises(LayerSelectionError):
        select(network(), layers)


UNSUPPORTED = {
    "normalisation": (nn.BatchNorm1d(3), "only BatchNorm1d"),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(1, 1, 2)), "only ConvTranspose2d"),
    "recurrent": (nn.LSTM(2, 2), "only LSTM"),
    "frozen": (nn.Linear(2, 2).requires_grad_(False), "no trainable layer"),
    "without-parameters": (nn.ReLU(), "no trainable layer"),
}


@pytest.mark.parametrize(("model", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_model_without_a_supported_layer_is_refused_with_what_it_has(model, message):
    with pytest.raises(LayerSelectionError, match=message):
        select(model, None)


def test_attention_reads_its_output_weight_directly_so_that_layer_is_not_supported():
    attention = nn.MultiheadAttention(4, 2)
    assert not supported(attention.out_proj)
    assert [name for name, _ in parametric(attention)] == ["", "out_proj"]


@pytest.mark.parametrize("form", [incoming, at_units])
def test_layer_without_canonical_form_says_so(form):
    with pytest.raises(LayerSelectionError, match="LSTM has no form"):
        form(nn.LSTM(2, 2), torch.zeros(1, 2))
