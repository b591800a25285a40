"""Draw every figure again from the committed tables, in a minute; nothing is trained.

python paper_figs/all.py
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import activation_changes
import activation_functions
import autoencoder
import bias_shift_over_time
import bias_shift_per_layer
import cifar100
import cifar100_norm
import cifar_table
import imagenet
import mnist
import style
from matplotlib.figure import Figure

from unitfisher.experiments import scripts

TRAININGS = ("mnist", "mnist-autoencoder", "cifar100-11", "imagenet-15")
FIGURES: dict[str, Callable[[], Figure]] = {
    "activation_functions": activation_functions.draw,
    "mnist": mnist.draw,
    "activation_changes": activation_changes.draw,
    "autoencoder": autoencoder.draw,
    "cifar100": cifar100.draw,
    "cifar100_norm": cifar100_norm.draw,
    "cifar_table": cifar_table.draw,
    "imagenet": imagenet.draw,
    **{f"bias_shift_over_time_{n}": partial(bias_shift_over_time.draw, n) for n in TRAININGS},
    **{f"bias_shift_per_layer_{n}": partial(bias_shift_per_layer.draw, n) for n in TRAININGS},
}


def main() -> list[Path]:
    """Draw all; a figure whose tables are missing says how they are made."""
    drawn = []
    for name, draw in FIGURES.items():
        try:
            drawn.append(style.save(draw, name))
            print(drawn[-1])
        except FileNotFoundError as error:
            print(f"{name}: {error}")
    print(cifar_table.write())
    return drawn


if __name__ == "__main__":
    scripts.run(main)
