"""The penalty's reach; test_ensembles has the descent itself."""

import pytest
import torch
from strategies import seeded
from torch import Tensor, nn
from torch.testing import assert_close

from unitfisher.experiments.ensembles import Ensemble
from unitfisher.experiments.models import mlp
from unitfisher.experiments.sgd import SGD

DECAY = 0.1


def normed() -> nn.Sequential:
    return mlp((6, 5, 5, 3), "prelu", seeded(0), norm="batch")


def decayed_alone(network: nn.Sequential, x: Tensor) -> nn.Sequential:
    weights = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim == 1]
    groups = [{"params": weights, "weight_decay": DECAY}, {"params": others}]
    descent = torch.optim.SGD(groups, lr=0.5, momentum=0.9)
    for _ in range(3):
        descent.zero_grad()
        network(x).square().mean().backward()
        descent.step()
    return network


def test_biases_norms_and_slopes_can_be_left_out_of_the_penalty() -> None:
    x = torch.randn(7, 6, generator=seeded(1))
    ensemble = Ensemble([normed(), normed()])
    parameters = list(ensemble.parameters())
    with torch.no_grad():  # biases and β that a penalty would move
        for p in parameters:
            p += 0.1
    alone = normed()
    alone.load_state_dict(ensemble.members[0].state_dict())
    rates = torch.tensor([0.5, 0.5])
    descent = SGD(parameters, rates, momentum=0.9, weight_decay=DECAY, decayed="weights")
    for _ in range(3):
        losses = ensemble(x.expand(2, *x.shape)).square().mean((1, 2))
        descent.step(torch.autograd.grad(losses.sum(), parameters))
    expected = dict(decayed_alone(alone, x).named_parameters())
    assert {name.split(".")[0] for name in expected} == {
        *("hidden1", "hidden2", "norm1", "norm2", "act1", "act2", "output")
    }
    for name, found in ensemble.members[0].named_parameters():
        assert_close(found, expected[name], rtol=1e-4, atol=1e-5)


def test_a_penalty_on_anything_else_is_refused() -> None:
    with pytest.raises(ValueError, match="decayed must be one of 'all', 'weights', got 'biases'"):
        SGD([torch.zeros(1, 2, 2)], torch.ones(1), decayed="biases")
