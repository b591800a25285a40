"""Random crops of photographs, epoch after epoch, in an order that can be resumed.

Workers only decode: order and crops are drawn in the main process, from the seed and the epoch, and
cut on the device. So nothing depends on the number of workers.
"""

from collections.abc import Iterator
from itertools import tee
from typing import TypedDict

import torch
from jaxtyping import Int64
from torch import Tensor

from unitfisher.experiments.images import Batch, Crops, cropped, draw_crops
from unitfisher.experiments.photographs import Photographs
from unitfisher.experiments.ranks import ALONE, Ranks
from unitfisher.experiments.seeds import mixed


class StreamState(TypedDict):
    """Which stream this is, and its position."""

    seed: int
    cases: int
    batch_size: int
    epoch: int
    position: int


class Stream:
    """Batches of random crops, half of them mirrored, epoch after epoch without end.

    Args:
        photographs: On the device to deliver to.
        batch_size: The last batch of an epoch has what remains.
        seed: Decides, with the epoch, the order and the crop of every photograph.
        workers: Processes that read ahead, also into the next epoch.
        ranks: Which of the processes that share each batch this is: it reads no other's.
    """

    def __init__(
        self,
        photographs: Photographs,
        batch_size: int,
        seed: int,
        *,
        workers: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.photographs, self.batch_size, self.ranks = photographs, batch_size, ranks
        self.seed, self.workers = seed, workers
        self.epoch = self.position = 0  # of the next batch
        self._reading: Iterator[tuple[Batch, Crops]] | None = None

    def __len__(self) -> int:
        """Count the batches of an epoch."""
        return -(-len(self.photographs) // self.batch_size)

    def next(self) -> Batch:
        """Return the next batch; if reading it fails, it stays the next one.

        Raises:
            DamagedDataError: A file cannot be read as an image.
        """
        reading = self._start() if self._reading is None else self._reading
        self._reading = None  # set again below, if reading succeeds
        read, crops = next(reading)
        x, y = self.photographs.centred(read)
        batch = Batch(cropped(x, crops, (self.photographs.seen,) * 2), y)
        self._reading, self.position = reading, self.position + 1
        if self.position == len(self):
            self.epoch, self.position = self.epoch + 1, 0
        return batch

    def state(self) -> StreamState:
        """Return what the next batch and later ones depend on, whatever was prefetched."""
        return {
            "seed": self.seed,
            "cases": len(self.photographs),
            "batch_size": self.batch_size,
            "epoch": self.epoch,
            "position": self.position,
        }

    def load(self, state: StreamState) -> None:
        """Go on from `state`.

        Raises:
            ValueError: It is of other photographs, batches or seeds.
        """
        own = {**self.state(), "epoch": state["epoch"], "position": state["position"]}
        if own != state:
            raise ValueError(f"the stream to go on with is {state}, and does not fit {own}")
        self.close()
        self.epoch, self.position = state["epoch"], state["position"]

    def close(self) -> None:
        """Stop the workers; `next` starts new ones."""
        self._reading = None

    def _start(self) -> Iterator[tuple[Batch, Crops]]:
        # nothing in here refers to the stream: in a reference cycle, workers would outlive it
        spare = self.photographs.files.side - self.photographs.seen
        ahead, behind = tee(_draws(self.state(), spare, self.ranks))
        reading = self.photographs.loader((cases for cases, _ in ahead), self.workers)
        return zip(reading, (crops for _, crops in behind), strict=True)


def _draws(
    state: StreamState, spare: int, ranks: Ranks
) -> Iterator[tuple[Int64[Tensor, " b"], Crops]]:
    """Yield numbers and crops of all later batches; a crop depends on the number, not the order."""
    epoch, position = state["epoch"], state["position"]
    while True:
        generator = _generator(state["seed"], epoch)
        order = torch.randperm(state["cases"], generator=generator)
        crops = draw_crops(order.shape, spare, generator)
        for cases in map(ranks.share, order.split(state["batch_size"])[position:]):
            yield cases, crops.of(cases)
        epoch, position = epoch + 1, 0


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(mixed(seed, epoch))
