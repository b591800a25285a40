"""Plots of recorded runs, drawn on the axes they are given.

Every function takes a tidy frame with the columns ``activation`` and ``seed`` (and those it
names), draws one curve per activation and returns what it drew, by activation. A curve is the
mean over seeds, its ribbon ± one standard deviation.
"""

from types import MappingProxyType
from typing import Any, Final, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FixedLocator,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    StrMethodFormatter,
)
from numpy.typing import NDArray

from unitfisher.experiments.models import ACTIVATIONS

# ELU purple and ReLU blue as on the poster; a marker each, so that no one needs the colours
COLOURS: Final = MappingProxyType(
    {
        "relu": "#1f83d6",
        "lrelu": "#e08a00",
        "srelu": "#12926b",
        "elu": "#6a1b9a",
        "prelu": "#8c564b",
        "gelu": "#7f7f7f",
        "silu": "#bcbd22",
        "selu": "#d62780",
        "own": "#444444",
    }
)
MARKERS: Final = MappingProxyType(
    {
        "relu": "s",
        "lrelu": "^",
        "srelu": "D",
        "elu": "o",
        "prelu": "v",
        "gelu": "P",
        "silu": "X",
        "selu": "h",
        "own": "*",
    }
)

Style = Literal["-", "--"]
STYLES: Final = MappingProxyType[Style, dict[str, Any]](
    {"-": {}, "--": {"linestyle": "--", "markerfacecolor": "white"}}
)
LOSSES: Final = MappingProxyType({"train": "training loss", "test": "test loss"})

Lines = dict[str, Line2D]


def plot_mean_activation(ax: Axes, activations: pd.DataFrame) -> Lines:
    """Median over the hidden units of their mean activation, over epochs.

    Args:
        ax: Where to draw.
        activations: Columns epoch and mean, one row per unit.
    """
    median = activations.groupby(["activation", "seed", "epoch"])["mean"].median().reset_index()
    lines = plot_over(ax, median, "mean", x="epoch")
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set(xlabel="epoch", ylabel="mean activation\n(median over hidden units)")
    return lines


def plot_loss(
    ax: Axes, training: pd.DataFrame, on: Literal["train", "test"], x: str = "epoch"
) -> Lines:
    """Cross-entropy over time, on the training or the test set.

    Args:
        ax: Where to draw.
        training: Columns ``x``, train_loss and test_loss.
        on: Which of them.
        x: The column that counts time; 0 is before training.
    """
    trained = training[training[x] > 0]  # the untrained networks would set the scale
    ax.set(xlabel=x, yscale="log", ylabel=f"{LOSSES[on]}\n(cross-entropy, nats)")
    lines = plot_over(ax, trained, f"{on}_loss", x=x)
    tick_plainly(ax)
    return lines


def plot_angle(ax: Axes, path: pd.DataFrame) -> Lines:
    """Angle between a unit's gradient and its natural gradient, mean over units, over epochs.

    Args:
        ax: Where to draw.
        path: Columns epoch and cosine, one row per unit, at one damping.
    """
    lines = plot_over(ax, _angle(path, "epoch"), "angle", x="epoch")
    epochs = sorted(path["epoch"].unique())
    ax.set_xscale("symlog", linthresh=1)
    ax.set_xticks(epochs, [str(epoch) for epoch in epochs])
    ax.set(xlabel="epoch", ylabel="angle to the natural\ngradient (degrees)", xlim=(0, None))
    return lines


def plot_damping_path(ax: Axes, path: pd.DataFrame) -> Lines:
    """The same angle, over the damping.

    Args:
        ax: Where to draw.
        path: Columns damping and cosine, one row per unit and damping, at one epoch.
    """
    lines = plot_over(ax, _angle(path, "damping"), "angle", x="damping")
    ax.set(xlabel="damping (of trace A / d)", xscale="log")
    return lines


