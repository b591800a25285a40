"""Figures of several panels in one style: as wide as they are printed, with legend and conditions.

For scripts: importing this module sets matplotlib's sizes, and a backend that writes files only.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any, Final, Literal

import matplotlib

matplotlib.use("Agg")  # files only; a display may be absent

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

TEXT: Final = 5.5  # inches, of a column of text (ICLR)
PAGE: Final = 6.75  # of a page of two columns (ICML)
DPI: Final = 200
FOOT: Final = 6.0  # points; nothing is smaller
SHORT_FOOT: Final = 4  # lines for which the panels leave room; the figure grows by others
FOOT_LINE: Final = 1.2 * FOOT / 72  # inches
matplotlib.rcParams.update(
    {
        "font.size": 7,
        "axes.labelsize": 7,
        "axes.titlesize": 7,
        "xtick.labelsize": 6.5,
        "ytick.labelsize": 6.5,
        "legend.fontsize": 7,
        "axes.linewidth": 0.6,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "figure.dpi": DPI,
    }
)

Share = Literal["none", "all", "row", "col"]


def panels(
    rows: int,
    columns: int,
    height: float,
    *,
    width: float = TEXT,
    sharex: Share = "none",
    sharey: Share = "none",
) -> tuple[Figure, NDArray[Any]]:
    """Make a grid of bare axes with a letter each; ``height`` is one row's, in inches."""
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(width, height * rows + 0.4),
        layout="constrained",
        sharex=sharex,
        sharey=sharey,
        squeeze=False,
    )
    for ax, letter in zip(axes.flat, ascii_lowercase, strict=False):
        ax.spines[["top", "right"]].set_visible(False)
        if axes.size > 1:
            ax.set_title(letter, loc="left", fontweight="bold", fontsize=8)
    return figure, axes


def finish(figure: Figure, handles: Sequence[Artist], conditions: str) -> Figure:
    """Put one legend above all panels, and the conditions of the runs below them.

    A figure with a long foot grows, so that its panels keep their size.
    """
    if handles:
        look: dict[str, Any] = {"columnspacing": 1.3, "frameon": False}
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), **look)
    foot = _evenly(conditions, int(21 * figure.get_figwidth()))  # characters to the inch
    further = max(0, len(foot.splitlines()) - SHORT_FOOT)
    figure.set_figheight(figure.get_figheight() + further * FOOT_LINE)
    figure.supxlabel(foot, fontsize=FOOT, color="0.25")
    return figure


def _evenly(text: str, width: int) -> str:
    """Wrap text into as few lines as the width allows, and about equally long ones."""
    lines = len(textwrap.wrap(text, width))
    while lines > 1 and len(textwrap.wrap(text, width - 1)) == lines:
        width -= 1
    return textwrap.fill(text, width)


def write(figure: Figure, stem: Path) -> list[Path]:
    """Write PNG, of few colours and thus small, and PDF; close the figure."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    png, pdf = stem.with_suffix(".png"), stem.with_suffix(".pdf")
    canvas = FigureCanvasAgg(figure)  # canvases draw once, savefig several times
    canvas.draw()
    few = (
        Image.fromarray(np.asarray(canvas.buffer_rgba()))
        .convert("RGB")
        .quantize(256, dither=Image.Dither.NONE)
    )
    few.save(png, optimize=True, dpi=(DPI, DPI))
    figure.set_layout_engine("none")  # laid out: once is enough for both files
    FigureCanvasPdf(figure).print_pdf(pdf, metadata={"CreationDate": None})  # no time in it
    plt.close(figure)
    return [png, pdf]
