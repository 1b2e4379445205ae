"""What the page shows of a comparison or a run, as page.html.jinja and page.js take it: what can be
chosen, every figure in every view, the tables, the samples, the settings.

    page_tables(contents).runs          # a Table
    figures(contents)["frontier"]       # [{"domain": ..., "text": ..., "figure": ...}, ...]

Nothing here is HTML; page.py makes that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from forgetless.files.compare_json import ComparedSequence, Comparison, Sample
from forgetless.files.schema import Text, to_json
from forgetless.files.untrusted import JsonObject
from forgetless.report import numbers, sequence_tables, tables
from forgetless.report.behaviours import behaviour_table, kind_table
from forgetless.report.budget import budget_table
from forgetless.report.budget_figures import control, trade_off
from forgetless.report.cells import Table
from forgetless.report.contents import label
from forgetless.report.drawing import Figure, FigurePart
from forgetless.report.frontier_figures import equal_learning, frontier
from forgetless.report.gate import gate_table
from forgetless.report.importance_figure import heat_map
from forgetless.report.palette import looks
from forgetless.report.summary import equal_rows
from forgetless.report.training_figures import movement_figure, training_curves

# Whose words a sample shows first, and what stands above them.
SPOKEN = {
    "base": "before",
    "plain": "after plain",
    "hold": "after holding",
    "after": "after",
}


def choices(contents: Comparison, text: str | None) -> dict[str, list[str]]:
    """What can be chosen, the first one at the start: domains, texts (the recorded kind first),
    levels of learning, importance files.
    """
    levels = {
        row.level
        for by_text in contents.equal_learning.values()
        for rows in (by_text or {}).values()
        for row in rows or []
    }
    texts = [each.name for each in contents.texts]
    return {
        "domain": [domain.name for domain in contents.domains],
        "text": sorted(texts, key=lambda name: name != text),
        "share": [numbers.percent(level) for level in sorted(levels, reverse=True)],
        "importance": [str(item.name) for item in contents.importance],
    }


# The figures of a page, in the order of its data.
FIGURES = ("frontier", "equal", "trade", "control", "curves", "heat", "movement")
View = tuple[str, Figure | None, dict[str, str]]  # name, figure, what was chosen to see it


def figures(contents: Comparison) -> dict[str, list[FigurePart]]:
    """Every figure in every view of it: {"frontier": [{"domain", "text", "figure"}, ...], ...}."""
    views: dict[str, list[FigurePart]] = {name: [] for name in FIGURES}
    for name, figure, choice in _views(contents):
        if figure is not None:
            views[name].append({**choice, "figure": figure})
    return views


def _views(contents: Comparison) -> Iterator[View]:
    look = looks(contents.methods, contents.reference)
    for domain in (each.name for each in contents.domains):
        for text in (each.name for each in contents.texts):
            choice = {"domain": domain, "text": text}
            yield "frontier", frontier(contents, look, domain, text), choice
            for level in sorted({row.level for row in equal_rows(contents, domain, text)}):
                bars = equal_learning(contents, look, domain, text, level)
                yield "equal", bars, {**choice, "share": numbers.percent(level)}
        yield "curves", training_curves(contents, look, domain), {"domain": domain}
        yield "movement", movement_figure(contents, look, domain), {"domain": domain}
    for item in contents.importance:
        yield "heat", heat_map(item), {"importance": str(item.name)}
    if contents.budget is not None:
        yield "trade", trade_off(contents.budget), {}
        yield "control", control(contents.budget), {}


@dataclass(frozen=True)
class PageTables:
    """The tables of a page, by the names that its template knows."""

    methods: list[tuple[str, str, Table]]  # of each domain, measured on each text
    runs: Table
    measures: Table
    before: Table
    budget: Table | None
    gate: Table | None
    behaviours: Table
    kinds: Table
    sequences: list[tuple[ComparedSequence, Table]]
    sequence_summary: list[tuple[str, Table]]


def page_tables(contents: Comparison) -> PageTables:
    views = [
        (domain.name, text.name, tables.methods(contents, domain.name, text.name))
        for domain in contents.domains
        for text in contents.texts
        if contents.kind != "run"
    ]
    return PageTables(
        methods=views,
        runs=tables.runs(contents),
        measures=tables.measures(contents),
        before=tables.before(contents),
        budget=None if contents.budget is None else budget_table(contents.budget),
        gate=None if contents.gate is None else gate_table(contents.gate),
        behaviours=behaviour_table(contents.behaviours),
        kinds=kind_table(contents.divergence_by_kind),
        sequences=sequence_tables.sequences(contents),
        sequence_summary=sequence_tables.sequence_summary(contents),
    )


@dataclass(frozen=True)
class ShownOutput:
    """What one model says, with the method's name and what stands above it."""

    name: str
    title: str
    text: str


@dataclass(frozen=True)
class ShownSample:
    """A sample as the page shows it."""

    domain: Text | None
    prompt: Text | None
    reference: Text | None
    outputs: list[ShownOutput]


def shown_sample(contents: Comparison, sample: Sample) -> ShownSample:
    """A sample with its outputs in reading order: before, after plain, after holding, the rest."""
    order = [*(name for name in SPOKEN if name in sample.outputs), *sample.outputs]
    outputs = [
        ShownOutput(
            name=name,
            title=_title(contents, sample, name),
            text=str(sample.outputs[name] or "").strip(),
        )
        for name in dict.fromkeys(order)
    ]
    return ShownSample(sample.domain, sample.prompt, sample.reference, outputs)


def _title(contents: Comparison, sample: Sample, name: str) -> str:
    """What stands above what one model says."""
    if name == "after" and "plain" in sample.outputs:
        return "after this run"
    return SPOKEN.get(name) or f"after {label(contents, name)}"


def environment_pairs(contents: Comparison) -> JsonObject:
    """Where the runs ran, as names with values."""
    if contents.environment is None:
        return {}
    known = to_json(contents.environment)
    return {
        **{name: value for name, value in known.items() if name != "versions"},
        **known["versions"],
    }


def experiment_text(experiment: Any) -> str:
    """The experiment, or a run's options, as YAML: compare.json has the text of the file."""
    if not experiment or isinstance(experiment, str):
        return str(experiment or "")
    return str(
        yaml.safe_dump(_yaml_ready(experiment), sort_keys=False, allow_unicode=True, width=100)
    )


def _yaml_ready(data: Any) -> Any:
    """Plain values for YAML's safe dumper."""
    if isinstance(data, Mapping):
        return {str(key): _yaml_ready(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_yaml_ready(value) for value in data]
    return data if data is None or isinstance(data, (bool, int, float)) else str(data)
