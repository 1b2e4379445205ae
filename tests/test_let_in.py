"""Small files that claim much: they are refused before they fill the memory."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from forgetless.data import documents
from forgetless.data import parquet as reader
from forgetless.data.documents import load_rows
from forgetless.errors import FileError
from forgetless.report.markdown import plain


def test_values_inside_lists_count(tmp_path, monkeypatch):
    """One row of 300 million values, in 982 bytes, took 3.7 GB: rows and columns were counted."""
    monkeypatch.setattr(reader, "MOST_VALUES", 10_000)
    path = tmp_path / "list.parquet"
    parquet.write_table(pyarrow.table({"text": [[0] * 20_000]}), path)
    with pytest.raises(FileError, match="claims to hold 20000 values in 1 rows of 1 columns"):
        load_rows(str(path))


def test_a_repeated_text_is_not_expanded_without_end(tmp_path, monkeypatch):
    """A dictionary of one text, in 4.7 KB, took more than 7 GB."""
    monkeypatch.setattr(reader, "DECODED_BYTES", 1 << 20)
    monkeypatch.setattr(reader, "BATCH_BYTES", 1 << 20)
    path = tmp_path / "dictionary.parquet"
    parquet.write_table(pyarrow.table({"text": ["x" * 50_000] * 400}), path, compression="zstd")
    assert path.stat().st_size < 10_000
    sizes = []
    original = parquet.ParquetFile.iter_batches

    def noted(self, **given):
        for batch in original(self, **given):
            sizes.append(batch.nbytes)
            yield batch

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", noted)
    with pytest.raises(FileError, match="expected at most 1 MiB of a file of its size"):
        load_rows(str(path))
    assert max(sizes) <= 3 << 20 and sum(sizes) <= 4 << 20  # of 20 MB


def test_parquet_is_read_as_before(tmp_path):
    rows = [
        {"text": f"the cat {i}", "tags": ["a", "b"][: i % 3], "source": {"name": "n", "page": i}}
        for i in range(3000)
    ]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=700)
    assert load_rows(str(path)) == rows


def test_a_long_line_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST_LINE", 1000)
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps({"text": [[]] * 400}))
    with pytest.raises(FileError, match="line 2: expected at most 1000 characters, found"):
        load_rows(str(path))


def test_names_of_people_and_addresses_in_markdown_are_dead():
    """`@someone` in a title called that person, and an address became a link."""
    shown = plain("by @octocat, https://a.example www.b.example MAILTO:c@d.example x@y at: @ 5")
    assert shown == (
        "by @<!-- -->octocat, https<!-- -->://a.example www<!-- -->.b.example "
        "MAILTO<!-- -->:c@<!-- -->d.example x@<!-- -->y at: @ 5"
    )
