"""Sums that do not fit: passing over the loader again and again says what they would have said."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measured import peak
from networks import CLASSES, NETS, Sparse, batches, gradient, prepared, sparse_batches
from pandas.testing import assert_frame_equal
from strategies import normal, seeded, seeds
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import unitfisher.planner
import unitfisher.products
from unitfisher import MemoryBudgetError, Monitor, UnconvergedWarning, unit_fisher_operator
from unitfisher.costs import Sizes
from unitfisher.loader import LoaderError
from unitfisher.solvers import SingularFisherError

TOL = {"rtol": 1e-6, "atol": 1e-9}
as_users = pytest.mark.usefixtures("as_users_run_it")  # every kind of layer is checked without it
FISHERS = ["exact", "mc", "rademacher", "top-rademacher", "empirical"]
Passing = Callable[[Sizes], bool]


def every(sizes: Sizes) -> bool:
    return True


def none(sizes: Sizes) -> bool:
    return False


def measured(
    model: nn.Module,
    loader: Iterable[Any],
    passing: Passing = every,
    *,
    times: int = 1,
    **options: Any,
) -> Monitor:
    """Measure, for want of memory for the sums of some layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unitfisher.planner, "bytes_of_sums", lambda s: 2**40 * passing(s))
        patch.setattr(unitfisher.planner, "bytes_of_passes", lambda s: 0)
        with Monitor(model, **options) as monitor:
            for _ in range(times):
                monitor.measure(loader)
    return monitor


def routes(monitor: Monitor) -> dict[str, str]:
    return {name: of.route for name, of in monitor.latest.items()}


def assert_same(found: Monitor, expected: Monitor, **tol: float) -> None:
    tol = tol or TOL
    how = ["route", "residual"]
    tables = [m.to_pandas().drop(columns=how) for m in (found, expected)]
    assert_frame_equal(*tables, **tol)
    for name, of in expected.latest.items():
        for wide in ("mean", "mean_q", "corrected_mean"):
            assert_close(
                getattr(found.latest[name], wide), getattr(of, wide), equal_nan=True, **tol
            )


