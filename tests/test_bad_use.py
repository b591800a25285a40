"""Every mistake gets an error that says what is wrong, where, and what to do instead."""

import gc
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from networks import CLASSES, Answers, Checkpointed, mlp, normal
from torch import Tensor, nn

from unitfisher import (
    Gaussian,
    LayerSelectionError,
    Monitor,
    OutputError,
    RecordExistsError,
    Run,
    UncoveredLayersWarning,
    per_sample_gradients,
)

pytestmark = pytest.mark.usefixtures("as_users_run_it")  # the type checker would answer first


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden1, self.hidden2 = nn.Linear(4, 5), nn.Linear(5, 5)
        self.norm = nn.LayerNorm(5)
        self.output = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.norm(self.hidden2(self.hidden1(x).tanh()).tanh()))


ATTACHED = {
    "no-module": (lambda: mlp().parameters(), {}, "attach to an nn.Module, not to a generator"),
    "nothing-supported": (partial(nn.LSTM, 3, 4), {}, "no trainable layer.*Linear.*LSTM"),
    "nothing-trainable": (nn.ReLU, {}, "no trainable layer"),
    "all-frozen": (lambda: mlp().requires_grad_(False), {}, "no trainable layer"),
    "misspelt": (Named, {"layers": "hiden1"}, "'hiden1' matches no .*hidden1"),
    "one-of-two-misspelt": (
        Named,
        {"layers": ["output", "hiden1"]},
        "'hiden1' matches no .*hidden1",
    ),
    "nothing-near": (Named, {"layers": "xyz"}, "'xyz' matches no .*'hidden1', 'hidden2'"),
    "type-without-match": (Named, {"layers": nn.Conv2d}, "Conv2d.*matches no .*'hidden1'"),
    "predicate-without-match": (Named, {"layers": lambda *_: False}, "matches no .*'hidden1'"),
    "type-not-supported": (Named, {"layers": nn.LayerNorm}, r"'norm' \(LayerNorm\).*per_sample"),
    "one-of-two-not-supported": (
        Named,
        {"layers": ["output", nn.LayerNorm]},
        r"'norm' \(LayerNorm\).*per_sample",
    ),
    "no-choice": (Named, {"layers": []}, "layers=? ?.*'hidden1'"),
    "no-kind-of-choice": (Named, {"layers": 3}, "layers.*name.*type.*predicate.*got 3"),
    "lazy": (lambda: nn.LazyLinear(3), {}, "lazy.*run the model once before attaching"),
    "complex": (lambda: nn.Linear(3, 3, dtype=torch.cfloat), {}, "complex weights.*layers="),
    "an-instance": (Named, {"layers": nn.Linear(2, 2)}, "layers.*name.*type.*predicate"),
}


@pytest.mark.parametrize(("make", "options", "told"), ATTACHED.values(), ids=ATTACHED)
def test_layers_that_cannot_be_chosen_are_told_with_those_that_can(make, options, told):
    with pytest.raises(LayerSelectionError, match=told):
        Monitor(make(), **options)


