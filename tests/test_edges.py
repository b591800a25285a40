"""Units and batches at the edge of what is defined: the answer there, and that it stays there."""

import pytest
import torch
from measured import THEORY
from networks import CLASSES, Sequential, mlp, normal, seeded_mlp
from reference import damped
from strategies import all_sharings
from torch import Tensor, nn
from torch.testing import assert_close

from unitfisher import (
    Gaussian,
    Monitor,
    NonFiniteError,
    OutputError,
    SingularFisherError,
    UnitStatistics,
    unit_fisher,
)

DAMPING = 1e-2
BATCHES = {"one-sample": 1, "fewer-than-inputs": 3, "more-than-inputs": 20}
per_batch = pytest.mark.parametrize("n", BATCHES.values(), ids=BATCHES)
per_fisher = pytest.mark.parametrize("fisher", ["exact", "mc", "rademacher", "empirical"])
DEAD, CONSTANT = 1, torch.tensor([1.0, -2.0, 0.5, 3.0])


def with_a_dead_unit() -> nn.Sequential:
    model = seeded_mlp(nn.ReLU)
    model[0].bias.data[DEAD] = -1e3
    return model


def without_that_unit(model: nn.Sequential) -> nn.Sequential:
    first, second = nn.Linear(4, 5).double(), nn.Linear(5, 5).double()
    left = [unit for unit in range(6) if unit != DEAD]
    first.weight.data, first.bias.data = model[0].weight.data[left], model[0].bias.data[left]
    second.weight.data, second.bias.data = model[2].weight.data[:, left], model[2].bias.data
    return nn.Sequential(first, model[1], second, *model[3:])


def measure(model: nn.Module, x: Tensor, **options: object) -> dict[str, UnitStatistics]:
    with Monitor(model, damping=DAMPING, **options) as monitor:
        return monitor.measure(x)


def all_finite(m: UnitStatistics) -> bool:
    return all(bool(getattr(m, name).isfinite().all()) for name in THEORY)


@all_sharings
@per_batch
def test_a_dead_unit_is_told_and_its_quantities_are_nan(n, sharing):
    m = measure(with_a_dead_unit(), normal(n, 4), sharing=sharing)["0"]
    assert m.dead[DEAD]
    assert m.c[DEAD] == 0
    assert all(getattr(m, name)[DEAD].isnan().all() for name in THEORY)


@all_sharings
@per_batch
def test_other_units_are_those_of_the_network_without_the_dead_one(n, sharing):
    model, x = with_a_dead_unit().double(), normal(n, 4).double()
    found = measure(model, x, sharing=sharing)["0"]
    expected = measure(without_that_unit(model), x, sharing=sharing)["0"]
    left = torch.arange(6) != DEAD
    for name in ("c", "dead", *THEORY):
        assert_close(getattr(found, name)[left], getattr(expected, name), equal_nan=True)


@per_batch
def test_the_natural_gradient_of_a_dead_unit_is_zero_and_that_of_others_is_not(n):
    m = measure(with_a_dead_unit(), normal(n, 4))["0"]
    dw, dw0 = m.natural_gradient(torch.ones(6, 4), torch.ones(6))
    assert ((dw == 0).all(1) & (dw0 == 0)).tolist() == m.dead.tolist()
    assert bool(dw.isfinite().all() & dw0.isfinite().all())


@per_batch
def test_what_a_dead_unit_feeds_stays_finite(n):
    measured = measure(with_a_dead_unit(), normal(n, 4))
    assert all_finite(measured["4"])


def test_angles_of_a_dead_unit_are_nan_and_those_of_others_are_not():
    model, x = with_a_dead_unit(), normal(20, 4)
    with Monitor(model, damping=DAMPING) as monitor:
        m = monitor.measure(x, targets=torch.arange(20) % CLASSES)["0"]
    assert m.cosine.isnan().tolist() == m.dead.tolist()


