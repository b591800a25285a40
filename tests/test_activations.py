"""Mean and variance of every unit's output, of each training pass."""

import pandas as pd
import pytest
import torch
from networks import NETWORKS
from torch import Tensor, nn
from torch.testing import assert_close

from unitfisher import Monitor

KINDS = (nn.Linear, nn.Conv2d)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ELU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def batches(count: int) -> list[Tensor]:
    chance = torch.Generator().manual_seed(1)
    return [torch.randn(20, 4, generator=chance) for _ in range(count)]


def outputs(model: nn.Sequential, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"0": model[:2](x), "2": model[:4](x), "4": model(x)}


@pytest.mark.parametrize("recorded", [False, True])
def test_each_pass_asked_for_has_its_rows(tmp_path, recorded):
    model = network()
    record = tmp_path / "run" if recorded else None
    monitor = Monitor(model, every=4, activations=2, record=record)
    data = batches(5)
    for x in data:
        model(x)
    table = monitor.to_pandas("activations")
    assert table.groupby("step").size().to_dict() == {0: 14, 2: 14, 4: 14}
    for step in (0, 2, 4):
        for layer, y in outputs(model, data[step]).items():
            rows = table.query(f"step == {step} and layer == '{layer}'")
            assert rows["unit"].tolist() == list(range(y.shape[1]))
            found = torch.tensor(rows[["mean", "var"]].to_numpy(), dtype=torch.float32)
            expected = torch.stack([y.mean(0), y.var(0, correction=0)], 1)
            assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert monitor.to_pandas()["step"].unique().tolist() == [0, 4]  # measured whole
    monitor.detach()
    if recorded:
        assert len(pd.read_parquet(tmp_path / "run" / "activations")) == 42


def test_no_measurement_is_needed():
    model = network()
    monitor = Monitor(model, every=lambda step: False, activations=1)
    for x in batches(3):
        model(x)
    assert len(monitor.to_pandas("activations")) == 3 * 14
    assert monitor.to_pandas().empty
    assert not monitor.latest


def test_evaluation_is_not_counted():
    model = network().eval()
    monitor = Monitor(model, activations=1)
    model(batches(1)[0])
    assert monitor.to_pandas("activations").empty


@pytest.mark.parametrize("name", ["conv-batchnorm-dropout-in-place", "mlp", "checkpoint"])
def test_they_are_those_of_a_measurement(name):
    model = NETWORKS[name].seeded()
    monitor = Monitor(model, lambda _, layer: isinstance(layer, KINDS), every=1, activations=1)
    model(torch.randn(8, *NETWORKS[name].size))
    rows, measured = monitor.to_pandas("activations"), monitor.to_pandas()
    assert_close(torch.tensor(rows["mean"]), torch.tensor(measured["output_mean"]))
    assert_close(torch.tensor(rows["var"]), torch.tensor(measured["output_var"]))


def test_a_restart_goes_on_where_the_state_was():
    first, data = network(), batches(6)
    monitor = Monitor(first, activations=1)
    for x in data[:3]:
        first(x)
    state = monitor.state_dict()
    for x in data[3:]:
        first(x)
    second = network()
    again = Monitor(second, activations=1)
    again.load_state_dict(state)
    for x in data[3:]:
        second(x)
    assert again.to_pandas("activations").equals(monitor.to_pandas("activations"))


def test_an_unknown_table_is_named():
    with pytest.raises(ValueError, match="table must be one of 'units', 'activations'"):
        Monitor(network()).to_pandas("weights")
