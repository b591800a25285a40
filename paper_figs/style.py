"""How all figures look, and where they go."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")  # files only; a display may be absent

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from unitfisher import plotting

FIGURES = Path(__file__).parent / "figures"
PUBLISHED = "#b00000"  # values that others measured; always dashed, always named


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
    for ax, letter in zip(axes.flat, "abcdefghijkl", strict=False):
        ax.spines[["top", "right"]].set_visible(False)
        if axes.size > 1:
            ax.set_title(letter, loc="left", fontweight="bold", fontsize=10)
    return figure, axes


def finish(figure: Figure, lines: plotting.Lines, conditions: str) -> Figure:
    """Put one legend for all panels above them, and below what was run where."""
    handles = list(reversed(lines.values()))  # ELU first, as on the poster
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    foot = textwrap.fill(conditions, int(18 * figure.get_figwidth()))
    figure.supxlabel(foot, fontsize=7, color="0.35")
    return figure


def solid_and_dotted(solid: str, dotted: str) -> list[Line2D]:
    """Legend entries that say what solid and dotted lines are."""
    return [
        Line2D([], [], color="0.3", linestyle="-", label=solid),
        Line2D([], [], color="0.3", linestyle=":", label=dotted),
    ]


def save(draw: Callable[[], Figure], name: str) -> Path:
    """Draw and write one figure as PNG."""
    FIGURES.mkdir(exist_ok=True)
    figure, path = draw(), FIGURES / f"{name}.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
