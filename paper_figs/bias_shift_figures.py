"""What the figures of bias shift share: whom they show, what stands below, and their command."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated

import numpy as np
import pandas as pd
import style
import tyro
from matplotlib.figure import Figure
from summary import Summary

Names = Annotated[
    tuple[str, ...],
    tyro.conf.Positional,
    tyro.conf.arg(help="Of folders in paper_figs/tables."),
]


def chosen_rate(summary: Summary) -> float:
    """The largest rate at which every network stayed finite, or the smallest."""
    rates = set(summary.training["rate"])
    return max(rates - set(summary.diverged["rate"]), default=min(rates))


def receiving(summary: Summary, rate: float) -> pd.DataFrame:
    """The layers that receive activations: all but the first, with the angle in degrees."""
    layers = summary.layers[summary.layers["rate"] == rate]
    after = layers[layers["layer"] != layers["layer"].iloc[0]]
    return after.assign(angle=np.degrees(np.arccos(after["cosine"].clip(-1, 1))))


def foot(found: Mapping[str, Summary], missing: list[str], rate: float) -> str:
    """What is averaged, and of what."""
    first, *more = found.items()
    several = len(first[1].training["rate"].unique()) > 1
    notes = [first[1].conditions, *(f"{norm}: {s.outcome}" for norm, s in more)]
    notes += [f"shown: rate {rate:g}"] if several else []
    units = f"layers after the first, mean or median over {first[1].config['units']} units of each"
    return "; ".join([*notes, units, first[1].spread, *missing])


def main(draw: Callable[[str], Figure], figure: str) -> None:
    """Draw a figure of each training that the command line names."""
    for name in tyro.cli(Names, default=("mnist",), description="Draw some trainings."):
        print(style.save(partial(draw, name), f"{figure}_{name}"))
