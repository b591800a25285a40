"""How often is a loader read where a layer's sums do not fit in memory?

    python analysis/passes.py

measures one layer over loaders of several lengths, on random inputs and on what a network that has
learnt the digits feeds it, at several dampings: half a minute on one core. Counts how often the
loader is read. Writes table.md, table.csv and config.json to ``<out>``; feeds no figure.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
import tyro
from tables import markdown, save
from torch import Tensor, nn

from unitfisher import Monitor
from unitfisher.experiments import load, mlp, scripts, train
from unitfisher.provenance import provenance


@dataclass(frozen=True)
class Config:
    """Count the passes over a loader."""

    width: int = 128
    """Inputs and units of the layer."""
    lengths: tuple[float, ...] = (1, 2, 4, 8)
    """Cases of the loader, in inputs of the layer."""
    dampings: tuple[float, ...] = (0.1, 0.01, 0.001)
    """Relative."""
    epochs: int = 20
    """Passes over the digits while the network learns them."""
    batch: int = 64
    """Cases of a batch."""
    seed: int = 0
    """Of weights, inputs and batches."""
    out: Path = Path("runs/passes")
    """Folder that receives the table."""

    def __post_init__(self) -> None:
        if self.width < 96 or min(self.lengths) <= 0:
            raise ValueError("width must be 96 or more (smaller sums fit), lengths above 0")


class Problem(NamedTuple):
    """A layer, what comes after it, and the cases that it is fed with."""

    name: str
    model: nn.Module
    inputs: Tensor


class Counted:
    """A loader that counts how often it is read."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self.batches, self.times = batches, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.times += 1
        return iter(self.batches)


def main(config: Config) -> int:
    """Measure, print and save the table."""
    torch.set_num_threads(1)
    logging.getLogger("unitfisher").setLevel(logging.ERROR)  # else each Monitor shows its plan
    table = pd.DataFrame([row for problem in problems(config) for row in read(problem, config)])
    made = provenance({**vars(config), "out": None})
    shown = table.assign(
        passes=table["passes"].astype(str)
        + table["converged"].map({True: "", False: " (some not)"})
    ).pivot(index=["inputs", "cases / inputs"], columns="damping", values="passes")
    conditions = (
        f"Times that a loader is read for s and k of one layer of {config.width} units with "
        f"{config.width} inputs, by damping; seed {config.seed}, {made['device']}, torch "
        f"{made['versions']['torch']}. In brackets: some unit is not converged by then.\n"
    )
    dampings = sorted(table["damping"].unique(), reverse=True)
    shown = shown[dampings].rename(columns=lambda x: f"damping {x:g}")
    written = f"{conditions}\n{markdown(shown.reset_index().astype(str))}"
    save(table, written, made, config.out)
    return 0


def problems(config: Config) -> Iterator[Problem]:
    """The same layer, fed at random and by a network that has learnt."""
    generator = torch.Generator().manual_seed(config.seed)
    data, width, cases = load("digits"), config.width, round(max(config.lengths) * config.width)
    untrained = mlp([width, width, data.classes], "elu", generator)
    yield Problem("random", untrained, torch.randn(cases, width, generator=generator))
    model = mlp([data.train_x.shape[1], width, width, data.classes], "elu", generator)
    for _ in train(model, data, config.epochs, generator):
        pass
    with torch.no_grad():
        learnt = model[:2](data.train_x)
    order = torch.randperm(len(learnt), generator=generator)[:cases]
    yield Problem("of digits, learnt", model[2:], learnt[order])


def read(problem: Problem, config: Config) -> Iterator[dict[str, object]]:
    """Measure over a loader of each length, with too little memory for its sums."""
    first = next(name for name, _ in problem.model.named_children())
    sums = 8 * config.width**3
    for length in config.lengths:
        cases = problem.inputs[: round(length * config.width)]
        for damping in config.dampings:
            loader = Counted(cases.split(config.batch))
            with Monitor(problem.model, first, damping=damping, memory=sums // 2) as monitor:
                (found,) = monitor.measure(loader).values()
            if found.route != "passes":
                raise RuntimeError(f"{problem.name}: the sums fit, so nothing is read again")
            row = {"inputs": problem.name, "cases / inputs": length, "damping": damping}
            converged = bool(found.converged[~found.dead].all())
            yield row | {"passes": loader.times, "converged": converged}


if __name__ == "__main__":
    scripts.run(lambda: main(tyro.cli(Config)), Config)
