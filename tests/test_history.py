"""What a Monitor keeps: its table, its record, its state, its window; how a run goes on."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from measured import measured_steps
from networks import CLASSES, a_step, mlp, normal, seeded_mlp
from pandas.testing import assert_frame_equal
from strategies import all_sharings
from torch import Tensor, nn

import unitfisher
from unitfisher import LayerSelectionError, Monitor, Run

COLUMNS = {
    "residual",
    "converged",
    "route",
    "step", "layer", "unit", "phase", "c", "s", "k", "sc", "mean_norm", "mean_q_norm",
    "corrected_mean_norm", "n_eff", "damping", "damping_share", "mean_share", "mean_share_q",
    "cosine", "bias_shift_share_gradient", "bias_shift_share_natural", "output_mean",
    "output_var", "dead", "finite", "c_error", "mean_q_error", "s_error", "k_error",
}  # fmt: skip


def passes(model: nn.Module, monitor: Monitor, steps: range) -> pd.DataFrame:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in steps:
        a_step(model, normal(8, 4, seed=step))
        optimizer.step()
        optimizer.zero_grad()
    return monitor.to_pandas()


OPTIONS = {"fisher": "mc", "every": 2, "units": 3}


def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not_been(tmp_path):
    whole = seeded_mlp()
    expected = passes(whole, Monitor(whole, **OPTIONS), range(9))

    model = seeded_mlp()
    monitor = Monitor(model, **OPTIONS)
    passes(model, monitor, range(5))
    torch.save([model.state_dict(), monitor.state_dict()], tmp_path / "checkpoint.pt")

    state, observed = torch.load(tmp_path / "checkpoint.pt")  # plain data only
    again = mlp()
    again.load_state_dict(state)
    resumed = Monitor(again, **OPTIONS, seed=7)
    resumed.load_state_dict(observed)
    assert_frame_equal(passes(again, resumed, range(5, 9)), expected)


def test_a_record_that_is_resumed_loses_what_came_after_the_state(tmp_path):
    whole = seeded_mlp()
    expected = passes(whole, Monitor(whole, **OPTIONS), range(9))

    model = seeded_mlp()
    monitor = Monitor(model, **OPTIONS, record=Run(tmp_path, {}))
    passes(model, monitor, range(5))
    weights, state = copy.deepcopy(model.state_dict()), monitor.state_dict()
    passes(model, monitor, range(5, 7))  # and is killed
    monitor.flush()

    again = mlp()
    again.load_state_dict(weights)
    resumed = Monitor(again, **OPTIONS, record=Run(tmp_path, {}, resume=True))
    resumed.load_state_dict(state)
    assert_frame_equal(passes(again, resumed, range(5, 9)), expected)


def test_a_state_whose_rows_are_lost_is_refused(tmp_path):
    model = mlp()
    monitor = Monitor(model, every=1, record=Run(tmp_path, {}))
    model(normal(8, 4))
    state = monitor.state_dict()
    monitor.detach()
    shutil.rmtree(tmp_path / "units")
    resumed = Monitor(mlp(), every=1, record=Run(tmp_path, {}, resume=True))
    with pytest.raises(ValueError, match=r"has 0 of the \d+ rows of 'units'"):
        resumed.load_state_dict(state)


def test_a_state_goes_on_in_a_new_record(tmp_path):
    model = mlp()
    first = Monitor(model, every=1, record=tmp_path / "first")
    model(normal(8, 4))
    state = first.state_dict()
    first.detach()
    second = Monitor(model, every=1, record=tmp_path / "second")
    second.load_state_dict(state)
    model(normal(8, 4))
    assert measured_steps(second) == [1]


def test_a_state_of_another_record_takes_no_rows_from_this_one(tmp_path):
    states = []
    for record in (None, tmp_path / "one"):
        model = mlp()
        monitor = Monitor(model, every=1, record=record)
        model(normal(8, 4))
        states.append(monitor.state_dict())
        monitor.detach()
    model = mlp()
    monitor = Monitor(model, every=1, record=tmp_path / "two")
    for _ in range(3):
        model(normal(8, 4))
    for state in states:
        monitor.load_state_dict(state)
    assert monitor.latest == {}
    assert monitor.to_pandas()["step"].value_counts().to_dict() == {0: 28, 1: 14, 2: 14}


def test_two_monitors_of_one_record_go_back_together(tmp_path):
    models, (first, *others) = [mlp(), mlp()], SIZES
    with Run(tmp_path) as run:
        monitors = [
            Monitor(model, layers, every=1, record=run)
            for model, layers in zip(models, (first, others), strict=True)
        ]
        for model in 2 * models:
            model(normal(8, 4))
        states = [monitor.state_dict() for monitor in monitors]
        expected = run.read()
        for model in models:
            model(normal(8, 4))
        for monitor, state in zip(monitors, states, strict=True):
            monitor.load_state_dict(state)
        assert_frame_equal(run.read(), expected)


def test_a_run_takes_layers_of_one_name_from_one_model_at_a_time(tmp_path):
    first, *others = SIZES
    with Run(tmp_path) as run:
        monitor = Monitor(mlp(), record=run)
        with pytest.raises(LayerSelectionError, match=f"layers of the names '{first}' are written"):
            Monitor(mlp(), first, record=run)
        monitor.detach()
        standing = Monitor(mlp(), first, record=run), Monitor(mlp(), others, record=run)
        assert run.folder == tmp_path
        for each in standing:
            each.detach()


def test_a_record_says_how_its_rows_were_measured(tmp_path):
    asked = {"fisher": "mc", "sharing": "joint", "units": 2}
    Monitor(mlp(), record=tmp_path / "folder", **asked).detach()
    for _ in range(2):
        with Run(tmp_path / "run", resume=True) as run:
            Monitor(mlp(), record=run, **asked)
    folder, run = (json.loads((tmp_path / f / "config.json").read_text()) for f in FOLDERS)
    assert run["monitors"] == [folder["config"]]
    expected = asked | {"likelihood": "categorical", "layers": list(SIZES), "solver": "auto"}
    assert expected.items() <= folder["config"].items()


FOLDERS = ("folder", "run")


def test_a_state_that_was_taken_does_not_change_with_the_passes_that_follow():
    model = mlp()
    monitor = Monitor(model, every=1)
    model(normal(8, 4))
    state = monitor.state_dict()
    model(normal(8, 4))
    other = Monitor(mlp())
    other.load_state_dict(state)
    assert (other.step, measured_steps(other)) == (1, [0])


def test_memory_is_counted_and_grows_by_the_rows():
    model = mlp()
    monitor = Monitor(model, every=1)
    used = [monitor.memory_usage()]
    for _ in range(3):
        model(normal(8, 4))
        used.append(monitor.memory_usage())
    assert used[0] == {"latest": 0, "window": 0, "history": 0, "total": 0}
    assert used[3]["latest"] == used[1]["latest"] > 0
    assert used[3]["history"] == 2 * used[2]["history"] > used[1]["history"] == 0


def test_a_recorded_run_keeps_no_rows_in_memory(tmp_path):
    model = mlp()
    monitor = Monitor(model, every=1, record=tmp_path)
    for _ in range(3):
        model(normal(8, 4))
    assert monitor.memory_usage()["history"] == 0


def test_the_table_has_one_row_for_each_step_layer_and_unit():
    model = mlp()
    monitor = Monitor(model, every=2)
    for _ in range(5):
        model(normal(8, 4))
    table = monitor.to_pandas()
    expected = [(s, name, u) for s in (0, 2, 4) for name, n in SIZES.items() for u in range(n)]
    assert list(zip(table["step"], table["layer"], table["unit"], strict=True)) == expected


SIZES = {"0": 6, "2": 5, "4": CLASSES}


def test_the_table_has_the_columns_of_a_record():
    monitor = Monitor(mlp())
    monitor.measure(normal(8, 4))
    assert set(monitor.to_pandas().columns) == COLUMNS


def test_the_table_says_what_the_statistics_say():
    monitor = Monitor(mlp(), fisher="mc", samples=2)
    m = monitor.measure(normal(8, 4))["2"]
    table = monitor.to_pandas().query("layer == '2'")
    expected = {
        "c": m.c,
        "s": m.s,
        "k": m.k,
        "sc": m.s * m.c,
        "mean_norm": m.mean.norm().expand(5),
        "mean_q_norm": m.mean_q.norm(dim=1),
        "corrected_mean_norm": m.corrected_mean.norm(dim=1),
        "c_error": m.c_error,
        "mean_q_error": m.mean_q_error.norm(dim=1),
        "s_error": m.s_error,
        "k_error": m.k_error,
        "n_eff": m.n_eff,
        "damping_share": m.damping_share,
        "mean_share": m.mean_share.expand(5),
        "output_mean": m.output_mean,
        "output_var": m.output_var,
        "dead": m.dead,
    }
    for name, values in expected.items():
        np.testing.assert_allclose(table[name], values.numpy(), rtol=1e-12, err_msg=name)


def test_rows_tell_training_passes_from_probes():
    model = mlp()
    monitor = Monitor(model, every=1)
    model(normal(8, 4))
    monitor.measure(normal(8, 4))
    phases = monitor.to_pandas().groupby("phase")["step"].agg(["min", "count"])
    assert phases.to_dict("index") == {
        "measure": {"min": 1, "count": 14},
        "train": {"min": 0, "count": 14},
    }


def test_an_empty_table_is_a_table():
    assert Monitor(mlp()).to_pandas().empty


RECORDS = {"folder": lambda folder: folder, "run": Run, "text": str}


@pytest.mark.parametrize("record_in", RECORDS.values(), ids=RECORDS)
def test_a_record_holds_the_rows_of_a_monitor_without_one(tmp_path, record_in):
    first, second = seeded_mlp(), seeded_mlp()
    expected = passes(first, Monitor(first, every=2), range(5))
    recording = Monitor(second, every=2, record=record_in(tmp_path))
    assert_frame_equal(passes(second, recording, range(5)), expected, check_dtype=False)


def test_a_record_is_a_table_that_anyone_reads(tmp_path):
    model = seeded_mlp()
    monitor = Monitor(model, every=2, record=tmp_path)
    expected = passes(model, monitor, range(5))
    monitor.detach()
    assert_frame_equal(pd.read_parquet(tmp_path / "units"), expected)


@pytest.mark.parametrize("write", [Monitor.detach, Monitor.flush], ids=["detach", "flush"])
def test_who_detaches_or_flushes_finds_the_newest_measurement_in_the_record(tmp_path, write):
    model = mlp()
    monitor = Monitor(model, every=1, record=tmp_path)
    model(normal(8, 4))
    write(monitor)
    assert set(pd.read_parquet(tmp_path / "units")["step"]) == {0}


def test_detaching_leaves_a_run_open_that_was_given(tmp_path):
    run = Run(tmp_path)
    model = mlp()
    monitor = Monitor(model, every=1, record=run)
    model(normal(8, 4))
    monitor.detach()
    run.append("epochs", {"loss": 1.0})
    assert (run.tables, len(run.read("units"))) == (["epochs", "plan", "units"], 14)


def test_a_run_that_its_owner_closes_holds_the_newest_measurement(tmp_path):
    model = mlp()
    with Run(tmp_path) as run:
        Monitor(model, every=1, record=run)
        model(normal(8, 4))
    assert set(pd.read_parquet(tmp_path / "units")["step"]) == {0}


ENDINGS = """
import os, signal, sys
import torch
from torch import nn
from unitfisher import LayerSelectionError, Monitor, Run

