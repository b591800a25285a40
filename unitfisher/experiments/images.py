"""Images: CIFAR as whole tensors, files one by one; crops of them; statistics kept on disk."""

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.data
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from unitfisher.experiments.data import DamagedDataError, DataNotFoundError, Dataset
from unitfisher.table import write_atomically

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

PAD: Final = 4  # pixels on each side
SIDE: Final = 256  # pixels; image files are resized to it by default


class Crops(NamedTuple):
    """Which part of each image is seen, and whether it is mirrored."""

    top: Int64[Tensor, "*n"]
    left: Int64[Tensor, "*n"]
    mirrored: Bool[Tensor, "*n"]

    def of(self, cases: Int64[Tensor, " b"]) -> "Crops":
        return Crops(*(draw[cases] for draw in self))


class Batch(NamedTuple):
    """Images of c channels, and their classes."""

    x: Tensor  # (n, c, h, w)
    y: Tensor  # (n,) int64


class Files(torch.utils.data.Dataset[Batch]):
    """Image files, read as RGB bytes (3, side, side) whatever their form, and their classes."""

    def __init__(
        self, folder: Path, names: Sequence[str], labels: Sequence[int], *, side: int = SIDE
    ) -> None:
        self.folder, self.labels, self.side = folder, torch.tensor(labels), side
        # one buffer: counting references to a million strings would copy them into every fork
        self.names = np.array([os.fsencode(name) for name in names])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, case: int) -> Batch:
        """Read one file.

        Raises:
            DamagedDataError: It cannot be read as an image.
        """
        from PIL import Image  # comes with torchvision

        path = self.folder / os.fsdecode(self.names[case])
        try:
            with Image.open(path) as image:
                size = self.side, self.side
                resized = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DamagedDataError(
                f"{path} cannot be read as an image ({error}); replace it, or move it away"
            ) from error
        pixels = np.asarray(resized).transpose(2, 0, 1).copy()
        return Batch(torch.from_numpy(pixels), self.labels[case])

    def subset(self, cases: Int64[Tensor, " n"]) -> "Files":
        names = [os.fsdecode(name) for name in self.names[cases.numpy()]]
        return Files(self.folder, names, self.labels[cases].tolist(), side=self.side)


def load_cifar(name: str, root: Path | str) -> Dataset:
    """Load CIFAR-10 or CIFAR-100 (its 100 fine classes) whole, with pixels in [0, 1].

    Each image is (3, 32, 32): its channels red, green and blue, its rows and its columns.

    Args:
        name: "cifar-10" or "cifar-100".
        root: Folder as torchvision lays it out. What is absent there is downloaded into it.

    Raises:
        DamagedDataError: A file's content is not what torchvision expects.
        DataNotFoundError: A file is absent and cannot be downloaded.
        ValueError: The name is unknown.
    """
    if name not in ("cifar-10", "cifar-100"):
        raise ValueError(f"no data set {name!r}; there are 'cifar-10' and 'cifar-100'")
    from torchvision.datasets import CIFAR10, CIFAR100  # seconds that other data need not pay

    reader = CIFAR10 if name == "cifar-10" else CIFAR100
    root = Path(root).expanduser()
    return Dataset(*_read(reader, root, train=True), *_read(reader, root, train=False))


def augmented(x: Float[Tensor, "*n c h w"], crops: Crops) -> Float[Tensor, "*n c h w"]:
    """Pad with zeros, then crop to the old size and mirror each image as drawn.

    Args:
        x: Preprocessed images, on any device.
        crops: Of the padded images, as `cropped` takes them.

    References:
        Clevert et al. (2016), section 4.2: 4 zero pixels, 32 × 32 crops, horizontal flips.
    """
    return cropped(F.pad(x, [PAD] * 4), crops, x.shape[-2:])


