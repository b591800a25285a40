"""One run of bias_shift.py: train a network, measure it meanwhile, keep the record."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn

import unitfisher
from unitfisher import Run
from unitfisher.experiments import (
    ActivationName,
    Dataset,
    DatasetName,
    evaluate,
    load,
    mlp,
    probe,
    train,
)
from unitfisher.experiments.sources import PROBE_SEED
from unitfisher.experiments.training import BATCH_SIZE
from unitfisher.experiments.watching import measured_epochs, record_activations, record_path
from unitfisher.provenance import differences, plain

WIDTH = 128

TABLES = ("activations", "training", "path", "finished")  # what a report reads of a run
LIVE = 12  # about how many training batches of a run are measured


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes; its folder holds no other run."""

    dataset: DatasetName
    activation: ActivationName
    seed: int
    epochs: int
    layers: int
    probe: int
    units: int
    measurements: int
    dampings: tuple[float, ...]
    device: str

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.activation}-s{self.seed}"


class Job(NamedTuple):
    """A run to be made, where its data are and where its record goes."""

    config: RunConfig
    data_root: Path | None
    folder: Path


class Progress(NamedTuple):
    """What a run reports after each epoch."""

    activation: str
    seed: int
    epoch: int
    loss: float


class RunMismatchError(ValueError):
    """A folder holds another run than the one that is asked for."""


Tell = Callable[[Progress], None]
Stopped = Callable[[], bool]


def state(job: Job) -> Literal["new", "unfinished", "finished"]:
    """Look at what a job's folder holds.

    Raises:
        RunMismatchError: A run of another configuration, or something that is no run.
    """
    if not job.folder.exists() or not any(job.folder.iterdir()):
        return "new"
    file = job.folder / "config.json"
    if not file.exists():
        raise RunMismatchError(f"{job.folder} holds files that are no run; choose another --out")
    found = json.loads(file.read_text())["config"]
    if changed := differences(found, plain(job.config)):
        raise RunMismatchError(
            f"{job.folder} holds another run: {'; '.join(changed)}. "
            "Choose another --out, or remove that folder"
        )
    if not any((job.folder / "finished").glob("part-*.parquet")):
        return "unfinished"
    missing = [table for table in TABLES if not (job.folder / table).is_dir()]
    if missing:
        raise RunMismatchError(
            f"{job.folder} holds a finished run without its tables {', '.join(missing)}, as "
            "recorded results do; choose another --out"
        )
    return "finished"


def run(job: Job, tell: Tell, stopped: Stopped = lambda: False) -> bool:
    """Train one network and record it; say whether it came to its end."""
    if state(job) == "unfinished":
        shutil.rmtree(job.folder)  # this very run, interrupted: it takes seconds to make again
    with _one_thread():
        return _run(job, tell, stopped)


def _run(job: Job, tell: Tell, stopped: Stopped) -> bool:
    c = job.config
    data = load(c.dataset, job.data_root).to(c.device)
    sizes = [data.inputs, *[WIDTH] * c.layers, data.classes]
    generator = torch.Generator().manual_seed(c.seed)
    model = mlp(sizes, c.activation, generator).to(c.device)
    start = time.perf_counter()
    with Run(job.folder, asdict(c)) as record:
        for progress in _recorded_training(c, model, data, generator, record):
            tell(progress)
            if stopped():
                return False
        seconds = time.perf_counter() - start
        record.append("finished", {"epoch": [c.epochs], "seconds": [seconds]})
    return True


@contextmanager
def _one_thread() -> Iterator[None]:
    """The other cores have runs of their own, and sums keep their order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _recorded_training(
    c: RunConfig,
    model: nn.Module,
    data: Dataset,
    generator: torch.Generator,
    record: Run,
) -> Iterator[Progress]:
    x, y = probe(data, c.probe, torch.Generator().manual_seed(PROBE_SEED))
    steps = -(-len(data.train_x) // BATCH_SIZE)
    every = steps * max(1, c.epochs // LIVE)
    to_measure = measured_epochs(c.epochs, c.measurements)
    default = c.dampings[-1]
    with unitfisher.Monitor(
        model, units=c.units, every=every, damping=default, record=record
    ) as monitor:
        for epoch in train(model, data, c.epochs, generator):
            outputs = unitfisher.activation_statistics(model, x, layers="hidden*")
            record_activations(record, {"epoch": epoch}, outputs)
            loss = _record_scores(record, epoch, model, data)
            if epoch in to_measure:
                measured = monitor.measure(x, targets=y)
                record_path(record, {"epoch": epoch}, measured, c.dampings)
            yield Progress(c.activation, c.seed, epoch, loss)


def _record_scores(record: Run, epoch: int, model: nn.Module, data: Dataset) -> float:
    on_train = evaluate(model, [(data.train_x, data.train_y)])
    on_test = evaluate(model, [(data.test_x, data.test_y)])
    columns = {"train_loss": on_train.loss, "train_error": 100 * on_train.error}
    columns |= {"test_loss": on_test.loss, "test_error": 100 * on_test.error}
    record.append("training", {"epoch": [epoch], **columns})
    return on_train.loss
