"""The reference against Fishers known on paper; the package plays no part here."""

import numpy as np
import pytest
import torch
from networks import Means, filled, inputs
from reference import (
    cases,
    natural_gradient,
    quantities,
    unit_fisher,
    unit_fisher_empirical,
    unit_fisher_joint,
    weighted_fisher,
    with_ones,
)
from strategies import TOL, all_sharings
from torch import nn
from torch.testing import assert_close

N, D_IN, UNITS = 7, 3, 4


@all_sharings
def test_gaussian_output_unit_weighs_every_sample_by_the_inverse_variance(sharing):
    model, x = filled(nn.Sequential(nn.Linear(D_IN, UNITS))), inputs(N, D_IN)
    D = torch.full((N, UNITS), 1 / 0.3).double()
    F = unit_fisher(model, "0", x, "gaussian", 0.3, sharing)
    assert_close(F, weighted_fisher(x, D), **TOL)


@all_sharings
@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
def test_logit_unit_weighs_a_sample_by_the_variance_of_its_label(likelihood, sharing):
    model, x = filled(nn.Sequential(nn.Linear(D_IN, UNITS))), inputs(N, D_IN)
    z = model(x).detach()
    pi = z.softmax(-1) if likelihood == "categorical" else z.sigmoid()
    F = unit_fisher(model, "0", x, likelihood, 1.0, sharing)
    assert_close(F, weighted_fisher(x, pi * (1 - pi)), **TOL)


@all_sharings
@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_hidden_unit_sees_the_output_fisher_through_its_outgoing_weights(likelihood, sharing):
    model = filled(nn.Sequential(nn.Linear(D_IN, 5), nn.Tanh(), nn.Linear(5, UNITS)))
    x = inputs(N, D_IN)
    z = model(x).detach()
    pi = z.softmax(-1)
    output_fisher = {
        "categorical": torch.diag_embed(pi) - pi[:, :, None] * pi[:, None, :],
        "bernoulli": torch.diag_embed(z.sigmoid() * (1 - z.sigmoid())),
        "gaussian": torch.eye(UNITS).double().expand(N, -1, -1) / 2,
    }[likelihood]
    slope = 1 - model[0](x).detach().tanh() ** 2
    outgoing = model[2].weight.detach()
    D = slope**2 * torch.einsum("yu,nyz,zu->nu", outgoing, output_fisher, outgoing)
    F = unit_fisher(model, "0", x, likelihood, 2.0, sharing)
    assert_close(F, weighted_fisher(x, D), **TOL)


def test_trace_of_the_joint_fishers_is_the_trace_of_the_output_fisher_pulled_back():
    model = filled(nn.Sequential(nn.Linear(D_IN, UNITS)))
    x = inputs(N, D_IN)
    pi = model(x).detach().softmax(-1)
    expected = ((1 - (pi**2).sum(1)) * (1 + (x**2).sum(1))).mean()
    F = unit_fisher_joint(model, "0", x, "categorical")
    assert_close(F.diagonal(dim1=1, dim2=2).sum(), expected, **TOL)


def test_independent_label_per_position_makes_expand_exact():
    model, x = filled(nn.Sequential(nn.Linear(D_IN, UNITS))), inputs(N, 2, D_IN)
    pi = model(x).detach().softmax(-1).flatten(0, 1)
    expected = 2 * weighted_fisher(x.flatten(0, 1), pi * (1 - pi))  # a sum over positions
    assert_close(unit_fisher(model, "0", x, sharing="expand"), expected, **TOL)
    assert_close(unit_fisher(model, "0", x, sharing="joint"), expected, **TOL)


def test_mean_over_positions_makes_reduce_exact():
    model = filled(nn.Sequential(nn.Linear(D_IN, UNITS), Means()))
    x = inputs(N, 5, D_IN)
    pi = model(x).detach().softmax(-1)
    expected = weighted_fisher(x.mean(1), pi * (1 - pi))
    assert_close(unit_fisher(model, "0", x, sharing="reduce"), expected, **TOL)
    assert_close(unit_fisher(model, "0", x, sharing="joint"), expected, **TOL)


def test_expand_differs_from_joint_when_positions_share_a_label():
    model = filled(nn.Sequential(nn.Linear(D_IN, UNITS), Means()))
    x = inputs(N, 5, D_IN)
    pi = model(x).detach().softmax(-1)
    every_position = (pi * (1 - pi) / 25).repeat_interleave(5, 0)
    expected = 5 * weighted_fisher(x.flatten(0, 1), every_position)
    assert_close(unit_fisher(model, "0", x, sharing="expand"), expected, **TOL)
    assert not torch.allclose(expected, unit_fisher(model, "0", x, sharing="joint"), rtol=0.1)


