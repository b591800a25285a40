"""When a measurement is solved: when somebody asks, once, and with the gradient if it is there."""

import gc
from collections.abc import Callable

import pytest
import torch
from measured import WITH_GRADIENT
from networks import a_step, normal, seeded_mlp
from torch import Tensor, nn
from torch.testing import assert_close

import unitfisher.measurement
from unitfisher import Monitor, SingularFisherError

ROUTES = {"rows": 3, "sums": 40}  # cases
TOL = {"rtol": 1e-9, "atol": 1e-12}
SAID = ("c", "mean_q", "s", "k", "corrected_mean", "damping_share", "mean_share_q", "output_mean")


def network() -> nn.Sequential:
    return seeded_mlp().double()


def batch(n: int) -> Tensor:
    return normal(n, 4, seed=1).double()


@pytest.fixture
def solved(monkeypatch) -> list[int]:
    """The steps whose measurements were solved so far."""
    steps, solve = [], unitfisher.measurement.statistics

    def counted(*args, step, **options):
        steps.append(step)
        return solve(*args, step=step, **options)

    monkeypatch.setattr(unitfisher.measurement, "statistics", counted)
    return steps


ASKING: dict[str, Callable[[Monitor], object]] = {
    "latest": lambda monitor: monitor.latest,
    "natural-gradient": lambda monitor: monitor.natural_gradient(),
    "table": lambda monitor: monitor.to_pandas(),
    "flush": lambda monitor: monitor.flush(),
    "state": lambda monitor: monitor.state_dict(),
    "next-pass": lambda monitor: monitor.model(batch(3)),
    "next-measurement": lambda monitor: monitor.measure(batch(3)),
    "detach": lambda monitor: monitor.detach(),
}


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)
def test_a_training_pass_is_solved_when_somebody_asks_and_once(ask, solved, tmp_path):
    model = network()
    monitor = Monitor(model, every=lambda step: step == 0, record=tmp_path / "run")
    a_step(model, batch(5))
    assert (monitor.memory_usage()["latest"] > 0, solved) == (True, [])
    ask(monitor)
    assert solved[:1] == [0]
    monitor.to_pandas()
    _ = monitor.latest
    assert solved.count(0) == 1