OPTIONS = {
    "likelihood": ({"likelihood": "softmax"}, "'categorical', 'bernoulli', 'gaussian'.*'softmax'"),
    "likelihood-class": ({"likelihood": Gaussian}, "Likelihood object"),
    "fisher": (
        {"fisher": "true"},
        "'mc', 'rademacher', 'top-rademacher', 'empirical'.*'true'",
    ),
    "sharing": ({"sharing": "sum"}, "'expand', 'joint', 'reduce'.*'sum'"),
    "on_nonfinite": ({"on_nonfinite": "skip"}, "'raise', 'record'.*'skip'"),
    "every-zero": ({"every": 0}, "every must be a whole number from 1.*got 0"),
    "every-negative": ({"every": -5}, "every must be a whole number from 1.*got -5"),
    "every-fraction": ({"every": 0.5}, "every must be a whole number from 1.*got 0.5"),
    "every-truth": ({"every": True}, "every must be a whole number from 1.*got True"),
    "every-text": ({"every": "epoch"}, "every must be a whole number from 1.*predicate.*'epoch'"),
    "every-and-overhead": ({"every": 9, "overhead": 0.1}, "every=9 and overhead=0.1 both.*one of"),
    "damping-negative": ({"damping": -1e-3}, "damping must be 0 or more.*-0.001"),
    "damping-nan": ({"damping": float("nan")}, "damping must be 0 or more.*nan"),
    "damping-infinite": ({"damping": float("inf")}, "damping must be .*finite.*inf"),
    "damping-text": ({"damping": "auto"}, "damping must be .*'auto'"),
    "samples-zero": ({"fisher": "mc", "samples": 0}, "samples must be .*1.*got 0"),
    "samples-fraction": ({"fisher": "mc", "samples": 1.5}, "samples must be .*1.*got 1.5"),
    "overhead-zero": ({"overhead": 0}, "overhead must be above 0.*5 %.*got 0"),
    "overhead-text": ({"overhead": "5%"}, "overhead must be above 0.*got '5%'"),
    "memory-zero": ({"memory": 0}, "memory must be a number of bytes or as '2 GiB', got 0"),
    "memory-none": ({"memory": "0 GiB"}, "memory must be .*'0 GiB'"),
    "memory-text": ({"memory": "much"}, "memory must be .*'much'"),
    "memory-fraction": ({"memory": 1.5}, "memory must be .*got 1.5"),
    "solver-unknown": (
        {"solver": "lu"},
        "solver must be one of 'auto', 'direct', 'iterative'.*'lu'",
    ),
    "rows-zero": ({"rows": 0}, "rows must be a whole number from 1 or None for all, got 0"),
    "window-zero": ({"window": 0}, "window must be a whole number from 1 of batches, got 0"),
    "units-zero": ({"units": 0}, "units must be .*1.*None for all.*got 0"),
    "units-fraction": ({"units": 0.1}, "units must be .*1.*None for all.*got 0.1"),
    "record-number": ({"record": 3}, "record must be a folder or a Run, got 3"),
    "seed-text": ({"seed": "a"}, "seed must be a whole number of 64 bits, got 'a'"),
    "seed-large": ({"seed": 2**65}, "seed must be a whole number of 64 bits, got 36893"),
}


@pytest.mark.parametrize(("options", "told"), OPTIONS.values(), ids=OPTIONS)
def test_an_impossible_option_is_told_with_what_is_possible(options, told):
    with pytest.raises(ValueError, match=told):
        Monitor(mlp(), **options)


def test_numbers_of_numpy_are_numbers():
    monitor = Monitor(mlp(), damping=np.float32(0.01), every=np.int64(5), window=np.int32(2))
    assert monitor.options.damping == pytest.approx(0.01)


def test_an_error_on_attaching_leaves_neither_hooks_nor_folder(tmp_path):
    model, folder = mlp(), tmp_path / "run"
    with pytest.raises(ValueError, match="every must be"):
        Monitor(model, every=0, record=folder)
    with pytest.raises(LayerSelectionError, match="matches no"):
        Monitor(model, layers="none", record=folder)
    assert not folder.exists()
    Monitor(model)  # nothing is observed yet


def test_a_layer_is_observed_once():
    model = mlp()
    Monitor(model, layers=["0", "2"])
    with pytest.raises(LayerSelectionError, match=r"'2' are observed .*already.*detach\(\)"):
        Monitor(model, layers=["2", "4"])


def test_a_layer_is_observed_once_also_through_a_wrapper():
    model = mlp()
    Monitor(nn.DataParallel(model))
    with pytest.raises(LayerSelectionError, match="observed .*already"):
        Monitor(model)


def test_a_layer_is_observed_once_also_from_an_inner_model():
    model = nn.Sequential(mlp(), nn.Linear(CLASSES, CLASSES))
    Monitor(model[0])
    with pytest.raises(LayerSelectionError, match=r"'0\.0'.*observed .*already"):
        Monitor(model)


