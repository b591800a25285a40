"""The products inside nn.MultiheadAttention, against the same attention spelled out in layers."""

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import CLASSES, filled
from strategies import TOL, any_sharing, normal, seeds
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.testing import assert_close

from unitfisher import LayerSelectionError, Monitor, UncoveredLayersWarning, unit_fisher

WIDTH, HEADS = 4, 2


class Attending(nn.Module):
    """Self-attention over positions, their average, and a readout; samples come first."""

    def __init__(self, *, batch_first: bool, bias: bool, weights: bool) -> None:
        super().__init__()
        options = {"bias": bias, "batch_first": batch_first}
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **options)
        self.readout = nn.Linear(WIDTH, CLASSES)
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.attention.batch_first else x.transpose(0, 1)
        y, _ = self.attention(x, x, x, need_weights=self.weights)
        return self.readout(y.mean(1 if self.attention.batch_first else 0))


class Spelled(nn.Module):
    """The same out of linear layers that are called."""

    def __init__(self, of: Attending) -> None:
        super().__init__()
        attention, bias = of.attention, of.attention.in_proj_bias is not None
        self.in_proj, self.readout = nn.Linear(WIDTH, 3 * WIDTH, bias), of.readout
        self.in_proj.weight, self.in_proj.bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = nn.Linear(WIDTH, WIDTH, bias)
        self.out_proj.weight, self.out_proj.bias = attention.out_proj._parameters.values()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.in_proj(x).chunk(3, -1)
        )
        scores = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.readout(self.out_proj((scores @ v).transpose(1, 2).flatten(2)).mean(1))


class Crossing(nn.Module):
    """Attention of some positions to others, which have inputs of another width perhaps."""

    def __init__(self, width_of_keys: int | None = None) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(
            WIDTH, HEADS, kdim=width_of_keys, vdim=width_of_keys, batch_first=True
        )
        self.readout = nn.Linear(WIDTH, CLASSES)
        self.width = width_of_keys or WIDTH

    def forward(self, x: Tensor) -> Tensor:
        others = x[:, :2, : self.width]
        return self.readout(self.attention(x, others, others)[0].mean(1))


def encoder(seed: int = 0) -> nn.Sequential:
    """Two layers with dropout and a readout of every position, in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(8, CLASSES)).double()


attending = st.builds(Attending, **dict.fromkeys(["batch_first", "bias", "weights"], st.booleans()))


@given(model=attending, generator=seeds, sharing=any_sharing)
def test_fishers_of_both_products_are_the_reference(model, generator, sharing):
    filled(model, generator)
    x, spelled = normal(generator, 2, 3, WIDTH), Spelled(model)
    assert_close(model(x), spelled(x), **TOL)
    found = unit_fisher(model, x, sharing=sharing)
    for name in ("in_proj", "out_proj"):
        expected = reference.unit_fisher(spelled, name, x, sharing=sharing)
        assert_close(found[f"attention.{name}"], expected, **TOL)


@given(model=attending, generator=seeds)
def test_natural_gradients_are_those_of_the_layers_spelled_out(model, generator):
    filled(model, generator)
    x, y = normal(generator, 5, 3, WIDTH), torch.tensor([0, 1, 2, 0, 1])
    steps = []
    for each in (model, Spelled(model)):
        with Monitor(each, every=1) as monitor:
            F.cross_entropy(each(x), y).backward()
            steps.append(monitor.natural_gradient())
        each.zero_grad()
    found, expected = steps
    for name in ("in_proj", "out_proj"):
        assert_close(found[f"attention.{name}"], expected[name], **TOL)


def test_training_stays_bit_identical():
    x, y = torch.randn(6, 5, 8, dtype=torch.float64), torch.randint(CLASSES, (6, 5))
    trained = []
    for observed in (False, True):
        model = encoder()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        torch.manual_seed(1)
        monitor = Monitor(model, layers=nn.MultiheadAttention, every=1) if observed else None
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
            optimizer.step()
        trained.append([p.detach().clone() for p in model.parameters()])
        if monitor is not None:
            assert set(monitor.latest) == {
                f"0.layers.{i}.self_attn.{part}" for i in (0, 1) for part in ("in_proj", "out_proj")
            }
            monitor.detach()
    assert all(a.equal(b) for a, b in zip(*trained, strict=True))


def test_products_of_an_attention_are_chosen_by_name_and_by_class():
    model, names = encoder(), []
    for layers in ("*.in_proj", "0.layers.1.self_attn.*", nn.MultiheadAttention):
        with Monitor(model, layers=layers) as monitor:
            names.append([*monitor.layers])
    assert [len(of) for of in names] == [2, 2, 4]


def test_everything_of_an_encoder_but_its_normalisation_is_observed():
    with pytest.warns(UncoveredLayersWarning, match="nn.LayerNorm") as told:
        Monitor(encoder()).detach()
    assert "MultiheadAttention" not in str(told[0].message).split(". To leave")[0]


def test_a_product_is_observed_by_one_monitor_at_a_time():
    model = encoder()
    with (
        Monitor(model, layers="*.in_proj"),
        pytest.raises(LayerSelectionError, match="observed by a Monitor already"),
    ):
        Monitor(model, layers="*.self_attn.*")


def test_attention_to_other_positions_is_named_and_its_output_measured():
    model = Crossing().double()
    with pytest.warns(UncoveredLayersWarning, match=r"attention.in_proj.*are not one tensor"):
        found = unit_fisher(model, torch.randn(4, 3, WIDTH, dtype=torch.float64))
    assert set(found) == {"attention.out_proj", "readout"}


def test_keys_of_another_width_have_weights_of_their_own_which_are_named():
    model = Crossing(width_of_keys=3).double()
    with pytest.warns(UncoveredLayersWarning, match=r"nn.MultiheadAttention attention"):
        monitor = Monitor(model)
    monitor.measure(torch.randn(4, 3, WIDTH, dtype=torch.float64))
    assert set(monitor.latest) == {"attention.out_proj", "readout"}


def test_a_weight_that_is_computed_is_named():
    model = Attending(batch_first=True, bias=True, weights=True)
    prune.random_unstructured(model.attention.out_proj, "weight", 0.5)
    with pytest.warns(UncoveredLayersWarning, match=r"NonDynamically\w+ attention.out_proj"):
        monitor = Monitor(model)
    assert set(monitor.layers) == {"attention.in_proj", "readout"}


def test_parameters_that_are_replaced_after_attaching_are_followed():
    model, x = Attending(batch_first=True, bias=True, weights=True).double(), torch.randn(5, 3, 4)
    with Monitor(model, every=1) as monitor:
        state = {name: 2 * value for name, value in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        model(x.double()).square().sum().backward()
        dw, _ = monitor.natural_gradient()["attention.in_proj"]
    assert dw.shape == (3 * WIDTH, WIDTH)
    assert dw.isfinite().all()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_pass_that_is_interrupted_leaves_linear_as_it_was(error, monkeypatch):
    model, x, real = encoder(), torch.randn(2, 5, 8, dtype=torch.float64), F.linear
    with Monitor(model, layers="*.in_proj", every=1) as monitor:
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", raising(error))
            with pytest.raises(error):
                model(x)
        model(x)
        assert F.linear is real
        assert len(monitor.latest) == 2
    assert F.linear is real


def raising(error: type[BaseException]):
    def function(*_: object, **__: object) -> None:
        raise error

    return function
