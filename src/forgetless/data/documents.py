"""Text from files and from the Hub: rows as they are stored, and documents made of them.

    load_rows("domain.jsonl")                # [{"prompt": ..., "completion": ...}, ...]
    load_documents("general.txt", limit=100) # [Document("...", None, "general.txt"), ...]

A document is plain text or a chat. A .txt file holds documents separated by blank lines; every
other format holds rows with columns. What is missing, broken or empty is refused with the file and
the line.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from forgetless.data.compressed import kind_of, read_utf8
from forgetless.data.forms import common_form
from forgetless.data.parquet import parquet_rows
from forgetless.data.stored_datasets import folder_rows, hub_rows, without_nulls
from forgetless.data.turns import Turn, tools_of, turns
from forgetless.errors import FileError
from forgetless.files.untrusted import load_json

logger = logging.getLogger("forgetless")
# A row of data as its owner wrote it: column -> value. Whoever uses a column checks its values.
Row = dict[str, Any]
# Endings of the files that can be read, compressed or not; every other name is that of a Hub
FORMATS = (".txt", ".jsonl", ".json", ".csv", ".parquet")
# Characters of a line of a .jsonl file. Python's values take up to a hundred times the memory of
# what they are written in: a line of 100 MB took 11.8 GB.
LONGEST_LINE = 1 << 24
# Columns that hold the text of a document, the first of them that is there.
TEXT_COLUMNS = ("text", "content", "messages")
# Columns that a chat template is given beside the messages.
BESIDE_MESSAGES = ("tools", "chat_template_kwargs")


@dataclass(frozen=True)
class Document:
    """One piece of general text: `text` or `messages` is set, or neither in a TokenDocument.

    `source` groups documents that come from one place, whose losses are not independent.
    """

    text: str | None
    messages: list[Turn] | None
    source: str


@dataclass(frozen=True)
class ToolDocument(Document):
    """A chat with what its template is given beside the turns: the schemas of tools, and settings
    such as enable_thinking.
    """

    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenDocument(Document):
    """Text that a model wrote itself, as its tokens, of which those from `start` on are scored."""

    ids: tuple[int, ...] = ()
    start: int = 0


def load_rows(spec: str, *, split: str = "train", limit: int | None = None) -> list[Row]:
    """Rows of a local file or folder, or of a Hub dataset, of which the first `limit` are read.

    Raises ValueError naming file and line when something is missing, broken or empty.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        rows = folder_rows(path, split, limit)
    elif kind_of(path) in FORMATS or path.exists():
        rows = file_rows(path)
    else:
        rows = hub_rows(spec, split, limit)
    if not rows:
        raise FileError(f"'{spec}' is empty; expected at least one document")
    return rows


def file_rows(path: Path) -> list[Row]:
    """Rows of a local file. Raises FileError naming file and line where one is broken."""
    if not path.is_file():
        raise FileError(
            f"'{path}' is not a file; expected {', '.join(FORMATS)} or the name of a Hub dataset"
        )
    kind = kind_of(path)
    if kind == ".parquet":
        return [without_nulls(row) for row in parquet_rows(path)]
    if kind not in FORMATS:
        raise FileError(f"'{path}' has an unknown format '{kind}'; expected {', '.join(FORMATS)}")
    text = read_utf8(path)
    if kind == ".jsonl":
        return _json_lines(path, text)
    if kind == ".json":
        return _json_rows(path, text)
    if kind == ".csv":
        return _csv_rows(path, text)
    parts = text.split("\n\n")
    return [{"text": part.strip()} for part in parts if part.strip()]


def _json_lines(path: Path, text: str) -> list[Row]:
    # Not splitlines, for which U+2028 and its like end a line: JSON strings may hold them.
    lines = enumerate(text.split("\n"), 1)
    return [_json_line(path, number, line) for number, line in lines if line.strip()]


def _json_rows(path: Path, text: str) -> list[Row]:
    """Rows of a .json file: a list of objects, or one object a line as the Hub's files have them.

    An object that holds nothing but one list of objects, as `{"data": [...]}`, stands for the list.
    """
    try:
        rows = load_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return _json_lines(path, text)
        raise FileError(f"'{path}', line {error.lineno}: not valid JSON ({error.msg})") from None
    except ValueError as error:
        raise FileError(f"'{path}': not valid JSON ({error})") from None
    if isinstance(rows, dict):
        inner = list(rows.values())
        rows = inner[0] if len(inner) == 1 and isinstance(inner[0], list) else [rows]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise FileError(
            f"'{path}': expected a list of objects; one object per line goes into .jsonl"
        )
    return rows


