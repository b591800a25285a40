"""Models as users have them: with weights that are computed, swapped, shared, frozen, compiled."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from networks import a_step, normal, seeded_mlp
from strategies import EXACTLY, SINGLE, TOL
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

from unitfisher import (
    Monitor,
    NonFiniteError,
    TiedWeightsWarning,
    UncoveredLayersWarning,
    per_sample_gradients,
    unit_fisher,
)
from unitfisher.condensed import sums


def without_bias(layer: nn.Linear) -> None:
    layer.bias = None
    parametrizations.weight_norm(layer)


COMPUTED: dict[str, Callable[[nn.Linear], object]] = {
    "nothing-but-computed": without_bias,
    "orthogonal": parametrizations.orthogonal,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "spectral-norm": parametrizations.spectral_norm,
    "weight-norm": parametrizations.weight_norm,
}


def trained(compute: Callable[[nn.Linear], object], *, observed: bool) -> tuple[list[Tensor], int]:
    model = seeded_mlp()
    compute(model[2])
    monitor = Monitor(model, every=1, units=3) if observed else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        a_step(model, normal(8, 4))
        optimizer.step()
        optimizer.zero_grad()
    return list(model.state_dict().values()), 0 if monitor is None else len(monitor.latest)


@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_training_with_computed_weights_is_bit_identical(compute):
    (alone, _), (watched, measured) = (trained(compute, observed=o) for o in (False, True))
    assert measured == 3
    assert_close(watched, alone, **EXACTLY)


@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_computed_weights_are_measured_as_if_they_were_given(compute):
    model, plain = seeded_mlp(), seeded_mlp()
    compute(model[2])
    plain[2].bias = model[2].bias
    plain[2].weight.data = model.eval()[2].weight.detach()
    found, expected = (Monitor(m).measure(normal(8, 4)) for m in (model, plain))
    for name in ("0", "2", "4"):
        assert_close(found[name].k, expected[name].k, **SINGLE)


def test_natural_gradients_are_of_the_weights_that_are_parameters():
    model = seeded_mlp()
    parametrizations.weight_norm(model[2])
    monitor = Monitor(model, every=1)
    a_step(model, normal(8, 4))
    assert list(monitor.natural_gradient()) == ["0", "4"]


def test_a_pass_with_swapped_weights_is_measured():
    model, swapped = seeded_mlp(), seeded_mlp()
    monitor, other = Monitor(model, every=1), Monitor(swapped, every=1)
    weights = {name: 2 * p.detach() for name, p in model.named_parameters()}
    trained = {name: p.requires_grad_() for name, p in weights.items()}
    torch.func.functional_call(model, trained, normal(8, 4))
    swapped.load_state_dict(weights)
    swapped(normal(8, 4))
    assert_close(monitor.latest["2"].k, other.latest["2"].k, **EXACTLY)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_a_sparse_buffer_is_left_as_it_is():
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("adjacency", torch.eye(8).to_sparse_csr())
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.adjacency @ x)

    model = Graph()
    monitor = Monitor(model, every=1)
    model(normal(8, 4))
    monitor.measure(normal(8, 4))
    assert model.adjacency.to_dense().equal(torch.eye(8))


def test_passes_without_numbers_are_none():
    model = seeded_mlp()
    monitor = Monitor(model, every=1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(normal(8, 4))
    make_fx(model)(normal(8, 4))
    model.to("meta")(normal(8, 4).to("meta"))
    assert (monitor.step, monitor.latest) == (0, {})


def test_a_model_that_is_frozen_for_a_while_is_not_measured_meanwhile():
    model = seeded_mlp()
    monitor = Monitor(model, every=1)
    model.requires_grad_(False)
    with pytest.warns(UncoveredLayersWarning, match=r"pass is not measured: .* frozen"):
        model(normal(8, 4))
    model(normal(8, 4))  # said once
    assert monitor.latest == {}
    model.requires_grad_(True)
    a_step(model, normal(8, 4))
    assert list(monitor.latest) == ["0", "2", "4"]
    assert monitor.step == 3


def test_a_layer_that_is_frozen_for_a_while_is_not_measured_meanwhile():
    model = seeded_mlp()
    monitor = Monitor(model, "0", every=1)
    model[0].requires_grad_(False)
    with pytest.warns(UncoveredLayersWarning, match="layer '0' ran without a graph"):
        a_step(model, normal(8, 4))
    assert monitor.latest == {}


def test_a_hook_registered_later_changes_what_is_measured():
    models = seeded_mlp(), seeded_mlp()
    models[0].register_forward_hook(lambda model, args, z: z / 4)
    monitors = [Monitor(model, every=1) for model in models]
    models[1].register_forward_hook(lambda model, args, z: z / 4)
    for model in models:
        model(normal(8, 4))
    assert_close(monitors[1].latest["0"].c, monitors[0].latest["0"].c, **EXACTLY)


class Outside(torch.autograd.Function):
    """A backward pass that torch knows nothing of."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        return torch.from_numpy(np.from_dlpack(g.contiguous()) * np.float32(2))


