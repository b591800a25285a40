"""The figures of bias_shift.py: what is drawn where, and the files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")  # files only; a display may be absent

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from tables import Records

from unitfisher.experiments import plotting

Share = Literal["none", "all", "row"]


def draw_all(records: Records, folder: Path) -> list[Path]:
    """Draw every figure as PNG and PDF."""
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Callable[[Records], Figure]] = {
        "mean_activation": mean_activation,
        "shares_per_layer": shares_per_layer,
        "correction_factors": correction_factors,
        "angle": angle,
    }
    return [path for name, draw in figures.items() for path in _save(draw(records), folder / name)]


def mean_activation(records: Records) -> Figure:
    """The poster's figure: mean activation, and beside it training and test loss."""
    figure, ((left, right),) = _panels((3.85, 2.7), 1, 2, sharey="none")
    lines = plotting.plot_mean_activation(left, records.activations)
    plotting.plot_loss(right, records.training)
    styles = [
        Line2D([], [], color="0.3", linestyle="-", label="training"),
        Line2D([], [], color="0.3", linestyle=":", label="test"),
    ]
    right.legend(handles=styles, frameon=False)
    _legend_below(figure, lines)
    return figure


def shares_per_layer(records: Records) -> Figure:
    """Mean share and bias-shift share of the gradient: layer across, epochs as panels."""
    epochs = _spread_out(sorted(records.path["epoch"].unique()), 4)
    one_damping = records.path[records.path["damping"] == records.path["damping"].min()]
    rows = {"mean_share": "mean share\nof incoming activations"}
    rows |= {"bias_shift_share_gradient": "bias-shift share\nof the gradient"}
    figure, axes = _panels((2.6, 2.3), 2, len(epochs), sharex="all")
    for row, (value, label) in zip(axes, rows.items(), strict=True):
        for ax, epoch in zip(row, epochs, strict=True):
            chosen = one_damping[one_damping["epoch"] == epoch]
            lines = plotting.plot_per_layer(ax, chosen, value)
            ax.set_ylim(0, 1)
            ax.label_outer()
        row[0].set_ylabel(label)
    for ax, epoch in zip(axes[0], epochs, strict=True):
        ax.set_title(f"epoch {epoch}")
    _legend_below(figure, lines)
    return figure


def correction_factors(records: Records) -> Figure:
    """Distributions of k and s·c over units after training, at each damping."""
    last = records.receiving[records.receiving["epoch"] == records.last_epoch]
    dampings = sorted(last["damping"].unique(), reverse=True)
    figure, axes = _panels((3.2, 2.4), 2, len(dampings), sharex="row")
    for column, damping in zip(axes.T, dampings, strict=True):
        at = last[last["damping"] == damping]
        lines = plotting.plot_distribution(column[0], at, "k", scale="asinh")
        plotting.plot_distribution(column[1], at, "sc", scale="log")
        column[0].set(title=f"damping {damping:g}", xlabel="k")
        column[1].set(xlabel="s·c")
    for row, value in zip(axes, ("k", "sc"), strict=True):
        low, high = last[value].quantile([0.005, 0.995])  # few extreme units would set the scale
        row[0].set(ylabel="share of units below", xlim=(low, high))
    _legend_below(figure, lines)
    return figure


def angle(records: Records) -> Figure:
    """Angle between gradient and natural gradient through training, and over the damping."""
    path = records.receiving
    dampings = sorted(path["damping"].unique(), reverse=True)
    figure, (axes,) = _panels((2.7, 2.7), 1, len(dampings) + 1)
    for ax, damping in zip(axes, dampings, strict=False):
        lines = plotting.plot_angle(ax, path[path["damping"] == damping])
        ax.set_title(f"damping {damping:g}")
        ax.label_outer()
    plotting.plot_damping_path(axes[-1], path[path["epoch"] == records.last_epoch])
    axes[-1].set_title(f"epoch {records.last_epoch}")
    _legend_below(figure, lines)
    return figure


def _panels(
    size: tuple[float, float],
    rows: int,
    columns: int,
    *,
    sharex: Share = "none",
    sharey: Share = "row",
) -> tuple[Figure, NDArray[Any]]:
    """Make a grid of bare axes; ``size`` is one panel's, in inches."""
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(size[0] * columns, size[1] * rows),
        layout="constrained",
        sharex=sharex,
        sharey=sharey,
        squeeze=False,
    )
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _spread_out(epochs: Sequence[int], count: int) -> list[int]:
    """Choose some, first and last included."""
    places = np.linspace(0, len(epochs) - 1, min(count, len(epochs))).round().astype(int)
    return [epochs[i] for i in places]


def _save(figure: Figure, stem: Path) -> list[Path]:
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out: once is enough for both files
    paths = [stem.with_suffix(".png"), stem.with_suffix(".pdf")]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths


def _legend_below(figure: Figure, lines: plotting.Lines) -> None:
    handles = list(reversed(lines.values()))  # ELU first, as on the poster
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
