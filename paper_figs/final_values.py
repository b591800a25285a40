"""Losses and errors that a training has reached, in Markdown: mean ± sd over seeds.

python paper_figs/final_values.py mnist
"""

from collections.abc import Iterator
from typing import Annotated

import pandas as pd
import tyro
from summary import TRAINING_LOSS, Summary

from unitfisher.experiments import plotting, scripts
from unitfisher.experiments.markdown import markdown_table, spread

COLUMNS = {
    "train_loss": "training loss",
    "test_loss": "test loss",
    "test_error": "test error (%)",
    "test_top5_error": "top-5 error (%)",
    "mean_activation": "mean activation",
}
TOP5 = ("photographs",)  # data sets whose top-5 error is of interest


def markdown(summary: Summary) -> str:
    """A row per activation and rate; below, what was run where."""
    final = summary.final
    shown = [name for name in COLUMNS if name in final and final[name].notna().any()]
    if summary.config["dataset"] not in TOP5:
        shown = [name for name in shown if name != "test_top5_error"]
    head = ["network", "rate", *(COLUMNS[name] for name in shown)]
    return f"{markdown_table(head, _rows(final, shown))}\n{summary.conditions}; {TRAINING_LOSS}"


def _rows(final: pd.DataFrame, shown: list[str]) -> Iterator[list[str]]:
    for name in plotting.COLOURS:
        of_activation = final[final["activation"] == name]
        for rate, networks in of_activation.groupby("rate"):
            label = plotting.label(name)
            over_seeds = (spread(networks[v].mean(), networks[v].std()) for v in shown)
            yield [label, f"{rate:g}", *over_seeds]


def main(name: Annotated[str, tyro.conf.Positional]) -> None:
    """Print the table of committed tables.

    Args:
        name: The folder in paper_figs/tables.
    """
    print(markdown(Summary.read(name)))


if __name__ == "__main__":
    scripts.run(lambda: tyro.cli(main))
