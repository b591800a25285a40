"""Reconstruction error of autoencoders on MNIST at fixed rates (the paper's figure 3).

python analysis/train.py --preset mnist-autoencoder --data-root DIR
python paper_figs/summaries.py runs/mnist-autoencoder --name mnist-autoencoder
python paper_figs/autoencoder.py
"""

import numpy as np
import pandas as pd
import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from summary import TRAINING_LOSS, Summary

from unitfisher.experiments import plotting
from unitfisher.experiments.panels import panels

ERRORS = {
    "reconstruction": "½ Σ error² per image",
    "bernoulli-reconstruction": "cross-entropy per image (nats)",
}


def draw(name: str = "mnist-autoencoder") -> Figure:
    """Training set above, test set below, a column for each rate."""
    summary = Summary.read(name)
    error = ERRORS[summary.config["task"]]
    rates = sorted(summary.training["rate"].unique(), reverse=True)
    figure, axes = panels(2, len(rates), 1.6, sharex="all", sharey="row")
    lines: plotting.Lines = {}
    for row, value, on in zip(axes, ("train_loss", "test_loss"), ("training", "test"), strict=True):
        for ax, rate in zip(row, rates, strict=True):
            lines |= plotting.plot_over(ax, _medians(summary, rate, value), value, x="epoch")
        for ax in row:
            ax.set_yscale("log")
            plotting.tick_plainly(ax)
        row[0].set_ylabel(f"{on} set\n{error}")
    for ax, rate in zip(axes[0], rates, strict=True):
        ax.set_title(f"rate {rate:g}")
        _name_diverged(ax, summary, rate)
    for ax in axes[-1]:
        style.count(ax, "epoch")
    over = "median over seeds, a diverged network's error being infinite"
    notes = [summary.conditions, over if summary.seeds > 1 else summary.spread]
    notes += [TRAINING_LOSS.replace("loss", "set", 1)]
    return style.finish(figure, lines, "; ".join(notes))


def _medians(summary: Summary, rate: float, value: str) -> pd.DataFrame:
    """A row per activation and epoch after the first step; no value where most seeds diverged."""
    training = summary.training
    trained = training[(training["epoch"] > 0) & (training["rate"] == rate)]
    ranked = trained.assign(**{value: trained[value].fillna(np.inf)})
    median = ranked.groupby(["activation", "epoch"])[value].median()
    return median.where(np.isfinite(median)).reset_index()


def _name_diverged(ax: Axes, summary: Summary, rate: float) -> None:
    lost = summary.diverged[summary.diverged["rate"] == rate]
    names = [
        f"{plotting.label(str(name))} ({seeds} of {summary.seeds})"
        for name, seeds in lost["activation"].value_counts(sort=False).items()
    ]
    if names:
        told = "\n".join(["diverged:", *names])
        ax.text(0.97, 0.97, told, ha="right", va="top", fontsize=6.5, transform=ax.transAxes)


if __name__ == "__main__":
    style.script(lambda: print(style.save(draw, "autoencoder")))
