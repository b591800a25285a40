"""What is recorded of a network in training, on a fixed set of cases."""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from unitfisher import Monitor, Run, UnitStatistics
from unitfisher.capture import capture
from unitfisher.experiments.data import DamagedDataError
from unitfisher.experiments.presets import Member, Preset
from unitfisher.experiments.sources import Source
from unitfisher.experiments.tasks import TASKS
from unitfisher.experiments.training import evaluate
from unitfisher.outputs import UnitMeans
from unitfisher.record import require_new

TABLES = ("training", "activations", "path", "finished")  # beside the Monitor's own
OVER_UNITS: Final = MappingProxyType[
    str, Literal["median", "mean"]
](  # medians where tails are heavy
    {
        **dict.fromkeys(("k", "sc", "corrected_mean_norm", "damping_share", "n_eff"), "median"),
        **dict.fromkeys(("cosine", "bias_shift_share_natural"), "mean"),
        **dict.fromkeys(("bias_shift_share_gradient", "mean_share", "dead"), "mean"),
    }
)


class Moment(NamedTuple):
    """The time of an evaluation."""

    epoch: int
    iteration: int
    seconds: float  # of training all members, until then
    monitoring: float  # part of these: Fishers, and passes over the probe set


class Watch:
    """Records one network of a preset, epoch by epoch.

    Args:
        preset: What is trained.
        member: Which of its networks this is.
        model: The network.
        source: Has the fixed sets that it is evaluated on.
        folder: Parent of all records; this one is named after the member.
        computed: How, for the record's configuration.
        resume: Continue the record, if there is one.
    """

    def __init__(
        self,
        preset: Preset,
        member: Member,
        model: nn.Module,
        source: Source,
        folder: Path,
        *,
        computed: Mapping[str, Any],
        resume: bool = False,
    ) -> None:
        self.preset, self.model, self.source = preset, model, source
        self.task = TASKS[preset.task]
        config = asdict(preset) | {"device": str(source.device)} | member._asdict()
        for several in ("activations", "rates", "seeds"):
            del config[several]
        config |= {"train_cases": source.cases, "classes": source.classes, **computed}
        self.run = Run(folder / member.name, config, resume=resume)
        self.monitor = Monitor(
            model,
            _hidden,
            self.task.likelihood,
            fisher=preset.fisher,
            damping=preset.dampings[-1],
            units=preset.units,
            rows=preset.rows,
            record=self.run,
        )
        self.probe = source.probe(preset.probe)
        every = preset.steps_between(len(source))
        self._steps = preset.steps(len(source))
        self.measured = {
            min(every * n, self._steps)
            for n in measured_epochs(-(-self._steps // every), preset.measurements)
        }

    def record(self, when: Moment, loss: float, *, measure: bool = True) -> float:
        """Record an epoch; return how many seconds the Monitor's part took.

        Args:
            when: The epoch that has ended; 0 before training.
            loss: Mean over the epoch's steps, as they were taken: with dropout and augmentation,
                and companions' losses in it.
            measure: Measure Fishers too, if it is time; False for a network that has diverged.
        """
        x, y = self.probe
        start = time.perf_counter()
        with capture(self.monitor.layers, look=False) as seen:  # one pass gives both
            at_probe = evaluate(self.model, [(x, y)], self.task)
        then = {"epoch": when.epoch, "iteration": when.iteration}
        record_activations(self.run, then, seen.means())
        if measure and when.iteration in self.measured:
            self.monitor.step = when.iteration
            measured = self.monitor.measure(x, targets=self.task.target(x, y))
            record_path(self.run, then, measured, self.preset.dampings)
        if not x.is_cpu:
            torch.accelerator.synchronize(x.device)  # else queued work would not be counted
        spent = time.perf_counter() - start
        at_test = evaluate(self.model, self.source.test(self.preset.tested), self.task)
        scores = {"probe_loss": at_probe.loss, "probe_error": 100 * at_probe.error}
        scores |= {"test_loss": at_test.loss, "test_error": 100 * at_test.error}
        scores |= {"test_top5_error": 100 * at_test.top5_error}
        self.run.append("training", {**_columns(when), "train_loss": loss, **scores})
        if when.iteration == self._steps:
            self.run.append("finished", _columns(when))
        return spent

    def state(self) -> dict[str, Any]:
        """Return what is needed to resume the record."""
        rows = {table: self.run.count(table) for table in TABLES}
        return {"rows": rows, "monitor": self.monitor.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`: the record loses the rows that came after it.

        Raises:
            DamagedDataError: It has fewer rows than there were.
        """
        for table, rows in state["rows"].items():
            if (found := self.run.count(table)) < rows:
                raise DamagedDataError(
                    f"{self.run.folder} has {found} of the {rows} rows of {table!r} that the "
                    "checkpoint counts: bring back a copy of the record, or begin anew in another "
                    "folder"
                )
        self.monitor.load_state_dict(state["monitor"])
        for table, rows in state["rows"].items():
            self.run.truncate(table, rows)

    def clear(self) -> None:
        """Drop all rows that the record has."""
        for table in self.run.tables:
            self.run.truncate(table, 0)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self.monitor.detach()
        self.run.close()


class Watches:
    """The watches of an ensemble's networks, each with a record of its own.

    Args:
        preset: What is trained.
        networks: Each member's network.
        source: Has the fixed sets that they are evaluated on.
        folder: Parent of all records.
        computed: How, for the records' configurations.
        resume: Continue the records, if there are any.
    """

    def __init__(
        self,
        preset: Preset,
        networks: Mapping[Member, nn.Module],
        source: Source,
        folder: Path,
        *,
        computed: Mapping[str, Any],
        resume: bool = False,
    ) -> None:
        for member in () if resume else networks:
            require_new(folder / member.name)  # all of them, before the first is made
        with ExitStack() as opened:
            options: Any = {"computed": computed, "resume": resume}
            self.each = [
                opened.enter_context(Watch(preset, member, model, source, folder, **options))
                for member, model in networks.items()
            ]
            self._opened = opened.pop_all()

    def record(self, when: Moment, losses: Iterable[float], diverged: Iterable[bool]) -> float:
        """Record an epoch of all; return how many seconds the Monitors' part took."""
        spent = 0.0
        for watch, loss, lost in zip(self.each, losses, diverged, strict=False):
            now = when._replace(monitoring=when.monitoring + spent)
            spent += watch.record(now, loss, measure=not lost)
        return spent

    def state(self) -> list[dict[str, Any]]:
        """Return what is needed to resume the records."""
        return [watch.state() for watch in self.each]

    def load(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Go on from `states`: the records lose the rows that came after it."""
        for watch, state in zip(self.each, states, strict=True):
            watch.load(state)

    def clear(self) -> None:
        """Drop all rows that the records have."""
        for watch in self.each:
            watch.clear()

    def close(self) -> None:
        """Write what was recorded; safe to call twice."""
        self._opened.close()


def _hidden(name: str, module: nn.Module) -> bool:
    """Say whether this is a layer of units that are observed: all but the output."""
    outputs = {"output", "companions"} & set(name.split("."))
    return isinstance(module, nn.Linear | nn.Conv2d) and not outputs


def _columns(when: Moment) -> dict[str, Any]:
    columns: dict[str, Any] = when._asdict()
    return columns | {"epoch": [when.epoch]}  # a list: one row


def measured_epochs(epochs: int, measurements: int) -> list[int]:
    """Space epochs evenly on a logarithmic scale, from before training to its end."""
    spaced = np.geomspace(epochs, 1, measurements - 1).round().astype(int)
    return sorted({0, *spaced.tolist()})


def record_activations(
    record: Run, when: Mapping[str, int], measured: Mapping[str, UnitMeans]
) -> None:
    """Record mean and variance of every hidden unit's output."""
    for layer, means in measured.items():
        columns = {"unit": torch.arange(len(means.mean)), "mean": means.mean, "var": means.var}
        record.append("activations", {**when, "layer": layer, **columns})


def record_path(
    record: Run,
    when: Mapping[str, int],
    measured: Mapping[str, UnitStatistics],
    dampings: Sequence[float],
) -> None:
    """Record what depends on the damping at each damping, beside what does not."""
    for layer, at_default in measured.items():
        for damping in dampings:
            m = at_default if damping == at_default.damping else at_default.damped(damping)
            columns = {
                "unit": m.units,
                "k": m.k,
                "sc": m.s * m.c,
                "corrected_mean_norm": m.corrected_mean.norm(dim=1),
                "cosine": m.cosine,
                "damping_share": m.damping_share,
                "bias_shift_share_natural": m.bias_shift_share_natural,
                "bias_shift_share_gradient": m.bias_shift_share_gradient,
                "mean_share": m.mean_share,
                "n_eff": m.n_eff,
                "dead": m.dead,
            }
            record.append("path", {**when, "layer": layer, "damping": damping, **columns})