def test_a_layer_is_observed_once_also_from_an_outer_model():
    model = nn.Sequential(mlp(), nn.Linear(CLASSES, CLASSES))
    Monitor(model)
    with pytest.raises(LayerSelectionError, match=r"'0'.*observed .*already"):
        Monitor(model[0])


@pytest.mark.parametrize("end", ["detached", "deleted"])
def test_a_layer_is_free_again_after_its_monitor_or_model(end):
    inner = mlp()
    first = Monitor(nn.Sequential(inner))
    if end == "detached":
        first.detach()
    del first
    gc.collect()
    Monitor(inner)


def test_other_layers_of_an_observed_model_may_be_observed():
    model = mlp()
    Monitor(model, layers="0", every=1)
    second = Monitor(model, layers="2", every=1)
    model(normal(8, 4))
    assert list(second.latest) == ["2"]


def test_a_layer_may_be_observed_again_after_detaching():
    model = mlp()
    Monitor(model).detach()
    second = Monitor(model, every=1)
    model(normal(8, 4))
    assert second.step == 1


def compiled_in_place() -> nn.Module:
    model = mlp()
    model.compile(backend="eager")
    return model


COMPILED = {"copy": lambda: torch.compile(mlp(), backend="eager"), "in-place": compiled_in_place}


@pytest.mark.parametrize("make", COMPILED.values(), ids=COMPILED)
def test_a_compiled_model_is_refused_with_the_way_round(make):
    with pytest.raises(LayerSelectionError, match=r"compiled.*attach to the model.*measure\(x\)"):
        Monitor(make())


def test_a_folder_with_another_run_is_refused(tmp_path):
    with Monitor(mlp(), record=tmp_path) as monitor:
        monitor.measure(torch.randn(5, 4))
    with pytest.raises(RecordExistsError, match="already holds a run; choose another folder"):
        Monitor(mlp(), record=tmp_path)


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RecordExistsError, match=r"holds thesis\.tex but no run"):
        Monitor(mlp(), record=tmp_path)


def test_a_monitor_whose_record_is_complete_measures_no_more(tmp_path):
    monitor = Monitor(mlp(), record=tmp_path)
    monitor.detach()
    for _ in range(2):
        with pytest.raises(ValueError, match="detached.*measure before detach"):
            monitor.measure(normal(8, 4))


def test_what_is_no_state_of_a_monitor_is_told():
    with pytest.raises(ValueError, match="no state of a Monitor: generators, .*missing"):
        Monitor(mlp()).load_state_dict({"step": 3, "identity": {}})


def test_a_run_that_was_closed_takes_no_measurement(tmp_path):
    run = Run(tmp_path)
    run.close()
    model = mlp()
    monitor = Monitor(model, every=1, record=run)
    model(normal(8, 4))
    with pytest.raises(RuntimeError, match="is closed"):
        monitor.flush()


def test_layers_that_are_left_out_are_named_once_with_the_ways_out():
    told = r"LayerNorm norm.*layers=\(.*Linear.*per_sample_gradients"
    with pytest.warns(UncoveredLayersWarning, match=told) as warned:
        Monitor(Named(), every=1).model(normal(8, 4))
    assert len(warned) == 1


def test_layers_that_are_left_out_are_named_by_kind():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.PReLU(), nn.LayerNorm(3))
    with pytest.warns(UncoveredLayersWarning, match=r"nn\.LayerNorm 1, 3; nn\.PReLU 2\. "):
        Monitor(model)


def test_the_note_on_layers_left_out_proposes_kinds_that_the_model_has():
    with pytest.warns(UncoveredLayersWarning, match=r"layers=\((nn\.)?Linear,?\)"):
        Monitor(Named())


def test_naming_the_layers_silences_the_note():
    model = Named()
    Monitor(model, layers=(nn.Linear,), every=1)
    model(normal(8, 4))


class Detaching(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class Dense(nn.Linear):
    """A layer and its nonlinearity in one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Paired(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = self.head(x)
        x.zero_()
        return z


class Flattening(nn.Module):
    """Loses track of which rows belong to which sample."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.head = nn.Linear(2, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.each(x.reshape(-1, 2)).unflatten(0, (len(x), 2)).mean(1))


def image(model: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), model)


