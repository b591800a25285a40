"""Rows of photographs: read in several ways, shown to a network, and both together.

DALI is a peer to be measured where it is installed (``pip install nvidia-dali-cuda130``); the
trainings do not use it.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple

import torch
from benchmark_memory import taken
from benchmark_results import Result
from benchmark_trainers import Config, opened, rated
from PIL import Image

from unitfisher.experiments.images import Batch
from unitfisher.experiments.photographs import PhotographSets, load_photographs
from unitfisher.experiments.presets import PRESETS
from unitfisher.experiments.streams import Stream
from unitfisher.experiments.trainer import Trainer
from unitfisher.experiments.watching import Moment

MADE_UP, SIZE = 128, (500, 375)  # about the average size in ImageNet
AHEAD = 6  # batches read before the clock starts, to use up what workers have prefetched
BATCHES = 6  # timed in one round


class Album(NamedTuple):
    """Photographs to be read in batches."""

    sets: PhotographSets
    train: Path
    size: int


class Reader(NamedTuple):
    """A way to read photographs, as an endless iterator of batches."""

    title: str
    batches: Callable[[Album], Iterator[object]]


def ours(workers: int) -> Callable[[Album], Iterator[object]]:
    def batches(album: Album) -> Iterator[object]:
        stream = Stream(album.sets.train, album.size, seed=0, workers=workers)
        while True:
            yield stream.next()

    return batches


def dali(album: Album) -> Iterator[object]:
    """Decode, resize, crop and mirror at random, in as many threads as torch has."""
    from nvidia.dali import fn, pipeline_def, types

    device = album.sets.train.mean.device.type
    seen, side = album.sets.train.seen, album.sets.train.files.side

    @pipeline_def(batch_size=album.size, num_threads=torch.get_num_threads(), seed=0)
    def pipeline():  # type: ignore[no-untyped-def]
        jpegs, labels = fn.readers.file(file_root=str(album.train), random_shuffle=True)
        mixed = "mixed" if device == "cuda" else "cpu"
        images = fn.decoders.image(jpegs, device=mixed, output_type=types.RGB)
        images = fn.resize(images, resize_x=side, resize_y=side)
        return fn.crop_mirror_normalize(
            images,
            crop=(seen, seen),
            crop_pos_x=fn.random.uniform(range=(0.0, 1.0)),
            crop_pos_y=fn.random.uniform(range=(0.0, 1.0)),
            mirror=fn.random.coin_flip(),
            dtype=types.FLOAT,
        ), labels

    ready = pipeline(device_id=0 if device == "cuda" else None)
    ready.build()
    while True:
        yield ready.run()


READERS: Final = MappingProxyType(
    {
        "here": Reader("in the training's own process", ours(0)),
        "workers": Reader("2 workers", ours(2)),
        "dali": Reader("NVIDIA DALI", dali),
    }
)


def sustained(batches: Iterator[object], size: int, rounds: int) -> list[float]:
    """Images per second, round by round, once prefetched batches are used up."""
    for _ in range(AHEAD):
        next(batches)
    rates = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(BATCHES):
            next(batches)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        rates.append(size * BATCHES / (time.perf_counter() - start))
    return rates


def made_up(folder: Path) -> Path:
    """Write smooth random photographs of two classes."""
    generator = torch.Generator().manual_seed(0)
    for i in range(MADE_UP):
        coarse = torch.randint(256, (30, 40, 3), generator=generator, dtype=torch.uint8)
        path = folder / ("val" if i % 8 == 0 else "train") / "ab"[i // 2 % 2] / f"{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse.numpy()).resize(SIZE).save(path, "JPEG", quality=90)
    return folder


def of_photographs(config: Config) -> list[Result]:
    """Images per second of loaders, of the network alone and of both; and memory."""
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
            weight_variance=1.0 if config.network == "imagenet15" else None,
            activations=("elu",),
            batch_size=config.batch,
        )
        with opened(preset, sets, config, workers=2) as trainer:
            together = sustained(iter(trainer.step, object()), config.batch, config.rounds)
            x, y = trainer.source.next()
            # the same batch again and again, so that nothing is read
            trainer.source.next = lambda: Batch(x, y)  # type: ignore[method-assign]
            alone = sustained(iter(trainer.step, object()), config.batch, config.rounds)
            (step, _), measurement = taken(trainer.step), of_measurement(trainer)
    for name, rates in {"alone": alone, "read by 2 workers": together}.items():
        key = f"photographs/{name.split()[0]}"
        results.append(rated(key, f"training of {config.network}, {name}", case, rates, "images/s"))
    probed = f"{config.crop}×{config.crop}, n = {preset.probe}"
    for name, on, size in (("a training step", case, step), ("a measurement", probed, measurement)):
        key, title = f"photographs/{name.split()[-1]}", f"memory of {name} of {config.network}"
        results.append(Result(key, title, on, None, None, "GiB", "", size / 2**30))
    return results


def of_measurement(trainer: Trainer) -> int:
    """Bytes needed to measure on the probe set, evaluations included."""
    trainer.ensemble.eval()
    watch = trainer.watches.each[-1]
    moment = Moment(0, sorted(watch.measured)[1], 0.0, 0.0)
    held, _ = taken(partial(watch.record, moment, 1.0))
    return held
