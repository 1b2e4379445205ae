"""Rows of a Parquet file, read in batches, so that a small file cannot fill the memory.

    parquet_rows(Path("domain.parquet"))     # [{"prompt": ..., "completion": ...}, ...]

Parquet stores a run of one value in a few bytes and a repeated text once, so a file of 1 KB can
claim hundreds of millions of values. What the file says of itself is checked before anything is
decoded, and the bytes are counted while batches are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forgetless.errors import FileError

# Values in a file, those inside lists counted one by one.
MOST_VALUES = 50_000_000
# Bytes that are decoded at most: so many, and so many more for each byte of the file. Text that
# people write is compressed 3 to 10 times.
DECODED_BYTES = 1 << 28
DECODED_PER_BYTE = 50
# Bytes of a batch at most, were every value in it the largest that its column can hold.
BATCH_BYTES = 1 << 28
# Rows of a batch at most.
ROWS_AT_A_TIME = 1024


def parquet_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a Parquet file.

    Raises FileError where it is none, and where it claims more than a file of its size may.
    """
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            return _rows_in_batches(path, file)
    except FileError:
        raise
    except Exception as error:  # pyarrow has many kinds
        raise FileError(f"'{path}' is not a readable parquet file: {error}") from None


def _rows_in_batches(path: Path, file: Any) -> list[dict[str, Any]]:
    about = file.metadata
    groups = [about.row_group(number) for number in range(about.num_row_groups)]
    chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
    values = max(about.num_rows * about.num_columns, sum(int(chunk.num_values) for chunk in chunks))
    if values > MOST_VALUES:
        raise FileError(
            f"'{path}' claims to hold {values} values in {about.num_rows} rows of "
            f"{about.num_columns} columns; split it into files of {MOST_VALUES} values"
        )
    largest = max((int(chunk.total_uncompressed_size) for chunk in chunks), default=0)
    size = max(1, min(ROWS_AT_A_TIME, BATCH_BYTES // max(1, largest)))
    allowed = DECODED_BYTES + DECODED_PER_BYTE * path.stat().st_size
    if largest > allowed:
        raise _too_large(path, largest, allowed)
    rows: list[dict[str, Any]] = []
    decoded = 0
    for batch in file.iter_batches(batch_size=size, use_threads=False):
        decoded += batch.nbytes
        if decoded > allowed:
            raise _too_large(path, decoded, allowed)
        rows += batch.to_pylist()
    return rows


def _too_large(path: Path, decoded: int, allowed: int) -> FileError:
    return FileError(
        f"'{path}' has {path.stat().st_size} bytes and decodes to more than {decoded >> 20} MiB, "
        f"expected at most {allowed >> 20} MiB of a file of its size; split it, or give .jsonl"
    )
