"""Model cards: what an importance file, a tuned adapter and a merged model say about themselves on
the Hub. Nothing is measured here.

A card is YAML between two lines of `---` (the front matter, of which huggingface_hub knows what the
Hub reads) and markdown. Ours is one section between two comments: what others wrote around it
(PEFT, TRL, people) is kept, and writing the card again replaces the section alone. Folders of the
machine that made it stay there: absolute paths are shown by their last part, and a local base model
or data set is not claimed to be on the Hub.

    extended("", *importance_card(importance.info, ...))      # importance_card.py
    extended(peft_card, *run_card("tune", run))               # run_card.py
    write_card("run/final", "tune", run)
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from forgetless.files.atomic import write_text
from forgetless.files.hub import CARD, hub_name
from forgetless.files.run_json import Run
from forgetless.report.card_words import FrontMatter
from forgetless.report.run_card import run_card

# The comments between which our section of a card stands.
BEGIN = "<!-- forgetless -->"
END = "<!-- /forgetless -->"
# Our section with its comments.
SECTION = re.compile(rf"^{BEGIN}\n.*?^{END}$\n?", re.DOTALL | re.MULTILINE)
# The title that a card begins with.
TITLE = re.compile(r"\s*# [^\n]*\n")
# What PEFT's template of a card holds where nobody has written anything.
UNWRITTEN = "[More Information Needed]"
# A comment of that template, which stands on a line of its own.
COMMENT = re.compile(r"^\s*<!--(?! /?forgetless).*-->\s*$")
# The title of that template, and what stands in it whoever made the model, by how lines begin.
UNTITLED = "# Model Card for Model ID"
BOILERPLATE = (
    "Use the code below to get started",
    "Users (both direct and downstream) should be made aware",
    "Carbon emissions can be estimated using",
    "**BibTeX:**",
    "**APA:**",
    "## Model Card Contact",
)


def extended(existing: str, front: FrontMatter, section: str) -> str:
    """`existing` (may be empty) with our front matter and section: tags are joined, other keys are
    ours (None: taken away), the text around is kept.
    """
    from huggingface_hub import ModelCardData  # takes a second to import

    head, body = _front_and_body(existing)
    tags = [
        tag
        for tag in _tags(head)
        if front.get("base_model") or not str(tag).startswith("base_model:")
    ]
    merged = {**head, **front, "tags": list(dict.fromkeys([*tags, *front["tags"]]))}
    known = {key: value for key, value in merged.items() if value not in (None, [], "")}
    shown = ModelCardData(**known).to_yaml(original_order=sorted(known))
    body = _without_unwritten(body, known.get("base_model"))
    return f"---\n{shown}\n---\n\n{_with_section(body, section.strip())}\n"


def _front_and_body(card: str) -> tuple[FrontMatter, str]:
    """(front matter, body); a card whose front matter is no mapping is all body."""
    from huggingface_hub import ModelCard

    if not card.lstrip().startswith("---"):
        return {}, card
    try:
        known = ModelCard(card, ignore_metadata_errors=True)
    except (ValueError, TypeError, yaml.YAMLError):
        return {}, card
    return known.data.to_dict(), known.text.lstrip()


def _without_unwritten(body: str, base: str | None) -> str:
    """A card's text without what PEFT's template asks for and nobody has written: the lines, and
    the headings below which nothing else stands. Of other cards nothing is taken away.
    """
    if UNWRITTEN not in body:
        return body
    named = f"# {base.rpartition('/')[2]}, fine-tuned" if base else "# A fine-tuned model"
    kept: list[str] = []
    for line in body.replace(UNTITLED, named, 1).splitlines():
        if _heading_depth(line):
            _drop_empty_headings(kept, _heading_depth(line))
        unwritten = UNWRITTEN in line or line.lstrip().startswith(BOILERPLATE)
        if not unwritten and not COMMENT.match(line):
            kept.append(line)
    _drop_empty_headings(kept, 1)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def _heading_depth(line: str) -> int:
    """How deep a heading is; 0 for any other line."""
    match = re.match(r"(#+) ", line)
    return len(match.group(1)) if match else 0


def _drop_empty_headings(lines: list[str], level: int) -> None:
    """Take away the headings at the end, from this level down, that nothing stands below; the
    title stays.
    """
    while lines and (not lines[-1].strip() or _heading_depth(lines[-1]) >= max(level, 2)):
        lines.pop()
    lines.append("")


def _tags(head: FrontMatter) -> list[Any]:
    tags = head.get("tags") or []
    return list(tags) if isinstance(tags, (list, tuple)) else [tags]


def _with_section(body: str, section: str) -> str:
    """A card's text with our section: in the place of the one that it has, else below its title, or
    above all of it where the section brings a title.
    """
    ours = f"{BEGIN}\n{section}\n{END}\n"
    if SECTION.search(body):
        return SECTION.sub(lambda _: ours, body, count=1).strip()
    title = TITLE.match(body)
    if title is None or section.startswith("# "):
        return (ours + body).strip()
    return f"{title.group().strip()}\n\n{ours}{body[title.end() :]}".strip()


def section_of(card: str) -> str | None:
    """Our section of a card, without its comments; None where there is none."""
    match = SECTION.search(card)
    if match is None:
        return None
    return match.group().removeprefix(BEGIN).strip().removesuffix(END).strip()


def write_card(folder: str | Path, verb: str, run: Run, *, what: str = "adapter") -> None:
    """Say in the card of a tuned model what was kept and lost, keeping what PEFT or a person wrote
    there.
    """
    card = Path(folder) / CARD
    existing = card.read_text(encoding="utf-8") if card.is_file() else ""
    write_text(card, extended(existing, *run_card(verb, run, what=what)))


def write_merged_card(folder: str | Path, adapter: str | Path, base: str) -> None:
    """What an adapter's card says was kept and lost, in the card of the model that it was merged
    into; nothing where it does not say.
    """
    card = Path(adapter) / CARD
    section = section_of(card.read_text(encoding="utf-8")) if card.is_file() else None
    if not section:
        return
    front = {
        "base_model": hub_name(base),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["forgetless"],
    }
    merged = "This model is its base with an adapter merged in, made"
    section = section.replace("This adapter was made", merged, 1)
    write_text(Path(folder) / CARD, extended("", front, section))
