"""Where runs are kept; files that are written whole or not at all; tensors; and tables as parquet files."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from .errors import ArgumentError, StorageError

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    import duckdb
    import pandas as pd
    from torch import Tensor

Scalar = str | int | float | bool | None
"""What a cell of a table holds."""

COLUMN_TYPES = {bool: "BOOLEAN", int: "BIGINT", float: "DOUBLE", str: "VARCHAR"}
"""DuckDB's type of a column, by the type of its values."""

PANDAS_TYPES = {"BOOLEAN": "boolean", "BIGINT": "Int64", "DOUBLE": "Float64", "VARCHAR": "object"}
"""pandas' type of a column that may hold missing values, by DuckDB's type."""


def runs_home(home: str | Path | None = None) -> Path:
    """Return the folder that holds runs: the one given, or else `$QTX_LAB_HOME`, or else `./runs`.

    Raises
    ------
    ArgumentError
        If it begins with `~` and a user that does not exist, or is not Unicode.
    """
    folder = Path(home or os.environ.get("QTX_LAB_HOME") or "runs")
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise ArgumentError(f"home={str(folder)!r} is not allowed: it is not Unicode.") from None
    try:
        return folder.expanduser()
    except RuntimeError as error:
        raise ArgumentError(f"home={str(folder)!r} is not allowed: {error}") from None


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old content or the new one, even after a crash, and never a part.

    Raises
    ------
    StorageError
        If it cannot be written. The old file, if there is one, is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise storage_error(path, error) from error


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for the same lock out of a folder; nothing is written for it.

    Where the system or the file system has no such locks, nobody is kept out.
    """
    descriptor = None
    with suppress(OSError):  # what is done to the folder next says why
        if sys.platform != "win32":
            descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None and sys.platform != "win32":
            with suppress(OSError):  # before the file is closed: a process that was forked has it open too
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, if the system can sync folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # as on some network file systems
            raise
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the content and the name of a file durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    sync_folder(path.parent)


def storage_error(path: Path, error: OSError) -> StorageError:
    """Make the error for a path that could not be written: it says the cause, and what to do."""
    advice = {
        errno.ENOSPC: "free some space, or choose another folder with --home",
        errno.EDQUOT: "your quota is used up: free some space, or choose another folder with --home",
        errno.EFBIG: "the file is larger than this process may write (ulimit -f): raise the limit",
        errno.ENOENT: "the folder does not exist",
    }
    default = "check that the folder can be written, or choose another with --home"
    what_to_do = advice.get(error.errno or 0, default)
    return StorageError(f"Cannot write {path}: {error.strerror or error}; {what_to_do}.")


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """Encode content as readable JSON: NumPy and torch scalars become numbers, NaN and infinities null.

    Examples
    --------
    >>> print(json_bytes({"loss": float("nan"), "steps": 3}).decode(), end="")
    {
      "loss": null,
      "steps": 3
    }
    """
    return (json.dumps(_json_value(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _json_value(value: Any) -> Any:
    """Return the value that JSON holds for a value; what JSON has no type for becomes text."""
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    if isinstance(value, _Item):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


@runtime_checkable
class _Item(Protocol):
    """A NumPy or torch scalar, or an array of one number; neither library is imported for this."""

    @property
    def ndim(self) -> int: ...

    def item(self) -> Any: ...


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write tensors as a safetensors file, whole or not at all.

    Parameters
    ----------
    path : str or Path
    tensors : mapping of str to Tensor
        Tensors by their names, on any device.
    about : mapping of str to str
        Texts that the file holds beside them.

    Raises
    ------
    StorageError
        If the file cannot be written.
    """
    from safetensors.torch import save

    content = save({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, dict(about))
    try:
        write_atomic(Path(path), content)
    except StorageError as error:
        raise StorageError(f"path={str(path)!r} cannot be written: {error}") from error


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors, on the CPU, and the texts of a file that `write_tensors` wrote.

    Raises
    ------
    ValueError
        If it cannot be read, or is no safetensors file. The message is the cause.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ValueError(str(error)) from error


def database() -> duckdb.DuckDBPyConnection:
    """Open a private DuckDB in memory: no downloads, and one thread, so that equal rows give equal bytes."""
    import duckdb

    settings: dict[str, Any] = {"threads": 1, "autoinstall_known_extensions": False}
    return duckdb.connect(config=settings)


def parquet_bytes(connection: duckdb.DuckDBPyConnection, query: str) -> bytes:
    """Return the rows of a query as the content of a parquet file.

    Raises
    ------
    StorageError
        If the folder for temporary files cannot be written.
    """
    import duckdb

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.parquet")
        try:
            connection.execute(f"COPY ({query}) TO '{_quoted(path)}' (FORMAT parquet, COMPRESSION zstd)")
            return path.read_bytes()
        except duckdb.IOException as error:
            raise StorageError(f"Cannot write {path}: {error}; free some space, or set TMPDIR.") from error


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Write a DataFrame, without its index, as parquet.

    Raises
    ------
    ArgumentError
        If it has no columns.
    StorageError
        If it cannot be written.
    """
    if not len(frame.columns):
        raise ArgumentError("A table without columns is not allowed: no parquet file holds one.")
    with database() as connection:
        connection.register("frame", frame)
        write_atomic(path, parquet_bytes(connection, "FROM frame"))


def read_frame(path: Path) -> pd.DataFrame:
    """Read the rows of a parquet file.

    Raises
    ------
    StorageError
        If it is not a parquet file that can be read.
    """
    import duckdb

    with database() as connection:
        try:
            return connection.execute(f"FROM read_parquet('{_quoted(path)}')").df()
        except duckdb.Error as error:
            raise StorageError(f"Cannot read {path}: {str(error).splitlines()[0]}") from error


def append_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Append rows to a parquet file, and add columns as needed; the file is written anew, with NaN as null.

    Parameters
    ----------
    path : Path
        The file; it is made if it does not exist.
    rows : iterable of mapping of str to scalar
        Values by the names of their columns. What a row does not name is null.

    Raises
    ------
    ArgumentError
        If a value is no scalar, if a column would mix text, numbers and truth values, or if two names differ
        only in upper and lower case.
    StorageError
        If the file cannot be read or written.
    """
    import duckdb

    columns = _columns(rows)
    if not columns:
        return
    _check_case(columns)
    with database() as connection:
        types = {name: _column_type(name, values) for name, values in columns.items()}
        query = "FROM new"
        if path.exists():
            there = f"FROM read_parquet('{_quoted(path)}')"
            empty: list[str] = []
            try:
                described = connection.execute(f"DESCRIBE {there}").fetchall()
                _check_case([*columns, *(name for name, *_ in described if name not in columns)])
                for name, old, *_ in described:
                    if all(value is None for value in columns.get(name, ())):
                        types |= {name: old} if name in columns else {}  # a missing value is of every kind
                    elif connection.execute(f"SELECT count({_name(name)}) {there}").fetchall() == [(0,)]:
                        empty.append(f"CAST(NULL AS {types[name]}) AS {_name(name)}")
                    else:
                        _check_type(name, old, types[name])
            except duckdb.Error as error:
                raise StorageError(f"Cannot read {path}: {str(error).splitlines()[0]}") from error
            there = f"SELECT * REPLACE ({', '.join(empty)}) {there}" if empty else there
            query = f"{there} UNION ALL BY NAME FROM new"
        _register(connection, columns, types)
        write_atomic(path, parquet_bytes(connection, query))


def _check_case(names: Iterable[str]) -> None:
    """Refuse names that differ only in upper and lower case: to DuckDB they are the same."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.lower(), name)
        if other != name:
            raise ArgumentError(
                f"The metrics {other!r} and {name!r} differ in case only; rename one of them."
            )


def _columns(rows: Iterable[Mapping[str, object]]) -> dict[str, list[Scalar]]:
    """Return the values of each column, None where a row has none, and refuse what no table can hold."""
    columns: dict[str, list[Scalar]] = {}
    for count, row in enumerate(rows):
        for name, value in row.items():
            if not isinstance(name, str) or not name or "\0" in name:
                raise ArgumentError(
                    f"{name!r} cannot name a metric: it must be a text of at least one character."
                )
            if isinstance(value, _Item) and value.ndim == 0:
                value = value.item()
            if not isinstance(value, str | int | float | None):
                raise ArgumentError(
                    f"{name}={value!r} cannot be a metric: it must be a text, a number, True, False or None."
                )
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ArgumentError(f"{name}={value!r} cannot be a metric: it does not fit into 64 bits.")
            if name not in columns:
                columns[name] = [None] * count
            columns[name].append(value)
        for values in columns.values():
            values.extend([None] * (count + 1 - len(values)))
    return columns


def _column_type(name: str, values: list[Scalar]) -> str:
    """Return DuckDB's type for the values of a column, and refuse values of several kinds."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return "DOUBLE"
    if len(kinds) > 1:
        given = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ArgumentError(f"The metric {name!r} mixes {given}; one column holds one kind of value.")
    return COLUMN_TYPES[kinds.pop()] if kinds else "DOUBLE"


def _check_type(name: str, old: str, new: str) -> None:
    """Refuse a column that would change its type, unless both are numbers."""
    if old != new and {old, new} != {"BIGINT", "DOUBLE"}:
        raise ArgumentError(
            f"The metric {name!r} was {old} until now and is {new}; one column holds one kind of value."
        )


def _register(
    connection: duckdb.DuckDBPyConnection, columns: Mapping[str, list[Scalar]], types: Mapping[str, str]
) -> None:
    """Create the table `new` with the columns."""
    import pandas as pd

    arrays = (pd.array(values, dtype=PANDAS_TYPES[types[name]]) for name, values in columns.items())
    frame = pd.DataFrame({str(i): array for i, array in enumerate(arrays)})
    connection.register("given", frame)
    casts = ", ".join(f'CAST("{i}" AS {types[name]}) AS {_name(name)}' for i, name in enumerate(columns))
    connection.execute(f"CREATE TABLE new AS SELECT {casts} FROM given")


def _name(column: str) -> str:
    """The name of a column in SQL."""
    return f'"{_quoted(column, chr(34))}"'


def _quoted(text: object, mark: str = "'") -> str:
    """Escape a text for SQL, to stand between two quotation marks."""
    return str(text).replace(mark, mark * 2)