def _csv_rows(path: Path, text: str) -> list[Row]:
    """Rows of a .csv file by its header. A row with more or fewer fields is refused: a comma in
    text without quotes would otherwise cut the text.
    """
    reader = csv.reader(io.StringIO(text))
    try:
        header = next(reader, [])
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise FileError(f"'{path}' has two columns '{twice[0]}'; rename one of them")
        rows = []
        for fields in reader:
            if fields and len(fields) != len(header):
                raise FileError(
                    f"'{path}', line {reader.line_num}: expected {len(header)} fields as in the "
                    f"header, found {len(fields)}; put text with commas in double quotes"
                )
            if fields:
                rows.append(dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        raise FileError(f"'{path}' is not valid CSV ({error}); long texts go into .jsonl") from None
    return rows


def _json_line(path: Path, number: int, line: str) -> Row:
    if len(line) > LONGEST_LINE:
        raise FileError(
            f"'{path}', line {number}: expected at most {LONGEST_LINE} characters, found "
            f"{len(line)}; divide the document into several lines"
        )
    try:
        row = load_json(line)
    except ValueError as error:
        raise FileError(
            f"'{path}', line {number}: not valid JSON ({getattr(error, 'msg', error)}); fix or "
            "remove the line"
        ) from None
    if not isinstance(row, dict):
        raise FileError(f"'{path}', line {number}: expected an object, found {type(row).__name__}")
    return row


def load_documents(
    spec: str, *, column: str | None = None, split: str = "train", limit: int | None = None
) -> list[Document]:
    """Documents in `spec`, the first `limit` of them.

    Raises ValueError naming the columns found when none holds text or messages.
    """
    rows = load_rows(spec, split=split, limit=limit)
    if column is None:
        rows = [common_form(row, f"'{spec}', row {n}") for n, row in enumerate(rows, 1)]
    columns = [str(name) for name in rows[0]]
    column = column or next((name for name in TEXT_COLUMNS if name in columns), None)
    if column is None or column not in columns:
        wanted = f"'{column}'" if column else " or ".join(TEXT_COLUMNS)
        raise FileError(
            f"'{spec}' has the columns {', '.join(columns)}; expected {wanted}: name "
            "yours with --text-column"
        )
    chats = isinstance(rows[0].get(column), list)
    say_unread(spec, rows, {column, "source", *(BESIDE_MESSAGES if chats else ())})
    documents = [_document(spec, number, row, column) for number, row in enumerate(rows, 1)]
    return documents[:limit] if limit else documents


def say_unread(spec: str, rows: Sequence[Row], read: Collection[str]) -> None:
    """Say which columns of some rows are not read."""
    columns = dict.fromkeys(str(column) for row in rows for column in row)
    if unread := [column for column in columns if column not in read]:
        logger.info("'%s': not read: %s", spec, ", ".join(unread))


def _document(spec: str, number: int, row: Row, column: str) -> Document:
    value = row.get(column)
    where = f"'{spec}', row {number}"
    source = str(row.get("source", spec))
    if column == "messages" and isinstance(value, str) and value.lstrip().startswith("["):
        value = turns(value, where)
    if isinstance(value, list) and value:
        messages = turns(value, where)
        tools, settings = beside_messages(row, where)
        if tools or settings:
            return ToolDocument(None, messages, source, tools, settings)
        return Document(None, messages, source)
    if isinstance(value, str) and value.strip():
        return Document(value, None, source)
    holds = type(value).__name__ if value else "nothing"
    raise FileError(f"{where}: column '{column}' holds {holds}, expected text or messages")


def beside_messages(row: Row, where: str) -> tuple[list[dict[str, Any]] | None, dict[str, Any]]:
    """The tools of a chat and the settings of its template, as its row names them."""
    settings = row.get("chat_template_kwargs") or {}
    if not isinstance(settings, dict):
        raise FileError(f"{where}: 'chat_template_kwargs' holds no mapping")
    return tools_of(row.get("tools"), where), settings


def fingerprint_rows(rows: Sequence[Any]) -> str:
    """sha256 over the rows' content, whatever file they came from."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def fingerprint_documents(documents: Sequence[Document]) -> str:
    """sha256 over the documents' text or messages and sources."""
    return fingerprint_rows([asdict(document) for document in documents])
