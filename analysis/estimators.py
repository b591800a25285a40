"""What do drawn labels and random signs cost in truth? The spread of c, and the bias of s and k.

    python analysis/estimators.py

measures the same cases again and again by each estimator of D, beside the exact one: a network on
the digits before and after training, and a small problem of few cases (40, of 5 inputs). About a
minute on one core. Writes table.md, table.csv and config.json to ``<out>``; feeds no figure.
"""

import time
from collections.abc import Hashable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import tyro
from tables import markdown, save
from torch import Tensor, nn

from unitfisher import Monitor
from unitfisher.experiments import load, mlp, probe, scripts, train
from unitfisher.experiments.markdown import spread
from unitfisher.provenance import provenance

ESTIMATORS = ("mc", "rademacher", "top-rademacher")
NAMES = {
    "exact": "exact",
    "mc": "drawn labels",
    "rademacher": "random signs",
    "top-rademacher": "top class, signs",
}
GUIDE = """\
Columns are the backward columns of one measurement. Spread of c: its standard deviation over
repetitions, relative. s and k contain an inverse: E(s) / s and E(k) - k are their bias; the exact
row has the size of k, and n_eff. Told / true: the standard errors that measurements tell, root mean
square, over the standard deviation there is. All are medians over hidden units; ± is the standard
error of a unit's mean over repetitions."""


@dataclass(frozen=True)
class Config:
    """Compare the estimators of D."""

    columns: tuple[int, ...] = (1, 4, 16)
    """Random columns of a measurement."""
    repetitions: int = 40
    """Measurements by each estimator."""
    hidden: tuple[int, ...] = (32, 32)
    """Widths of the network on the digits."""
    epochs: int = 60
    """Passes over the digits for the trained one."""
    cases: int = 512
    """Training cases that it is measured on."""
    damping: float = 1e-3
    """For the digits; the small problem has none."""
    seed: int = 0
    """Of weights, batches, labels and signs."""
    out: Path = Path("runs/estimators")
    """Folder that receives the table."""

    def __post_init__(self) -> None:
        if self.repetitions < 2 or min(self.columns) < 1:
            raise ValueError("repetitions must be 2 or more, columns 1 or more")


class Problem(NamedTuple):
    """A network, the cases it is measured on, and the damping there."""

    name: str
    model: nn.Module
    x: Tensor
    damping: float


def main(config: Config) -> int:
    """Measure, print and save the table."""
    torch.set_num_threads(1)
    rows = [row for problem in problems(config) for row in compared(problem, config)]
    table = pd.DataFrame(rows)
    made = provenance({**vars(config), "out": None})
    conditions = (
        f"seed {config.seed}, {config.repetitions} repetitions; {made['device']}; "
        f"torch {made['versions']['torch']}, unitfisher {made['versions']['unitfisher']}; "
        f"{time.process_time():.0f} s of one core.\n\n{GUIDE}\n"
    )
    written = f"{conditions}\n{markdown(readable(table))}"
    save(table, written, made, config.out)
    return 0


def problems(config: Config) -> Iterator[Problem]:
    """Networks in double precision, so that only the estimators' error remains."""
    generator = torch.Generator().manual_seed(config.seed)
    x = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    yield Problem("40 cases, 5 inputs", mlp([5, 20, 10], "elu", generator).double(), x, 0.0)
    data = load("digits")
    sizes = [data.train_x.shape[1], *config.hidden, data.classes]
    model = mlp(sizes, "elu", generator)
    x = probe(data, config.cases, generator)[0].double()
    for epoch in train(model, data, config.epochs, generator):
        if epoch in (0, config.epochs):
            name = "digits, trained" if epoch else "digits, untrained"
            yield Problem(name, deepcopy(model).double(), x, config.damping)


def compared(problem: Problem, config: Config) -> Iterator[dict[str, object]]:
    """One row for the exact Fisher, then one for each estimator and number of columns."""
    (exact,) = repeated(problem, 1, config.seed, fisher="exact")
    classes = problem.model(problem.x[:1]).shape[1]
    yield {"problem": problem.name, "fisher": "exact", "columns": classes - 1, **sizes_of(exact)}
    for fisher in ESTIMATORS:
        for samples in config.columns:
            drawn = list(
                repeated(problem, config.repetitions, config.seed, fisher=fisher, samples=samples)
            )
            columns = samples + (fisher == "top-rademacher")
            row = {"problem": problem.name, "fisher": fisher, "columns": columns}
            yield row | errors(drawn, exact)


def repeated(
    problem: Problem, times: int, seed: int, *, fisher: str, samples: int = 1
) -> Iterator[dict[str, Tensor]]:
    """Measure ``times`` times; yield each quantity of all hidden units, layer after layer."""
    options: dict[str, Any] = {
        "damping": problem.damping,
        "seed": seed,
        "fisher": fisher,
        "samples": samples,
    }
    with Monitor(problem.model, "hidden*", **options) as monitor:
        for _ in range(times):
            layers = monitor.measure(problem.x).values()
            yield {name: torch.cat([getattr(m, name) for m in layers]) for name in QUANTITIES}


QUANTITIES = ("c", "s", "k", "c_error", "s_error", "k_error", "n_eff")


def sizes_of(exact: dict[str, Tensor]) -> dict[str, float]:
    return {"size_of_k": median(exact["k"].abs()), "n_eff": median(exact["n_eff"])}


def errors(drawn: list[dict[str, Tensor]], exact: dict[str, Tensor]) -> dict[str, float]:
    """Spread and bias over repetitions, and reported standard errors over the true ones."""
    values = {name: torch.stack([one[name] for one in drawn]) for name in drawn[0]}
    sd = {name: values[name].std(0) for name in ("c", "s", "k")}
    told = {name: values[f"{name}_error"].square().mean(0).sqrt() / sd[name] for name in sd}
    root = len(drawn) ** 0.5
    return {
        "spread_of_c": median(sd["c"] / exact["c"]),
        "s_ratio": median(values["s"].mean(0) / exact["s"]),
        "s_ratio_error": median(sd["s"] / exact["s"]) / root,
        "k_bias": median(values["k"].mean(0) - exact["k"]),
        "k_bias_error": median(sd["k"]) / root,
        **{f"told_{name}": median(ratio) for name, ratio in told.items()},
    }


def median(x: Tensor) -> float:
    """Median over the living units; dead ones are NaN."""
    return float(x.nanmedian())


def readable(table: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame([readable_row(row) for row in table.to_dict("records")]).fillna("")


def readable_row(row: Mapping[Hashable, Any]) -> dict[str, str]:
    first = {"problem": row["problem"], "estimator": NAMES[row["fisher"]]}
    first["columns"] = str(row["columns"])
    if row["fisher"] == "exact":
        exact = f"k of size {row['size_of_k']:.2g}", f"n_eff = {row['n_eff']:.0f}"
        return first | {"spread of c": "0", "E(s) / s": exact[1], "E(k) - k": exact[0]}
    told = {f"told / true: {name}": f"{row[f'told_{name}']:.2f}" for name in ("c", "s", "k")}
    return first | {
        "spread of c": f"{100 * row['spread_of_c']:.1f} %",
        "E(s) / s": spread(row["s_ratio"], row["s_ratio_error"]),
        "E(k) - k": spread(row["k_bias"], row["k_bias_error"]),
        **({name: cell.replace("nan", "-") for name, cell in told.items()}),
    }


if __name__ == "__main__":
    scripts.run(lambda: main(tyro.cli(Config, description=GUIDE)), Config)
