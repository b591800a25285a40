"""A stack of columns sent back in one pass: the same errors as column by column, or none at all."""

import numpy as np
import pytest
import torch
from measured import Operations
from nonlinearities import ELEMENTWISE
from strategies import TOL, normal, seeded
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.testing import assert_close

from unitfisher.backward import Backward, _stacked
from unitfisher.stack import Stack

OTHERWISE = ("clamp", "clamp-above", "elu_", "relu_")  # unknown to a stack, or in place
FUNCTIONS = {name: f for name, f in ELEMENTWISE.items() if name not in OTHERWISE} | {
    "elu-in-place": lambda x: F.elu_(x * 1.0),
    "times": lambda x: x * torch.arange(3.0, dtype=x.dtype),
    "dropout-on-a-gpu": lambda x: torch.native_dropout(x, 0.5, True)[0],
}
UNKNOWN = {
    "clamp": ELEMENTWISE["clamp"],
    "sum": lambda x: x - x.sum(1, keepdim=True),
    "squared": lambda x: x * x.sum(),
    "softmax": lambda x: x.softmax(1),
    "residual": lambda x: x + x.tanh(),
}


def network() -> list[nn.Linear]:
    layers = [nn.Linear(2, 3).double(), nn.Linear(3, 4).double()]
    chance = seeded(0)
    for parameter in (p for layer in layers for p in layer.parameters()):
        parameter.data = normal(chance, *parameter.shape)
    return layers


def passed(function) -> tuple[Tensor, list]:
    below, above = network()
    net = below(normal(seeded(1), 5, 2))
    z = above(function(net))
    return z, [get_gradient_edge(net)]


def one_by_one(z: Tensor, edges: list, block: Tensor) -> Tensor:
    return torch.cat([Backward(z, edges).send_back(column)[0] for column in block.split(1)])


def block() -> Tensor:
    return normal(seeded(2), 6, 5, 1, 4)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_stack_brings_the_errors_of_its_columns(function):
    z, edges = passed(function)
    (found,) = _stacked(z, edges, block())
    assert_close(found, one_by_one(z, edges, block()), **TOL)


@pytest.mark.parametrize("function", UNKNOWN.values(), ids=UNKNOWN)
def test_what_a_stack_does_not_know_goes_another_way_with_the_same_errors(function):
    z, edges = passed(function)
    ((found,),) = Backward(z, edges).send_all_back(iter([block()]))
    assert_close(found, one_by_one(z, edges, block()), **TOL)


def test_columns_go_together_through_a_convolution():
    x = normal(seeded(1), 5, 2, 4).requires_grad_()
    z = nn.Conv1d(2, 4, 4).double()(x.sin()).mT
    edges = [get_gradient_edge(x)]
    with Operations() as counted:
        ((found,),) = Backward(z, edges).send_all_back(iter([block()]))
    assert counted.count["aten::convolution_backward"] == 1
    assert_close(found, one_by_one(z, edges, block()), **TOL)


def test_want_of_memory_is_told_at_once():
    calls = []

    class Full(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            calls.append(gradient)
            raise torch.OutOfMemoryError

    z, edges = passed(Full.apply)
    with pytest.raises(torch.OutOfMemoryError):
        list(Backward(z, edges).send_all_back(iter([block()])))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "operation",
    [torch.sum, torch.neg, lambda g: g * g, lambda g: g * torch.ones(7, 4, 3), torch.clone],
    ids=["sum", "neg", "square", "product-of-more-axes", "clone"],
)
def test_an_operation_that_could_mix_columns_is_refused(operation):
    with pytest.raises(NotImplementedError, match="stack"):
        operation(Stack(torch.ones(2, 4, 3)))


@pytest.mark.parametrize(
    "ask", [Tensor.data_ptr, np.from_dlpack, torch.utils.dlpack.to_dlpack, Tensor.numpy]
)
def test_who_asks_where_its_numbers_lie_is_refused(ask):
    with pytest.raises(RuntimeError):
        ask(Stack(torch.ones(2, 4, 3)))


def test_hooks_of_the_user_act_on_every_column():
    below, above = network()
    net = below(normal(seeded(1), 5, 2))
    net.register_hook(lambda g: -2 * g)
    z, edges = above(net.tanh()), [get_gradient_edge(net)]
    ((found,),) = Backward(z, edges).send_all_back(iter([block()]))
    assert_close(found, one_by_one(z, edges, block()), **TOL)


def test_a_layer_that_the_output_does_not_depend_on_gets_no_errors():
    z, edges = passed(torch.tanh)
    apart = network()[0](torch.ones(5, 2).double())
    found = _stacked(z, [*edges, get_gradient_edge(apart)], block())
    assert found[1] is None
