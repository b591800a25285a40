"""A table that grows on disk as Parquet parts: the last one grows, the others are complete."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

PART_ROWS = 100_000  # a part with this many rows is complete
UNFINISHED = ".unfinished"  # in the run's folder, so that tables hold whole files only

Values: TypeAlias = NDArray[Any] | Tensor
Column: TypeAlias = Values | Sequence[Any] | np.generic | str | float | int | bool

_STORED_AS: Final = MappingProxyType(
    {
        dtype: stored
        for stored, names in {
            pa.bool_(): ("bool",),
            pa.int64(): ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"),
            pa.float32(): ("float16", "float32"),
            pa.float64(): ("float64",),
        }.items()
        for name in names
        for dtype in (np.dtype(name), getattr(torch, name))
    }
    | {torch.bfloat16: pa.float32(), np.dtype(object): pa.string()}
)


class Table:
    """Rows that are appended in memory and flushed to a folder of parts.

    A flush replaces the last part as a whole, from memory: no row is in two files, and every file
    can be read at any time. One thread may append while another flushes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        parts = self._parts
        self.schema: pa.Schema = pq.read_schema(parts[-1]) if parts else None
        self._part = _next_part(parts)
        self._pending: list[dict[str, Values]] = []  # appended and not yet converted
        self._rows: pa.Table = None  # of the part that grows
        self._stale = False  # whether that part is out of date on disk
        self._constant: dict[str, tuple[tuple[Any, ...], Values]] = {}  # a column's newest tuple
        self._checked: dict[str, Any] = {}  # column types known to fit the schema

    def append(self, columns: Mapping[str, Column]) -> None:
        """Copy rows, on the device where they are."""
        rows = {name: self._own(name, values) for name, values in columns.items()}
        n = self._length(rows)
        if self.schema is None:
            self.schema = pa.schema([(name, _STORED_AS[v.dtype]) for name, v in rows.items()])
        types = {name: values.dtype for name, values in rows.items()}
        if types != self._checked:
            self._check(rows)
            self._checked = types
        self._pending.append({name: v if v.ndim else _repeat(v, n) for name, v in rows.items()})

    def flush(self) -> None:
        """Bring the last part on disk up to date.

        Raises:
            OSError: It could not be written. The rows stay in memory, for the next flush.
        """
        if self._pending:
            self._convert()
        if self._stale:
            self._write()

    def truncate(self, rows: int) -> None:
        """Keep the first rows; drop from the end, so that an interruption leaves no gap."""
        self.flush()
        parts = self._parts
        lengths = [pq.read_metadata(part).num_rows for part in parts]
        for part, length in zip(reversed(parts), reversed(lengths), strict=True):
            start = sum(lengths[: parts.index(part)])
            if start >= rows:
                part.unlink()
            elif start + length > rows:
                _write(part, pq.read_table(part).slice(0, rows - start))
        self._part, self._rows = _next_part(self._parts), None

    @property
    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    def __len__(self) -> int:
        """Count the rows on disk."""
        return sum(pq.read_metadata(part).num_rows for part in self._parts)

    def _own(self, name: str, column: Column) -> Values:
        """Copy a column, which may be changed in place later; convert a tuple only once."""
        if isinstance(column, tuple):
            known = self._constant.get(name)
            if known is None or known[0] is not column:
                known = self._constant[name] = column, self._converted(name, list(column))
            return known[1]
        return self._converted(name, column)

    def _converted(self, name: str, column: Column) -> Values:
        values = column.detach().clone() if isinstance(column, Tensor) else _array(column)
        if isinstance(values, np.ndarray) and values.dtype.kind in "UT":
            values = values.astype(object)  # a pointer per row: U needs the longest string's room
        if values.ndim > 1:
            raise ValueError(
                f"column {name!r} of {self.folder} has shape {tuple(values.shape)}; "
                "give one value per row, or a scalar for all"
            )
        if values.dtype not in _STORED_AS or not _only_strings(values):
            raise TypeError(
                f"column {name!r} of {self.folder} holds {values.dtype}, which is not recorded; "
                "give floats, truth values, strings, or integers that fit int64"
            )
        return values

    def _length(self, rows: Mapping[str, Values]) -> int:
        lengths = {name: len(values) for name, values in rows.items() if values.ndim}
        if not rows or len(set(lengths.values())) > 1:
            raise ValueError(f"{self.folder} takes columns of one length, not {lengths}")
        return next(iter(lengths.values()), 1)

    def _check(self, rows: Mapping[str, Values]) -> None:
        if rows.keys() != set(self.schema.names):
            raise ValueError(
                f"{self.folder} has the columns {self.schema.names}, not {list(rows)}; "
                "a table keeps its columns, so append others to another table"
            )
        for field in self.schema:
            given = _STORED_AS[rows[field.name].dtype]
            if not _fits(given, field.type):
                raise TypeError(
                    f"column {field.name!r} of {self.folder} holds {field.type} since its first "
                    f"row and cannot take {given}; convert it, or begin with {given}"
                )

    def _convert(self) -> None:
        pending = self._pending[:]  # more may be appended meanwhile
        _wait_for_devices(pending)
        columns = [_joined([rows[f.name] for rows in pending], f.type) for f in self.schema]
        new = pa.table(columns, schema=self.schema)
        rows = pa.concat_tables([self._rows, new]) if self._rows else new
        self._rows, self._pending[: len(pending)], self._stale = rows, [], True

    def _write(self) -> None:
        part = self.folder / f"part-{self._part:05d}.parquet"
        try:
            self.folder.mkdir(exist_ok=True)
            _write(part, self._rows)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{part} was not written ({error.strerror}); its {len(self._rows)} rows are kept "
                "in memory: make room, and the next flush writes them",
            ) from error
        self._stale = False
        if len(self._rows) >= PART_ROWS:
            self._part, self._rows = self._part + 1, None


