"""What a report shows, as one mapping in the form of compare.json, whichever folder it comes from.

    contents = load("out/lab")       # of `forgetless compare` or `forgetless demo`: compare.json as
                                     it is
    contents = load("run")           # of `forgetless tune` or `eval`: run.json as a comparison of
                                     one run, with "kind": "run"

Nothing is computed here that a writer measured; a key that a folder does not have is empty, so that
the page leaves its section out.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forgetless.errors import FileError, brief
from forgetless.files.compare_json import Comparison
from forgetless.files.run_json import Run
from forgetless.files.schema import from_json, read_plain
from forgetless.report import numbers

FORMAT = 1
Contents = dict[str, Any]
EMPTY: dict[str, Any] = {
    "kind": "comparison",
    "title": "",
    "model": "",
    "created": "",
    "environment": {},
    "experiment": {},
    "settings": {},
    "progress": {},
    "texts": [],
    "domains": [],
    "methods": [],
    "runs": [],
    "frontier": {},
    "equal_learning": {},
    "noise": {},
    "differences": [],
    "verdict": [],
    "importance": [],
    "samples": [],
    "sequences": [],
    "measures": [],
    "notes": [],
    "budget": {},
    "reference": "plain",
}


def load(folder: str | Path) -> Contents:
    """The contents of a folder.

    Raises ValueError where it holds nothing to report, or something of another format.
    """
    folder = Path(folder)
    if (folder / "compare.json").is_file():
        found = read_plain(folder / "compare.json")
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            version = found.get("format") if isinstance(found, dict) else type(found).__name__
            raise FileError(
                f"{folder / 'compare.json'}: expected format {FORMAT}, found {brief(version)}; "
                "make it again with this version of forgetless"
            )
        from_json(found, Comparison, str(folder / "compare.json"))
        return completed(found)
    if (folder / "run.json").is_file():
        return of_run(read_plain(folder / "run.json"), folder)
    what = "does not exist" if not folder.exists() else "holds no compare.json and no run.json"
    raise FileError(
        f"'{folder}' {what}; give a folder that forgetless compare, demo or tune has written"
    )


def completed(found: Mapping[str, Any]) -> Contents:
    """Every key of the form; what is missing or null is empty.

    Methods that only runs name are added, so that no run is left out.
    """
    contents = {key: found.get(key) or empty for key, empty in EMPTY.items()}
    named = {str(method["name"]) for method in contents["methods"]}
    extra = {
        str(run["method"]): {"name": run["method"]}
        for run in contents["runs"]
        if str(run["method"]) not in named
    }
    contents["methods"] = [*contents["methods"], *extra.values()]
    return contents


def label(contents: Contents, method: str) -> str:
    """A method's name for people."""
    return next(
        (str(m.get("label") or m["name"]) for m in contents["methods"] if m["name"] == method),
        method,
    )


def recorded_text(contents: Contents) -> str | None:
    """The general text of the kind that importance was recorded on: the one that verdicts are
    about. None where none was measured.
    """
    kinds = sorted(contents["texts"], key=lambda text: text.get("kind") != "recorded")
    return str(kinds[0]["name"]) if kinds else None


def reported_part(contents: Contents) -> str:
    """'test' where any run was measured there, else 'validation'."""
    return "test" if any(run.get("part") == "test" for run in contents["runs"]) else "validation"


def of_run(run: Mapping[str, Any], folder: Path) -> Contents:
    """A single run as contents. Raises ValueError for a run.json that neither tune nor eval wrote."""
    if (
        not isinstance(run, Mapping)
        or not isinstance(run.get("configuration"), Mapping)
        or "before" not in run
    ):
        raise FileError(
            f"{folder / 'run.json'}: expected a run of forgetless tune or eval, found other "
            "contents; run it again with this version"
        )
    from_json(run, Run, str(folder / "run.json"))
    options = run["configuration"]
    method = "+".join(run.get("method") or ["plain" if "method" in run else "run"])
    before, after = run["before"] or {}, run.get("after") or {}
    domain = _short(options.get("eval_data") or options.get("data")) or "domain"
    text = _short(options.get("general")) or "general text"
    point = {
        "scale": options.get("scale") or 1.0,
        "learning": run.get("learning"),
        "forgetting": {text: run.get("forgetting")},
        "accuracy": None,
    }
    trial = {
        "id": folder.name,
        "method": method,
        "domain": domain,
        "part": "test",
        "seed": options.get("seed"),
        "status": "done",
        "chosen": True,
        "settings": {
            key: options.get(key) for key in ("learning_rate", "strength", "rank") if key in options
        },
        "points": [point],
        "energy": run.get("energy"),
        "seconds": run.get("train_seconds"),
        "trainable_parameters": run.get("trainable_parameters"),
        "peak_memory_bytes": run.get("peak_memory_bytes"),
        "log": run.get("log") or [],
        "moved": run.get("moved"),
    }
    written = datetime.datetime.fromtimestamp(
        (folder / "run.json").stat().st_mtime, tz=datetime.UTC
    ).isoformat(timespec="minutes")
    return completed(
        {
            "kind": "run",
            "title": folder.resolve().name,
            "model": options.get("model"),
            "created": written,
            "environment": run.get("environment"),
            "experiment": options,
            "domains": [
                {"name": domain, **(run.get("data") or {}), "before": before.get("domain")}
            ],
            "texts": [{"name": text, "kind": "recorded", "before": before.get("general")}],
            "methods": [{"name": method}],
            "runs": [trial],
            "measures": measures(before, after, run),
            "verdict": sentences(run, domain, text),
            "sequences": _sequence(run, method, text),
            "budget": run.get("budget"),
        }
    )