def draw_crops(shape: Sequence[int], spare: int, generator: torch.Generator) -> Crops:
    """Draw a corner in 0, ..., spare and whether to mirror, for each image, uniformly."""
    device = generator.device
    top, left = torch.randint(spare + 1, (2, *shape), generator=generator, device=device)
    mirrored = torch.randint(2, tuple(shape), generator=generator, device=device)
    return Crops(top, left, mirrored.bool())


def cropped(
    x: Float[Tensor, "*n c H W"], crops: Crops, size: Sequence[int]
) -> Float[Tensor, "*n c h w"]:
    """Cut a window of ``size`` out of each image, and mirror it left to right where drawn.

    Crops with fewer axes than the images are shared along the leading axes.
    """
    *many, channels, _, width = x.shape
    top, left, mirrored = (draw.to(x.device).expand(many).reshape(-1, 1) for draw in crops)
    rows = top + torch.arange(size[0], device=x.device)
    columns = torch.arange(size[1], device=x.device)
    columns = left + torch.where(mirrored, columns.flip(0), columns)
    pixels = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    flat = x.flatten(-2).flatten(0, -3)
    seen = flat.gather(2, pixels[:, None].expand(-1, channels, -1))
    return seen.view(*many, channels, *size)


def kept(path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return tensors from a file, or compute and save them if it is absent or damaged.

    The file carries its own checksum and is replaced as a whole. If it cannot be written, a warning
    says so and the tensors are returned all the same.
    """
    try:
        return _opened(path)
    except FileNotFoundError:
        pass
    except (OSError, DamagedDataError) as error:
        warnings.warn(f"{path} is of no use ({error}); it is computed again", stacklevel=2)
    values = compute()
    content = io.BytesIO()
    torch.save(values, content)
    data = hashlib.sha256(content.getbuffer()).digest() + content.getvalue()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data, path.with_suffix(f".{os.getpid()}.unfinished"))
    except OSError as error:
        warnings.warn(
            f"{path} was not written ({error}): next time it is computed again", stacklevel=2
        )
    return values


def _opened(path: Path) -> dict[str, Tensor]:
    data = memoryview(path.read_bytes())
    checksum, content = data[:32], data[32:]
    if hashlib.sha256(content).digest() != checksum:
        raise DamagedDataError("its checksum is not that of its content")
    values: dict[str, Tensor] = torch.load(io.BytesIO(content), "cpu", weights_only=True)
    return values


def _read(reader: "type[CIFAR10]", root: Path, *, train: bool) -> tuple[Tensor, Tensor]:
    try:
        part = reader(root, train=train)
    except RuntimeError as error:  # torchvision's word for absent as well as damaged
        _name_damaged(reader, root, error)
        part = _download(reader, root, train=train)
    x = torch.from_numpy(part.data).permute(0, 3, 1, 2)
    return x.float().div_(255), torch.tensor(part.targets)


def _files(reader: "type[CIFAR10]", root: Path) -> Iterator[tuple[Path, str]]:
    """All files of a data set with their MD5."""
    meta = reader.meta["filename"], reader.meta["md5"]
    for name, checksum in (*reader.train_list, *reader.test_list, meta):
        yield root / reader.base_folder / name, checksum


def _name_damaged(reader: "type[CIFAR10]", root: Path, reason: Exception) -> None:
    from torchvision.datasets.utils import check_integrity

    for path, checksum in _files(reader, root):
        if path.exists() and not check_integrity(path, checksum):
            raise DamagedDataError(
                f"{path} is damaged: its MD5 is not {checksum}; delete it, and all of "
                f"{reader.base_folder} is downloaded again"
            ) from reason


def _download(reader: "type[CIFAR10]", root: Path, *, train: bool) -> "CIFAR10":
    try:
        return reader(root, train=train, download=True)
    except (OSError, RuntimeError) as error:
        absent = next((path for path, _ in _files(reader, root) if not path.exists()), root)
        raise DataNotFoundError(
            f"{absent} is absent and could not be downloaded ({error}); unpack "
            f"{reader.filename} from {reader.url} in {root}, or run again with a network"
        ) from error
