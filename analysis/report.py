"""The end of bias_shift.py: table, claims and figures, printed and saved."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import claims
import figures
import pandas as pd
import tables
from jobs import Job

from unitfisher.experiments.training import BATCH_SIZE, RATE
from unitfisher.experiments.watching import measured_epochs

RIBBONS = "Ribbons: ± sd, on logarithmic axes not below the lowest seed."


def report(jobs: Sequence[Job], folder: Path, seconds: float) -> None:
    """Print what finished runs say, and save it beside them.

    Args:
        jobs: Finished runs.
        folder: Receives table.csv, table.md, claims.md and figures.
        seconds: Wall time so far, for the record.
    """
    records = tables.read(jobs)
    epochs = tables.per_epoch(records)
    runs = {when: tables.per_run(epochs, when) for when in get_args(tables.When)}
    summaries = {when: tables.summary(frame) for when, frame in runs.items()}
    conditions = _conditions(jobs)
    drawn = figures.draw_all(records, folder / "figures", f"{conditions}{RIBBONS}")
    each = records.finished["seconds"].mean()
    conditions += f"{each:.0f} s a run, {seconds:.0f} s for those made now.\n"
    written = {when: _section(when, s) for when, s in summaries.items()}
    judged = f"## The paper's claims\n\n{claims.report(runs)}"

    together = pd.concat([s.assign(when=when) for when, s in summaries.items()])
    together.to_csv(folder / "table.csv", index=False)
    (folder / "table.md").write_text("\n".join([conditions, *written.values()]))
    (folder / "claims.md").write_text("\n".join([conditions, judged]))
    print("\n".join([conditions, written["through training"], judged]))
    print(f"At the end of training: {folder / 'table.md'}\nFigures: {drawn[0].parent}")


def _section(when: tables.When, summary: pd.DataFrame) -> str:
    title = "Averaged through training (all recorded epochs but 0)"
    title = "At the end of training" if when == "at the end" else title
    return f"## {title}\n\n{tables.markdown(tables.readable(summary))}"


def _conditions(jobs: Sequence[Job]) -> str:
    c = jobs[0].config
    machine = json.loads((jobs[0].folder / "config.json").read_text())
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("torch", "unitfisher"))
    seeds = ", ".join(map(str, sorted({job.config.seed for job in jobs})))
    epochs = ", ".join(map(str, measured_epochs(c.epochs, c.measurements)))
    return (
        f"{c.dataset}, {c.layers}×128 units, rate {RATE}, batch {BATCH_SIZE}, {c.epochs} epochs, "
        f"{len(jobs)} runs, seeds {seeds}; mean ± sd over seeds; training loss and error: of the "
        f"whole training set, after the epoch.\n"
        f"Fisher of {c.units} units per layer on {c.probe} training cases, after epochs {epochs}; "
        f"layers that see activations (all but the first).\n"
        f"{machine['device']}; {versions}.\n"
    )