def test_calls_of_one_module_are_positions():
    layer = nn.Linear(D_IN, D_IN)
    model, x = filled(nn.Sequential(layer, layer)), inputs(N, D_IN)
    first, second = with_ones(x), with_ones(layer(x).detach())
    own, passed_on = torch.eye(D_IN).double(), layer.weight.detach()  # errors of output y, unit u
    G = torch.einsum("yu,nd->nyud", passed_on, first) + torch.einsum("yu,nd->nyud", own, second)
    joint = torch.einsum("nyud,nyue->ude", G, G) / N
    D = (passed_on**2).sum(0).expand(N, -1)
    expand = weighted_fisher(x, D) + weighted_fisher(layer(x).detach(), torch.ones_like(D))
    assert_close(unit_fisher(model, "0", x, "gaussian", sharing="joint"), joint, **TOL)
    assert_close(unit_fisher(model, "0", x, "gaussian", sharing="expand"), expand, **TOL)


@all_sharings
def test_layer_without_bias_has_only_the_weight_block(sharing):
    with_bias = filled(nn.Sequential(nn.Linear(D_IN, UNITS)))
    without = nn.Sequential(nn.Linear(D_IN, UNITS, bias=False)).double()
    with_bias[0].bias.data.zero_()
    without[0].weight.data = with_bias[0].weight.data
    x = inputs(N, D_IN)
    F = unit_fisher(without, "0", x, sharing=sharing)
    assert_close(F, unit_fisher(with_bias, "0", x, sharing=sharing)[:, :-1, :-1], **TOL)


@all_sharings
def test_empirical_fisher_squares_the_misfit(sharing):
    model, x, y = filled(nn.Sequential(nn.Linear(D_IN, UNITS))), inputs(N, D_IN), inputs(N, UNITS)
    D = ((y - model(x).detach()) / 0.3) ** 2
    F = unit_fisher_empirical(model, "0", x, y, "gaussian", 0.3, sharing)
    assert_close(F, weighted_fisher(x, D), **TOL)


@all_sharings
def test_empirical_fisher_averages_to_the_exact_one_over_the_labels(sharing):
    model = filled(nn.Sequential(nn.Linear(D_IN, 5), nn.Tanh(), nn.Linear(5, 3)))
    x = inputs(1, D_IN)
    pi = model(x).detach().softmax(-1)[0]
    labels = [torch.tensor([y]) for y in range(3)]
    F = [unit_fisher_empirical(model, "0", x, y, sharing=sharing) for y in labels]
    average = torch.einsum("y,yude->ude", pi, torch.stack(F))
    assert_close(average, unit_fisher(model, "0", x, sharing=sharing), **TOL)


@all_sharings
def test_empirical_bernoulli_error_is_label_minus_probability(sharing):
    model, x = filled(nn.Sequential(nn.Linear(D_IN, UNITS))), inputs(N, D_IN)
    y = (inputs(N, UNITS, seed=2) > 0).double()
    D = (y - model(x).detach().sigmoid()) ** 2
    F = unit_fisher_empirical(model, "0", x, y, "bernoulli", sharing=sharing)
    assert_close(F, weighted_fisher(x, D), **TOL)


def test_empirical_joint_fisher_keeps_cross_terms_of_observed_labels():
    model, x = filled(nn.Sequential(nn.Linear(D_IN, UNITS))), inputs(N, 2, D_IN)
    y = torch.arange(2 * N).reshape(N, 2) % UNITS
    delta = nn.functional.one_hot(y, UNITS) - model(x).detach().softmax(-1)
    G = torch.einsum("ntu,ntd->nud", delta, with_ones(x))
    F = unit_fisher_empirical(model, "0", x, y)
    assert_close(F, torch.einsum("nud,nue->ude", G, G) / N, **TOL)


