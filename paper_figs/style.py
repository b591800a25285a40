"""How all figures look, and where they go."""

import textwrap
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")  # files only; a display may be absent

import matplotlib.pyplot as plt
import numpy as np
import summary
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    StrMethodFormatter,
)
from numpy.typing import NDArray

from unitfisher.experiments import plotting

FIGURES = Path(__file__).parent / "figures"
NORMS = dict(zip(summary.NORMS, ("-", "--"), strict=True))  # styles of plotting.plot_over
PUBLISHED = "#b00000"  # what others measured: hollow marks or italics, and always named


def panels(
    rows: int,
    columns: int,
    size: tuple[float, float] = (3.6, 2.7),
    *,
    sharex: Literal["none", "all", "row", "col"] = "none",
    sharey: Literal["none", "all", "row", "col"] = "none",
) -> tuple[Figure, NDArray[Any]]:
    """Make a grid of bare axes; ``size`` is one panel's, in inches."""
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(size[0] * columns, size[1] * rows + 0.5),
        layout="constrained",
        sharex=sharex,
        sharey=sharey,
        squeeze=False,
    )
    for ax, letter in zip(axes.flat, ascii_lowercase, strict=False):
        ax.spines[["top", "right"]].set_visible(False)
        if axes.size > 1:
            ax.set_title(letter, loc="left", fontweight="bold", fontsize=10)
    return figure, axes


def finish(
    figure: Figure, lines: plotting.Lines, conditions: str, others: Sequence[Line2D] = ()
) -> Figure:
    """Put one legend for all panels above them, and below what was run where."""
    present = [lines[name] for name in plotting.COLOURS if name in lines]
    handles = [*reversed(present), *others]  # ELU first, as on the poster
    if handles:
        look = {"ncols": len(handles), "columnspacing": 1.3, "fontsize": 9, "frameon": False}
        figure.legend(handles=handles, loc="outside upper center", **look)
    foot = textwrap.fill(conditions, int(18 * figure.get_figwidth()))
    figure.supxlabel(foot, fontsize=7, color="0.35")
    return figure


def entries(labels: Mapping[str, str]) -> list[Line2D]:
    """Legend entries that say which style of ``plotting.plot_over`` is what."""
    look = {"color": "0.3", "marker": "o", "markersize": 4}
    return [
        Line2D([], [], **look | plotting.STYLES[style], label=label)
        for label, style in labels.items()
    ]


def count(ax: Axes, time: str) -> None:
    """Let the x axis count epochs or iterations."""
    ax.set_xlabel(time)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def logarithmic(ax: Axes) -> None:
    """Let the y axis, after drawing, be logarithmic with plain numbers at its ticks."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    subs = (1.0, 2.0, 5.0) if high / low < 100 else (1.0,)
    ax.yaxis.set_major_locator(MaxNLocator(4) if high / low < 5 else LogLocator(subs=subs))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_locator(LogLocator(subs=tuple(range(1, 10))))
    ax.yaxis.set_minor_formatter(NullFormatter())


def logarithmic_both_ways(ax: Axes) -> None:
    """Let the y axis, after drawing, be logarithmic on both sides of 0, and linear near it."""
    ax.set_yscale("asinh")
    limit = max(map(abs, ax.get_ylim()))
    first, step = int(limit > 30), 1 + int(limit > 1000)
    powers = 10.0 ** np.arange(first, 12, step)
    ax.yaxis.set_major_locator(FixedLocator([*-powers, 0, *powers]))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def mark(ax: Axes, x: float, y: float, activation: str) -> None:
    """Mark a published value of a kind of network."""
    look = {"marker": plotting.MARKERS[activation], "markerfacecolor": "none", "markersize": 8}
    ax.plot(x, y, color=PUBLISHED, linestyle="", clip_on=False, **look)


def published() -> dict[str, Any]:
    """What others measured, from the file that names the sources."""
    return tomllib.loads((Path(__file__).parent / "published.toml").read_text())


def save(draw: Callable[[], Figure], name: str) -> Path:
    """Draw and write one figure as PNG."""
    FIGURES.mkdir(exist_ok=True)
    figure, path = draw(), FIGURES / f"{name}.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
