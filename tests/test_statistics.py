"""A layer's statistics against the same numbers in numpy, from the reference's Fisher."""

import copy
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from measured import THEORY
from networks import Means, filled, inputs
from nonlinearities import OUTPUTS
from strategies import SHARINGS, TOL, all_sharings, normal, seeded
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.testing import assert_close

import unitfisher.condensed
from unitfisher import Gaussian, Monitor, SingularFisherError, UnitStatistics, unit_fisher
from unitfisher.memory import within


def measure(model: nn.Module, x: Tensor, y: Tensor | None = None, **options) -> UnitStatistics:
    """Statistics of the first layer."""
    with Monitor(model, **options) as monitor:
        return next(iter(monitor.measure(x, targets=y).values()))


def mlp(d: int, *, bias: bool = True) -> nn.Module:
    return filled(nn.Sequential(nn.Linear(d, 4, bias=bias), nn.ELU(), nn.Linear(4, 3)))


def sequence(*, bias: bool = True) -> nn.Module:
    layer = nn.Linear(3, 4, bias=bias)
    return filled(nn.Sequential(layer, nn.Tanh(), Means(), nn.Linear(4, 3)))


def convolution(groups: int = 1, *, bias: bool = True) -> nn.Module:
    layer = nn.Conv2d(2, 4, 2, groups=groups, bias=bias)
    return filled(nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)))


class Setting(NamedTuple):
    model: nn.Module
    x: Tensor
    damping: float = 1e-3


SETTINGS = {
    "more-cases-than-inputs": Setting(mlp(3), inputs(12, 3)),
    "no-damping": Setting(mlp(3), inputs(12, 3), damping=0.0),
    "fewer-cases": Setting(mlp(6), inputs(4, 6), damping=1e-2),
    "as-many-cases-as-inputs": Setting(mlp(4), inputs(4, 4), damping=1e-2),
    "one-case": Setting(mlp(3), inputs(1, 3), damping=1e-2),
    "no-bias": Setting(mlp(3, bias=False), inputs(12, 3)),
    "no-bias-fewer-cases": Setting(mlp(6, bias=False), inputs(4, 6), damping=1e-2),
    "sequence": Setting(sequence(), inputs(8, 4, 3)),
    "sequence-no-bias": Setting(sequence(bias=False), inputs(8, 4, 3)),
    "convolution": Setting(convolution(), inputs(6, 2, 3, 3)),
    "convolution-fewer-cases": Setting(convolution(), inputs(1, 2, 3, 3), damping=1e-2),
    "groups": Setting(convolution(groups=2), inputs(8, 2, 3, 3)),
    "groups-no-bias": Setting(convolution(groups=2, bias=False), inputs(8, 2, 3, 3)),
    "groups-fewer-cases": Setting(convolution(groups=2), inputs(1, 2, 3, 3), damping=1e-2),
}
SHARED = {  # without positions the sharings are one
    f"{name}-{sharing}": (setting, sharing)
    for name, setting in SETTINGS.items()
    for sharing in SHARINGS
    if setting.x.dim() > 2 or sharing == "expand" or name == "more-cases-than-inputs"
}
as_users = pytest.mark.usefixtures("as_users_run_it")  # quantities and angles are checked without
each_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
each_sharing = pytest.mark.parametrize(("setting", "sharing"), SHARED.values(), ids=SHARED)


class Expected(NamedTuple):
    """What the reference says of the first layer."""

    F: np.ndarray  # (u, d+1, d+1), damped
    A: np.ndarray  # (u, d, d), not damped; nor are b and c
    b: np.ndarray
    c: np.ndarray
    ridge: np.ndarray  # (u,)
    a: list[np.ndarray]  # (n, d) for every unit
    D: np.ndarray  # (n, u), of samples where the sharing joins their positions


