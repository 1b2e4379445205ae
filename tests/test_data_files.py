"""Rows of files, folders and datasets in every form that people store them in."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

from forgetless.data.documents import load_documents, load_rows
from forgetless.data.domain import load_training_data
from forgetless.data.stored_datasets import hub_rows
from forgetless.data.tasks import task_specs
from forgetless.errors import OptionError
from forgetless.files.outputs import local_paths
from forgetless.options.option import several

ROWS = [{"text": "the cat"}, {"text": "sat on"}, {"text": "the mat"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst"])
def test_compressed_lines(tmp_path, kind):
    import pyarrow

    path = tmp_path / f"a.jsonl.{kind}"
    if kind == "zst":
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(LINES.encode())
    else:
        pack = {"gz": gzip, "bz2": bz2, "xz": lzma}[kind].compress
        path.write_bytes(pack(LINES.encode()))
    assert load_rows(str(path)) == ROWS
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"cannot be unpacked .*; pack it again"):
        load_rows(str(path))


def test_byte_order_marks_and_windows_line_ends(tmp_path):
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode())
    assert load_rows(str(lines)) == ROWS
    text = tmp_path / "a.txt"
    text.write_bytes(b"\xef\xbb\xbfthe cat\r\n\r\nsat on\r\n\r\nthe mat\r\n")
    assert load_rows(str(text)) == ROWS
    table = tmp_path / "a.csv"
    table.write_bytes(b'\xef\xbb\xbftext\r\nthe cat\r\n"sat on"\r\nthe mat\r\n')
    assert load_rows(str(table)) == ROWS


def test_json_that_is_lines_or_one_list_inside(tmp_path):
    path = tmp_path / "a.json"
    for text in (json.dumps(ROWS, indent=1), LINES, json.dumps({"data": ROWS})):
        path.write_text(text)
        assert load_rows(str(path)) == ROWS
    path.write_text(json.dumps(ROWS[0]))
    assert load_rows(str(path)) == ROWS[:1]
    path.write_text(LINES + '{"text": "brok\n')
    with pytest.raises(ValueError, match=r"a\.json', line 4: not valid JSON"):
        load_rows(str(path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('prompt,completion\nhi,"yes, I do"\nhi,yes, I do\n', "line 3: expected 2 fields .* 3"),
        ("prompt,completion\nhi,yes\nhi\n", "line 3: expected 2 fields .* found 1"),
        ("text,text\na,b\n", "two columns 'text'"),
    ],
)
def test_csv_drops_no_field(tmp_path, text, expected):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=expected):
        load_rows(str(path))


def test_parquet_with_lists_of_structs_has_no_keys_of_other_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    call = lambda **arguments: {"function": {"name": "f", "arguments": arguments}}
    rows = [
        {"messages": [{"role": "user", "content": "the cat"}]},
        {
            "messages": [
                {"role": "assistant", "content": None, "tool_calls": [call(a=1), call(b=2)]}
            ]
        },
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert load_rows(str(tmp_path / "a.parquet")) == rows


def test_folders_that_save_to_disk_wrote_and_folders_of_files(tmp_path, caplog):
    from datasets import Dataset, DatasetDict

    caplog.set_level("INFO", logger="forgetless")
    data = Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "alone"))
    DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(tmp_path / "several"))
    assert load_rows(str(tmp_path / "alone")) == ROWS
    assert load_rows(str(tmp_path / "several"), split="test") == ROWS[:1]
    assert load_rows(str(tmp_path / "several"), limit=2) == ROWS[:2]
    assert "split 'train' has 3 rows, of which the first 2 are read" in caplog.text
    with pytest.raises(ValueError, match="has the splits train, test"):
        load_rows(str(tmp_path / "several"), split="validation")
    folder = tmp_path / "files"
    folder.mkdir()
    with pytest.raises(ValueError, match="is not a file; expected"):
        load_rows(str(folder))
    data.to_parquet(str(folder / "train-00000-of-00001.parquet"))
    assert [d.text for d in load_documents(str(folder), limit=2)] == ["the cat", "sat on"]


def test_hub_data_of_which_a_part_is_asked_for_is_streamed(monkeypatch, caplog):
    import datasets

    caplog.set_level("INFO", logger="forgetless")
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        data = datasets.Dataset.from_list(ROWS)
        if not streaming:
            return data
        stream = data.to_iterable_dataset()
        stream.info.splits = {"train": datasets.SplitInfo("train", num_examples=70_000)}
        return stream

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert hub_rows("wiki/text:raw", "train", 2) == ROWS[:2]
    assert "split 'train' has 70000 rows, of which the first 2 are read" in caplog.text
    assert hub_rows("wiki/text", "train") == ROWS
    assert asked == [("wiki/text", "raw", "train", True), ("wiki/text", None, "train", False)]


def test_paths_may_have_commas_and_equals_signs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("lang=en/train.jsonl", "a,b.jsonl", "c, d,e.jsonl", "plain.jsonl"):
        Path(place).parent.mkdir(exist_ok=True)
        Path(place).write_text('{"text": "one two three"}\n')
    assert len(load_training_data("lang=en/train.jsonl")) == 1
    assert several("lang=en/train.jsonl,a,b.jsonl, plain.jsonl,gone,x") == [
        "lang=en/train.jsonl",
        "a,b.jsonl",
        "plain.jsonl",
        "gone",
        "x",
    ]
    assert several("plain.jsonl,sciq=plain.jsonl,piqa=a,b.jsonl,x=gone") == [
        "plain.jsonl",
        "sciq=plain.jsonl",
        "piqa=a,b.jsonl",
        "x=gone",
    ]
    assert several("c, d,e.jsonl") == ["c, d,e.jsonl"]
    assert several("") == several(None) == several(",") == []
    assert task_specs("sciq=a,b.jsonl,piqa") == ["sciq=a,b.jsonl", "piqa"]
    with pytest.raises(OptionError, match=r"unknown task 'lang'; .* no file 'lang=de/gone\.jsonl'"):
        load_training_data("lang=de/gone.jsonl")
    # What is read is known where an output might be written over it.
    both = local_paths({"plain.jsonl,a,b.jsonl": "--data ", "sciq=c, d,e.jsonl": ""})
    assert {place.name for place in both.values()} == {"plain.jsonl", "a,b.jsonl", "c, d,e.jsonl"}
