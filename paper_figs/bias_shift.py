"""Beyond the paper: its theory's quantities through the full MNIST training.

    python paper_figs/bias_shift.py

What carries the claim (mean share, bias-shift share of the gradient) has no damping in it; what
has (k, s·c, the angle to the unit natural gradient) is drawn at three dampings.
"""

import numpy as np
import pandas as pd
import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from summaries import Summary

from unitfisher import plotting

RUN = ["activation", "seed", "epoch"]


def draw() -> Figure:
    """Shares above, then k, s·c and the angle, a column for each damping."""
    summary = Summary.read("mnist")
    receiving = summary.layers[summary.layers["layer"] != "hidden1"]
    receiving = receiving.assign(angle=np.degrees(np.arccos(receiving["cosine"].clip(-1, 1))))
    dampings = sorted(receiving["damping"].unique(), reverse=True)
    figure, axes = style.panels(3, 3, (2.7, 2.1), sharex="all")
    at = receiving[receiving["damping"] == dampings[-1]]
    lines = _over_epochs(axes[0, 0], at, "mean_share", "mean share of\nincoming activations")
    _over_epochs(axes[0, 1], at, "bias_shift_share_gradient", "bias-shift share\nof the gradient")
    _over_epochs(axes[0, 2], at, "n_eff", "n_eff (cases)")
    for row, value, label in ((1, "sc", "s·c"), (2, "angle", "angle (degrees)")):
        for ax, damping in zip(axes[row], dampings, strict=True):
            _over_epochs(ax, receiving[receiving["damping"] == damping], value, label)
            ax.set_title(f"damping {damping:g}", fontsize=9)
            if value == "sc":
                ax.set_yscale("log")
    for ax in axes[0, :2]:
        ax.set_ylim(0, 1)
    for ax in axes[-1]:
        ax.set_xlabel("epoch")
    note = "mean over layers 2 to 8 of the mean or median over their units, ± sd over seeds"
    return style.finish(figure, lines, f"{summary.conditions}; {note}")


def _over_epochs(ax: Axes, layers: pd.DataFrame, value: str, label: str) -> plotting.Lines:
    lines = plotting.plot_over(
        ax, layers.groupby(RUN)[value].mean().reset_index(), value, x="epoch"
    )
    epochs = sorted(layers["epoch"].unique())
    ax.set_xscale("symlog", linthresh=1)
    ax.set_xticks(epochs, [str(epoch) for epoch in epochs])
    ax.set(ylabel=label, xlim=(0, None))
    return lines


if __name__ == "__main__":
    print(style.save(draw, "bias_shift"))
