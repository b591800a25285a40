"""Small networks that do what makes observing hard, each with a batch and its labels."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CLASSES = 3
ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "celu": lambda x: F.celu(x, 0.7),
    "clamp": lambda x: x.clamp(min=-1),
    "clamp-above": lambda x: x.clamp_max(0.5),
    "elu": F.elu,
    "elu_": lambda x: F.elu(x, inplace=True),
    "gelu": F.gelu,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "leaky-relu": F.leaky_relu,
    "mish": F.mish,
    "none": lambda x: x,
    "relu": F.relu,
    "relu_": torch.relu_,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
    "threshold": lambda x: F.threshold(x, 0.3, -1.0),
}


class Row(nn.Module):
    """Linear layers in a row on 3 inputs, after each a function; notes what they put out."""

    def __init__(
        self, widths: list[int], functions: list[Callable[[Tensor], Tensor]], *, bias: bool = True
    ) -> None:
        super().__init__()
        sizes = pairwise([3, *widths])
        self.layers = nn.ModuleList(nn.Linear(d, u, bias, dtype=torch.double) for d, u in sizes)
        self.functions, self.put_out = functions, list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.put_out.clear()
        for layer, function in zip(self.layers, self.functions, strict=True):
            x = function(layer(x))
            self.put_out.append(x.detach().clone())
        return x


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


class Answers(nn.Module):
    """Returns its logits among other things, packed in the way it is given."""

    def __init__(self, pack: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.head = nn.Linear(4, CLASSES)
        self.pack = pack

    def forward(self, x: Tensor) -> object:
        return self.pack(self.head(x))


def mlp(nonlinearity: type[nn.Module] = nn.ELU) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 6), nonlinearity(), nn.Linear(6, 5), nonlinearity(), nn.Linear(5, CLASSES)
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


def loss_of(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())
