"""How fast do the trainings go, and what do their Monitors take of the time?

    python analysis/benchmark_training.py

times an ensemble against its members one after the other, the loaders of photographs, the
networks alone and both together, and the Monitors' share of whole trainings at their schedules.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from benchmark_photographs import READERS, Album, made_up, sustained
from benchmark_report import table
from benchmark_results import Result
from benchmark_timing import PLAIN, Candidate, Effort, device_clock, faster, interleave
from torch import Tensor

from unitfisher.experiments import Dataset, mlp
from unitfisher.experiments.allocation import keep_freed_memory
from unitfisher.experiments.images import Batch
from unitfisher.experiments.photographs import load_photographs
from unitfisher.experiments.presets import PRESETS, Preset
from unitfisher.experiments.trainer import Trainer
from unitfisher.experiments.watching import Moment
from unitfisher.provenance import plain, provenance

MNIST, CIFAR = (60_000, 784), (2_000, 3, 32, 32)


@dataclass(frozen=True)
class Config:
    """Time the trainings, on random data but for photographs."""

    device: str = "cpu"
    """Where to train, as torch names it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of products in training."""
    compile: bool = False
    """Train through torch.compile."""
    seconds: float = 15.0
    """How long the ensemble and its members take turns."""
    rounds: int = 3
    """Of everything else."""
    photographs: Path | None = None
    """Folder with train and val; default: some that are made up."""
    network: str = "torchvision:resnet18"
    """That photographs are shown to; the paper's is imagenet15."""
    crop: int = 96
    """Pixels of their height and width that are seen; the paper's are 224."""
    batch: int = 16
    """Photographs at a time."""
    cifar_batch: int = 100
    """Images at a time for the network of 11 layers."""
    shares: tuple[str, ...] = ("mnist", "cifar100-11")
    """Presets whose Monitors' share of the time is estimated."""
    out: Path | None = None
    """Folder of table and JSON; default runs/benchmark-training-<device>."""

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / f"benchmark-training-{self.device}"


def main(config: Config) -> None:
    """Measure, and save after each group of rows."""
    start, results = time.perf_counter(), []
    for measure in (of_ensemble, of_cifar, of_photographs, of_shares):
        results += measure(config)
        save(results, config, time.perf_counter() - start)
    print((config.folder / "benchmark.md").read_text())


def of_ensemble(config: Config) -> list[Result]:
    """15 networks of MNIST, a step of all: as one ensemble, and one after the other."""
    preset = replace(PRESETS["mnist"], activations=("relu", "lrelu", "elu"))
    data = random_data(MNIST, 10).to(config.device)
    with opened(preset, data, config) as trainer:
        ways = {PLAIN: one_after_the_other(preset, data), "ensemble": trainer.step}
        ready = {name: Candidate.warmed(run) for name, run in ways.items()}
        ratio = faster(interleave(ready, Effort(config.seconds)), "ensemble", PLAIN)
    bar = 2.0 if config.device == "cpu" else 30.0
    verdict = "disturbed" if ratio.disturbed else "met" if ratio.value >= bar else "missed"
    spread = {"value": ratio.value, "low": ratio.low, "high": ratio.high, "rounds": ratio.rounds}
    times = {"ms": ratio.ms, "plain_ms": ratio.of_ms, "discarded": ratio.discarded}
    title = "15 networks as an ensemble against one after the other, a step"
    names = "ensemble", title, "MNIST, n = 64", bar, None, "× faster"
    return [Result(*names, verdict, **spread, **times)]


def one_after_the_other(preset: Preset, data: Dataset) -> Callable[[], None]:
    """Return a step of each member as it would be written for a single network."""
    networks = [
        mlp([784, *preset.hidden, 10], m.activation, torch.Generator().manual_seed(m.seed))
        for m in preset.members
    ]
    networks = [network.to(data.train_x.device) for network in networks]
    parameters: list[list[Tensor]] = [list(network.parameters()) for network in networks]

    def step() -> None:
        for network, own in zip(networks, parameters, strict=True):
            cases = torch.randint(len(data.train_x), (preset.batch_size,)).to(data.train_x.device)
            loss = F.cross_entropy(network(data.train_x[cases]), data.train_y[cases])
            gradients = torch.autograd.grad(loss, own)
            with torch.no_grad():
                torch._foreach_add_(own, gradients, alpha=-0.01)

    return step


def of_cifar(config: Config) -> list[Result]:
    """Iterations a second of the network of 11 layers."""
    preset = replace(PRESETS["cifar100-11"], activations=("elu",), batch_size=config.cifar_batch)
    with opened(preset, random_data(CIFAR, 100).to(config.device), config) as trainer:
        rates = [1 / t for t in timed(trainer.step, config.rounds)]
    bar = None if config.device == "cpu" else 400.0
    case = f"CIFAR, n = {config.cifar_batch}"
    return [rated("cifar/steps", "training of the 11-net", case, rates, "iterations/s", bar)]


