"""ImageNet-style folders of photographs: workers decode and resize them, and hand over bytes."""

import hashlib
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.data import DataLoader

from unitfisher.experiments.data import DataNotFoundError
from unitfisher.experiments.images import SIDE, Batch, Files, kept

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder

SEEN: Final = 224  # pixels; the default side of a crop
VALIDATION_CASES: Final = 5_000
SUBSET_SEED: Final = 0
MEAN_BATCH: Final = 64
COMPARED_SIZES: Final = 1_000  # files, at most, whose sizes enter the checksum of a cached mean


def _deaf(_: int) -> None:
    """Ignore Ctrl-C in a worker: the main process gets it too, and may need more batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass(frozen=True)
class Photographs:
    """Photographs with pixels in [0, 1], less the mean of the training set, pixel by pixel."""

    files: Files
    mean: Float[Tensor, "c h w"]
    seen: int = SEEN

    def __len__(self) -> int:
        return len(self.files)

    def to(self, device: torch.device | str) -> "Photographs":
        """Deliver batches on this device from now on."""
        return replace(self, mean=self.mean.to(device))

    def subset(self, cases: Int64[Tensor, " n"]) -> "Photographs":
        return replace(self, files=self.files.subset(cases))

    def loader(self, batches: Iterable[Tensor], workers: int) -> DataLoader[Batch]:
        """Read files by their numbers, batch by batch, whole and as bytes."""
        return DataLoader(
            self.files,
            batch_sampler=map(Tensor.tolist, batches),
            num_workers=workers,
            pin_memory=self.mean.is_cuda,
            generator=torch.Generator(),  # the global one is not to be drawn from
            worker_init_fn=_deaf,
        )

    def centred(self, read: Batch) -> Batch:
        """Bring what was read onto the device, and subtract the mean."""
        device = self.mean.device
        x = read.x.to(device, non_blocking=True).float().div_(255).sub_(self.mean)
        return Batch(x, read.y.to(device, non_blocking=True))

    def in_order(self, batch_size: int, *, workers: int = 0) -> Iterator[Batch]:
        """Run once through all centre crops, in the order of the files.

        Raises:
            DamagedDataError: A file cannot be read as an image.
        """
        edge = (self.files.side - self.seen) // 2
        seen = slice(edge, edge + self.seen)
        batches = torch.arange(len(self)).split(batch_size)
        for read in self.loader(batches, workers):
            x, y = self.centred(read)
            yield Batch(x[..., seen, seen], y)


class PhotographSets(NamedTuple):
    """Training and validation photographs."""

    train: Photographs
    validation: Photographs

    def to(self, device: torch.device | str) -> "PhotographSets":
        return PhotographSets(self.train.to(device), self.validation.to(device))


def load_photographs(
    root: Path | str,
    cache: Path,
    *,
    side: int = SIDE,
    seen: int = SEEN,
    cases: int = VALIDATION_CASES,
    workers: int = 0,
) -> PhotographSets:
    """Find the photographs in ``root/train`` and ``root/val``, a folder for each class.

    Args:
        root: As torchvision lays ImageNet out.
        cache: Folder for the mean image, made when absent. The mean is computed once, which
            reads all training images, and kept for these very files.
        side: Pixels of height and width that every photograph is resized to.
        seen: Pixels of a crop's height and width.
        cases: How many validation images to use: a fixed random subset, in random order, so that
            the first of them are of all classes; all if there are fewer.
        workers: Processes that compute the mean.

    Raises:
        DamagedDataError: A file cannot be read as an image.
        DataNotFoundError: One of the folders is absent, or holds no images.
        ValueError: There are validation images of a class that has no training images, or crops
            are larger than the photographs.
    """
    if not 0 < seen <= side:
        raise ValueError(f"crops of {seen} pixels do not fit photographs of {side}")
    root = Path(root).expanduser()
    train, validation = _found(root / "train"), _found(root / "val")
    unknown = sorted(validation.class_to_idx.keys() - train.class_to_idx.keys())
    if unknown:
        raise ValueError(f"{validation.root} has classes that {train.root} has not: {unknown}")
    files = _files(train, train, side)
    path = cache / f"mean-{_checksum(files)}.pt"
    mean = kept(path, lambda: {"mean": _mean(files, workers)})["mean"]
    drawn = torch.randperm(len(validation), generator=torch.Generator().manual_seed(SUBSET_SEED))
    subset = _files(validation, train, side).subset(drawn[:cases])
    return PhotographSets(Photographs(files, mean, seen), Photographs(subset, mean, seen))


def _found(folder: Path) -> "ImageFolder":
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(str(folder))
    except OSError as error:
        raise DataNotFoundError(
            f"{folder} holds no images ({error}); put a folder of images for each class there"
        ) from error


def _files(found: "ImageFolder", training: "ImageFolder", side: int) -> Files:
    numbers = [training.class_to_idx[name] for name in found.classes]
    names = [path.removeprefix(found.root + os.sep) for path, _ in found.samples]
    return Files(Path(found.root), names, [numbers[label] for label in found.targets], side=side)


def _mean(files: Files, workers: int) -> Float[Tensor, "3 h w"]:
    total = torch.zeros(3, files.side, files.side, dtype=torch.float64)
    unmoved = Photographs(files, torch.zeros(total.shape))
    batches = torch.arange(len(files)).split(MEAN_BATCH)
    for read in unmoved.loader(batches, workers):
        total += read.x.sum(0, dtype=torch.float64)
    return (total / (255 * len(files))).float()


def _checksum(files: Files) -> str:
    """Identify files by all their names, and the sizes of some."""
    form = repr((files.side, files.names.dtype))
    checksum = hashlib.sha256(form.encode() + files.names.tobytes())
    for name in files.names[:: 1 + len(files) // COMPARED_SIZES]:
        checksum.update(str((files.folder / os.fsdecode(name)).stat().st_size).encode() + b" ")
    return checksum.hexdigest()[:16]
