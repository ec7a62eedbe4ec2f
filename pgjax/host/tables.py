"""Tables of a run as Parquet: rows in numbered parts as they come, merged into one file when the run is over."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pgjax.errors import RequestError, RunError
from pgjax.host.checkpoints import disk_errors, sync
from pgjax.host.folders import written_aside

if TYPE_CHECKING:
    import pandas
    import pyarrow

# Columns every row has, with the type they are stored in; the other columns of metrics keep the type they come in.
METRICS = {"config": "int32", "seed": "int64", "iteration": "int64", "env_steps": "int64"}
EVALUATIONS = {
    "config": "int32",
    "seed": "int64",
    "env_steps": "int64",
    "policy": "str",
    "episode": "int32",
    "return": "float64",
    "length": "int32",
}
KINDS = {"metrics": METRICS, "evaluations": EVALUATIONS}
# Parts are gathered to about this many rows before they are written on, so that memory stays flat and files readable.
_MERGE_ROWS = 1 << 16


def part_file(path: Path, kind: str, number: int) -> Path:
    return path / "parts" / f"{kind}-{number:05d}.parquet"


def part_files(path: Path, kind: str, number: int) -> list[Path]:
    return [part_file(path, kind, index) for index in range(1, number + 1)]


def all_part_files(path: Path) -> Iterator[tuple[Path, str, int | None]]:
    """Every part file with its kind and number; the number is None for one that is half written."""
    for part in (path / "parts").glob("*"):
        if match := re.fullmatch(r"(metrics|evaluations)-(\d+)\.parquet(\.tmp-\d+)?", part.name):
            yield part, match[1], None if match[3] else int(match[2])


def as_table(kind: str, rows: Mapping[str, np.ndarray]) -> "pyarrow.Table":
    """Columns as a table, with the key columns in front and in their types."""
    import pyarrow as pa

    keys = KINDS[kind]
    if missing := [name for name in keys if name not in rows]:
        raise ValueError(f"{kind} rows have no column {missing[0]}; they have {', '.join(rows)}")
    if kind == "evaluations" and (extra := [name for name in rows if name not in keys]):
        raise ValueError(f"evaluation rows have the extra column {extra[0]}")
    columns = {}
    for name in [*keys, *(name for name in rows if name not in keys)]:
        column = np.asarray(rows[name])
        column = column.astype(keys[name]) if name in keys else column
        if column.ndim != 1 or len(column) != len(rows["config"]):
            raise ValueError(f"column {name} has shape {column.shape}; expected ({len(rows['config'])},)")
        # Half precision and JAX's own small floats are not for tables.
        small_float = column.dtype.itemsize < 4 and column.dtype.kind not in "biuU"
        columns[name] = pa.array(column.astype(np.float32) if small_float else column)
    return pa.table(columns)


def write_parquet(path: Path, table: "pyarrow.Table") -> None:
    import pyarrow.parquet as pq

    pq.write_table(table, path)
    sync(path)


def read_part(path: Path) -> "pyarrow.Table":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def merge_parts(path: Path, kind: str, number: int) -> None:
    """Streams parts 1 to ``number`` into one table. Without parts it makes none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not number:
        return
    target = path / f"{kind}.parquet"
    # The number says up to which part the table goes, for load.
    schema = read_part(part_file(path, kind, 1)).schema.with_metadata({"pgjax.parts": str(number)})
    with disk_errors(target), written_aside(target) as aside:
        with pq.ParquetWriter(aside, schema) as writer:
            waiting: list[pa.Table] = []
            for index, part in enumerate(part_files(path, kind, number), 1):
                waiting.append(read_part(part).replace_schema_metadata(schema.metadata))
                if index == number or sum(table.num_rows for table in waiting) >= _MERGE_ROWS:
                    writer.write_table(pa.concat_tables(waiting).combine_chunks())
                    waiting = []
        sync(aside)


def read_rows(path: Path, kind: str, number: int | None) -> "pandas.DataFrame":
    """Rows of parts 1 to ``number``; None means that there is no checkpoint to say how many count."""
    import pandas
    import pyarrow as pa
    import pyarrow.parquet as pq

    merged = path / f"{kind}.parquet"
    try:
        if merged.exists():
            parts = int((pq.read_schema(merged).metadata or {}).get(b"pgjax.parts", b"-1"))
            # Somebody may have kept the tables and thrown the checkpoints and parts away.
            if number is None or parts == number:
                return pq.read_table(merged).to_pandas()
        if not number:
            return pandas.DataFrame({name: np.zeros(0, dtype) for name, dtype in KINDS[kind].items()})
        return pa.concat_tables(pq.read_table(part) for part in part_files(path, kind, number)).to_pandas()
    except (OSError, pa.ArrowException) as error:
        raise RequestError(f"{kind} of {path} cannot be read: {str(error).splitlines()[0]}") from error
