"""An ensemble's members train as each would alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from strategies import seeded
from torch import nn
from torch.testing import assert_close
from trainings import SMALL, ended, few

from unitfisher.experiments import Dataset, mlp, train
from unitfisher.experiments.dropout import MemberDropout, generators_of
from unitfisher.experiments.ensembles import Ensemble
from unitfisher.experiments.orders import Orders
from unitfisher.experiments.presets import PRESETS, Member, Phase
from unitfisher.experiments.seeds import CROPS, MASKS, mixed
from unitfisher.experiments.sgd import SGD
from unitfisher.experiments.trainer import Trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return ended(tmp_path_factory.mktemp("trained"))


def convolutional(seed: int, activation: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        activation(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Sequential(nn.Linear(27, 5), nn.PReLU()),
        nn.Linear(5, 2, bias=False),
    )


class Residual(nn.Module):
    """A module of modules that is no nn.Sequential, as models of other packages are."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.inner = convolutional(seed, nn.ELU)
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.scale + x.mean((1, 2, 3), keepdim=True).flatten(1)


def test_members_may_be_modules_of_modules_that_are_no_sequence() -> None:
    alone = [nn.Sequential(Residual(i)) for i in range(2)]
    ensemble = Ensemble([nn.Sequential(Residual(i)) for i in range(2)])
    x = torch.randn(2, 10, 1, 8, 8, generator=seeded(0))
    assert_close(ensemble(x), torch.stack([m(x[i]) for i, m in enumerate(alone)]))
    for i, (member, model) in enumerate(zip(ensemble.members, alone, strict=True)):
        assert_close(member.eval()(x[i]), model.eval()(x[i]))


def test_products_in_half_precision_are_sent_back_so() -> None:
    ensemble = Ensemble([mlp([4, 3, 2], "elu", seeded(i)) for i in range(2)])
    x = torch.randn(2, 5, 4, generator=seeded(0))
    exact = outputs_and_gradients(ensemble, x)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = ensemble(x)
    found = torch.autograd.grad(outputs.float().square().sum(), list(ensemble.parameters()))
    for gradient, expected in zip(found, exact[1:], strict=True):
        assert_close(gradient, expected, rtol=0.05, atol=0.05)