def plot_per_layer(ax: Axes, frame: pd.DataFrame, value: str) -> Lines:
    """A column's mean over the units of each layer, the layers from input to output.

    Args:
        ax: Where to draw.
        frame: Columns layer and ``value``, one row per unit, at one epoch.
        value: The column.
    """
    layers = frame["layer"].unique().tolist()
    mean = frame.groupby(["activation", "seed", "layer"])[value].mean().reset_index()
    mean["position"] = mean["layer"].map(layers.index)
    lines = plot_over(ax, mean, value, x="position")
    short = [layer.removeprefix("hidden").replace("output", "out") for layer in layers]
    ax.set_xticks(range(len(layers)), short)
    ax.set(xlabel="layer", ylim=(0, None))
    return lines


def plot_distribution(
    ax: Axes, frame: pd.DataFrame, value: str, *, scale: Literal["linear", "log", "asinh"]
) -> Lines:
    """Share of units, all seeds together, on which a column is at most x.

    Args:
        ax: Where to draw.
        frame: One row per unit; units without a value (dead ones) are left out.
        value: The column.
        scale: Of the values' axis; asinh is logarithmic on both sides of 0.
    """
    lines = {}
    for activation, rows in _by_activation(frame):
        values = np.sort(rows[value].dropna().to_numpy())
        share = np.arange(1, len(values) + 1) / len(values)
        drawn = ax.step(values, share, where="post", **look(activation, len(values)))
        (lines[activation],) = drawn
    ax.set(ylim=(0, 1), xscale=scale)
    if scale == "asinh":
        decades = [10.0**exponent for exponent in range(1, 9)]
        ax.xaxis.set_major_locator(FixedLocator([*(-d for d in decades), 0, *decades]))
    return lines


def plot_over(ax: Axes, frame: pd.DataFrame, value: str, *, x: str, style: Style = "-") -> Lines:
    """Mean over seeds ± one standard deviation, over another column.

    On axes that are already logarithmic the ribbon does not go below the lowest seed: mean - sd may
    be negative.

    Args:
        ax: Where to draw.
        frame: Columns ``x`` and ``value``, one row per activation, seed and x.
        value: The column to draw.
        x: The column it is drawn over.
        style: Solid lines have full markers, dashed ones hollow markers.
    """
    lines = {}
    for activation, rows in _by_activation(frame):
        over_seeds = rows.groupby(x)[value].agg(["mean", "std", "min"]).fillna({"std": 0.0})
        at, mean, sd = over_seeds.index, over_seeds["mean"], over_seeds["std"]
        drawn = ax.plot(at, mean, **look(activation, len(at)) | STYLES[style])
        (lines[activation],) = drawn
        low = np.maximum(mean - sd, over_seeds["min"]) if ax.get_yscale() == "log" else mean - sd
        ax.fill_between(at, low, mean + sd, color=COLOURS[activation], alpha=0.2, linewidth=0)
    return lines


def tick_plainly(ax: Axes) -> None:
    """Write plain numbers at the ticks of a logarithmic y axis, after drawing."""
    low, high = ax.get_ylim()
    subs = (1.0, 2.0, 5.0) if high / low < 100 else (1.0,)
    few, many = MaxNLocator(4), LogLocator(subs=subs, numticks=8)
    ax.yaxis.set_major_locator(few if high / low < 4 else many)
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_locator(LogLocator(subs=tuple(range(1, 10))))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _by_activation(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    present = [name for name in COLOURS if (frame["activation"] == name).any()]
    return [(name, frame[frame["activation"] == name]) for name in present]


def look(activation: str, points: int) -> dict[str, Any]:
    """Options of ``Axes.plot`` for an activation's curve of that many points."""
    return {
        "color": COLOURS[activation],
        "marker": MARKERS[activation],
        "markevery": max(1, points // 8),
        "markersize": 3.2,
        "linewidth": 1.1,
        "label": label(activation),
    }


def label(activation: str) -> str:
    """How tables and legends call an activation; "own" is whatever a network was published with."""
    return "as published" if activation == "own" else ACTIVATIONS[activation].label


def degrees(cosine: pd.Series) -> NDArray[Any]:
    """Turn cosines, which rounding may have brought beyond ±1, into angles in degrees."""
    return np.degrees(np.arccos(cosine.clip(-1, 1).to_numpy()))


def _angle(path: pd.DataFrame, x: str) -> pd.DataFrame:
    angles = path.assign(angle=degrees(path["cosine"]))
    return angles.groupby(["activation", "seed", x])["angle"].mean().reset_index()
