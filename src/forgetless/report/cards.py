"""Model cards: what an importance file, a tuned adapter and a merged model say about themselves on
the Hub. Text from plain data; nothing is measured here.

A card is YAML between two lines of `---` and markdown. Ours is one section between two comments:
what others wrote around it (PEFT, TRL, people) is kept, and writing the card again replaces the
section alone. Folders of the machine that made it stay there: absolute paths are shown by their
last part, and a local base model or data set is not claimed to be on the Hub.

    extended("", *importance_card(importance.info, shape))
    extended(peft_card, *run_card("tune", run))
"""

from __future__ import annotations

import re
import shlex
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forgetless.files.atomic import write_text
from forgetless.files.hub import CARD, hub_name, shareable
from forgetless.options.option import RUNNING, as_dict, deciding
from forgetless.options.tune import TUNE_PRESETS, TuneOptions
from forgetless.options.verbs import ShrinkOptions, resolve
from forgetless.report import numbers
from forgetless.report.markdown import plain

BEGIN, END = "<!-- forgetless -->", "<!-- /forgetless -->"
SECTION = re.compile(rf"^{BEGIN}\n.*?^{END}$\n?", re.DOTALL | re.MULTILINE)
PIPE = re.compile(r"(?<!\\)\|")  # ends a cell also inside code
Card = tuple[dict[str, Any], str]  # front matter, section


def extended(existing: str, front: Mapping[str, Any], section: str) -> str:
    """`existing` (may be empty) with our front matter and section: tags are joined, other keys are
    ours (None: taken away), the text around is kept.
    """
    import yaml

    head, body = _parts(existing)
    tags = [
        tag
        for tag in _list(head.get("tags"))
        if front.get("base_model") or not str(tag).startswith("base_model:")
    ]
    merged = {**head, **front, "tags": list(dict.fromkeys([*tags, *front["tags"]]))}
    shown = yaml.safe_dump(
        {key: value for key, value in merged.items() if value not in (None, [], "")},
        sort_keys=True,
        allow_unicode=True,
    )
    ours = f"{BEGIN}\n{section.strip()}\n{END}\n"
    if SECTION.search(body):
        body = SECTION.sub(lambda _: ours, body, count=1)
    else:
        title = re.match(r"\s*# [^\n]*\n", body)
        body = (
            f"{title.group().strip()}\n\n{ours}{body[title.end() :]}"
            if title and not section.startswith("# ")
            else ours + body
        )
    return f"---\n{shown}---\n\n{body.strip()}\n"


def section_of(card: str) -> str | None:
    """Our section of a card, without its comments; None where there is none."""
    found = SECTION.search(card)
    return found.group().removeprefix(BEGIN).strip().removesuffix(END).strip() if found else None


def _parts(card: str) -> tuple[dict[str, Any], str]:
    """(front matter, body); a card whose front matter is no mapping is all body."""
    import yaml

    found = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*?\n?", card, re.DOTALL)
    try:
        head = yaml.safe_load(found.group(1)) if found else {}
    except yaml.YAMLError:
        return {}, card
    return (head, card[found.end() :].lstrip()) if found and isinstance(head, dict) else ({}, card)


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def dataset_name(source: Any) -> str | None:
    """The Hub data set in a source ('owner/name', 'owner/name:config'); None for files, tasks and
    sampled text.
    """
    name = hub_name(str(source or "").partition(":")[0])
    return name if name and "/" in name else None


def printable(value: Any) -> str:
    """Text on one line without control characters."""
    return "".join(c if c.isprintable() else " " for c in str(value)).strip()


def code(value: Any) -> str:
    """Text as code in a line of markdown, whatever is in it."""
    text = printable(value) or "-"
    ticks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{ticks} {text} {ticks}" if len(ticks) > 1 else f"`{text}`"


