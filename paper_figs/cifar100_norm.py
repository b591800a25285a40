"""ELU against each other activation, with and without batch normalisation (the paper's figure 5).

    python analysis/train.py --preset cifar100-11 --data-root DIR
    python paper_figs/summaries.py runs/cifar100-11 --name cifar100-11

and the same with ``--norm batch --out runs/cifar100-11-bn`` and the name cifar100-11-bn; then

    python paper_figs/cifar100_norm.py
"""

from collections.abc import Mapping

import significance
import style
from cifar100 import VALUES
from matplotlib.figure import Figure
from summary import NORMS, TRAINING_LOSS, Summary, together, with_and_without_norm

from unitfisher.experiments import plotting
from unitfisher.experiments.panels import panels


def draw(name: str = "cifar100-11") -> Figure:
    """Loss above, error below, a column for each activation beside ELU."""
    found = with_and_without_norm(name)
    present = {activation for s in found.values() for activation in s.training["activation"]}
    others = [activation for activation in plotting.COLOURS if activation in present - {"elu"}]
    figure, axes = panels(2, max(len(others), 1), 1.6, sharex="all", sharey="row")
    lines: plotting.Lines = {}
    for row, (value, label) in zip(axes, VALUES.items(), strict=True):
        for ax, other in zip(row, others, strict=False):
            for norm, summary in found.items():
                shown = summary.training[summary.training["activation"].isin(["elu", other])]
                look = style.NORMS[norm]
                lines = plotting.plot_over(ax, shown, value, x="iteration", style=look) | lines
        row[0].set_ylabel(label)
    for ax, other in zip(axes[0], others, strict=False):
        ax.set_title(f"ELU, {plotting.label(other)}")
    for ax in axes[-1]:
        style.count(ax, "iteration")
    notes = [*together(found), *(f"{norm}: not recorded" for norm in NORMS if norm not in found)]
    notes += [next(iter(found.values())).spread, TRAINING_LOSS, _tested(found)]
    return style.finish(figure, lines, "; ".join(notes), style.entries(style.NORMS))


def _tested(found: Mapping[str, Summary]) -> str:
    """Compare ELU without batch normalisation, as the paper does, with everything else."""
    finals = {
        f"{label} {norm}": errors
        for norm, summary in found.items()
        for label, errors in significance.final_errors(summary).items()
    }
    return significance.told(f"ELU {NORMS[0]}", finals)


if __name__ == "__main__":
    style.script(lambda: print(style.save(draw, "cifar100_norm")))
