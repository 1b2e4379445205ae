"""The page: one HTML file that opens from disk and asks the network for nothing.

    write_report(load_contents("out/lab"), "report.html")     # or: forgetless report out/lab

Styles and scripts are written into it; charts.js draws the figures as SVG. Jinja escapes all text;
what scripts read is JSON in which no tag can begin; a Content-Security-Policy forbids every request
and every script but those whose hash it names. The page of a run has some 100 kB. (Plotly's own
script had 4.8 MB, and no package on PyPI brings its smaller bundles.)
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from forgetless.files.atomic import atomic_path
from forgetless.files.compare_json import Comparison
from forgetless.files.lock import only_writer
from forgetless.files.outputs import check_new_file
from forgetless.options.compare import ReportOptions
from forgetless.options.option import several
from forgetless.report import numbers
from forgetless.report.against_plain import (
    against_plain,
    plain_beside,
    with_conversations,
)
from forgetless.report.contents import label, load_contents, recorded_text
from forgetless.report.markdown import markdown
from forgetless.report.page_parts import (
    choices,
    environment_pairs,
    experiment_text,
    figures,
    page_tables,
    shown_sample,
)
from forgetless.report.palette import PATHS, looks
from forgetless.report.summary import headlines, hidden_at_first

# Where the template, its styles and its script lie.
HERE = Path(__file__).parent
# What every report says of itself, so that it may be written over by the next one.
MADE = "made by forgetless report"
# Bytes at the beginning and at the end of a file that are searched for that.
LOOKED_AT = 4096


def report(options: ReportOptions) -> None:
    """`forgetless report`: writes the page and prints its path; markdown goes to standard output
    where no file is named.
    """
    folder = Path(options.folder)
    contents = load_contents(folder)
    if plain := options.against_plain or plain_beside(folder, contents):
        contents = against_plain(contents, folder, Path(plain))
    if options.conversations:
        contents = with_conversations(contents, several(options.conversations))
    if options.title:
        contents = replace(contents, title=options.title)
    if options.format == "markdown" and not options.out:
        print(markdown(contents), end="")
        return
    path = Path(options.out) if options.out else folder / "report.html"
    check_new_file(path, is_report, {})
    with only_writer(path, folder=False):
        written = write_report(contents, path, form=options.format)
    print(written)


def write_report(contents: Comparison, path: str | Path, *, form: str = "html") -> Path:
    """Write the report, whole or not at all; `form` is html or markdown."""
    shown = page(contents) if form == "html" else markdown(contents)
    if form != "html":
        shown += f"\n<!-- {MADE} -->\n"
    with atomic_path(path) as temporary:
        temporary.write_text(shown, encoding="utf-8", newline="\n")
    return Path(path)


def is_report(path: Path) -> bool:
    """Whether a file is a report of ours, as it says near its beginning or at its end."""
    with open(path, "rb") as file:
        start = file.read(LOOKED_AT)
        file.seek(max(0, path.stat().st_size - LOOKED_AT))
        return MADE.encode() in start or MADE.encode() in file.read()


def page(contents: Comparison) -> str:
    """The HTML."""
    text = recorded_text(contents)
    drawn = figures(contents)
    hidden = hidden_at_first(contents, text)
    drawing = ["charts.js"] if any(drawn.values()) else []
    scripts = [(HERE / name).read_text(encoding="utf-8") for name in (*drawing, "page.js")]
    return (
        _templates()
        .get_template("page.html.jinja")
        .render(
            contents=contents,
            label=lambda name: label(contents, name),
            headlines=headlines(contents, text),
            looks=looks(contents.methods, contents.reference),
            paths=PATHS,
            choices=choices(contents, text),
            drawn={name for name, views in drawn.items() if views},
            tables=page_tables(contents),
            samples=[shown_sample(contents, sample) for sample in contents.samples],
            failed=[run for run in contents.runs if not run.done],
            settings=numbers.settings,
            experiment=experiment_text(contents.experiment),
            environment=environment_pairs(contents),
            policy=policy(scripts),
            links=project_links(),
            style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
            scripts=[Markup(script) for script in scripts],
            hidden=hidden,
            data=Markup(as_json({"figures": _rounded(drawn), "hidden": hidden, "paths": PATHS})),
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


def project_links() -> list[tuple[str, str]]:
    """(name, address) of what the installed package says of itself: paper, homepage, repository."""
    try:
        known = metadata("forgetless").get_all("Project-URL") or []
    except PackageNotFoundError:
        return []
    pairs = (str(entry).partition(",") for entry in known)
    return [(name.strip(), address.strip()) for name, _, address in pairs]


def policy(scripts: Iterable[str]) -> str:
    """A Content-Security-Policy under which the page can load nothing and run only these scripts;
    charts are measured by styles, and saved.
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
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _rounded(data: Any) -> Any:
    """Numbers to six digits, which no eye can tell apart in a figure; tables keep them whole."""
    if isinstance(data, dict):
        return {key: _rounded(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_rounded(value) for value in data]
    return float(f"{data:.6g}") if isinstance(data, float) else data
