"""Beyond the paper: its theory's quantities through a training.

    python paper_figs/bias_shift_over_time.py mnist cifar100-11

The claim rests on quantities without damping: mean share, bias-shift share of the gradient. Those
that depend on the damping (bias-shift share of the natural gradient, k, s·c, the angle between
gradient and unit natural gradient) are drawn at three dampings, above the damping share of s.
"""

from collections.abc import Mapping

import pandas as pd
import style
from bias_shift_figures import foot, main, receiving
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from summary import Summary, with_and_without_norm

from unitfisher.experiments import plotting, scripts
from unitfisher.experiments.panels import PAGE, panels

FREE = {
    "mean_share": "mean share of activations",
    "bias_shift_share_gradient": "bias-shift share, gradient",
    "n_eff": "n_eff (cases)",
}
DAMPED = {
    "bias_shift_share_natural": "bias-shift share,\nnatural gradient",
    "k": "k",
    "sc": "s·c",
    "angle": "angle to natural\ngradient (degrees)",
    "damping_share": "damping share\nof s",
}
LOGARITHMIC = ("n_eff", "bias_shift_share_natural", "sc")
SHARES = ("mean_share", "bias_shift_share_gradient", "damping_share")


def draw(name: str) -> Figure:
    """Quantities without damping in the top row; below, a column for each damping."""
    found = with_and_without_norm(name)
    first = next(iter(found.values()))
    layers = {norm: receiving(summary) for norm, summary in found.items()}
    dampings = sorted(first.layers["damping"].unique(), reverse=True)
    columns = max(len(FREE), len(dampings))
    figure, axes = panels(1 + len(DAMPED), columns, 1.2, width=PAGE, sharex="all")
    for ax, (value, label) in zip(axes[0], FREE.items(), strict=False):
        lines = _over_time(ax, layers, dampings[-1], value, first.time)
        ax.set_title(label, loc="right")
    for row, (value, label) in zip(axes[1:], DAMPED.items(), strict=True):
        for ax, damping in zip(row, dampings, strict=False):
            ax.sharey(row[0])
            _over_time(ax, layers, damping, value, first.time)
            ax.set_title(f"damping {damping:g}", loc="right")
            ax.tick_params(labelleft=ax is row[0])
        row[0].set_ylabel(label)
    figure.align_ylabels(axes[:, 0])
    for ax in axes.flat:
        ax.set_visible(bool(ax.lines))
    for ax in axes[-1]:
        _measured(ax, first)
    kinds = style.entries(style.NORMS) if len(found) > 1 else []
    return style.finish(figure, lines, foot(found), kinds)


def _over_time(
    ax: Axes, layers: Mapping[str, pd.DataFrame], damping: float, value: str, time: str
) -> plotting.Lines:
    lines: plotting.Lines = {}
    if value in LOGARITHMIC:
        ax.set_yscale("log")
    for norm, frame in layers.items():
        rows = frame[frame["damping"] == damping]
        mean = rows.groupby(["activation", "seed", time])[value].mean().reset_index()
        lines = plotting.plot_over(ax, mean, value, x=time, style=style.NORMS[norm]) | lines
    if value in LOGARITHMIC:
        plotting.tick_plainly(ax)
    elif value in SHARES:
        ax.set_ylim(0, 1)
    elif value == "k":
        ax.axhline(0, color="0.7", linewidth=0.6, zorder=0)
        style.logarithmic_both_ways(ax)
    return lines


def _measured(ax: Axes, summary: Summary) -> None:
    """Tick the times of measurement, on a logarithmic axis that begins at 0."""
    times = sorted(summary.layers[summary.time].unique())
    first = times[1] if len(times) > 1 else 1
    ax.set_xscale("symlog", linthresh=first)
    named: list[int] = []
    for time in reversed(times):
        if not named or 0 < 8 * time <= named[-1]:
            named.append(time)
    ax.set_xticks([0, *named], [_short(time) for time in (0, *named)])
    ax.set_xticks(times, minor=True)
    ax.set(xlabel=summary.time, xlim=(-0.1 * first, 1.2 * max(times[-1], first)))  # whole markers


def _short(count: int) -> str:
    return f"{count / 1000:g}k" if count >= 1000 else str(count)


if __name__ == "__main__":
    scripts.run(lambda: main(draw, "bias_shift_over_time"))
