"""The page: one HTML file that opens from disk and asks the network for nothing.

    write_report(load_contents("out/lab"), "report.html")     # or: forgetless report out/lab

Styles, script and Plotly's own script are written into it. Jinja escapes all text; what scripts
read is JSON in which no tag can begin; a Content-Security-Policy forbids every request and every
script but those whose hash it names. Costs 5 MB, nearly all of it Plotly.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from forgetless.files.atomic import atomic_path
from forgetless.files.compare_json import ComparedSequence, Comparison, Sample
from forgetless.files.room import check_output_file
from forgetless.files.schema import Text, to_json
from forgetless.files.untrusted import JsonObject
from forgetless.options.compare import ReportOptions
from forgetless.report import numbers, sequence_tables, tables
from forgetless.report.budget import budget_table
from forgetless.report.budget_figures import control, trade_off
from forgetless.report.cells import Table
from forgetless.report.contents import label, load_contents, recorded_text
from forgetless.report.drawing import Figure, FigurePart
from forgetless.report.frontier_figures import equal_learning, frontier
from forgetless.report.importance_figure import heat_map
from forgetless.report.markdown import markdown
from forgetless.report.palette import PATHS, looks
from forgetless.report.summary import equal_rows, headlines, hidden_at_first
from forgetless.report.training_figures import movement_figure, training_curves

# Where the template, its styles and its script lie.
HERE = Path(__file__).parent
# Whose words a sample shows first, and what stands above them.
SPOKEN = {"base": "before", "plain": "after plain", "hold": "after holding"}


def report(options: ReportOptions) -> None:
    """`forgetless report`: writes the page and prints its path; markdown goes to standard output
    where no file is named.
    """
    folder = Path(options.folder)
    contents = load_contents(folder)
    if options.title:
        contents = replace(contents, title=options.title)
    if options.format == "markdown" and not options.out:
        print(markdown(contents), end="")
        return
    path = Path(options.out) if options.out else folder / "report.html"
    check_output_file(path)
    print(write_report(contents, path, form=options.format))


def write_report(contents: Comparison, path: str | Path, *, form: str = "html") -> Path:
    """Write the report, whole or not at all; `form` is html or markdown."""
    shown = page(contents) if form == "html" else markdown(contents)
    with atomic_path(path) as temporary:
        temporary.write_text(shown, encoding="utf-8", newline="\n")
    return Path(path)


def page(contents: Comparison) -> str:
    """The HTML."""
    text = recorded_text(contents)
    figures = _figures(contents)
    hidden = hidden_at_first(contents, text)
    scripts = [plotly(), (HERE / "page.js").read_text(encoding="utf-8")]
    return (
        _templates()
        .get_template("page.html.jinja")
        .render(
            contents=contents,
            label=lambda name: label(contents, name),
            headlines=headlines(contents, text),
            looks=looks(contents.methods, contents.reference),
            paths=PATHS,
            choices=_choices(contents, text),
            drawn={name for name, views in figures.items() if views},
            tables=_tables(contents),
            samples=[_sample(contents, sample) for sample in contents.samples],
            failed=[run for run in contents.runs if not run.done],
            settings=numbers.settings,
            experiment=_experiment(contents.experiment),
            environment=_environment(contents),
            policy=policy(scripts),
            style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
            scripts=[Markup(script) for script in scripts],
            hidden=hidden,
            data=Markup(as_json({"figures": _rounded(figures), "hidden": hidden})),
        )
    )


def _templates() -> jinja2.Environment:
    """Where the page's template is read: all text is escaped, and a key that a folder lacks is
    missing, not an error.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "nats": numbers.nats,
        "line": lambda value: numbers.shown(value or None),
        "duration": numbers.duration,
        "exact": numbers.exact,
    }
    return environment


def plotly() -> str:
    """Plotly's script as its package brings it, without importing the package.

    Raises ValueError where it is not installed.
    """
    spec = find_spec("plotly")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "the report's figures need plotly, which is not installed; run: pip install plotly, "
            "or give --format markdown"
        )
    found = (
        Path(next(iter(spec.submodule_search_locations))) / "package_data" / "plotly.min.js"
    ).read_text(encoding="utf-8")
    assert "</script" not in found
    return found.replace("\r", "")  # as HTML reads it, so that its hash is right


def policy(scripts: Iterable[str]) -> str:
    """A Content-Security-Policy under which the page can load nothing and run only these scripts;
    Plotly sets styles and exports pictures.
    """
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: "
        "blob:; base-uri 'none'; form-action 'none'"
    )


def as_json(data: Any) -> str:
    """JSON that may stand inside a script element: no tag, comment or line separator can begin in
    it.
    """
    found = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        found = found.replace(sign, f"\\u{ord(sign):04x}")
    return found


def _rounded(data: Any) -> Any:
    """Numbers to six digits, which no eye can tell apart in a figure; tables keep them whole."""
    if isinstance(data, dict):
        return {key: _rounded(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_rounded(value) for value in data]
    return float(f"{data:.6g}") if isinstance(data, float) else data


def _choices(contents: Comparison, text: str | None) -> dict[str, list[str]]:
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


def _figures(contents: Comparison) -> dict[str, list[FigurePart]]:
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
    sequences: list[tuple[ComparedSequence, Table]]
    sequence_summary: list[tuple[str, Table]]


def _tables(contents: Comparison) -> PageTables:
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


def _sample(contents: Comparison, sample: Sample) -> ShownSample:
    """A sample with its outputs in reading order: before, after plain, after holding, the rest."""
    order = [*(name for name in SPOKEN if name in sample.outputs), *sample.outputs]
    outputs = [
        ShownOutput(
            name=name,
            title=SPOKEN.get(name) or f"after {label(contents, name)}",
            text=str(sample.outputs[name] or "").strip(),
        )
        for name in dict.fromkeys(order)
    ]
    return ShownSample(sample.domain, sample.prompt, sample.reference, outputs)


def _environment(contents: Comparison) -> JsonObject:
    """Where the runs ran, as names with values."""
    if contents.environment is None:
        return {}
    known = to_json(contents.environment)
    return {
        **{name: value for name, value in known.items() if name != "versions"},
        **known["versions"],
    }


def _experiment(experiment: Any) -> str:
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
