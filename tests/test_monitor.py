"""The Monitor in live use: when it measures, and what of."""

import pytest
import torch
from measured import measured_steps
from networks import (
    CLASSES,
    NETWORKS,
    Answers,
    Sparse,
    a_step,
    mlp,
    normal,
    seeded_mlp,
    sparse_batches,
)
from strategies import EXACTLY, all_sharings
from torch import Tensor, nn
from torch.testing import assert_close

from unitfisher import (
    LayerSelectionError,
    Monitor,
    Run,
    UncoveredLayersWarning,
    UnitMoments,
    bias_shift_correction,
    unit_natural_gradient,
)
from unitfisher.schedule import Overhead

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


def test_paused_passes_pay_for_no_measurement():
    now, model = [0.0], mlp()
    monitor = Monitor(model, every=Overhead(0.05, clock=lambda: now[0]))

    def train(steps: int) -> int:
        measured = 0
        for _ in range(steps):
            model(normal(8, 4))
            just_now = monitor.latest["0"].step == monitor.step - 1
            now[0] += 11.0 if just_now else 1.0  # seconds
            measured += just_now
        return measured

    train(500)
    monitor.pause()
    assert train(1000) == 0
    monitor.resume()
    assert train(1000) * 10 <= 0.05 * 1000 + 10


def test_a_monitor_says_what_it_watches():
    model = seeded_mlp()
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


@all_sharings
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


class Routed(Experts):
    """Sends each row to one of two experts; the second one is called on the first's rows, too."""

    def forward(self, x: Tensor) -> Tensor:
        first, h = x[:, 0] > 0, x.new_zeros(len(x), 4)
        h[first], h[~first] = self.experts[0](x[first]), self.experts[1](x[~first])
        return self.head(h.tanh() + self.experts[1](x).sigmoid())


def test_a_layer_to_which_some_rows_are_sent_has_these_as_cases():
    torch.manual_seed(0)
    model, x = Routed().double(), normal(13, 4).double()
    found = Monitor(model).measure(x)
    first = x[:, 0] > 0
    assert 13 % int(first.sum())
    assert 13 % int((~first).sum())
    seen = {"experts.0": x[first], "experts.1": torch.cat([x[~first], x])}
    for name, received in seen.items():
        assert_close(found[name].mean, received.mean(0))
        D = squared_errors(model, name, x)
        assert_close(found[name].c, D.sum(0) / len(x))
        assert_close(found[name].mean_q, (D.T @ received) / D.sum(0)[:, None])


def test_errors_of_rows_whose_samples_are_not_known_are_not_told():
    torch.manual_seed(0)
    model, x = Routed().double(), normal(13, 4).double()
    for options in ({}, {"rows": 9}):
        monitor = Monitor(model, fisher="mc", samples=3, **options)
        found = monitor.measure(x)
        assert all(found[f"experts.{i}"].c_error.isnan().all() for i in range(2))
        assert found["head"].c_error.isfinite().all()
        monitor.detach()


def expected_of_blocks(model: nn.Module, batches: list[Tensor], damping: float) -> UnitMoments:
    """Moments of the block over all samples, of which only some have come to it."""
    own = [batch for batch in batches if batch[0, 0] > 0]
    D = torch.cat([squared_errors(model, "block", batch) for batch in own])
    a = torch.cat([model.first(batch).detach().tanh() for batch in own])
    return UnitMoments.of(a, D, samples=sum(map(len, batches))).damped(damping)


