"""Everything that a run reads, read once and handed on.

The same general text is measured before and after training, a budget is kept on it, it is searched
for training rows, and its hash must be the same when the run is resumed. So it is read in one
place, before a model is loaded, and so are the training rows, the held-out rows, the questions of
tasks and the text to replay.

    inputs = read_inputs(options)
    inputs.training             # the rows to train on, a DomainRows
    inputs.held_out.general     # the documents that forgetting is measured on, or None
    inputs.hashes               # {"training data": sha256, ...}, for resuming

Text that a model must first write (`--general chat`, `--replay self`) is not read here: it is
sampled by evaluate/own_answers.py once the model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from forgetless.data.documents import (
    Document,
    Row,
    fingerprint_documents,
    fingerprint_rows,
    load_documents,
)
from forgetless.data.domain import DomainRows, load_training_data
from forgetless.data.own_text import NOT_READ, OwnText, own_text, read_text
from forgetless.data.tasks import TASKS, Task, load_task, task_specs
from forgetless.options.model import TextOptions
from forgetless.options.tune import TuneOptions


@dataclass(frozen=True)
class Questions:
    """The questions of one task.

    `task` and `rows` are set where the task is ours. Where `task` is None, lm-eval knows the task
    by its `name` and reads it itself: the first `limit` questions, after `shots` examples, from
    `file` where given.
    """

    name: str
    task: Task | None = None
    rows: list[Row] = field(default_factory=list)
    file: str | None = None
    shots: int = 0
    limit: int | None = None


@dataclass(frozen=True)
class HeldOut:
    """What a model is measured on and not trained on.

    General documents, rows of the domain, the
    questions of tasks, and what the base model is asked to say itself. What was not asked for is
    None, or empty.
    """

    general: list[Document] | None = None
    domain: DomainRows | None = None
    tasks: tuple[Questions, ...] = ()
    own: OwnText | None = None

    @property
    def anything(self) -> bool:
        """Whether there is anything to measure."""
        measured = (self.general, self.tasks, self.own)
        return any(measured) or self.domain is not None


@dataclass(frozen=True)
class Inputs:
    """What a run of `tune` reads.

    `replay` holds the documents of --replay where it names a text. `hashes` are what an interrupted
    run must find unchanged, name -> sha256: of the training rows and the text to replay, and with a
    budget of what it is kept on and of the rows that learning is measured by.
    """

    training: DomainRows
    held_out: HeldOut
    replay: list[Document] | None
    hashes: dict[str, str]


def read_inputs(options: TuneOptions) -> Inputs:
    """Read what a run of `tune` with these options needs.

    Raises ValueError or OptionError for data that is missing or broken.
    """
    training = load_training_data(options.data, split=options.data_split, columns=options.columns)
    held_out = read_held_out(
        options,
        data=options.eval_data,
        tasks=options.tasks,
        data_split=options.eval_split,
        columns=options.columns,
        limit=options.limit,
    )
    replay = _replay_documents(options)
    return Inputs(
        training=training,
        held_out=held_out,
        replay=replay,
        hashes=_hashes(training, held_out, replay, with_budget=bool(options.budget)),
    )


def read_held_out(
    text: TextOptions | None = None,
    *,
    data: str | None = None,
    tasks: str | None = None,
    data_split: str | None = None,
    columns: str | None = None,
    limit: int | None = None,
    shots: int = 0,
) -> HeldOut:
    """Read what a model is measured on; `limit` cuts documents, rows and questions.

    With `shots` examples before each question every task is lm-eval's, which draws the examples.
    """
    documents = None
    text = text or TextOptions()
    if general := read_text(text.general):
        documents = load_documents(
            general, column=text.text_column, split=text.general_split, limit=limit
        )
    rows = None
    if data:
        rows = load_training_data(data, split=data_split, limit=limit, columns=columns)
    questions = tuple(_read_questions(spec, shots, limit) for spec in task_specs(tasks))
    return HeldOut(documents, rows, questions, own_text(text, text.general))


def _read_questions(spec: str, shots: int, limit: int | None) -> Questions:
    name, _, file = spec.partition("=")
    if shots == 0 and name in TASKS:
        task, rows = load_task(spec, split=None)
        return Questions(name, task, rows[:limit])
    return Questions(name, file=file or None, shots=shots, limit=limit)


def _replay_documents(options: TuneOptions) -> list[Document] | None:
    if options.replay is None or options.replay in NOT_READ:
        return None
    return load_documents(
        options.replay,
        column=options.text_column,
        split=options.general_split,
        limit=options.replay_documents,
    )


def _hashes(
    training: DomainRows,
    held_out: HeldOut,
    replay: list[Document] | None,
    *,
    with_budget: bool,
) -> dict[str, str]:
    hashes = {"training data": fingerprint_rows(list(training))}
    if replay:
        hashes["replayed text"] = fingerprint_documents(replay)
    if with_budget and held_out.general:
        hashes["general text"] = fingerprint_documents(held_out.general)
    if with_budget and held_out.domain is not None:
        hashes["held-out rows"] = fingerprint_rows(list(held_out.domain))
    return hashes
