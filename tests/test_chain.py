"""Outputs of layers in a row: looked up in the graph of a pass that nobody followed."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from nonlinearities import ELEMENTWISE, OUTPUTS, Row
from torch import Tensor, nn
from torch.testing import assert_close

import unitfisher

TOL = {"rtol": 1e-12, "atol": 1e-14}
IN_A_ROW = ("clamp", "elu", "elu_", "none", "relu_", "tanh")


def inputs(n: int = 7) -> Tensor:
    return torch.randn(n, 3, dtype=torch.double, generator=torch.Generator().manual_seed(n))


def outputs_of(monitor: unitfisher.Monitor) -> list[Tensor]:
    return [of.output_mean for of in monitor.latest.values()]


def known(monitor: unitfisher.Monitor) -> bool:
    return bool(monitor._live.chain.links)


@given(
    st.lists(st.sampled_from(IN_A_ROW), min_size=1, max_size=4),
    st.integers(2, 5),
    st.booleans(),
)
def test_outputs_of_layers_in_a_row_are_those_that_the_layers_put_out(names, width, whole):
    model = Row([width] * len(names), [ELEMENTWISE[name] for name in names])
    monitor = unitfisher.Monitor(
        model, likelihood="gaussian", every=1 if whole else lambda step: False, activations=1
    )
    for step in range(3):
        model(inputs(5 + step))
        rows = monitor.to_pandas("activations").query(f"step == {step}")
        put_out = torch.cat(model.put_out, 1)
        assert_close(torch.tensor(rows["mean"].to_numpy()), put_out.mean(0), **TOL)
        assert_close(torch.tensor(rows["var"].to_numpy()), put_out.var(0, correction=0), **TOL)
        assert known(monitor)
    if whole:
        seen = [of.nonlinearity for of in monitor.latest.values()]
        assert seen == [None if name == "none" else name.rstrip("_") for name in names]


RANDOM = {"dropout"}
ROWS = {"module", "function", "function-with-options", "method", "module-in-place", "keyword"}
ROWS |= {"method-in-place", "shifted-relu", "none"}


@pytest.mark.parametrize("case", sorted(OUTPUTS.keys() - RANDOM))
def test_every_pass_tells_the_same_outputs_whether_or_not_it_was_followed(case):
    model, function, name = OUTPUTS[case]
    model = copy.deepcopy(model).double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    monitor = unitfisher.Monitor(model, layers=nn.Linear, every=1)
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
    for step in range(3):
        x = inputs(6 + step)
        model(x)
        found = next(iter(monitor.latest.values()))
        y = function(layer(x)).detach()
        assert found.nonlinearity == name
        assert_close(found.output_mean, y.mean(0), **TOL)
        assert_close(found.output_var, y.var(0, correction=0), **TOL)
    assert known(monitor) == (case in ROWS)


def elu_of(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(F.elu(x))


class Exponential(torch.autograd.Function):
    """A nonlinearity that no function mode sees."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(y := x.exp())
        return y

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


NO_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": elu_of(lambda x: F.dropout(x, 0.5)),
    "residual": elu_of(lambda x: x + 1),
    "scaled in place": elu_of(lambda x: x.mul_(2)),
    "flattened": elu_of(lambda x: x.flatten()[: x.numel()].view_as(x)),
    "two functions": elu_of(torch.tanh),
    "unseen": lambda x: Exponential.apply(x),
}


@pytest.mark.parametrize("function", NO_ROWS.values(), ids=NO_ROWS)
def test_other_models_are_followed_in_every_pass(function):
    model = Row([4, 3], [function, lambda x: x])
    monitor = unitfisher.Monitor(model, every=1)
    model(inputs())
    assert not known(monitor)


def test_outputs_changed_without_a_graph_are_no_row():
    def halved(x: Tensor) -> Tensor:
        y = F.elu(x)
        with torch.no_grad():
            y /= 2
        return y

    monitor = unitfisher.Monitor(model := Row([4, 3], [halved, lambda x: x]), every=1)
    model(inputs())
    assert not known(monitor)


def test_outputs_of_a_layer_that_goes_on_otherwise_are_lost_for_one_pass():
    model = Row([4, 5, 3], [F.elu, F.elu, lambda x: x])
    monitor = unitfisher.Monitor(model, every=1)
    model(inputs())
    model.functions = [F.elu, torch.tanh, lambda x: x]
    model(inputs())
    first, changed, last = outputs_of(monitor)
    assert_close(first, model.put_out[0].mean(0), **TOL)
    assert changed.isnan().all()
    assert monitor.latest["layers.1"].nonlinearity is None
    assert_close(last, model.put_out[2].mean(0), **TOL)
    assert all(of.finite and of.s.isfinite().all() for of in monitor.latest.values())
    model(inputs())
    for found, put_out in zip(outputs_of(monitor), model.put_out, strict=True):
        assert_close(found, put_out.mean(0), **TOL)


def test_a_row_that_ends_early_or_goes_on_is_seen():
    model = Row([4, 3, 3], [F.elu, F.elu, lambda x: x])
    monitor = unitfisher.Monitor(model, every=1)
    model(inputs())
    model.layers, model.functions = model.layers[:2], model.functions[:2]
    with pytest.warns(unitfisher.UncoveredLayersWarning, match="not called"):
        model(inputs())
    for found, put_out in zip(outputs_of(monitor), model.put_out, strict=True):
        assert_close(found, put_out.mean(0), **TOL)


def test_a_pass_that_calls_no_layer_is_told_and_the_next_one_looked_up():
    model = Row([4, 3], [F.elu, lambda x: x])
    monitor = unitfisher.Monitor(model, every=2, activations=1)
    model(inputs())
    layers, model.layers = model.layers, nn.ModuleList()
    model.functions = []
    model(inputs().requires_grad_())  # nothing is measured in this one
    told = "a training pass is not measured: none of the observed layers was called"
    with pytest.warns(unitfisher.UncoveredLayersWarning, match=told):
        model(inputs().requires_grad_())
    with pytest.raises(unitfisher.LayerSelectionError, match="none of the observed layers"):
        monitor.measure(inputs())
    model.layers, model.functions = layers, [F.elu, lambda x: x]
    model(inputs())
    assert known(monitor)
    assert monitor.to_pandas("activations")["step"].unique().tolist() == [0, 3]


@pytest.mark.parametrize("place", [0, 1], ids=["between-layers", "returned"])
def test_gradients_that_the_model_retains_stay_those_of_the_loss(place):
    def retaining(x: Tensor) -> Tensor:
        y = F.elu(x)
        if retaining.on:
            y.retain_grad()
            retaining.kept = y
        return y

    retaining.on = False
    grads = []
    for observed in (False, True):
        torch.manual_seed(0)
        functions = [F.elu, F.elu]
        functions[place] = retaining
        model = Row([4, 3], functions)
        monitor = unitfisher.Monitor(model, every=1) if observed else None
        model(inputs())
        assert monitor is None or known(monitor)
        retaining.on = True
        for _ in range(2):
            model(inputs()).square().mean().backward()
        grads.append(retaining.kept.grad)
        retaining.on = False
    assert_close(*grads, rtol=0, atol=0)