def test_a_loader_averages_over_all_samples_whatever_layers_they_come_to():
    torch.manual_seed(0)
    model, batches = Sparse().double(), sparse_batches()
    labels = [torch.arange(len(batch)) % CLASSES for batch in batches]
    with Monitor(model, "block") as monitor:
        found = monitor.measure(list(zip(batches, labels, strict=True)))["block"]
    m = expected_of_blocks(model, batches, found.damping)
    s, k = bias_shift_correction(m)
    assert_close(found.c, m.c, rtol=1e-10, atol=0)
    assert_close(found.s, s, rtol=1e-8, atol=0)
    assert_close(found.k, k, rtol=1e-8, atol=1e-10)
    model.zero_grad()
    log_p = torch.cat([model(batch).log_softmax(-1) for batch in batches])
    log_p[torch.arange(20), torch.cat(labels)].mean().backward()
    dw, dw0 = unit_natural_gradient(m, model.block.weight.grad, model.block.bias.grad)
    with Monitor(model, "block") as monitor:
        monitor.measure(list(zip(batches, labels, strict=True)))
        step = monitor.natural_gradient()["block"]
    assert_close(step.dw, dw, rtol=1e-7, atol=1e-9)
    assert_close(step.dw0, dw0, rtol=1e-7, atol=1e-9)


def test_a_window_averages_over_all_samples_whatever_layers_they_come_to():
    torch.manual_seed(0)
    model, batches = Sparse().double(), sparse_batches()
    before = normal(8, 4).double().abs()
    for layers in ("block", None):
        monitor = Monitor(model, layers, every=1, window=3)
        model(before)
        model(batches[0])
        with pytest.warns(UncoveredLayersWarning, match="called"):
            model(batches[1])
        model(batches[2])
        state = monitor.state_dict()
        monitor.detach()
        again = Monitor(model, layers, every=1, window=3)
        again.load_state_dict(state)
        for held, kept in zip(again._instrument.window.newest, batches, strict=True):
            assert held.samples == len(kept)
        found = monitor.latest["block"]
        m = expected_of_blocks(model, batches, found.damping)
        assert_close(found.c, m.c, rtol=1e-10, atol=0)
        assert_close(found.k, bias_shift_correction(m)[1], rtol=1e-8, atol=1e-10)
        again.detach()


def test_a_loader_may_have_batches_that_show_nothing():
    torch.manual_seed(0)
    model, (first, between, last) = Sparse().double(), sparse_batches()
    with Monitor(model) as monitor:
        expected = monitor.measure([first, last])["head"].c
        found = monitor.measure([first, first[:0], last])["head"].c
    assert_close(found, expected, **EXACTLY)
    with (
        Monitor(model, "block") as monitor,
        pytest.raises(LayerSelectionError, match="none of the observed layers"),
    ):
        monitor.measure([between, between])


def squared_errors(model: nn.Module, layer: str, x: Tensor) -> Tensor:
    """E_y δ² of every row that the layer is called on, label by label."""
    nets = []
    handle = model.get_submodule(layer).register_forward_hook(lambda m, a, y: nets.append(y))
    log_p = model(x).log_softmax(-1)
    handle.remove()
    D = [torch.zeros_like(net) for net in nets]
    for sample in log_p:
        for of_label in sample:
            grads = torch.autograd.grad(of_label, nets, retain_graph=True)
            for total, grad in zip(D, grads, strict=True):
                total += of_label.detach().exp() * grad**2
    return torch.cat(D)


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


def test_logits_are_found_in_what_the_model_returns():
    plain, packing = Answers(lambda z: z), Answers(lambda z: [z.sum(), z.T])
    packing.load_state_dict(plain.state_dict())
    monitor, x = Monitor(packing, every=1, output=lambda answer: answer[1].T), normal(8, 4)
    packing(x)
    assert_close(monitor.latest["head"].k, Monitor(plain).measure(x)["head"].k)


def test_layers_that_are_chosen_are_measured_in_the_order_of_the_model():
    model = mlp()
    monitor = Monitor(model, layers=[lambda name, module: name == "4", "0"], every=1)
    model(normal(8, 4))
    assert list(monitor.layers) == list(monitor.latest) == ["0", "4"]


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
    monitor = Monitor(seeded_mlp(), seed=seed, **options)
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
