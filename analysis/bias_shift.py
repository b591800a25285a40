"""Do ELUs do what their paper claims? Measured on real digits, in about a minute.

    python analysis/bias_shift.py

trains the paper's 8×128 networks with ReLU, leaky ReLU, shifted ReLU and ELU, the same initial
weights and batches per seed, and watches bias shift and the unit natural gradient meanwhile.
Feeds the mean-activation figure and its companions in ``<out>/figures``.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from interrupts import INTERRUPTED
from jobs import Job, Progress, RunConfig, state
from tqdm import tqdm
from workers import run_all

from unitfisher.experiments import ActivationName, DatasetName, load, scripts
from unitfisher.experiments.options import (
    COUNT,
    MEASUREMENTS,
    NATURAL,
    require_device,
    require_ranges,
    require_several,
)

EPOCHS = {"digits": 60, "mnist": 10, "fashion-mnist": 10}
PROBE = {"digits": 1024, "mnist": 4096, "fashion-mnist": 4096}  # cases, several per input
PAPERS: tuple[ActivationName, ...] = ("relu", "lrelu", "srelu", "elu")

GUIDE = """\
Trains 8×128 networks that differ in nothing but the activation function, watches the unit
Fisher of every layer meanwhile, and ends with a table, the ELU paper's claims one by one, and
figures. What the rows of the table mean, for units whose layer sees activations a with mean
E(a), and for E_q, the same weighted by the squared error signal of a unit:

  mean activation      median over all hidden units of their average output
  mean share           |E a|² / E|a|²: how much of what a layer sees is just its mean
  bias-shift share     |E(a)ᵀv + v0| / (|(E a; 1)| |(v; v0)|) of an update (v; v0), 0 to 1: the
                       part that moves a unit's average net input and nothing else
  k, s·c               the correction factors of the unit natural gradient: the incoming mean is
                       corrected to E(a) - (1 + k) E_q(a), the bias step scaled by s; 0 and 1
                       where nothing needs correcting
  cosine               between gradient and unit natural gradient
  n_eff                how many cases carry a unit's Fisher. Where it is below the layer's
                       number of inputs, k, s·c and cosine are made by the damping, not the data
  damping              of the weight block, in units of trace(A) / d
  damping share        how much of s the damping makes
  dead units           receive no error on any case of the probe set

Ctrl-C keeps what is finished; the same command goes on from there.
"""


CONFIG_RANGES = {
    **dict.fromkeys(("epochs", "layers", "probe", "units", "processes"), COUNT),
    **dict.fromkeys(("seeds", "dampings"), NATURAL),
    "measurements": MEASUREMENTS,
}


@dataclass(frozen=True)
class Config:
    """Measure what the ELU paper claims."""

    dataset: DatasetName = "digits"
    """Digits ship with scikit-learn; the others are read from, or downloaded to, data-root."""
    data_root: Path | None = None
    """Folder of MNIST or Fashion-MNIST as torchvision lays it out (or set UNITFISHER_DATA)."""
    activations: Annotated[tuple[ActivationName, ...], tyro.conf.arg(metavar="NAME ...")] = PAPERS
    """Which to compare: relu, lrelu (slope 0.1), srelu (max(-1, x)), elu, prelu, gelu, ..."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run per activation and seed; a seed decides initial weights and batches."""
    epochs: int | None = None
    """Passes over the training set; default 60 on digits, 10 on the others."""
    layers: int = 8
    """Hidden layers, of 128 units each."""
    probe: int | None = None
    """Training cases in the fixed set that is measured on; default 1024 on digits, else 4096."""
    units: int = 32
    """Units per layer whose Fisher is measured, drawn once; mean activations are of all."""
    measurements: int = 8
    """How many times to measure on the probe set, at epochs evenly spaced on a log scale."""
    dampings: tuple[float, ...] = (1e-1, 1e-2, 1e-3)
    """Dampings at which k, s·c and the angles are reported."""
    device: str = "cpu"
    """Where to train and measure, as torch names it: cpu, cuda, ..."""
    processes: int | None = None
    """Runs at the same time; default one per core."""
    out: Path | None = None
    """Folder of records, tables and figures; default runs/bias-shift-<dataset>."""

    def __post_init__(self) -> None:
        options = asdict(self)
        require_several(options, "activations", "seeds", "dampings")
        require_ranges(options, CONFIG_RANGES)
        require_device(self.device)

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / f"bias-shift-{self.dataset}"


def main(config: Config) -> int:
    """Make the runs that are missing and report on all; return the exit code."""
    start = time.perf_counter()
    jobs = plan(config)
    finished = [job for job in jobs if state(job) == "finished"]
    todo = [job for job in jobs if job not in finished]
    if finished:
        print(f"{len(finished)} of {len(jobs)} runs are finished already in {config.folder}")
    if todo:
        load(config.dataset, config.data_root)  # fails, or downloads, once and early
    try:
        train_all(todo, config)
    except KeyboardInterrupt:
        finished = [job for job in jobs if state(job) == "finished"]
        print(f"\nInterrupted: {len(finished)} of {len(jobs)} runs are finished and kept in")
        print(f"{config.folder}; the same command goes on from there.\n")
    else:
        finished = jobs
    if finished:
        from report import report  # here: the processes that train need not wait for its imports

        report(finished, config.folder, time.perf_counter() - start)
    return 0 if finished == jobs else INTERRUPTED


def plan(config: Config) -> list[Job]:
    """List the runs, one per seed and activation."""
    return [
        Job(
            RunConfig(
                dataset=config.dataset,
                activation=activation,
                seed=seed,
                epochs=config.epochs or EPOCHS[config.dataset],
                layers=config.layers,
                probe=config.probe or PROBE[config.dataset],
                units=config.units,
                measurements=config.measurements,
                dampings=config.dampings,
                device=config.device,
            ),
            config.data_root,
            config.folder / f"{config.dataset}-{activation}-s{seed}",
        )
        for seed in config.seeds
        for activation in config.activations
    ]


def train_all(jobs: Sequence[Job], config: Config) -> None:
    """Make the runs that are missing, with one progress bar for all."""
    epochs = sum(job.config.epochs for job in jobs)
    with tqdm(total=epochs, unit="epoch", disable=not jobs, smoothing=0.05) as bar:

        def tell(progress: Progress) -> None:
            bar.set_postfix_str(
                f"{progress.activation} seed {progress.seed}, loss {progress.loss:.3f}",
                refresh=False,
            )
            bar.update(progress.epoch > 0)

        run_all(jobs, config.processes or cores(), tell)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    scripts.run(lambda: main(tyro.cli(Config, description=GUIDE)), Config)
