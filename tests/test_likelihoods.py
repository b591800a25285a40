"""Roots of the output Fisher, drawn labels and scores, against what is known on paper."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import TOL, normal, seeded, seeds
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.testing import assert_close

from unitfisher import Bernoulli, Categorical, Gaussian, OutputError
from unitfisher.likelihoods import Likelihood, likelihood_of

LIKELIHOODS = {
    "categorical": Categorical(),
    "bernoulli": Bernoulli(),
    "gaussian": Gaussian(),
    "gaussian-small-variance": Gaussian(variance=0.3),
    "gaussian-large-variance": Gaussian(variance=4.0),
}
likelihoods = pytest.mark.parametrize("likelihood", LIKELIHOODS.values(), ids=LIKELIHOODS)
DRAWS = 20_000


def logits(rows: int = 4, classes: int = 5, seed: int = 0) -> Tensor:
    generator = seeded(seed)
    return 2 * normal(generator, rows, 2, classes)


def saturated(gap: float) -> Tensor:
    """One winning class, first, last or in the middle, and two that tie."""
    z = torch.zeros(4, 1, 4, dtype=torch.float64)
    for row, winners in enumerate(([0], [3], [1], [1, 2])):
        z[row, 0, winners] = gap
    return z - 1.0


def root_squared(likelihood: Likelihood, z: Tensor, together: int | None = None) -> Tensor:
    S = torch.cat([likelihood.root(z, i, j) for i, j in chunks(likelihood.columns(z), together)])
    return torch.einsum("rnty,rntx->ntyx", S, S)


def chunks(total: int, together: int | None) -> list[tuple[int, int]]:
    together = together or total
    return [(start, min(start + together, total)) for start in range(0, total, together)]


def output_fisher(likelihood: Likelihood, z: Tensor) -> Tensor:
    """E_y score scoreᵀ = -E_y ∂ score/∂z; the derivative of these scores does not depend on y."""
    if isinstance(likelihood, Categorical):
        pi = z.softmax(-1)
        others = (pi.unsqueeze(-2) * (1 - torch.eye(z.shape[-1]))).sum(-1)  # 1 - π keeps no digits
        return torch.diag_embed(pi * others + pi**2) - pi.unsqueeze(-1) * pi.unsqueeze(-2)
    if isinstance(likelihood, Bernoulli):
        return torch.diag_embed(z.sigmoid() * (-z).sigmoid())
    return torch.diag_embed(torch.full_like(z, 1 / likelihood.variance))


# Root of the output Fisher


@likelihoods
@given(generator=seeds, classes=st.integers(2, 6), scale=st.floats(0, 30))
def test_columns_square_to_the_output_fisher(likelihood, generator, classes, scale):
    z = scale * normal(generator, 3, 2, classes)
    assert_close(root_squared(likelihood, z), output_fisher(likelihood, z), **TOL)


@likelihoods
@given(together=st.integers(1, 6))
def test_columns_do_not_depend_on_how_many_are_asked_for_at_once(likelihood, together):
    z = logits()
    total = likelihood.columns(z)
    pieces = [likelihood.root(z, start, stop) for start, stop in chunks(total, together)]
    assert_close(torch.cat(pieces), likelihood.root(z, 0, total), rtol=0, atol=0)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_a_softmax_needs_one_column_less_than_classes(classes):
    z = logits(classes=classes)
    assert Categorical().columns(z) == classes - 1
    assert Categorical().root(z, 0, classes - 1).shape == (classes - 1, 4, 2, classes)


@pytest.mark.parametrize("gap", [50.0, 700.0, 1e4])
def test_saturated_softmax_keeps_the_digits_of_its_variance(gap):
    z = saturated(gap)
    pi = z.softmax(-1)
    others = 1 - torch.eye(4, dtype=torch.float64)
    found = root_squared(Categorical(), z)
    variance = pi * (others @ pi.unsqueeze(-1)).squeeze(-1)
    assert_close(found.diagonal(dim1=-2, dim2=-1), variance, rtol=1e-12, atol=0)
    covariance = -pi.unsqueeze(-1) * pi.unsqueeze(-2) * others
    scale = variance.sqrt().unsqueeze(-1) * variance.sqrt().unsqueeze(-2)
    assert ((found * others - covariance).abs() <= 1e-12 * scale).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gap", [50.0, 1e4])
def test_saturated_softmax_is_finite_in_low_precision(dtype, gap):
    z = saturated(gap).to(dtype)
    S = Categorical().root(z, 0, 3)
    assert S.dtype == dtype
    assert S.isfinite().all()
    assert S[:, 3].any()  # a tie of two classes stays uncertain


@pytest.mark.parametrize("scale", [40.0, 1e3])
def test_saturated_bernoulli_keeps_the_digits_of_both_tails(scale):
    z = scale * torch.tensor([[[-1.0, 1.0]]]).double()
    variance = torch.full_like(z, math.exp(-scale))  # to double precision for scales above 37
    assert_close(root_squared(Bernoulli(), z), torch.diag_embed(variance), rtol=1e-12, atol=1e-300)


def test_log_probabilities_give_the_fisher_of_their_logits():
    z = logits()
    assert_close(root_squared(Categorical(), z.log_softmax(-1)), output_fisher(Categorical(), z))


# Random signs through the root


def all_signs(columns: int, z: Tensor) -> list[Tensor]:
    """Every pattern of signs, each (columns, n, t)."""
    return [
        torch.tensor(signs).to(z)[:, None, None].expand(columns, *z.shape[:2])
        for signs in product((-1.0, 1.0), repeat=columns)
    ]


def expected_square(vectors: list[Tensor]) -> Tensor:
    return sum(v.unsqueeze(-1) * v.unsqueeze(-2) for v in vectors) / len(vectors)


@likelihoods
@given(generator=seeds, classes=st.integers(2, 6), scale=st.floats(0, 30))
def test_signed_columns_square_to_the_output_fisher_over_all_signs(
    likelihood, generator, classes, scale
):
    z = scale * normal(generator, 3, 2, classes)
    signed = [likelihood.signed(z, signs) for signs in all_signs(likelihood.columns(z), z)]
    assert_close(expected_square(signed), output_fisher(likelihood, z), **TOL)


@likelihoods
@given(generator=seeds, scale=st.floats(0, 30))
def test_signs_add_up_the_columns_of_the_root(likelihood, generator, scale):
    z = scale * normal(generator, 3, 2, 6)
    signs = normal(generator, likelihood.columns(z), 3, 2).sign()
    S = likelihood.root(z, 0, likelihood.columns(z))
    assert_close(likelihood.signed(z, signs), torch.einsum("rnt,rnty->nty", signs, S), **TOL)


@given(generator=seeds, classes=st.integers(2, 6), scale=st.floats(0, 30))
def test_the_most_probable_class_and_signs_over_the_rest_square_to_the_output_fisher(
    generator, classes, scale
):
    z = scale * normal(generator, 3, 2, classes)
    rest = [Categorical().signed_rest(z, signs) for signs in all_signs(classes - 1, z)]
    found = expected_square(rest) + expected_square([Categorical().top(z)])
    assert_close(found, output_fisher(Categorical(), z), **TOL)


def test_the_first_column_has_all_of_the_most_probable_class():
    z = logits()
    top = z.argmax(-1, keepdim=True)
    pi = z.softmax(-1).gather(-1, top)
    assert_close(Categorical().top(z).gather(-1, top), (pi * (1 - pi)).sqrt(), **TOL)
    for signs in all_signs(4, z):
        assert Categorical().signed_rest(z, signs).gather(-1, top).eq(0).all()


@pytest.mark.parametrize("gap", [50.0, 700.0, 1e4])
def test_signs_through_a_saturated_softmax_keep_the_digits_of_its_variance(gap):
    z = saturated(gap)
    pi = z.softmax(-1)
    variance = pi * ((1 - torch.eye(4, dtype=torch.float64)) @ pi.unsqueeze(-1)).squeeze(-1)
    signed = [Categorical().signed(z, signs) for signs in all_signs(3, z)]
    rest = [Categorical().signed_rest(z, signs) for signs in all_signs(3, z)]
    parted = expected_square(rest) + expected_square([Categorical().top(z)])
    for found in (expected_square(signed), parted):
        assert_close(found.diagonal(dim1=-2, dim2=-1), variance, rtol=1e-12, atol=0)


def spread_of_D(weight: Tensor, D: Tensor) -> Tensor:
    """Variance of estimates of D that have these probabilities, averaged over units."""
    mean = (weight.unsqueeze(-1) * D).sum(0)
    return (weight.unsqueeze(-1) * (D - mean) ** 2).sum(0).mean()


SPREADS = {  # of logits; for the cost of two backward columns: labels, signs, top and signs
    "flat": (0.0, ("signs", "labels", "top")),
    "peaked": (4.0, ("top", "signs", "labels")),
}


@pytest.mark.parametrize(("scale", "order"), SPREADS.values(), ids=SPREADS)
def test_which_two_columns_have_the_least_spread_depends_on_how_peaked_the_softmax_is(scale, order):
    generator = seeded(0)
    J = normal(generator, 10, 500)  # of 500 units at the logits of one sample
    found = dict.fromkeys(order, 0.0)
    for _ in range(10):
        z = scale * normal(generator, 1, 1, 10)
        pi, signs = z.softmax(-1)[0, 0], torch.cat(all_signs(9, z), 1)
        each = z.expand(signs.shape[1], 1, 10)  # a sample for every combination
        even = torch.full((len(each),), 1 / len(each)).double()
        labels = torch.eye(10).double() - pi
        signed = Categorical().signed(each, signs)[:, 0]
        rest = Categorical().signed_rest(each, signs)[:, 0]
        found["labels"] += spread_of_D(pi, (labels @ J) ** 2) / 2
        found["signs"] += spread_of_D(even, (signed @ J) ** 2) / 2
        found["top"] += spread_of_D(even, (rest @ J) ** 2)
        a = torch.cat(list(Categorical().root(z, 0, 9)[:, 0])) @ J
        closed_form = 2 * ((a**2).sum(0) ** 2 - (a**4).sum(0))
        assert_close(spread_of_D(even, (signed @ J) ** 2), closed_form.mean(), **TOL)
    assert tuple(sorted(found, key=found.__getitem__)) == order


# Drawn labels and scores


@likelihoods
def test_drawn_labels_have_a_score_of_mean_zero_and_the_fisher_as_covariance(likelihood):
    generator = seeded(0)
    z = logits(rows=1, classes=3).expand(DRAWS, 2, 3)
    score = likelihood.score(z, likelihood.sample(z, generator))
    products = score.unsqueeze(-1) * score.unsqueeze(-2)
    assert_mean(score, torch.zeros(2, 3).double())
    assert_mean(products, output_fisher(likelihood, z[:1])[0])


def assert_mean(draws: Tensor, expected: Tensor) -> None:
    standard_error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - expected).abs() <= 5 * standard_error + 1e-12).all()


@likelihoods
def test_labels_come_from_the_given_generator_alone(likelihood):
    z, before = logits(), torch.get_rng_state()
    first, again = (likelihood.sample(z, seeded(7)) for _ in range(2))
    assert_close(first, again, rtol=0, atol=0)
    assert torch.get_rng_state().equal(before)


LOG_LIKELIHOODS = {
    "categorical": (
        Categorical(),
        torch.tensor([[0, 4], [2, 2], [1, 0], [3, 1]]),
        lambda z, y: z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).sum(),
    ),
    "bernoulli": (
        Bernoulli(),
        torch.arange(40).reshape(4, 2, 5) % 2,
        lambda z, y: (y * torch.sigmoid(z).log() + (1 - y) * torch.sigmoid(-z).log()).sum(),
    ),
    "gaussian": (
        Gaussian(variance=0.3),
        torch.arange(40.0).reshape(4, 2, 5),
        lambda z, y: -((y - z) ** 2).sum() / 0.6,
    ),
}


@pytest.mark.parametrize(
    ("likelihood", "y", "log_likelihood"), LOG_LIKELIHOODS.values(), ids=LOG_LIKELIHOODS
)
def test_score_is_the_derivative_of_the_log_likelihood(likelihood, y, log_likelihood):
    z = logits()
    assert_close(likelihood.score(z, y), jacobian(lambda z: log_likelihood(z, y), z), **TOL)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.bool])
def test_class_indices_may_be_of_any_whole_type(dtype):
    z, y = logits(classes=2)[:, :1], torch.tensor([1, 0, 1, 1])
    assert_close(Categorical().score(z, y.to(dtype)), Categorical().score(z, y.long()))


# Shapes


SHAPES = {
    "classes": (Categorical(), (4, 3), (4, 1, 3)),
    "classes-at-positions": (Categorical(), (4, 2, 3), (4, 2, 3)),
    "one-bernoulli": (Bernoulli(), (4,), (4, 1, 1)),
    "bernoullis": (Bernoulli(), (4, 3), (4, 1, 3)),
    "image": (Gaussian(), (4, 2, 3, 5), (4, 1, 30)),
}


@pytest.mark.parametrize(("likelihood", "shape", "arranged"), SHAPES.values(), ids=SHAPES)
def test_outputs_become_samples_positions_and_logits(likelihood, shape, arranged):
    output = torch.arange(float(math.prod(shape))).reshape(shape)
    found = likelihood.arrange(output)
    assert found.shape == arranged
    assert found.flatten().equal(output.flatten())


BAD_OUTPUTS = {
    "one-class": (Categorical(), (4, 1), r"at least two classes.*\(4, 1\)"),
    "no-classes": (Categorical(), (4,), r"\(n, C\) or \(n, T, C\).*\(4,\)"),
    "image-of-classes": (Categorical(), (4, 3, 8, 8), r"\(4, 3, 8, 8\).*output="),
    "number": (Bernoulli(), (), r"'bernoulli'.*one row per sample.*\(\)"),
    "nothing": (Gaussian(), (0, 3), r"'gaussian'.*\(0, 3\)"),
}


@pytest.mark.parametrize(("likelihood", "shape", "message"), BAD_OUTPUTS.values(), ids=BAD_OUTPUTS)
def test_output_of_the_wrong_shape_is_refused(likelihood, shape, message):
    with pytest.raises(OutputError, match=message):
        likelihood.arrange(torch.zeros(shape))


BAD_TARGETS = {
    "one-hot": (Categorical(), (4, 1, 3), torch.zeros(4, 3, dtype=torch.long), r"\(4,\).*\(4, 3\)"),
    "too-few": (Categorical(), (4, 1, 3), torch.zeros(3, dtype=torch.long), r"\(4,\).*\(3,\)"),
    "one-for-all-positions": (
        Categorical(), (4, 2, 3), torch.zeros(4, dtype=torch.long), r"\(4, 2\), got \(4,\)"
    ),
    "classes-as-floats": (Categorical(), (4, 1, 3), torch.zeros(4), "class indices.*float32"),
    "class-too-many": (Categorical(), (4, 1, 3), torch.tensor([0, 1, 2, 3]), "0 to 2"),
    "ignored-class": (Categorical(), (4, 1, 3), torch.tensor([0, 1, 2, -100]), "-100"),
    "other-width": (Bernoulli(), (4, 1, 3), torch.zeros(4, 2), r"3 numbers.*4 samples.*\(4, 2\)"),
    "other-samples": (Gaussian(), (4, 1, 3), torch.zeros(3, 4), r"3 numbers.*\(3, 4\)"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("likelihood", "shape", "targets", "message"), BAD_TARGETS.values(), ids=BAD_TARGETS
)
def test_targets_that_do_not_fit_are_refused(likelihood, shape, targets, message):
    with pytest.raises(OutputError, match=message):
        likelihood.score(torch.zeros(shape), targets)


# Choice of a likelihood


NAMES = {"categorical": Categorical(), "bernoulli": Bernoulli(), "gaussian": Gaussian(1.0)}


@pytest.mark.parametrize(("name", "likelihood"), NAMES.items(), ids=NAMES)
def test_likelihoods_have_names(name, likelihood):
    assert likelihood_of(name) == likelihood


def test_likelihood_object_stands_for_itself():
    likelihood = Gaussian(variance=0.5)
    assert likelihood_of(likelihood) is likelihood


@pytest.mark.parametrize("choice", ["softmax", "Gaussian", Gaussian])
def test_unknown_likelihood_is_refused_with_the_valid_names(choice):
    with pytest.raises(ValueError, match="'categorical', 'bernoulli', 'gaussian'"):
        likelihood_of(choice)


@pytest.mark.parametrize("variance", [0.0, -1.0, math.nan])
def test_variance_must_be_positive(variance):
    with pytest.raises(ValueError, match="variance must be positive"):
        Gaussian(variance=variance)


@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian()], ids=["bernoulli", "gaussian"])
def test_some_columns_of_a_wide_output_take_no_more_than_they_are(likelihood):
    z = torch.zeros(2, 1, 200_000)  # whose whole root has 3e11 bytes
    root = likelihood.root(z, 199_998, 200_000)
    assert root.shape == (2, *z.shape)
    assert root.count_nonzero(-1).eq(1).all()
    assert root[:, 0, 0].argmax(-1).tolist() == [199_998, 199_999]
