"""Beyond the paper: mean share, bias-shift share and angle of every layer, through a training.

python paper_figs/bias_shift_per_layer.py mnist cifar100-11
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import style
from bias_shift_figures import foot, main, receiving
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from summary import Summary, with_and_without_norm

from unitfisher.experiments import plotting, scripts
from unitfisher.experiments.panels import panels

VALUES = {
    "mean_share": "mean share of\nincoming activations",
    "bias_shift_share_gradient": "bias-shift share\nof the gradient",
    "angle": "angle to the natural\ngradient (degrees)",
}


class Column(NamedTuple):
    """The time of a column; trainings measured at different times have a time each."""

    title: str
    times: Mapping[str, int]  # by training


def draw(name: str) -> Figure:
    """A column for each time: before training, in its middle (on a log scale), after it."""
    found = with_and_without_norm(name)
    dampings = sorted(next(iter(found.values())).layers["damping"].unique())
    damping = dampings[len(dampings) // 2]
    shown = columns(found)
    figure, axes = panels(len(VALUES), len(shown), 1.4, sharex="all", sharey="row")
    lines: plotting.Lines = {}
    for norm, summary in found.items():
        layers = receiving(summary)
        order = {layer: n for n, layer in enumerate(layers["layer"].unique(), start=2)}
        layers = layers[layers["damping"] == damping].assign(place=layers["layer"].map(order))
        for column, (_, times) in zip(axes.T, shown, strict=True):
            at = layers[layers[summary.time] == times[norm]]
            for ax, value in zip(column, VALUES, strict=True):
                look = style.NORMS[norm]
                lines = plotting.plot_over(ax, at, value, x="place", style=look) | lines
    _labelled(axes, shown)
    kinds = style.entries(style.NORMS) if len(found) > 1 else []
    note = f"angle at damping {damping:g}; {foot(found)}"
    return style.finish(figure, lines, note, kinds)


def columns(found: Mapping[str, Summary]) -> list[Column]:
    """Choose first, middle and last of the times at which all trainings were measured.

    Where fewer than two are common to all, each is shown at its own last measurement beside them.
    """
    measured = {norm: set(s.layers[s.time].unique().tolist()) for norm, s in found.items()}
    unit = next(iter(found.values())).time
    times = sorted(set.intersection(*measured.values()))
    chosen = sorted({times[0], times[len(times) // 2], times[-1]}) if times else []
    shown = [Column(f"{unit} {time:,}", dict.fromkeys(found, time)) for time in chosen]
    if len(times) < 2:
        last = {norm: max(of) for norm, of in measured.items()}
        named = ",\n".join(f"{time:,} {norm}" for norm, time in last.items())
        shown.append(Column(f"{unit} {named}", last))
    return shown


def _labelled(axes: NDArray[Any], shown: Sequence[Column]) -> None:
    for row, label in zip(axes, VALUES.values(), strict=True):
        row[0].set_ylabel(label)
    for ax, column in zip(axes[0], shown, strict=True):
        ax.set_title(column.title)
    for ax in axes[:2].flat:
        ax.set_ylim(0, 1)
    for ax in axes[-1]:
        ax.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        ax.set_xlabel("layer")


if __name__ == "__main__":
    scripts.run(lambda: main(draw, "bias_shift_per_layer"))
