"""Tables of a Monitor's measurements: one row per step, layer and unit."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from unitfisher.measurement import Measurement
from unitfisher.outputs import Averages
from unitfisher.record import Run
from unitfisher.statistics import UnitStatistics

if TYPE_CHECKING:
    import pandas as pd

UNITS, ACTIVATIONS, PLAN = "units", "activations", "plan"
Columns = dict[str, Any]  # by name: a value for each unit of each layer, or one for all


class HistoryState(TypedDict):
    """A state that a history can go back to."""

    rows: dict[str, list[Columns]]  # in memory
    run: str | None  # id of the record
    written: dict[str, int]  # number of rows in each of its tables
    plan: Columns


def columns_of(measured: Collection[UnitStatistics], phase: str) -> Columns:
    """Return a measurement as columns, layer after layer; nothing is copied to the host."""
    layers = [_columns_of_layer(layer, phase) for layer in measured]
    units = [len(layer.units) for layer in measured]
    return {name: _joined([columns[name] for columns in layers], units) for name in layers[0]}


def _joined(values: Sequence[Any], units: Sequence[int]) -> Any:
    """Concatenate the layers' tensors; repeat values per unit if they differ between layers."""
    if isinstance(values[0], Tensor):
        device = values[0].device
        return torch.cat([x if x.device == device else x.to(device) for x in values])
    if len(set(values)) == 1:
        return values[0]
    return [value for value, n in zip(values, units, strict=True) for _ in range(n)]


def _columns_of_layer(measured: UnitStatistics, phase: str) -> Columns:
    return {
        "step": measured.step,
        "layer": measured.layer,
        "unit": measured.units,
        "phase": phase,
        "c": measured.c,
        "s": measured.s,
        "k": measured.k,
        "sc": measured.s * measured.c,
        "mean_norm": _norm(measured.mean).expand_as(measured.c),
        "mean_q_norm": _norm(measured.mean_q),
        "corrected_mean_norm": _norm(measured.corrected_mean),
        "c_error": measured.c_error,
        "mean_q_error": _norm(measured.mean_q_error),
        "s_error": measured.s_error,
        "k_error": measured.k_error,
        "n_eff": measured.n_eff,
        "damping": measured.damping,
        "damping_share": measured.damping_share,
        "residual": measured.residual,
        "converged": measured.converged,
        "route": measured.route,
        "mean_share": measured.mean_share.expand_as(measured.c),
        "mean_share_q": measured.mean_share_q,
        "cosine": measured.cosine,
        "bias_shift_share_gradient": measured.bias_shift_share_gradient,
        "bias_shift_share_natural": measured.bias_shift_share_natural,
        "output_mean": measured.output_mean,
        "output_var": measured.output_var,
        "dead": measured.dead,
        "finite": measured.finite,
    }


def _norm(x: Float[Tensor, "*u d"]) -> Float[Tensor, "*u"]:
    """Norm over inputs; of a value that all of them share, without adding it up."""
    norm: Tensor = torch.linalg.vector_norm(x if x.stride(-1) else x[..., :1], dim=-1)
    return norm if x.stride(-1) else norm * x.shape[-1] ** 0.5


def columns_of_activations(averages: Averages, step: int) -> Columns:
    """Return mean and variance of the units' outputs as columns."""
    layer, unit = _numbered(averages.layers, averages.mean.device)
    return {
        "step": step,
        "layer": layer,
        "unit": unit,
        "mean": averages.mean,
        "var": averages.var,
    }


@lru_cache(maxsize=16)
def _numbered(
    layers: tuple[tuple[str, int], ...], device: torch.device
) -> tuple[tuple[str, ...], Tensor]:
    """Return layer and number of every unit; the same objects at every step."""
    names = tuple(layer for layer, units in layers for _ in range(units))
    return names, torch.cat([torch.arange(n, device=device) for _, n in layers])


