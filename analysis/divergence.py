"""Which of the paper's networks diverge at once from He's initial weights, and in how many steps?

    python analysis/divergence.py --data-root DIR

begins the presets that start from weights of another variance from He's, with the real data, and
counts steps until a network's loss is NaN or infinite. Data sets that are not below DIR are
downloaded, photographs left out. Eight minutes on two cores. Writes table.md, table.csv and
config.json to ``<out>``; feeds no figure.
"""

import logging
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import tyro
from tables import markdown, save
from tqdm import trange

from unitfisher.experiments import PRESETS, DataNotFoundError, Trainer, data_of, scripts
from unitfisher.experiments.models import HE
from unitfisher.provenance import plain, provenance

BEGINNINGS = {  # networks, and how many steps are enough to see them diverge
    "mnist-autoencoder": (replace(PRESETS["mnist-autoencoder"], rates=(1e-2, 1e-3)), 100),
    "cifar100-11": (PRESETS["cifar100-11"], 30),
    "imagenet-15": (
        replace(
            PRESETS["imagenet-15"],
            activations=("elu",),
            rates=(1e-2, 1e-3),
            side=56,
            crop=48,
            batch_size=8,
        ),
        25,
    ),
}


@dataclass(frozen=True)
class Config:
    """Count the steps to divergence."""

    data_root: Path | None = None
    """Folder of the data as torchvision lays them out (or set UNITFISHER_DATA)."""
    photographs: Path | None = None
    """Folder of photographs, with train and val; default: <data-root>."""
    presets: tuple[str, ...] = tuple(BEGINNINGS)
    """Which to begin."""
    steps: int | None = None
    """Most steps to take; default 100, 30 and 25."""
    cache: Path = Path("runs/cache")
    """Folder of whitening and mean images, computed once."""
    out: Path = Path("runs/divergence")
    """Folder that receives the table."""

    def __post_init__(self) -> None:
        if unknown := set(self.presets) - set(BEGINNINGS):
            raise ValueError(
                f"no beginning of {', '.join(unknown)}: choose from {list(BEGINNINGS)}"
            )
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be 1 or more, got {self.steps}")


def main(config: Config) -> int:
    """Train, print and save the table."""
    logging.getLogger("unitfisher").setLevel(logging.ERROR)
    rows = [row for name in config.presets for row in begun(name, config)]
    table = pd.DataFrame(rows)
    made = provenance(plain({**asdict(config), **dict.fromkeys(PATHS)}))
    written = (
        f"Steps from He's initial weights until the loss is NaN or infinite; seed 0, "
        f"{made['device']}, torch {made['versions']['torch']}.\n\n{markdown(readable(table))}"
    )
    save(table, written, made, config.out)
    return 0


PATHS = ("data_root", "photographs", "cache", "out")  # options that do not affect the result


def begun(name: str, config: Config) -> Iterator[dict[str, object]]:
    """Begin a preset's networks; a row for each."""
    preset, steps = BEGINNINGS[name]
    steps = config.steps or steps
    preset = replace(preset, weight_variance=HE, seeds=(0,), probe=8, tested=1)
    photographs = preset.dataset == "photographs"
    root = config.photographs if photographs and config.photographs else config.data_root
    try:
        data = data_of(preset, root, cache=config.cache)
    except DataNotFoundError as error:
        print(f"{name} is left out: {error}", file=sys.stderr)
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        Trainer(preset, preset.members, data, Path(folder)) as trainer,
    ):
        lasted = steps_that_last(trainer, steps, name)
    for member, last in zip(preset.members, lasted, strict=True):
        row = {"preset": name, "rate": member.rate, "activation": member.activation}
        yield row | {"diverged at": last, "of": steps}


def steps_that_last(trainer: Trainer, steps: int, title: str) -> list[float]:
    """Return at which step each member diverges; NaN for one that does not."""
    diverged = [math.nan] * len(trainer.members)
    for step in trange(1, steps + 1, desc=title):
        trainer.step()
        for i, loss in enumerate(trainer.losses.sum.tolist()):
            if math.isnan(diverged[i]) and not math.isfinite(loss):
                diverged[i] = step
        if not any(map(math.isnan, diverged)):
            break
    return diverged


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each preset and rate, a column for each activation."""
    steps = table["of"].map("none in {}".format)
    said = table["diverged at"].map("{:.0f}".format).where(table["diverged at"].notna(), steps)
    wide = table.assign(said=said).pivot(
        index=["preset", "rate"], columns="activation", values="said"
    )
    wide = wide.sort_index(ascending=[True, False]).reset_index()
    wide["rate"] = wide["rate"].map("{:g}".format)
    return wide.fillna("")


if __name__ == "__main__":
    scripts.run(lambda: main(tyro.cli(Config)), Config)
