"""Draw every figure again from the committed tables, in a minute; nothing is trained.

    python paper_figs/all.py
    python paper_figs/all.py --records mnist runs/mnist

The second way makes the tables of a training anew first, from its full records.
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
import tyro
from matplotlib.figure import Figure
from summaries import summarise

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


def main(records: tuple[tuple[str, Path], ...] = ()) -> list[Path]:
    """Draw every figure; one whose tables are missing says how they are made.

    Args:
        records: Pairs of a folder in paper_figs/tables and the folder of analysis/train.py whose
            records it is made from first; without them, all tables are drawn as they are.
    """
    for name, folder in records:
        print(summarise(name, [folder]).write())
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
    scripts.run(lambda: tyro.cli(main))
