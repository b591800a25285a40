"""The Monitor in live use: when it measures, what it keeps, and how a run goes on."""

import copy
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from networks import CLASSES, NETWORKS, Answers, loss_of, mlp
from pandas.testing import assert_frame_equal
from torch import Tensor, nn
from torch.testing import assert_close

import unitfisher
from unitfisher import Monitor, Run, UncoveredLayersWarning

EXACTLY = {"rtol": 0, "atol": 0}
SINGLE = {"rtol": 1e-4, "atol": 1e-5}  # two routes through a network in single precision
COLUMNS = {
    "residual",
    "converged",
    "route",
    "step", "layer", "unit", "phase", "c", "s", "k", "sc", "mean_norm", "mean_q_norm",
    "corrected_mean_norm", "n_eff", "damping", "damping_share", "mean_share", "mean_share_q",
    "cosine", "bias_shift_share_gradient", "bias_shift_share_natural", "output_mean",
    "output_var", "dead", "finite", "c_error", "mean_q_error", "s_error", "k_error",
}  # fmt: skip
WITH_GRADIENT = ["cosine", "bias_shift_share_gradient", "bias_shift_share_natural"]


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return mlp()


def measured_steps(monitor: Monitor) -> list[int]:
    return sorted(set(monitor.to_pandas()["step"]))


def a_step(model: nn.Module, x: Tensor) -> None:
    loss_of(model(x), torch.zeros(len(x), dtype=torch.long)).backward()


SCHEDULES = {
    "each": (1, [0, 1, 2, 3, 4, 5, 6]),
    "each-third": (3, [0, 3, 6]),
    "once": (100, [0]),
    "predicate": (lambda step: step in (1, 4), [1, 4]),
}


@pytest.mark.parametrize(("every", "due"), SCHEDULES.values(), ids=SCHEDULES)
def test_passes_are_measured_when_it_is_their_turn(every, due):
    model = mlp()
    monitor = Monitor(model, every=every)
    for _ in range(7):
        model(normal(8, 4))
    assert (measured_steps(monitor), monitor.latest["0"].step, monitor.step) == (due, due[-1], 7)


def test_passes_count_but_are_not_measured_while_paused():
    model = mlp()
    monitor = Monitor(model, every=1)
    for begin in (monitor.resume, monitor.pause, monitor.resume):
        begin()
        model(normal(8, 4))
    assert (measured_steps(monitor), monitor.step) == ([0, 2], 3)


def test_a_monitor_says_what_it_watches():
    model = seeded()
    monitor = Monitor(model)
    model(normal(5, 4))
    assert repr(monitor) == "<Monitor of Sequential after 1 training passes: 0, 2, 4>"


def test_a_monitor_watches_for_the_length_of_a_with_block():
    model = mlp()
    with Monitor(model, every=1) as monitor:
        model(normal(8, 4))
    model(normal(8, 4))
    assert monitor.step == 1


def test_a_monitor_that_nobody_keeps_measures(tmp_path):
    model, run = mlp(), Run(tmp_path)
    Monitor(model, every=1, record=run)
    for _ in range(3):
        model(normal(8, 4))
    assert set(run.read()["step"]) >= {0, 1}


@pytest.mark.parametrize("sharing", ["expand", "joint", "reduce"])
@pytest.mark.parametrize("name", ["mlp", "weight-reuse", "softmax-regression"])
def test_a_training_pass_says_what_measuring_its_input_says(name, sharing):
    model = NETWORKS[name].seeded()
    monitor = Monitor(model, every=1, sharing=sharing)
    x = normal(12, 4)
    model(x)
    live = monitor.latest
    for layer, probed in monitor.measure(x).items():
        assert_close(live[layer].s, probed.s)
        assert_close(live[layer].corrected_mean, probed.corrected_mean)


def test_measuring_is_no_step():
    monitor = Monitor(mlp())
    monitor.measure(normal(8, 4))
    assert monitor.step == 0


def test_statistics_carry_no_graph():
    model = mlp()
    monitor = Monitor(model, every=1)
    monitor.targets = torch.zeros(8, dtype=torch.long)
    model(normal(8, 4))
    tensors = [v for m in monitor.latest.values() for v in vars(m).values()]
    assert not any(t.requires_grad for t in tensors if isinstance(t, Tensor))


def test_single_precision_under_autocast_is_near_that_without():
    model, x = mlp(), normal(64, 4)
    monitor = Monitor(model, every=1)
    model(x)
    expected = monitor.latest["2"].k
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert_close(monitor.latest["2"].k, expected, rtol=0.1, atol=0.05)  # bfloat16 has 8 bits


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.experts[0](x) + self.experts[1](x[:0]).sum())


