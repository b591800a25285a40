"""What the benchmark measures on: networks with a batch, and one plain training step of each.

Data are random: time depends on shapes, not on digits. Every candidate gets its own copy with the
same weights, so that the hooks of one do not meet those of another.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unitfisher.experiments import mlp
from unitfisher.experiments.convnets import imagenet15

CLASSES = 10
Run = Callable[[], object]
Batch = tuple[nn.Module, Tensor, Tensor]  # a network, its inputs, the labels


class Setting(NamedTuple):
    """A network and the batch of one training step."""

    model: nn.Module
    x: Tensor
    y: Tensor
    after: ExitStack  # closes what a candidate opens


class Case(NamedTuple):
    """Where rows are measured: how to make the network and its batch, and the plain run."""

    name: str
    title: str
    make: Callable[[], Batch]  # the same at every call
    plain: Callable[[Setting], Run]

    def on(self, device: str, after: ExitStack) -> Setting:
        """Make a fresh network and batch on that device."""
        model, x, y = self.make()
        moved = x.to(device).detach().requires_grad_(x.requires_grad)
        return Setting(model.to(device), moved, y.to(device), after)


def plain_step(at: Setting) -> Run:
    """What most rows are compared with: one forward and backward pass."""
    return partial(training_step, at)


def training_step(at: Setting) -> Tensor:
    """Run forward and backward; return the logits."""
    at.model.zero_grad()
    at.x.grad = None
    logits = at.model(at.x)
    F.cross_entropy(logits, at.y).backward()
    return logits


def plain_training(at: Setting, steps: int) -> Run:
    """Train for ``steps`` steps, at a rate that hardly moves the weights."""
    optimizer = torch.optim.SGD(at.model.parameters(), lr=1e-4)

    def run() -> None:
        for _ in range(steps):
            training_step(at)
            optimizer.step()

    return run


def mnist_net(n: int) -> Batch:
    """The paper's 784-8×128-10 network with ELU, on n random images."""
    chance = torch.Generator().manual_seed(0)
    model = mlp([784, *[128] * 8, CLASSES], "elu", chance)
    return model, torch.rand(n, 784, generator=chance), labels(n)


def conv_net() -> Batch:
    """Three 3×3 convolutions for CIFAR's shape: 3→32, pool, 32→32, pool, 32→64, pool, linear."""
    with fixed_seed():
        model = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ELU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1), nn.ELU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ELU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 4 * 4, CLASSES),
        )  # fmt: skip
        return model, torch.rand(64, 3, 32, 32), labels(64)


def wide_layer(n: int, width: int) -> Batch:
    """A square linear layer under a small readout; the step includes the gradient of its input."""
    with fixed_seed():
        model = nn.Sequential(nn.Linear(width, width), nn.ELU(), nn.Linear(width, CLASSES))
        return model, torch.randn(n, width).requires_grad_(), labels(n)


def deep_convolution(n: int, channels: int) -> Batch:
    """As many channels as before, by 3×3, on 14×14 positions, under a small readout."""
    with fixed_seed():
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)
        model = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ELU(), *head)
        return model, torch.randn(n, channels, 14, 14).requires_grad_(), labels(n)


def photographs_net(n: int, side: int) -> Batch:
    """The paper's network of 15 layers for ImageNet's classes."""
    chance = torch.Generator().manual_seed(0)
    model = imagenet15(1000, chance)
    return model, torch.randn(n, 3, side, side, generator=chance), labels(n, 1000)


def labels(n: int, classes: int = CLASSES) -> Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(1))


@contextmanager
def fixed_seed() -> Iterator[None]:
    """Seed the global generator, which layers draw from, with 0; restore it afterwards."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        yield


MNIST_64 = Case("mnist-64", "MNIST net, n = 64", partial(mnist_net, 64), plain_step)
MNIST_512 = Case("mnist-512", "MNIST net, n = 512", partial(mnist_net, 512), plain_step)
CONV_64 = Case("conv-64", "conv net, n = 64", conv_net, plain_step)
FIFTY = Case("training", "50 training steps", MNIST_64.make, partial(plain_training, steps=50))
MANY = Case("long-training", "10,000 steps", MNIST_64.make, partial(plain_training, steps=250))
FC_4096 = Case("fc-4096", "fc 4096×4096, n = 256", partial(wide_layer, 256, 4096), plain_step)
CONV_768, CONV_768_64 = (
    Case(name, f"conv 768→768 3×3, 14×14, n = {n}", partial(deep_convolution, n, 768), plain_step)
    for name, n in (("conv-768", 8), ("conv-768-64", 64))
)
IMAGENET = Case("imagenet-15", "imagenet15, n = 64", partial(photographs_net, 64, 224), plain_step)