@cache
def expected_of(setting: Setting, sharing: str = "expand") -> Expected:
    model, x = copy.deepcopy(setting.model), setting.x
    if model[0].bias is None:  # the Fisher beside that of the bias it does not have
        model[0].bias = nn.Parameter(torch.zeros(len(model[0].weight)).double())
    F = reference.unit_fisher(model, "0", x, sharing=sharing).numpy()
    A, b, c = F[:, :-1, :-1], F[:, :-1, -1], F[:, -1, -1]
    ridge = setting.damping * np.trace(A, axis1=1, axis2=2) / A.shape[1]
    damped = F + ridge[:, None, None] * np.diag([1.0] * A.shape[1] + [0.0])
    a, _ = reference.cases(model, "0", x, sharing="reduce" if sharing == "reduce" else "expand")
    _, D = reference.cases(model, "0", x, sharing="expand" if sharing == "expand" else "reduce")
    groups = a.numpy().reshape(-1, *a.shape[-2:])
    each = [groups[unit * len(groups) // len(F)] for unit in range(len(F))]
    return Expected(damped, A, b, c, ridge, each, D.numpy())


def measured(setting: Setting, y: Tensor | None = None, **options) -> UnitStatistics:
    return measure(setting.model, setting.x, y, damping=setting.damping, **options)


def labels(setting: Setting) -> Tensor:
    return torch.arange(len(setting.x)) % 3


def gradients(setting: Setting) -> tuple[Tensor, Tensor | None]:
    """Of the mean log-likelihood, in the shapes of weight and bias."""
    model, layer = setting.model, setting.model[0]
    loss = F.cross_entropy(model(setting.x), labels(setting))
    found = torch.autograd.grad(-loss, [p for p in (layer.weight, layer.bias) if p is not None])
    return found[0], (None if layer.bias is None else found[1])


def assert_equal_to(found: Tensor, expected: np.ndarray | list) -> None:
    assert_close(found, torch.as_tensor(np.asarray(expected)), **TOL)


def assert_same(found: UnitStatistics, expected: UnitStatistics, rows: object = ...) -> None:
    for name in NUMBERS:
        one, other = getattr(found, name), getattr(expected, name)
        other = other if other.shape == one.shape else other[rows]
        assert_close(one, other, equal_nan=True, **TOL)


NUMBERS = [
    *("c", "mean", "mean_q", "s", "k", "corrected_mean", "dead", "n_eff", "damping_share"),
    *("mean_share", "mean_share_q", "output_mean", "output_var", "cosine"),
    *("bias_shift_share_gradient", "bias_shift_share_natural"),
]


# The theorems' quantities


@each_sharing
def test_theorem_quantities_are_those_of_the_damped_reference_fisher(setting, sharing):
    found, expected = measured(setting, sharing=sharing), expected_of(setting, sharing)
    means = [a.mean(0) for a in expected.a]
    units = [reference.quantities(*pair) for pair in zip(expected.F, means, strict=True)]
    assert_equal_to(found.mean.expand(len(means), -1), means)
    assert_equal_to(found.mean_q, [unit["mu_q"] for unit in units])
    for name in ("c", "s", "k", "corrected_mean"):
        assert_equal_to(getattr(found, name), [unit[name] for unit in units])
    assert not found.dead.any()


@each_sharing
@as_users
def test_natural_gradient_solves_the_damped_reference_fisher(setting, sharing):
    found, F = measured(setting, sharing=sharing), expected_of(setting, sharing).F
    weight, bias = setting.model[0].weight, setting.model[0].bias
    generator = seeded(2)
    g = normal(generator, *weight.shape)
    g0 = None if bias is None else normal(generator, *bias.shape)
    dw, dw0 = found.natural_gradient(g, g0)
    assert dw.shape == weight.shape
    assert (dw0 is None) == (bias is None)
    F = F if bias is not None else F[:, :-1, :-1]  # A⁻¹ g without a bias
    rhs = reference.joined(g, g0).numpy()
    assert_equal_to(reference.joined(dw, dw0), np.linalg.solve(F, rhs[:, :, None])[:, :, 0])


@each_sharing
@as_users
def test_damping_share_is_the_penalty_of_the_ridge_regression_of_one(setting, sharing):
    found, expected = measured(setting, sharing=sharing), expected_of(setting, sharing)
    shares = []
    for A, b, c, ridge in zip(expected.A, expected.b, expected.c, expected.ridge, strict=True):
        v = np.linalg.solve((A + ridge * np.eye(len(b))) / c, b / c)  # of 1 on a, no intercept
        misfit = 1 - 2 * v @ b / c + v @ A @ v / c  # E_q (1 - aᵀv)²
        penalty = ridge / c * v @ v
        shares.append(penalty / (misfit + penalty))
    assert_equal_to(found.damping_share, shares)


def test_misfit_of_that_regression_is_an_average_over_weighted_cases():
    setting = SETTINGS["fewer-cases"]
    found, expected = measured(setting), expected_of(setting)
    for unit, a in enumerate(expected.a):
        q = expected.D[:, unit] / expected.D[:, unit].sum()
        epsilon = expected.ridge[unit] / expected.D[:, unit].mean()
        v = np.linalg.solve((a.T * q) @ a + epsilon * np.eye(a.shape[1]), q @ a)
        penalty = epsilon * v @ v
        share = penalty / (q @ (1 - a @ v) ** 2 + penalty)
        assert found.damping_share[unit].item() == pytest.approx(share)


@each_sharing
@as_users
def test_effective_cases_and_mean_shares_have_no_damping_in_them(setting, sharing):
    found, expected = measured(setting, sharing=sharing), expected_of(setting, sharing)
    mean_shares = [(a.mean(0) ** 2).sum() / (a**2).sum(1).mean() for a in expected.a]
    mu_q = expected.b / expected.c[:, None]
    second_moments = np.trace(expected.A, axis1=1, axis2=2) / expected.c  # E_q‖a‖²
    assert_equal_to(found.n_eff, expected.D.sum(0) ** 2 / (expected.D**2).sum(0))
    assert_equal_to(found.mean_share.expand(len(mu_q)), mean_shares)
    assert_equal_to(found.mean_share_q, (mu_q**2).sum(1) / second_moments)


# Angles and shares of a gradient


@each_setting
@as_users
def test_gradient_taken_with_labels_is_that_of_the_mean_log_likelihood(setting):
    found = measured(setting, labels(setting)).gradient
    g, g0 = gradients(setting)
    assert_close(found.g, g.flatten(1), **TOL)
    if g0 is not None:
        assert_close(found.g0, g0, **TOL)


def test_gradient_of_a_label_per_position_is_a_sum_over_positions():
    model, x = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))), inputs(5, 2, 3)
    y = torch.arange(10).reshape(5, 2) % 3
    found = measure(model, x, y).gradient
    loss = F.cross_entropy(model(x).mT, y, reduction="none").sum(1).mean()
    g, g0 = torch.autograd.grad(-loss, [model[0].weight, model[0].bias])
    assert_close(found, (g, g0), **TOL)