def outputs_and_gradients(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    outputs = model(x)
    return outputs, *torch.autograd.grad(outputs.square().sum(), list(model.parameters()))


@pytest.mark.parametrize("training", [True, False])
def test_members_of_any_modules_compute_what_each_would_alone(training: bool) -> None:
    kinds = [nn.ReLU, nn.ELU, nn.ELU]
    x = torch.randn(3, 10, 1, 8, 8, generator=seeded(0))
    alone = [convolutional(i, kind).train(training) for i, kind in enumerate(kinds)]
    ensemble = Ensemble([convolutional(i, kind) for i, kind in enumerate(kinds)]).train(training)
    found = outputs_and_gradients(ensemble, x)
    expected = [outputs_and_gradients(model, x[i]) for i, model in enumerate(alone)]
    for together, apart in zip(found, zip(*expected, strict=True), strict=True):
        assert_close(together, torch.stack(apart), rtol=1e-4, atol=1e-5)
    for i, model in enumerate(alone):
        for name, buffer in model.named_buffers():
            assert_close(ensemble.stacked.get_buffer(name)[i], buffer)


def test_members_are_views_that_follow_the_ensemble() -> None:
    ensemble = Ensemble([mlp([4, 3, 2], "elu", seeded(i)) for i in range(2)])
    members = ensemble.members
    with torch.no_grad():
        for parameter in ensemble.parameters():
            parameter.add_(1)
    x = torch.randn(2, 5, 4)
    assert_close(ensemble(x), torch.stack([m(x[i]) for i, m in enumerate(members)]))


def test_ensemble_takes_copies_of_weights() -> None:
    network = mlp([4, 3, 2], "elu", seeded(0))
    before = network.hidden1.weight.clone()
    with torch.no_grad():
        for parameter in Ensemble([network, network]).parameters():
            parameter.zero_()
    assert torch.equal(network.hidden1.weight, before)


@pytest.mark.parametrize(
    "other",
    [
        lambda: mlp([4, 5, 2], "elu", seeded(0)),
        lambda: mlp([4, 3, 2], "prelu", seeded(0)),
        lambda: mlp([4, 3, 3, 2], "elu", seeded(0)),
    ],
    ids=["width", "parameters", "depth"],
)
def test_members_of_different_forms_are_refused(other: Callable[[], nn.Sequential]) -> None:
    with pytest.raises(ValueError, match="must have one form, but their .* differ"):
        Ensemble([mlp([4, 3, 2], "elu", seeded(0)), other()])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_sgd_is_that_of_torch_with_a_rate_per_member(momentum: float, decay: float) -> None:
    rates = torch.tensor([0.1, 0.1, 0.03])
    start = torch.randn(3, 4, 5, generator=seeded(0)), torch.randn(3, 4, generator=seeded(1))
    stacked = [x.clone() for x in start]
    ours = SGD(stacked, rates, momentum=momentum, weight_decay=decay)
    apart = [[nn.Parameter(x[i].clone()) for x in start] for i in range(3)]
    optimizers = [
        torch.optim.SGD(own, lr=float(rate), momentum=momentum, weight_decay=decay)
        for own, rate in zip(apart, rates, strict=True)
    ]
    for seed in range(4):
        gradients = [torch.randn(x.shape, generator=seeded(seed)) for x in start]
        ours.step(gradients)
        for i, (own, optimizer) in enumerate(zip(apart, optimizers, strict=True)):
            for parameter, gradient in zip(own, gradients, strict=True):
                parameter.grad = gradient[i].clone()
            optimizer.step()
    for k, together in enumerate(stacked):
        assert_close(together, torch.stack([own[k].detach() for own in apart]))


def test_an_order_visits_every_case_once_an_epoch() -> None:
    first, second = seeded(0), seeded(1)
    orders = Orders(10, 4, [first, second, first])
    batches = [orders.next() for _ in range(2 * len(orders))]
    assert [batch.shape[1] for batch in batches] == [4, 4, 2] * 2
    epochs = torch.cat(batches[:3], 1), torch.cat(batches[3:], 1)
    for epoch in epochs:
        assert torch.equal(epoch.sort(1).values, torch.arange(10).expand(3, 10))
        assert torch.equal(epoch[0], epoch[2])
        assert not torch.equal(epoch[0], epoch[1])
    assert not torch.equal(*epochs)


@pytest.mark.parametrize("member", SMALL.members, ids=lambda member: member.name)
def test_members_end_where_a_single_run_of_their_seed_ends(
    member: Member, trained: Trainer
) -> None:
    found = trained.ensemble.members[SMALL.members.index(member)]
    generator = seeded(member.seed)
    alone = mlp([64, 16, 12, 10], member.activation, generator)
    for _ in train(alone, few(), 2, generator):
        pass
    for name, parameter in alone.named_parameters():
        assert_close(found.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)


NORMED = replace(SMALL, norm="batch", epochs=1)


def test_normalised_networks_have_a_norm_before_every_activation() -> None:
    names = [name for name, _ in mlp([5, 4, 3, 2], "elu", seeded(0), norm="batch").named_children()]
    assert names == ["hidden1", "norm1", "act1", "hidden2", "norm2", "act2", "output"]


def test_batch_normalisation_draws_nothing() -> None:
    plain, normed = (mlp([5, 4, 2], "elu", seeded(0), norm=norm) for norm in ("none", "batch"))
    for name, parameter in plain.named_parameters():
        assert torch.equal(normed.get_parameter(name), parameter)


def test_normalised_members_end_where_a_single_run_of_their_seed_ends(tmp_path: Path) -> None:
    with Trainer(NORMED, NORMED.members, few(), tmp_path) as trainer:
        for _ in trainer:
            pass
    for member, found in zip(NORMED.members, trainer.ensemble.members, strict=True):
        generator = seeded(member.seed)
        alone = mlp([64, 16, 12, 10], member.activation, generator, norm="batch")
        for _ in train(alone, few(), 1, generator):
            pass
        assert sum(isinstance(module, nn.BatchNorm1d) for module in found.modules()) == 2
        assert_close(found.state_dict(), alone.state_dict(), rtol=1e-4, atol=1e-5)


DROPPED = replace(
    PRESETS["cifar10-11"],
    activations=("relu", "elu"),
    seeds=(0, 1),
    batch_size=2,
    phases=(Phase(0, 1.0, (0.5,) * 6, "all"),),
)


def test_members_with_dropout_end_where_a_single_run_of_their_seed_ends(tmp_path: Path) -> None:
    x = torch.rand(4, 3, 8, 8, generator=seeded(0))
    data = Dataset(x, torch.arange(4), x[:1], torch.arange(1))

    def after_two_steps(members: list[Member]) -> Sequence[nn.Module]:
        folder = tmp_path / "-".join(member.name for member in members)
        with Trainer(DROPPED, members, data, folder) as trainer:
            for _ in range(2):
                trainer.step()
        return trainer.ensemble.members

    together = after_two_steps(DROPPED.members)
    for member, found in zip(DROPPED.members, together, strict=True):
        (alone,) = after_two_steps([member])
        assert_close(found.state_dict(), alone.state_dict(), rtol=1e-4, atol=1e-6)


def test_dropout_draws_by_seed_and_process() -> None:
    members, cpu = DROPPED.members, torch.device("cpu")
    drop = MemberDropout([nn.Dropout(0.3)] * 4, generators_of(members, cpu, 0))
    x = torch.ones(4, 1000)
    relu0, relu1, elu0, elu1 = y = drop(x)
    assert torch.equal(relu0, elu0)
    assert torch.equal(relu1, elu1)
    assert not torch.equal(relu0, relu1)
    assert not torch.equal(drop(x), y)
    other = MemberDropout([nn.Dropout(0.3)] * 4, generators_of(members, cpu, 1))
    assert not torch.equal(other(x)[0], relu0)
    assert set(y.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.7))}
    assert 0.6 < y.count_nonzero() / y.numel() < 0.8
    assert torch.equal(drop.eval()(x), x)


def test_generators_do_not_repeat_one_another() -> None:
    numbers = [(seed, *of) for seed in (0, 1) for of in ((CROPS,), (MASKS, 0), (MASKS, 1), (1,))]
    seeds = {mixed(*each) % 2**32 for each in numbers}
    assert len(seeds - {0, 1}) == len(numbers)
    assert seeds == {mixed(*each) for each in numbers}


def test_crops_are_not_drawn_from_the_numbers_that_order_the_cases(tmp_path: Path) -> None:
    x = torch.rand(4, 3, 8, 8, generator=seeded(0))
    data = Dataset(x, torch.arange(4), x[:1], torch.arange(1))
    with Trainer(DROPPED, DROPPED.members, data, tmp_path) as trainer:
        crops = trainer.source.state()["augment"]
    assert len(crops) == len(DROPPED.members)
    for state, member in zip(crops, DROPPED.members, strict=True):
        assert not torch.equal(state, seeded(member.seed).get_state())
        assert torch.equal(state, seeded(mixed(member.seed, CROPS)).get_state())
