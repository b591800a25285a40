"""The operator view of one unit's Fisher against dense matrices, exact fractions and scipy."""

import copy
import math
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import reference
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Means, filled
from reference import damped, joined
from strategies import SHARINGS, TOL, normal, orthogonal, seeded
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import unitfisher.operator
from unitfisher import Monitor, NonFiniteError, SingularFisherError, UnitStatistics, unit_fisher
from unitfisher.cases import UnitCases
from unitfisher.condensed import Condensed
from unitfisher.operator import UnitFisherOperator, unit_fisher_operator

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
biases = pytest.mark.parametrize("bias", [True, False])


def network(kind: str, d: int, bias: bool) -> tuple[nn.Module, tuple[int, ...]]:
    """Return a network and the size of a sample; its first layer has 4 units of d or 4·d inputs."""
    if kind == "mlp":
        first, rest, size = nn.Linear(d, 4, bias=bias), nn.Identity(), (d,)
    elif kind == "sequence":
        first, rest, size = nn.Linear(d, 4, bias=bias), Means(), (3, d)
    else:
        groups = 2 if kind == "groups" else 1
        first = nn.Conv2d(2 * d, 4, (1, 2), groups=groups, bias=bias)
        rest, size = nn.Flatten(2), (2 * d, 1, 3)
        rest = nn.Sequential(rest, nn.Flatten(), nn.Linear(8, 4))
    return nn.Sequential(first, nn.Tanh(), rest, nn.Linear(4, 3)), size


class Case(NamedTuple):
    """A network whose first layer is measured, and the operator of one of its units."""

    model: nn.Module
    x: Tensor
    sharing: str = "expand"
    damping: float = 1e-3
    unit: int = 0

    @property
    def biased(self) -> bool:
        return self.model[0].bias is not None

    def measured(self, **options) -> UnitStatistics:
        with Monitor(self.model, layers="0", sharing=self.sharing, **options) as monitor:
            return monitor.measure(self.x)["0"]

    def operator(self) -> UnitFisherOperator:
        return unit_fisher_operator(self.measured(), self.unit, damping=self.damping)


class Setting(NamedTuple):
    kind: str
    sharing: str
    bias: bool


