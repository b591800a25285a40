"""The figures of bias_shift.py: what is drawn where, and the files."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only; a display may be absent

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tables import Records

from unitfisher import plotting

PANEL = (3.2, 2.7)  # inches


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
    figure, (left, right) = _panels(1, 2, width=1.2)
    lines = plotting.plot_mean_activation(left, records.activations)
    plotting.plot_loss(right, records.training)
    styles = [
        Line2D([], [], color="0.3", linestyle=style, label=label)
        for style, label in (("-", "training"), (":", "test"))
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
    figure, axes = _panels(2, len(epochs), sharey="row", sharex=True, width=0.8, height=0.85)
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
    figure, axes = _panels(2, len(dampings), sharey=True, sharex="row", height=0.9)
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
    figure, axes = _panels(1, len(dampings) + 1, sharey=True, width=0.85)
    for ax, damping in zip(axes, dampings, strict=False):
        lines = plotting.plot_angle(ax, path[path["damping"] == damping])
        ax.set_title(f"damping {damping:g}")
        ax.label_outer()
    plotting.plot_damping_path(axes[-1], path[path["epoch"] == records.last_epoch])
    axes[-1].set_title(f"epoch {records.last_epoch}")
    _legend_below(figure, lines)
    return figure


def _panels(rows: int, columns: int, *, width: float = 1, height: float = 1, **share: object):
    size = (PANEL[0] * width * columns, PANEL[1] * height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", **share)
    for ax in np.ravel(axes):
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
