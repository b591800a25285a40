"""Mean activation and loss on MNIST (the paper's figure 2).

python analysis/train.py --preset mnist --data-root DIR
python paper_figs/summaries.py runs/mnist --name mnist
python paper_figs/mnist.py
"""

import style
from matplotlib.figure import Figure
from summary import Summary

from unitfisher.experiments import plotting


def draw() -> Figure:
    """Median over units of the mean activation; loss in training and on the test set."""
    summary = Summary.read("mnist")
    training = summary.training
    figure, ((left, right),) = style.panels(1, 2)
    lines = plotting.plot_over(left, training, "mean_activation", x="epoch")
    left.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    left.set(xlabel="epoch", ylabel="mean activation\n(median over hidden units)")
    plotting.plot_loss(right, training)
    right.legend(handles=style.entries({"training": "-", "test": ":"}), frameon=False)
    return style.finish(figure, lines, f"{summary.conditions}; {summary.spread}")


if __name__ == "__main__":
    print(style.save(draw, "mnist"))