SETTINGS = [
    Setting(kind, sharing, bias)
    for kind in ("mlp", "sequence", "convolution", "groups")
    for sharing in SHARINGS
    for bias in (True, False)
    if kind != "mlp" or sharing == "expand"  # without positions the sharings are one
]
each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(map(str, s)))
in_each = settings(max_examples=settings.default.max_examples // 5)  # there are 20


class Drawn(NamedTuple):
    """What a law is checked on in every setting."""

    d: int
    n: int
    mean: float
    seed: int
    damping: float
    unit: int

    def case(self, setting: Setting) -> Case:
        model, size = network(setting.kind, self.d, setting.bias)
        generator = seeded(self.seed)
        filled(model, generator)
        x = self.mean * normal(generator, *size) + normal(generator, self.n, *size)
        return Case(model, x, setting.sharing, self.damping, self.unit)


def draws(*dampings: float) -> st.SearchStrategy[Drawn]:
    sizes = st.integers(1, 4), st.integers(1, 12)
    values = st.floats(-3, 3), st.integers(0, 2**32 - 1), st.sampled_from(dampings)
    return st.builds(Drawn, *sizes, *values, st.integers(0, 3))


def vectors(F: UnitFisherOperator, *size: int) -> Tensor:
    return normal(seeded(1), F.shape[0], *size)


def gaussian(x: Tensor, *, bias: bool, damping: float = 0.0) -> UnitFisherOperator:
    """F = E (x; 1) (x; 1)ᵀ: that of a unit which is the output, with variance 1."""
    model = nn.Linear(x.shape[1], 2, bias=bias).to(x.dtype)
    measured = Monitor(model, likelihood="gaussian").measure(x)[""]
    return unit_fisher_operator(measured, 1, damping=damping)


def spectrum(n: int, values: Tensor) -> Tensor:
    """Return n inputs with E x xᵀ of these eigenvalues, in random directions, and mean zero."""
    generator, d = seeded(2), len(values)
    half = torch.linalg.qr(normal(generator, n // 2, d)).Q * (n / 2) ** 0.5
    return torch.cat([half, -half]) * values.sqrt() @ orthogonal(generator, d)


# Laws


@each_setting
@in_each
@given(drawn=draws(0.0, 1e-3, 1.0))
def test_the_operator_is_the_damped_block_of_the_independent_reference(setting, drawn):
    case = drawn.case(setting)
    F, block = case.operator(), reference.unit_fisher(case.model, "0", case.x, sharing=case.sharing)
    expected = damped(block[case.unit], case.damping, biased=case.biased)
    assert_close(F.dense(), expected, **TOL)
    assert (F.shape, F.dtype, F.device) == (expected.shape, torch.float64, case.x.device)
    assert (F.layer, F.unit, F.biased) == ("0", case.unit, case.biased)


@each_setting
@in_each
@given(drawn=draws(0.0, 1e-3, 1.0))
def test_products_are_those_of_the_damped_block_of_the_package(setting, drawn):
    case = drawn.case(setting)
    block = unit_fisher(case.model, case.x, layers="0", sharing=case.sharing)["0"][case.unit]
    F, expected = case.operator(), damped(block, case.damping, biased=case.biased)
    v = vectors(F, 3)
    assert_close(F @ v, expected @ v, **CLOSE)
    assert_close(F.matmat(v), F @ v)
    assert_close(F.matvec(v[:, 0]), (F @ v)[:, 0], **CLOSE)
    assert_close(F @ v[:, 0].float(), F @ v[:, 0].float().double())
    assert_close(F.dense(), expected, **CLOSE)
    assert_close(F.diagonal(), expected.diagonal(), **CLOSE)
    assert F.trace() == pytest.approx(expected.trace().item())


@each_setting
@in_each
@given(drawn=draws(0.0, 1e-3, 1.0))
def test_the_operator_is_symmetric_and_its_spectrum_that_of_the_matrix(setting, drawn):
    F = drawn.case(setting).operator()
    u, v = vectors(F, 2).T
    assert_close(u @ (F @ v), v @ (F @ u), **CLOSE)
    assert v @ (F @ v) >= 0
    found, dense = F.top_eigenvalues(F.shape[0]), F.dense().numpy()
    expected = np.linalg.eigvalsh(dense)[::-1].clip(0)
    assert_close(found, torch.tensor(expected.copy()), rtol=1e-9, atol=1e-12 * F.trace())
    assert (found >= 0).all()
    assert_close(F.top_eigenvalues(1), found[:1])
    if drawn.damping:
        assert F.condition_number() == pytest.approx(np.linalg.cond(dense))
    p = (expected / expected.sum())[expected > 0]
    assert F.effective_rank() == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    assert 1 - 1e-9 <= F.effective_rank() <= F.shape[0] + 1e-9


@each_setting
@in_each
@given(drawn=draws(1e-3, 0.1, 1.0))
def test_solve_is_the_inverse(setting, drawn):
    F = drawn.case(setting).operator()
    v = vectors(F, 3)
    assert_close(F.solve(F @ v), v, rtol=1e-7, atol=1e-7)
    assert_close(F @ F.solve(v), v, rtol=1e-7, atol=1e-7)
    assert_close(F.solve(v[:, 0]), F.solve(v)[:, 0], **CLOSE)
    expected = torch.tensor(np.linalg.solve(F.dense().numpy(), v.numpy()))
    assert_close(F.solve(v), expected, rtol=1e-9, atol=1e-9 * expected.norm().item())


@each_setting
@in_each
@given(drawn=draws(1e-3, 0.1, 1.0))
def test_solve_is_the_natural_gradient_of_the_monitor(setting, drawn):
    case = drawn.case(setting)
    measured, weight = case.measured(damping=case.damping), case.model[0].weight
    g = normal(seeded(3), *weight.shape)
    g0 = g.flatten(1)[:, 0] if case.biased else None
    dw, dw0 = measured.natural_gradient(g, g0)
    rhs, expected = (joined(*pair)[case.unit] for pair in ((g, g0), (dw, dw0)))
    found = unit_fisher_operator(measured, case.unit).solve(rhs)  # at the Monitor's damping
    assert_close(found, expected, rtol=1e-6, atol=1e-6 * expected.norm().item())


@biases
def test_with_observed_labels_it_is_the_empirical_fisher(bias):
    model, size = network("sequence", 2, bias)
    x, y = normal(seeded(15), 9, *size), torch.arange(9) % 3
    for sharing in SHARINGS:
        with Monitor(model.double(), layers="0", fisher="empirical", sharing=sharing) as monitor:
            F = unit_fisher_operator(monitor.measure(x, targets=y)["0"], 3, damping=0.1)
        expected = reference.unit_fisher_empirical(model, "0", x, y, sharing=sharing)[3]
        assert_close(F.dense(), damped(expected, 0.1, biased=bias), **TOL)


@biases
def test_columns_of_cases_without_positions_fold(bias):
    generator = seeded(17)
    a, delta = normal(generator, 1, 9, 1, 3), normal(generator, 2, 9, 1, 4)
    measured = Case(network("mlp", 3, bias)[0], torch.ones(9, 3)).measured()
    F = unit_fisher_operator(with_cases(measured, a, delta), 1, damping=0.0)
    rows = torch.cat([a[0, :, 0], torch.ones(9, 1).double()], 1)[:, : F.shape[0]]
    D = (delta[:, :, 0, 1] ** 2).sum(0)
    assert_close(F.dense(), (rows.T * D) @ rows / 9, **CLOSE)
    assert len(F.R) == 9


# Scipy


@each_setting
@in_each
@given(drawn=draws(0.1, 1.0))
def test_scipy_solves_and_finds_eigenvalues_with_it(setting, drawn):
    F = drawn.case(setting).operator()
    view, b = F.to_scipy(), vectors(F).numpy()
    x, failed = scipy.sparse.linalg.cg(view, b, rtol=1e-12, maxiter=1000)
    assert not failed
    expected = F.solve(torch.tensor(b))
    assert_close(torch.tensor(x), expected, rtol=1e-6, atol=1e-6 * expected.norm().item())
    if F.shape[0] > 1:
        (top,) = scipy.sparse.linalg.eigsh(view, 1, return_eigenvectors=False)
        assert_close(torch.tensor([top]), F.top_eigenvalues(1), **CLOSE)


def test_the_view_for_scipy_is_the_operator_in_numpy():
    F = gaussian(spectrum(8, torch.tensor([3.0, 2.0, 1.0]).double()), bias=True, damping=0.1)
    view, v = F.to_scipy(), np.arange(8.0).reshape(2, 4).T
    assert isinstance(view, scipy.sparse.linalg.LinearOperator)
    assert (view.shape, view.dtype) == ((4, 4), np.float64)
    expected = F.dense().numpy() @ v
    np.testing.assert_allclose(view @ v, expected, rtol=1e-12)
    np.testing.assert_allclose(view.rmatmat(v), expected, rtol=1e-12)
    np.testing.assert_allclose(view @ v[:, 1], expected[:, 1], rtol=1e-12)
    np.testing.assert_allclose(view.rmatvec(v[::-1, 1]), F.dense().numpy() @ v[::-1, 1])
    np.testing.assert_allclose(view @ v[:, :1], expected[:, :1], rtol=1e-12)


def test_without_scipy_the_error_says_how_to_get_it(monkeypatch):
    F = gaussian(torch.ones(2, 3), bias=True)
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        F.to_scipy()


def test_scipy_is_imported_by_who_asks_for_it_only():
    code = "import sys, unitfisher.operator; sys.exit('scipy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@biases
def test_with_many_rows_and_inputs_lanczos_finds_the_same(bias, monkeypatch):
    F = gaussian(spectrum(80, torch.arange(40.0).double() ** 2), bias=bias, damping=1e-3)
    by_lapack = copy.copy(F).top_eigenvalues(2)
    monkeypatch.setattr(unitfisher.operator, "LAPACK_SIDE", 39)
    found = F.top_eigenvalues(2)
    assert "eigenvalues" not in vars(F)
    assert_close(found, by_lapack, **CLOSE)
    assert_close(F.top_eigenvalues(30), copy.copy(F).eigenvalues[:30], **CLOSE)


# Known spectra


@pytest.mark.parametrize("n", [8, 30])
def test_identity_like_inputs_have_the_full_effective_rank(n):
    x = 2 * spectrum(n, torch.ones(4).double())
    assert gaussian(x, bias=False).effective_rank() == pytest.approx(4)
    assert gaussian(x / 2, bias=True).effective_rank() == pytest.approx(5)
    assert gaussian(x, bias=False).condition_number() == pytest.approx(1)


@biases
@pytest.mark.parametrize("n", [1, 3, 9])
def test_one_input_over_and_over_has_rank_one(n, bias):
    F = gaussian(torch.tensor([[3.0, -4.0, 1.0, 2.0]]).expand(n, 4), bias=bias)
    assert F.effective_rank() == pytest.approx(1)
    assert F.condition_number() == math.inf
    assert_close(F.top_eigenvalues(2), torch.tensor([30.0 + bias, 0.0]).double(), **CLOSE)


def test_an_effective_rank_weighs_eigenvalues_by_their_entropy():
    F = gaussian(spectrum(12, torch.tensor([1.0, 3.0]).double()), bias=False)
    assert F.effective_rank() == pytest.approx(4 / 3**0.75)  # exp H(1/4, 3/4)


@pytest.mark.parametrize("condition", [1e4, 1e8, 1e12])
@biases
def test_an_ill_conditioned_fisher_is_known_and_solved(condition, bias):
    values = torch.tensor([condition, condition**0.5, 7.0, 1.0]).double()
    x = spectrum(20, values)
    F = gaussian(x, bias=bias)
    assert F.condition_number() == pytest.approx(condition, rel=1e-16 * condition**0.5 * 1e3)
    assert_close(F.top_eigenvalues(2), values[:2], **CLOSE)
    expected = normal(seeded(4), F.shape[0])
    error = (F.solve(F @ expected) - expected).norm() / expected.norm()
    assert error < 1e-15 * condition


@pytest.mark.parametrize("damping", [1.0, 1e-4, 1e-8])
@biases
def test_fewer_rows_than_inputs_are_known_and_solved(damping, bias):
    x = torch.zeros(2, 6).double()
    x[0, :2], x[1, :2] = torch.tensor([3.0, 4.0]).double(), torch.tensor([-3.0, -4.0]).double()
    F, ridge = gaussian(x, bias=bias, damping=damping), damping * 25 / 6
    expected = torch.tensor([25 + ridge, 1.0, *[ridge] * 5] if bias else [25 + ridge, *[ridge] * 5])
    expected = expected.double().sort(descending=True).values
    assert_close(F.top_eigenvalues(F.shape[0]), expected, rtol=1e-6, atol=0)
    assert F.condition_number() == pytest.approx((25 + ridge) / min(ridge, 1 if bias else ridge))
    rhs = torch.tensor([4.0, -3.0, 1.0, 0.0, 0.0, 0.0, 5.0][: F.shape[0]]).double()  # not seen
    assert_close(F.solve(rhs)[:6], rhs[:6] / ridge, rtol=1e-7, atol=1e-7)
    assert_close(
        F.solve(x[0] if not bias else functional.pad(x[0], (0, 1)))[:6], x[0] / (25 + ridge)
    )


# Large means


def exact_fisher(measured: UnitStatistics, unit: int, ridge: float) -> list[list[Fraction]]:
    """Form F of one unit and its inputs' cases without any rounding; expand only."""
    a, delta = measured.cases.a[0, :, 0], measured.cases.delta[0, :, 0, unit]
    size = a.shape[1] + measured.biased
    F = [[Fraction(ridge) * (i == j < a.shape[1]) for j in range(size)] for i in range(size)]
    for a_n, delta_n in zip(a.tolist(), delta.tolist(), strict=True):
        row = [Fraction(x) for x in a_n] + [Fraction(1)] * measured.biased
        D = Fraction(delta_n) ** 2 / measured.cases.samples
        for i in range(size):
            for j in range(size):
                F[i][j] += D * row[i] * row[j]
    return F


def exact_inverse(F: list[list[Fraction]]) -> np.ndarray:
    """Gauss and Jordan in fractions."""
    size = len(F)
    rows = [[*row, *(Fraction(i == j) for j in range(size))] for i, row in enumerate(F)]
    for i in range(size):
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for j in range(size):
            if j != i:
                rows[j] = [x - rows[j][i] * y for x, y in zip(rows[j], rows[i], strict=True)]
    return np.array([[float(x) for x in row[size:]] for row in rows])


def far_from_zero(mean: float, n: int, bias: bool) -> UnitStatistics:
    model, _ = network("mlp", 5, bias)
    with torch.no_grad():
        model[0].weight -= model[0].weight.mean(1, keepdim=True)  # so that no unit saturates
    x = mean + normal(seeded(5), n, 5).float()
    return Monitor(model, layers="0").measure(x)["0"]


far = pytest.mark.parametrize(
    ("mean", "n", "damping"),
    [
        (1e3, 40, 0.0),
        (1e3, 40, 1e-8),
        (1e3, 40, 1e-3),
        (1e3, 3, 1e-3),
        (1e3, 3, 1e-8),
        (1e5, 40, 0.0),
    ],
)


@far
@biases
def test_a_large_mean_costs_no_digits(mean, n, damping, bias):
    measured = far_from_zero(mean, n, bias)
    F = unit_fisher_operator(measured, 2, damping=damping)
    exact = exact_fisher(measured, 2, float(F.ridge))
    inverse = exact_inverse(exact)
    rhs = normal(seeded(6), F.shape[0])
    expected = inverse @ rhs.numpy()
    error = np.linalg.norm(F.solve(rhs).numpy() - expected) / np.linalg.norm(expected)
    assert error < 1e-6
    dense = np.array([[float(x) for x in row] for row in exact])
    condition = np.linalg.eigvalsh(dense)[-1] * np.linalg.eigvalsh(inverse)[-1]
    assert F.condition_number() == pytest.approx(condition, rel=1e-6)
    np.testing.assert_allclose(F.dense().numpy(), dense, rtol=1e-12)


@biases
@pytest.mark.parametrize("n", [40, 3])
def test_at_a_large_mean_numpy_says_the_same_where_it_can(n, bias):
    measured = far_from_zero(1e3, n, bias)  # the usual damping is large there
    F = unit_fisher_operator(measured, 2)
    a, D = measured.cases.a[0, :, 0].double().numpy(), measured.cases.D[:, 2].numpy()
    rows = np.hstack([a, np.ones((n, 1))])[:, : F.shape[0]]
    dense = (D[:, None] * rows).T @ rows / n
    dense[range(5), range(5)] += measured.damping * np.trace(dense[:5, :5]) / 5
    rhs = normal(seeded(6), F.shape[0])
    expected = np.linalg.solve(dense, rhs.numpy())
    assert np.linalg.norm(F.solve(rhs).numpy() - expected) < 1e-4 * np.linalg.norm(expected)
    assert F.condition_number() == pytest.approx(np.linalg.cond(dense), rel=1e-4)


def test_a_shift_of_the_inputs_changes_no_weight_of_a_solution():
    x = (normal(seeded(16), 30, 4) * 2**20).round() / 2**20  # shifts exactly
    near, far = (gaussian(x + shift, bias=True) for shift in (0, 2**26))
    rhs = torch.tensor([1.0, -2.0, 3.0, 4.0, 0.0])
    assert_close(far.solve(rhs)[:4], near.solve(rhs)[:4], **CLOSE)


def test_inputs_without_weight_cost_no_digits_however_far_they_lie():
    cases = Case(network("mlp", 4, True)[0], normal(seeded(7), 40, 4).float())
    measured = cases.measured()
    a, delta = measured.cases.a, measured.cases.delta.clone()
    delta[:, :20] = 0
    expected = unit_fisher_operator(with_cases(measured, a, delta), 0, damping=0.0)
    a = torch.cat([torch.full_like(a[:, :20], 1e9), a[:, 20:]], 1)
    found = unit_fisher_operator(with_cases(measured, a, delta), 0, damping=0.0)
    assert_close(found.solve(torch.ones(5)), expected.solve(torch.ones(5)), **CLOSE)


def with_cases(measured: UnitStatistics, a: Tensor, delta: Tensor) -> UnitStatistics:
    held = Condensed(UnitCases(a, delta, measured.cases.samples))
    return replace(measured, alone=replace(measured.alone, cases=held.cases, held=held))


# Singular, dead and misused


def test_duplicated_inputs_have_no_inverse_without_damping():
    x = normal(seeded(8), 30, 3)
    x = torch.cat([x, x[:, :1]], 1)
    for bias in (True, False):
        F = gaussian(x, bias=bias)
        assert F.condition_number() == math.inf
        with pytest.raises(SingularFisherError, match="unit 1 in layer ''.*damping=1e-3"):
            F.solve(torch.ones(F.shape[0]))
        F = gaussian(x, bias=bias, damping=1e-6)
        assert_close(F @ F.solve(torch.ones(F.shape[0])), torch.ones(F.shape[0]).double(), **TOL)


def test_duplicated_cases_change_nothing():
    x = normal(seeded(8), 3, 5)
    few, many = (gaussian(x.repeat(k, 1), bias=True, damping=1e-3) for k in (1, 4))
    assert len(few.R) < 5 < len(many.R)
    v = torch.arange(6.0)
    assert_close(few @ v, many @ v, **CLOSE)
    assert_close(few.solve(v), many.solve(v), **CLOSE)
    assert few.condition_number() == pytest.approx(many.condition_number())


@pytest.mark.parametrize(("n", "bias"), [(3, False), (3, True), (4, True)])
def test_too_few_cases_have_no_inverse_without_damping(n, bias):
    F = gaussian(normal(seeded(9), n, 4), bias=bias)
    assert F.condition_number() == math.inf
    with pytest.raises(SingularFisherError, match="more samples"):
        F.solve(torch.ones(F.shape[0]))


def test_as_many_cases_as_weights_have_an_inverse_without_bias():
    F = gaussian(normal(seeded(9), 4, 4), bias=False)
    assert_close(F.solve(F @ torch.ones(4)), torch.ones(4).double(), **TOL)


@biases
@pytest.mark.parametrize("n", [20, 3])
def test_a_dead_unit_is_zero_and_has_no_inverse(n, bias):
    model, _ = network("mlp", 4, bias)
    model[3].weight.data[:, 2] = 0
    measured = Monitor(model, layers="0").measure(torch.randn(n, 4))["0"]
    assert measured.dead.tolist() == [False, False, True, False]
    F = unit_fisher_operator(measured, 2)
    assert not (F @ torch.ones(F.shape[0])).any()
    assert (F.trace(), F.condition_number()) == (0.0, math.inf)
    assert math.isnan(F.effective_rank())
    with pytest.raises(SingularFisherError, match="unit 2 in layer '0'"):
        F.solve(torch.zeros(F.shape[0]))


def test_errors_that_cancel_leave_the_weights_of_a_layer_without_bias():
    generator = seeded(10)
    a, delta = normal(generator, 1, 9, 2, 3), normal(generator, 1, 9, 1, 4)
    delta = torch.cat([delta, -delta], 2)  # Σ_t δ = 0
    measured = Case(network("mlp", 3, False)[0], torch.ones(9, 3)).measured()
    found = with_cases(measured, a, delta)
    F = unit_fisher_operator(found, 0, damping=1e-3)
    G = (delta[0, :, :, :1] * a[0]).sum(1)
    A = damped(G.T @ G / 9, 1e-3, biased=False)
    assert_close(F.dense(), A, **CLOSE)
    assert_close(F @ F.solve(torch.ones(3)), torch.ones(3).double(), **CLOSE)
    F = unit_fisher_operator(replace(found, biased=True), 0, damping=1e-3)
    assert_close(F.dense(), functional.pad(A, (0, 1, 0, 1)), **CLOSE)
    assert F.condition_number() == math.inf
    with pytest.raises(SingularFisherError):
        F.solve(torch.ones(4))


def test_inputs_of_zero_leave_the_bias_only():
    F = gaussian(torch.zeros(7, 3), bias=True, damping=1e-3)
    assert_close(F.dense(), torch.diag(torch.tensor([0.0, 0.0, 0.0, 1.0]).double()))
    assert F.effective_rank() == pytest.approx(1)
    with pytest.raises(SingularFisherError):
        F.solve(torch.ones(4))


def test_a_unit_is_found_by_its_number_in_the_layer():
    model, _ = network("groups", 2, True)
    x = torch.randn(9, 4, 1, 3)
    with Monitor(model, layers="0", units=2, seed=3) as monitor:
        some = monitor.measure(x)["0"]
    every = Monitor(model, layers="0").measure(x)["0"]
    chosen = some.units.tolist()
    assert chosen != [0, 1]
    for unit in chosen:
        found, expected = (unit_fisher_operator(m, unit).dense() for m in (some, every))
        assert_close(found, expected, **TOL)
    (other, *_) = {0, 1, 2, 3} - set(chosen)
    with pytest.raises(ValueError, match=f"'0' measured units {chosen[0]}, {chosen[1]}; .*{other}"):
        unit_fisher_operator(some, other)
    for unit in (-1, 4):
        with pytest.raises(ValueError, match=f"units 0, 1, 2, 3; not unit {unit}"):
            unit_fisher_operator(every, unit)


def test_many_measured_units_are_not_all_named():
    measured = Monitor(nn.Linear(3, 500)).measure(torch.randn(4, 3))[""]
    with pytest.raises(ValueError, match=r"units 0, 1, .* 15, \.\.\.; not unit 500"):
        unit_fisher_operator(measured, 500)


@pytest.mark.parametrize(
    "v", [[1.0] * 4, torch.ones(4, dtype=torch.cfloat)], ids=["list", "complex"]
)
@pytest.mark.usefixtures("as_users_run_it")
def test_what_is_no_real_tensor_is_told(v):
    F = unit_fisher_operator(Monitor(nn.Linear(3, 2)).measure(torch.randn(9, 3))[""], 0)
    with pytest.raises(ValueError, match="unit 0 in layer '' takes real tensors"):
        F @ v


@pytest.mark.usefixtures("as_users_run_it")
def test_all_layers_measured_are_not_one():
    with pytest.raises(
        ValueError, match=r"one layer's measurement, monitor.latest\[layer\], got dict"
    ):
        unit_fisher_operator(Monitor(nn.Linear(3, 2)).measure(torch.randn(9, 3)), 0)


def test_what_is_not_finite_is_an_error_that_names_the_layer():
    model, _ = network("mlp", 3, True)
    measured = Monitor(model, on_nonfinite="record").measure(torch.full((4, 3), torch.nan))["0"]
    with pytest.raises(NonFiniteError, match="'0'"):
        unit_fisher_operator(measured, 0)


@pytest.mark.parametrize("damping", [-1e-3, math.nan, math.inf])
def test_a_damping_that_is_none_is_an_error(damping):
    with pytest.raises(ValueError, match="damping"):
        gaussian(torch.ones(2, 3), bias=True, damping=damping)


@pytest.mark.parametrize("size", [(3,), (5,), (0,), (3, 4), (8, 4)])
def test_vectors_that_do_not_fit_are_an_error_that_says_the_shape(size):
    F = gaussian(torch.ones(2, 3), bias=True, damping=1.0)
    for use in (F.matvec, F.matmat, F.solve):
        with pytest.raises(ValueError, match=rf"unit 1 in layer '' is \(4, 4\).*{size[0]}"):
            use(torch.ones(size))


@pytest.mark.parametrize("k", [0, -1, 5])
def test_there_are_as_many_eigenvalues_as_coordinates(k):
    with pytest.raises(ValueError, match="4 eigenvalues"):
        gaussian(torch.ones(2, 3), bias=True).top_eigenvalues(k)


# Size


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation gave."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = result if isinstance(result, tuple | list) else [result]
        self.numel = max([self.numel, *(x.numel() for x in given if isinstance(x, Tensor))])
        return result


def test_with_few_rows_nothing_is_as_large_as_the_matrix():
    model = nn.Sequential(nn.Linear(1000, 3), nn.ELU(), nn.Linear(3, 2))
    measured = Monitor(model).measure(torch.randn(8, 1000))["0"]
    with Largest() as largest:
        F = unit_fisher_operator(measured, 1)
        v = F @ torch.ones(1001)
        assert_close(F.solve(v), torch.ones(1001).double(), **TOL)
        F.condition_number(), F.effective_rank(), F.top_eigenvalues(3), F.trace(), F.diagonal()
    assert largest.numel < 20 * 1001


def test_with_many_rows_a_product_takes_vectors_only():
    F = gaussian(normal(seeded(12), 300, 100), bias=True)
    with Largest() as largest:
        F @ torch.ones(101)
    assert largest.numel == F.R.numel()  # a view: its transpose


@pytest.mark.gpu
@biases
@pytest.mark.parametrize("n", [40, 3])
def test_on_a_gpu_it_says_the_same(n, bias, device):
    model, _ = network("mlp", 5, bias)
    x = normal(seeded(13), n, 5)
    here, there = (
        unit_fisher_operator(Monitor(m, layers="0").measure(y)["0"], 1)
        for m, y in ((model.double(), x), (copy.deepcopy(model).double().to(device), x.to(device)))
    )
    v = normal(seeded(14), here.shape[0])
    assert there.device == device
    assert_close((there @ v.to(device)).cpu(), here @ v, **TOL)
    assert_close(there.solve(v.to(device)).cpu(), here.solve(v), **TOL)
    assert_close(there.eigenvalues.cpu(), here.eigenvalues, **TOL)
    assert there.effective_rank() == pytest.approx(here.effective_rank(), rel=1e-6)
    np.testing.assert_allclose(there.to_scipy() @ v.numpy(), here @ v, rtol=1e-6)
