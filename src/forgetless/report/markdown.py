"""The report as markdown, for a model card or a pull request: the summary, the table at equal
learning, the settings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from forgetless.files.compare_json import Comparison, NoiseFloor
from forgetless.files.run_json import Environment
from forgetless.report import numbers, sequence_tables, tables
from forgetless.report.behaviours import behaviour_table, kind_table
from forgetless.report.budget import budget_table
from forgetless.report.cells import Table
from forgetless.report.contents import diverges, recorded_text
from forgetless.report.gate import gate_table
from forgetless.report.summary import headlines

# What markdown reads as more than text.
SPECIAL = re.compile(r"([\\`*_\[\]<>|#~])")
# Where sites such as GitHub make a link or call a person without being asked: behind '@', and
# behind the beginning of an address.
ALIVE = re.compile(r"(@(?=\w)|\b(?:https?|ftp|mailto|xmpp)(?=:)|\bwww(?=\.))", re.IGNORECASE)


def plain(value: Any) -> str:
    """Text that markdown shows as it is, on one line; addresses and names of people in it are dead,
    each broken by an empty comment.
    """
    return ALIVE.sub(r"\1<!-- -->", SPECIAL.sub(r"\\\1", " ".join(str(value).split())))


def markdown(contents: Comparison) -> str:
    """The whole document, ending in a newline."""
    text = recorded_text(contents)
    lines = [
        f"## {plain(contents.title or 'forgetless report')}",
        "",
        *_summary(contents, text),
        *_gate(contents),
        *_conversations(contents),
        *_behaviours(contents),
        *_domain_sections(contents, text),
        *_sequence_sections(contents),
    ]
    if contents.budget is not None:
        lines += ["### The budget", "", markdown_table(budget_table(contents.budget)), ""]
    if contents.measures:
        lines += ["### Before and after", "", markdown_table(tables.measures(contents)), ""]
    return "\n".join([*lines, *_failures(contents), *_settings_section(contents)]) + "\n"


def markdown_table(table: Table) -> str:
    """A markdown table, numbers aligned to the right."""
    head = "| " + " | ".join(plain(column.title) for column in table.columns) + " |"
    rule = "|" + "|".join(" ---: " if column.number else " --- " for column in table.columns) + "|"
    rows = ("| " + " | ".join(plain(cell.shown) for cell in row) + " |" for row in table.rows)
    return "\n".join([head, rule, *rows])


def _summary(contents: Comparison, text: str | None) -> Iterator[str]:
    for each in headlines(contents, text):
        noise = f"; {plain(each.noise)}" if each.noise else ""
        said = f"**{plain(each.number)} {plain(each.phrase)}** ({plain(each.place)})"
        yield f"{said}: {plain(each.detail)}{noise}.\n"
    yield from (f"* {plain(sentence)}" for sentence in contents.verdict)
    yield ""


def _gate(contents: Comparison) -> Iterator[str]:
    """The bounds that a tuned model was checked against."""
    if contents.gate is not None:
        yield from (markdown_table(gate_table(contents.gate)), "")


def _conversations(contents: Comparison) -> Iterator[str]:
    """What the base and the tuned model of a single run say to the same prompts."""
    if contents.kind != "run" or not contents.samples:
        return
    yield from ("### In its own words", "")
    yield (
        "The same prompts with the same random numbers: first those whose answers changed most, by "
        "the divergence of the tuned model on the base's answer, one of a kind; then as many drawn "
        "at random."
    )
    for sample in contents.samples:
        yield from ("", f"**{plain(sample.prompt or '')}** ({plain(sample.domain or '')})", "")
        for name, said in sample.outputs.items():
            yield f"* {'before' if name == 'base' else plain(name)}: {plain(said or '')}"
    yield ""


def _behaviours(contents: Comparison) -> Iterator[str]:
    """How often answers did what users know, and the divergence of each kind of answer."""
    if contents.behaviours:
        yield from ("### Behaviours", "", markdown_table(behaviour_table(contents.behaviours)), "")
        yield from (f"* {plain(sentence)}" for sentence in contents.not_judged)
        yield ""
    if contents.divergence_by_kind:
        yield from (markdown_table(kind_table(contents.divergence_by_kind)), "")


def _domain_sections(contents: Comparison, text: str | None) -> Iterator[str]:
    """For each domain the methods at equal learning, on every general text."""
    if not text or contents.kind == "run":
        return
    for domain in contents.domains:
        yield from (f"### {plain(domain.name)}", "")
        yield (
            f"{_what_is_lost(contents, text)} at equal learning, in nats per token, ± standard "
            "error; levels are fractions of what plain fine-tuning learns."
        )
        yield from ("", markdown_table(tables.methods(contents, domain.name, text)), "")
        for other in (each.name for each in contents.texts if each.name != text):
            if (table := tables.equal(contents, domain.name, other)).rows:
                same = diverges(contents, other) == diverges(contents, text)
                what = f"The same on {plain(other)}" if same else _what_is_lost(contents, other)
                yield f"{what}, which importance was not recorded on:"
                yield from ("", markdown_table(table), "")


def _what_is_lost(contents: Comparison, text: str) -> str:
    """What forgetting on a general text is, at the beginning of a sentence."""
    if diverges(contents, text):
        return f"Divergence from the base on its own answers ({plain(text)})"
    return f"Forgetting on {plain(text)}"


def _sequence_sections(contents: Comparison) -> Iterator[str]:
    for name, table in sequence_tables.sequence_summary(contents):
        yield from (f"### {plain(name)}, one domain after another", "")
        yield (
            "Losses in nats per token, mean over seeds ± standard error; backward transfer is what "
            "later domains did to earlier ones (negative: forgotten)."
        )
        yield from ("", markdown_table(table), "")


def _failures(contents: Comparison) -> Iterator[str]:
    failed = [run for run in contents.runs if not run.done]
    if not failed:
        return
    yield from ("### Runs that did not finish", "")
    for run in failed:
        settings = plain(numbers.settings(run.settings))
        why = f" ({plain(run.error)})" if run.error else ""
        yield f"* {plain(run.method)} on {plain(run.domain)}, {settings}: {plain(run.status)}{why}"
    yield ""


def _settings_section(contents: Comparison) -> Iterator[str]:
    yield from ("<details><summary>Settings</summary>", "")
    for name, value in _setting_pairs(contents):
        if value not in (None, "", False):
            yield f"* {plain(name)}: {plain(numbers.shown(value))}"
    yield from ("", "</details>")


def _setting_pairs(contents: Comparison) -> Iterator[tuple[str, Any]]:
    """What the runs were made with, by name."""
    yield "model", contents.model
    options = contents.experiment if contents.kind == "run" else {}
    others = {key: value for key, value in options.items() if key != "model"}
    for key, value in (contents.settings | others).items():
        yield key.replace("_", " "), value
    environment = contents.environment or Environment()
    versions = (f"{name} {version}" for name, version in environment.versions.items())
    yield "device", environment.device
    yield "commit", environment.commit
    yield "versions", ", ".join(versions)
    yield "made", contents.created
    for domain, noise in contents.noise.items():
        yield f"noise, {domain}", _noise_in_words(noise or NoiseFloor())


def _noise_in_words(noise: NoiseFloor) -> str:
    forgetting = "".join(
        f", forgetting on {text} {numbers.nats(value)}" for text, value in noise.forgetting.items()
    )
    how = f" ({noise.how})" if noise.how else ""
    return f"learning {numbers.nats(noise.learning)}{forgetting}{how}"
