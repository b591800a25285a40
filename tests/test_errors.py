"""Errors sent back: each estimator of E_y δ² against the reference, and each way of sending."""

import numpy as np
import pytest
import reference
import torch
from networks import filled, inputs
from strategies import TOL, all_sharings, normal, seeded
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from unitfisher import Bernoulli, Categorical, Gaussian, Monitor, OutputError, unit_fisher
from unitfisher.backward import Backward, columns_together
from unitfisher.columns import Estimator, columns
from unitfisher.likelihoods import Likelihood
from unitfisher.memory import within
from unitfisher.observed import MANY, _squared

DRAWS = 3000


class Mixing(nn.Module):
    """Reads (n, T, d) and mixes positions, so that each label's error reaches all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.over = nn.Linear(2, 3), nn.Conv1d(3, 3, 3, padding=1)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.over(self.below(x).tanh().mT).tanh().mT)


def test_an_output_of_very_many_columns_says_so():
    logits, exact = torch.zeros(1, 101, 11), Estimator(Categorical())
    with pytest.warns(UserWarning, match=r"101 positions.*1010 backward columns.*'rademacher'"):
        next(columns(logits, exact, torch.Generator(), None))
    next(columns(logits[:, :100], exact, torch.Generator(), None))


def vectors(outputs: int = 3) -> nn.Module:
    return filled(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, outputs)))


# Drawn labels and signs are unbiased, whatever their number


PROBLEMS = {
    "categorical": (vectors(), inputs(3, 2), Categorical(), ("0", "2")),
    "categorical-positions": (filled(Mixing()), inputs(2, 3, 2), Categorical(), ("below", "over")),
    "bernoulli": (vectors(), inputs(3, 2), Bernoulli(), ("0", "2")),
    "gaussian-small-variance": (vectors(), inputs(3, 2), Gaussian(variance=0.3), ("0", "2")),
    "gaussian-large-variance": (vectors(), inputs(3, 2), Gaussian(variance=4.0), ("0", "2")),
}
each_problem = pytest.mark.parametrize(
    ("model", "x", "likelihood", "names"), PROBLEMS.values(), ids=PROBLEMS
)


def named(likelihood: Likelihood) -> tuple[str, float]:
    return type(likelihood).__name__.lower(), getattr(likelihood, "variance", 1.0)


def draws_of_D(model: nn.Module, x: Tensor, **options) -> dict[str, Tensor]:
    """D of every case and unit, drawn afresh for copies of the samples: (draws, n · t, u)."""
    with Monitor(model, **options) as monitor:
        measured = monitor.measure(x.repeat(DRAWS, *[1] * (x.dim() - 1)))
    return {name: m.cases.D.unflatten(0, (DRAWS, -1)) for name, m in measured.items()}


def standard_errors_off(draws: Tensor, expected: Tensor) -> Tensor:
    standard_error = draws.std(0) / len(draws) ** 0.5
    return (draws.mean(0) - expected).abs() / standard_error.clamp_min(1e-12)


@each_problem
@pytest.mark.parametrize("samples", [1, 8])
@pytest.mark.parametrize("fisher", ["mc", "rademacher"])
@pytest.mark.usefixtures("as_users_run_it")
def test_estimate_of_every_case_is_unbiased(fisher, samples, model, x, likelihood, names):
    found = draws_of_D(model, x, likelihood=likelihood, fisher=fisher, samples=samples)
    for name in names:
        _, D = reference.cases(model, name, x, *named(likelihood))
        assert standard_errors_off(found[name], D).max() < 5


@pytest.mark.parametrize("samples", [1, 8])
def test_the_most_probable_class_and_signs_over_the_rest_are_unbiased(samples):
    model, x, likelihood, names = PROBLEMS["categorical"]
    found = draws_of_D(model, x, fisher="top-rademacher", samples=samples)
    for name in names:
        _, D = reference.cases(model, name, x, *named(likelihood))
        assert standard_errors_off(found[name], D).max() < 5


def test_the_most_probable_class_takes_one_column_more_than_samples():
    estimator = Estimator(Categorical(), "top-rademacher", samples=3)
    blocks = list(columns(torch.zeros(4, 1, 5), estimator, torch.Generator(), None, together=3))
    assert [len(block) for block in blocks] == [3, 1]
    top = Categorical().top(torch.zeros(4, 1, 5))
    assert_close(blocks[0][0].abs(), top.abs(), rtol=0, atol=0)


def test_the_most_probable_class_of_several_positions_is_refused():
    with pytest.raises(OutputError, match=r"one label a sample.*3 positions.*'rademacher'"):
        unit_fisher(filled(Mixing()), inputs(2, 3, 2), fisher="top-rademacher")


class ByBlocks:
    """A likelihood that knows its root by blocks of columns only."""

    arrange, columns, root = Categorical.arrange, Categorical.columns, Categorical.root
    sample, score = Categorical.sample, Categorical.score


def test_signs_go_through_a_root_that_is_known_by_blocks_only():
    z = inputs(4, 1, 130)
    known, by_blocks = (
        next(columns(z, Estimator(of, "rademacher"), torch.Generator(), None))
        for of in (Categorical(), ByBlocks())
    )
    assert_close(by_blocks, known, **TOL)


@pytest.mark.parametrize("fisher", ["mc", "rademacher"])
def test_more_samples_narrow_the_estimate_by_the_root_of_their_number(fisher):
    model, x, likelihood, _ = PROBLEMS["categorical"]
    options = {"likelihood": likelihood, "fisher": fisher}
    one, sixteen = (draws_of_D(model, x, samples=samples, **options)["0"] for samples in (1, 16))
    assert_close(sixteen.std(0), one.std(0) / 4, rtol=0.15, atol=0)


@pytest.mark.parametrize("sharing", ["joint", "reduce"])
@pytest.mark.parametrize("fisher", ["mc", "rademacher"])
@pytest.mark.usefixtures("as_users_run_it")
def test_estimate_with_shared_weights_is_unbiased(fisher, sharing):
    model, x = filled(Mixing()), inputs(2, 3, 2)
    copies = x.repeat(50, 1, 1)
    options = {"fisher": fisher, "sharing": sharing, "samples": 2, "layers": "below"}
    drawn = [unit_fisher(model, copies, seed=seed, **options)["below"] for seed in range(40)]
    exact = reference.unit_fisher(model, "below", x, sharing=sharing)
    assert standard_errors_off(torch.stack(drawn), exact).max() < 5


@pytest.mark.parametrize("fisher", ["mc", "rademacher"])
def test_seed_decides_what_is_drawn(fisher):
    model, x = vectors(), inputs(5, 2)
    first, again, other = (unit_fisher(model, x, fisher=fisher, seed=s)["0"] for s in (3, 3, 4))
    assert first.equal(again)
    assert not first.equal(other)


# Observed labels


TARGETS = {
    "categorical": (vectors(), inputs(4, 2), torch.tensor([0, 2, 2, 1]), Categorical()),
    "categorical-positions": (
        filled(Mixing()),
        inputs(4, 3, 2),
        torch.arange(12).reshape(4, 3) % 3,
        Categorical(),
    ),
    "bernoulli": (vectors(), inputs(4, 2), torch.arange(12).reshape(4, 3) % 2, Bernoulli()),
    "gaussian": (vectors(), inputs(4, 2), inputs(4, 3), Gaussian(variance=0.3)),
    "one-output": (vectors(1), inputs(4, 2), inputs(4), Gaussian(variance=2.0)),
}


@all_sharings
@pytest.mark.parametrize(("model", "x", "y", "likelihood"), TARGETS.values(), ids=TARGETS)
def test_empirical_fisher_is_the_reference(model, x, y, likelihood, sharing):
    options = {"likelihood": likelihood, "fisher": "empirical", "sharing": sharing}
    found = unit_fisher(model, x, targets=y, **options)
    for name, F in found.items():
        kind, variance = named(likelihood)
        expected = reference.unit_fisher_empirical(model, name, x, y, kind, variance, sharing)
        assert_close(F, expected, **TOL)


def test_empirical_fisher_without_labels_says_where_to_put_them():
    with pytest.raises(ValueError, match=r"needs the observed labels.*targets=y"):
        unit_fisher(vectors(), inputs(4, 2), fisher="empirical")


BAD_TARGETS = {
    "too-few": ("categorical", torch.zeros(3, dtype=torch.long), "class indices of shape"),
    "floats": ("categorical", torch.zeros(4), "class indices.*float32"),
    "other-width": ("gaussian", torch.zeros(4, 2), "targets must have the output's shape"),
}


@pytest.mark.parametrize(("likelihood", "y", "message"), BAD_TARGETS.values(), ids=BAD_TARGETS)
def test_labels_that_do_not_fit_the_output_are_refused(likelihood, y, message):
    options = {"likelihood": likelihood, "fisher": "empirical", "targets": y}
    with pytest.raises(OutputError, match=message):
        unit_fisher(vectors(), inputs(4, 2), **options)


# Options


BAD_OPTIONS = {
    "fisher": ({"fisher": "true"}, "'exact', 'mc', 'rademacher', 'top-rademacher', 'empirical'"),
    "sharing": ({"sharing": "sum"}, "sharing must be one of 'expand', 'joint', 'reduce'"),
    "samples": ({"samples": 0}, "samples must be"),
    "no-classes": (
        {"likelihood": "bernoulli", "fisher": "top-rademacher"},
        r"most probable of several classes.*Bernoulli\(\) has no classes.*'rademacher'",
    ),
    "likelihood": ({"likelihood": "poisson"}, "likelihood must be one of 'categorical'"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_unknown_option_is_refused_with_the_valid_ones(options, message):
    with pytest.raises(ValueError, match=message):
        unit_fisher(vectors(), inputs(4, 2), **options)


# Columns sent back together or one by one


class Numeric(torch.autograd.Function):
    """x³ whose backward leaves torch, so that vmap cannot follow."""

    batches: list[int]

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(3 * np.square(x.numpy()) * grad.numpy())


class Cube(nn.Module):
    def __init__(self, *, numeric: bool) -> None:
        super().__init__()
        self.numeric = numeric

    def forward(self, x: Tensor) -> Tensor:
        return Numeric.apply(x) if self.numeric else x**3


def cubed(*, numeric: bool) -> nn.Module:
    return filled(nn.Sequential(nn.Linear(2, 3), Cube(numeric=numeric), nn.Linear(3, 6)))


class Checkpointed(nn.Module):
    def __init__(self, segment: nn.Module) -> None:
        super().__init__()
        self.segment = segment

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.segment, x, use_reentrant=False)


def assert_same_blocks(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert len(found) == len(expected)
    for F, G in zip(found.values(), expected.values(), strict=True):
        assert_close(F, G, **TOL)


@pytest.mark.parametrize("together", [1, 2, 4, 5])
def test_columns_sent_back_together_equal_columns_one_by_one(together):
    model, x = vectors(outputs=6), inputs(4, 2)
    net = model[0](x)
    z = model[2](model[1](net))
    edges = [torch.autograd.graph.get_gradient_edge(net)]
    estimator = Estimator(Categorical())
    whole, parted = (
        columns(z.detach()[:, None], estimator, torch.Generator(), None, most)
        for most in (5, together)
    )
    delta = torch.cat([block[0] for block in Backward(z, edges).send_all_back(parted)])
    (S,) = (block[:, :, 0] for block in whole)
    expected = [torch.autograd.grad(z, net, column, retain_graph=True)[0] for column in S]
    assert_close(delta, torch.stack(expected), **TOL)


def test_memory_that_columns_may_take_does_not_change_the_fisher():
    model, x = vectors(outputs=6), inputs(4, 2)
    together = unit_fisher(model, x)
    with within(1):
        assert_same_blocks(unit_fisher(model, x), together)


def test_memory_that_roots_may_take_does_not_change_random_signs():
    model, x = vectors(outputs=70), inputs(4, 2)
    together = unit_fisher(model, x, fisher="rademacher")
    with within(3 * 40 * 4 * 70):  # three columns of the root
        assert_same_blocks(unit_fisher(model, x, fisher="rademacher"), together)


@all_sharings
def test_operation_that_vmap_cannot_follow_gives_the_same_fisher(sharing):
    x = inputs(4, 2)
    found = unit_fisher(cubed(numeric=True), x, sharing=sharing)
    assert_same_blocks(found, unit_fisher(cubed(numeric=False), x, sharing=sharing))


@all_sharings
@pytest.mark.parametrize(
    ("segment", "x"),
    [(vectors(outputs=6), inputs(4, 2)), (filled(Mixing()), inputs(4, 3, 2))],
    ids=["vectors", "positions"],
)
def test_checkpointed_segments_give_the_same_fisher(sharing, segment, x):
    head = filled(nn.Linear(segment(x).shape[-1], 4), seeded(1))
    found = unit_fisher(nn.Sequential(Checkpointed(segment), nn.Tanh(), head), x, sharing=sharing)
    plain = unit_fisher(nn.Sequential(segment, nn.Tanh(), head), x, sharing=sharing)
    assert_same_blocks(found, plain)


def test_columns_that_fit_in_memory_go_together_and_at_least_one_goes():
    output = torch.zeros(4, 3, dtype=torch.float32)
    with within(128 * 2**20):
        assert columns_together(output, 2**20, convolutional=False) == 128
        assert columns_together(output, 10**12, convolutional=False) == 1
        assert columns_together(output, 2**20, convolutional=True) == 1


def test_squares_beyond_single_precision_are_those_of_double_precision():
    scale = torch.tensor([1.0, 1e-22, 1e22, 0.0, 1e-3, 1e-40])
    delta = normal(seeded(0), 2, MANY // 12 + 1, 1, 6).float() * scale
    assert delta.numel() >= MANY
    assert_close(_squared(delta), (delta.double() ** 2).sum(0), rtol=1e-6, atol=0)


# Samples that act on one another


class Graph(nn.Module):
    """Nodes are the samples; each one's logits are a mean over the other nodes too."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.head = nn.Linear(2, 3), nn.Linear(3, 3)
        self.register_buffer("weights", torch.rand(5, 5).softmax(-1))

    def forward(self, x: Tensor) -> Tensor:
        return self.weights @ self.head(self.below(x).tanh())


def measured_c(model: nn.Module, **options: object) -> Tensor:
    with Monitor(model, **options) as monitor:
        return monitor.measure(inputs(5, 2))["below"].c


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("fisher", ["exact", "top-rademacher"])
def test_where_samples_act_on_one_another_their_errors_do_not_mix_on_average(fisher):
    model = filled(Graph())
    of_each = [measured_c(model, output=lambda z, m=m: z[m : m + 1]) for m in range(5)]
    found = [measured_c(model, fisher=fisher, seed=seed) for seed in range(30)]
    expected, drawn = torch.stack(of_each).sum(0) / 5, torch.stack(found)
    assert ((drawn.mean(0) - expected).abs() <= 5 * drawn.std(0) / 30**0.5).all()


def test_where_samples_are_independent_chance_changes_no_bit_of_the_exact_fisher():
    model = vectors()
    first, second = (unit_fisher(model, inputs(5, 2), seed=seed) for seed in range(2))
    assert all(first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_precision_is_no_concern_of_a_measurement(default):
    model = vectors().float()
    expected = unit_fisher(model, inputs(5, 2).float())
    torch.set_default_dtype(default)
    try:
        found = unit_fisher(model, inputs(5, 2).float())
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(found[name].equal(expected[name]) for name in expected)