class History:
    """Keeps rows in a run's record, or in memory without one.

    The newest measurement is held back until the next pass begins: the gradient from its own
    backward pass may still arrive, is solved with it, and completes its rows.
    """

    def __init__(self, run: Run | None, owned: bool) -> None:
        self.run, self.owned = run, owned
        self.rows: dict[str, list[Columns]] = {UNITS: [], ACTIVATIONS: [], PLAN: []}
        self.newest: Measurement | None = None
        self.plan: Columns = {}  # the newest in the table
        if run is not None:
            run.holds_back(self.commit)

    @classmethod
    def opened(cls, record: str | Path | Run | None, config: Mapping[str, Any]) -> "History":
        """Open a record in a folder, or write to a Run that the caller has opened."""
        if isinstance(record, str | Path):
            return cls(Run(record, config), owned=True)
        if record is None:
            return cls(None, owned=False)
        if not isinstance(record, Run):
            raise ValueError(f"record must be a folder or a Run, got {record!r}")
        record.describe("monitors", config)
        return cls(record, owned=False)

    def hold(self, measurement: Measurement) -> None:
        """Commit what was held, and hold this measurement."""
        self.commit()
        self.newest = measurement

    def commit(self) -> None:
        """Append the measurement held; if it cannot be solved, raise once and drop it."""
        held, self.newest = self.newest, None
        for table, columns in self._rows_of(held):
            self.append(table, columns)
        self.plan = self.plan if held is None else held.plan.columns()

    def _rows_of(self, held: Measurement | None) -> Iterator[tuple[str, Columns]]:
        """Yield the rows of a measurement, and of its plan if that has changed."""
        if held is None:
            return
        yield UNITS, columns_of(held.statistics().values(), held.phase)
        plan = held.plan.columns()
        if plan != self.plan:
            yield PLAN, {"step": held.step, **plan}

    def append(self, table: str, columns: Columns) -> None:
        if self.run is None:
            self.rows[table].append(columns)
        else:
            self.run.append(table, columns)

    def flush(self) -> None:
        self.commit()
        if self.run is not None:
            self.run.flush()

    def state(self) -> HistoryState:
        """Return the rows in memory, or a record's id and its numbers of rows."""
        self.commit()
        if self.run is not None:
            self.run.complete()  # its other writers may hold rows back, too
        return {
            "rows": {table: list(rows) for table, rows in self.rows.items()},
            "run": None if self.run is None else self.run.id,
            "written": {} if self.run is None else {t: self.run.count(t) for t in self.rows},
            "plan": self.plan,
        }

    def load(self, state: HistoryState) -> None:
        """Go back to a state: restore its rows, and drop those added to its record since then.

        A record other than the state's keeps its rows: the state's counts do not apply to it.
        """
        if self.run is not None and self.run.id != state["run"]:
            self.commit()
        elif self.run is not None:
            for table, count in state["written"].items():
                if (found := self.run.count(table)) < count:
                    raise ValueError(
                        f"{self.run.folder} has {found} of the {count} rows of {table!r} that the "
                        f"state counts: bring back a copy of the record, or use another folder"
                    )
                self.run.truncate(table, count)
        self.newest, self.plan = None, state["plan"]
        self.rows = {table: [] for table in self.rows}
        for table, rows in state["rows"].items():
            for columns in rows:
                self.append(table, columns)

    def close(self) -> None:
        """Write the measurement held, and close the record if owned; without one, do nothing."""
        if self.run is None:
            return
        try:
            self.flush()
        finally:
            self.run.holds_back_no_more(self.commit)
            if self.owned:
                self.run.close()

    def frame(self, table: str = UNITS) -> "pd.DataFrame":
        """Return all rows of a table in the order of measurement."""
        import pandas as pd  # slow to import, and few processes read

        newest = [columns for name, columns in self._rows_of(self.newest) if name == table]
        rows = [*self.rows[table], *newest]
        frames = [pd.DataFrame(_on_host(columns)) for columns in rows]
        if self.run is not None and table in self.run.tables:
            frames.insert(0, self.run.read(table))
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    @property
    def tensors(self) -> list[Tensor]:
        rows = [row for held in self.rows.values() for row in held]
        return [v for row in rows for v in row.values() if isinstance(v, Tensor)]


def _on_host(columns: Columns) -> Columns:
    return {
        name: value.cpu().numpy() if isinstance(value, Tensor) else value
        for name, value in columns.items()
    }
