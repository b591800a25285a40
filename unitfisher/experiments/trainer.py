"""All members of a preset trained side by side, watched, recorded, and resumable at any step.

runs/mnist/
    checkpoint.pt              the state of all members; replaced as a whole
    elu-lr0.01-s0/             each member's record (see `unitfisher.Run`):
        training/                  loss and error by epoch
        activations/               every hidden unit's mean and variance on the probe set
        units/, path/              Fisher quantities on the probe set, and by damping
        finished/                  one row, at the end
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from unitfisher.experiments import checkpoints
from unitfisher.experiments.comparisons import classifiers
from unitfisher.experiments.data import Dataset
from unitfisher.experiments.dropout import generators_of
from unitfisher.experiments.ensembles import Ensemble
from unitfisher.experiments.losses import Losses
from unitfisher.experiments.members import networks_of
from unitfisher.experiments.norms import share_norms
from unitfisher.experiments.photographs import PhotographSets
from unitfisher.experiments.presets import Member, Phase, Preset
from unitfisher.experiments.ranks import ALONE, Ranks
from unitfisher.experiments.seeds import MASKS, mixed
from unitfisher.experiments.sgd import SGD
from unitfisher.experiments.sources import source_of
from unitfisher.experiments.stacks import set_dropout
from unitfisher.experiments.tasks import TASKS
from unitfisher.experiments.watching import Moment, Watches
from unitfisher.locks import FolderLock
from unitfisher.record import RecordExistsError


class Progress(NamedTuple):
    """Where a training is after one of its steps."""

    epoch: int
    iteration: int
    loss: float | None  # mean over members whose loss is finite; None between evaluations


class Trainer:
    """Trains those members of a preset that have one form, as an ensemble.

    Args:
        preset: What to train.
        members: Which of the preset's members.
        data: On the device to train on.
        folder: Receives the checkpoint, and a record for each member.
        resume: Go on from the checkpoint in the folder, if there is one.
        checkpoint_every: Seconds between checkpoints.
        precision: Precision of products in training; parameters and measurements stay in float32.
        compiled: Train through ``torch.compile``.
        workers: Processes that read photographs.
        ranks: Which of several processes this is. The first alone measures, records and writes.

    Raises:
        DamagedDataError: The checkpoint cannot be read.
        FolderInUseError: Another process trains in the folder.
        RecordExistsError: The folder holds a training, and ``resume`` is not given.
        ValueError: The folder holds other runs, a different configuration, or a checkpoint in
            another version's format, or several processes cannot share the batches. Nothing in the
            folder was changed.
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
        self.device = self.source.device
        networks = networks_of(preset, members, generators, self.source)
        if ranks.size > 1:
            for network in networks:
                share_norms(network)
        self._chances = generators_of(members, self.device, ranks.rank)
        self.ensemble = Ensemble(networks, self._chances).to(self.device)
        self.parameters: list[Tensor] = list(self.ensemble.parameters())
        self.optimizer = SGD(
            self.parameters,
            torch.tensor([member.rate for member in members], device=self.device),
            momentum=preset.momentum,
            weight_decay=preset.weight_decay,
            decayed=preset.decayed,
        )
        self._precision = torch.autocast(
            self.device.type, torch.bfloat16, enabled=precision == "bfloat16"
        )
        self._forward = torch.compile(self.ensemble) if compiled else self.ensemble
        self._computed = {"precision": precision, "compiled": compiled}
        self._phase: Phase | None = None
        self.iteration, self.seconds, self.monitoring = 0, 0.0, 0.0
        self._clock = time.perf_counter()  # the time up to which seconds are counted
        self.stopped = self._stop_asked = False
        self.losses = Losses(self.members, self.device, self.checkpoint, aloud=ranks.is_first)
        # for what draws from torch's global generator: dropout inside other modules, if compiled
        torch.manual_seed(mixed(members[0].seed, MASKS, ranks.rank))
        self._opened = ExitStack()
        try:
            self._begin(resume)
        except BaseException:
            self.close()
            raise

    def _begin(self, resume: bool) -> None:
        """Open the records, and load the checkpoint if there is one to resume from."""
        state = None
        if resume and self.checkpoint.exists():
            state = checkpoints.read(self.checkpoint)
            self._require_own(state)  # before anything is opened, and so left behind
        folder, recorded = self.checkpoint.parent, dict[Member, nn.Module]()
        if self.ranks.is_first:
            if not resume and self.checkpoint.exists():
                raise RecordExistsError(
                    f"{folder} already holds a training; choose another folder, or continue with "
                    "resume=True"
                )
            self._opened.callback(FolderLock(folder).release)
            recorded.update(zip(self.members, self.ensemble.members, strict=True))
        self.watches = Watches(
            self.preset, recorded, self.source, folder, computed=self._computed, resume=resume
        )
        self._opened.callback(self.watches.close)
        if state is not None:
            self.load(state)
        else:
            self.watches.clear()  # of a training that was killed before its first checkpoint

    def _require_own(self, state: Mapping[str, Any]) -> None:
        checkpoints.require_own(state, self.members, self.device, self.ranks, self.checkpoint)
        checkpoints.require_form(state["ensemble"], self.ensemble.state_dict(), self.checkpoint)

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
        """Train from the present step to the end, keeping checkpoints; yield after each step.

        After `stop` the training ends with the step at hand, and ``stopped`` is true.

        Raises:
            DivergedError: No member's loss is finite any more. The last checkpoint is older.
        """
        self._clock = saved = time.perf_counter()
        if not self.iteration:
            self._evaluate()
        while self.iteration < self.iterations and not self.stopped:
            self.step()
            ended = self.iteration == self.iterations
            loss = self._evaluate() if ended or self.iteration % self.every == 0 else None
            due = time.perf_counter() - saved > self.checkpoint_every
            if self.ranks.agreed(ended or due or self._stop_asked):
                self.stopped = self.ranks.agreed(self._stop_asked)
                self.save()
                saved = time.perf_counter()
            yield Progress(self.epoch, self.iteration, loss)

    def stop(self) -> None:
        """Let the training end with the current step, and keep a checkpoint of it."""
        self._stop_asked = True

    def step(self) -> None:
        """Take one step of every member on its next batch."""
        phase = self._enter_phase()
        x, y = self.source.next()
        with self._precision:
            losses = self._losses(self._forward(x), self.task.target(x, y))
        cases = x.shape[1] if self.ranks.size > 1 else 1  # turns means into sums, which add up
        gradients = torch.autograd.grad(losses.sum() * cases, self.parameters)
        *averaged, loss = self.ranks.averaged([*gradients, losses.detach() * cases], cases)
        self.optimizer.step(averaged, phase.factor)
        self.losses.add(loss)
        self.iteration += 1

    def save(self) -> None:
        """Replace the checkpoint by the present state; where the disk is full, the old one stays.

        Raises:
            DivergedError: There is nothing finite to keep.
        """
        self._count_seconds()
        self.losses.name_diverged(self.iteration)
        state = self.state()  # on every process: it gathers from all
        if self.ranks.is_first:
            checkpoints.write(self.checkpoint, state)

    def state(self) -> dict[str, Any]:
        """Return everything that the rest of the training depends on, of all processes."""
        return {
            "format": checkpoints.FORMAT,
            "members": [tuple(member) for member in self.members],
            "iteration": self.iteration,
            "seconds": self.seconds,
            "monitoring": self.monitoring,
            "ensemble": self.ensemble.state_dict(),
            "descent": self.optimizer.state(),
            "source": self.source.state(),
            **self.losses.state(),
            "watches": self.watches.state(),
            "random": self.ranks.gathered(checkpoints.random_states(self.device, self._chances)),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; records lose the rows that came after it.

        Raises:
            ValueError: The state has other members, networks or processes, or another version's
                format.
        """
        self._require_own(state)
        self.iteration, self.seconds = state["iteration"], state["seconds"]
        self.monitoring = state["monitoring"]
        self.ensemble.load_state_dict(state["ensemble"])
        self.optimizer.load(state["descent"])
        self.source.load(state["source"])
        self.losses.load(state)
        if self.ranks.is_first:
            self.watches.load(state["watches"])
        checkpoints.load_random(state["random"], self.device, self._chances, self.ranks)

    def close(self) -> None:
        """Write what was recorded, and leave the folder to others; safe to call twice."""
        self._opened.close()

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _losses(self, outputs: Any, target: Tensor) -> Float[Tensor, " m"]:
        """Each member's mean over its cases, summed over its classifiers: DSN has companions."""
        of_cases = [
            self.task.loss(logits.flatten(0, 1), target.flatten(0, 1)).view(logits.shape[:2])
            for logits in classifiers(outputs)
        ]
        return torch.stack(of_cases).sum(0).mean(1)

    def _enter_phase(self) -> Phase:
        phase = self.preset.phase(self.iteration)
        if phase != self._phase and phase.dropout:
            for member in self.ensemble.members:
                set_dropout(member, phase.dropout, layers=phase.dropped)
        self._phase = phase
        return phase

    def _evaluate(self) -> float:
        """Record every member; return the mean loss of the steps since the last evaluation.

        It is averaged over the members whose loss is finite.
        """
        self._count_seconds()
        self.losses.name_diverged(self.iteration)
        steps = (self.iteration - 1) % self.every + 1 if self.iteration else 0
        losses = self.losses.means(steps)
        self.ensemble.eval()
        when = Moment(self.epoch, self.iteration, self.seconds, self.monitoring)
        self.monitoring += self.watches.record(when, losses, self.losses.diverged.tolist())
        self.ensemble.train()
        finite = [loss for loss in losses if math.isfinite(loss)]
        return sum(finite) / len(finite) if finite else math.nan

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.seconds, self._clock = self.seconds + now - self._clock, now
