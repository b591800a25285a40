"""From full records to the small tables that are committed and drawn.

    python paper_figs/summaries.py runs/mnist --name mnist

reads every record below a folder of ``analysis/train.py`` and writes ``paper_figs/tables/<name>``:

    training.csv      a row per network and epoch: losses, errors, median mean activation
    layers.csv        a row per network, measured epoch, layer and damping: means over units
    changes.csv       a row per network and layer: deciles over units of the variance of the
                      changes of their mean activation from epoch to epoch
    provenance.json   configuration, versions, device, times
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import tyro

TABLES = Path(__file__).parent / "tables"
NETWORK = ["activation", "rate", "seed"]
MEDIANS = ["k", "sc", "corrected_mean_norm", "damping_share", "n_eff"]  # heavy tails over units
MEANS = ["cosine", "bias_shift_share_natural", "bias_shift_share_gradient", "mean_share", "dead"]
DIGITS = 5  # significant, in the files


@dataclass(frozen=True)
class Summary:
    """What the figures of one training are drawn from."""

    training: pd.DataFrame
    layers: pd.DataFrame
    changes: pd.DataFrame
    provenance: dict[str, Any]

    @classmethod
    def of(cls, folders: Sequence[Path]) -> "Summary":
        """Summarise all records below some folders.

        Raises:
            FileNotFoundError: There are none.
        """
        runs = sorted({file.parent for folder in folders for file in folder.rglob("config.json")})
        if not runs:
            raise FileNotFoundError(f"no records below {', '.join(map(str, folders))}")
        of_runs = [list(_summarised(run)) for run in runs]
        training, layers, changes = (
            pd.concat(parts, ignore_index=True) for parts in zip(*of_runs, strict=True)
        )
        return cls(training, layers, changes, _provenance(runs, training))

    @classmethod
    def read(cls, name: str) -> "Summary":
        """Read committed tables.

        Raises:
            FileNotFoundError: They were not made yet; says how.
        """
        folder = TABLES / name
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is missing: make it with python analysis/train.py --preset {name}, "
                f"then python paper_figs/summaries.py runs/{name} --name {name}"
            )
        tables = [pd.read_csv(folder / f"{part}.csv") for part in ("training", "layers", "changes")]
        return cls(*tables, json.loads((folder / "provenance.json").read_text()))

    def write(self, name: str) -> Path:
        folder = TABLES / name
        folder.mkdir(parents=True, exist_ok=True)
        for part in ("training", "layers", "changes"):
            table: pd.DataFrame = getattr(self, part)
            table.to_csv(folder / f"{part}.csv", index=False, float_format=f"%.{DIGITS}g")
        (folder / "provenance.json").write_text(json.dumps(self.provenance, indent=2) + "\n")
        return folder

    @property
    def conditions(self) -> str:
        """One line for the foot of a figure: network, seeds, settings, device."""
        c, at = self.provenance["config"], self.provenance
        runs = [(width, len(list(same))) for width, same in groupby(c["hidden"])]
        hidden = "-".join(f"{n}×{width}" if n > 1 else str(width) for width, n in runs)
        seeds = len(self.training["seed"].unique())
        return (
            f"{c['dataset']}, hidden {hidden}, batch {c['batch_size']}, {at['epochs']} epochs, "
            f"{seeds} seeds; {at['device']}, torch {at['versions']['torch'].split('+')[0]}"
        )


def _summarised(run: Path) -> Iterator[pd.DataFrame]:
    config = json.loads((run / "config.json").read_text())["config"]
    network = {key: config[key] for key in NETWORK}
    activations = pd.read_parquet(run / "activations")
    training = pd.read_parquet(run / "training").drop(columns=["iteration"])
    median = activations.groupby("epoch")["mean"].median().rename("mean_activation")
    yield _of(network, training.merge(median.reset_index(), on="epoch"))
    yield _of(network, _by_layer(pd.read_parquet(run / "path"), activations))
    yield _of(network, _changes(activations))


def _of(network: dict[str, Any], table: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([pd.DataFrame(network, index=table.index), table], axis=1)


def _by_layer(path: pd.DataFrame, activations: pd.DataFrame) -> pd.DataFrame:
    groups = path.groupby(["epoch", "layer", "damping"])
    columns = groups[MEDIANS].median().join(groups[MEANS].mean())
    outputs = activations.groupby(["epoch", "layer"])["mean"].median().rename("mean_activation")
    return columns.reset_index().merge(outputs.reset_index(), on=["epoch", "layer"])


def _changes(activations: pd.DataFrame) -> pd.DataFrame:
    """Deciles over a layer's units of the variance, over epochs, of their mean's change."""
    by_unit = activations.pivot(index="epoch", columns=["layer", "unit"], values="mean")
    variance = by_unit.diff().iloc[1:].var(ddof=0)
    deciles = np.arange(0, 11) / 10
    table = variance.groupby(level="layer").quantile(deciles).rename("variance").reset_index()
    return table.rename(columns={"level_1": "share"})


def _provenance(runs: Sequence[Path], training: pd.DataFrame) -> dict[str, Any]:
    made = [json.loads((run / "config.json").read_text()) for run in runs]
    config = {k: v for k, v in made[0]["config"].items() if k not in NETWORK}
    for run, other in zip(runs, made, strict=True):
        if {k: v for k, v in other["config"].items() if k not in NETWORK} != config:
            raise ValueError(f"{run} was configured differently from {runs[0]}")
    last = training.groupby(NETWORK)[["epoch", "seconds", "monitoring"]].last()
    return {
        "config": config,
        "versions": made[0]["versions"],
        "device": made[0]["device"],
        "created": min(run["created"] for run in made),
        "networks": len(runs),
        "epochs": int(last["epoch"].min()),
        # of one process, which trains several networks side by side
        "seconds": float(last["seconds"].max()),
        "seconds_of_monitors": float(last["monitoring"].max()),
    }


def main(
    records: Annotated[tuple[Path, ...], tyro.conf.Positional],
    name: str,
) -> None:
    """Summarise records for the figures.

    Args:
        records: Folders of analysis/train.py.
        name: Of the folder in paper_figs/tables.
    """
    print(Summary.of(records).write(name))


if __name__ == "__main__":
    tyro.cli(main)