def constant_input(n: int) -> Tensor:
    return CONSTANT.expand(n, 4)


@per_batch
def test_on_constant_inputs_only_the_damping_tells_weights_from_bias(n):
    m = measure(seeded_mlp(), constant_input(n))["0"]
    squared = 4 / DAMPING  # μ_qᵀ Var_q⁻¹ μ_q with Var_q = (damping ‖a‖² / 4) I
    assert_close(m.s * m.c, torch.full_like(m.s, 1 + squared))
    assert_close(m.k, torch.zeros_like(m.k), atol=1e-6 * squared, rtol=0)
    assert_close(m.corrected_mean, torch.zeros(6, 4).double(), atol=1e-6 * squared, rtol=0)


@pytest.mark.parametrize("nonlinearity", [nn.ELU, nn.Tanh])
@per_batch
def test_units_that_are_fed_with_zeros_are_biases_only(n, nonlinearity):
    m = measure(seeded_mlp(nonlinearity), torch.zeros(n, 4))["0"]
    dw, dw0 = m.natural_gradient(torch.zeros(6, 4), torch.ones(6))
    assert_close(m.s, 1 / m.c)
    assert_close(m.k, torch.zeros(6).double())
    assert_close(dw0.double(), 1 / m.c, rtol=1e-6, atol=0)
    assert not dw.any()


@per_batch
def test_in_a_network_of_zeros_only_the_logits_are_alive(n):
    model = seeded_mlp(nn.Tanh)
    for parameter in model.parameters():
        parameter.data.zero_()
    measured = measure(model, normal(n, 4))
    assert [bool(m.dead.all()) for m in measured.values()] == [True, True, False]
    assert_close(measured["4"].c, torch.full((CLASSES,), 2 / 9).double())  # π (1 - π)


@per_fisher
def test_a_saturated_softmax_kills_every_unit_and_nothing_else(fisher):
    model, x = seeded_mlp(), normal(20, 4)
    model[4].bias.data[0] = 1e4  # π = (1, 0, 0) exactly
    y = torch.zeros(20, dtype=torch.long)
    with Monitor(model, fisher=fisher) as monitor:
        measured = monitor.measure(x, targets=y)
    assert all(bool(m.dead.all()) and m.finite for m in measured.values())
    assert not any(
        step.any() for step in measured["2"].natural_gradient(torch.ones(5, 6), torch.ones(5))
    )


@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_saturated_samples_weigh_nothing_however_far_they_lie(scale):
    model, x = nn.Linear(4, CLASSES), normal(40, 4)
    x[:20] = scale * (x[:20] + 3)
    found, expected = measure(model, x)[""], measure(model, x[20:])[""]
    assert_close(found.c, expected.c / 2, rtol=1e-3, atol=0)
    assert_close(found.s, 2 * expected.s, rtol=1e-3, atol=0)


@per_batch
def test_few_samples_say_what_the_dense_fisher_says(n):
    model, x = seeded_mlp().double(), normal(n, 4).double()
    blocks = unit_fisher(model, x)
    for name, m in measure(model, x).items():
        dense = torch.linalg.inv(damped(blocks[name], DAMPING))
        assert_close(m.s, dense[:, -1, -1], rtol=1e-6, atol=0)


def test_without_damping_few_samples_are_an_error_that_names_layer_and_unit():
    with pytest.raises(SingularFisherError, match=r"unit 0.*layer '0'|layer '0'.*unit 0"):
        Monitor(seeded_mlp(), damping=0.0).measure(normal(3, 4))


def test_a_singular_unit_is_named_by_its_number_in_the_layer():
    monitor = Monitor(seeded_mlp(), layers="0", damping=0.0, units=2, seed=4)
    first = int(monitor.state_dict()["units"]["0"][0])
    assert first > 0
    with pytest.raises(SingularFisherError, match=f"unit {first} "):
        monitor.measure(normal(3, 4))