def _sequence(run: Mapping[str, Any], method: str, text: str) -> list[dict[str, Any]]:
    """The matrix of a run on several domains, as a comparison has it."""
    found = run.get("sequence")
    if not isinstance(found, Mapping):
        return []
    where = [
        found["accuracy_domains"].index(name) if name in found["accuracy_domains"] else None
        for name in found["domains"]
    ]
    accuracy = [
        [None if at is None or at >= len(row) else row[at] for at in where]
        for row in found.get("accuracy") or []
    ] or None
    general = {text: [one.get("nats") for one in found["general"]]} if found.get("general") else {}
    return [
        {
            **found,
            "name": "of the run",
            "method": method,
            "seed": run["configuration"].get("seed"),
            "accuracy": accuracy,
            "general": general,
        }
    ]


def _short(name: Any) -> str:
    """The last part of a path or Hub name, without the ending of a file."""
    return Path(str(name)).stem if name else ""


def measures(
    before: Mapping[str, Any], after: Mapping[str, Any], run: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Rows of what was measured before and after: name, unit, before, after, standard error of the
    change (losses) or of the value (accuracies).
    """
    rows: list[dict[str, Any]] = []

    def add(name: str, unit: str, first: Any, second: Any, error: Any = None) -> None:
        if first is not None or second is not None:
            rows.append(
                {
                    "name": name,
                    "unit": unit,
                    "before": first,
                    "after": second,
                    "standard_error": error,
                }
            )

    for key, name, change in (
        ("general", "general loss", "forgetting"),
        ("domain", "domain loss", "learning"),
    ):
        a, b = before.get(key) or {}, after.get(key) or {}
        add(
            name,
            "nats per token",
            a.get("nats"),
            b.get("nats"),
            (run.get(change) or {}).get("standard_error"),
        )
        add(name.replace("loss", "perplexity"), "", a.get("perplexity"), b.get("perplexity"))
    for name, a in (before.get("tasks") or {}).items():
        b = (after.get("tasks") or {}).get(name) or {}
        add(
            f"{name} answer loss",
            "nats per token",
            (a.get("answer_loss") or {}).get("nats"),
            (b.get("answer_loss") or {}).get("nats"),
        )
        for metric in ("acc", "acc_norm"):
            add(
                f"{name} {metric}", "share", a.get(metric), b.get(metric), b.get(f"{metric}_stderr")
            )
    return rows


def sentences(run: Mapping[str, Any], domain: str, text: str) -> list[str]:
    """What a single run learned and lost, in words."""
    gained, lost = run.get("learning") or {}, run.get("forgetting") or {}
    first = (
        f"On held-out {domain} the loss fell by "
        f"{numbers.nats(gained['nats'], gained.get('standard_error'))} nats per token."
        if numbers.known(gained.get("nats")) is not None
        else "What was learned was not measured: --eval-data gives held-out domain data."
    )
    second = "What was forgotten was not measured: --general gives held-out general text."
    if numbers.known(lost.get("nats")) is not None:
        second = (
            f"On {text} the loss rose by "
            f"{numbers.nats(lost['nats'], lost.get('standard_error'))} nats per token."
        )
    if isinstance(sequence := run.get("sequence"), Mapping) and sequence["matrix"]:
        ends = zip(sequence["domains"], sequence["matrix"][0], sequence["matrix"][-1], strict=False)
        told = ", ".join(
            f"{name} {numbers.nats(before - after)}"
            for name, before, after in ends
            if None not in (before, after)
        )
        first = f"After all domains the loss had fallen by, in nats per token: {told}."
    return [first, second, *([_kept(run)] if isinstance(run.get("verdict"), str) else [])]


def _kept(run: Mapping[str, Any]) -> str:
    """What became of the budget."""
    budget = run.get("budget") or {}
    check, limit = budget.get("check") or {}, numbers.known(budget.get("budget_nats"))
    low, high = numbers.known(check.get("low")), numbers.known(check.get("high"))
    told = f"The budget of {run['configuration'].get('budget')}: {run['verdict']}."
    predicted = budget.get("predicted") or {}
    rise, bound = numbers.known(predicted.get("nats")), numbers.known(predicted.get("bound"))
    if None not in (limit, rise, bound):
        return (
            f"{told} By the importance file's calibration the general loss rose by {rise:.4f} "
            f"nats per token, and by at most {bound:.4f} for 19 of 20 such "
            f"updates; the budget is {limit:.4f}. No general text was looked at."
        )
    if limit is None or low is None or high is None:
        return told
    return (
        f"{told} On {numbers.text(check.get('documents'))} documents that nothing was chosen on "
        f"the loss rose by {low:.4f} to {high:.4f} nats per token; "
        f"the budget is {limit:.4f}."
    )
