"""Training loss, top-5 and top-1 error on ImageNet against iterations (the paper's figure 6).

python analysis/train.py --preset imagenet-15 --data-root DIR
python paper_figs/summaries.py runs/imagenet-15 --name imagenet-15
python paper_figs/imagenet.py
"""

import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from summary import TRAINING_LOSS, Summary

from unitfisher.experiments import plotting
from unitfisher.experiments.panels import panels

VALUES = {
    "train_loss": "training loss\n(cross-entropy, nats)",
    "test_top5_error": "top-5 error (%)\nof validation images",
    "test_error": "top-1 error (%)\nof validation images",
}


def draw(name: str = "imagenet-15") -> Figure:
    """Loss, top-5 error, top-1 error, from left to right."""
    summary = Summary.read(name).at_one_rate()
    figure, (axes,) = panels(1, 3, 2.1)
    for ax, (value, label) in zip(axes, VALUES.items(), strict=True):
        lines = plotting.plot_over(ax, summary.training, value, x="iteration")
        ax.set_ylabel(label)
        style.count(ax, "iteration")
    for ax in axes[1:]:
        ax.set_ylim(0, 104)  # whole markers
    notes = [summary.conditions, summary.spread, TRAINING_LOSS]
    notes += [_published(axes[1], summary.done)]
    return style.finish(figure, lines, "; ".join(notes))


def _published(ax: Axes, done: int) -> str:
    """Mark where the published curves cross a top-5 error, where our axis goes so far."""
    at = style.published()["imagenet"]
    crossings = {"elu": at["elu"], "relu": at["relu"]}
    reached = {name: step for name, step in crossings.items() if step <= done}
    for name, step in reached.items():
        style.mark(ax, step, at["error"], name)
    if reached:
        return "red, hollow: published, where these curves reach a top-5 error of 20 %"
    told = f"ELU after {at['elu']:,} iterations, ReLU after {at['relu']:,}"
    return (
        f"published, of 1,000 classes at full size and beyond this axis: {at['error']} % top-5 "
        f"error is reached by {told}"
    )


if __name__ == "__main__":
    style.script(lambda: print(style.save(draw, "imagenet")))