@each_sharing
def test_angles_and_bias_shift_shares_are_those_of_the_gradient_and_its_step(setting, sharing):
    found = measured(setting, labels(setting), sharing=sharing)
    g, g0 = gradients(setting)
    step = found.natural_gradient(g, g0)
    means = found.mean.expand(len(g), -1).numpy()
    v, w = (reference.joined(*pair).numpy() for pair in ((g, g0), step))
    if g0 is not None:
        means = np.append(means, np.ones((len(g), 1)), axis=1)
    assert_equal_to(found.cosine, cosines(v, w))
    assert_equal_to(found.bias_shift_share_gradient, np.abs(cosines(means, v)))
    assert_equal_to(found.bias_shift_share_natural, np.abs(cosines(means, w)))


def cosines(v: np.ndarray, w: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(v, axis=1) * np.linalg.norm(w, axis=1)
    return (v * w).sum(1) / lengths


def test_angles_are_unknown_without_a_gradient():
    found = measured(SETTINGS["more-cases-than-inputs"])
    shares = [found.bias_shift_share_gradient, found.bias_shift_share_natural]
    assert torch.stack([found.cosine, *shares]).isnan().all()


# The same measurement in other ways


@each_sharing
@as_users
def test_damping_afterwards_equals_measuring_at_that_damping(setting, sharing):
    y = labels(setting)
    found = measured(setting, y, sharing=sharing).damped(0.1)
    assert found.damping == 0.1
    assert_same(found, measured(setting._replace(damping=0.1), y, sharing=sharing))
    assert_same(found.damped(setting.damping), measured(setting, y, sharing=sharing))


@each_sharing
@as_users
def test_parts_of_the_units_give_what_all_at_once_give(monkeypatch, setting, sharing):
    y = labels(setting)
    whole = measured(setting, y, sharing=sharing)
    monkeypatch.setattr(unitfisher.condensed, "units_together", lambda *_: 3)  # and one is left
    assert_same(measured(setting, y, sharing=sharing), whole)


@pytest.mark.parametrize("name", ["more-cases-than-inputs", "fewer-cases", "groups"])
def test_memory_decides_how_many_units_are_taken_at_a_time(name):
    held = measured(SETTINGS[name]).alone.held
    assert len(list(held.parts())) == 1
    with within(1):
        assert len(list(held.parts())) == 4


@each_sharing
@as_users
def test_sample_of_units_has_the_rows_of_those_units(setting, sharing):
    y = labels(setting)
    whole, some = (
        measured(setting, y, sharing=sharing),
        measured(setting, y, sharing=sharing, units=2),
    )
    assert len(some.units) == 2
    assert_same(some, whole, rows=some.units)


# Units known on paper


def assert_cases_weigh(D: Tensor, model: nn.Module, x: Tensor, **options) -> UnitStatistics:
    F = next(iter(unit_fisher(model, x, **options).values()))
    found = measure(model, x, **options, damping=0.0)
    assert_close(F, reference.weighted_fisher(x, D), **TOL)
    assert_close(found.c, D.mean(0), **TOL)
    assert_close(found.mean_q, (D.T @ x) / D.sum(0)[:, None], **TOL)
    return found


def test_gaussian_linear_unit_has_the_precision_of_its_noise_and_no_correction():
    model, x = filled(nn.Linear(3, 2)), inputs(12, 3)
    D = torch.full((12, 2), 2.5).double()
    found = assert_cases_weigh(D, model, x, likelihood=Gaussian(variance=0.4))
    mean, spread = x.mean(0), torch.cov(x.T, correction=0)
    assert_close(found.k, torch.zeros(2).double(), **TOL)
    assert_close(found.corrected_mean, torch.zeros(2, 3).double(), **TOL)
    m = mean @ torch.linalg.solve(spread, mean)
    assert_close(found.s, (0.4 * (1 + m)).expand(2), **TOL)
    assert_close(found.n_eff, torch.full((2,), 12.0).double(), **TOL)


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
def test_logit_unit_weighs_a_case_by_the_variance_of_its_label(likelihood):
    model, x = filled(nn.Linear(3, 4)), inputs(12, 3)
    z = model(x).detach()
    pi = z.softmax(-1) if likelihood == "categorical" else z.sigmoid()
    assert_cases_weigh(pi * (1 - pi), model, x, likelihood=likelihood)


def test_hidden_unit_weighs_cases_by_slope_and_outgoing_weights():
    model, x = SETTINGS["more-cases-than-inputs"][:2]
    net, pi, v = model[0](x).detach(), model(x).detach().softmax(-1), model[2].weight.detach()
    slope = torch.where(net > 0, 1.0, net.exp())
    variance = pi @ v**2 - (pi @ v) ** 2  # vᵀ (diag π - π πᵀ) v for every unit
    assert_cases_weigh(slope**2 * variance, model, x)


# Outputs of the units, after the nonlinearity


@pytest.mark.parametrize(("model", "function", "name"), OUTPUTS.values(), ids=OUTPUTS)
def test_output_statistics_are_taken_after_the_nonlinearity(model, function, name):
    layer = next(m for m in filled(model).modules() if isinstance(m, nn.Linear))
    x = inputs(7, 3)
    found = measure(model, x, layers=nn.Linear)
    y = function(layer(x)).detach()
    assert found.nonlinearity == name
    assert_close(found.output_mean, y.mean(0), **TOL)
    assert_close(found.output_var, y.var(0, correction=0), **TOL)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.elu(self.cell(F.elu(self.cell(x)))))


