"""Errors of linear layers in a row, compiled, against columns sent back one by one in double."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nonlinearities import ELEMENTWISE, Row
from routes import needs_compiler
from strategies import normal, seeded, seeds
from torch import Tensor, nn
from torch.testing import assert_close

from unitfisher import Monitor, native
from unitfisher.backward import Backward
from unitfisher.capture import capture
from unitfisher.cascade import ROWS, Cascade
from unitfisher.chain import Chain
from unitfisher.columns import Estimator, columns
from unitfisher.layers import select
from unitfisher.likelihoods import likelihood_of
from unitfisher.memory import within

pytestmark = needs_compiler


@st.composite
def rows(draw) -> tuple[Row, Tensor]:
    """A network of widths that fill the kernel's tiles or not, and a batch."""
    chance, names = draw(seeds), draw(st.lists(st.sampled_from(sorted(ELEMENTWISE)), min_size=1))
    sizes = st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 64, 65])
    widths = [*(draw(sizes) for _ in names), draw(st.integers(2, 5))]
    functions = [ELEMENTWISE[name] for name in [*names, "none"]]
    model = Row(widths, functions, bias=draw(st.booleans())).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(normal(chance, *parameter.shape) / parameter.shape[-1] ** 0.5)
    return model, normal(chance, draw(st.sampled_from([1, 4, 5, 36, 37, 80])), 3).float()


def passed(model: nn.Module, x: Tensor) -> tuple[Any, Tensor]:
    """One pass of a model whose way is known."""
    layers, chain = select(model, None), Chain()
    for _ in range(2):
        with capture(layers, follow=not chain.links) as seen:
            z = model(x)
        chain.settle(seen, z)
    return seen, z


def roots(z: Tensor, together: int = 10) -> list[Tensor]:
    exact = Estimator(likelihood_of("categorical"))
    return list(columns(z.detach().unsqueeze(1), exact, torch.Generator(), None, together))


def one_by_one(model: nn.Module, x: Tensor) -> list[Tensor]:
    """D of each layer, in double, by autograd."""
    seen, z = passed(copy.deepcopy(model).double(), x.double())
    edges = [call.edge for call in seen.calls]
    sent = [Backward(z, edges).send_back(column) for column in roots(z, together=1)]
    return [torch.cat(of_layer).square().sum(0) for of_layer in zip(*sent, strict=True)]


@given(case=rows(), together=st.integers(1, 4))
def test_squares_of_the_errors_are_those_of_columns_sent_one_by_one(case, together):
    model, x = case
    seen, z = passed(model, x)
    cascade = Cascade.of(seen, z)
    assert cascade is not None
    (found,) = cascade.send(roots(z, together))
    for D, expected in zip(found, one_by_one(model, x), strict=True):
        scale = expected.max().clamp_min(1e-30)
        assert_close(D[0].double() ** 2 / scale, expected / scale, rtol=1e-4, atol=1e-5)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 70), nn.ELU(), nn.Linear(70, 40), nn.ELU(), nn.Linear(40, 4))


def batch(n: int = 50) -> Tensor:
    return normal(seeded(n), n, 3).float()


def test_threads_change_no_bit(monkeypatch):
    monkeypatch.setattr(native, "FLOP_PER_THREAD", 1)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        seen, z = passed(network(), batch())
        found.append(next(Cascade.of(seen, z).send(roots(z))))
    torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


