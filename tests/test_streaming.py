"""A whole data set in batches says what it says in one."""

import pytest
import torch
from networks import CLASSES, NETS, batches, gradient, mlp, prepared
from pandas.testing import assert_frame_equal
from strategies import TOL, all_sharings
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import unitfisher.condensed
from unitfisher import MemoryBudgetError, Monitor
from unitfisher.observation import NonFiniteError
from unitfisher.operator import unit_fisher_operator


@all_sharings
@pytest.mark.parametrize("of", NETS)
def test_a_loader_measures_its_batches_as_one(of, sharing):
    model, x, y = prepared(of)
    monitor = Monitor(model, sharing=sharing)
    monitor.measure(batches(x, y))
    found = monitor.to_pandas()
    monitor.detach()
    again = Monitor(model, sharing=sharing)
    again.measure(x, targets=y)
    expected = again.to_pandas().assign(route="sums")  # which of the one batch may be another
    assert_frame_equal(found, expected, rtol=1e-6)


def test_units_in_parts_stream_as_all_together(monkeypatch):
    model, x, _ = prepared("mlp")
    monitor = Monitor(model)
    whole = monitor.measure([x])["2"]
    monkeypatch.setattr(unitfisher.condensed, "units_together", lambda *_: 2)
    parts = monitor.measure([x[:100], x[100:]])["2"]
    assert len(list(parts.alone.held.parts())) == 3
    for name in ("c", "s", "k", "mean_q", "n_eff", "damping_share"):
        assert_close(getattr(parts, name), getattr(whole, name), **TOL)
    assert_close(parts.natural_gradient(*gradient()), whole.natural_gradient(*gradient()), **TOL)
    assert_close(parts.damped(0.1).k, whole.damped(0.1).k, **TOL)


def test_a_unit_that_is_dead_in_one_batch_only_is_alive():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(9, 3)).double()
    model[0].weight.data[0], model[0].bias.data[0] = 1.0, 0.0
    x = torch.rand(12, 1, 4).double()
    monitor = Monitor(model, sharing="joint")
    assert monitor.measure(-x)["0"].dead[0]
    assert not monitor.measure([-x, x])["0"].dead[0]
    assert not monitor.measure([x, -x])["0"].dead[0]


def test_activations_far_from_zero_keep_their_digits():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, CLASSES)), torch.randn(400, 5) + 1000
    model[0].bias.data -= model[0].weight.data @ x.mean(0)
    found = Monitor(model).measure(list(x.split(100)))["0"]
    exact = Monitor(nn.Sequential(nn.Linear(5, CLASSES)).double())
    exact.model.load_state_dict(model.state_dict())
    expected = exact.measure(x.double())["0"]
    assert_close(found.s, expected.s, rtol=1e-4, atol=0)
    assert_close(found.k, expected.k, rtol=1e-4, atol=1e-4)


def test_a_data_loader_is_read_with_its_labels():
    model, x, y = prepared("mlp")
    measured = Monitor(model).measure(DataLoader(TensorDataset(x, y), batch_size=50))["0"]
    assert measured.cosine.isfinite().all()


def test_a_data_loader_of_inputs_alone_is_read():
    model, x, _ = prepared("mlp")
    monitor = Monitor(model)
    found = monitor.measure(DataLoader(TensorDataset(x), batch_size=50))["0"]
    assert_close(found.k, monitor.measure(x)["0"].k, **TOL)


def test_batches_without_labels_have_no_gradient():
    model, x, _ = prepared("mlp")
    assert Monitor(model).measure(iter([x[:60], x[60:]]))["0"].cosine.isnan().all()


def test_memory_does_not_grow_with_the_batches():
    model, x, _ = prepared("mlp")
    monitor = Monitor(model)
    monitor.measure([x])
    one = monitor.memory_usage()["latest"]
    monitor.measure([x] * 9)
    assert monitor.memory_usage()["latest"] == one


def test_a_loader_without_batches_is_told():
    with pytest.raises(ValueError, match=r"no batch.*used up"):
        Monitor(mlp()).measure([])


def test_sums_that_do_not_fit_are_told_with_the_layers():
    model = nn.Sequential(nn.Linear(4, 300), nn.ELU(), nn.Linear(300, 40))
    monitor = Monitor(model, memory="16 MiB", solver="direct")
    monitor.measure(torch.randn(9, 4))
    before = monitor.latest
    with pytest.raises(MemoryBudgetError, match=r"most of it '2' .*units=.*layers=.*memory="):
        monitor.measure([torch.randn(9, 4)])
    assert monitor.latest is before


def test_targets_beside_a_loader_are_refused():
    with pytest.raises(ValueError, match=r"\(inputs, targets\)"):
        Monitor(mlp()).measure([torch.randn(9, 4)], targets=torch.zeros(9))


@pytest.mark.parametrize("bad", [0, 1])
def test_a_batch_that_is_not_finite_is_named(bad):
    x = [torch.randn(9, 4), torch.randn(9, 4)]
    x[bad][2, 1] = torch.nan
    with pytest.raises(NonFiniteError, match="into layer '0'"):
        Monitor(mlp()).measure(x)
    assert not Monitor(mlp(), on_nonfinite="record").measure(x)["0"].finite


@pytest.mark.parametrize("of", ["mlp", "convolution-in-groups"])
def test_a_units_operator_is_that_of_one_batch(of, monkeypatch):
    model, x, _ = prepared(of)
    monitor = Monitor(model)
    whole = unit_fisher_operator(monitor.measure(x)["0"], unit=2).dense()
    assert_close(unit_fisher_operator(monitor.measure([x])["0"], unit=2).dense(), whole, **TOL)
    monkeypatch.setattr(unitfisher.condensed, "units_together", lambda *_: 3)
    found = unit_fisher_operator(monitor.measure([x[:50], x[50:]])["0"], unit=2)
    assert_close(found.dense(), whole, **TOL)
    assert_close(found.solve(whole[0]), whole.new_tensor([1.0] + [0.0] * (len(whole) - 1)), **TOL)
