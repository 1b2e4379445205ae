"""Rows of datasets that are no single file: on the Hub, and folders that `datasets` can read.

    hub_rows("allenai/sciq", "train")             # all rows of a split
    hub_rows("wikitext:wikitext-2-raw-v1", "train", limit=100)   # a configuration, streamed
    folder_rows(Path("saved"), "train")           # what save_to_disk wrote, or a folder of files

Arrow keeps one type a column: where a dictionary of one row has a key that another row's lacks, the
other gets it as null. Such nulls are no content, so they are left out of nested values.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from forgetless.errors import FileError

logger = logging.getLogger("forgetless")
DatasetRows = list[dict[str, Any]]
# A folder with none of these holds no dataset: a folder with JSON files alone may be a model's.
DATA_FILES = [
    f"{folder}*{kind}"
    for folder in ("", "*/")
    for kind in (".parquet", ".jsonl", ".csv", ".jsonl.gz", ".arrow")
]


def hub_rows(spec: str, split: str, limit: int | None = None) -> DatasetRows:
    """Rows of the Hub dataset 'name' or 'name:configuration'; with `limit` the first of them, and
    no more is downloaded than they need.
    """
    name, _, config = spec.partition(":")
    return _or_file_error(
        spec, split, lambda: _of_dataset(spec, name, config or None, split, limit)
    )


def folder_rows(folder: Path, split: str, limit: int | None = None) -> DatasetRows:
    """Rows of a local folder: one that `save_to_disk` wrote, or a dataset's files as on the Hub."""
    name = str(folder)
    if any((folder / about).is_file() for about in ("dataset_info.json", "dataset_dict.json")):
        return _or_file_error(name, split, lambda: _of_saved(folder, split, limit))
    if not any(next(folder.glob(pattern), None) for pattern in DATA_FILES):
        raise FileError(
            f"'{folder}' is not a file; expected .txt, .jsonl, .json, .csv, .parquet, a folder of "
            "save_to_disk or of such files, or the name of a Hub dataset"
        )
    return _or_file_error(name, split, lambda: _of_dataset(name, name, None, split, limit))


def _or_file_error(spec: str, split: str, load: Callable[[], DatasetRows]) -> DatasetRows:
    """What `load` gives; what `datasets` and the network raise becomes one FileError."""
    try:
        return load()
    except FileError:
        raise
    except Exception as error:  # datasets and its readers have many kinds
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileError(
            f"'{spec}' is neither a local file nor a dataset that can be loaded ({first}); check "
            f"the name, the split '{split}' or the connection"
        ) from error


def _of_dataset(
    spec: str, name: str, config: str | None, split: str, limit: int | None
) -> DatasetRows:
    from datasets import config as settings
    from datasets import load_dataset

    # What is in the cache is read without the network, and `train[:10%]` is no stream.
    stream = limit is not None and not settings.HF_HUB_OFFLINE and "[" not in split
    data = load_dataset(name, config, split=split, streaming=stream)
    if stream:
        described = (data.info.splits or {}).get(split)
        count = described.num_examples if described else None
    else:
        count = len(data)
    _announce(spec, split, count, limit)
    return _plain_rows(data, limit)


def _of_saved(folder: Path, split: str, limit: int | None) -> DatasetRows:
    from datasets import DatasetDict, load_from_disk

    data = load_from_disk(str(folder))
    if isinstance(data, DatasetDict):
        if split not in data:
            raise FileError(
                f"'{folder}' has the splits {', '.join(map(str, data))}; expected one of them, "
                f"found '{split}'"
            )
        data = data[split]
    _announce(str(folder), split, len(data), limit)
    return _plain_rows(data, limit)


def _announce(spec: str, split: str, count: int | None, limit: int | None) -> None:
    rows = f"{count} rows" if count else "an unknown number of rows"
    first = f", of which the first {limit} are read" if limit else ""
    logger.info("'%s': the split '%s' has %s%s", spec, split, rows, first)


def _plain_rows(data: Iterable[Any], limit: int | None) -> DatasetRows:
    return [without_nulls(row) for row in islice(data, limit)]


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row of Arrow without the nulls in its nested dictionaries; a turn's `content` may be."""
    return {column: _nested(value) for column, value in row.items()}


def _nested(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _nested(inner)
            for key, inner in value.items()
            if inner is not None or key == "content"
        }
    return [_nested(inner) for inner in value] if isinstance(value, list) else value
