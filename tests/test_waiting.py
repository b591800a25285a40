"""How often the host waits for the device: counted on the CPU, where waiting is free."""

import pytest
import torch
import torch.nn.functional as F
from measured import Operations
from torch import nn

from unitfisher import Monitor

WAITS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero")


def waits(done: Operations) -> int:
    """Count the operations whose answer the host needed before it went on."""
    return sum(done.count[name] for name in WAITS)


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute as on a GPU, without compiled kernels."""
    monkeypatch.setenv("UNITFISHER_NATIVE", "0")


def mlp() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(6, 8), nn.ELU(), nn.Linear(8, 3)), torch.randn(20, 6)


def convolutional() -> tuple[nn.Module, torch.Tensor]:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 3))
    return net, torch.randn(20, 2, 5, 5)


class Own(nn.Linear):
    """A layer with a forward of its own, that is looked at where errors are measured."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


@pytest.mark.usefixtures("by_torch")
def test_averages_need_no_look_at_a_forward_of_ones_own():
    model, x = nn.Sequential(Own(6, 8), nn.ELU(), nn.Linear(8, 3)), torch.randn(20, 6)
    monitor = Monitor(model, every=lambda step: step > 0, activations=1)
    with Operations() as done:
        model(x)
    assert waits(done) == 0
    with Operations() as done:
        model(x)
    assert waits(done) > 1
    assert list(monitor.latest) == ["0", "2"]


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("make", [mlp, convolutional])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"every": lambda step: False, "activations": 1}, 0),
        ({}, 1),
        ({"fisher": "rademacher", "activations": 1}, 1),
        ({"fisher": "rademacher", "rows": 10}, 1),
    ],
    ids=["averages", "exact", "signs", "rows"],
)
def test_a_watched_pass_waits_only_to_hear_whether_its_numbers_are_finite(make, options, expected):
    model, x = make()
    y = torch.randint(3, (20,))
    with Monitor(model, **options), Operations() as done:
        F.cross_entropy(model(x), y).backward()
    assert waits(done) == expected