@pytest.mark.parametrize("n", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("damping", [1e-3, 0.3])
def test_with_its_gradient_or_before_it_a_pass_says_the_same(n, bias, damping):
    model, x = network(), batch(n)
    if not bias:
        for layer in (model[0], model[2]):
            layer.bias = None
    monitor = Monitor(model, every=1, damping=damping)
    a_step(model, x)
    alone = monitor.latest  # solved without the gradient
    later = monitor.natural_gradient()
    completed = monitor.latest
    model.zero_grad()
    a_step(model, x)
    together = monitor.natural_gradient()
    assert list(together) == list(later) == list(alone)
    for name, of in monitor.latest.items():
        for field in SAID:
            assert_close(getattr(of, field), getattr(alone[name], field), equal_nan=True, **TOL)
        for field in WITH_GRADIENT:
            assert getattr(alone[name], field).isnan().all()
            expected = getattr(completed[name], field)
            assert_close(getattr(of, field), expected, equal_nan=True, **TOL)
        assert_close(together[name].dw, later[name].dw, **TOL)
        assert (together[name].dw0 is None) == (model.get_submodule(name).bias is None)
        assert_close(of.gradient.g, model.get_submodule(name).weight.grad)


def test_what_happens_after_the_pass_changes_nothing():
    model, x = network(), batch(9)
    monitor = Monitor(model, every=lambda step: step == 0)
    expected = Monitor(network()).measure(x.clone())
    a_step(model, x)
    with torch.no_grad():
        x.zero_()  # a buffer for the next batch
        for p in model.parameters():
            p.add_(1.0)
            p.grad.zero_()
    with torch.inference_mode():
        found = monitor.latest
    for name, of in expected.items():
        assert_close(found[name].k, of.k, **TOL)
        assert_close(found[name].corrected_mean, of.corrected_mean, **TOL)
    assert not any(of.k.is_inference() for of in found.values())


def test_gradients_are_copied():
    model = network()
    monitor = Monitor(model, every=1)
    a_step(model, batch(9))
    monitor.natural_gradient()
    model.zero_grad(set_to_none=False)
    assert monitor.latest["2"].gradient.g.ne(0).any()


def test_layers_without_a_gradient_are_solved_without():
    model = network()
    monitor = Monitor(model, every=1)
    a_step(model, batch(9))
    model[2].weight.grad = None
    assert "2" not in monitor.natural_gradient()
    assert monitor.latest["2"].k.isfinite().all()
    assert monitor.latest["2"].cosine.isnan().all()


def test_targets_of_a_pass_count_where_its_gradient_is_missing():
    model, x, y = network(), batch(9), torch.zeros(9, dtype=torch.long)
    monitor = Monitor(model, every=1)
    monitor.targets = y
    a_step(model, x)
    model[2].weight.grad = None
    assert "2" not in monitor.natural_gradient()
    expected = Monitor(network()).measure(x, y)
    for name, of in monitor.latest.items():
        assert_close(of.cosine, expected[name].cosine)


# A Fisher without an inverse


def singular(**options: object) -> Monitor:
    monitor = Monitor(network(), every=lambda step: step == 0, damping=0.0, **options)
    a_step(monitor.model, batch(3))
    return monitor


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)
def test_without_an_inverse_who_asks_is_told(ask, tmp_path):
    monitor = singular(record=tmp_path / "run")
    with pytest.raises(SingularFisherError, match="layer '0' is singular"):
        ask(monitor)
    monitor._history.newest = None  # or it is told again at the end


def test_without_an_inverse_training_is_interrupted_once():
    monitor = singular()
    with pytest.raises(SingularFisherError):
        monitor.model(batch(3))
    for _ in range(3):
        a_step(monitor.model, batch(3))
    assert monitor.to_pandas().empty
    with pytest.raises(SingularFisherError):
        _ = monitor.latest


def test_measuring_what_has_no_inverse_leaves_the_newest_measurement():
    model = network()
    monitor = Monitor(model, damping=0.0)
    before = monitor.measure(batch(60))
    with pytest.raises(SingularFisherError):
        monitor.measure(batch(3))
    assert monitor.latest is before
    assert len(monitor.to_pandas()) == sum(len(of.k) for of in before.values())


def test_a_record_is_closed_though_its_last_measurement_has_no_inverse(tmp_path):
    monitor = singular(record=tmp_path / "run", activations=1)
    with pytest.raises(SingularFisherError):
        monitor.detach()
    monitor.detach()
    units = sum(len(of.k) for of in Monitor(network()).measure(batch(9)).values())
    assert len(monitor.to_pandas("activations")) == units


def test_what_nobody_asks_for_and_no_record_keeps_is_never_solved(solved):
    gc.collect()  # Monitors of other tests, that may have a record
    solved.clear()
    monitor = Monitor(network(), every=1)
    a_step(monitor.model, batch(5))
    monitor.detach()
    del monitor
    gc.collect()
    assert not solved


@pytest.mark.parametrize("roomy", [True, False])
def test_what_was_solved_is_kept_for_later_gradients_where_there_is_room(roomy):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 64), nn.ELU(), nn.Linear(64, 3))
    x, sums = torch.randn(200, 60), 8 * 64 * 60**2
    with Monitor(model) as monitor:
        monitor.measure(x)
    monitor = Monitor(model, every=1, memory=2**30 if roomy else monitor.plan.least)
    a_step(model, x)
    monitor.natural_gradient()
    assert monitor.memory_usage()["latest"] < sums  # seldom is there another gradient
    monitor.natural_gradient()
    assert (monitor.memory_usage()["latest"] > sums) == roomy
