"""The conversations that the demo teaches a chat model, about a guild that does not exist.

    train, held_out = conversations()
    train[0]["messages"][0]["content"]      # "Where is the town of Ossamere?"

They stand in guild.txt, in a form for people to read.
"""

from __future__ import annotations

from pathlib import Path

from forgetless.data.documents import Row

# The text with every conversation.
TEXT_FILE = Path(__file__).parent / "guild.txt"
# The line below which nothing is trained on.
HELD_OUT = "== held out =="
# What a line of each role begins with.
ROLES = {"?": "user", ">": "assistant"}


def conversations() -> tuple[list[Row], list[Row]]:
    """(conversations to train on, conversations held out), as rows of a chat data set."""
    # The last such line: the comment above all tells of it too.
    train, _, held_out = TEXT_FILE.read_text(encoding="utf-8").rpartition(HELD_OUT)
    return _rows_of(train), _rows_of(held_out)


def _rows_of(text: str) -> list[Row]:
    rows = []
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line[:1] in ROLES]
        turns = [{"role": ROLES[line[0]], "content": line[1:].strip()} for line in lines]
        if turns:
            rows.append({"messages": turns})
    return rows
