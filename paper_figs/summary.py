"""Small tables of one training, which figures are drawn from, and its conditions in words.

A summary is of one preset in one configuration, and has the preset's name; the same with batch
normalisation is another, ``<preset>-bn``. summaries.py makes them.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import settings

from unitfisher.experiments.plotting import label
from unitfisher.experiments.presets import PRESETS

FOLDER = Path(__file__).parent / "tables"
NORMALISED = "-bn"  # ends the name of a summary with batch normalisation
NORMS = ("without batch norm", "with batch norm")
NETWORK = ["activation", "rate", "seed"]
PARTS = ("training", "layers", "changes")
DIGITS = 5  # significant, in the files
SPREAD = "mean ± sd over seeds, on logarithmic axes not below the lowest seed"
TRAINING_LOSS = "training loss: mean over the steps since the evaluation before, as trained"
UNNORMALISED = (
    "with batch norm, the running statistics are the initial ones at iteration 0, where the "
    "network is thus the one without it"
)


@dataclass(frozen=True)
class Summary:
    """One training, of several networks."""

    name: str
    training: pd.DataFrame
    layers: pd.DataFrame
    changes: pd.DataFrame
    provenance: dict[str, Any]

    @classmethod
    def read(cls, name: str) -> "Summary":
        """Read committed tables.

        Raises:
            FileNotFoundError: They were not made yet; says how.
        """
        folder = FOLDER / name
        if not (folder / "provenance.json").exists():
            raise FileNotFoundError(f"no tables of {name}; make them with {_commands(name)}")
        training, layers, changes = (pd.read_csv(folder / f"{part}.csv") for part in PARTS)
        provenance = json.loads((folder / "provenance.json").read_text())
        provenance["config"] = settings.effective(provenance["config"])
        return cls(name, training, layers, changes, provenance)

    def write(self) -> Path:
        folder = FOLDER / self.name
        folder.mkdir(parents=True, exist_ok=True)
        for part in PARTS:
            table: pd.DataFrame = getattr(self, part)
            table.to_csv(folder / f"{part}.csv", index=False, float_format=f"%.{DIGITS}g")
        (folder / "provenance.json").write_text(json.dumps(self.provenance, indent=2) + "\n")
        return folder

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = self.provenance["config"]
        return config

    @property
    def time(self) -> Literal["epoch", "iteration"]:
        """The column that this training is counted in: one evaluation has one value."""
        counted = self.config.get("iterations") or self.config.get("every")
        return "iteration" if counted else "epoch"

    @property
    def rates(self) -> list[float]:
        return sorted(self.training["rate"].unique(), reverse=True)

    def at_one_rate(self, rate: float | None = None) -> "Summary":
        """Return the networks of one rate: the largest at which all stayed finite, if not given."""
        if rate not in self.rates:
            rate = max(set(self.rates) - set(self.diverged["rate"]), default=min(self.rates))
        tables = {part: getattr(self, part) for part in PARTS}
        shown = {part: table[table["rate"] == rate] for part, table in tables.items()}
        return replace(self, **shown, provenance=self.provenance | {"rates": self.rates})

    @property
    def done(self) -> int:
        """How far all networks got, in that unit."""
        return int(self.training.groupby(NETWORK)[self.time].max().min())

    @property
    def final(self) -> pd.DataFrame:
        """A row per network, of the last evaluation that all of them reached."""
        return self.training[self.training[self.time] == self.done]

    @property
    def diverged(self) -> pd.DataFrame:
        """A row per network whose loss became NaN or infinite, at the evaluation that saw it."""
        trained = self.training[self.training[self.time] > 0]
        lost = trained[~np.isfinite(trained["train_loss"])]
        return lost.groupby(NETWORK)[self.time].min().reset_index()

    @property
    def seeds(self) -> int:
        return len(self.training["seed"].unique())

    @property
    def spread(self) -> str:
        """How the seeds are shown."""
        return SPREAD if self.seeds > 1 else "a single seed: lines without spread"

    @property
    def conditions(self) -> str:
        """One line for the foot of a figure: settings, outcome, device."""
        return f"{self.settings}; {self.achieved}"

    @property
    def settings(self) -> str:
        """What was trained on what, and how."""
        rates = self.provenance.get("rates", [])
        others = [rate for rate in rates if rate not in self.rates]
        return settings.in_words(self.config, self.rates, others)

    @property
    def achieved(self) -> str:
        """How far that came, and on what device."""
        at = self.provenance
        torch = ", ".join(version.split("+")[0] for version in at["versions"]["torch"].split(", "))
        note = [at["note"]] if at.get("note") else []
        return "; ".join([self.outcome, *note, f"{at['device']}, torch {torch}"])

    @property
    def outcome(self) -> str:
        """Steps done, seeds, networks that have not begun, and those that diverged, in words."""
        networks, asked_for = (self.provenance.get(key, 0) for key in ("networks", "asked_for"))
        absent = [f"{networks} of {asked_for} networks"] if networks < asked_for else []
        seeds = f"{self.seeds} seed{'s' if self.seeds > 1 else ''}"
        return ", ".join([self._extent(), seeds, *absent, *self._losses()])

    def _extent(self) -> str:
        """Steps or epochs done, of those of the whole preset where these are more."""
        unit = f"{self.time}s"
        preset = PRESETS.get(self.name.removesuffix(NORMALISED))
        whole = max(self.done, self.config[unit] or 0, (preset and getattr(preset, unit)) or 0)
        return (
            f"{self.done:,} {unit}" if self.done == whole else f"{self.done:,} of {whole:,} {unit}"
        )

    def _losses(self) -> Iterator[str]:
        """For each rate: activations whose networks diverged, in how many seeds, and by when."""
        for rate, at in self.diverged.groupby("rate"):
            told = [
                f"{label(str(name))} ({len(rows)} of {self.seeds} "
                f"by {self.time} {rows[self.time].max():,})"
                for name, rows in at.groupby("activation")
            ]
            yield f"diverged at rate {rate:g}: {', '.join(told)}"


def with_and_without_norm(name: str) -> dict[str, Summary]:
    """Read a training without and with batch normalisation, by ``NORMS``, both at one rate.

    Raises:
        FileNotFoundError: There are tables of neither.
    """
    found: dict[str, Summary] = {}
    missing = []
    for norm, tables in zip(NORMS, (name, name + NORMALISED), strict=True):
        try:
            rate = next((s.rates[0] for s in found.values()), None)
            found[norm] = Summary.read(tables).at_one_rate(rate)
        except FileNotFoundError as error:
            missing.append(error)
    if not found:
        raise missing[0]
    return found


def together(found: Mapping[str, Summary]) -> list[str]:
    """Conditions for a figure of several trainings: those of the first, outcomes of the others."""
    first, *more = found.items()
    notes = [first[1].conditions, *(f"{norm}: {summary.outcome}" for norm, summary in more)]
    return [*notes, UNNORMALISED] if NORMS[1] in found else notes


def _commands(name: str) -> str:
    preset = name.removesuffix(NORMALISED)
    norm = f" --norm batch --out runs/{name}" if preset != name else ""
    return (
        f"python analysis/train.py --preset {preset}{norm}, "
        f"then python paper_figs/summaries.py runs/{name} --name {name}"
    )