def test_a_layer_that_no_row_was_sent_to_is_left_out_of_the_measurement():
    model = Experts()
    monitor = Monitor(model, every=1)
    with pytest.warns(UncoveredLayersWarning, match=r"'experts\.1' were not called"):
        model(normal(8, 4))
    assert list(monitor.latest) == ["experts.0", "head"]


class TwoParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)
        self.spare = nn.Linear(4, 5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.body(x).tanh()
        return self.head(h if mask is None else h * mask)


def test_a_layer_never_called_is_named_once_and_the_others_are_recorded():
    model = TwoParts()
    monitor = Monitor(model, every=1)
    with pytest.warns(UncoveredLayersWarning, match="'spare' were not called"):
        model(normal(8, 4))
    model(normal(8, 4))  # a second warning would be an error
    assert list(monitor.latest) == ["body", "head"]


INPUTS = {
    "tensor": lambda x, mask: x * 1,
    "arguments": lambda x, mask: (x, mask),
    "by-name": lambda x, mask: {"x": x, "mask": mask},
}


@pytest.mark.parametrize("inputs_of", INPUTS.values(), ids=INPUTS)
def test_inputs_to_measure_are_what_forward_takes(inputs_of):
    monitor = Monitor(TwoParts(), layers="head")
    measured = monitor.measure(inputs_of(normal(8, 4), torch.ones(5)))
    assert measured["head"].c.shape == (CLASSES,)


class Output(NamedTuple):
    loss: Tensor
    z: Tensor


@dataclass
class Record:
    hidden: Tensor
    scores: Tensor


PACKED = {
    "alone": (lambda z: z, None),
    "tuple": (lambda z: (z.sum(), z), 1),
    "last": (lambda z: [z.sum(), z], -1),
    "named-tuple": (lambda z: Output(z.sum(), z), "z"),
    "dict": (lambda z: {"loss": z.sum(), "z": z}, "z"),
    "dict-logits": (lambda z: {"loss": z.sum(), "logits": z}, None),
    "only-tensor": (lambda z: {"z": z, "cache": None}, None),
    "dataclass": (lambda z: Record(z.sum(), z), "scores"),
    "object": (lambda z: SimpleNamespace(z=z), "z"),
    "callable": (lambda z: [z], lambda answer: answer[0]),
    "computed": (lambda z: z.T, lambda z: z.T),
}


@pytest.mark.parametrize(("pack", "output"), PACKED.values(), ids=PACKED)
def test_logits_are_found_in_what_the_model_returns(pack, output):
    plain, packing = Answers(lambda z: z), Answers(pack)
    packing.load_state_dict(plain.state_dict())
    monitor, x = Monitor(packing, every=1, output=output), normal(8, 4)
    packing(x)
    assert_close(monitor.latest["head"].k, Monitor(plain).measure(x)["head"].k)


LAYERS = {
    "pattern": ("[02]", ["0", "2"]),
    "patterns": (["4", "0"], ["0", "4"]),
    "type": (nn.Linear, ["0", "2", "4"]),
    "predicate": (lambda name, module: module.bias.numel() == CLASSES, ["4"]),
    "mixed": (("0", lambda name, module: name == "4"), ["0", "4"]),
    "all": (None, ["0", "2", "4"]),
}


@pytest.mark.parametrize(("layers", "names"), LAYERS.values(), ids=LAYERS)
def test_layers_are_chosen_by_name_type_or_predicate(layers, names):
    model = mlp()
    monitor = Monitor(model, layers=layers, every=1)
    model(normal(8, 4))
    assert list(monitor.layers) == list(monitor.latest) == names


def test_a_wrapped_model_is_seen_through():
    model = mlp()
    monitor = Monitor(nn.DataParallel(model), every=1)
    model(normal(8, 4))
    assert list(monitor.latest) == ["0", "2", "4"]


def test_two_monitors_on_one_model_say_what_one_says():
    model, x = mlp(), normal(8, 4)
    first, second = Monitor(model, layers="0", every=1), Monitor(model, layers="[24]", every=1)
    model(x)
    alone = Monitor(mlp_like(model)).measure(x)
    for name, m in {**first.latest, **second.latest}.items():
        assert_close(m.k, alone[name].k, rtol=1e-4, atol=1e-6)


def mlp_like(model: nn.Module) -> nn.Module:
    twin = mlp()
    twin.load_state_dict(model.state_dict())
    return twin


def test_targets_are_for_one_pass_that_was_measured():
    model = mlp()
    monitor = Monitor(model, every=1)
    monitor.targets = torch.zeros(8, dtype=torch.long)
    model(normal(8, 4))
    assert monitor.targets is None


def test_targets_are_for_one_pass_that_was_not_measured():
    model = mlp()
    monitor = Monitor(model, every=2)
    model(normal(8, 4))
    monitor.targets = torch.zeros(8, dtype=torch.long)
    model(normal(8, 4))
    assert monitor.targets is None


def test_targets_wait_while_the_model_is_evaluated():
    model = mlp()
    monitor = Monitor(model, every=1)
    monitor.targets = torch.zeros(8, dtype=torch.long)
    model.eval()(normal(8, 4))
    assert monitor.targets is not None


def test_an_empirical_fisher_is_measured_live_with_the_labels_given_before():
    model, x, y = mlp(), normal(12, 4), torch.arange(12) % CLASSES
    monitor = Monitor(model, fisher="empirical", every=1)
    monitor.targets = y
    model(x)
    live = monitor.latest["2"].k
    assert_close(live, monitor.measure(x, targets=y)["2"].k)


def test_targets_that_are_given_complete_the_rows_without_a_backward_pass():
    model, x, y = mlp(), normal(12, 4), torch.arange(12) % CLASSES
    monitor = Monitor(model, every=1)
    monitor.targets = y
    loss_of(model(x), y).backward()
    told = monitor.latest["2"]
    monitor.natural_gradient()
    for name in WITH_GRADIENT:
        assert_close(getattr(told, name), getattr(monitor.latest["2"], name), **SINGLE)


@pytest.mark.parametrize("name", ["mlp", "weight-reuse", "conv-batchnorm-dropout-in-place"])
def test_natural_gradients_have_the_shapes_of_weight_and_bias(name):
    network = NETWORKS[name]
    model, (x, y) = network.seeded(), network.batch()
    monitor = Monitor(model, layers=(nn.Linear, nn.Conv2d)[: 2 if "conv" in name else 1], every=1)
    loss_of(model(x), y).backward()
    for layer, (dw, dw0) in monitor.natural_gradient().items():
        weight, bias = monitor.layers[layer].weight, monitor.layers[layer].bias
        assert dw.shape == weight.shape
        assert dw0 is None if bias is None else dw0.shape == bias.shape


def test_natural_gradients_are_those_of_the_newest_statistics():
    model, x = mlp(), normal(12, 4)
    monitor = Monitor(model, every=1)
    a_step(model, x)
    newest = monitor.measure(normal(30, 4, seed=1))["2"]
    found = monitor.natural_gradient()["2"]
    assert_close(found, newest.natural_gradient(model[2].weight.grad, model[2].bias.grad))


def test_natural_gradients_take_whatever_gradient_was_accumulated():
    model, x = mlp(), normal(12, 4)
    monitor = Monitor(model, every=1)
    a_step(model, x)
    once = monitor.natural_gradient()["2"].dw
    a_step(model, x)
    assert_close(monitor.natural_gradient()["2"].dw, 2 * once, **SINGLE)


def test_a_natural_gradient_solves_the_fisher_for_the_gradient():
    model, x = mlp().double(), normal(40, 4).double()
    monitor = Monitor(model, every=1, damping=0.0)
    a_step(model, x)
    dw, dw0 = monitor.natural_gradient()["2"]
    fisher = unitfisher.unit_fisher(model, x)["2"]
    step = torch.cat([dw, dw0[:, None]], 1)
    gradient = torch.cat([model[2].weight.grad, model[2].bias.grad[:, None]], 1)
    assert_close((fisher @ step.unsqueeze(-1)).squeeze(-1), gradient)


def test_angles_and_shares_of_a_gradient_join_the_rows_of_its_step():
    model, x = mlp(), normal(12, 4)
    monitor = Monitor(model, every=1)
    for turn in range(2):
        a_step(model, x)
        if turn == 1:
            monitor.natural_gradient()
    model(x)
    known = monitor.to_pandas().groupby("step")[WITH_GRADIENT].count().gt(0).all(axis=1)
    assert known.to_dict() == {0: False, 1: True, 2: False}


def test_looking_at_the_table_does_not_lose_the_gradient_that_follows():
    model = mlp()
    monitor = Monitor(model, every=1)
    a_step(model, normal(12, 4))
    monitor.to_pandas()
    monitor.natural_gradient()
    assert monitor.to_pandas()["cosine"].notna().all()


def test_a_natural_gradient_makes_an_angle_of_at_most_a_right_one_with_its_gradient():
    model = mlp()
    monitor = Monitor(model, every=1)
    a_step(model, normal(12, 4))
    monitor.natural_gradient()
    assert monitor.to_pandas()["cosine"].between(0, 1 + 1e-6).all()  # F is positive definite


@pytest.mark.parametrize("absent", ["weight", "bias"])
def test_a_layer_with_half_a_gradient_is_left_out(absent):
    model = mlp()
    monitor = Monitor(model, ["0", "2"], every=1)
    a_step(model, normal(12, 4))
    model[0].get_parameter(absent).grad = None
    assert list(monitor.natural_gradient()) == ["2"]
    assert monitor.latest["0"].cosine.isnan().all()
    assert monitor.latest["2"].cosine.isfinite().all()


def test_steps_along_the_natural_gradient_bring_the_loss_down():
    model, x = seeded(), normal(60, 4)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    monitor = Monitor(model, every=1, damping=1e-2)
    losses = []
    for _ in range(20):
        loss = loss_of(model(x), y)
        model.zero_grad()
        loss.backward()
        for name, (dw, dw0) in monitor.natural_gradient().items():
            layer = monitor.layers[name]
            layer.weight.data -= 0.05 * dw
            layer.bias.data -= 0.05 * dw0
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_frozen_layers_are_left_out_of_the_natural_gradient():
    model = mlp()
    model[2].requires_grad_(False)
    monitor = Monitor(model, layers=nn.Linear, every=1)
    a_step(model, normal(12, 4))
    assert list(monitor.natural_gradient()) == ["0", "4"]


def test_a_sample_of_units_stays_the_same_and_says_what_all_units_say():
    model, x = mlp(), normal(12, 4)
    monitor = Monitor(model, every=1, units=3)
    model(x)
    units = monitor.latest["0"].units
    model(x)
    assert (monitor.latest["0"].units.tolist(), len(units)) == (units.tolist(), 3)
    everything = Monitor(mlp_like(model)).measure(x)["0"]
    assert_close(monitor.latest["0"].k, everything.k[units])
    assert_close(monitor.latest["0"].output_mean, everything.output_mean[units])


def test_a_layer_of_fewer_units_than_asked_for_is_observed_whole():
    monitor = Monitor(mlp(), units=5)
    sizes = {name: len(m.units) for name, m in monitor.measure(normal(12, 4)).items()}
    assert sizes == {"0": 5, "2": 5, "4": CLASSES}


def test_natural_gradients_of_a_sample_are_its_rows():
    model = mlp()
    monitor = Monitor(model, every=1, units=2)
    a_step(model, normal(12, 4))
    dw, dw0 = monitor.natural_gradient()["0"]
    assert (dw.shape, dw0.shape) == ((2, 4), (2,))


def drawn(seed: int, **options: object) -> dict[str, Tensor]:
    monitor = Monitor(seeded(), seed=seed, **options)
    measured = monitor.measure(normal(12, 4))["0"]
    return {"units": measured.units, "c": measured.c}


CHANCES = {
    "units": {"units": 3},
    "labels": {"fisher": "mc"},
    "signs": {"fisher": "rademacher"},
}


@pytest.mark.parametrize("options", CHANCES.values(), ids=CHANCES)
def test_a_seed_fixes_what_is_drawn(options):
    assert_close(drawn(1, **options), drawn(1, **options), **EXACTLY)
    assert not drawn(1, **options)["c"].equal(drawn(2, **options)["c"])


def passes(model: nn.Module, monitor: Monitor, steps: range) -> pd.DataFrame:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in steps:
        a_step(model, normal(8, 4, seed=step))
        optimizer.step()
        optimizer.zero_grad()
    return monitor.to_pandas()


OPTIONS = {"fisher": "mc", "every": 2, "units": 3}


def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not_been(tmp_path):
    whole = seeded()
    expected = passes(whole, Monitor(whole, **OPTIONS), range(9))

    model = seeded()
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
    whole = seeded()
    expected = passes(whole, Monitor(whole, **OPTIONS), range(9))

    model = seeded()
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
    first, second = seeded(), seeded()
    expected = passes(first, Monitor(first, every=2), range(5))
    recording = Monitor(second, every=2, record=record_in(tmp_path))
    assert_frame_equal(passes(second, recording, range(5)), expected, check_dtype=False)


def test_a_record_is_a_table_that_anyone_reads(tmp_path):
    model = seeded()
    monitor = Monitor(model, every=2, record=tmp_path)
    expected = passes(model, monitor, range(5))
    monitor.detach()
    assert_frame_equal(pd.read_parquet(tmp_path / "units"), expected)


def test_detaching_closes_a_record_that_the_monitor_opened(tmp_path):
    model = mlp()
    monitor = Monitor(model, every=1, record=tmp_path)
    model(normal(8, 4))
    monitor.detach()
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


def test_flushing_writes_the_newest_measurement(tmp_path):
    model = mlp()
    monitor = Monitor(model, every=1, record=tmp_path)
    model(normal(8, 4))
    monitor.flush()
    assert set(pd.read_parquet(tmp_path / "units")["step"]) == {0}


ENDINGS = """
import os, signal, sys
import torch
from torch import nn
from unitfisher import Monitor, Run

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


@pytest.mark.parametrize("sharing", ["expand", "joint", "reduce"])
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
