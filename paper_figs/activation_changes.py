"""How much units' activations change between epochs, by layer (after the paper's appendix C).

    python paper_figs/activation_changes.py

The paper takes each unit's median activation over the training set in a 5×256 network; here it is
the mean over a fixed subset, in the 8×128 network of the mean activations' figure.
"""

import numpy as np
import pandas as pd
import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator
from summary import Summary

from unitfisher.experiments import plotting
from unitfisher.experiments.panels import panels


def draw() -> Figure:
    """Per layer: share of units whose variance of changes is at most x."""
    summary = Summary.read("mnist").at_one_rate()
    changes = summary.changes
    layers = sorted(changes["layer"].unique())
    figure, axes = panels(2, -(-len(layers) // 2), 1.5, sharex="all", sharey="all")
    for ax, layer in zip(axes.flat, layers, strict=False):
        of_layer = changes[changes["layer"] == layer]
        lines = {}
        for name in plotting.COLOURS:
            rows = of_layer[of_layer["activation"] == name]
            if len(rows):
                lines[name] = _deciles(ax, name, rows.groupby("share")["variance"].median())
        ax.set(xscale="log", ylim=(0, 1))
        ax.set_title(layer)
    axes[0, 0].set_xlim(1e-8, 3 * changes["variance"].max())  # shared; units that are dead lie left
    axes[0, 0].xaxis.set_major_locator(LogLocator(numticks=5))
    for ax in axes[-1]:
        ax.set_xlabel("variance")
    for ax in axes[:, 0]:
        ax.set_ylabel("share of units")
    note = "variance over epochs of the change of a unit's mean activation, median over seeds"
    notes = [summary.conditions, note, "the change from the untrained network left out"]
    return style.finish(figure, lines, "; ".join(notes))


def _deciles(ax: Axes, name: str, variance: pd.Series) -> Line2D:
    values = np.maximum(variance.to_numpy(), 1e-12)
    look = plotting.look(name, len(values)) | {"markersize": 2.5}
    (line,) = ax.plot(values, variance.index, **look)
    return line


if __name__ == "__main__":
    style.script(lambda: print(style.save(draw, "activation_changes")))
