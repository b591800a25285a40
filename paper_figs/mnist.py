"""Mean activation and loss on MNIST (the paper's figure 2).

python analysis/train.py --preset mnist --data-root DIR
python paper_figs/summaries.py runs/mnist --name mnist
python paper_figs/mnist.py
"""

import style
from matplotlib.figure import Figure
from summary import TRAINING_LOSS, Summary

from unitfisher.experiments import plotting
from unitfisher.experiments.panels import panels


def draw() -> Figure:
    """Median over units of the mean activation; training loss; test loss."""
    summary = Summary.read("mnist").at_one_rate()
    training = summary.training
    figure, ((left, middle, right),) = panels(1, 3, 1.8)
    lines = plotting.plot_over(left, training, "mean_activation", x=summary.time)
    left.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    left.set_ylabel("mean activation\n(median over hidden units)")
    plotting.plot_loss(middle, training, "train", x=summary.time)
    plotting.plot_loss(right, training, "test", x=summary.time)
    for ax in (left, middle, right):
        style.count(ax, summary.time)
    notes = [summary.conditions, summary.spread, TRAINING_LOSS]
    return style.finish(figure, lines, "; ".join(notes))


if __name__ == "__main__":
    style.script(lambda: print(style.save(draw, "mnist")))
