"""What --general and --replay name: a text to read, or what the model says itself.

    own_text(options, "chat,wiki.jsonl")     # OwnText("chat", answers=64, length=256), or None
    read_text("chat,wiki.jsonl")             # "wiki.jsonl", or None

How a model is asked is in data/selftext.py. Nothing heavy is imported.
"""

from __future__ import annotations

from dataclasses import dataclass

from forgetless.errors import OptionError
from forgetless.options.model import TextOptions
from forgetless.options.option import several

# The kinds of text that a model says itself.
CHAT, SELF = "chat", "self"
OWN_KINDS = (CHAT, SELF)
# The answers that an importance file keeps, as --replay names them.
KEPT = "kept"
# Values of --replay that name no text to read: what the model itself says, the training rows, and
# the answers that an importance file keeps.
NOT_READ = (*OWN_KINDS, "domain", KEPT)


@dataclass(frozen=True)
class OwnText:
    """What is asked of a model: the kind of text, how much of it for each part, and a file with
    prompts of the user's, which are added to ours.
    """

    kind: str
    answers: int = 64
    length: int = 256
    prompts: str | None = None


def own_text(options: TextOptions, spec: str | None) -> OwnText | None:
    """What --general or --replay asks of the model; None where it names a text alone."""
    kinds = [value for value in several(spec) if value in OWN_KINDS]
    if not kinds:
        return None
    return OwnText(kinds[0], options.answers, options.answer_length, options.prompts)


def read_text(spec: str | None) -> str | None:
    """The text that --general or --replay names, beside what the model says itself; None where it
    names none. Raises OptionError for more than one of either.
    """
    values = several(spec)
    texts = [value for value in values if value not in OWN_KINDS]
    if len(texts) > 1 or len(values) - len(texts) > 1:
        raise OptionError(
            f"--general expects chat or self, a text, or one of each with a comma; found '{spec}'"
        )
    return texts[0] if texts else None
