"""TODO data.inputs."""

from __future__ import annotations

from dataclasses import asdict

from forgetless.data.documents import Document, fingerprint_rows, load_documents
from forgetless.data.tasks import load_training_data
from forgetless.options.tune import TuneOptions


def general_documents(options: TuneOptions) -> list[Document]:
    return load_documents(
        options.general or "",
        column=options.text_column,
        split=options.general_split,
        limit=options.limit,
    )


def hash_of_general(options: TuneOptions) -> str:
    return fingerprint_rows([asdict(document) for document in general_documents(options)])


def hashes(options: TuneOptions) -> dict[str, str]:
    """sha256 of the general text that a budget is kept on and of the rows that learning is measured
    by: a resumed run needs the same.
    """
    found = {"general text": hash_of_general(options)} if options.general else {}
    if options.eval_data:
        held = load_training_data(options.eval_data, split=options.eval_split, limit=options.limit)
        found["held-out rows"] = fingerprint_rows(list(held))
    return found
