"""Materialised unit Fishers of whole networks against one backward pass per sample and outcome."""

import math
from collections.abc import Iterator

import pytest
import reference
import torch
from networks import NETWORKS, Answers, filled, inputs
from strategies import TOL, all_sharings
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from unitfisher import (
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    NonFiniteError,
    OutputError,
    unit_fisher,
)


def mlp(d: int = 2, hidden: int = 3, outputs: int = 3) -> nn.Module:
    return filled(nn.Sequential(nn.Linear(d, hidden), nn.Tanh(), nn.Linear(hidden, outputs)))


def assert_matches_reference(model: nn.Module, x: Tensor, sharing: str, **options) -> None:
    variance = getattr(options.get("likelihood"), "variance", 1.0)
    kind = type(options.get("likelihood", Categorical())).__name__.lower()
    found = unit_fisher(model, x, sharing=sharing, **options)
    assert found
    for name, blocks in found.items():
        expected = reference.unit_fisher(model, name, x, kind, variance, sharing)
        assert_close(blocks, expected, **TOL)


# Networks that make observing hard


class InPlaceSum(nn.Module):
    """Residual blocks that add to their own output and to their input's copy in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(2, 3, 1), nn.Conv1d(3, 3, 3, padding=1)
        self.third, self.head = nn.Conv1d(3, 3, 1, bias=False), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        skip = x
        x = self.second(F.elu(x))
        x += skip
        skip = x
        x = self.third(x.relu())
        x.add_(skip).mul_(0.5)
        return self.head(x.mean(-1))


class Recurrent(nn.Module):
    """One cell called at every step, in-place activations, and a step that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[:, 0, :1]).expand(-1, 3)
        for step in x.unbind(1):
            state = self.cell(torch.cat([step, state], -1)).tanh_()
        self.cell(torch.cat([x[:, 0], state], -1))
        return self.head(state)


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 2, 2, bias=False), nn.BatchNorm2d(2)
        self.over, self.head = nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.over(F.max_pool2d(self.norm(self.first(x)), 2, 1).relu_().flatten(1)))


class Keywords(nn.Module):
    """Calls its layer by keyword and reads two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(2, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.head(self.layer(input=x).tanh() + shift)


def dropped() -> nn.Module:
    layers = [nn.Linear(2, 4), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(4, 3)]
    return nn.Sequential(*layers, nn.AlphaDropout(0.5))


HARD = {
    "residual-sum-in-place": (InPlaceSum, (3, 2, 4)),
    "recurrent-cell-and-unused-call": (Recurrent, (3, 3, 1)),
    "batch-norm-and-pooling": (Normalised, (3, 1, 4, 4)),
    "dropout-and-activation-in-place": (dropped, (4, 2)),
    **{name: (network.make, (3, *network.size)) for name, network in NETWORKS.items()},
}


@all_sharings
@pytest.mark.parametrize(("make", "size"), HARD.values(), ids=HARD)
def test_network_in_training_mode_gives_the_fishers_of_its_eval_mode(make, size, sharing):
    model = filled(make()).train()
    assert_matches_reference(model, inputs(*size), sharing)


@all_sharings
def test_several_inputs_come_as_a_tuple_or_by_name(sharing):
    model, x = filled(Keywords()), inputs(4, 2)
    shift = torch.linspace(0, 1, 4).double()[:, None]
    found = unit_fisher(model, (x, shift), sharing=sharing)
    by_name = unit_fisher(model, {"shift": shift, "x": x}, sharing=sharing)
    assert found.keys() == {"layer", "head"}
    for name in ("layer", "head"):
        assert found[name].equal(by_name[name])


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused, self.used = nn.Linear(2, 3), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        return self.used(x)


@all_sharings
def test_layer_that_the_output_does_not_use_has_no_fisher(sharing):
    found = unit_fisher(filled(Branches()), inputs(4, 2), sharing=sharing)
    assert not found["unused"].any()
    assert found["used"].diagonal(dim1=1, dim2=2).gt(0).all()


class Differing(nn.Module):
    """Compares two positions: what a bias adds cancels, what weights add does not."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(2, 3, bias=bias), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.embed(x).unbind(1)
        return self.head(first - second)


