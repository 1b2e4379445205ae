"""The page: one HTML file that opens from disk and asks the network for nothing.

    write(load("out/lab"), "report.html")        # or: forgetless report out/lab

Styles, script and Plotly's own script are written into it. Jinja escapes all text; what scripts
read is JSON in which no tag can begin; a Content-Security-Policy forbids every request and every
script but those whose hash it names. Costs 5 MB, nearly all of it Plotly.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from forgetless.files.atomic import atomic_path
from forgetless.files.room import check_output_file
from forgetless.options.verbs import ReportOptions
from forgetless.report import budget as promise
from forgetless.report import figures, numbers, tables
from forgetless.report.contents import Contents, label, load, recorded_text
from forgetless.report.markdown import markdown
from forgetless.report.palette import PATHS, looks
from forgetless.report.summary import equal_rows, headlines, hidden_at_first

HERE = Path(__file__).parent
SPOKEN = {"base": "before", "plain": "after plain", "hold": "after holding"}


def report(options: ReportOptions) -> None:
    """`forgetless report`: writes the page and prints its path; markdown goes to standard output
    where no file is named.
    """
    folder = Path(options.folder)
    contents = load(folder)
    if options.title:
        contents = {**contents, "title": options.title}
    if options.format == "markdown" and not options.out:
        print(markdown(contents), end="")
        return
    path = Path(options.out) if options.out else folder / "report.html"
    check_output_file(path)
    print(write(contents, path, form=options.format))


def write(contents: Contents, path: str | Path, *, form: str = "html") -> Path:
    """Write the report, whole or not at all; `form` is html or markdown."""
    shown = page(contents) if form == "html" else markdown(contents)
    with atomic_path(path) as temporary:
        temporary.write_text(shown, encoding="utf-8", newline="\n")
    return Path(path)


def page(contents: Contents) -> str:
    """The HTML."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.ChainableUndefined,
                                     trim_blocks=True, lstrip_blocks=True)  # fmt: skip # chainable: a key that a folder lacks is missing, not an error
    environment.filters |= {
        "nats": numbers.nats,
        "line": lambda value: numbers.text(value or None),
        "duration": numbers.duration,
        "exact": numbers.exact,
    }
    text, drawn = recorded_text(contents), _figures(contents)
    hidden = hidden_at_first(contents, text)
    scripts = [plotly(), (HERE / "page.js").read_text(encoding="utf-8")]
    return environment.get_template("page.html.jinja").render(
        contents=contents,
        label=lambda name: label(contents, name),
        headlines=headlines(contents, text),
        looks=looks(contents["methods"], contents["reference"]),
        paths=PATHS,
        choices=_choices(contents, text),
        drawn={name for name, views in drawn.items() if views},
        tables=_tables(contents),
        samples=[_sample(contents, sample) for sample in contents["samples"]],
        failed=[run for run in contents["runs"] if run.get("status", "done") != "done"],
        settings=numbers.settings,
        experiment=_experiment(contents["experiment"]),
        policy=policy(scripts),
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        hidden=hidden,
        data=Markup(as_json({"figures": _rounded(drawn), "hidden": hidden})),
    )


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


def _choices(contents: Contents, text: str | None) -> dict[str, list[str]]:
    """What can be chosen, the first one at the start: domains, texts (the recorded kind first),
    shares, importance files.
    """
    rows = [
        row
        for texts in contents["equal_learning"].values()
        for rows in texts.values()
        for row in rows
    ]
    shares = sorted({row["share"] for row in rows}, reverse=True)
    texts = [str(entry["name"]) for entry in contents["texts"]]
    return {
        "domain": [str(domain["name"]) for domain in contents["domains"]],
        "text": sorted(texts, key=lambda name: name != text),
        "share": [numbers.percent(share) for share in shares],
        "importance": [str(item.get("name")) for item in contents["importance"]],
    }


def _figures(contents: Contents) -> dict[str, list[dict[str, Any]]]:
    """Every figure in every view of it: {"frontier": [{"domain", "text", "figure"}, ...], ...}."""
    found: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("frontier", "equal", "trade", "control", "curves", "heat", "movement")
    }
    look = looks(contents["methods"], contents["reference"])

    def add(name: str, figure: figures.Figure | None, **view: str) -> None:
        if figure is not None:
            found[name].append({**view, "figure": figure})

    for domain in (str(entry["name"]) for entry in contents["domains"]):
        for text in (str(entry["name"]) for entry in contents["texts"]):
            add(
                "frontier", figures.frontier(contents, look, domain, text), domain=domain, text=text
            )
            for share in sorted({row["share"] for row in equal_rows(contents, domain, text)}):
                add(
                    "equal",
                    figures.equal_learning(contents, look, domain, text, share),
                    domain=domain,
                    text=text,
                    share=numbers.percent(share),
                )
        add("curves", figures.curves(contents, look, domain), domain=domain)
        add("movement", figures.movement(contents, look, domain), domain=domain)
    for item in contents["importance"]:
        add("heat", figures.heat_map(item), importance=str(item.get("name")))
    if contents["budget"]:
        add("trade", promise.trade_off(contents["budget"]))
        add("control", promise.control(contents["budget"]))
    return found


def _tables(contents: Contents) -> dict[str, Any]:
    pairs = [
        (str(domain["name"]), str(text["name"]))
        for domain in contents["domains"]
        for text in contents["texts"]
    ]
    views = (
        []
        if contents["kind"] == "run"
        else [(domain, text, tables.methods(contents, domain, text)) for domain, text in pairs]
    )
    return {
        "methods": views,
        "runs": tables.runs(contents),
        "measures": tables.measures(contents),
        "before": tables.before(contents),
        "budget": promise.table(contents["budget"]) if contents["budget"] else None,
        "sequences": tables.sequences(contents),
        "sequence_summary": tables.sequence_summary(contents),
    }


def _sample(contents: Contents, sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample with its outputs in reading order: before, after plain, after holding, the rest."""
    outputs = sample.get("outputs") or {}
    order = [
        *(name for name in SPOKEN if name in outputs),
        *(name for name in outputs if name not in SPOKEN),
    ]
    shown = [
        {
            "name": name,
            "title": SPOKEN.get(name) or f"after {label(contents, name)}",
            "text": str(outputs[name] or "").strip(),
        }
        for name in order
    ]
    return {
        "domain": sample.get("domain"),
        "prompt": sample.get("prompt"),
        "reference": sample.get("reference"),
        "outputs": shown,
    }


def _experiment(found: Any) -> str:
    """The experiment, or a run's options, as YAML: compare.json has the text of the file."""
    if not found or isinstance(found, str):
        return str(found or "")
    return str(yaml.safe_dump(_plain(found), sort_keys=False, allow_unicode=True, width=100))


def _plain(data: Any) -> Any:
    """Plain values for YAML's safe dumper."""
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    return data if data is None or isinstance(data, (bool, int, float)) else str(data)