def _next_part(parts: Sequence[Path]) -> int:
    return int(parts[-1].stem.removeprefix("part-")) + 1 if parts else 0


def _write(part: Path, rows: pa.Table) -> None:
    file = pa.BufferOutputStream()
    names = [field.name for field in rows.schema if field.type == pa.string()]
    # no dictionaries of numbers, which seldom repeat: they took twice as long
    pq.write_table(rows, file, use_dictionary=names)
    write_atomically(part, file.getvalue(), part.parent.parent / UNFINISHED)


def write_atomically(path: Path, data: bytes | pa.Buffer, unfinished: Path) -> None:
    """Replace a file as a whole: a reader finds the old content or the new."""
    try:
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _array(column: Column) -> NDArray[Any]:
    strings = isinstance(column, list) and bool(column) and isinstance(column[0], str)
    return np.array(column, dtype=object if strings else None)


def _only_strings(values: Values) -> bool:
    return values.dtype != object or set(map(type, values.flat)) <= {str}


def _repeat(value: Values, n: int) -> Values:
    return value.expand(n) if isinstance(value, Tensor) else np.full(n, value, value.dtype)


def _fits(given: pa.DataType, stored: pa.DataType) -> bool:
    if given == stored or pa.string() in (given, stored):
        return bool(given == stored)
    return np.can_cast(given.to_pandas_dtype(), stored.to_pandas_dtype(), "same_kind")


def _wait_for_devices(pending: Sequence[Mapping[str, Values]]) -> None:
    """Wait for the copies: they may be on other streams than this thread's."""
    columns = (values for rows in pending for values in rows.values())
    for device in {c.device for c in columns if isinstance(c, Tensor) and not c.is_cpu}:
        torch.accelerator.synchronize(device)


def _joined(chunks: Sequence[Values], stored: pa.DataType) -> pa.Array | pa.ChunkedArray:
    """Concatenate the chunks of a column, moved to the host in one piece where possible."""
    tensors = [chunk for chunk in chunks if isinstance(chunk, Tensor)]
    alike = len({(tensor.device, tensor.dtype) for tensor in tensors}) == 1
    if alike and len(tensors) == len(chunks):
        chunks = [torch.cat(tensors)]
    if stored == pa.string():  # repeated names are converted once
        once = {id(chunk): pa.array(chunk, stored) for chunk in chunks}
        return pa.chunked_array([once[id(chunk)] for chunk in chunks], stored)
    flat = np.concatenate([_on_host(chunk) for chunk in chunks])
    return pa.array(flat.astype(stored.to_pandas_dtype(), copy=False), stored)


def _on_host(values: Values) -> NDArray[Any]:
    if isinstance(values, np.ndarray):
        return values
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy(force=True)
