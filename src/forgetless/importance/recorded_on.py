"""Whether forgetting is measured on the text that importance was recorded on, which says too little
of it: the model is held on just these documents.

    check_measured(importance, documents)                      # warns
    check_measured(importance, documents, budget=True)         # refuses, unless `allowed`

Files that were recorded before traces of the text were kept (data/traces.py) know the hash of all
of it, and so the same text alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from forgetless.data.documents import Document, fingerprint_documents
from forgetless.data.domain import document_texts
from forgetless.data.duplicates import Overlap
from forgetless.data.traces import read_traces
from forgetless.errors import OptionError
from forgetless.importance.importance import Importance
from forgetless.options.finished import ShrinkOptions
from forgetless.options.tune import TuneOptions

logger = logging.getLogger("forgetless")
# Up to this fraction of the measured documents may have been recorded on where a budget is kept on
# them: a page that stands everywhere moves a mean little.
TOLERATED = 0.01


def check_measured(
    importance: Importance | None,
    documents: Sequence[Document] | None,
    *,
    budget: bool = False,
    allowed: bool = False,
) -> None:
    """Say which of the measured `documents` importance was recorded on.

    Raises OptionError where a budget is to be kept on them, unless that is `allowed`.
    """
    if importance is None or not documents:
        return
    found = recorded_on(importance.info, documents)
    said = _overlap_in_words(found)
    if not said:
        return
    if budget and not allowed and len(found.exact) + len(found.near) > TOLERATED * found.documents:
        raise OptionError(
            f"{said}. A budget kept on them is exceeded on other text more often than it says: "
            "give other general text, or --allow-recorded-text to keep it on this one"
        )
    logger.warning("%s. Measure on other general text", said)


def check_recorded_text(
    options: TuneOptions | ShrinkOptions,
    importance: Importance | None,
    documents: Sequence[Document] | None,
) -> None:
    """The same by the options of a verb."""
    budget, allowed = bool(options.budget), options.allow_recorded_text
    check_measured(importance, documents, budget=budget, allowed=allowed)


def recorded_on(info: Mapping[str, Any], documents: Sequence[Document]) -> Overlap:
    """Which of the documents importance was recorded on, by what its file says of its text."""
    data = info.get("data", {})
    if "traces" in data:
        return read_traces(data["traces"]).overlap(document_texts(documents))
    same = data.get("sha256") == fingerprint_documents(documents)
    return Overlap(list(range(len(documents))) if same else [], [], len(documents))


def _overlap_in_words(found: Overlap) -> str | None:
    """The overlap as people read it; None where nothing overlaps."""
    if found.first is None:
        return None
    return (
        f"importance was recorded on {len(found.exact)} of the {found.documents} general documents "
        f"that are measured, and nearly on {len(found.near)} (first: document {found.first}), "
        "which says too little of what is forgotten"
    )
