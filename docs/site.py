"""What mkdocs makes beside the pages of this folder: the command line from its options, and pages
of the repository that stand elsewhere, with their links mended.

mkdocs.yml names this file as a hook and the functions are called by name:
https://www.mkdocs.org/user-guide/configuration/#hooks
"""

from __future__ import annotations

import dataclasses
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from forgetless.options.option import GROUPS, flag
from forgetless.options.verbs import VERBS, Verb

ROOT = Path(__file__).resolve().parent.parent
# Page of the site -> file of the repository that it shows.
SHOWN = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "evidence/log.md": "LOG.md",
    "evidence/benchmarks.md": "benchmarks/README.md",
    "evidence/lab.md": "experiments/lab.md",
    "evidence/budget.md": "experiments/budget.md",
    "evidence/predicted.md": "experiments/predicted.md",
    "evidence/calibration.md": "experiments/calibration.md",
    "evidence/sequence.md": "experiments/sequence.md",
}
PAGE_OF = {file: page for page, file in SHOWN.items()}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    for page, file in SHOWN.items():
        files.append(File.generated(config, page, content=(ROOT / file).read_text("utf-8")))
    files.append(File.generated(config, "reference/cli.md", content=command_line()))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links to files of the repository lead to their pages, and are plain names where they have
    none.
    """
    here = page.file.src_uri
    file = SHOWN.get(here, f"docs/{here}")

    def mended(link: re.Match[str]) -> str:
        image, text, target, anchor = link.groups()
        if "://" in target or target.startswith("mailto:"):
            return link[0]
        aim = posixpath.normpath(posixpath.join(posixpath.dirname(file), target))
        address = _address(aim)
        if address is None:
            return f"`{aim}`" if text == aim else f"{text} (`{aim}`)"
        relative = os.path.relpath(address, posixpath.dirname(here) or ".")
        return f"{image}[{text}]({relative}{anchor or ''})"

    return LINK.sub(mended, markdown)


def _address(file: str) -> str | None:
    """Where a file of the repository stands in the site."""
    if file in PAGE_OF:
        return PAGE_OF[file]
    if file.startswith("docs/"):
        return file.removeprefix("docs/")
    return None


def command_line() -> str:
    """Every verb with its options, from the rows that the command line itself is made of."""
    lines = [
        "# Command line",
        "",
        "`--config FILE.yaml` gives any of the options of a verb; the command line overrides it.",
        "",
    ]
    for name, verb in VERBS.items():
        lines += [f"## {name}", "", f"{verb.help[0].upper()}{verb.help[1:]}.", ""]
        lines += ["```sh", verb.example, "```", ""]
        lines += _options(verb)
    return "\n".join(lines)


def _options(verb: Verb) -> Iterator[str]:
    """A table of each group of options."""
    fields = verb.options.__dataclass_fields__.values()
    for group in GROUPS:
        rows = [field for field in fields if field.metadata["group"] == group]
        if not rows:
            continue
        yield from (f"**{group}**", "", "| option | default | |", "|---|---|---|")
        for field in rows:
            metadata = field.metadata
            shown = metadata["metavar"] if metadata["positional"] else flag(field.name)
            yield f"| `{shown}` | {_default(field)} | {_escaped(metadata['help'])} |"
        yield ""


def _default(field: Any) -> str:
    """The default of an option; nothing where there is none, or where a preset decides."""
    if field.metadata["positional"] or field.default in (None, "", dataclasses.MISSING):
        return ""
    shown = {True: "on", False: "off"}.get(field.default, field.default)
    return f"`{shown}`"


def _escaped(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")
