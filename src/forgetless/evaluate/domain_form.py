"""Domain leak: general answers in the form of the domain's, by a stated rule and not by a model.

    leak = domain_leak(completions, prompts, said_by_base)     # a Behaviour, or None
    judged_answers(prompts, said_after, [*BEHAVIOURS, leak])["domain leak"]

A *mark* of the domain is a run of four words that occurs in at least 1 % of what the domain teaches
to say, and in at least three rows of it, but in none of the base's answers. A word is a word, a
number (all numbers are one word) or a sign; the beginning and the end of an answer are words too,
so that answers which begin as the domain's do, or are as short, have a mark. An answer leaks where
it holds a mark.

The base would never leak if its marks were chosen against the very answers that are judged. So the
answers are dealt into two halves by their prompts, and the marks by which one half is judged are
those that the base's answers of the *other* half lack. What the base then leaks is chance, and a
model that answers with other random numbers leaks as much: the change has no bias. On the real
model and 1,338 medical answers there are 66 marks (". Ans: A", "4/e p 12"), and none of 32 answers
of the base leaks; with runs of three words 12 did.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from forgetless.data.domain import row_answers
from forgetless.data.prompts.prompts import OWN, Prompt
from forgetless.evaluate.behaviours import Behaviour, Said

# Words of a mark: three were found in 12 of 32 answers of the base, four in none (see the module).
MARK_WORDS = 4
# A mark is in this fraction of the domain's completions and in at least so many of them, so that it
# is of their form and not of one of them.
COMMON = 0.01
AT_LEAST = 3
# Rows of the domain that are looked at, evenly from all of it.
ROWS_READ = 2000
# Words, numbers and signs, one at a time.
WORD_OR_SIGN = re.compile(r"\d+|[^\W\d_]+(?:['’][^\W\d_]+)*|[^\w\s]|_")
OPENS, CLOSES = "<begin>", "<end>"
WordRun = tuple[str, ...]


def runs_of(text: str, *, ended: bool = True) -> set[WordRun]:
    """The runs of MARK_WORDS words in an answer."""
    words = ["0" if word.isdigit() else word for word in WORD_OR_SIGN.findall(text.lower())]
    words = [OPENS, *words, *([CLOSES] if ended else [])]
    return {tuple(words[at : at + MARK_WORDS]) for at in range(len(words) - MARK_WORDS + 1)}


def completions_of(data: Any) -> list[str]:
    """What the rows of a domain (`load_training_data`) teach to say, of at most ROWS_READ rows; of
    no domain, nothing.
    """
    if data is None:
        return []
    step = max(1, len(data) // ROWS_READ)
    rows = (data[at] for at in range(0, len(data), step))
    return [text for row in rows for text in row_answers(row)]


def common_runs(completions: Sequence[str]) -> set[WordRun]:
    """The runs that many completions share."""
    counts = Counter(run for text in completions for run in runs_of(text))
    enough = max(AT_LEAST, COMMON * len(completions))
    return {run for run, count in counts.items() if count >= enough}


def domain_leak(
    completions: Sequence[str], prompts: Sequence[Prompt], by_base: Mapping[str, Said]
) -> Behaviour | None:
    """The behaviour that counts answers in the domain's form; None where it has no form of its own.

    Answers to the user's own prompts are not judged, since these may be of the domain.
    """
    common = common_runs(completions)
    seen: dict[int, set[WordRun]] = {0: set(), 1: set()}
    for prompt in prompts:
        said = by_base[prompt.id]
        seen[_half(prompt)] |= runs_of(said.text, ended=said.ended)
    marks = {half: common - seen[1 - half] for half in seen}
    if not any(marks.values()):
        return None

    def leaks(prompt: Prompt, said: Said) -> bool | None:
        """The answer holds a run of words that marks the domain's answers."""
        if prompt.kind == OWN:
            return None
        return not marks[_half(prompt)].isdisjoint(runs_of(said.text, ended=said.ended))

    return Behaviour("domain leak", "the answer is in the domain's form", "lower", leaks)


def _half(prompt: Prompt) -> int:
    """Which half of the answers that of this prompt is dealt to."""
    return int(prompt.id, 16) % 2
