"""Which layers are chosen, and what is said where none is."""

import pytest
from torch import nn

from unitfisher import LayerSelectionError
from unitfisher.kinds import supported
from unitfisher.layers import parametric, select


def network() -> nn.Sequential:
    stem = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
    return nn.Sequential(stem, nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))


CHOICES = {
    "everything-supported": (None, ["0.0", "2", "4"]),
    "name": ("4", ["4"]),
    "pattern": ("0.*", ["0.0"]),
    "type": (nn.Linear, ["2", "4"]),
    "predicate": (lambda name, module: name > "1" and module.bias.numel() == 2, ["4"]),
    "several": (["4", nn.Conv2d], ["0.0", "4"]),
    "patterns": (["4", "0.*"], ["0.0", "4"]),
    "mixed": (("0.0", lambda name, module: name == "4"), ["0.0", "4"]),
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
    "embedding": (nn.Sequential(nn.Embedding(3, 2)), "only Embedding"),
    "recurrent": (nn.LSTM(2, 2), "only LSTM"),
    "frozen": (nn.Linear(2, 2).requires_grad_(False), "no trainable layer"),
    "without-parameters": (nn.ReLU(), "no trainable layer"),
}


@pytest.mark.parametrize(("model", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_model_without_a_supported_layer_is_refused_with_what_it_has(model, message):
    with pytest.raises(LayerSelectionError, match=message):
        select(model, None)


def test_the_module_that_holds_an_attentions_output_weight_is_not_the_layer_that_is_observed():
    attention = nn.MultiheadAttention(4, 2)
    found = dict(parametric(attention))
    assert [*found] == ["in_proj", "out_proj"]
    assert not supported(attention.out_proj)
    assert supported(found["out_proj"])
    assert found["out_proj"].weight is attention.out_proj.weight
