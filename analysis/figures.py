"""The figures of bias_shift.py: what is drawn where, and the files."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tables import Records

from unitfisher.experiments import plotting
from unitfisher.experiments.panels import PAGE, finish, panels, write

Drawn = tuple[Figure, plotting.Lines]


def draw_all(records: Records, folder: Path, conditions: str) -> list[Path]:
    """Draw every figure as PNG and PDF, with the conditions of the runs at its foot."""
    figures: dict[str, Callable[[Records], Drawn]] = {
        "mean_activation": mean_activation,
        "shares_per_layer": shares_per_layer,
        "correction_factors": correction_factors,
        "angle": angle,
    }
    written: list[Path] = []
    for name, draw in figures.items():
        figure, lines = draw(records)
        handles = list(reversed(lines.values()))  # ELU first, as on the poster
        written += write(finish(figure, handles, conditions), folder / name)
    return written


def mean_activation(records: Records) -> Drawn:
    """The poster's figure: mean activation, training loss, test loss."""
    figure, ((left, middle, right),) = panels(1, 3, 1.8)
    lines = plotting.plot_mean_activation(left, records.activations)
    plotting.plot_loss(middle, records.training, "train")
    plotting.plot_loss(right, records.training, "test")
    return figure, lines


def shares_per_layer(records: Records) -> Drawn:
    """Mean share and bias-shift share of the gradient: layer across, epochs as panels."""
    epochs = _spread_out(sorted(records.path["epoch"].unique()), 4)
    one_damping = records.path[records.path["damping"] == records.path["damping"].min()]
    rows = {"mean_share": "mean share\nof incoming activations"}
    rows |= {"bias_shift_share_gradient": "bias-shift share\nof the gradient"}
    figure, axes = panels(2, len(epochs), 1.6, sharex="all", sharey="row")
    for row, (value, label) in zip(axes, rows.items(), strict=True):
        for ax, epoch in zip(row, epochs, strict=True):
            chosen = one_damping[one_damping["epoch"] == epoch]
            lines = plotting.plot_per_layer(ax, chosen, value)
            ax.set_ylim(0, 1)
            ax.label_outer()
        row[0].set_ylabel(label)
    for ax, epoch in zip(axes[0], epochs, strict=True):
        ax.set_title(f"epoch {epoch}")
    return figure, lines


def correction_factors(records: Records) -> Drawn:
    """Distributions of k and s·c over units after training, at each damping."""
    last = records.receiving[records.receiving["epoch"] == records.last_epoch]
    dampings = sorted(last["damping"].unique(), reverse=True)
    figure, axes = panels(2, len(dampings), 1.7, sharex="row", sharey="row")
    for column, damping in zip(axes.T, dampings, strict=True):
        at = last[last["damping"] == damping]
        lines = plotting.plot_distribution(column[0], at, "k", scale="asinh")
        plotting.plot_distribution(column[1], at, "sc", scale="log")
        column[0].set(title=f"damping {damping:g}", xlabel="k")
        column[1].set(xlabel="s·c")
    for row, value in zip(axes, ("k", "sc"), strict=True):
        low, high = last[value].quantile([0.005, 0.995])  # few extreme units would set the scale
        row[0].set(ylabel="share of units below", xlim=(low, high))
    return figure, lines


def angle(records: Records) -> Drawn:
    """Angle between gradient and natural gradient through training, and over the damping."""
    path = records.receiving
    dampings = sorted(path["damping"].unique(), reverse=True)
    figure, (axes,) = panels(1, len(dampings) + 1, 1.9, width=PAGE, sharey="row")
    for ax, damping in zip(axes, dampings, strict=False):
        lines = plotting.plot_angle(ax, path[path["damping"] == damping])
        ax.set_title(f"damping {damping:g}")
        ax.label_outer()
    plotting.plot_damping_path(axes[-1], path[path["epoch"] == records.last_epoch])
    axes[-1].set_title(f"epoch {records.last_epoch}")
    return figure, lines


def _spread_out(epochs: Sequence[int], count: int) -> list[int]:
    """Choose some, first and last included."""
    places = np.linspace(0, len(epochs) - 1, min(count, len(epochs))).round().astype(int)
    return [epochs[i] for i in places]
