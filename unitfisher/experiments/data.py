"""Data sets as whole tensors: small enough to live on the device, so nothing is loaded twice."""

import os
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

if TYPE_CHECKING:
    from torchvision.datasets import MNIST

DatasetName = Literal["digits", "mnist", "fashion-mnist"]
DATA_ROOT: Final = "UNITFISHER_DATA"
SPLIT_SEED: Final = 0
TEST_SHARE: Final = 0.2


class DataNotFoundError(RuntimeError):
    """A data set is not on disk and cannot be downloaded."""


class DamagedDataError(RuntimeError):
    """The content of a file of a data set is damaged."""


@dataclass(frozen=True)
class Dataset:
    """Images, flattened or with channels, rows and columns, and their classes."""

    train_x: Float[Tensor, "n *shape"]
    train_y: Int64[Tensor, " n"]
    test_x: Float[Tensor, "m *shape"]
    test_y: Int64[Tensor, " m"]

    @property
    def inputs(self) -> int:
        return self.train_x[0].numel()

    @property
    def classes(self) -> int:
        return int(self.train_y.max()) + 1

    def to(self, device: torch.device | str) -> "Dataset":
        parts = ("train_x", "train_y", "test_x", "test_y")
        return replace(self, **{part: getattr(self, part).to(device) for part in parts})


def load(name: str, root: Path | str | None = None) -> Dataset:
    """Load a data set; ``root`` (or the environment's UNITFISHER_DATA) holds torchvision's.

    Args:
        name: "digits" ships with scikit-learn and needs no root.
        root: Folder as torchvision lays it out. What is absent there is downloaded into it.

    Raises:
        DataNotFoundError: No folder was named, or the data are not in it and cannot be downloaded.
        ValueError: The name is unknown.
    """
    if name == "digits":
        return _digits()
    if name in ("mnist", "fashion-mnist"):
        return _from_torchvision(name, data_root(name, root))
    raise ValueError(f"no data set {name!r}; there are 'digits', 'mnist' and 'fashion-mnist'")


def probe(data: Dataset, cases: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a fixed subset of the training set to measure on."""
    chosen = torch.randperm(len(data.train_x), generator=generator)[:cases]
    chosen = chosen.to(data.train_x.device)
    return data.train_x[chosen], data.train_y[chosen]


def held_out(data: Dataset, cases: int) -> Dataset:
    """Leave cases out of training, drawn at random but always the same ones, and test on them.

    Raises:
        ValueError: There are not more than that.
    """
    if cases >= len(data.train_x):
        raise ValueError(
            f"validation={cases} leaves none of {len(data.train_x)} cases to train on: name fewer"
        )
    order = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(SPLIT_SEED))
    order = order.to(data.train_x.device)
    held, left = order[:cases], order[cases:]
    x, y = data.train_x, data.train_y
    return Dataset(x[left], y[left], x[held], y[held])


def _digits() -> Dataset:
    spec = find_spec("sklearn")  # importing it costs more seconds than the digits are worth
    if spec is None or spec.origin is None:
        raise DataNotFoundError("the digits ship with scikit-learn: pip install scikit-learn")
    path = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if not path.is_file():
        raise DataNotFoundError(f"scikit-learn is here without its digits ({path}); reinstall it")
    table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.float32))
    x, y = table[:, :-1] / 16, table[:, -1].long()
    is_test = _stratified(y, torch.Generator().manual_seed(SPLIT_SEED))
    return Dataset(x[~is_test], y[~is_test], x[is_test], y[is_test])


def _stratified(y: Int64[Tensor, " n"], generator: torch.Generator) -> Tensor:
    """Mark the same share of every class, at random, as test."""
    is_test = torch.zeros(len(y), dtype=torch.bool)
    for label in range(int(y.max()) + 1):
        cases = (y == label).nonzero().squeeze(1)
        shuffled = cases[torch.randperm(len(cases), generator=generator)]
        is_test[shuffled[: round(TEST_SHARE * len(cases))]] = True
    return is_test


def data_root(name: str, root: Path | str | None) -> Path:
    """Return the folder named, here or in the environment.

    Raises:
        DataNotFoundError: None was named.
    """
    named = root or os.environ.get(DATA_ROOT)
    if not named:
        raise DataNotFoundError(
            f"{name} needs a folder: give --data-root DIR or set {DATA_ROOT}; "
            "what is absent there is downloaded into it"
        )
    return Path(named).expanduser()


def _from_torchvision(name: str, root: Path) -> Dataset:
    train_x, train_y = _read(name, root, train=True)
    test_x, test_y = _read(name, root, train=False)
    return Dataset(train_x, train_y, test_x, test_y)


def _read(name: str, root: Path, *, train: bool) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import (  # seconds the digits need not pay
        MNIST,
        FashionMNIST,
    )

    reader = {"mnist": MNIST, "fashion-mnist": FashionMNIST}[name]
    for file in sorted((root / reader.__name__ / "raw").glob("*-ubyte")):
        _require_whole(file)
    try:
        part = reader(root, train=train)
    except RuntimeError:  # torchvision's word for absent
        part = _download(reader, name, root, train=train)
    if len(part.data) != len(part.targets):
        raise DamagedDataError(
            f"{root / reader.__name__ / 'raw'} has {len(part.data)} images and {len(part.targets)} "
            f"labels for {'training' if train else 'testing'}: its files do not belong together; "
            "delete them to have them downloaded again"
        )
    return part.data.flatten(1).float() / 255, part.targets.long()


def _require_whole(file: Path) -> None:
    """Refuse an idx file that is not as long as its header says."""
    with file.open("rb") as opened:
        head = opened.read(4 + 4 * 3)  # magic number, sizes of at most three axes
    axes = head[3] if len(head) > 3 else 0
    start = 4 + 4 * axes
    sizes = np.frombuffer(head[4:start], ">u4") if len(head) >= start else None
    if head[:3] != b"\0\0\x08" or sizes is None or file.stat().st_size != start + sizes.prod():
        raise DamagedDataError(
            f"{file} is damaged: it is not as long as its header says; delete it to have it "
            "downloaded again"
        )


def _download(reader: "type[MNIST]", name: str, root: Path, *, train: bool) -> "MNIST":
    try:
        return reader(root, train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise DataNotFoundError(
            f"{name} is not in {root} and could not be downloaded ({error}); copy its four "
            f"*-ubyte files to {root / reader.__name__ / 'raw'}, or run again with a network"
        ) from error
