"""Layers with a forward of their own, and inputs without a dense batch: left out, by name."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from networks import a_step, normal, seeded_mlp
from strategies import SINGLE
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

from unitfisher import LayerSelectionError, Monitor, UncoveredLayersWarning
from unitfisher.kinds import _into_linear, _out_of_linear, join


def subclass(kind: type[nn.Module], forward: Callable[..., Tensor], *size: int) -> nn.Module:
    return type("Own", (kind,), {"forward": forward})(*size)


def padded_before(self: nn.Conv1d, x: Tensor) -> Tensor:
    return nn.Conv1d.forward(self, F.pad(x, (2, 0)))


def standardised(self: nn.Conv1d, x: Tensor) -> Tensor:
    return self._conv_forward(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


def tiling(self: nn.Conv1d, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv1d(F.pad(x, (1, 1), mode="circular"), weight, bias)


def tiled(layer: nn.Module) -> nn.Module:
    layer._conv_forward = partial(tiling, layer)
    return layer


def cropped(self: nn.ConvTranspose1d, x: Tensor) -> Tensor:
    return nn.ConvTranspose1d.forward(self, x)[..., 1:]


def scaled(self: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x * 0.1, self.weight, self.bias)


def transposed(self: nn.Linear, x: Tensor) -> Tensor:
    return nn.Linear.forward(self, x.mT).mT


OTHERWISE: dict[str, Callable[[], nn.Module]] = {
    "input-scaled": lambda: subclass(nn.Linear, scaled, 5, 5),
    "nonlinear": lambda: subclass(nn.Linear, lambda self, x: scaled(self, 10 * x).relu(), 5, 5),
    "nonlinear-in-place": lambda: subclass(
        nn.Linear, lambda self, x: scaled(self, x).relu_(), 5, 5
    ),
    "other-axis": lambda: subclass(nn.Linear, transposed, 6, 6),
    "padded": lambda: subclass(nn.Conv1d, padded_before, 6, 6, 3),
    "weight-standardised": lambda: subclass(nn.Conv1d, standardised, 6, 6, 1),
    "tiling": lambda: type("Own", (nn.Conv1d,), {"_conv_forward": tiling})(6, 6, 3, padding=1),
    "tiling-by-an-attribute": lambda: tiled(subclass(nn.Conv1d, nn.Conv1d.forward, 6, 6, 3)),
    "cropped": lambda: subclass(nn.ConvTranspose1d, cropped, 6, 6, 3),
}


@pytest.mark.parametrize("make", OTHERWISE.values(), ids=OTHERWISE)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_that_is_no_product_of_weight_and_input_is_left_out_by_name(make, autocast):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), make(), nn.Flatten(), nn.LazyLinear(3))
    model(normal(8, 6, 5))
    monitor = Monitor(model, every=1)
    named = pytest.warns(UncoveredLayersWarning, match=r"not observed: layers '1' \(Own\), whose")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with named as warned:
            a_step(model, normal(8, 6, 5))
        a_step(model, normal(8, 6, 5))
    assert len(warned) == 1
    assert list(monitor.latest) == list(monitor.natural_gradient()) == ["0", "3"]


def scaled_conv1d() -> nn.Module:
    """A class of one's own under another that has joined."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias + 0 * self.further

    kind = type("Rows", (nn.Module,), {"forward": forward})
    join([kind], _into_linear, _out_of_linear)
    layer = type("Own", (kind,), {"forward": lambda self, x: 3 * kind.forward(self, x)})()
    layer.weight, layer.bias = (nn.Parameter(torch.randn(5, *d)) for d in ([5], []))
    layer.further = nn.Parameter(torch.ones(()))
    return layer


def own() -> nn.Module:
    return subclass(nn.Linear, scaled, 5, 5)


COMPUTED: dict[str, Callable[[], nn.Module]] = {
    "weight-norm": lambda: parametrizations.weight_norm(own()),
    "spectral-norm": lambda: parametrizations.spectral_norm(own()),
    "pruned": lambda: prune.random_unstructured(own(), "weight", 0.2),
    "joined": scaled_conv1d,
}


@pytest.mark.parametrize("make", COMPUTED.values(), ids=COMPUTED)
def test_a_weight_that_is_computed_is_looked_at_too_and_left_as_it_was(make):
    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 5), make(), nn.Linear(5, 3))

    model, other = fresh(), fresh()
    monitor = Monitor(model, every=1)
    with pytest.warns(UncoveredLayersWarning, match=r"not observed: layers '1' .*, whose"):
        a_step(model, normal(8, 5))
    for each, steps in ((model, 1), (other, 2)):
        for _ in range(steps):
            a_step(each, normal(8, 5))
    assert list(monitor.latest) == ["0", "2"]
    assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_what_a_forward_of_ones_own_does_may_change():
    def gained(self: nn.Linear, x: Tensor) -> Tensor:
        return nn.Linear.forward(self, x) * self.gain

    layer = subclass(nn.Linear, gained, 5, 5)
    layer.gain = nn.Parameter(torch.ones(()))
    model = nn.Sequential(layer, nn.Linear(5, 3))
    monitor = Monitor(model, every=1)
    model(normal(8, 5))
    assert list(monitor.latest) == ["0", "1"]
    layer.gain.data += 0.1
    with pytest.warns(UncoveredLayersWarning, match=r"layers '0' \(Own\), whose"):
        model(normal(8, 5))
    assert list(monitor.latest) == ["1"]


