"""Text files that may be compressed, as UTF-8 text.

    read_utf8(Path("chats.jsonl.gz"))    # the text; a byte order mark is left out
    kind_of(Path("chats.jsonl.gz"))      # ".jsonl"

gzip, bzip2 and xz are of the standard library; zstd is read through pyarrow.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

from forgetless.errors import FileError

# Bytes that a compressed file may hold: a small one can claim any number and fill the memory.
MOST_BYTES = 8 * 1024**3


def _open_zstd(path: Path) -> object:
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


# How a file with each ending of a compression is opened.
COMPRESSIONS: dict[str, Callable[[Path], object]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


def kind_of(path: Path) -> str:
    """The ending that says how the text of a file is laid out: '.jsonl' of 'a.jsonl.gz'."""
    if path.suffix.lower() in COMPRESSIONS:
        path = path.with_suffix("")
    return path.suffix.lower()


def read_utf8(path: Path) -> str:
    """All of the file's text, with the line ends of Windows as "\\n", as Python reads text.

    Raises FileError where it is no UTF-8 or its compression is broken.
    """
    packed = path.suffix.lower() in COMPRESSIONS
    raw = _unpacked(path) if packed else path.read_bytes()
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise FileError(
            f"'{path}' is not UTF-8 text (byte {error.start}); convert it first"
        ) from None


def _unpacked(path: Path) -> bytes:
    try:
        with COMPRESSIONS[path.suffix.lower()](path) as file:  # type: ignore[attr-defined]
            raw: bytes = file.read(MOST_BYTES + 1)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise FileError(f"'{path}' cannot be unpacked ({error}); pack it again") from None
    if len(raw) > MOST_BYTES:
        raise FileError(
            f"'{path}' unpacks to more than {MOST_BYTES // 1024**3} GiB; split it into several"
        )
    return raw
