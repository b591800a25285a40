"""Ways to read photographs, for benchmark_training.py: ours with and without workers, and DALI's.

DALI is a peer to be measured where it is installed (``pip install nvidia-dali-cuda130``); the
trainings do not use it.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple

import torch
from PIL import Image

from unitfisher.experiments.photographs import PhotographSets
from unitfisher.experiments.streams import Stream

MADE_UP, SIZE = 128, (500, 375)  # as large as ImageNet's are on average, about
AHEAD, BATCHES = 6, 6  # read before the clock starts: what workers had in store; and timed


class Album(NamedTuple):
    """Photographs to be read in batches."""

    sets: PhotographSets
    train: Path
    size: int


class Reader(NamedTuple):
    """A way to read them: without end."""

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
    """Images a second, round by round, after what was in store is used up."""
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
