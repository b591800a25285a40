"""Training loss and test error of the 11-convolution networks (the paper's figure 4).

python analysis/train.py --preset cifar100-11 --data-root DIR
python paper_figs/summaries.py runs/cifar100-11 --name cifar100-11
python paper_figs/cifar100.py
"""

import significance
import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from summary import TRAINING_LOSS, Summary

from unitfisher.experiments import plotting
from unitfisher.experiments.panels import panels

VALUES = {"train_loss": "training loss\n(cross-entropy, nats)", "test_error": "test error (%)"}

QUARTERS = {
    "all {} iterations": (0, 4),
    "first quarter of these": (0, 1),
    "last quarter of these": (3, 4),
}


def draw(name: str = "cifar100-11") -> Figure:
    """Loss above, error below: the whole training, its first and its last quarter."""
    summary = Summary.read(name).at_one_rate()
    figure, axes = panels(2, 3, 1.6)
    for row, (value, label) in zip(axes, VALUES.items(), strict=True):
        for ax, (start, stop) in zip(row, QUARTERS.values(), strict=True):
            quarters = 4 * summary.training["iteration"] / summary.done
            shown = summary.training[quarters.between(start, stop)]
            lines = plotting.plot_over(ax, shown, value, x="iteration")
            _mark_rates(ax, summary)
            style.count(ax, "iteration")
        row[0].set_ylabel(label)
    for ax, part in zip(axes[0], QUARTERS, strict=True):
        ax.set_title(part.format(f"{summary.done:,}"))
        ax.set_xlabel("")
    tested = significance.told("ELU", significance.final_errors(summary))
    notes = [summary.conditions, summary.spread, TRAINING_LOSS, tested]
    notes += _published(axes[1, 2], summary)
    return style.finish(figure, lines, "; ".join(notes))


def _mark_rates(ax: Axes, summary: Summary) -> None:
    """Draw a thin line at each step in view at which the learning rate changes."""
    first, last = ax.get_xlim()
    for step, *_ in summary.config["phases"]:
        if max(first, 0) < step < last:
            ax.axvline(step, color="0.8", linewidth=0.6, zorder=0)


def _published(ax: Axes, summary: Summary) -> list[str]:
    """Mark published errors where our training is as long as theirs; else state them."""
    dataset, network = summary.config["dataset"], summary.config["network"]
    same = [r for r in style.published()["cifar"] if r.get("network") == network]
    rows = [r for r in same if dataset in r and "iterations" in r]
    said = [f"{plotting.label(r['activation'])} {r[dataset]:.2f}" for r in rows]
    if not rows:
        return []
    after = rows[0]["iterations"]
    if summary.done < after:
        return [f"published, after {after:,} iterations: test error {', '.join(said)} %"]
    for row in rows:
        style.mark(ax, after, row[dataset], row["activation"])
    return [f"red, hollow: published, mean of 10 runs ({', '.join(said)} %)"]


if __name__ == "__main__":
    style.script(lambda: print(style.save(draw, "cifar100")))
