"""All members of a preset trained side by side, watched, recorded, and resumable at any step.

runs/mnist/
    checkpoint.pt              where all members are; replaced as a whole
    mnist-elu-s0/              each member's record (see `unitfisher.Run`):
        training/                  loss and error by epoch
        activations/               every hidden unit's mean and variance on the probe set
        units/, path/              Fisher quantities on the probe set, and by damping
        finished/                  one row, at the end
"""

import io
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from unitfisher.experiments.data import Dataset
from unitfisher.experiments.descent import Descent
from unitfisher.experiments.ensembles import Ensemble
from unitfisher.experiments.models import mlp
from unitfisher.experiments.orders import Orders
from unitfisher.experiments.presets import Member, Preset
from unitfisher.experiments.tasks import TASKS
from unitfisher.experiments.watching import Moment, Watch
from unitfisher.parts import write_atomically


class DivergedError(ArithmeticError):
    """Every training of an ensemble has come to a loss that is NaN or infinite."""


class Progress(NamedTuple):
    """Where a training is after one of its steps."""

    epoch: int
    iteration: int
    loss: float | None  # mean over the members that have one, after an epoch


class Trainer:
    """Trains those members of a preset that have one form, as an ensemble.

    Args:
        preset: What to train.
        members: Which of the preset's members.
        data: On the device to train on.
        folder: Of the checkpoint, and of one record for each member.
        resume: Go on from the checkpoint in the folder, if there is one.
        checkpoint_every: Seconds between checkpoints.

    Raises:
        RecordExistsError: The folder holds these runs, and ``resume`` is not given.
        ValueError: The runs there were configured differently.
    """

    def __init__(
        self,
        preset: Preset,
        members: Sequence[Member],
        data: Dataset,
        folder: Path,
        *,
        resume: bool = False,
        checkpoint_every: float = 120,
    ) -> None:
        self.preset, self.members, self.data = preset, list(members), data
        self.task = TASKS[preset.task]
        self.checkpoint, self.checkpoint_every = folder / "checkpoint.pt", checkpoint_every
        generators = {member.seed: torch.Generator().manual_seed(member.seed) for member in members}
        sizes = [data.inputs, *preset.hidden, self.task.outputs(data)]
        networks = []
        for member in members:  # a seed's members start alike, and leave their generator alike
            generators[member.seed].manual_seed(member.seed)
            networks.append(mlp(sizes, member.activation, generators[member.seed]))
        device = data.train_x.device
        self.ensemble = Ensemble(networks).to(device)
        self.parameters: list[Tensor] = list(self.ensemble.parameters())
        self.descent = Descent(
            self.parameters,
            torch.tensor([member.rate for member in members], device=device),
            momentum=preset.momentum,
            weight_decay=preset.weight_decay,
        )
        self.orders = Orders(
            len(data.train_x), preset.batch_size, [generators[member.seed] for member in members]
        )
        self.iteration, self.seconds, self.monitoring = 0, 0.0, 0.0
        self.loss = torch.zeros(len(members), device=device)  # summed over the epoch so far
        self._diverged = torch.zeros(len(members), dtype=torch.bool)
        with ExitStack() as opened:
            self.watches = [
                opened.enter_context(Watch(preset, member, model, data, folder, resume=resume))
                for member, model in zip(members, self.ensemble.members, strict=True)
            ]
            if resume and self.checkpoint.exists():
                self.load(torch.load(self.checkpoint, map_location=device, weights_only=True))
            self._opened = opened.pop_all()

    @property
    def epoch(self) -> int:
        """Count the epochs done."""
        return self.iteration // len(self.orders)

    @property
    def iterations(self) -> int:
        """Count the steps of the whole training."""
        return self.preset.epochs * len(self.orders)

    def __iter__(self) -> Iterator[Progress]:
        """Train to the end from where it stands, keeping checkpoints; yield after each step.

        Raises:
            DivergedError: No member's loss is finite any more. The last checkpoint is older.
        """
        clock = saved = time.perf_counter()
        if not self.iteration:
            self._end_epoch()
        while self.iteration < self.iterations:
            self.step()
            now = time.perf_counter()
            self.seconds, clock = self.seconds + now - clock, now
            loss = None if self.iteration % len(self.orders) else self._end_epoch()
            if now - saved > self.checkpoint_every or self.iteration == self.iterations:
                self.save()
                saved = time.perf_counter()
            yield Progress(self.epoch, self.iteration, loss)

    def step(self) -> None:
        """Take one step of every member on its next batch."""
        cases = self.orders.next().to(self.data.train_x.device)
        x, y = self.data.train_x[cases], self.data.train_y[cases]
        losses = self._losses(self.ensemble(x), self.task.target(x, y))
        gradients = torch.autograd.grad(losses.sum(), self.parameters)
        self.descent.step(gradients)
        self.loss += losses.detach()
        self.iteration += 1

    def save(self) -> None:
        """Replace the checkpoint by the present state; where the disk is full, the old one stays.

        Raises:
            DivergedError: There is nothing finite to keep.
        """
        self._name_diverged()
        content = io.BytesIO()
        torch.save(self.state(), content)
        try:
            unfinished = self.checkpoint.with_suffix(".unfinished")
            write_atomically(self.checkpoint, content.getvalue(), unfinished)
        except OSError as error:
            warnings.warn(f"no checkpoint was written ({error}); the last one stays", stacklevel=2)

    def state(self) -> dict[str, Any]:
        """Return everything that the rest of the training depends on."""
        return {
            "members": [tuple(member) for member in self.members],
            "iteration": self.iteration,
            "seconds": self.seconds,
            "monitoring": self.monitoring,
            "ensemble": self.ensemble.state_dict(),
            "descent": self.descent.state(),
            "orders": self.orders.state(),
            "loss": self.loss,
            "diverged": self._diverged,
            "watches": [watch.state() for watch in self.watches],
            "random": torch.get_rng_state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; records lose the rows that came after it.

        Raises:
            ValueError: The state is of other members.
        """
        members = [Member(*member) for member in state["members"]]
        if members != self.members:
            raise ValueError(
                f"{self.checkpoint} is of {_named(members)}, not of {_named(self.members)}; "
                "resume with the same activations, rates and seeds, or choose another folder"
            )
        self.iteration, self.seconds = state["iteration"], state["seconds"]
        self.monitoring = state["monitoring"]
        self.ensemble.load_state_dict(state["ensemble"])
        self.descent.load(state["descent"])
        self.orders.load(state["orders"])
        self.loss, self._diverged = state["loss"], state["diverged"].cpu()
        for watch, of in zip(self.watches, state["watches"], strict=True):
            watch.load(of)
        torch.set_rng_state(state["random"].cpu())

    def close(self) -> None:
        """Write what was recorded; safe to call twice."""
        self._opened.close()

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _losses(self, outputs: Tensor, target: Tensor) -> Float[Tensor, " m"]:
        shape = outputs.shape[:2]
        return self.task.loss(outputs.flatten(0, 1), target.flatten(0, 1)).view(shape).mean(1)

    def _end_epoch(self) -> float:
        """Record every member as it stands; return the epoch's loss, averaged over the living."""
        self._name_diverged()
        steps = len(self.orders) if self.iteration else torch.nan
        losses = (self.loss / steps).tolist()
        self.loss.zero_()
        for watch, loss, diverged in zip(self.watches, losses, self._diverged, strict=True):
            when = Moment(self.epoch, self.iteration, self.seconds, self.monitoring)
            self.monitoring += watch.record(when, loss, measure=not diverged)
        finite = [loss for loss in losses if math.isfinite(loss)]
        return sum(finite) / len(finite) if finite else math.nan

    def _name_diverged(self) -> None:
        """Warn of members that diverge; stop when none is left."""
        diverged = ~self.loss.isfinite().cpu()
        news = diverged & ~self._diverged
        self._diverged |= diverged
        if self._diverged.all():
            raise DivergedError(
                f"by step {self.iteration} the loss of {_named(self.members)} is NaN or infinite; "
                f"{self.checkpoint} holds the last finite state that was kept. "
                "Train with a smaller rate, in another folder"
            )
        if news.any():
            warnings.warn(
                f"{_named(m for m, new in zip(self.members, news, strict=True) if new)} diverged "
                f"by step {self.iteration}: the loss is NaN or infinite, and is recorded so",
                stacklevel=3,
            )


def _named(members: Iterable[Member]) -> str:
    return ", ".join(member.name for member in members)
