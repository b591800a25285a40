"""What is recorded of a network in training, on a fixed set of cases."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from unitfisher import Monitor, Run, UnitStatistics, activation_statistics
from unitfisher.experiments.data import Dataset, probe
from unitfisher.experiments.presets import Member, Preset
from unitfisher.experiments.tasks import TASKS
from unitfisher.experiments.training import evaluate

PROBE_SEED = 1  # the same probe set in every run
TABLES = ("training", "activations", "path", "finished")  # beside the Monitor's own


class Moment(NamedTuple):
    """When a network is looked at."""

    epoch: int
    iteration: int
    seconds: float  # of training all members, until then
    monitoring: float  # seconds that their Monitors took meanwhile


class Watch:
    """Records one network of a preset, epoch by epoch.

    Args:
        preset: What is trained.
        member: Which of its networks this is.
        model: The network.
        data: What it is trained and tested on.
        folder: Of all records; this one is named after the member.
        resume: Continue the record, if there is one.
    """

    def __init__(
        self,
        preset: Preset,
        member: Member,
        model: nn.Module,
        data: Dataset,
        folder: Path,
        *,
        resume: bool = False,
    ) -> None:
        self.preset, self.model, self.data = preset, model, data
        self.task = TASKS[preset.task]
        config = asdict(preset) | {"device": str(data.train_x.device)} | member._asdict()
        for several in ("activations", "rates", "seeds"):
            del config[several]
        self.run = Run(folder / member.name, config, resume=resume)
        self.monitor = Monitor(
            model,
            "hidden*",
            self.task.likelihood,
            fisher=preset.fisher,
            damping=preset.dampings[-1],
            units=preset.units,
            record=self.run,
        )
        x, y = probe(data, preset.probe, torch.Generator().manual_seed(PROBE_SEED))
        self._probe = x, self.task.target(x, y)
        self._test = data.test_x, self.task.target(data.test_x, data.test_y)
        self._measured = measured_epochs(preset.epochs, preset.measurements)

    def record(self, when: Moment, loss: float, *, measure: bool = True) -> float:
        """Record an epoch; return how many seconds the Monitor's part took.

        Args:
            when: The epoch that has ended; 0 before training.
            loss: Mean over the epoch's steps, as they were taken.
            measure: Measure Fishers too, if it is time: of finite networks.
        """
        at_probe = evaluate(self.model, *self._probe, task=self.task)
        at_test = evaluate(self.model, *self._test, task=self.task)
        scores = {"probe_loss": at_probe.loss, "probe_error": 100 * at_probe.error}
        scores |= {"test_loss": at_test.loss, "test_error": 100 * at_test.error}
        self.run.append("training", {**_columns(when), "train_loss": loss, **scores})
        start = time.perf_counter()
        record_activations(self.run, when.epoch, self.model, self._probe[0])
        if measure and when.epoch in self._measured:
            measured = self.monitor.measure(self._probe[0], targets=self._probe[1])
            record_path(self.run, when.epoch, measured, self.preset.dampings)
        spent = time.perf_counter() - start
        if when.epoch == self.preset.epochs:
            self.run.append("finished", _columns(when))
        return spent

    def state(self) -> dict[str, Any]:
        """Return what a record that is resumed goes on from."""
        rows = {table: self.run.count(table) for table in TABLES}
        return {"rows": rows, "monitor": self.monitor.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`: the record loses the rows that came after it."""
        self.monitor.load_state_dict(state["monitor"])
        for table, rows in state["rows"].items():
            self.run.truncate(table, rows)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self.monitor.detach()
        self.run.close()


def _columns(when: Moment) -> dict[str, Any]:
    columns: dict[str, Any] = when._asdict()
    return columns | {"epoch": [when.epoch]}  # a list: one row


def measured_epochs(epochs: int, measurements: int) -> list[int]:
    """Space epochs evenly on a logarithmic scale, from before training to its end."""
    spaced = np.geomspace(epochs, 1, measurements - 1).round().astype(int)
    return sorted({0, *spaced.tolist()})


def record_activations(record: Run, epoch: int, model: nn.Module, x: Tensor) -> None:
    """Record mean and variance of every hidden unit's output."""
    for layer, of in activation_statistics(model, x, layers="hidden*").items():
        columns = {"unit": torch.arange(len(of.mean)), "mean": of.mean, "var": of.var}
        record.append("activations", {"epoch": epoch, "layer": layer, **columns})


def record_path(
    record: Run, epoch: int, measured: Mapping[str, UnitStatistics], dampings: Sequence[float]
) -> None:
    """Record what depends on the damping at each damping, beside what does not."""
    for layer, at_default in measured.items():
        for damping in dampings:
            of = at_default if damping == at_default.damping else at_default.damped(damping)
            columns = {
                "unit": of.units,
                "k": of.k,
                "sc": of.s * of.c,
                "corrected_mean_norm": of.corrected_mean.norm(dim=1),
                "cosine": of.cosine,
                "damping_share": of.damping_share,
                "bias_shift_share_natural": of.bias_shift_share_natural,
                "bias_shift_share_gradient": of.bias_shift_share_gradient,
                "mean_share": of.mean_share,
                "n_eff": of.n_eff,
                "dead": of.dead,
            }
            record.append("path", {"epoch": epoch, "layer": layer, "damping": damping, **columns})
