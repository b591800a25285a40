"""Functions after layers, and the ways of writing them: what the layers put out is theirs."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


class Written(nn.Module):
    """A hidden layer whose activation is written as a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.head, self.function = nn.Linear(3, 4), nn.Linear(4, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.layer(x)))


def hidden(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), *modules, nn.Linear(4, 3))


NORM = nn.BatchNorm1d(4, affine=False)
NORM.running_mean, NORM.running_var = torch.linspace(-1, 1, 4), torch.linspace(0.5, 2, 4)


def norm_and_relu(x: Tensor) -> Tensor:
    return F.batch_norm(x, NORM.running_mean.to(x), NORM.running_var.to(x)).relu()


def relu_and_a_half(x: Tensor) -> Tensor:
    x = x.relu_()
    return x + 0.5


OUTPUTS = {
    "module": (hidden(nn.ELU()), F.elu, "elu"),
    "function": (Written(F.elu), F.elu, "elu"),
    "function-with-options": (
        Written(lambda x: F.leaky_relu(x, 0.1)), lambda x: F.leaky_relu(x, 0.1), "leaky_relu"
    ),
    "method": (Written(lambda x: x.tanh()), torch.tanh, "tanh"),
    "module-in-place": (hidden(nn.ReLU(inplace=True)), F.relu, "relu"),
    "method-in-place": (Written(lambda x: x.relu_()), F.relu, "relu"),
    "keyword": (Written(lambda x: F.selu(input=x)), F.selu, "selu"),
    "shifted-relu": (Written(lambda x: torch.clamp(x, min=-1)), lambda x: x.clamp(min=-1), "clamp"),
    "dropout": (hidden(nn.Dropout(0.5), nn.ELU()), F.elu, "elu"),
    "batch-norm": (hidden(NORM, nn.ReLU()), norm_and_relu, "relu"),
    "only-the-first": (Written(lambda x: x.tanh().sigmoid()), torch.tanh, "tanh"),
    "changed-afterwards": (Written(relu_and_a_half), F.relu, "relu"),
    "layer-norm": (
        Written(lambda x: torch.layer_norm(x, [4], x.new_ones(4), x.new_zeros(4)).relu()),
        lambda x: F.layer_norm(x, [4]).relu(), "relu"
    ),
    "number-first": (Written(lambda x: torch.max(torch.zeros(()), x)), F.relu, "max"),
    "written-out": (Written(lambda x: torch.where(x > 0, x, x.expm1())), F.elu, "where"),
    "none": (hidden(), lambda x: x, None),
    "largest": (Written(lambda x: x - x.max()), lambda x: x, None),
    "largest-of-each": (Written(lambda x: x - x.max(1, True).values), lambda x: x, None),
    "sum-before": (Written(lambda x: (x + 1).relu()), lambda x: x, None),
    "sum-in-place-before": (Written(lambda x: x.add_(1).relu()), lambda x: x, None),
    "sum-after-dropout": (Written(lambda x: F.dropout(x, 0.5, False).add_(1)), lambda x: x, None),
    "none-but-scaled": (Written(lambda x: 2 * x), lambda x: x, None),
}  # fmt: skip
