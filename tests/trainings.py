"""A training of a second: four small networks on a few digits."""

from dataclasses import replace
from functools import cache
from pathlib import Path

from unitfisher.experiments import Dataset, load
from unitfisher.experiments.presets import PRESETS
from unitfisher.experiments.trainer import Trainer

SMALL = replace(
    PRESETS["mnist"],
    dataset="digits",
    hidden=(16, 12),
    activations=("relu", "elu"),
    seeds=(0, 1),
    epochs=2,
    probe=100,
    measurements=2,
)


@cache
def few() -> Dataset:
    data = load("digits")
    return Dataset(data.train_x[:300], data.train_y[:300], data.test_x[:50], data.test_y[:50])


def ended(folder: Path) -> Trainer:
    """Train them to the end."""
    with Trainer(SMALL, SMALL.members, few(), folder) as trainer:
        for _ in trainer:
            pass
    return trainer
