"""The paper's table of test errors on CIFAR-10 and CIFAR-100: the published ones, and ours.

    python paper_figs/cifar_table.py

draws it, and writes it as Markdown too. Published errors are read from
published.toml, ours from all committed tables of these data sets.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import NamedTuple

import numpy as np
import style
import summary
from matplotlib.figure import Figure
from summary import Summary

from unitfisher.experiments import plotting
from unitfisher.experiments.markdown import markdown_table, spread
from unitfisher.experiments.panels import FOOT as FONT
from unitfisher.experiments.panels import PAGE, panels

DATASETS = {"cifar-10": "CIFAR-10", "cifar-100": "CIFAR-100"}
NETWORKS = {"cifar11": "11 convolutions", "cifar18": "18 convolutions"}
ERRORS = [f"{dataset}\n{by}" for dataset in DATASETS.values() for by in ("published", "ours")]
HEAD = ("network", "augmented", *ERRORS)
PUBLISHED = (2, 4)  # columns
NONE = "–"
DECIMALS = 2  # as published; one fewer where only part of the test set was evaluated
LINE = 0.15  # inches of height


class Kind(NamedTuple):
    """The networks of a row."""

    network: str
    activation: str
    norm: str
    augmented: bool

    @property
    def label(self) -> str:
        norm = "" if self.norm == "none" else f", {self.norm} norm"
        network = NETWORKS.get(self.network, self.network)
        return f"{plotting.label(self.activation)}, {network}{norm}"


Errors = dict[str, str]  # by data set


def rows(recorded: Sequence[Summary]) -> list[list[str]]:
    """Published rows in the paper's order, each beside ours; then ours that have no such row."""
    ours = _ours(recorded)
    table = []
    for row in style.published()["cifar"]:
        kind = Kind(row.get("network"), row.get("activation", "relu"), "none", row["augmented"])
        errors = {d: spread(row[d], row.get("sd", nan), DECIMALS) for d in DATASETS if d in row}
        table.append(_row(row["label"], kind, errors, ours.pop(kind, {})))
    return table + [_row(kind.label, kind, {}, errors) for kind, errors in ours.items()]


def draw() -> Figure:
    """Typeset the table; published values in red italics."""
    recorded = _recorded()
    table = rows(recorded)
    widths = [max(11, *map(len, column)) + 1 for column in zip(*table, strict=True)]
    *lefts, total = np.cumsum([0, *widths])
    figure, ((ax,),) = panels(1, 1, LINE * (len(table) + 3), width=PAGE)
    ax.set(xlim=(0, total), ylim=(len(table) - 0.5, -2))
    ax.axis("off")
    for y in (-2, -0.5, len(table) - 0.5):
        ax.axhline(y, color="0.2", linewidth=0.6, clip_on=False)
    for left, text in zip(lefts, HEAD, strict=True):
        ax.text(left, -1.2, text, va="center", fontsize=FONT, fontweight="bold")
    for y, row in enumerate(table):
        for column, (left, text) in enumerate(zip(lefts, row, strict=True)):
            red = {"color": style.PUBLISHED, "style": "italic"} if _published(column, text) else {}
            ax.text(left, y, text, va="center", fontsize=FONT, **red)
    return style.finish(figure, {}, "; ".join(_notes(recorded)))


def markdown() -> str:
    """The same table as text; published values in italics."""
    recorded = _recorded()
    head = [cell.replace("\n", ", ") for cell in HEAD]
    lines = [
        [f"*{text}*" if _published(column, text) else text for column, text in enumerate(row)]
        for row in rows(recorded)
    ]
    notes = "".join(f"- {note}\n" for note in _notes(recorded))
    return f"{markdown_table(head, lines)}\n{notes}"


def write() -> Path:
    """Write the text beside the figures."""
    style.FIGURES.mkdir(exist_ok=True)
    path = style.FIGURES / "cifar_table.md"
    path.write_text(markdown())
    return path


def _recorded() -> list[Summary]:
    names = sorted(file.parent.name for file in summary.FOLDER.glob("*/provenance.json"))
    return [s for s in map(Summary.read, names) if s.config["dataset"] in DATASETS]


def _ours(recorded: Sequence[Summary]) -> dict[Kind, Errors]:
    ours: dict[Kind, Errors] = defaultdict(dict)
    for s in (each.at_one_rate() for each in recorded):
        config, final = s.config, s.final
        for name in reversed(plotting.COLOURS):
            errors = final.loc[final["activation"] == name, "test_error"]
            if len(errors):
                kind = Kind(config["network"], name, config["norm"], config["augmented"])
                decimals = DECIMALS - bool(config.get("tested"))
                error = spread(errors.mean(), errors.std(), decimals)
                ours[kind][config["dataset"]] = f"{error} ({s.outcome})"
    return ours


def _row(label: str, kind: Kind, published: Errors, ours: Errors) -> list[str]:
    errors = [by.get(dataset, NONE) for dataset in DATASETS for by in (published, ours)]
    return [label, "yes" if kind.augmented else "no", *errors]


def _sampled(s: Summary) -> str:
    """Standard error of an error that was measured on part of the test set."""
    if not (cases := s.config.get("tested")):
        return ""
    share = s.final["test_error"].clip(0, 100) / 100
    error = 100 * np.sqrt(share * (1 - share) / cases).max()
    return f"; on so few test cases an error is known to ± {error:.1f} (one standard error)"


def _published(column: int, text: str) -> bool:
    return column in PUBLISHED and text != NONE


def _notes(recorded: Sequence[Summary]) -> Iterator[str]:
    published = style.published()
    yield f"test error in %; italics: published ({'; '.join(published['source'].values())})"
    yield from (f"{row['label']}: {row['note']}" for row in published["cifar"] if "note" in row)
    names: dict[str, str] = {}  # of the first training of these settings, but for normalisation
    for s in (each.at_one_rate() for each in recorded):
        plain = replace(s, provenance=s.provenance | {"config": s.config | {"norm": "none"}})
        first = names.setdefault(plain.settings, s.name)
        as_first = f"as {first} with {s.config['norm']} norm; {s.achieved}"
        yield f"ours, {s.name}: {s.conditions if first == s.name else as_first}{_sampled(s)}"
    if not recorded:
        yield "none of ours is recorded yet"


if __name__ == "__main__":
    style.script(lambda: print(style.save(draw, "cifar_table"), write(), sep="\n"))
