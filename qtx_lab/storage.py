"""Where runs are kept, files that are written whole or not at all, tensors, and tables as parquet."""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ArgumentError, StorageError

if TYPE_CHECKING:
    import duckdb
    import pandas as pd
    from torch import Tensor

Scalar = str | int | float | bool | None

COLUMN_TYPES = {bool: "BOOLEAN", int: "BIGINT", float: "DOUBLE", str: "VARCHAR"}


def runs_home(home: str | Path | None = None) -> Path:
    """The folder that holds runs: the one given, else `$QTX_LAB_HOME`, else `./runs`."""
    return Path(home or os.environ.get("QTX_LAB_HOME") or "runs")


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that readers, and a crash at any moment, see the old content or the new, never a part.

    Raises
    ------
    StorageError
        If it cannot be written; the old file, if any, is untouched.
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


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system lets a folder be synced."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make a file's content and name durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    sync_folder(path.parent)


def storage_error(path: Path, error: OSError) -> StorageError:
    """The error for a path that could not be written: the cause, and what to do."""
    advice = {
        errno.ENOSPC: "free some space, or choose another folder with --home",
        errno.EDQUOT: "your quota is used up: free some space, or choose another folder with --home",
        errno.EFBIG: "the file is larger than this process may write (ulimit -f): raise the limit",
        errno.ENOENT: "there is no such folder, or no longer",
    }
    what = advice.get(error.errno or 0, "check that the folder can be written, or choose another with --home")
    return StorageError(f"Cannot write {path}: {error.strerror or error}; {what}.")


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """Readable JSON; NumPy and torch scalars become numbers, and NaN and infinities null."""
    return (json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write tensors, and texts about them, as safetensors, whole or not at all.

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
    """The tensors of a file that `write_tensors` wrote, on the CPU, and the texts.

    Raises
    ------
    ValueError
        With the cause, if it cannot be read or is no such file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ValueError(str(error)) from error


def database() -> duckdb.DuckDBPyConnection:
    """A private DuckDB in memory: one thread, so that equal rows give equal bytes, and no downloads."""
    import duckdb

    settings: dict[str, Any] = {"threads": 1, "autoinstall_known_extensions": False}
    return duckdb.connect(config=settings)


def parquet_bytes(connection: duckdb.DuckDBPyConnection, query: str) -> bytes:
    """The rows of a query as a parquet file."""
    import duckdb

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.parquet")
        try:
            connection.execute(f"COPY ({query}) TO '{_quoted(path)}' (FORMAT parquet, COMPRESSION zstd)")
            return path.read_bytes()
        except duckdb.IOException as error:
            raise StorageError(f"Cannot write {path}: {error}; free space there, or set TMPDIR.") from error


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Write a DataFrame, without its index, as parquet.

    Raises
    ------
    StorageError
        If it cannot be written.
    """
    with database() as connection:
        connection.register("frame", frame)
        write_atomic(path, parquet_bytes(connection, "FROM frame"))


def read_frame(path: Path) -> pd.DataFrame:
    """The rows of a parquet file.

    Raises
    ------
    StorageError
        If it is not a readable parquet file.
    """
    import duckdb

    with database() as connection:
        try:
            return connection.execute(f"FROM read_parquet('{_quoted(path)}')").df()
        except duckdb.Error as error:
            raise StorageError(f"Cannot read {path}: {str(error).splitlines()[0]}") from error


def append_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Append rows to a parquet file, adding columns as needed; the file is rewritten whole, NaN as null.

    Raises
    ------
    ArgumentError
        If a value is no scalar, or a column would mix text, numbers and truth values.
    StorageError
        If the file cannot be read or written.
    """
    import duckdb

    columns = _columns(rows)
    if not columns:
        return
    _refuse_alike(columns)
    with database() as connection:
        types = {name: _column_type(name, values) for name, values in columns.items()}
        _register(connection, columns, types)
        query = "FROM new"
        if path.exists():
            try:
                described = connection.execute(f"DESCRIBE FROM read_parquet('{_quoted(path)}')").fetchall()
            except duckdb.Error as error:
                raise StorageError(f"Cannot read {path}: {str(error).splitlines()[0]}") from error
            _refuse_alike([*columns, *(name for name, *_ in described if name not in columns)])
            for name, old, *_ in described:
                _refuse_mixture(name, old, types.get(name, old))
            query = f"FROM read_parquet('{_quoted(path)}') UNION ALL BY NAME FROM new"
        write_atomic(path, parquet_bytes(connection, query))


def _refuse_alike(names: Iterable[str]) -> None:
    """DuckDB takes names that differ in case only for one."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.lower(), name)
        if other != name:
            raise ArgumentError(
                f"The metrics {other!r} and {name!r} differ in case only: choose another name."
            )


def _columns(rows: Iterable[Mapping[str, object]]) -> dict[str, list[Scalar]]:
    """Rows as columns, None where a row has no such key."""
    columns: dict[str, list[Scalar]] = {}
    for count, row in enumerate(rows):
        for name, value in row.items():
            if not isinstance(name, str) or not name or "\0" in name:
                raise ArgumentError(
                    f"{name!r} cannot name a metric: it must be a text of at least one character."
                )
            if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # NumPy and torch scalars
                value = value.item()
            if not isinstance(value, str | int | float | None):
                raise ArgumentError(
                    f"{name}={value!r} cannot be a metric: it must be a text, a number, True, False or None."
                )
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ArgumentError(f"{name}={value!r} cannot be a metric: whole numbers have 64 bits.")
            if name not in columns:
                columns[name] = [None] * count
            columns[name].append(value)
        for values in columns.values():
            values.extend([None] * (count + 1 - len(values)))
    return columns


def _column_type(name: str, values: list[Scalar]) -> str:
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return "DOUBLE"
    if len(kinds) > 1:
        given = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ArgumentError(f"The metric {name!r} mixes {given}; one column holds one kind of value.")
    return COLUMN_TYPES[kinds.pop()] if kinds else "DOUBLE"


def _refuse_mixture(name: str, old: str, new: str) -> None:
    numbers = {"BIGINT", "DOUBLE"}
    if old != new and {old, new} != numbers:
        raise ArgumentError(f"The metric {name!r} held {old} so far, now {new}; one column holds one kind.")


def _register(
    connection: duckdb.DuckDBPyConnection, columns: Mapping[str, list[Scalar]], types: Mapping[str, str]
) -> None:
    """The columns as the table `new`."""
    import pandas as pd

    pandas_types = {"BOOLEAN": "boolean", "BIGINT": "Int64", "DOUBLE": "Float64", "VARCHAR": "object"}
    arrays = (pd.array(values, dtype=pandas_types[types[name]]) for name, values in columns.items())
    frame = pd.DataFrame({str(i): array for i, array in enumerate(arrays)})
    connection.register("given", frame)
    casts = ", ".join(
        f'CAST("{i}" AS {types[name]}) AS "{_quoted(name, chr(34))}"' for i, name in enumerate(columns)
    )
    connection.execute(f"CREATE TABLE new AS SELECT {casts} FROM given")


def _quoted(text: object, mark: str = "'") -> str:
    return str(text).replace(mark, mark * 2)