def of_photographs(config: Config) -> list[Result]:
    """Images a second: of loaders, of the network alone, and of both."""
    results, case = [], f"{config.crop}×{config.crop}, n = {config.batch}"
    with tempfile.TemporaryDirectory() as made:
        root = config.photographs or made_up(Path(made))
        sets = load_photographs(root, Path(made), seen=config.crop).to(config.device)
        album = Album(sets, root / "train", config.batch)
        for name, reader in READERS.items():
            key, title = f"photographs/{name}", f"reading photographs: {reader.title}"
            try:
                rates = sustained(reader.batches(album), config.batch, config.rounds)
            except ImportError as error:
                names = key, title, case, None, None, "images/s"
                results.append(Result(*names, "failed", note=str(error)))
            else:
                results.append(rated(key, title, case, rates, "images/s"))
        preset = replace(
            PRESETS["imagenet-15"],
            network=config.network,
            weight_variance=1.0 if config.network == "imagenet15" else 2.0,
            activations=("elu",),
            batch_size=config.batch,
            probe=2,
        )
        with opened(preset, sets, config, workers=2) as trainer:
            together = sustained(iter(trainer.step, object()), config.batch, config.rounds)
            x, y = trainer.source.next()
            trainer.source.next = lambda: Batch(x, y)  # type: ignore[method-assign]
            alone = sustained(iter(trainer.step, object()), config.batch, config.rounds)
    for name, rates in {"alone": alone, "read by 2 workers": together}.items():
        key = f"photographs/{name.split()[0]}"
        results.append(rated(key, f"training of {config.network}, {name}", case, rates, "images/s"))
    return results


def of_shares(config: Config) -> list[Result]:
    """Share of a whole training's time that the Monitors take, from steps and measurements."""
    return [of_share(name, config) for name in config.shares]


def of_share(name: str, config: Config) -> Result:
    preset = PRESETS[name]
    images = preset.network != "mlp"
    if images:  # members of convolutional networks take as long as each would alone
        preset = replace(preset, activations=preset.activations[-1:])
    preset = replace(preset, rates=preset.rates[:1])
    data = random_data(CIFAR if images else MNIST, 100 if images else 10).to(config.device)
    with opened(preset, data, config) as t:
        step = median(timed(t.step, config.rounds))
        watch, evaluations = t.watches[-1], t.iterations // t.every + 1
        measured = sorted(watch._measured)

        def recorded(iteration: int) -> tuple[float, float]:
            start = device_clock()
            of_monitor = watch.record(Moment(0, iteration, 0.0, 0.0), 1.0)
            return device_clock() - start, of_monitor

        t.ensemble.eval()
        recorded(measured[1])
        plain_record = [recorded(1) for _ in range(config.rounds)]
        with_fisher = [recorded(measured[1]) for _ in range(max(2, config.rounds // 2))]
        members = len(t.members)
    whole, passes = (median(column) for column in zip(*plain_record, strict=True))
    fishers = (median(of for _, of in with_fisher) - passes) * len(measured)
    total = t.iterations * step + members * (evaluations * whole + fishers)
    share = members * (evaluations * passes + fishers) / total
    note = f"{members} networks, {t.iterations} steps in {total / 3600:.3g} h; Fishers "
    note += f"{members * fishers / total:.2%}, the rest passes over the probe set, loss included"
    verdict = "met" if share <= 0.05 else "missed"
    title = f"Monitors in a training of {name}, share of the time"
    return Result(
        f"share/{name}",
        title,
        f"n = {preset.batch_size}",
        5.0,
        None,
        "%",
        verdict,
        value=100 * share,
        note=note,
        rounds=config.rounds,
    )


@contextmanager
def opened(preset: Preset, data: object, config: Config, *, workers: int = 0) -> Iterator[Trainer]:
    with (
        tempfile.TemporaryDirectory() as folder,
        Trainer(
            preset,
            preset.members,
            data,  # type: ignore[arg-type]
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


def timed(run: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of single calls, after two."""
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
    verdict = "" if bar is None else "met" if middle >= bar else "missed"
    return Result(
        key,
        title,
        case,
        bar,
        None,
        unit,
        verdict,
        value=middle,
        low=low,
        high=high,
        ms=1e3 / middle,
        rounds=len(rates),
    )


def save(results: Sequence[Result], config: Config, seconds: float) -> None:
    """Write benchmark.json and benchmark.md."""
    config.folder.mkdir(parents=True, exist_ok=True)
    record = provenance({}) | {"config": plain(config), "seconds": round(seconds, 1)}
    record["rows"] = [plain(asdict(result)) for result in results]
    (config.folder / "benchmark.json").write_text(
        json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    )
    sentence = (
        f"{record['device']}; torch {record['versions']['torch']}; {record['created']}, "
        f"{seconds:.0f} s. Medians with quartiles over rounds; random data but for photographs; "
        f"{config.precision}{', compiled' if config.compile else ''}."
    )
    (config.folder / "benchmark.md").write_text(f"{sentence}\n\n{table(results)}")


if __name__ == "__main__":
    keep_freed_memory()  # as train.py does
    sys.exit(main(tyro.cli(Config)))
