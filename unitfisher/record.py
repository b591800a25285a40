"""One run is one folder: its configuration, and tables of what was measured.

    runs/mnist-net-elu-s0/
        config.json                configuration, versions, device, time of creation
        units/part-00000.parquet   a table, in parts: this one is complete
        units/part-00001.parquet   and this one is replaced as a whole at every flush

A table can be read at any time and by anyone: ``pandas.read_parquet(folder / "units")``.
(polars opens a file twice, and raises if a flush falls in between: read again.)
"""

import atexit
import json
import os
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pyarrow.parquet as pq

from unitfisher.locks import LOCK, FolderLock
from unitfisher.provenance import differences, plain, provenance
from unitfisher.table import UNFINISHED, Column, Table, write_atomically

if TYPE_CHECKING:
    import pandas as pd


OURS = (LOCK, UNFINISHED)
OPEN: dict[Path, "Run"] = {}  # runs that this process writes


class RecordExistsError(FileExistsError):
    """The folder of a new run already holds something."""


class DamagedRecordError(ValueError):
    """A file of a run cannot be read."""


class Run:
    """A folder that keeps one run; a crash loses at most ``flush_interval`` seconds of it.

    Rows gather in memory and are written in the background. One process writes a run; any
    number may read it meanwhile.

    Args:
        folder: Created if missing. It must be empty, or hold a run that ended before its first row;
            with ``resume`` it may hold this run.
        config: The run's configuration, kept as JSON; what JSON cannot represent, as text.
        resume: Continue the run in the folder, if there is one.
        flush_interval: Seconds that a row may wait before it is written.

    Raises:
        DamagedRecordError: A file of the run to resume cannot be read.
        FolderInUseError: Another process has the run open.
        RecordExistsError: The folder holds a run, or files that are not a run's.
        ValueError: The run to resume was configured differently.

    Example:
        >>> from tempfile import mkdtemp
        >>> with Run(mkdtemp(), {"seed": 0}) as run:
        ...     run.append("units", {"layer": "hidden1", "unit": [0, 1], "k": 0.5})
        >>> run.read("units")
             layer  unit    k
        0  hidden1     0  0.5
        1  hidden1     1  0.5
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        config: Mapping[str, Any] | None = None,
        *,
        resume: bool = False,
        flush_interval: float = 10.0,
    ) -> None:
        import pandas as pd  # noqa: F401  else pyarrow imports it at its first array, in a training step

        self.folder = Path(folder)
        if resume and (earlier := OPEN.get(self.folder.resolve())) is not None:
            earlier.close()  # of this process, which goes on with this one
        _require_ours(self.folder, resume)
        self._lock = FolderLock(self.folder)
        try:
            if not resume:
                (self.folder / "config.json").unlink(missing_ok=True)
            made = _open(self.folder, config)
        except BaseException:
            self._lock.release()
            raise
        OPEN[self.folder.resolve()] = self
        self.config: dict[str, Any] = made["config"]
        self.id: str = made.get("id", made["created"])
        self.flush_interval = flush_interval
        self._tables: dict[str, Table] = {}
        self._timer: threading.Timer | None = None
        self._state, self._writing = threading.Lock(), threading.Lock()
        self._process = os.getpid()
        self._closed = self._warned = False
        self._holding_back: list[Callable[[], None]] = []
        atexit.register(self._end)

    @property
    def tables(self) -> list[str]:
        """Names of the tables that have rows."""
        on_disk = {part.parent.name for part in self.folder.glob("*/part-*.parquet")}
        return sorted(on_disk | self._tables.keys())

    def describe(self, part: str, config: Mapping[str, Any]) -> None:
        """Add the configuration of a part of the run to config.json, unless it is there already.

        Args:
            part: Key in config.json of a list of configurations.
            config: Kept as JSON; what JSON cannot represent, as text.
        """
        with self._writing:
            made = json.loads((self.folder / "config.json").read_text())
            described, asked = made.setdefault(part, []), plain(config)
            if asked not in described:
                described.append(asked)
                _write_config(self.folder, made)

    def append(self, table: str, columns: Mapping[str, Column]) -> None:
        """Add rows. Waits neither for the disk nor for a GPU.

        Args:
            table: Name of the table and of its folder; must be an identifier, as "units".
            columns: Numbers, Booleans or strings, one per row, or scalars that hold for all rows.
                Names and types must be those of the table's first rows.

        Raises:
            ValueError: The table's name, or the columns' names or shapes, do not fit.
            TypeError: A column has a type that cannot be recorded, or not in this table.
            RuntimeError: The run is closed, or this process is a fork of the one that writes it.
        """
        if not table.isidentifier():
            raise ValueError(f"table {table!r} must be named like a variable, as 'units' is")
        if os.getpid() != self._process:
            raise RuntimeError(
                f"run {self.folder} belongs to process {self._process} and this is its fork "
                f"{os.getpid()}; append there, or to a run with another folder"
            )
        with self._state:
            if self._closed:
                raise RuntimeError(f"run {self.folder} is closed; append before, or resume it")
            growing = self._table(table)
            growing.append(columns)
            self._tables[table] = growing
            self._arm()

    def count(self, table: str = "units") -> int:
        """Flush, and count the rows of a table; 0 where there is none."""
        self.flush()
        return len(self._table(table))

    def truncate(self, table: str, rows: int) -> None:
        """Keep the first rows of a table and drop the rest, such as those after a checkpoint."""
        with self._writing:
            self._table(table).truncate(rows)

    def flush(self) -> None:
        """Write all rows appended so far.

        Raises:
            OSError: They could not be written. They stay in memory, for the next flush.
        """
        if os.getpid() != self._process:
            return  # a fork holds copies of rows that its parent writes
        with self._writing:
            with self._state:
                if self._timer:
                    self._timer.cancel()
                self._timer, tables = None, list(self._tables.values())
            for table in tables:
                table.flush()
            self._warned = False

    def read(self, table: str = "units") -> "pd.DataFrame":
        """Flush, and read the rows of a table in the order of writing.

        Raises:
            LookupError: There is no such table.
        """
        self.flush()
        if table not in self.tables:
            raise LookupError(
                f"run {self.folder} has no table {table!r}; it has {self.tables or 'none yet'}"
            )
        import pandas as pd  # slow to import, and few processes read

        return pd.read_parquet(self.folder / table)

    def holds_back(self, append: Callable[[], None]) -> None:
        """Register a function that appends rows still held back, for `complete` and `close`."""
        self._holding_back.append(append)

    def holds_back_no_more(self, append: Callable[[], None]) -> None:
        """Forget one of those."""
        if append in self._holding_back:
            self._holding_back.remove(append)

    def complete(self) -> None:
        """Append all rows that are held back, and flush."""
        for append in self._holding_back if os.getpid() == self._process else []:
            append()
        self.flush()

    def close(self) -> None:
        """Flush, and take no more rows. Called automatically when the interpreter exits."""
        try:
            self.complete()
        finally:
            self._holding_back = []
            with self._state:
                self._closed = True
            self.flush()
            atexit.unregister(self._end)
            if os.getpid() == self._process:
                self._lock.release()
                OPEN.pop(self.folder.resolve(), None)

    def _end(self) -> None:
        """Close when the interpreter exits; if rows cannot be written even now, say so."""
        try:
            self.close()
        except OSError as error:
            failed = str(error.strerror).partition(";")[0]
            line = f"unitfisher: {failed}; its newest rows are lost, earlier ones stay"
            print(line, file=sys.stderr)

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _table(self, name: str) -> Table:
        known = self._tables.get(name)
        return Table(self.folder / name) if known is None else known  # a table of length 0 is false

    def _arm(self) -> None:
        if self._timer is None:
            wait = min(self.flush_interval, threading.TIMEOUT_MAX)
            self._timer = threading.Timer(wait, self._flush_in_background)
            self._timer.daemon = True
            self._timer.start()

    def _flush_in_background(self) -> None:
        try:
            self.flush()
        except OSError as error:
            with self._state:
                self._arm()
            if not self._warned:
                self._warned = True
                warnings.warn(f"{error}, in {self.flush_interval} s", stacklevel=1)


def require_new(folder: Path) -> None:
    """Raise RecordExistsError if a folder holds a run, unless that ended before its first row."""
    held = (folder / "config.json").exists()
    if held and (folder.resolve() in OPEN or not _is_without_rows(folder)):
        raise RecordExistsError(
            f"{folder} already holds a run; choose another folder, or continue with resume=True"
        )


def _is_without_rows(folder: Path) -> bool:
    """Whether a folder holds the configuration of a run, and nothing else."""
    if any(path.name not in ("config.json", *OURS) for path in folder.iterdir()):
        return False
    try:
        made = json.loads((folder / "config.json").read_text())
    except ValueError:
        return False
    return isinstance(made, dict) and {"config", "versions", "created"} <= made.keys()


def _open(folder: Path, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Begin a run in the folder, or open the one it holds; return its config.json."""
    file = folder / "config.json"
    (folder / UNFINISHED).unlink(missing_ok=True)  # its writer was killed
    if not file.exists():
        _write_config(folder, {**provenance(config or {}), "id": uuid4().hex})
    made = _read(file, lambda: json.loads(file.read_text()))
    for part in folder.glob("*/part-*.parquet"):
        _read(part, partial(pq.read_metadata, part))
    recorded = made["config"]
    if changes := differences(recorded, recorded if config is None else plain(config)):
        raise ValueError(
            f"run {folder} cannot be resumed with another configuration: {'; '.join(changes)}; "
            "restore it, or choose another folder"
        )
    return made


def _read(file: Path, reading: Callable[[], Any]) -> Any:
    try:
        return reading()
    except (OSError, ValueError) as error:  # Arrow's and JSON's errors are ValueErrors
        raise DamagedRecordError(
            f"{file} cannot be read ({error}): bring back a copy, or begin anew in another folder"
        ) from error


def _write_config(folder: Path, made: Mapping[str, Any]) -> None:
    text = json.dumps(made, indent=2)
    write_atomically(folder / "config.json", text.encode(), folder / UNFINISHED)


def _require_ours(folder: Path, resume: bool) -> None:
    """Refuse a folder that holds a run, unless that is to be resumed, or other files."""
    if not resume:
        require_new(folder)
    if folder.is_dir() and not (folder / "config.json").exists():
        found = sorted(path.name for path in folder.iterdir() if path.name not in OURS)
        if found:
            raise RecordExistsError(
                f"{folder} holds {', '.join(found[:3])} but no run (no config.json); "
                "choose a new or an empty folder"
            )
