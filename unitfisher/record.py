"""One run is one folder: what was configured, and tables of what was seen.

    runs/mnist-net-elu-s0/
        config.json                configuration, versions, device, time of creation
        units/part-00000.parquet   a table, in parts: this one is done
        units/part-00001.parquet   and this one is replaced as a whole at every flush

A table can be read at any time and by anyone: ``pandas.read_parquet(folder / "units")``.
(polars looks at a file twice, and says so if a flush falls in between: read again.)
"""

import atexit
import json
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from unitfisher.provenance import differences, plain, provenance
from unitfisher.table import UNFINISHED, Column, Table, write_atomically

if TYPE_CHECKING:
    import pandas as pd


class RecordExistsError(FileExistsError):
    """The folder of a new run already holds something."""


class Run:
    """A folder that keeps one run, and loses at most ``flush_interval`` seconds of it.

    Rows gather in memory and are written in the background. One process writes a run; any
    number may read it meanwhile.

    Args:
        folder: Made if need be. It must be empty, or hold this run if ``resume``.
        config: What the run was asked to do. Kept as JSON; what JSON has no form for, as text.
        resume: Continue the run in the folder, if there is one.
        flush_interval: Seconds that a row may wait to be written.

    Raises:
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
        import pandas as pd  # noqa: F401  pyarrow would at its first array, within a training step

        self.folder = Path(folder)
        made = _open(self.folder, config, resume)
        self.config: dict[str, Any] = made["config"]
        self.id: str = made.get("id", made["created"])
        self.flush_interval = flush_interval
        self._tables: dict[str, Table] = {}
        self._timer: threading.Timer | None = None
        self._state, self._writing = threading.Lock(), threading.Lock()
        self._process = os.getpid()
        self._closed = self._warned = False
        self._holding_back: list[Callable[[], None]] = []
        atexit.register(self.close)

    @property
    def tables(self) -> list[str]:
        """Names of the tables that have rows."""
        on_disk = {part.parent.name for part in self.folder.glob("*/part-*.parquet")}
        return sorted(on_disk | self._tables.keys())

    def describe(self, part: str, config: Mapping[str, Any]) -> None:
        """Write down, beside the run's configuration, that of one of its parts; once.

        Args:
            part: The key in config.json of a list of configurations.
            config: As JSON; what JSON has no form for, as text.
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
            table: Named like a variable; also the name of the folder.
            columns: Numbers, truth values or strings, one per row, and scalars for all rows.
                Names and types stay those of the table's first rows.

        Raises:
            ValueError: The table's name, or the columns' names or shapes, do not fit.
            TypeError: A column is of a type that cannot be kept, there or at all.
            RuntimeError: The run is closed, or another process's from which this one is a fork.
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
            OSError: The disk did not take them. They stay in memory, and in the next flush.
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
        """Take note of who holds rows back, and appends them when they have to be there."""
        self._holding_back.append(append)

    def complete(self) -> None:
        """Have everything appended that is held back, and flush."""
        for append in self._holding_back if os.getpid() == self._process else []:
            append()
        self.flush()

    def close(self) -> None:
        """Flush, and take no more rows. Done by itself when the interpreter exits."""
        try:
            self.complete()
        finally:
            self._holding_back = []
            with self._state:
                self._closed = True
            self.flush()
            atexit.unregister(self.close)

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
        return Table(self.folder / name) if known is None else known  # a table may be of length 0

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
    """Refuse a folder that holds a run.

    Raises:
        RecordExistsError: It does.
    """
    if (folder / "config.json").exists():
        raise RecordExistsError(
            f"{folder} already holds a run; choose another folder, or continue with resume=True"
        )


def _open(folder: Path, config: Mapping[str, Any] | None, resume: bool) -> dict[str, Any]:
    """Make the folder a run's, or find it so, and return what made the run."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.json"
    if not resume:
        require_new(folder)
    (folder / UNFINISHED).unlink(missing_ok=True)  # its writer was killed
    if not file.exists():
        _refuse_foreign_files(folder)
        _write_config(folder, {**provenance(config or {}), "id": uuid4().hex})
    made: dict[str, Any] = json.loads(file.read_text())
    recorded = made["config"]
    if changes := differences(recorded, recorded if config is None else plain(config)):
        raise ValueError(
            f"run {folder} cannot be resumed with another configuration: {'; '.join(changes)}; "
            "restore it, or choose another folder"
        )
    return made


def _write_config(folder: Path, made: Mapping[str, Any]) -> None:
    text = json.dumps(made, indent=2)
    write_atomically(folder / "config.json", text.encode(), folder / UNFINISHED)


def _refuse_foreign_files(folder: Path) -> None:
    if found := sorted(path.name for path in folder.iterdir()):
        raise RecordExistsError(
            f"{folder} holds {', '.join(found[:3])} but no run (no config.json); "
            "choose a new or an empty folder"
        )