def importance_card(
    info: Mapping[str, Any],
    *,
    tier: str,
    weights: int,
    elements: int,
    size: int,
    calibration: str | None = None,
    repo: str | None = None,
) -> Card:
    """The card of an importance file; `info` is the file's own, `size` its bytes, `calibration`
    what it says of itself, `repo` where it will be.
    """
    info = shareable(info)
    model, data = info.get("model", {}), info.get("data", {})
    base = hub_name(model.get("name"))
    front = {
        "base_model": base,
        "library_name": "forgetless",
        "tags": ["forgetless", "importance", "continual-learning", "catastrophic-forgetting"],
        "datasets": [name] if (name := dataset_name(data.get("source"))) else None,
    }
    rows = [
        (
            "base model",
            f"{code(model.get('name', '?'))}"
            + (f", revision {code(model['revision'])}" if model.get("revision") else ""),
        ),
        ("fingerprint of its weights", code(str(model.get("fingerprint", "?"))[:16])),
        (
            "estimator",
            f"{code(info.get('estimator', '?'))}, settings "
            f"{plain(printable(numbers.settings(info.get('settings'))))}",
        ),
        ("unit", plain(printable(info.get("unit", "?")))),
        (
            "tier",
            f"{code(tier)}: {weights} weights with {elements:,} elements in {numbers.size(size)}",
        ),
        ("error of the tier", _tier_error(info)),
        (
            "calibration",
            plain(calibration or "none: a forgetting budget needs general text while tuning"),
        ),
        (
            "general text",
            f"{code(data.get('source', '?'))}: {numbers.whole(data.get('documents'))} documents, "
            f"{numbers.whole(data.get('tokens'))} tokens, "
            f"sha256 {code(str(data.get('sha256', '?'))[:16])}",
        ),
        ("recorded with", plain(printable(_versions(info.get("versions", {}))))),
    ]
    name = printable(model.get("name", "MODEL"))
    return (
        front,
        f"""# Importance of {plain(name)}

How much each weight of the base model matters to general text: fine-tune with it, and the model keeps what it knew. Made by
[forgetless](https://arxiv.org/abs/2501.13669); it belongs to the base weights, so it serves any LoRA rank, any data and full fine-tuning. It holds no weights.

| | |
|---|---|
{chr(10).join(f"| {key} | {PIPE.sub(chr(92) + '|', value)} |" for key, value in rows)}

## Use

```sh
forgetless tune {shlex.quote(name)} --data domain.jsonl --importance {shlex.quote(repo or "FOLDER")} --out run
```

```python
import forgetless

importance = forgetless.Importance.from_pretrained({repo or "FOLDER"!r})
forgetless.hold(trainer, importance)  # any transformers or TRL trainer
trainer.train()
```""",
    )


def _tier_error(info: Mapping[str, Any]) -> str:
    """What the tier did to the energy, where the file says it."""
    stored = info.get("energy_error", {})
    pairs = [pair for pair in stored.get("weights", {}).values() if len(pair) == 2]
    if not pairs:
        return "none: the form it was recorded in"
    random, evading = zip(*pairs, strict=True)
    shown = lambda errors: (
        f"median {100 * statistics.median(errors):.2g} %, largest {100 * max(errors):.2g} %"
    )
    return plain(
        f"energy per weight against {stored.get('against', '?')}: of a random update "
        f"{shown(random)}; of one that evades importance {shown(evading)}"
    )


def _versions(environment: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {version}" for name, version in (environment.get("versions") or {}).items()
    )


def run_card(verb: str, run: Mapping[str, Any], *, what: str = "adapter") -> Card:
    """The card of what `tune` or `shrink` (`verb`) left, from its run.json: what was kept, what was
    lost, and how to make it again.
    """
    options = run["configuration"]
    base, data = hub_name(options.get("model")), dataset_name(options.get("data"))
    front = {
        "base_model": base,
        "datasets": [data] if data else None,
        "tags": ["forgetless"],
        **({} if base else {"base_model_relation": None}),
    }
    budget, importance = run.get("budget"), run.get("importance")
    method = "+".join(run.get("method") or [options.get("method", "?")])
    items = [
        ("base model", code(shareable(options.get("model")))),
        ("method", code(method)),
        (
            "strength",
            "set by the budget"
            if verb == "tune" and budget
            else None
            if options.get("strength") is None
            else f"{options['strength']:g}",
        ),
        (
            "importance",
            f"{code(shareable(importance['file']))}, sha256 {code(importance['sha256'])}"
            if importance
            else None,
        ),
        ("budget", _budget(budget) if budget else "none: nothing bounds what may be lost"),
        (
            "data",
            f"{code(shareable(options.get('data')))}"
            + (
                f", {numbers.whole(run['data']['rows'])} rows, sha256 "
                f"{code(run['data']['sha256'][:16])}"
                if run.get("data")
                else ""
            )
            if options.get("data")
            else None,
        ),
        ("general text", code(shareable(options["general"])) if options.get("general") else None),
        ("made with", plain(printable(_versions(run.get("environment", {}))))),
    ]
    lines = [
        "## What was kept, what was lost",
        "",
        f"This {what} was made by forgetless `{verb}`. {_verdict(run)}",
        "",
        *_table(run),
        "",
        *(f"* {key}: {value}" for key, value in items if value),
        "",
        "To make it again:",
        "",
        "```sh",
        command(verb, options),
        "```",
    ]
    return front, "\n".join(lines)


