"""The activation functions that are compared (the paper's figure 1), and their slopes.

python paper_figs/activation_functions.py
"""

import style
import torch
from matplotlib.figure import Figure

from unitfisher.experiments import ACTIVATIONS, plotting
from unitfisher.experiments.panels import panels

SHOWN = ("relu", "lrelu", "srelu", "elu")


def draw() -> Figure:
    """Function left, derivative right."""
    figure, ((left, right),) = panels(1, 2, 1.9)
    x = torch.linspace(-4, 2.5, 601, dtype=torch.float64, requires_grad=True)
    lines = {}
    for name in SHOWN:
        y = ACTIVATIONS[name].module()(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
        look = plotting.look(name, len(x)) | {"markevery": 100}
        (lines[name],) = left.plot(x.detach(), y.detach(), **look)
        right.plot(x.detach(), slope, **look)
    for ax in (left, right):
        ax.axhline(0, color="0.7", linewidth=0.6, zorder=0)
        ax.axvline(0, color="0.7", linewidth=0.6, zorder=0)
        ax.set_xlabel("preactivation")
    left.set_ylabel("activation")
    right.set_ylabel("slope")
    return style.finish(figure, lines, "LReLU: slope 0.1; SReLU: max(-1, x); ELU: α = 1")


if __name__ == "__main__":
    style.script(lambda: print(style.save(draw, "activation_functions")))