PASSES: dict[str, tuple[Callable[[], nn.Module], dict[str, object], type[Exception], str]] = {
    "an-image-of-logits": (
        lambda: image(nn.Conv2d(1, CLASSES, 1)),
        {},
        OutputError,
        r"\(n, C\) or \(n, T, C\).*got \(8, 3, 2, 2\).*output=lambda",
    ),
    "one-logit": (
        lambda: nn.Linear(4, 1),
        {},
        OutputError,
        r"two classes, got \(8, 1\).*'bernoulli'",
    ),
    "no-samples-axis": (
        lambda: Answers(lambda z: z.sum()),
        {"likelihood": "gaussian"},
        OutputError,
        r"one row per sample, got \(\)",
    ),
    "several-outputs": (
        lambda: Answers(lambda z: (z, z)),
        {},
        OutputError,
        "returns a tuple with 0, 1.*output=",
    ),
    "missing-key": (
        lambda: Answers(lambda z: {"z": z}),
        {"output": "logits"},
        OutputError,
        "'logits' is not in the dict .*'z'",
    ),
    "missing-index": (
        lambda: Answers(lambda z: (z, z)),
        {"output": 2},
        OutputError,
        "output=2 is not in the tuple .*0, 1",
    ),
    "no-tensor": (
        lambda: Answers(lambda z: (z, "z")),
        {"output": 1},
        OutputError,
        "output=1 gave str, not a tensor",
    ),
    "no-graph": (lambda: Detaching(4, 3), {}, OutputError, "no graph.*detach"),
    "input-overwritten": (
        Overwriting,
        {},
        LayerSelectionError,
        "input of layer 'head' was changed in place.*out of place",
    ),
    "nonlinearity-in-the-layer": (
        lambda: nn.Sequential(Dense(4, 4), nn.Linear(4, CLASSES)),
        {"layers": "0"},
        LayerSelectionError,
        r"no layer is left.*layers '0' \(Dense\), whose.*ends in a nonlinearity.*module of its own",
    ),
    "no-preactivations": (
        lambda: nn.Sequential(Paired(4, CLASSES)),
        {"output": 0},
        LayerSelectionError,
        r"layer '0' \(Paired\) returns a tuple",
    ),
    "before-a-reentrant-checkpoint": (
        partial(Checkpointed, reentrant=True, noisy=False),
        {"layers": ("first", "head")},
        OutputError,
        r"through reentrant checkpointing.*use_reentrant=False.*layers=",
    ),
    "reentrant-checkpoint": (
        partial(Checkpointed, reentrant=True),
        {"layers": "block.*"},
        LayerSelectionError,
        r"layer 'block\.0' ran without a graph.*use_reentrant=False",
    ),
    "rows-without-sample": (
        Flattening,
        {"sharing": "joint"},
        LayerSelectionError,
        "layer 'each' was called on 16 rows .*8 samples.*sharing='expand'",
    ),
    "no-targets": (mlp, {"fisher": "empirical"}, ValueError, r"monitor\.targets = y"),
}


@pytest.mark.parametrize(("make", "options", "error", "told"), PASSES.values(), ids=PASSES)
def test_a_pass_that_cannot_be_measured_is_told_with_the_way_out(make, options, error, told):
    model = make()
    Monitor(model, every=1, **options)
    with pytest.raises(error, match=told):
        model(normal(8, 4))


@pytest.mark.parametrize(("make", "options", "error", "told"), PASSES.values(), ids=PASSES)
def test_a_probe_that_cannot_be_measured_is_told_with_the_way_out(make, options, error, told):
    monitor = Monitor(make(), **options)
    with pytest.raises(error, match=told):
        monitor.measure(normal(8, 4))


