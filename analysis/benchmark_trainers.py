"""What benchmarks of trainings share: options, made-up data, timing, and rows of rates."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Literal

import torch
from benchmark_results import Result, judged
from benchmark_timing import device_clock

from unitfisher.experiments import Dataset
from unitfisher.experiments.photographs import PhotographSets
from unitfisher.experiments.presets import Preset
from unitfisher.experiments.trainer import Trainer

MNIST, CIFAR = (60_000, 784), (2_000, 3, 32, 32)


@dataclass(frozen=True)
class Config:
    """Time the trainings, on data that are made up."""

    device: str = "cpu"
    """Where to train, as torch names it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of products in training."""
    compile: bool = False
    """Train through torch.compile."""
    seconds: float = 15.0
    """How long the ensemble and its members take turns."""
    rounds: int = 3
    """Rounds of everything else."""
    photographs: Path | None = None
    """Folder with train and val; default: made-up photographs."""
    network: str = "torchvision:resnet18"
    """Network to train on photographs; the paper's is imagenet15."""
    crop: int = 96
    """Height and width of the photographs' crops, in pixels; the paper's are 224."""
    batch: int = 16
    """Photographs in a batch."""
    cifar_batch: int = 100
    """Images in a batch for the network of 11 layers."""
    shares: tuple[str, ...] = ("mnist", "mnist-autoencoder", "cifar100-11")
    """Presets whose Monitors' share of the time is estimated."""
    out: Path | None = None
    """Folder of table and JSON; default runs/benchmark-training-<device>."""

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / f"benchmark-training-{self.device}"


@contextmanager
def opened(
    preset: Preset, data: Dataset | PhotographSets, config: Config, *, workers: int = 0
) -> Iterator[Trainer]:
    with (
        tempfile.TemporaryDirectory() as folder,
        Trainer(
            preset,
            preset.members,
            data,
            Path(folder),
            precision=config.precision,
            compiled=config.compile,
            workers=workers,
        ) as trainer,
    ):
        yield trainer


def random_data(shape: Sequence[int], classes: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(*shape, generator=generator)
    y = torch.arange(len(x)) % classes
    return Dataset(x, y, x[:10_000], y[:10_000])


def seconds_of(run: Callable[[], object], rounds: int) -> list[float]:
    """Time single calls, after two that are not timed."""
    run(), run()
    seconds = []
    for _ in range(rounds):
        start = device_clock()
        run()
        seconds.append(device_clock() - start)
    return seconds


def rated(
    key: str, title: str, case: str, rates: Sequence[float], unit: str, bar: float | None = None
) -> Result:
    low, middle, high = quantiles(rates, n=4, method="inclusive")
    return Result(
        key,
        title,
        case,
        bar,
        None,
        unit,
        judged(middle, bar, more=True),
        value=middle,
        low=low,
        high=high,
        ms=1e3 / middle,
        rounds=len(rates),
    )