@st.composite
def networks(draw) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Inputs far from zero or near, twice the same, units that are dead; uneven batches."""
    generator, widths = draw(seeds), draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))
    layers = [nn.Linear(d, u) for d, u in zip(widths, [*widths[1:], CLASSES], strict=True)]
    for layer in layers:
        layer.weight.data = normal(generator, *layer.weight.shape)
        layer.bias.data = normal(generator, len(layer.bias))
    layers[0].bias.data[0] -= 1e4 * draw(st.booleans())  # its unit dies
    model = nn.Sequential(*(each for layer in layers for each in (layer, nn.ReLU())))
    parts = [30, draw(st.integers(1, 40))]
    x = normal(generator, sum(parts), widths[0]) + draw(st.sampled_from([0.0, 5.0]))
    x[:, -1] = x[:, 0] if draw(st.booleans()) else x[:, -1]
    y = torch.randint(CLASSES, (len(x),), generator=generator)
    return model[:-1], list(zip(x.split(parts), y.split(parts), strict=True))


@given(
    network=networks(),
    fisher=st.sampled_from(FISHERS),
    samples=st.integers(1, 3),
    damping=st.sampled_from([1e-6, 1e-3, 1.0]),
)
def test_passes_say_what_sums_say(network, fisher, samples, damping):
    model, loader = network
    options = {"fisher": fisher, "samples": samples, "damping": damping}
    found = measured(model, loader, **options)
    assert set(routes(found).values()) == {"passes"}
    assert all(of.converged.all() for of in found.latest.values())
    assert_same(found, measured(model, loader, none, **options), rtol=1e-5, atol=1e-7)


@given(network=networks(), damping=st.sampled_from([1e-3, 1e-1]))
def test_passes_say_what_one_batch_says(network, damping):
    model, loader = network
    with Monitor(model, damping=damping) as monitor:
        monitor.measure(*map(torch.cat, zip(*loader, strict=True)))
    assert_same(measured(model, loader, damping=damping), monitor, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("of", NETS)
def test_every_kind_of_layer(of, sharing):
    model, x, y = prepared(of)
    found = measured(model, batches(x, y), sharing=sharing)
    assert set(routes(found).values()) == {"passes"}
    assert_same(found, measured(model, [(x, y)], none, sharing=sharing))


def test_only_layers_whose_sums_do_not_fit_pass(tmp_path):
    model, x, y = prepared("mlp")
    loader = batches(x, y)
    found = measured(model, loader, lambda s: s.inputs == 6, record=tmp_path / "run")
    assert routes(found) == {"0": "sums", "2": "passes", "4": "sums"}
    assert found.to_pandas("plan")["route"].tolist() == ["sums", "passes", "sums"]
    assert found.to_pandas().groupby("layer")["route"].first()["2"] == "passes"
    assert "passes" in str(found.plan)
    assert_same(found, measured(model, loader, none))


@as_users
def test_sampled_units_keep_their_numbers():
    model, x, y = prepared("mlp")
    found = measured(model, batches(x, y), units=3)
    assert_same(found, measured(model, batches(x, y), none, units=3))


@as_users
def test_single_precision_keeps_four_digits():
    model, x, y = prepared("mlp")
    expected = measured(model, batches(x, y), none).latest
    found = measured(model.float(), batches(x.float(), y)).latest
    for name, of in expected.items():
        for field in ("c", "s", "k", "mean_q", "damping_share", "cosine"):
            assert_close(
                getattr(found[name], field).double(), getattr(of, field), rtol=1e-4, atol=1e-4
            )


def test_a_large_mean_that_single_precision_rounds_shifts_nothing():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, CLASSES)), torch.randn(400, 5) + 1000.3
    model[0].bias.data -= model[0].weight.data @ x.mean(0)
    found = measured(model, list(x[x[:, 0].argsort()].split(100))).latest[
        "0"
    ]  # the origin is far off
    expected = measured(model.double(), [x.double()], none).latest["0"]
    assert_close(found.s, expected.s, rtol=1e-3, atol=0)
    assert_close(found.k, expected.k, rtol=1e-3, atol=1e-4)


def test_a_loader_whose_first_batch_reaches_no_unit():
    model, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double(), []
    for shift in (-1e3, 0.0):
        x.append(torch.randn(50, 4, dtype=torch.float64) + shift)
    model[0].weight.data.abs_()
    found, expected = (measured(model, x, passing) for passing in (every, none))
    assert not found.latest["0"].dead.any()
    assert_same(found, expected)


def passes_of(model: nn.Module, loader: list[Any], **options: Any) -> float:
    """Count the forward passes for each batch."""
    calls: list[None] = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(None))
    measured(model, loader, **options)
    handle.remove()
    return len(calls) / len(loader)


@as_users
def test_layers_and_right_hand_sides_share_the_passes():
    model, x, y = prepared("mlp")
    loader = batches(x, y)
    alone = [passes_of(model, loader, layers=name) for name in ("0", "2", "4")]
    assert passes_of(model, loader) == max(alone)
    assert 3 < max(alone) < 20


def test_a_layer_that_is_done_is_left_out_of_the_products(monkeypatch):
    model, x, y = prepared("mlp")
    multiplied: list[int] = []
    times = unitfisher.weighted.Weighted.times
    monkeypatch.setattr(
        unitfisher.weighted.Weighted,
        "times",
        lambda self, v: multiplied.append(v.shape[-1]) or times(self, v),
    )
    measured(model, [(x, y)])
    counts = {d: multiplied.count(d) for d in (4, 6, 5)}
    assert len(set(counts.values())) > 1
    assert len(multiplied) == sum(counts.values())


def shuffled(x: Tensor, generator: torch.Generator | None) -> DataLoader:
    return DataLoader(TensorDataset(x), 30, shuffle=True, generator=generator, collate_fn=first)


def first(samples: list[tuple[Tensor]]) -> Tensor:
    return torch.stack([sample for (sample,) in samples])


@as_users
def test_a_loader_that_shuffles_by_the_global_generator_is_replayed():
    model, x, _ = prepared("mlp")
    torch.manual_seed(5)
    found = measured(model, shuffled(x, None), fisher="rademacher")
    after = torch.get_rng_state()
    torch.manual_seed(5)
    expected = measured(model, shuffled(x, None), none, fisher="rademacher")
    assert after.equal(torch.get_rng_state())
    assert_same(found, expected)


def test_a_loader_that_shuffles_otherwise_is_told():
    model, x, _ = prepared("mlp")
    loader = shuffled(x, seeded(0))
    with pytest.raises(LoaderError, match=r"a batch 1 .*'0', '2', '4'.*shuffle=False.*memory="):
        measured(model, loader)


class Waning:
    """Yields fewer batches each time it is read."""

    def __init__(self, x: Tensor) -> None:
        self.left = list(x.split(30))

    def __iter__(self):
        yield from self.left
        self.left.pop()


def test_a_loader_that_loses_batches_is_told():
    model, x, _ = prepared("mlp")
    with pytest.raises(LoaderError, match=r"3 batches .*the same batches in the same order"):
        measured(model, Waning(x))


def test_an_iterator_is_refused_at_its_first_batch():
    model, x, _ = prepared("mlp")
    batches = iter(x.split(30))
    with pytest.raises(MemoryBudgetError, match=r"'2' do not fit .*only once.*units=.*layers="):
        measured(model, batches, lambda s: s.inputs == 6)
    assert len(list(batches)) == 3


def test_an_iterator_is_enough_where_sums_fit():
    model, x, _ = prepared("mlp")
    assert measured(model, iter(x.split(30)), none).latest["0"].k.isfinite().all()


@pytest.mark.parametrize("fisher", ["mc", "rademacher", "top-rademacher"])
@as_users
def test_every_pass_draws_alike_whatever_was_drawn_before(fisher):
    model, x, y = prepared("mlp")
    found, expected = (
        measured(model, batches(x, y), passing, fisher=fisher, times=2) for passing in (every, none)
    )
    assert_same(found, expected)


@pytest.mark.parametrize("fisher", ["mc", "rademacher", "top-rademacher"])
@as_users
def test_our_generator_is_left_where_one_pass_leaves_it(fisher):
    model, x, y = prepared("mlp")
    states = [
        measured(model, batches(x, y), passing, fisher=fisher).state_dict()["generators"]
        for passing in (every, none)
    ]
    assert states[0].keys() == states[1].keys() == {"cpu"}
    assert states[0]["cpu"].equal(states[1]["cpu"])


def test_the_model_is_left_as_it_was():
    model, x, y = prepared("mlp")
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measured(model, batches(x, y))
    assert model.training
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@as_users
def test_any_gradient_is_solved_for_by_further_passes():
    model, x, y = prepared("mlp")
    found, expected = (
        measured(model, batches(x, y), passing, fisher="rademacher", seed=3)
        for passing in (every, none)
    )
    torch.nn.functional.cross_entropy(model(x), y).backward()
    steps = [monitor.natural_gradient() for monitor in (found, expected)]
    for name, step in steps[1].items():
        for own, other in zip(steps[0][name], step, strict=True):
            assert_close(own, other, rtol=1e-6, atol=1e-7 * float(other.abs().max()))
    assert_same(found, expected)
    assert_close(found.latest["2"].damped(0.1).k, expected.latest["2"].damped(0.1).k, **TOL)


@as_users
def test_the_gradient_that_was_measured_is_solved_for_already():
    model, x, y = prepared("mlp")
    measurement = measured(model, batches(x, y)).latest["2"]
    model.register_forward_pre_hook(lambda *_: pytest.fail("another pass"))
    steps = [measurement.natural_gradient(*measurement.gradient) for _ in range(2)]
    assert steps[0].dw.equal(steps[1].dw)


def test_a_model_that_has_changed_since_is_told():
    model, x, y = prepared("mlp")
    monitor = measured(model, batches(x, y))
    model[4].weight.data *= 1.1
    with pytest.raises(LoaderError, match="or the model has changed"):
        monitor.latest["2"].natural_gradient(*gradient())


@pytest.mark.parametrize("of", ["mlp", "convolution-in-groups"])
@as_users
def test_a_units_operator_takes_one_more_pass(of):
    model, x, y = prepared(of)
    found, expected = (measured(model, batches(x, y), passing) for passing in (every, none))
    assert routes(found)
    for name in found.latest:
        operators = [unit_fisher_operator(m.latest[name], 1) for m in (found, expected)]
        assert_close(operators[0].dense(), operators[1].dense(), **TOL)


def test_a_unit_of_few_cases_is_named_if_nothing_is_damped():
    model, x, _ = prepared("mlp")
    with pytest.raises(SingularFisherError, match=r"of unit \d in layer '[02]'"):
        measured(model, [x[:3], x[3:5]], damping=0.0)
    found, expected = (measured(model, [x[:3], x[3:5]], passing) for passing in (every, none))
    assert_same(found, expected, rtol=1e-5, atol=1e-7)


def test_what_did_not_converge_says_so_once(monkeypatch):
    model, x, y = prepared("mlp")
    monkeypatch.setattr(unitfisher.products, "ITERATIONS", 2)
    every = r"after 2 .*layers '0', '2', '4' .*memory="
    with pytest.warns(UnconvergedWarning, match=every) as told:
        found = measured(model, batches(x, y))
    assert len(told) == 1
    table = found.to_pandas()
    assert not table["converged"].all()
    assert (table["residual"] > 1e-9).eq(~table["converged"]).all()


def test_a_batch_that_is_not_finite_ends_it():
    model, x, _ = prepared("mlp")
    x[70, 0] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = measured(model, list(x.split(30)), on_nonfinite="record").latest["2"]
    assert not found.finite
    assert not found.converged.any()


def test_gradients_joined_over_positions_do_not_pass():
    model, x, y = prepared("sequence")
    with pytest.raises(MemoryBudgetError, match="most of it"):
        measured(model, batches(x, y), sharing="joint")


@as_users
def test_passes_hold_the_budget_that_sums_would_not():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 256), nn.ELU(), nn.Linear(256, 256), nn.ELU())
    model.append(nn.Linear(256, 10))
    x, y = torch.randn(150, 40), torch.randint(10, (150,))
    loader = list(zip(x.split(64), y.split(64), strict=True))
    monitor = Monitor(model, fisher="rademacher", memory="32 MiB", damping=1.0)
    used, _ = peak(lambda: monitor.measure(loader))
    assert routes(monitor) == {"0": "sums", "2": "passes", "4": "sums"}
    assert monitor.plan.memory // 4 < used <= monitor.plan.total <= monitor.plan.memory


@as_users
def test_memory_does_not_grow_with_the_batches():
    model, x, y = prepared("mlp")
    held = [measured(model, [(x, y)] * n).memory_usage()["latest"] for n in (2, 5)]
    assert held[0] == held[1]


@pytest.mark.parametrize("layers", ["block", None])
def test_batches_that_come_to_no_such_layer_count_with_their_samples(layers):
    torch.manual_seed(0)
    model, loader = Sparse().double(), sparse_batches()
    found, expected = (measured(model, loader, way, layers=layers) for way in (every, none))
    assert_same(found, expected)
    assert routes(found)["block"] == "passes"
