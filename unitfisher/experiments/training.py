"""Plain stochastic gradient descent on tensors that already lie on the device."""

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from unitfisher.experiments.data import Dataset
from unitfisher.experiments.tasks import TASKS, Task

RATE: Final = 0.01  # rate and batch size are the paper's for MNIST
BATCH_SIZE: Final = 64


class Score(NamedTuple):
    """Loss and errors of a network on a data set."""

    loss: float
    error: float  # share of wrong answers
    top5_error: float  # share of answers whose class is not among the five largest outputs


def train(
    model: nn.Module, data: Dataset, epochs: int, generator: torch.Generator
) -> Iterator[int]:
    """Train epoch by epoch at `RATE`, yielding 0 before the first step and then each epoch done.

    The body of the caller's loop runs between epochs. Only the generator decides the order of the
    cases, so runs of one seed see the same batches.
    """
    parameters: list[Tensor] = list(model.parameters())
    yield 0
    for epoch in range(1, epochs + 1):
        model.train()
        for x, y in batches(data, BATCH_SIZE, generator):
            loss = F.cross_entropy(model(x), y)
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():  # torch.optim would load the compiler: seconds, for this line
                torch._foreach_add_(parameters, gradients, alpha=-RATE)
        yield epoch


def batches(
    data: Dataset, size: int, generator: torch.Generator
) -> Iterator[tuple[Float[Tensor, "b d"], Int64[Tensor, " b"]]]:
    """Cut one pass over the training set, in a new order, into batches."""
    order = torch.randperm(len(data.train_x), generator=generator).to(data.train_x.device)
    for chosen in torch.split(order, size):
        yield data.train_x.index_select(0, chosen), data.train_y.index_select(0, chosen)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Iterable[tuple[Float[Tensor, "n ..."], Tensor]],
    task: Task = TASKS["classification"],
) -> Score:
    """Return mean loss and shares of wrong answers (NaN where there are none), in eval mode."""
    was_training = model.training
    model.eval()
    loss, wrong, far, cases = 0.0, 0.0, 0.0, 0
    for x, y in data:
        outputs, target = model(x), task.target(x, y)
        loss += task.loss(outputs, target).double().sum().item()
        wrong += len(x) * task.error(outputs, target)
        far += len(x) * task.error(outputs, target, within=5)
        cases += len(x)
    model.train(was_training)
    return Score(loss / cases, wrong / cases, far / cases)
