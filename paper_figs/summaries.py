"""From full records to the small tables that are committed and drawn.

    python paper_figs/summaries.py runs/mnist --name mnist

reads every record below a folder of ``analysis/train.py``, finished or still growing, and writes
``paper_figs/tables/<name>``:

    training.csv      a row per network and evaluation: losses, errors, median mean activation
    layers.csv        a row per network, measurement, layer and damping: averages over units
    changes.csv       a row per network and layer: deciles over units of the variance of the
                      changes of their mean activation from evaluation to evaluation, that of
                      the untrained network left out
    provenance.json   configuration, versions, devices, times
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import settings
import tyro
from summary import NETWORK, Summary

from unitfisher.experiments import scripts
from unitfisher.experiments.watching import OVER_UNITS

RECORDED = ("training", "activations", "path")  # a network without one of them has not begun
WHEN = ["epoch", "iteration"]


def summarise(name: str, folders: Sequence[Path], note: str = "") -> Summary:
    """Summarise all records below some folders, as far as they got.

    Raises:
        FileNotFoundError: There are none.
        ValueError: They are not of one configuration, or a network is among them twice.
    """
    found = {file.parent.resolve() for folder in folders for file in folder.rglob("config.json")}
    runs = sorted(run for run in found if all((run / table).is_dir() for table in RECORDED))
    if not runs:
        raise FileNotFoundError(f"no records below {', '.join(map(str, folders))}")
    parts = zip(*(_summarised(run) for run in runs), strict=True)
    training, layers, changes = (pd.concat(part, ignore_index=True) for part in parts)
    provenance = _provenance(runs, training) | {"asked_for": len(found), "note": note}
    return Summary(name, training, layers, changes, provenance)


def _summarised(run: Path) -> Iterator[pd.DataFrame]:
    config = json.loads((run / "config.json").read_text())["config"]
    network = {key: config[key] for key in NETWORK}
    training, activations, path = (pd.read_parquet(run / table) for table in RECORDED)
    median = activations.groupby(WHEN)["mean"].median().rename("mean_activation")
    yield _labelled(network, training.merge(median.reset_index(), on=WHEN))
    yield _labelled(network, _by_layer(path, activations))
    yield _labelled(network, _changes(activations))


def _labelled(network: dict[str, Any], table: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([pd.DataFrame(network, index=table.index), table], axis=1)


def _by_layer(path: pd.DataFrame, activations: pd.DataFrame) -> pd.DataFrame:
    """Averages over the units of a layer; the layers from input to output."""
    columns = path.groupby([*WHEN, "layer", "damping"], sort=False).agg(dict(OVER_UNITS))
    outputs = activations.groupby([*WHEN, "layer"])["mean"].median().rename("mean_activation")
    return columns.reset_index().merge(outputs.reset_index(), on=[*WHEN, "layer"])


def _changes(activations: pd.DataFrame) -> pd.DataFrame:
    """Deciles over a layer's units of the variance, over time, of their mean's change."""
    finite = activations.assign(mean=activations["mean"].where(np.isfinite))
    by_unit = finite.pivot(index="iteration", columns=["layer", "unit"], values="mean")
    trained = by_unit[by_unit.index > 0]  # the first change, from initial weights, would dominate
    variance = trained.diff().iloc[1:].var(ddof=0)
    deciles = np.arange(0, 11) / 10
    table = variance.groupby(level="layer").quantile(deciles).rename("variance").reset_index()
    return table.rename(columns={"level_1": "share"})


def _provenance(runs: Sequence[Path], training: pd.DataFrame) -> dict[str, Any]:
    made = [json.loads((run / "config.json").read_text()) for run in runs]
    config, *others = (_shared(run["config"]) for run in made)
    for run, other in zip(runs[1:], others, strict=True):
        if other != config:
            raise ValueError(f"{run} was configured differently from {runs[0]}")
    networks: dict[tuple[Any, ...], Path] = {}
    for run, other in zip(runs, made, strict=True):
        network = tuple(other["config"][key] for key in NETWORK)
        if (twin := networks.setdefault(network, run)) != run:
            raise ValueError(f"{run} and {twin} are of one network; leave one of them out")
    last = training.groupby(NETWORK)[[*WHEN, "seconds", "monitoring"]].last()
    names = dict.fromkeys(name for run in made for name in run["versions"])
    return {
        "config": config,
        "versions": {n: _all(run["versions"].get(n, "none") for run in made) for n in names},
        "device": _all(run["device"] for run in made),
        "created": min(run["created"] for run in made),
        "networks": len(runs),
        "epochs": int(last["epoch"].min()),
        "iterations": int(last["iteration"].min()),
        # changes.csv has the changes from this evaluation on
        "changes_from_iteration": min((n for n in training["iteration"] if n > 0), default=None),
        # of the process, which trains several networks side by side
        "seconds": float(last["seconds"].max()),
        "seconds_of_monitors": float(last["monitoring"].max()),
    }


def _shared(config: dict[str, Any]) -> dict[str, Any]:
    """What is common to all networks, as it took effect."""
    return {key: v for key, v in settings.effective(config).items() if key not in NETWORK}


def _all(values: Iterable[str]) -> str:
    """Join the distinct values of all runs."""
    return ", ".join(dict.fromkeys(values))


def main(
    records: Annotated[tuple[Path, ...], tyro.conf.Positional],
    name: str,
    note: str = "",
) -> None:
    """Summarise records for the figures.

    Args:
        records: Folders of analysis/train.py.
        name: The folder in paper_figs/tables.
        note: What the record does not know, such as why it ended.
    """
    print(summarise(name, records, note).write())


if __name__ == "__main__":
    scripts.run(lambda: tyro.cli(main))
