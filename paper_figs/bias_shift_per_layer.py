"""Beyond the paper: mean share, bias-shift share and angle of every layer, through a training.

python paper_figs/bias_shift_per_layer.py mnist cifar100-11
"""

import style
from bias_shift_figures import foot, main, receiving
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from summary import with_and_without_norm

from unitfisher.experiments import plotting, scripts
from unitfisher.experiments.panels import panels

VALUES = {
    "mean_share": "mean share of\nincoming activations",
    "bias_shift_share_gradient": "bias-shift share\nof the gradient",
    "angle": "angle to the natural\ngradient (degrees)",
}


def draw(name: str) -> Figure:
    """A column for each time: before training, in its middle (on a log scale), after it."""
    found = with_and_without_norm(name)
    first = next(iter(found.values()))
    dampings = sorted(first.layers["damping"].unique())
    damping = dampings[len(dampings) // 2]
    times = sorted(first.layers[first.time].unique())
    chosen = sorted({times[0], times[len(times) // 2], times[-1]})
    figure, axes = panels(len(VALUES), len(chosen), 1.4, sharex="all", sharey="row")
    lines: plotting.Lines = {}
    for norm, summary in found.items():
        layers = receiving(summary)
        order = {layer: n for n, layer in enumerate(layers["layer"].unique(), start=2)}
        layers = layers[layers["damping"] == damping].assign(place=layers["layer"].map(order))
        for row, value in zip(axes, VALUES, strict=True):
            for ax, time in zip(row, chosen, strict=True):
                at = layers[layers[first.time] == time]
                look = style.NORMS[norm]
                lines = plotting.plot_over(ax, at, value, x="place", style=look) | lines
    for row, label in zip(axes, VALUES.values(), strict=True):
        row[0].set_ylabel(label)
    for ax, time in zip(axes[0], chosen, strict=True):
        ax.set_title(f"{first.time} {time:,}")
    for ax in axes[:2].flat:
        ax.set_ylim(0, 1)
    for ax in axes[-1]:
        ax.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        ax.set_xlabel("layer")
    kinds = style.entries(style.NORMS) if len(found) > 1 else []
    note = f"angle at damping {damping:g}; {foot(found)}"
    return style.finish(figure, lines, note, kinds)


if __name__ == "__main__":
    scripts.run(lambda: main(draw, "bias_shift_per_layer"))
