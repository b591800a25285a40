"""From the records of the runs to one number per run, and to a table a person can read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
from jobs import TABLES, Job

from unitfisher.experiments import ACTIVATIONS
from unitfisher.experiments.markdown import markdown_table, spread
from unitfisher.experiments.watching import OVER_UNITS

RUN = ["activation", "seed"]
When = Literal["through training", "at the end"]


@dataclass(frozen=True)
class Records:
    """The tables of all finished runs, each with the columns activation and seed."""

    activations: pd.DataFrame
    training: pd.DataFrame
    path: pd.DataFrame
    finished: pd.DataFrame

    @property
    def receiving(self) -> pd.DataFrame:
        """The rows of ``path`` for layers that see activations: all but the first."""
        return self.path[self.path["layer"] != "hidden1"]

    @property
    def last_epoch(self) -> int:
        return int(self.training["epoch"].max())


class Quantity(NamedTuple):
    """A row of the table: a column of the records and how it becomes one number per epoch."""

    name: str
    label: str
    damped: bool = False


MEASURED = (
    Quantity("mean_share", "mean share of incoming activations"),
    Quantity("bias_shift_share_gradient", "bias-shift share, gradient"),
    Quantity("n_eff", "n_eff (cases that carry a unit's Fisher)"),
    Quantity("bias_shift_share_natural", "bias-shift share, natural gradient", damped=True),
    Quantity("k", "k", damped=True),
    Quantity("sc", "s·c", damped=True),
    Quantity("corrected_mean_norm", "norm of the corrected mean", damped=True),
    Quantity("cosine", "cosine gradient, natural gradient", damped=True),
    Quantity("damping_share", "damping share of s", damped=True),
)
DEAD = Quantity("dead_percent", "dead units (%)")
SCORES = (
    Quantity("train_loss", "training loss"),
    Quantity("train_error", "training error (%)"),
    Quantity("test_loss", "test loss"),
    Quantity("test_error", "test error (%)"),
)
MEAN_ACTIVATION = Quantity("mean_activation", "mean activation (median over units)")
QUANTITIES = (MEAN_ACTIVATION, *MEASURED, DEAD, *SCORES)


def read(jobs: Sequence[Job]) -> Records:
    """Read the records of finished runs."""
    return Records(*(pd.concat([_read(job, table) for job in jobs]) for table in TABLES))


def _read(job: Job, table: str) -> pd.DataFrame:
    rows = pd.read_parquet(job.folder / table)
    return rows.assign(activation=job.config.activation, seed=job.config.seed)


def per_epoch(records: Records) -> pd.DataFrame:
    """Reduce over units and layers.

    Returns:
        Columns activation, seed, epoch, quantity, damping ("" where there is none) and value.
    """
    by_unit = records.activations.groupby([*RUN, "epoch"])["mean"].median()
    dead = records.path.groupby([*RUN, "epoch"])["dead"].mean() * 100
    frames = [_tidy(by_unit, MEAN_ACTIVATION), _tidy(dead, DEAD)]
    for quantity in SCORES:
        frames.append(_tidy(records.training.set_index([*RUN, "epoch"])[quantity.name], quantity))
    for quantity in MEASURED:
        keys = [*RUN, "epoch", *(["damping"] if quantity.damped else [])]
        over_units = records.receiving.groupby(keys)[quantity.name].agg(OVER_UNITS[quantity.name])
        frames.append(_tidy(over_units, quantity))
    return pd.concat(frames, ignore_index=True)


def _tidy(values: "pd.Series[float]", quantity: Quantity) -> pd.DataFrame:
    frame = values.rename("value").reset_index().assign(quantity=quantity.name)
    damping = frame["damping"].map("{:g}".format) if quantity.damped else ""
    return frame.assign(damping=damping)


def per_run(epochs: pd.DataFrame, when: When) -> pd.DataFrame:
    """Reduce over epochs: to the last, or to the mean over all that were recorded but epoch 0."""
    if when == "at the end":
        chosen = epochs[epochs["epoch"] == epochs["epoch"].max()]
    else:
        chosen = epochs[epochs["epoch"] > 0]
    over_epochs = chosen.groupby([*RUN, "quantity", "damping"])["value"].mean()
    return over_epochs.reset_index()


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds, in the table's order."""
    over_seeds = runs.groupby(["quantity", "damping", "activation"])["value"]
    table = over_seeds.agg(["mean", "std", "count"]).rename(columns={"std": "sd", "count": "seeds"})
    dampings = sorted(set(runs["damping"]) - {""}, key=float, reverse=True)
    present = [name for name in ACTIVATIONS if (runs["activation"] == name).any()]
    order = product(_rows(dampings), present)
    return table.loc[[(*row, activation) for row, activation in order]].reset_index()


def _rows(dampings: Sequence[str]) -> list[tuple[str, str]]:
    """List (quantity, damping): first what needs no damping, then each damping, then scores."""
    free = [(q.name, "") for q in (MEAN_ACTIVATION, *MEASURED) if not q.damped]
    damped = [(q.name, d) for d in dampings for q in MEASURED if q.damped]
    return [*free, *damped, *((q.name, "") for q in (DEAD, *SCORES))]


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """Write a summary as text: quantities down, activations across, mean ± sd."""
    labels = {quantity.name: quantity.label for quantity in QUANTITIES}
    cells = [spread(mean, sd) for mean, sd in zip(table["mean"], table["sd"], strict=True)]
    written = table.assign(
        cell=cells,
        quantity=table["quantity"].map(labels),
        column=[ACTIVATIONS[name].label for name in table["activation"]],
    )
    rows = ["quantity", "damping"]
    wide = written.pivot(index=rows, columns="column", values="cell")
    order = written[rows].drop_duplicates().itertuples(index=False, name=None)
    return wide.loc[list(order), written["column"].unique()].reset_index()


def markdown(table: pd.DataFrame) -> str:
    """Write a table of text as Markdown."""
    return markdown_table(list(map(str, table)), table.itertuples(index=False, name=None))


def save(table: pd.DataFrame, written: str, made: Mapping[str, Any], folder: Path) -> None:
    """Print the written table; save it as table.md, beside table.csv and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(written)
    (folder / "config.json").write_text(json.dumps(made, indent=2) + "\n")
    table.to_csv(folder / "table.csv", index=False)
    print(written)
