"""A run beside plain fine-tuning on the same data, and beside what both say to the same prompts.

    contents = against_plain(load_contents("run"), Path("run"), Path("plain"))
    contents = with_conversations(contents, ["run-pairs.jsonl", "plain-pairs.jsonl"])

The two runs must have been measured on the same text. Conversations come from what
`forgetless chat RUN --prompts FILE --out PAIRS.jsonl` wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from forgetless.data.documents import file_rows
from forgetless.errors import FileError, brief
from forgetless.files.compare_json import Comparison, PlainRun, Sample
from forgetless.files.measured_json import Loss, Measured
from forgetless.files.run_json import Run
from forgetless.files.schema import Text, read_record
from forgetless.report.one_run import change_of

# Letters of an answer that are shown.
LONGEST_ANSWER = 1200


def against_plain(contents: Comparison, folder: Path, plain_folder: Path) -> Comparison:
    """The contents of a run with what plain fine-tuning learned and lost, and what it says to
    prompts that both were asked.

    Raises FileError where one of them is no run, the other is not plain, or they were measured on
    different text.
    """
    if contents.kind != "run" or contents.gate is not None:
        raise FileError(
            f"'{folder}' is not a run of tune, eval or shrink, and only such a run is shown "
            "against a plain one; a comparison has its own reference"
        )
    run = read_record(folder / "run.json", Run)
    plain = read_record(plain_folder / "run.json", Run)
    if plain.method is None or plain.method not in ([], ["plain"]):
        found = "+".join(plain.method or []) or "no method"
        raise FileError(
            f"'{plain_folder}': expected a run of tune --method plain, found {brief(found)}; give "
            "the folder of one on the same data"
        )
    _check_same(run, plain, plain_folder)
    shown = PlainRun(plain_folder.name, change_of(plain.learning), change_of(plain.forgetting))
    said = {each.prompt: each.after for each in plain.conversations or []}
    samples = [
        replace(sample, outputs={**sample.outputs, "plain": said[sample.prompt]})
        if sample.prompt in said
        else sample
        for sample in contents.samples
    ]
    return replace(contents, plain=shown, samples=samples)


def plain_beside(folder: Path, contents: Comparison) -> str | None:
    """The folder of the plain run that `tune --against-plain` made of a run, where it has ended."""
    plain = folder / "plain"
    made = contents.kind == "run" and contents.experiment.get("against_plain")
    return str(plain) if made and (plain / "run.json").is_file() else None


def _check_same(run: Run, plain: Run, folder: Path) -> None:
    """Raise FileError where the two runs were not measured on the same text."""
    ours, theirs = run.after or Measured(), plain.after or Measured()
    pairs = {
        "held-out rows": (ours.domain, theirs.domain),
        "the base's own answers": (ours.own, theirs.own),
        "general text": (ours.general, theirs.general),
    }
    for what, (first, second) in pairs.items():
        if _measured_size(first) != _measured_size(second):
            raise FileError(
                f"'{folder}' was measured on other {what}: expected {_in_words(first)}, found "
                f"{_in_words(second)}; give a plain run with the same --data, --eval-data, "
                "--general and lengths"
            )


def _measured_size(loss: Loss | None) -> tuple[int | None, int | None] | None:
    return None if loss is None else (loss.documents, loss.tokens)


def _in_words(loss: Loss | None) -> str:
    return "none" if loss is None else f"{loss.documents} of {loss.tokens} tokens"


def with_conversations(contents: Comparison, files: Sequence[str]) -> Comparison:
    """The contents with conversations of this run and, from a second file, of the plain one."""
    rows = [_pairs_in(Path(file)) for file in files]
    plain = {_prompt_of_pair(row): row["after"] for row in rows[1]} if len(rows) > 1 else {}
    samples = []
    for row in rows[0]:
        outputs = {"base": row["before"], "after": row["after"]}
        if _prompt_of_pair(row) in plain:
            outputs["plain"] = plain[_prompt_of_pair(row)]
        shown: dict[str, Text | None] = {
            name: str(said)[:LONGEST_ANSWER] for name, said in outputs.items()
        }
        samples.append(Sample(None, _prompt_of_pair(row), outputs=shown))
    return replace(contents, samples=[*samples, *contents.samples])


def _pairs_in(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of pairs. Raises FileError for anything else."""
    rows = file_rows(path)
    for number, row in enumerate(rows, 1):
        if not {"prompt", "before", "after"} <= set(row):
            raise FileError(
                f"{path}, row {number}: expected prompt, before and after, found {brief(row)}; "
                "make the file with forgetless chat RUN --prompts FILE --out PAIRS.jsonl"
            )
    return rows


def _prompt_of_pair(row: dict[str, Any]) -> str:
    """The prompt of a pair, below what its system prompt asks for."""
    system = [
        str(turn.get("content"))
        for turn in row.get("messages") or []
        if isinstance(turn, dict) and turn.get("role") == "system"
    ]
    return "\n".join([*(f"[system] {text}" for text in system), str(row["prompt"])])