CONVOLUTIONS = {
    "1d": (nn.Conv1d(2, 3, 3), (9,)),
    "1d-stride-padding-dilation": (nn.Conv1d(2, 3, 3, 2, 1, 2), (9,)),
    "2d": (nn.Conv2d(2, 3, (2, 3)), (4, 6)),
    "2d-1x1": (nn.Conv2d(3, 2, 1), (3, 3)),
    "2d-stride": (nn.Conv2d(2, 3, 3, stride=(2, 1)), (6, 5)),
    "2d-padding": (nn.Conv2d(2, 3, 3, padding=(1, 2)), (4, 3)),
    "2d-dilation": (nn.Conv2d(2, 3, 2, dilation=(1, 3)), (4, 6)),
    "2d-same-even-kernel": (nn.Conv2d(2, 3, (2, 4), padding="same", dilation=(1, 2)), (3, 4)),
    "2d-valid": (nn.Conv2d(2, 3, 3, padding="valid"), (5, 4)),
    "2d-reflect": (nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="reflect"), (3, 3)),
    "2d-replicate": (nn.Conv2d(2, 3, 3, padding=2, padding_mode="replicate"), (2, 3)),
    "2d-circular": (nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), (3, 4)),
    "2d-circular-same": (nn.Conv2d(2, 3, 2, padding="same", padding_mode="circular"), (3, 4)),
    "2d-groups": (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (5, 4)),
    "2d-depthwise": (nn.Conv2d(3, 6, 2, groups=3), (4, 4)),
    "3d": (nn.Conv3d(2, 3, 2, padding=1, stride=(1, 2, 2)), (1, 4, 3)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_patches_times_weight_plus_bias_is_the_convolution(kind):
    layer, size = CONVOLUTIONS[kind]
    model, x = filled(nn.Sequential(layer)), inputs(2, layer.in_channels, *size)
    a, _ = cases(model, "0", x, "gaussian")
    a = a if layer.groups > 1 else a[None]
    weight = layer.weight.detach().reshape(layer.groups, -1, a.shape[-1])
    preactivation = torch.einsum("gnd,gud->ngu", a, weight).flatten(1) + layer.bias.detach()
    output = layer(x).detach().flatten(2).mT.flatten(0, 1)
    assert_close(preactivation, output, **TOL)


@pytest.mark.parametrize("kind", ["1d", "2d-padding", "2d-groups"])
def test_gaussian_convolution_output_gives_each_position_weight_one(kind):
    layer, size = CONVOLUTIONS[kind]
    model, x = filled(nn.Sequential(layer)), inputs(2, layer.in_channels, *size)
    _, D = cases(model, "0", x, "gaussian")
    assert_close(D, torch.ones_like(D), **TOL)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_independent_positions_make_expand_and_joint_agree_on_convolutions(kind):
    layer, size = CONVOLUTIONS[kind]
    model, x = filled(nn.Sequential(layer)), inputs(1, layer.in_channels, *size)
    expand = unit_fisher(model, "0", x, "gaussian", sharing="expand")
    assert_close(expand, unit_fisher(model, "0", x, "gaussian", sharing="joint"), **TOL)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_global_average_makes_reduce_and_joint_agree_on_convolutions(kind):
    layer, size = CONVOLUTIONS[kind]
    model = filled(nn.Sequential(layer, nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(1)))
    x = inputs(2, layer.in_channels, *size)
    reduce = unit_fisher(model, "0", x, sharing="reduce")
    assert_close(reduce, unit_fisher(model, "0", x, sharing="joint"), **TOL)


def test_quantities_are_the_moments_of_the_weighted_activations():
    a, D = inputs(20, D_IN) + 1, inputs(20, 1, seed=2) ** 2
    q = (D / D.sum()).squeeze(1)
    mu_p, mu_q = a.mean(0), q @ a
    V = torch.einsum("n,nd,ne->de", q, a - mu_q, a - mu_q)
    x = torch.linalg.solve(V, mu_q)
    found = quantities(weighted_fisher(a, D)[0], mu_p)
    expected = {"c": D.mean(), "b": (D * a).mean(0), "A": (D * a).T @ a / 20, "mu_q": mu_q, "V": V}
    expected |= {"s": (1 + mu_q @ x) / D.mean(), "k": (mu_q - mu_p) @ x}
    expected |= {"corrected_mean": mu_p - (1 + expected["k"]) * mu_q}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(torch.tensor(found[name]), value, **TOL)


def test_natural_gradient_of_two_uncorrelated_inputs_is_known_by_hand():
    F = np.array([[4.0, 0.0, 2.0], [0.0, 5.0, 0.0], [2.0, 0.0, 3.0]])
    dw, dw0 = natural_gradient(F, np.array([2.0, 10.0]), 5.0)
    np.testing.assert_allclose([*dw, dw0], [-0.5, 2.0, 2.0])


@all_sharings
def test_dropout_is_off_and_the_model_is_left_as_it_was(sharing):
    layers = [nn.Linear(D_IN, 5), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(5, 2)]
    model = nn.Sequential(*layers).train()
    model[3].weight.requires_grad_(False)
    x = inputs(N, D_IN).float()
    F = unit_fisher(model, "3", x, sharing=sharing)
    a = torch.relu(copy_of(model[0])(x.double()))
    pi = copy_of(model[3])(a).softmax(-1)
    assert_close(F, weighted_fisher(a, pi * (1 - pi)).detach(), **TOL)
    assert model.training
    assert model[3].weight.dtype == torch.float32
    assert not model[3].weight.requires_grad
    assert not model[3]._forward_hooks


def copy_of(layer: nn.Linear) -> nn.Linear:
    double = nn.Linear(layer.in_features, layer.out_features).double()
    double.load_state_dict(layer.state_dict())
    return double
