"""How all figures look, and where they go."""

import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import summary
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    MaxNLocator,
    NullLocator,
    StrMethodFormatter,
)

from unitfisher.experiments import panels, plotting, scripts

FIGURES = Path(__file__).parent / "figures"
STYLES: tuple[plotting.Style, ...] = ("-", "--")
NORMS = dict(zip(summary.NORMS, STYLES, strict=True))
PUBLISHED = "#b00000"  # what others measured: hollow marks or italics, and always named


def finish(
    figure: Figure, lines: plotting.Lines, conditions: str, others: Sequence[Line2D] = ()
) -> Figure:
    """Put a legend above the panels, ELU first as on the poster, and the conditions below."""
    present = [lines[name] for name in plotting.COLOURS if name in lines]
    return panels.finish(figure, [*reversed(present), *others], conditions)


def entries(labels: Mapping[str, plotting.Style]) -> list[Line2D]:
    """Legend entries that say which style of ``plotting.plot_over`` is what."""
    look: dict[str, Any] = {"color": "0.3", "marker": "o", "markersize": 3.2, "linewidth": 1.1}
    return [
        Line2D([], [], **look | plotting.STYLES[style], label=label)
        for label, style in labels.items()
    ]


def count(ax: Axes, time: str) -> None:
    """Let the x axis count epochs or iterations."""
    ax.set_xlabel(time)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))


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
    look: dict[str, Any] = {
        "marker": plotting.MARKERS[activation],
        "markerfacecolor": "none",
        "markersize": 6,
    }
    ax.plot(x, y, color=PUBLISHED, linestyle="", clip_on=False, **look)


def published() -> dict[str, Any]:
    """Published values, from the file that names their sources."""
    return tomllib.loads((Path(__file__).parent / "published.toml").read_text())


def script(main: Callable[[], None]) -> NoReturn:
    """Run a script that has no options but ``--help``, which shows the script's first sentence."""
    what = str(sys.modules["__main__"].__doc__).split("\n\n")[0]
    scripts.run(lambda: tyro.cli(main, description=what))


def save(draw: Callable[[], Figure], name: str) -> Path:
    """Draw and write one figure as PNG, and as PDF beside it."""
    return panels.write(draw(), FIGURES / name)[0]
