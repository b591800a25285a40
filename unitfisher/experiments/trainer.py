"""All members of a preset trained side by side, watched, recorded, and resumable at any step.

runs/mnist/
    checkpoint.pt              where all members are; replaced as a whole
    mnist-elu-s0/              each member's record (see `unitfisher.Run`):
        training/                  loss and error by epoch
        activations/               every hidden unit's mean and variance on the probe set
        units/, path/              Fisher quantities on the probe set, and by damping
        finished/                  one row, at the end
"""

import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from unitfisher.experiments.data import Dataset
from unitfisher.experiments.descent import Descent
from unitfisher.experiments.ensembles import Ensemble
from unitfisher.experiments.images import DamagedDataError
from unitfisher.experiments.networks import network
from unitfisher.experiments.photographs import PhotographSets
from unitfisher.experiments.presets import Member, Phase, Preset
from unitfisher.experiments.ranks import ALONE, Ranks
from unitfisher.experiments.sources import source_of
from unitfisher.experiments.stacks import set_dropout
from unitfisher.experiments.tasks import TASKS
from unitfisher.experiments.watching import Moment, Watch
from unitfisher.parts import write_atomically

FORMAT = 1  # of checkpoints: raised when `Trainer.state`, or what it gathers, takes another form
DROPOUT = 2**33  # added for every further process, for its own dropout


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
        precision: Of products in training; parameters and measurements stay in float32.
        compiled: Train through ``torch.compile``.
        workers: Processes that read photographs.
        ranks: Which of several processes this is. The first alone measures, records and writes.

    Raises:
        DamagedDataError: The checkpoint cannot be read.
        RecordExistsError: The folder holds these runs, and ``resume`` is not given.
        ValueError: The runs there were configured differently, the checkpoint is of another
            version's form, or several processes cannot share the batches.
    """

    def __init__(
        self,
        preset: Preset,
        members: Sequence[Member],
        data: Dataset | PhotographSets,
        folder: Path,
        *,
        resume: bool = False,
        checkpoint_every: float = 120.0,
        precision: Literal["float32", "bfloat16"] = "float32",
        compiled: bool = False,
        workers: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.preset, self.members, self.ranks = preset, list(members), ranks
        self.task = TASKS[preset.task]
        self.checkpoint, self.checkpoint_every = folder / "checkpoint.pt", checkpoint_every
        by_seed = {member.seed: torch.Generator() for member in members}
        generators = [by_seed[member.seed] for member in members]
        self.source = source_of(preset, data, members, generators, workers, ranks)
        networks = []
        for member, generator in zip(members, generators, strict=True):
            generator.manual_seed(member.seed)  # a seed's members start alike, and leave it alike
            networks.append(network(preset, member, self.source, generator))
        self.device = self.source.device
        self.ensemble = Ensemble(networks).to(self.device)
        if ranks.size > 1 and next(self.ensemble.buffers(), None) is not None:
            raise ValueError(
                "batch normalisation would see shares of a batch, each process another one: "
                "train without it, or in one process"
            )
        self.parameters: list[Tensor] = list(self.ensemble.parameters())
        self.descent = Descent(
            self.parameters,
            torch.tensor([member.rate for member in members], device=self.device),
            momentum=preset.momentum,
            weight_decay=preset.weight_decay,
        )
        self._precision = torch.autocast(
            self.device.type, torch.bfloat16, enabled=precision == "bfloat16"
        )
        self._forward = torch.compile(self.ensemble) if compiled else self.ensemble
        self._phase: Phase | None = None
        self.iteration, self.seconds, self.monitoring = 0, 0.0, 0.0
        self._clock = time.perf_counter()  # until when seconds are counted
        self.loss = torch.zeros(len(members), device=self.device)  # since the last evaluation
        self._diverged = torch.zeros(len(members), dtype=torch.bool)
        # of dropout, which draws from torch's own generator
        torch.manual_seed(members[0].seed + DROPOUT * ranks.rank)
        with ExitStack() as opened:
            self.watches = [
                opened.enter_context(
                    Watch(preset, member, model, self.source, folder, resume=resume)
                )
                for member, model in zip(members, self.ensemble.members, strict=True)
                if ranks.is_first
            ]
            if resume and self.checkpoint.exists():
                self.load(_read(self.checkpoint, self.device))
            else:
                for watch in self.watches:
                    watch.clear()  # of a training that was killed before its first checkpoint
            self._opened = opened.pop_all()

    @property
    def epoch(self) -> int:
        """Count the epochs done."""
        return self.iteration // len(self.source)

    @property
    def iterations(self) -> int:
        """Count the steps of the whole training."""
        return self.preset.steps(len(self.source))

    @property
    def every(self) -> int:
        """Count the steps from one evaluation to the next."""
        return self.preset.steps_between(len(self.source))

    def __iter__(self) -> Iterator[Progress]:
        """Train to the end from where it stands, keeping checkpoints; yield after each step.

        Raises:
            DivergedError: No member's loss is finite any more. The last checkpoint is older.
        """
        self._clock = saved = time.perf_counter()
        if not self.iteration:
            self._evaluate()
        while self.iteration < self.iterations:
            self.step()
            ended = self.iteration == self.iterations
            loss = self._evaluate() if ended or self.iteration % self.every == 0 else None
            if self.ranks.agreed(ended or time.perf_counter() - saved > self.checkpoint_every):
                self.save()
                saved = time.perf_counter()
            yield Progress(self.epoch, self.iteration, loss)

    def step(self) -> None:
        """Take one step of every member on its next batch."""
        phase = self._enter_phase()
        x, y = self.source.next()
        with self._precision:
            losses = self._losses(self._forward(x), self.task.target(x, y))
        gradients = torch.autograd.grad(losses.sum(), self.parameters)
        *averaged, loss = self.ranks.averaged([*gradients, losses.detach()], x.shape[1])
        self.descent.step(averaged, phase.factor)
        self.loss += loss
        self.iteration += 1

    def save(self) -> None:
        """Replace the checkpoint by the present state; where the disk is full, the old one stays.

        Raises:
            DivergedError: There is nothing finite to keep.
        """
        self._count_seconds()
        self._name_diverged()
        state = self.state()
        if not self.ranks.is_first:
            return
        content = pa.BufferOutputStream()  # which gives its bytes without a copy: they may be GiB
        torch.save(state, content)
        try:
            unfinished = self.checkpoint.with_suffix(".unfinished")
            write_atomically(self.checkpoint, content.getvalue(), unfinished)
        except OSError as error:
            warnings.warn(f"no checkpoint was written ({error}); the last one stays", stacklevel=2)

    def state(self) -> dict[str, Any]:
        """Return everything that the rest of the training depends on, of all processes."""
        return {
            "format": FORMAT,
            "members": [tuple(member) for member in self.members],
            "iteration": self.iteration,
            "seconds": self.seconds,
            "monitoring": self.monitoring,
            "ensemble": self.ensemble.state_dict(),
            "descent": self.descent.state(),
            "source": self.source.state(),
            "loss": self.loss,
            "diverged": self._diverged,
            "watches": [watch.state() for watch in self.watches],
            "random": self.ranks.gathered(_random_states(self.device)),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; records lose the rows that came after it.

        Raises:
            ValueError: The state is of other members, or of another version's form.
        """
        written = state.get("format", 0)  # none was named at first
        if written != FORMAT:
            raise ValueError(
                f"{self.checkpoint} is a checkpoint of format {written}, and this unitfisher reads "
                f"format {FORMAT}: resume with the version that began it, which config.json of its "
                "records names, or begin anew in another folder"
            )
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
        self.source.load(state["source"])
        self.loss, self._diverged = state["loss"], state["diverged"].cpu()
        for watch, of in zip(self.watches, state["watches"], strict=self.ranks.is_first):
            watch.load(of)
        self._load_random(state["random"])

    def _load_random(self, drawn: Sequence[Tensor]) -> None:
        each = len(_random_states(self.device))
        if len(drawn) != each * self.ranks.size:
            raise ValueError(
                f"{self.checkpoint} is of {len(drawn) // each} processes on one kind of device, "
                f"not of {self.ranks.size} on {self.device}: resume as it was begun"
            )
        own = drawn[each * self.ranks.rank :]
        torch.set_rng_state(own[0].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(own[1].cpu(), self.device)

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

    def _enter_phase(self) -> Phase:
        phase = self.preset.phase(self.iteration)
        if phase != self._phase and phase.dropout:
            for member in self.ensemble.members:
                set_dropout(member, phase.dropout, layers=phase.dropped)
        self._phase = phase
        return phase

    def _evaluate(self) -> float:
        """Record every member as it stands; return the loss of the steps since the last time.

        It is averaged over the members that have one.
        """
        self._count_seconds()
        self._name_diverged()
        steps = (self.iteration - 1) % self.every + 1 if self.iteration else math.nan
        losses = (self.loss / steps).tolist()
        self.loss.zero_()
        self.ensemble.eval()
        for watch, loss, diverged in zip(self.watches, losses, self._diverged, strict=False):
            when = Moment(self.epoch, self.iteration, self.seconds, self.monitoring)
            self.monitoring += watch.record(when, loss, measure=not diverged)
        self.ensemble.train()
        finite = [loss for loss in losses if math.isfinite(loss)]
        return sum(finite) / len(finite) if finite else math.nan

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.seconds, self._clock = self.seconds + now - self._clock, now

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
        if news.any() and self.ranks.is_first:
            warnings.warn(
                f"{_named(m for m, new in zip(self.members, news, strict=True) if new)} diverged "
                f"by step {self.iteration}: the loss is NaN or infinite, and is recorded so",
                stacklevel=3,
            )


def _read(checkpoint: Path, device: torch.device) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(checkpoint, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError) as error:
        raise DamagedDataError(
            f"{checkpoint} cannot be read as a checkpoint ({error}); bring back a copy, or delete "
            "it to begin anew"
        ) from error
    return state


def _random_states(device: torch.device) -> list[Tensor]:
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]


def _named(members: Iterable[Member]) -> str:
    return ", ".join(member.name for member in members)
