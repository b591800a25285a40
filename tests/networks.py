"""Small networks that do what makes observing hard, with batches, labels and gradients."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from strategies import normal as double
from strategies import seeded
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CLASSES = 3


class Residual(nn.Module):
    """Convolution, batch norm, and an activation and a residual add in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)), inplace=True)
        y = self.second(x)
        y += x
        return self.head(self.drop(y.relu_()).mean((2, 3)))


class Reuse(nn.Module):
    """One layer called twice, its ELU in place."""

    def __init__(self) -> None:
        super().__init__()
        self.once = nn.Linear(4, 5)
        self.twice = nn.Linear(5, 5)
        self.head = nn.Linear(5, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.elu(self.once(x), inplace=True)
        for _ in range(2):
            h = F.elu_(self.twice(h))
        return self.head(h)


class Sequential(nn.Module):
    """A label for every position of a sequence: logits (n, T, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 5)
        self.mix = nn.Conv1d(5, 5, 3, padding=1)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).tanh()
        return self.head(self.drop(F.gelu(self.mix(h.mT)).mT))


class Checkpointed(nn.Module):
    """A block whose activations are computed again in the backward pass."""

    def __init__(self, *, again: bool = True, reentrant: bool = False, noisy: bool = True) -> None:
        super().__init__()
        noise = [nn.BatchNorm1d(6), nn.Dropout(0.3)] if noisy else []
        self.first = nn.Linear(4, 5)
        self.block = nn.Sequential(nn.Linear(5, 6), *noise, nn.ELU(), nn.Linear(6, 5))
        self.head = nn.Linear(5, CLASSES)
        self.again, self.reentrant = again, reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        if not self.again:
            return self.head(self.block(h))
        return self.head(checkpoint(self.block, h, use_reentrant=self.reentrant))


class Faulty(nn.Module):
    """Raises what it is given, after its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.head = nn.Linear(5, CLASSES)
        self.error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        if self.error is not None:
            raise self.error
        return self.head(h)


class Sparse(nn.Module):
    """Calls a layer, or does not, as the first number of its input says."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.head = (nn.Linear(4, d) for d in (4, 4, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.head(h + self.block(h) if (x[:, 0] > 0).any() else h)


def sparse_batches() -> list[Tensor]:
    """Three of which the second comes to no block."""
    batches = list(normal(20, 4).double().split([6, 9, 5]))
    for batch, sign in zip(batches, (1, -1, 1), strict=True):
        batch[:, 0] = sign
    return batches


class Answers(nn.Module):
    """Returns its logits among other things, packed in the way it is given."""

    def __init__(self, pack: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.head = nn.Linear(4, CLASSES)
        self.pack = pack

    def forward(self, x: Tensor) -> object:
        return self.pack(self.head(x))


class Means(nn.Module):
    """The mean over positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def mlp(nonlinearity: type[nn.Module] = nn.ELU) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 6), nonlinearity(), nn.Linear(6, 5), nonlinearity(), nn.Linear(5, CLASSES)
    )


def seeded_mlp(nonlinearity: type[nn.Module] = nn.ELU) -> nn.Sequential:
    torch.manual_seed(0)
    return mlp(nonlinearity)


def grouped() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.ELU(), nn.Flatten(), nn.Linear(16, CLASSES)
    )


class Network(NamedTuple):
    make: Callable[[], nn.Module]
    size: tuple[int, ...]  # of one sample
    positions: tuple[int, ...] = ()  # that carry a label each

    def seeded(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make()

    def batch(self, n: int = 10) -> tuple[Tensor, Tensor]:
        """Draw from the global source of chance, as a user's loader does."""
        return torch.randn(n, *self.size), torch.randint(CLASSES, (n, *self.positions))


NETWORKS = {
    "mlp": Network(mlp, (4,)),
    "conv-batchnorm-dropout-in-place": Network(Residual, (2, 4, 4)),
    "weight-reuse": Network(Reuse, (4,)),
    "sequence": Network(Sequential, (3, 4), (3,)),
    "checkpoint": Network(Checkpointed, (4,)),
    "softmax-regression": Network(partial(nn.Linear, 4, CLASSES), (4,)),
}
NETS = {name: NETWORKS[name] for name in ("mlp", "weight-reuse", "sequence", "softmax-regression")}
NETS["convolution-in-groups"] = Network(grouped, (2, 4, 4))


def prepared(of: str) -> tuple[nn.Module, Tensor, Tensor]:
    """One of these in double precision, with inputs and labels for several batches."""
    network, generator = NETS[of], seeded(1)
    x = double(generator, 120, *network.size)
    y = torch.randint(0, CLASSES, (120, *network.positions), generator=generator)
    return network.seeded().double(), x, y


def batches(*whole: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(t.split([50, 7, 1, 62]) for t in whole), strict=True))


def gradient() -> tuple[Tensor, Tensor]:
    """Of the second layer of ``mlp``."""
    g = double(seeded(0), 5, 7)
    return g[:, :6], g[:, 6]


def normal(*size: int, seed: int = 0) -> Tensor:
    """In single precision, as users' batches are."""
    return torch.randn(*size, generator=seeded(seed))


def inputs(*size: int, seed: int = 1) -> Tensor:
    """In double precision, with a mean and a spread of its own for every feature."""
    generator = seeded(seed)
    mean, spread = double(generator, *size[1:]), 0.5 + double(generator, *size[1:]).abs()
    return mean + spread * double(generator, *size)


def filled(model: nn.Module, generator: Generator | None = None) -> nn.Module:
    """Give it double precision, weights for its fan-in, running statistics that matter."""
    generator = generator or seeded(0)
    for parameter in model.double().parameters():
        fan_in = max(parameter.shape[1:], default=1)
        parameter.data = double(generator, *parameter.shape) / fan_in**0.5
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean = double(generator, module.num_features)
            module.running_var = 0.5 + double(generator, module.num_features) ** 2
    return model


def a_step(model: nn.Module, x: Tensor) -> None:
    loss_of(model(x), torch.zeros(len(x), dtype=torch.long)).backward()


def loss_of(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())