TARGETS = {
    "too-few": (torch.zeros(5, dtype=torch.long), r"shape \(8,\), got \(5,\)"),
    "one-hot": (torch.eye(CLASSES)[[0] * 8], "class indices"),
    "floating": (torch.zeros(8), r"class indices.*float32"),
    "beyond": (torch.full((8,), CLASSES), "class indices from 0 to 2"),
    "ignored": (torch.full((8,), -100), "class indices from 0 to 2.*-100"),
    "no-tensor": ([0] * 8, "targets must be a tensor.*list"),
}


@pytest.mark.parametrize(("targets", "told"), TARGETS.values(), ids=TARGETS)
def test_targets_that_do_not_fit_are_told_with_those_that_would(targets, told):
    monitor = Monitor(mlp(), fisher="empirical")
    with pytest.raises(OutputError, match=told):
        monitor.measure(normal(8, 4), targets=targets)


@pytest.mark.parametrize("targets", [t for t, _ in TARGETS.values()], ids=TARGETS)
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_targets_that_do_not_fit_samples_are_told_before_any_gradient(targets, chunk_size):
    with pytest.raises(OutputError, match=r"targets must be .*got"):
        per_sample_gradients(mlp(), normal(8, 4), targets, chunk_size=chunk_size)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_targets_of_independent_outputs_have_the_shape_of_the_output(likelihood):
    monitor = Monitor(mlp(), likelihood=likelihood, fisher="empirical")
    with pytest.raises(OutputError, match=r"3 numbers for each of 8 samples, got \(8,\)"):
        monitor.measure(normal(8, 4), targets=torch.zeros(8))


def test_a_natural_gradient_needs_a_measurement():
    with pytest.raises(ValueError, match=r"nothing was measured yet.*training pass or .*measure"):
        Monitor(mlp()).natural_gradient()


def test_a_natural_gradient_needs_a_gradient():
    model = mlp()
    monitor = Monitor(model, every=1)
    model(normal(8, 4))
    with pytest.raises(ValueError, match=r"no observed layer has a gradient: call loss\.backward"):
        monitor.natural_gradient()


WRONG_GRADIENTS = {
    "too-narrow": ((torch.ones(6, 3), torch.ones(6)), r"and its bias; got a gradient of \(6, 3\)"),
    "no-bias": ((torch.ones(6, 4), None), "and its bias; .*no bias gradient"),
}


@pytest.mark.parametrize(("gradient", "told"), WRONG_GRADIENTS.values(), ids=WRONG_GRADIENTS)
def test_a_gradient_that_does_not_fit_the_layer_is_told(gradient, told):
    measured = Monitor(mlp()).measure(normal(8, 4))["0"]
    with pytest.raises(ValueError, match=rf"layer '0' measured \(6, 4\) weights {told}"):
        measured.natural_gradient(*gradient)


@pytest.mark.parametrize("damping", [-0.5, float("nan"), float("inf")])
def test_a_damping_that_cannot_be_is_refused_afterwards_too(damping):
    monitor = Monitor(mlp(), solver="iterative")
    for x in (normal(3, 4), normal(40, 4)):
        with pytest.raises(ValueError, match="damping must be 0 or more and finite"):
            monitor.measure(x)["0"].damped(damping)


STATES = {
    "units": ({"units": 2}, {}, "other options: units was 2 and is None; attach with the same"),
    "other-units": ({"units": 2}, {"units": 3}, "units was 2 and is 3"),
    "layers": ({"layers": "0"}, {}, r"layers was \['0'\] and is \['0', '2', '4'\]"),
    "fisher": ({}, {"fisher": "mc"}, "fisher was 'exact' and is 'mc'"),
    "likelihood": (
        {"likelihood": Gaussian(0.5)},
        {"likelihood": Gaussian()},
        "likelihood.*0.5 and is 1.0",
    ),
}


@pytest.mark.parametrize(("taken", "given", "told"), STATES.values(), ids=STATES)
def test_the_state_of_another_monitor_is_refused(taken, given, told):
    state = Monitor(mlp(), **taken).state_dict()
    with pytest.raises(ValueError, match=told):
        Monitor(mlp(), **given).load_state_dict(state)