folder, x = sys.argv[1], torch.ones(8, 4)

def attach(record):
    models.append(nn.Sequential(nn.Linear(4, 3), nn.ELU(), nn.Linear(3, 2)))
    return Monitor(models[-1], every=1, record=record)

models = []
if os.fork() == 0:
    monitor = attach(f"{folder}/killed")
    for step in range(3):
        models[-1](x)
    monitor.flush()
    models[-1](x)
    os.kill(os.getpid(), signal.SIGKILL)
assert os.wait()[1] == signal.SIGKILL

attach(f"{folder}/folder"), attach(Run(f"{folder}/run"))
for model in models:
    for step in range(3):
        model(x)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such end on this system")
def test_the_end_of_the_process_keeps_what_was_measured(tmp_path):
    package = Path(unitfisher.__file__).parents[1]
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ENDINGS, tmp_path],
        env={**os.environ, "PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    kept = [pd.read_parquet(tmp_path / how / "units") for how in ("folder", "run", "killed")]
    assert [set(table["step"]) for table in kept] == 3 * [{0, 1, 2}]


# Several batches, and a share of the time


def pooled(model: nn.Module, window: int, *batches: Tensor, **options: object) -> pd.DataFrame:
    monitor = Monitor(model, every=1, window=window, **options)
    for x in batches:
        model(x)
    monitor.detach()
    table = monitor.to_pandas()
    return table[table["step"] == len(batches) - 1].reset_index(drop=True)


def of_theory(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop(columns=["step", "route", "output_mean", "output_var"])


@all_sharings
@pytest.mark.parametrize("of", ["mlp", "convolutional"])
def test_a_window_measures_its_batches_as_one(of, sharing):
    linear, size = of == "mlp", (4,) if of == "mlp" else (2, 5, 5)
    model = mlp().double() if linear else convolutional().double()
    x = [normal(n, *size, seed=n).double() for n in (9, 5, 8)]
    found = pooled(model, 2, *x, sharing=sharing)
    whole = pooled(model, 1, torch.cat(x[1:]), sharing=sharing)
    assert_frame_equal(of_theory(found), of_theory(whole), rtol=1e-6)


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2), nn.ELU(), nn.Flatten(), nn.Linear(12, CLASSES)
    )