class Own(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


def double_errors(module: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
    y.register_hook(lambda error: 2 * error)


def with_hook(model: nn.Sequential) -> nn.Sequential:
    model[1].register_forward_hook(double_errors)
    return model


def with_module_hook(model: nn.Sequential) -> nn.Sequential:
    model[2].register_full_backward_hook(lambda module, of_inputs, of_outputs: None)
    return model


def twice(model: nn.Sequential) -> nn.Sequential:
    same = nn.Linear(4, 4)
    return nn.Sequential(*model, nn.ELU(), same, nn.ELU(), same)


OTHERS: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "double": lambda model: model.double(),
    "half": lambda model: model.bfloat16(),
    "own-forward": lambda model: nn.Sequential(Own(3, 70), *model[1:]),
    "hook-on-an-output": with_hook,
    "hook-on-a-layer": with_module_hook,
    "layer-called-twice": twice,
    "softmax-between": lambda model: nn.Sequential(model[0], nn.Softmax(-1), *model[2:]),
    "softmax-behind": lambda model: nn.Sequential(*model, nn.LogSoftmax(-1)),
    "parametrised": lambda model: nn.utils.parametrizations.weight_norm(model[2]) and model,
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_what_is_not_a_plain_row_goes_the_general_way(change):
    model = change(network())
    seen, z = passed(model, batch().to(next(model.parameters()).dtype))
    assert Cascade.of(seen, z) is None


def test_columns_in_double_precision_go_down_as_well():
    model, x = network(), batch()
    seen, z = passed(model, x)
    (found,) = Cascade.of(seen, z).send(roots(z))
    (doubled,) = Cascade.of(seen, z).send(block.double() for block in roots(z))
    assert all(torch.equal(one, other) for one, other in zip(found, doubled, strict=True))


def test_what_does_not_fit_the_workspace_goes_the_general_way():
    seen, z = passed(network(), batch())
    roots_of_D, of_a_thread = 4 * 50 * (70 + 40 + 4), 2 * 4 * ROWS * 70
    held = roots_of_D + torch.get_num_threads() * of_a_thread
    with within(held):
        assert Cascade.of(seen, z) is not None
    with within(held - 1):
        assert Cascade.of(seen, z) is None
    assert Cascade.of(seen, z[:, :3]) is None


def test_more_columns_than_go_down_together_go_in_parts():
    model, x = nn.Sequential(*network()[:-1], nn.Linear(40, ROWS + 50)), batch(5)
    seen, z = passed(model, x)
    (found,) = Cascade.of(seen, z).send(roots(z, together=ROWS + 49))
    for D, expected in zip(found, one_by_one(model, x), strict=True):
        assert_close(D[0].double() ** 2, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


def test_a_hook_that_changes_errors_changes_them_for_the_monitor_too():
    plain, doubled = network(), network()
    doubled[1].register_forward_hook(
        lambda module, args, y: y.register_hook(lambda g: 2 * g) and None
    )
    c = []
    for model in (plain, doubled):
        monitor = Monitor(model, every=1)
        for _ in range(2):
            model(batch())
        c.append(monitor.latest["0"].c)
    assert_close(c[1], 4 * c[0], rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("fisher", ["exact", "rademacher", "mc", "top-rademacher"])
@pytest.mark.parametrize(
    "options", [{}, {"units": 5}, {"rows": 20}, {"layers": ["2", "4"]}], ids=str
)
def test_a_monitor_measures_the_same_without_the_kernel(monkeypatch, fisher, options):
    found = []
    for native_too in ("1", "0"):
        monkeypatch.setenv("UNITFISHER_NATIVE", native_too)
        model = network()
        monitor = Monitor(model, every=1, fisher=fisher, damping=0.1, **options)
        for n in (50, 40):
            model(batch(n))
        found.append(monitor.latest)
    for name, of in found[0].items():
        other = found[1][name]
        for quantity in ("c", "s", "k", "mean_q", "output_mean", "output_var"):
            own, without = getattr(of, quantity), getattr(other, quantity)
            assert_close(own, without, rtol=1e-3, atol=1e-4 * float(without.abs().max()))


def test_a_weight_that_is_made_from_activations_is_another_way_for_errors():
    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = (nn.Linear(3, d) for d in (3, 3, 2))
            del self.second._parameters["weight"]
            self.own = nn.Parameter(normal(seeded(0), 3, 3).float())

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x).relu()
            self.second.weight = self.own * h.mean(0)
            return self.last(self.second(h).relu())

    seen, z = passed(Made(), normal(seeded(1), 4, 3).float())
    assert seen.row  # in a row all the same
    assert Cascade.of(seen, z) is None
