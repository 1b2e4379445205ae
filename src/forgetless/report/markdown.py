"""The report as markdown, for a model card or a pull request: the summary, the table at equal
learning, the settings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from forgetless.report import budget as promise
from forgetless.report import numbers, tables
from forgetless.report.contents import Contents, recorded_text
from forgetless.report.summary import headlines

SPECIAL = re.compile(r"([\\`*_\[\]<>|#~])")


def plain(value: Any) -> str:
    """Text that markdown shows as it is, on one line."""
    return SPECIAL.sub(r"\\\1", " ".join(str(value).split()))


def markdown(contents: Contents) -> str:
    """The whole document, ending in a newline."""
    text = recorded_text(contents)
    lines = [f"## {plain(contents['title'] or 'forgetless report')}", "", *_summary(contents, text)]
    for domain in (
        [str(domain["name"]) for domain in contents["domains"]]
        if text and contents["kind"] != "run"
        else []
    ):
        lines += [
            f"### {plain(domain)}",
            "",
            f"Forgetting on {plain(text)} at equal learning, in nats per token, ± standard error; "
            "shares are of what plain fine-tuning learns.",
            "",
            table(tables.methods(contents, domain, str(text))),
            "",
        ]
        for other in [str(other["name"]) for other in contents["texts"] if other["name"] != text]:
            if (found := tables.equal(contents, domain, other)).rows:
                lines += [
                    f"The same on {plain(other)}, which importance was not recorded on:",
                    "",
                    table(found),
                    "",
                ]
    for name, found in tables.sequence_summary(contents):
        lines += [
            f"### {plain(name)}, one domain after another",
            "",
            "Losses in nats per token, mean over seeds ± standard error; backward transfer is what "
            "later domains did to earlier ones (negative: forgotten).",
            "",
            table(found),
            "",
        ]
    if contents["budget"]:
        lines += ["### The budget", "", table(promise.table(contents["budget"])), ""]
    if contents["measures"]:
        lines += ["### Before and after", "", table(tables.measures(contents)), ""]
    failed = [run for run in contents["runs"] if run.get("status", "done") != "done"]
    if failed:
        lines += [
            "### Runs that did not finish",
            "",
            *(
                f"* {plain(r['method'])} on {plain(r.get('domain'))}, "
                f"{plain(numbers.settings(r.get('settings')))}: "
                f"{plain(r['status'])}" + (f" ({plain(r['error'])})" if r.get("error") else "")
                for r in failed
            ),
            "",
        ]
    return "\n".join([*lines, *_settings(contents)]) + "\n"


def _summary(contents: Contents, text: str | None) -> list[str]:
    lines = [
        f"**{plain(h.number)} {plain(h.phrase)}** ({plain(h.place)}): {plain(h.detail)}"
        + (f"; {plain(h.noise)}." if h.noise else ".")
        + "\n"
        for h in headlines(contents, text)
    ]
    return [*lines, *(f"* {plain(sentence)}" for sentence in contents["verdict"]), ""]


def table(found: tables.Table) -> str:
    """A markdown table, numbers aligned to the right."""
    head = "| " + " | ".join(plain(column.title) for column in found.columns) + " |"
    rule = "|" + "|".join(" ---: " if column.number else " --- " for column in found.columns) + "|"
    return "\n".join(
        [
            head,
            rule,
            *("| " + " | ".join(plain(cell.shown) for cell in row) + " |" for row in found.rows),
        ]
    )


def _settings(contents: Contents) -> list[str]:
    environment: Mapping[str, Any] = contents["environment"]
    versions = ", ".join(
        f"{name} {version}" for name, version in (environment.get("versions") or {}).items()
    )
    pairs = [
        ("model", contents["model"]),
        *((key.replace("_", " "), value) for key, value in contents["settings"].items()),
        *(
            (
                (key.replace("_", " "), value)
                for key, value in contents["experiment"].items()
                if key != "model"
            )
            if contents["kind"] == "run"
            else ()
        ),
        ("device", environment.get("device")),
        ("commit", environment.get("commit")),
        ("versions", versions),
        ("made", contents["created"]),
    ]
    pairs += [(f"noise, {domain}", _noise(noise)) for domain, noise in contents["noise"].items()]
    shown = [
        f"* {plain(key)}: {plain(numbers.text(value))}"
        for key, value in pairs
        if value not in (None, "", False)
    ]
    return ["<details><summary>Settings</summary>", "", *shown, "", "</details>"]


def _noise(noise: Mapping[str, Any]) -> str:
    lost = "".join(
        f", forgetting on {text} {numbers.nats(value)}"
        for text, value in (noise.get("forgetting") or {}).items()
    )
    return f"learning {numbers.nats(noise.get('learning'))}{lost}" + (
        f" ({noise['how']})" if noise.get("how") else ""
    )