NOTHING_YET = {"zero-weight": (0.0, 1.0), "no-input": (1.0, 0.0), "not-finite": (torch.nan, 1.0)}


@pytest.mark.parametrize(("weight", "x"), NOTHING_YET.values(), ids=NOTHING_YET)
def test_a_forward_of_ones_own_is_looked_at_again_until_it_has_shown_what_it_does(weight, x):
    plain = subclass(nn.Linear, lambda self, x: F.linear(x, self.weight, self.bias), 5, 5)
    model = Paired(subclass(nn.Linear, scaled, 5, 5), plain)
    with torch.no_grad():
        for layer in (model.one, model.other):
            layer.weight *= weight
    monitor = Monitor(model, every=1, on_nonfinite="record")
    with pytest.warns(UncoveredLayersWarning, match="it cannot be told, while weight or input"):
        model(x * normal(8, 5))
    assert list(monitor.latest) == ["head"]
    for layer in (model.one, model.other):
        layer.reset_parameters()
    with pytest.warns(
        UncoveredLayersWarning, match=r"layers 'one' \(Own\), whose .* something else"
    ):
        model(normal(8, 5))
    assert list(monitor.latest) == ["other", "head"]


class Paired(nn.Module):
    """Two layers side by side."""

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other, self.head = one, other, nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.one(x) + self.other(x))


def test_a_layer_that_pads_where_it_has_to_is_left_out_of_passes_in_which_it_does():
    def padded_to_even(self: nn.Conv1d, x: Tensor) -> Tensor:
        return nn.Conv1d.forward(self, F.pad(x, (0, x.shape[-1] % 2)))

    own = subclass(nn.Conv1d, padded_to_even, 2, 3, 2, 2)
    model = nn.Sequential(own, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(3, 3))
    monitor = Monitor(model, every=1)
    model(normal(4, 2, 8))
    assert list(monitor.latest) == ["0", "3"]
    with pytest.warns(UncoveredLayersWarning, match=r"layers '0' \(Own\), whose"):
        model(normal(4, 2, 9))
    assert list(monitor.latest) == ["3"]


class Given(nn.Module):
    """Adds to a head's input what a layer says of something that is no dense batch."""

    def __init__(self, layer: nn.Module, given: Tensor) -> None:
        super().__init__()
        self.layer, self.given, self.head = layer, given, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        said = self.layer(self.given)
        said = torch.nested.to_padded_tensor(said, 0.0) if said.is_nested else said
        return self.head(x + said.flatten()[:4].to(x.dtype))


def jagged() -> Tensor:
    return torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=torch.jagged)


SHAPELESS: dict[str, Callable[[], nn.Module]] = {
    "vector": lambda: Given(nn.Linear(4, 4), torch.ones(4)),
    "no-batch-axis": lambda: Given(nn.Conv1d(2, 4, 1), torch.ones(2, 1)),
    "sparse": lambda: Given(nn.Linear(4, 4), torch.eye(4).to_sparse()),
    "nested": lambda: Given(nn.Linear(4, 4), jagged()),
}


@pytest.mark.parametrize("make", SHAPELESS.values(), ids=SHAPELESS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_layer_that_is_given_no_dense_batch_is_left_out_by_name(make):
    model = make()
    monitor = Monitor(model, every=1)
    with pytest.warns(
        UncoveredLayersWarning, match=r"layers 'layer' .* sparse or nested .* batch axis"
    ):
        a_step(model, normal(8, 4))
    assert list(monitor.latest) == ["head"]


def test_a_forward_of_ones_own_that_is_that_product_is_measured():
    def halved(self: nn.Linear, hidden: Tensor) -> Tensor:
        first, second = hidden.chunk(2, -1)
        w = self.weight.chunk(2, 1)
        return first @ w[0].T + second @ w[1].T + self.bias

    model, plain = seeded_mlp(), seeded_mlp()
    model[2] = subclass(nn.Linear, halved, 6, 5)
    model.load_state_dict(plain.state_dict())
    found, expected = (Monitor(m).measure(normal(8, 4)) for m in (model, plain))
    assert_close(found["2"].k, expected["2"].k, **SINGLE)


class Keyword(nn.Module):
    def __init__(self, **more: object) -> None:
        super().__init__()
        self.fc, self.head, self.more = (
            subclass(nn.Linear, self.scored, 4, 5),
            nn.Linear(5, 3),
            more,
        )

    @staticmethod
    def scored(layer: nn.Linear, *, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(hidden, layer.weight, layer.bias if bias is None else bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(hidden=x, **self.more).tanh())


def test_a_layer_may_be_called_by_a_keyword_of_its_own():
    assert Monitor(Keyword()).measure(normal(8, 4))["fc"].cases.samples == 8


def test_a_layer_called_by_several_keywords_is_refused_by_name():
    with pytest.raises(
        LayerSelectionError, match=r"'fc' \(Own\) is called with hidden, bias.*leave"
    ):
        Monitor(Keyword(bias=torch.zeros(5))).measure(normal(8, 4))