@all_sharings
@pytest.mark.parametrize("bias", [True, False])
def test_errors_that_cancel_over_positions_leave_the_fisher_of_the_weights(bias, sharing):
    assert_matches_reference(filled(Differing(bias=bias)), inputs(4, 2, 2), sharing)


@all_sharings
def test_frozen_layer_that_is_named_has_a_fisher_all_the_same(sharing):
    model, x = mlp(), inputs(4, 2)
    expected = unit_fisher(model, x, sharing=sharing)
    model[2].requires_grad_(False)
    assert_close(unit_fisher(model, x, layers="2", sharing=sharing)["2"], expected["2"], **TOL)


# Likelihoods


MODELS = {
    "categorical": (mlp(), (4, 2), Categorical()),
    "two-classes": (mlp(outputs=2), (4, 2), Categorical()),
    "bernoulli": (mlp(), (4, 2), Bernoulli()),
    "one-bernoulli": (nn.Sequential(mlp(outputs=1), nn.Flatten(0)), (4, 2), Bernoulli()),
    "gaussian": (mlp(), (4, 2), Gaussian(variance=0.3)),
    "gaussian-positions": (filled(NETWORKS["sequence"].make()), (3, 3, 4), Gaussian(variance=2.0)),
    "bernoulli-positions": (filled(NETWORKS["sequence"].make()), (3, 3, 4), Bernoulli()),
}


@all_sharings
@pytest.mark.parametrize(("model", "size", "likelihood"), MODELS.values(), ids=MODELS)
def test_every_likelihood_gives_the_reference(model, size, likelihood, sharing):
    assert_matches_reference(model, inputs(*size), sharing, likelihood=likelihood)


def test_labels_of_positions_that_the_model_mixes_are_independent():
    model, x = filled(NETWORKS["sequence"].make()), inputs(3, 3, 4)
    joint = unit_fisher(model, x, sharing="joint")["embed"]
    one_at_a_time = torch.zeros_like(joint)
    for t in range(3):
        options = {"sharing": "joint", "output": lambda z, t=t: z[:, t]}
        one_at_a_time += unit_fisher(model, x, **options)["embed"]
    assert_close(joint, one_at_a_time, **TOL)


class Poisson:
    """Counts with rate e^z; not one of the package's own."""

    def arrange(self, output: Tensor) -> Tensor:
        return output.unsqueeze(1)

    def columns(self, z: Tensor) -> int:
        return z.shape[-1]

    def root(self, z: Tensor, start: int, stop: int) -> Tensor:
        return torch.diag_embed((z / 2).exp()).movedim(-1, 0)[start:stop]

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        return torch.poisson(z.exp(), generator=generator)

    def score(self, z: Tensor, y: Tensor) -> Tensor:
        return y.reshape(z.shape) - z.exp()


def counts(z: Tensor, *_: object) -> Iterator[tuple[float, Tensor]]:
    for log_rate in z.flatten():
        for y in range(60):
            log_p = y * log_rate - log_rate.exp() - math.lgamma(y + 1)
            yield log_p.exp().item(), log_p


@all_sharings
def test_likelihood_of_ones_own_is_as_exact(monkeypatch, sharing):
    model, x = mlp(outputs=2), inputs(3, 2) / 2
    assert isinstance(Poisson(), Likelihood)
    monkeypatch.setattr(reference, "outcomes", counts)
    assert_matches_reference(model, x, sharing, likelihood=Poisson())


