"""The data that a preset is trained on."""

from pathlib import Path
from typing import Final, get_args

from unitfisher.experiments.data import Dataset, DatasetName, data_root, load
from unitfisher.experiments.images import load_cifar
from unitfisher.experiments.photographs import PhotographSets, load_photographs
from unitfisher.experiments.presets import Preset
from unitfisher.experiments.whitening import whitened

CACHE: Final = Path("runs/cache")


def data_of(
    preset: Preset,
    root: Path | str | None = None,
    *,
    cache: Path = CACHE,
    device: str = "cpu",
    workers: int = 0,
) -> Dataset | PhotographSets:
    """Load a preset's data onto a device, preprocessed.

    Args:
        preset: What is to be trained.
        root: Folder of the data as torchvision lays them out, or of photographs in train and val;
            None: that of the environment's UNITFISHER_DATA. What is absent there is downloaded.
        cache: Folder of whitening and mean images, which are computed once.
        device: As torch names it.
        workers: Processes that read photographs.

    Raises:
        DamagedDataError: A file's content is damaged.
        DataNotFoundError: No folder was named, or the data are not in it and cannot be downloaded.
    """
    name = preset.dataset
    if name in get_args(DatasetName):
        return load(name, root).to(device)
    folder = data_root(name, root)
    if name == "photographs":
        sizes = {"side": preset.side, "seen": preset.crop}
        return load_photographs(folder, cache, **sizes, workers=workers).to(device)
    images = load_cifar(name, folder).to(device)
    return whitened(images, name, cache) if preset.preprocessing == "zca" else images