def test_a_dead_unit_is_no_singular_one():
    with pytest.raises(SingularFisherError, match="unit 0 "):
        Monitor(with_a_dead_unit(), layers="0", damping=0.0).measure(normal(3, 4))


def test_without_damping_enough_samples_are_measured():
    m = Monitor(seeded_mlp(), damping=0.0).measure(normal(30, 4))["0"]
    assert all_finite(m)
    assert_close(m.damping_share, torch.zeros(6).double())


def test_the_advice_on_a_singular_fisher_is_one_for_a_monitor():
    with pytest.raises(SingularFisherError, match="damping=1e-3"):
        Monitor(seeded_mlp(), damping=0.0).measure(normal(3, 4))


SCALES = {"loss-scaled-down": 1e-18, "float32-nearly-gone": 1e-30, "huge": 1e15}


@per_batch
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_the_scale_of_the_errors_kills_no_unit_and_changes_no_correction(scale, n):
    class Scaled(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.net, self.by = seeded_mlp(), by

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * self.by

    found = measure(Scaled(scale), normal(n, 4), likelihood="gaussian")
    for name, expected in measure(Scaled(1.0), normal(n, 4), likelihood="gaussian").items():
        assert not found[name].dead.any()
        assert_close(found[name].k, expected.k, rtol=1e-4, atol=1e-6)
        assert_close(found[name].s * scale**2, expected.s, rtol=1e-4, atol=0)


def test_the_variance_of_the_likelihood_scales_the_fisher_and_nothing_else():
    model, x = seeded_mlp(), normal(20, 4)
    one, small = (measure(model, x, likelihood=Gaussian(v))["2"] for v in (1.0, 1e-12))
    assert_close(small.c, one.c * 1e12, rtol=1e-6, atol=0)
    assert_close(small.k, one.k, rtol=1e-4, atol=1e-6)  # δ is rounded to float32


def test_positions_without_error_are_no_dead_units():
    model = Sequential().eval()
    measured = Monitor(model, layers=(nn.Linear, nn.Conv1d), sharing="joint").measure(
        normal(9, 3, 4)
    )
    assert all(all_finite(m) for m in measured.values())


def spoiled(where: str, value: float) -> tuple[nn.Module, Tensor]:
    model, x = seeded_mlp(nn.ReLU), normal(8, 4)
    if where == "input":
        x[3, 1] = value
    elif where == "inner-weights":
        model[2].weight.data[0, 0] = value
        model[0].bias.data[0] = 10.0  # so that the weight is used
        model[2].bias.data[0] = 10.0
    else:
        model[4].bias.data[0] = value
    return model, x


SPOILED = {"input": "0", "inner-weights": "2", "logits": "4"}


@per_fisher
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize(("where", "layer"), SPOILED.items(), ids=SPOILED)
def test_what_is_not_finite_is_an_error_that_names_the_first_layer_concerned(
    where, layer, value, fisher
):
    model, x = spoiled(where, value)
    monitor = Monitor(model, every=1, fisher=fisher)
    monitor.targets = torch.zeros(8, dtype=torch.long)
    with pytest.raises(NonFiniteError, match=f"layer '{layer}'.*on_nonfinite='record'"):
        model(x)


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_labels_that_cannot_be_drawn_are_no_other_error(likelihood):
    model, x = spoiled("logits", torch.nan)
    with pytest.raises(NonFiniteError, match="layer '4'"):
        Monitor(model, likelihood=likelihood, fisher="mc").measure(x)


def test_of_a_pass_that_is_not_finite_nothing_is_recorded():
    model = seeded_mlp()
    monitor = Monitor(model, every=1)
    model(normal(8, 4))
    before = monitor.latest
    with pytest.raises(NonFiniteError, match="nothing of this pass was recorded"):
        model(normal(8, 4) * torch.nan)
    assert monitor.latest is before
    assert set(monitor.to_pandas()["step"]) == {0}


@per_fisher
def test_a_pass_that_is_not_finite_can_be_recorded_as_such(fisher):
    model, x = spoiled("inner-weights", torch.nan)
    monitor = Monitor(model, every=1, fisher=fisher, on_nonfinite="record")
    monitor.targets = torch.zeros(8, dtype=torch.long)
    model(x)
    table = monitor.to_pandas()
    assert not table["finite"].any()
    assert table[["c", "s", "k", "mean_q_norm", "cosine"]].isna().all(axis=None)


def test_the_pass_after_one_that_was_not_finite_is_measured_as_ever():
    model, x = seeded_mlp(), normal(8, 4)
    monitor = Monitor(model, every=1, on_nonfinite="record")
    model(x * torch.nan)
    model(x)
    assert monitor.latest["2"].finite
    assert_close(monitor.latest["2"].k, Monitor(seeded_mlp()).measure(x)["2"].k)


def test_natural_gradients_by_a_fisher_that_is_not_finite_are_nan():
    model, x = seeded_mlp(), normal(8, 4)
    monitor = Monitor(model, every=1, on_nonfinite="record")
    model(x * torch.nan)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert all(
        dw.isnan().all() and dw0.isnan().all() for dw, dw0 in monitor.natural_gradient().values()
    )


@pytest.mark.parametrize("make", [mlp, lambda: nn.Linear(4, CLASSES)], ids=["mlp", "linear"])
def test_an_empty_batch_is_a_clear_error_where_asked_for_and_else_nothing(make):
    model = make()
    monitor = Monitor(model, every=1)
    with pytest.raises(OutputError, match="batch is empty"):
        monitor.measure(normal(0, 4))
    model(normal(0, 4))
    assert not monitor.latest
    model(normal(3, 4))
    assert monitor.latest


class Gated(nn.Module):
    """A unit whose errors arrive only where its inputs are zero."""

    def __init__(self, *, positions: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.positions = positions
        self.fc, self.head = nn.Linear(4, 3), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        silent = (x == 0).all(-1, keepdim=True)
        net = self.fc(x)
        first = torch.where(silent, net[..., :1], net[..., :1].detach())
        h = torch.cat([first, net[..., 1:]], -1).tanh()
        return self.head(h.mean(1) if self.positions else h)


@pytest.mark.parametrize("solver", ["auto", "direct", "iterative"])
@pytest.mark.parametrize("damping", [0.0, 1e-3])
@pytest.mark.parametrize("n", [40, 300])
def test_a_unit_that_sees_zeros_wherever_errors_reach_it_has_no_weights_to_correct(
    solver, damping, n
):
    x = normal(n, 4)
    x[::3] = 0
    found = Monitor(Gated(positions=False), solver=solver, damping=damping).measure(x)["fc"]
    assert_close(found.s[0], 1 / found.c[0], rtol=1e-6, atol=0)
    assert abs(float(found.k[0])) < 1e-6
    assert found.k[1:].abs().min() > 1e-6


def test_a_unit_that_sees_zeros_at_every_position_is_solved_in_joint_sharing():
    x = normal(60, 5, 4).reshape(60, 5, 4)
    x[:, ::2] = 0
    x[::2] = 0
    monitor = Monitor(Gated(positions=True), sharing="joint")
    found = monitor.measure(x)["fc"]
    assert_close(found.s[0], 1 / found.c[0], rtol=1e-6, atol=0)
    assert abs(float(found.k[0])) < 1e-6


def test_units_that_see_zeros_over_a_loader_are_solved_too():
    x = normal(300, 4)
    x[::3] = 0
    for memory in (None, "40 kB"):
        found = Monitor(Gated(positions=False), memory=memory).measure(list(x.split(60)))["fc"]
        assert_close(found.s[0], 1 / found.c[0], rtol=1e-6, atol=0)