class Strict(Outside):
    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        assert type(g) is Tensor
        assert not torch._C._functorch.is_batchedtensor(g)
        return g * 2


class Freeing(Outside):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        ctx.kept = x
        return x * 2

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        del ctx.kept
        return g * 2


class Through(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.head, self.function = nn.Linear(4, 5), nn.Linear(5, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.fc(x).tanh()))


@pytest.mark.parametrize("function", [Outside, Strict])
def test_backward_functions_outside_torch_get_numbers_and_one_column_at_a_time(function):
    found = Monitor(Through(function.apply)).measure(normal(8, 4))
    expected = Monitor(Through(lambda x: x * 2)).measure(normal(8, 4))
    for name in ("fc", "head"):
        assert_close(found[name].k, expected[name].k, **SINGLE)


def test_a_backward_function_that_works_once_says_who_called_it():
    with pytest.raises(AttributeError) as raised:
        Monitor(Through(Freeing.apply)).measure(normal(8, 4))
    assert "called by unitfisher" in raised.value.__notes__[0]


@pytest.mark.parametrize("gap", [20, 40])
@pytest.mark.parametrize("fisher", ["exact", "rademacher"])
def test_units_of_a_half_precision_model_that_is_sure_are_alive(gap, fisher):
    model = seeded_mlp()
    model[4].bias.data = torch.tensor([0.0, gap, 0.0])
    found = Monitor(copy.deepcopy(model).half(), fisher=fisher).measure(normal(64, 4).half())
    expected = Monitor(model, fisher=fisher).measure(normal(64, 4))
    for name in ("0", "2"):
        assert not found[name].dead.any()
        assert_close(found[name].c, expected[name].c, rtol=0.1, atol=0)


