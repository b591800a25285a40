"""What a network's output is for: its target, its loss, and its likelihood."""

import math
from collections.abc import Callable
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

TaskName = Literal["classification", "squared-hinge", "reconstruction", "bernoulli-reconstruction"]


class Task(NamedTuple):
    """A task: ``loss`` is minus the log-likelihood of each case, up to a constant.

    The squared hinge is none: its Fishers are those of a softmax of the same outputs.
    """

    likelihood: Literal["categorical", "gaussian", "bernoulli"]
    loss: Callable[[Tensor, Tensor], Float[Tensor, " n"]]

    @property
    def classifies(self) -> bool:
        return self.likelihood == "categorical"

    def outputs(self, inputs: int, classes: int) -> int:
        """How many outputs a network for this task has."""
        return classes if self.classifies else inputs

    def target(self, x: Tensor, y: Tensor) -> Tensor:
        """What the outputs are compared with: the classes, or the inputs themselves."""
        return y if self.classifies else x

    def error(self, outputs: Float[Tensor, "n c"], target: Tensor, within: int = 1) -> float:
        """Share of cases whose class is not among the largest outputs, as many as ``within``.

        NaN where nothing is right or wrong.
        """
        if not self.classifies:
            return math.nan
        largest = outputs.topk(min(within, outputs.shape[1])).indices
        return 1 - (largest == target[:, None]).any(1).float().mean().item()


def _cross_entropy(logits: Float[Tensor, "n c"], y: Tensor) -> Float[Tensor, " n"]:
    return F.cross_entropy(logits, y, reduction="none")


def _squared_hinge(outputs: Float[Tensor, "n c"], y: Tensor) -> Float[Tensor, " n"]:
    """One classifier against the rest for each class, as in DSN on CIFAR-10."""
    sign = 1 - 2 * F.one_hot(y, outputs.shape[1])
    return (1 + sign * outputs).relu().square().sum(1)


def _half_squared_error(outputs: Float[Tensor, "n d"], x: Tensor) -> Float[Tensor, " n"]:
    return (outputs - x).square().sum(1) / 2


def _binary_cross_entropy(logits: Float[Tensor, "n d"], x: Tensor) -> Float[Tensor, " n"]:
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1)


TASKS: Final = MappingProxyType[TaskName, Task](
    {
        "classification": Task("categorical", _cross_entropy),
        "squared-hinge": Task("categorical", _squared_hinge),
        "reconstruction": Task("gaussian", _half_squared_error),
        "bernoulli-reconstruction": Task("bernoulli", _binary_cross_entropy),
    }
)
