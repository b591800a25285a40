"""What figures of bias shift share: the networks shown, the caption, and the command line."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Annotated

import pandas as pd
import settings
import style
import tyro
from matplotlib.figure import Figure
from summary import Summary, together

from unitfisher.experiments import plotting

HALF = 0.5  # damping share of s above which s says more of the damping than of the data

Names = Annotated[
    tuple[str, ...],
    tyro.conf.Positional,
    tyro.conf.arg(help="Folders in paper_figs/tables."),
]


def receiving(summary: Summary) -> pd.DataFrame:
    """The layers that receive activations: all but the first, with the angle in degrees."""
    layers = summary.layers
    after = layers[layers["layer"] != layers["layer"].iloc[0]]
    return after.assign(angle=plotting.degrees(after["cosine"]))


def foot(found: Mapping[str, Summary]) -> str:
    """The caption: what is averaged over which units, and where the damping makes most of s."""
    first = next(iter(found.values()))
    units = f"layers after the first, mean or median over {first.config['units']} units of each"
    fisher = settings.of_fisher(first.config)
    return "; ".join(
        [*together(found), fisher, units, first.spread, *_mostly_damped(found.values())]
    )


def _mostly_damped(summaries: Iterable[Summary]) -> Iterator[str]:
    """Name the dampings that make most of s, for some activation at some time."""
    shares = [
        receiving(s).groupby(["damping", "activation", s.time])["damping_share"].mean()
        for s in summaries
    ]
    most = pd.concat(shares).groupby("damping").max().sort_index(ascending=False)
    each = [f"{share:.2g} at damping {at:g}" for at, share in most.items() if share > HALF]
    if each:
        yield (
            f"the damping makes most of s (its share comes to {', '.join(each)}), and k, s·c and "
            "the angles then speak of it more than of the data"
        )


def main(draw: Callable[[str], Figure], figure: str) -> None:
    """Draw a figure of each training that the command line names."""
    for name in tyro.cli(Names, default=("mnist",), description="Draw some trainings."):
        print(style.save(partial(draw, name), f"{figure}_{name}"))
