"""Rows of Parquet files, the needed columns only, a batch at a time. The one place that knows pyarrow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megazebra.data.errors import CorpusError
from megazebra.data.prepare.inputs.files import InputFile

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

BATCH_BYTES = 2**20
# Sizes are those of dictionaries, where a file has them; texts that repeat take more in memory.
BATCH_ROWS = 1024
READ_BYTES = 2**20


@contextlib.contextmanager
def open_parquet(file: InputFile) -> Iterator[ParquetFile]:
    """Raises CorpusError without pyarrow, and for a file that is damaged, truncated or of another format."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise CorpusError(f"{file.path}: reading Parquet needs pyarrow; pip install 'megazebra[data]'") from error
    with file.open() as raw:
        try:
            # A buffer makes pyarrow stream column chunks; without one it holds a whole row group in memory.
            with ParquetFile(raw, buffer_size=READ_BYTES, pre_buffer=False) as parquet:
                yield parquet
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # a damaged page is an OSError
            raise CorpusError(f"{file.path} is no Parquet file that can be read ({error}); restore it") from error


def columns_to_read(parquet: ParquetFile, file: InputFile, keys: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the keys that the file has, as column or, `a.b`, as field of one; without keys, all columns.

    Raises CorpusError where it has none of them.
    """
    if not keys:
        return tuple(parquet.schema_arrow.names)
    schema = parquet.schema
    paths = [schema.column(i).path for i in range(len(schema))]
    found = tuple(key for key in keys if any(path == key or path.startswith(f"{key}.") for path in paths))
    if not found:
        names = ", ".join(parquet.schema_arrow.names)
        raise CorpusError(f"{file.path} has no column {' or '.join(map(repr, keys))} (its columns: {names})")
    return found


def row_group_bytes(parquet: ParquetFile, columns: tuple[str, ...]) -> list[int]:
    """Uncompressed bytes of the columns in every row group."""
    groups = (parquet.metadata.row_group(i) for i in range(parquet.metadata.num_row_groups))
    return [
        sum(
            chunk.total_uncompressed_size
            for chunk in (group.column(j) for j in range(group.num_columns))
            if any(chunk.path_in_schema == name or chunk.path_in_schema.startswith(f"{name}.") for name in columns)
        )
        for group in groups
    ]


def parquet_rows(
    parquet: ParquetFile, columns: tuple[str, ...], row_groups: range, bytes_per_row: float
) -> Iterator[dict[str, Any]]:
    """The rows as dictionaries of the columns."""
    batch_rows = max(1, min(BATCH_ROWS, int(BATCH_BYTES / max(bytes_per_row, 1.0))))
    for batch in parquet.iter_batches(batch_rows, row_groups=list(row_groups), columns=list(columns)):
        yield from batch.to_pylist()