@pytest.mark.parametrize("fisher", ["mc", "rademacher"])
def test_likelihood_of_ones_own_is_drawn_from(fisher):
    model, x = mlp(outputs=2), inputs(3, 2) / 2
    exact = unit_fisher(model, x, likelihood=Poisson())["0"]
    options = {"likelihood": Poisson(), "fisher": fisher}
    copies = x.repeat(500, 1)
    drawn = [unit_fisher(model, copies, seed=seed, **options)["0"] for seed in range(20)]
    error = torch.stack(drawn).mean(0) - exact
    assert (error.abs() <= 5 * torch.stack(drawn).std(0) / 20**0.5).all()


# What a model may return


def test_logits_are_found_in_what_the_model_returns():
    plain, packed = (filled(Answers(p)) for p in (lambda z: z, lambda z: (z.sum(), z[:, :, None])))
    x = inputs(5, 4)
    found = unit_fisher(packed, x, output=lambda answer: answer[1].mT)
    assert_close(found["head"], unit_fisher(plain, x)["head"])


MISSING = {
    "two-tensors": (lambda z: (z, z), "returns a tuple with 0, 1: say which"),
    "detached": (lambda z: z.detach(), "has no graph"),
    "classes-not-last": (lambda z: z[:, :, None], r"\(5, 3, 1\).*bring the classes last"),
}


@pytest.mark.parametrize(("pack", "message"), MISSING.values(), ids=MISSING)
def test_output_that_holds_no_logits_is_refused_with_what_it_holds(pack, message):
    with pytest.raises(OutputError, match=message):
        unit_fisher(filled(Answers(pack)), inputs(5, 4))


# Nothing is disturbed, nothing is averaged in silently


def test_model_is_left_as_it_was():
    model = filled(NETWORKS["conv-batchnorm-dropout-in-place"].make()).train()
    model.norm.eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chance = torch.get_rng_state()
    unit_fisher(model, inputs(3, 2, 4, 4))
    modes = {name: module.training for name, module in model.named_modules()}
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert [name for name, training in modes.items() if not training] == ["norm"]
    assert model.head.weight.grad.equal(torch.ones_like(model.head.weight))
    assert model.first.weight.grad is None
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.get_rng_state().equal(chance)


@all_sharings
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_fisher_has_no_graph_and_the_precision_of_the_model(precision, sharing):
    model, x = mlp().to(precision), inputs(5, 2).to(precision)
    F = unit_fisher(model, x, sharing=sharing)["0"]
    assert not F.requires_grad
    assert F.dtype == precision


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_surrounding_context_without_gradients_is_no_obstacle(context):
    model, x = mlp(), inputs(5, 2)
    expected = unit_fisher(model, x)
    with context():
        found = unit_fisher(model, x)
    assert_close(found, expected)


NOT_FINITE = {
    "input": (lambda model, x: x[0].fill_(torch.nan), "activations into layer '0'"),
    "infinite-input": (lambda model, x: x[0].fill_(torch.inf), "activations into layer '0'"),
    "weight": (
        lambda model, x: model[2].weight.data[0].fill_(torch.nan),
        "preactivations of layer '2'",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), NOT_FINITE.values(), ids=NOT_FINITE)
def test_number_that_is_not_finite_is_an_error_that_names_the_layer(spoil, message):
    model, x = mlp(), inputs(5, 2)
    spoil(model, x)
    with pytest.raises(NonFiniteError, match=message):
        unit_fisher(model, x)


class Added(nn.Module):
    """Two layers whose outputs are added: autograd gives both the same errors."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.one(x) + self.other(x)))


class Summed(nn.Module):
    """Convolution, and the sum over its positions: autograd gives all of them one number."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.head = nn.Conv1d(2, 5, 3), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.one(x).sum(2))


@all_sharings
@pytest.mark.parametrize(("make", "size"), [(Added, (6, 4)), (Summed, (6, 2, 5))])
def test_errors_that_layers_share_are_left_as_they_are(make, size, sharing):
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(size, dtype=torch.float64)
    found = unit_fisher(model, x, sharing=sharing)
    for name, own in found.items():
        assert_close(own, reference.unit_fisher(model, name, x, sharing=sharing), **TOL)