def test_a_batch_that_is_not_finite_does_not_stay_in_the_window():
    model = mlp().double()
    x = [normal(8, 4, seed=n).double() for n in range(3)]
    expected = pooled(model, 2, x[0], x[2])
    x[1][3, 1] = torch.nan
    found = pooled(model, 2, *x, on_nonfinite="record")
    assert_frame_equal(of_theory(found), of_theory(expected))


def test_sequences_of_different_lengths_are_not_pooled_jointly():
    model = nn.Sequential(nn.Linear(4, 3))
    monitor = Monitor(model, every=1, window=2, sharing="joint")
    model(normal(8, 5, 4))
    with pytest.raises(ValueError, match=r"\[5, 6\] positions.*sharing='expand'"):
        model(normal(8, 6, 4))
    monitor.detach()


def test_a_window_goes_on_after_a_restart(tmp_path):
    model = mlp()
    x = [normal(8, 4, seed=n) for n in range(3)]
    whole = pooled(model, 3, *x)
    first = Monitor(model, every=1, window=3)
    model(x[0])
    model(x[1])
    torch.save(first.state_dict(), tmp_path / "monitor.pt")
    assert first.memory_usage()["window"] > 0
    first.detach()
    second = Monitor(model, every=1, window=3)
    second.load_state_dict(torch.load(tmp_path / "monitor.pt"))
    model(x[2])
    table = second.to_pandas()
    assert_frame_equal(table[table["step"] == 2].reset_index(drop=True), whole)


def test_a_share_of_the_time_measures_the_first_step_and_not_each():
    model = mlp()
    monitor = Monitor(model, overhead=1e-3)
    for _ in range(20):
        a_step(model, normal(8, 4))
    assert measured_steps(monitor) == [0]