class Copying(nn.Module):
    """Makes its target network when it is first called, as momentum encoders do."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.encoder, self.head, self.when = nn.Linear(4, 5), nn.Linear(5, 3), when
        self.targets = list[nn.Module]()

    def forward(self, x: Tensor) -> Tensor:
        if self.when == "before":
            self.targets.append(copy.deepcopy(self.encoder))
        h = self.encoder(x).tanh()
        if self.when == "after":
            self.targets.append(copy.deepcopy(self.encoder))
        self.targets[-1](x)
        return self.head(h)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_layer_may_be_copied_within_a_pass(when):
    model = Copying(when)
    monitor = Monitor(model, every=1)
    a_step(model, normal(8, 4))
    for hook in model.targets[0]._forward_hooks.values():
        assert hook(None, None, None) is None  # which keeps nothing alive
    assert monitor.latest["encoder"].cases.samples == 8
    assert monitor.latest["encoder"].cases.rows == 8


class Masking(nn.Module):
    """Actions that are not allowed have no probability."""

    def __init__(self, lowest: float) -> None:
        super().__init__()
        self.layers, self.lowest = seeded_mlp(), lowest

    def forward(self, x: Tensor) -> Tensor:
        forbidden = torch.tensor([False, True, False])
        return self.layers(x).masked_fill(forbidden, self.lowest)


@pytest.mark.parametrize("fisher", ["exact", "mc", "rademacher", "top-rademacher"])
def test_a_class_that_cannot_be_takes_no_part(fisher):
    found, expected = (
        Monitor(Masking(lowest).double(), fisher=fisher).measure(normal(8, 4).double())
        for lowest in (-torch.inf, -1e9)
    )
    for name in ("layers.0", "layers.2", "layers.4"):
        assert_close(found[name].k, expected[name].k, **TOL, equal_nan=True)


def test_logits_without_any_class_are_told():
    model = Masking(-torch.inf)
    model.forward = lambda x: model.layers(x) - torch.inf
    with pytest.raises(FloatingPointError, match="errors at layer"):
        Monitor(model).measure(normal(8, 4))


@pytest.mark.parametrize("spoil", [torch.nan, torch.inf])
def test_logits_that_no_layer_has_spoiled_are_told(spoil):
    model = Masking(spoil)
    with pytest.raises(FloatingPointError, match="the logits after the last layer"):
        Monitor(model).measure(normal(8, 4))


def test_a_buffer_of_numbers_that_share_their_place_is_left_alone():
    model = seeded_mlp()
    model.register_buffer("prior", torch.zeros(1).expand(3))
    monitor = Monitor(model, every=1)
    a_step(model, normal(8, 4))
    assert monitor.latest.keys() == monitor.measure(normal(8, 4)).keys()


def test_a_layer_that_is_frozen_later_is_named_and_the_others_are_measured():
    model = seeded_mlp()
    monitor = Monitor(model, every=1)
    model[0].requires_grad_(False)
    with pytest.warns(UncoveredLayersWarning, match=r"'0' .*without a graph.*[Ff]rozen"):
        a_step(model, normal(8, 4))
    a_step(model, normal(8, 4))  # it is said once
    assert list(monitor.latest) == ["2", "4"]


def test_calls_without_a_graph_do_not_count():
    model = Copying("before")
    x = normal(8, 4)
    model.register_forward_pre_hook(lambda model, args: model_without_graph(model, args[0]))
    monitor = Monitor(model, every=1)
    model(x)
    other = Monitor(same := copy.deepcopy(model), every=1)
    same._forward_pre_hooks.clear()
    assert monitor.latest["encoder"].cases.rows == len(x)
    assert other.measure(x)["encoder"].k.allclose(monitor.latest["encoder"].k)


def model_without_graph(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model.encoder(x)


def test_a_bias_that_is_not_trained_leaves_the_weights_to_be_corrected():
    model = seeded_mlp()
    model[2].bias.requires_grad_(False)
    monitor = Monitor(model, every=1)
    a_step(model, normal(8, 4))
    steps = monitor.natural_gradient()
    A = sums(monitor.latest["2"].cases).damped(1e-3).A
    assert_close(
        steps["2"].dw.double(), torch.linalg.solve(A, model[2].weight.grad.double()), **LOOSE
    )
    assert steps["2"].dw0 is None
    assert steps["0"].dw0 is not None
    assert_close(monitor.natural_gradient()["2"].dw, steps["2"].dw, **LOOSE)


LOOSE = {"rtol": 1e-3, "atol": 1e-3}  # single precision


def test_weights_that_two_modules_share_are_named():
    model = seeded_mlp()
    model.append(nn.Linear(5, 3))
    model[5].weight = model[4].weight
    with pytest.warns(TiedWeightsWarning, match=r"4\.weight and 5\.weight.*natural_gradient"):
        Monitor(model)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch 2.11, tracing
@pytest.mark.parametrize("in_place", [True, False])
def test_what_was_compiled_after_attaching_is_measured_when_asked(in_place):
    model, expected = seeded_mlp(), Monitor(seeded_mlp()).measure(normal(8, 4))
    monitor = Monitor(model)
    if in_place:
        model.compile(backend="eager")
    compiled = model if in_place else torch.compile(model, backend="eager")
    compiled(normal(8, 4))
    assert monitor.step == 0  # compiled passes are none of its own
    assert_close(monitor.measure(normal(8, 4))["0"].k, expected["0"].k, **EXACTLY)


def test_the_default_device_is_no_concern_of_a_measurement():
    model, expected = seeded_mlp(), Monitor(seeded_mlp()).measure(normal(8, 4))
    with torch.device("meta"):
        found = Monitor(model).measure(normal_on_cpu())
    assert_close(found["0"].k, expected["0"].k, **EXACTLY)


def normal_on_cpu() -> Tensor:
    with torch.device("cpu"):
        return normal(8, 4)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


def test_recurrent_layers_are_measured_without_dropout_in_training_mode():
    """On a GPU they have no backward pass in eval mode."""
    model, x = Recurrent(), normal(6, 2, 4)
    model.cell = nn.LSTM(4, 5, num_layers=2, dropout=0.5, batch_first=True)
    seen = []
    model.cell.register_forward_hook(lambda cell, *_: seen.append((cell.training, model.training)))
    model.train()
    expected = model.head(model.eval().cell(x)[0][:, -1]).mean(0)
    model.train()
    found = Monitor(model, layers="head").measure(x)["head"]
    assert seen == [(False, False), (True, False)]
    assert (model.cell.training, model.cell.dropout) == (True, 0.5)
    assert_close(found.output_mean, expected.detach().double(), rtol=1e-5, atol=1e-6)


def test_what_vmap_cannot_take_has_per_sample_gradients_too():
    model, x, y = Recurrent().double(), normal(6, 2, 4).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    found = per_sample_gradients(model, x, y)
    for i in range(len(x)):
        model.zero_grad()
        (-F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])).backward()
        for name, parameter in model.named_parameters():
            assert_close(found[name][i], parameter.grad, **TOL)


def test_what_vmap_cannot_take_has_unit_fishers_too():
    model, x = Recurrent().double(), normal(6, 2, 4).double()
    F = unit_fisher(model, x, layers="cell", sharing="joint")["cell.weight_hh_l0"]
    expected = torch.zeros_like(F)
    for y in range(3):
        of_label = torch.full((6,), y)
        G = per_sample_gradients(model, x, of_label)
        g = torch.cat([G["cell.weight_hh_l0"], G["cell.bias_hh_l0"][..., None]], -1)
        pi = model(x).softmax(-1)[:, y].detach()
        expected += torch.einsum("n,nud,nue->ude", pi, g, g) / len(x)
    assert_close(F, expected, **TOL)


def test_per_sample_gradients_that_are_not_finite_are_named_too():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), normal(6, 4)
    x[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="the gradients of layer '1'"):
        unit_fisher(model, x, layers="1", sharing="joint")


def test_a_kind_without_a_form_has_empirical_fishers_too_and_exact_ones_ignore_targets():
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 3)).double()
    x, y = normal(6, 4).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    options = {"layers": "1", "sharing": "joint"}
    F = unit_fisher(model, x, fisher="empirical", targets=y, **options)["1"]
    G = per_sample_gradients(model, x, y)
    g = torch.stack([G["1.weight"], G["1.bias"]], -1)
    assert_close(F, torch.einsum("nue,nuf->uef", g, g) / len(x), **TOL)
    exact, given = (unit_fisher(model, x, targets=each, **options)["1"] for each in (None, y))
    assert exact.equal(given)
    with pytest.raises(ValueError, match="needs the observed labels"):
        unit_fisher(model, x, fisher="empirical", **options)
