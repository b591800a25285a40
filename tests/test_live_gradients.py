"""Targets, and the natural gradients of gradients that training has left."""

import pytest
import torch
from measured import WITH_GRADIENT
from networks import CLASSES, NETWORKS, a_step, loss_of, mlp, normal, seeded_mlp
from reference import joined
from strategies import SINGLE
from torch import nn
from torch.testing import assert_close

from unitfisher import Monitor, unit_fisher


@pytest.mark.parametrize("every", [1, 2], ids=["measured", "not-measured"])
def test_targets_are_for_one_pass(every):
    model = mlp()
    monitor = Monitor(model, every=every)
    model(normal(8, 4))
    monitor.targets = torch.zeros(8, dtype=torch.long)
    model(normal(8, 4))
    assert monitor.targets is None


def test_targets_wait_while_the_model_is_evaluated():
    model = mlp()
    monitor = Monitor(model, every=1)
    monitor.targets = torch.zeros(8, dtype=torch.long)
    model.eval()(normal(8, 4))
    assert monitor.targets is not None


def test_an_empirical_fisher_is_measured_live_with_the_labels_given_before():
    model, x, y = mlp(), normal(12, 4), torch.arange(12) % CLASSES
    monitor = Monitor(model, fisher="empirical", every=1)
    monitor.targets = y
    model(x)
    live = monitor.latest["2"].k
    assert_close(live, monitor.measure(x, targets=y)["2"].k)


def test_targets_that_are_given_complete_the_rows_without_a_backward_pass():
    model, x, y = mlp(), normal(12, 4), torch.arange(12) % CLASSES
    monitor = Monitor(model, every=1)
    monitor.targets = y
    loss_of(model(x), y).backward()
    told = monitor.latest["2"]
    monitor.natural_gradient()
    for name in WITH_GRADIENT:
        assert_close(getattr(told, name), getattr(monitor.latest["2"], name), **SINGLE)


@pytest.mark.parametrize("name", ["mlp", "weight-reuse", "conv-batchnorm-dropout-in-place"])
def test_natural_gradients_have_the_shapes_of_weight_and_bias(name):
    network = NETWORKS[name]
    model, (x, y) = network.seeded(), network.batch()
    monitor = Monitor(model, layers=(nn.Linear, nn.Conv2d)[: 2 if "conv" in name else 1], every=1)
    loss_of(model(x), y).backward()
    for layer, (dw, dw0) in monitor.natural_gradient().items():
        weight, bias = monitor.layers[layer].weight, monitor.layers[layer].bias
        assert dw.shape == weight.shape
        assert dw0 is None if bias is None else dw0.shape == bias.shape


def test_natural_gradients_are_those_of_the_newest_statistics():
    model, x = mlp(), normal(12, 4)
    monitor = Monitor(model, every=1)
    a_step(model, x)
    newest = monitor.measure(normal(30, 4, seed=1))["2"]
    found = monitor.natural_gradient()["2"]
    assert_close(found, newest.natural_gradient(model[2].weight.grad, model[2].bias.grad))


def test_natural_gradients_take_whatever_gradient_was_accumulated():
    model, x = mlp(), normal(12, 4)
    monitor = Monitor(model, every=1)
    a_step(model, x)
    once = monitor.natural_gradient()["2"].dw
    a_step(model, x)
    assert_close(monitor.natural_gradient()["2"].dw, 2 * once, **SINGLE)


def test_a_natural_gradient_solves_the_fisher_for_the_gradient():
    model, x = mlp().double(), normal(40, 4).double()
    monitor = Monitor(model, every=1, damping=0.0)
    a_step(model, x)
    step, fisher = joined(*monitor.natural_gradient()["2"]), unit_fisher(model, x)["2"]
    gradient = joined(model[2].weight.grad, model[2].bias.grad)
    assert_close((fisher @ step.unsqueeze(-1)).squeeze(-1), gradient)


def test_angles_and_shares_of_a_gradient_join_the_rows_of_its_step():
    model, x = mlp(), normal(12, 4)
    monitor = Monitor(model, every=1)
    for turn in range(2):
        a_step(model, x)
        if turn == 1:
            monitor.natural_gradient()
    model(x)
    known = monitor.to_pandas().groupby("step")[list(WITH_GRADIENT)].count().gt(0).all(axis=1)
    assert known.to_dict() == {0: False, 1: True, 2: False}


def test_looking_at_the_table_does_not_lose_the_gradient_that_follows():
    model = mlp()
    monitor = Monitor(model, every=1)
    a_step(model, normal(12, 4))
    monitor.to_pandas()
    monitor.natural_gradient()
    assert monitor.to_pandas()["cosine"].notna().all()


def test_a_natural_gradient_makes_an_angle_of_at_most_a_right_one_with_its_gradient():
    model = mlp()
    monitor = Monitor(model, every=1)
    a_step(model, normal(12, 4))
    monitor.natural_gradient()
    assert monitor.to_pandas()["cosine"].between(0, 1 + 1e-6).all()  # F is positive definite


@pytest.mark.parametrize("absent", ["weight", "bias"])
def test_a_layer_with_half_a_gradient_is_left_out(absent):
    model = mlp()
    monitor = Monitor(model, ["0", "2"], every=1)
    a_step(model, normal(12, 4))
    model[0].get_parameter(absent).grad = None
    assert list(monitor.natural_gradient()) == ["2"]
    assert monitor.latest["0"].cosine.isnan().all()
    assert monitor.latest["2"].cosine.isfinite().all()


def test_steps_along_the_natural_gradient_bring_the_loss_down():
    model, x = seeded_mlp(), normal(60, 4)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    monitor = Monitor(model, every=1, damping=1e-2)
    losses = []
    for _ in range(20):
        loss = loss_of(model(x), y)
        model.zero_grad()
        loss.backward()
        for name, (dw, dw0) in monitor.natural_gradient().items():
            layer = monitor.layers[name]
            layer.weight.data -= 0.05 * dw
            layer.bias.data -= 0.05 * dw0
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_frozen_layers_are_left_out_of_the_natural_gradient():
    model = mlp()
    model[2].requires_grad_(False)
    monitor = Monitor(model, layers=nn.Linear, every=1)
    a_step(model, normal(12, 4))
    assert list(monitor.natural_gradient()) == ["0", "4"]