def test_output_statistics_of_a_layer_called_twice_join_its_calls():
    model, x = filled(Twice()), inputs(7, 3)
    found = measure(model, x)
    first = F.elu(model.cell(x))
    y = torch.cat([first, F.elu(model.cell(first))]).detach()
    assert_close(found.output_mean, y.mean(0), **TOL)
    assert_close(found.output_var, y.var(0, correction=0), **TOL)


@pytest.mark.parametrize("groups", [1, 2])
def test_output_statistics_of_a_convolution_are_those_of_its_channels(groups):
    model, x = convolution(groups), inputs(5, 2, 3, 3)
    found = measure(model, x, units=3)
    y = model[0](x).tanh().detach().mT.flatten(2).transpose(0, 1).flatten(1)[found.units]
    assert_close(found.output_mean, y.mean(1), **TOL)
    assert_close(found.output_var, y.var(1, correction=0), **TOL)


# Dead units, inputs that never change, and bad use


@all_sharings
@pytest.mark.parametrize("n", [12, 3])
def test_dead_unit_is_nan_and_does_not_touch_its_neighbours(n, sharing):
    model, x = filled(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))), inputs(n, 3)
    model[0].bias.data = torch.tensor([-100.0, 5, 5, 5]).double()
    found = measure(model, x, labels(Setting(model, x)), sharing=sharing)
    alone = copy.deepcopy(model)
    alone[0].weight.data, alone[0].bias.data = alone[0].weight[1:], alone[0].bias[1:]
    alone[2].weight.data = alone[2].weight[:, 1:]
    assert found.dead.tolist() == [True, False, False, False]
    assert found.c[0] == 0
    for name in THEORY:
        assert getattr(found, name)[0].isnan().all()
    assert not torch.cat([part[:1].flatten() for part in found.natural_gradient(*ones())]).any()
    without = measure(alone, x, labels(Setting(model, x)), sharing=sharing)
    assert_same(without, found, rows=slice(1, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bias_that_moves_nothing_is_dead_and_no_rounding_alive(dtype):
    """Instance normalisation takes a unit's mean away: Σ_t δ is zero but for rounding."""
    torch.manual_seed(0)
    layers = nn.Conv1d(2, 4, 3), nn.InstanceNorm1d(4), nn.ELU(), nn.Flatten(), nn.Linear(24, 3)
    model = nn.Sequential(*layers).to(dtype)
    monitor = Monitor(model, every=1, sharing="joint")
    x = torch.randn(16, 2, 8, dtype=dtype)
    model(x).logsumexp(-1).mean().backward()
    of, step = monitor.latest["0"], monitor.natural_gradient()["0"]
    assert of.dead.all()
    assert not of.c.any()
    for name in THEORY:
        assert getattr(of, name).isnan().all()
    assert not monitor.latest["4"].dead.any()
    F = reference.unit_fisher(model, "0", x, sharing="joint")[:, :-1, :-1]
    damped = reference.damped(F, 1e-3, biased=False)
    expected = torch.linalg.solve(damped, model[0].weight.grad.flatten(1).double())
    assert_close(step.dw.flatten(1).double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max())
    assert not step.dw0.any()


def ones() -> tuple[Tensor, Tensor]:
    return torch.ones(4, 3).double(), torch.ones(4).double()


@pytest.mark.parametrize("n", [12, 2])
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_inputs_that_never_change_are_no_obstacle_to_a_damped_step(n, value):
    model, x = mlp(3), torch.full((n, 3), value).double()
    found = measure(model, x, damping=1e-2)
    assert_close(found.mean, x[0])
    assert_close(found.k, torch.zeros(4).double(), rtol=0, atol=1e-9)
    assert (found.mean_share_q.isnan() if value == 0 else found.mean_share_q == 1).all()
    assert all(part.isfinite().all() for part in found.natural_gradient(*ones()))


ROUTES = {
    "rows": ((10, 20), "auto"),
    "sums": ((40, 3), "direct"),
    "products": ((40, 3), "iterative"),
}


@pytest.mark.parametrize("damping", [-0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("route", ROUTES)
def test_no_route_takes_a_damping_that_is_negative_or_not_finite(route, damping):
    size, solver = ROUTES[route]
    m = measure(mlp(size[1]), inputs(*size), solver=solver)
    assert m.route == route
    with pytest.raises(ValueError, match="damping must be 0 or more and finite"):
        m.damped(damping)


@all_sharings
@pytest.mark.parametrize("n", [2, 3])
def test_undamped_layer_with_too_few_cases_is_named(n, sharing):
    with pytest.raises(SingularFisherError, match="unit 0 in layer '0' is singular.*damp it"):
        measure(mlp(8), inputs(n, 8), damping=0.0, sharing=sharing)


BAD_GRADIENTS = {
    "other-width": ((4, 2), (4,), r"'0' measured \(4, 3\).*\(4, 2\)"),
    "other-units": ((3, 3), (3,), r"'0' measured \(4, 3\).*\(3, 3\)"),
    "no-bias-gradient": ((4, 3), None, "its bias.*no bias gradient"),
}


@pytest.mark.parametrize(("size", "size0", "message"), BAD_GRADIENTS.values(), ids=BAD_GRADIENTS)
def test_gradient_that_does_not_fit_the_layer_is_refused(size, size0, message):
    found = measured(SETTINGS["more-cases-than-inputs"])
    g0 = None if size0 is None else torch.ones(size0)
    with pytest.raises(ValueError, match=message):
        found.natural_gradient(torch.ones(size), g0)


def test_bias_gradient_for_a_layer_without_bias_is_refused():
    found = measured(SETTINGS["no-bias"])
    with pytest.raises(ValueError, match="no bias"):
        found.natural_gradient(*ones())


# Single precision


class Gated(nn.Module):
    """Its errors are the gates, whatever the activations: what is left is the statistics."""

    def __init__(self, d: int, units: int) -> None:
        super().__init__()
        self.layer = nn.Linear(d, units)

    def forward(self, a: Tensor, gate: Tensor) -> Tensor:
        z = self.layer(a) * gate
        return z if z.dim() == 2 else z.sum(1)


def far_from_zero(*size: int) -> Tensor:
    """Mean 1000 and standard deviation 1 in steps of 1/64: exact in single precision."""
    return (1000 + (64 * normal(seeded(3), *size)).round() / 64).float()


def gated(*size: int) -> tuple[nn.Module, tuple[Tensor, Tensor], str]:
    a, units = far_from_zero(*size), 4
    direction = normal(seeded(4), size[-1], units) / size[-1] ** 0.5
    gate = ((a.double() - 1000) @ direction / 2).exp().float()
    return Gated(size[-1], units), (a, gate), "gaussian"


def logits(n: int, d: int) -> tuple[nn.Module, tuple[Tensor], str]:
    """Weights in steps of 1/32 that sum to zero: the logits are exact and do not saturate."""
    layer = nn.Linear(d, 4, bias=True)
    weight = (4 * normal(seeded(0), 4, d)).round() / 32
    layer.weight.data = torch.cat([weight[:, 1:], -weight[:, 1:].sum(1, keepdim=True)], 1).float()
    layer.bias.data.zero_()
    return layer, (far_from_zero(n, d),), "categorical"


FAR = {
    "gated": (*gated(200, 8), 1e-3),
    "gated-no-damping": (*gated(200, 8), 0.0),
    "gated-fewer-cases": (*gated(6, 16), 1e-3),
    "gated-fewer-cases-weak-damping": (*gated(6, 16), 1e-9),
    "gated-positions": (*gated(40, 3, 8), 1e-3),
    "gated-positions-no-damping": (*gated(40, 3, 8), 0.0),
    "gated-many-positions": (*gated(12, 100, 4), 0.0),
    "logits": (*logits(200, 8), 1e-3),
    "logits-no-damping": (*logits(200, 8), 0.0),
    "logits-fewer-cases": (*logits(6, 16), 1e-3),
}


@all_sharings
@pytest.mark.parametrize(("model", "x", "likelihood", "damping"), FAR.values(), ids=FAR)
def test_single_precision_keeps_its_digits_at_a_mean_of_a_thousand(
    model, x, likelihood, damping, sharing
):
    double, x_double = copy.deepcopy(model).double(), tuple(part.double() for part in x)
    noise = normal(seeded(5), len(x[0]), 4)
    y = noise.argmax(1) if likelihood == "categorical" else double(*x_double).detach() + noise
    options = {"likelihood": likelihood, "damping": damping, "sharing": sharing}
    single, double = measure(model, x, y, **options), measure(double, x_double, y, **options)
    for name in ("s", "k", "mean_q", "corrected_mean", "damping_share"):
        assert_within_1e_4(getattr(single, name), getattr(double, name))
    other = normal(seeded(6), 4, x[0].shape[-1] + 1).float()
    for g, g0 in [double.gradient, (other[:, :-1], other[:, -1])]:
        step, exact = single.natural_gradient(g, g0), double.natural_gradient(g, g0)
        for found, expected in zip(step, exact, strict=True):
            assert_within_1e_4(found, expected)


def assert_within_1e_4(found: Tensor, expected: Tensor) -> None:
    found, expected = (x.double().reshape(len(x), -1) for x in (found, expected))
    error = vector_norm(found - expected, dim=1)
    assert (error <= 1e-4 * vector_norm(expected, dim=1)).all()


def deviations(x: Tensor, damping: float, seed: int) -> dict[str, float]:
    """How far a float32 measurement of an MLP's first layer is from one in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(x.shape[1], 16), nn.ELU(), nn.Linear(16, 4))
    model[0].weight.data -= model[0].weight.data.mean(1, keepdim=True)  # outputs stay near zero
    y, found = torch.arange(len(x)) % 4, []
    for each, a in ((model, x), (copy.deepcopy(model).double(), x.double())):
        with Monitor(each, layers="0", damping=damping) as monitor:
            measured = monitor.measure(a)["0"]
        F.cross_entropy(each(a), y).backward()
        found.append((measured, (each[0].weight.grad, each[0].bias.grad)))
    (single, own), (double, exact) = found
    expected = double.natural_gradient(*exact)
    steps = {"dw": single.natural_gradient(*exact), "dw_own": single.natural_gradient(*own)}
    return {
        "s": float((single.s / double.s - 1).abs().max()),
        "k": float(((single.k - double.k) / (1 + double.k).abs().clamp_min(1)).abs().max()),
        **{
            name: float(
                (vector_norm(step.dw - expected.dw, dim=1) / vector_norm(expected.dw, dim=1)).max()
            )
            for name, step in steps.items()
        },
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cases", [20, 500])
def test_in_single_precision_a_mean_of_a_thousand_costs_what_the_readme_says(cases, seed):
    x = 1000 + normal(seeded(seed), cases, 40).float()
    found = deviations(x, 1e-3, seed)
    assert max(found["s"], found["k"], found["dw"]) <= 1e-3
    assert found["dw_own"] <= 1e-2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("damping", [1e-3, 1e-4])
@pytest.mark.parametrize("cases", [16, 500])
def test_in_single_precision_a_low_rank_costs_what_the_readme_says(cases, damping, seed):
    generator = seeded(seed)
    x = (normal(generator, cases, 5) @ normal(generator, 5, 64)).float()
    found = deviations(x, damping, seed)
    assert max(found["s"], found["k"]) <= 1e-7 / damping
    assert found["dw"] <= 1e-6 / damping
    assert found["dw_own"] <= 1e-5 / damping