def _verdict(run: Mapping[str, Any]) -> str:
    lost, gained = run.get("forgetting"), run.get("learning")
    said = [
        f"Loss on general text rose by {numbers.nats(lost['nats'], lost.get('standard_error'))} "
        "nats per token."
        if lost
        else "What it lost was not measured: no general text was given."
    ]
    if gained:
        said.append(
            "Loss on the domain's held-out data fell by "
            f"{numbers.nats(gained['nats'], gained.get('standard_error'))}."
        )
    return " ".join(said)


def _table(run: Mapping[str, Any]) -> list[str]:
    """Before, after and change of everything that was measured, ± standard error."""
    before, after, rows = run["before"], run["after"], []
    for key, label, change in (
        ("general", "general loss, nats per token", "forgetting"),
        ("domain", "domain loss, nats per token", "learning"),
    ):
        a, b, moved = before.get(key), after.get(key), run.get(change)
        if not a or not b:
            continue
        sign = -1 if change == "learning" else 1
        rise = (
            numbers.nats(sign * moved["nats"], moved.get("standard_error"))
            if moved and moved["nats"] is not None
            else numbers.MISSING
        )
        rows.append(
            (
                label,
                numbers.nats(a["nats"], a.get("standard_error")),
                numbers.nats(b["nats"], b.get("standard_error")),
                rise,
            )
        )
        if key == "general":
            change_of = (
                numbers.known(a.get("perplexity"))
                and numbers.known(b.get("perplexity"))
                and b["perplexity"] / a["perplexity"] - 1
            )
            rows.append(
                (
                    "general perplexity",
                    numbers.nats(a.get("perplexity")),
                    numbers.nats(b.get("perplexity")),
                    f"{100 * (change_of or 0):+.2f} %",
                )
            )
    for name, a in (before.get("tasks") or {}).items():
        b = (after.get("tasks") or {}).get(name) or {}
        if "acc" in a and "acc" in b:
            rows.append(
                (
                    f"{plain(name)} accuracy",
                    numbers.share(a["acc"], a.get("acc_stderr")),
                    numbers.share(b["acc"], b.get("acc_stderr")),
                    f"{100 * (b['acc'] - a['acc']):+.1f} %",
                )
            )
    if not rows:
        return ["Nothing was measured: give `--general` and `--eval-data` to see it here."]
    return [
        "| | before | after | change |",
        "|---|---:|---:|---:|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _budget(budget: Mapping[str, Any]) -> str:
    if predicted := budget.get("predicted"):
        return plain(
            f"{budget['budget']} ({budget['budget_nats']:.4g} nats per token): predicted, not "
            "measured; by the importance file's calibration the "
            f"general loss rose by {predicted['nats']:.4f}, and by at most "
            f"{predicted['bound']:.4f} for 19 of 20 such updates"
        )
    check = budget["check"]
    return plain(
        f"{budget['budget']} ({budget['budget_nats']:.4g} nats per token): {budget['verdict']}; "
        f"on {check['documents']} documents that nothing was "
        f"chosen on, the loss rose by {check['nats']:.4f}, between {check['low']:.4f} and "
        f"{check['high']:.4f}"
    )


def command(verb: str, options: Mapping[str, Any]) -> str:
    """The command that makes a run again: its options as far as they differ from what preset and
    method would set, without this machine's folders.
    """
    kind, presets = {"tune": (TuneOptions, TUNE_PRESETS), "shrink": (ShrinkOptions, None)}[verb]
    given = {
        key: options[key]
        for key in ("preset", "method", "importance")
        if options.get(key) is not None
    }
    usual = as_dict(resolve(kind, given, presets))  # type: ignore[type-var]
    first = "adapter" if verb == "shrink" else "model"
    words, aside = ["forgetless", verb, str(shareable(options[first]))], []
    for key, value in options.items():
        if (
            key in (first, *deciding(kind, RUNNING))
            or (value == usual.get(key) and key not in ("importance", "method"))
            or value in (None, "")
        ):
            continue
        flag = "--" + key.replace("_", "-")
        if isinstance(value, (dict, list)):
            aside.append(f"# with {key}: {value} in a --config file")
        elif isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        else:
            words += [flag, f"{value:g}" if isinstance(value, float) else str(shareable(value))]
    return "\n".join([" ".join(map(shlex.quote, [*words, "--out", "run"])), *aside])


def write_card(
    folder: str | Path, verb: str, run: Mapping[str, Any], *, what: str = "adapter"
) -> None:
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
    if section:
        front = {
            "base_model": hub_name(base),
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["forgetless"],
        }
        write_text(
            Path(folder) / CARD,
            extended(
                "",
                front,
                section.replace(
                    "This adapter was made",
                    "This model is its base with an adapter merged in, made",
                    1,
                ),
            ),
        )
