"""From finished runs to one table:

DIR/compare.json, all that a report needs. Reads files only; no model, no torch.

For each domain and general text: the points of every method (mean over seeds; each setting and
scale is a point), forgetting at equal learning, the area under the frontier, the noise floor, the
differences to plain fine-tuning, and a verdict in plain sentences. Numbers are of the test parts
where they were run, of the validation parts until then (said so).
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from forgetless.compare.experiment import Experiment, Trial, from_resolved
from forgetless.compare.frontier import (
    Curve,
    area,
    at_share,
    difference,
    mean_and_error,
    on_frontier,
    rank,
)
from forgetless.compare.verdict import verdict
from forgetless.files.atomic import read_json, write_json
from forgetless.files.compare_json import TrialRun
from forgetless.files.schema import from_json, read_plain
from forgetless.options.option import read_yaml

CURRENT = "current.json"  # label of a recipe -> what describes its file
CHOSEN_AT = 0.95  # share of plain's learning at which settings are chosen and the verdict is given
Run = dict[str, Any]


def curve(run: Run, text: str) -> Curve:
    """(learning, forgetting on `text`) of a run by rising scale."""
    points = sorted(run["points"], key=lambda point: point["scale"])
    return [(point["learning"]["nats"], point["forgetting"][text]["nats"]) for point in points]


def _settings(run: Run) -> str:
    return repr(sorted(run["settings"].items(), key=lambda item: item[0]))


def by_setting(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs of one method, grouped by setting: the seeds of each."""
    found: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if run["status"] == "done":
            found[_settings(run)].append(run)
    return list(found.values())


def reference_learning(runs: Sequence[Run]) -> float | None:
    """What plain fine-tuning learns, whole, at its best setting: mean over seeds."""
    return max(
        (
            statistics.fmean(
                curve(run, next(iter(run["points"][0]["forgetting"])))[-1][0] for run in group
            )
            for group in by_setting(runs)
        ),
        default=None,
    )


def choose(experiment: Experiment, runs: Sequence[Run]) -> dict[tuple[str, str], dict[str, Any]]:
    """The setting of each (method, domain) to be tested: least forgetting of the recorded kind of
    text at 95 % of plain's learning, scaled variants included; where none reaches it, the one that
    learns most. For plain itself: the one that learns most.
    """
    chosen = {}
    for domain in experiment.domains:
        here = [run for run in runs if run["domain"] == domain and run["part"] == "validation"]
        reference = reference_learning(
            [run for run in here if run["method"] == experiment.reference]
        )
        if reference is None:
            continue
        for method in experiment.methods:
            groups = by_setting([run for run in here if run["method"] == method])
            curves = [[curve(run, experiment.recorded) for run in group] for group in groups]
            if groups and method == experiment.reference:
                best = max(
                    range(len(groups)), key=lambda k: statistics.fmean(c[-1][0] for c in curves[k])
                )
            elif groups:
                best = min(range(len(groups)), key=lambda k: rank(curves[k], CHOSEN_AT * reference))
            else:
                continue
            chosen[method, domain] = groups[best][0]["settings"]
    return chosen


def ended(out: Path, trials: Sequence[tuple[str, Trial]]) -> list[Run]:
    """What the runs of these (ID, trial) left below `out`, those that have not ended left out.

    Method and settings are the trial's: an ID does not depend on labels, so methods may share a
    run, and it outlives another label.
    """
    runs = []
    for run, trial in {
        (run, repr(trial)): (run, trial) for run, trial in trials
    }.values():  # each once
        path = out / "runs" / run / "run.json"
        if path.exists():
            found = read_plain(path)
            from_json(found, TrialRun, str(path))
            runs.append({**found, **dataclasses.asdict(trial)})
    return runs


def summarise(
    out: Path, trials: Sequence[tuple[str, Trial]], *, pending: int = 0
) -> dict[str, Any]:
    """Read the runs of these (ID, trial) below `out`, write out/compare.json and return it.

    Runs that are not finished are left out.
    """
    experiment = read_experiment_back(out)
    base = read_json(out / "base.json")
    runs = ended(out, trials)
    own = list({run["id"]: run for run in runs}.values())  # methods may share a run
    chosen = choose(experiment, runs)
    accuracy = read_json(out / "accuracy.json") if (out / "accuracy.json").exists() else None
    for run in runs:
        _with_accuracy(run, out / "runs" / run["id"], accuracy)
        run["chosen"] = chosen.get((run["method"], run["domain"])) == run["settings"]
    current = out / "importance" / CURRENT  # files of recipes that were changed since lie there too
    importance = [
        _with_coefficients(read_json(out / "importance" / name), runs)
        for name in (read_json(current).values() if current.exists() else ())
    ]
    summary: dict[str, Any] = {
        "format": 1,
        "title": experiment.title,
        "model": experiment.model["model"],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": base["environment"],
        "experiment": (out / "experiment.yaml").read_text(encoding="utf-8"),
        "settings": {
            **{key: experiment.training.get(key) for key in ("max_steps", "batch_size", "length")},
            "seeds": experiment.seeds,
            "shares": list(experiment.shares),
            "scales": [*experiment.scales, 1.0],
            "trials": experiment.trials,
        },
        "progress": {
            "done": sum(run["status"] == "done" for run in own),
            "of": len(own) + pending,
            "failed": sum(run["status"] != "done" for run in own),
            "seconds": sum(run.get("wall_seconds") or 0.0 for run in own),
        },
        "reference": experiment.reference,
        "texts": _texts(experiment, base),
        "domains": _domains(experiment, base, accuracy),
        "methods": _methods(experiment, chosen),
        "runs": runs,
        "frontier": {},
        "equal_learning": {},
        "noise": {},
        "differences": [],
        "importance": importance,
        "samples": read_json(out / "samples.json") if (out / "samples.json").exists() else [],
        "sequences": (
            read_json(out / "sequences.json")
            if experiment.sequences and (out / "sequences.json").exists()
            else []
        )
        or None,
    }
    for domain in experiment.domains:
        _compare_domain(
            experiment, summary, [run for run in runs if run["domain"] == domain], domain
        )
    summary["verdict"] = verdict(experiment, summary)
    write_json(out / "compare.json", summary)
    return summary


def _with_accuracy(run: Run, folder: Path, base: dict[str, Any] | None) -> None:
    """Put what was measured into the run's point of the whole update:

    `accuracy` of its domain, `accuracy_general` of the other tasks.
    """
    path = folder / "accuracy.json"
    if base is None or not path.exists():
        return
    now, before = read_json(path)["tasks"], base["tasks"]
    change = {
        name: {
            "before": before[name]["acc"],
            "after": found["acc"],
            "standard_error": found["acc_stderr"],
            "questions": found["questions"],
        }
        for name, found in now.items()
        if name in before
    }
    for point in run.get("points") or []:
        if point["scale"] == 1.0:
            point["accuracy"] = change.get(run["domain"])
            point["accuracy_general"] = {
                name: value for name, value in change.items() if name != run["domain"]
            } or None


def _with_coefficients(recorded: dict[str, Any], runs: Sequence[Run]) -> dict[str, Any]:
    """Put c_l into the weights of an importance file: those of a run that was held by it."""
    held: list[dict[str, Any]] = next(
        (
            run["moved"]
            for run in runs
            if run["settings"].get("importance") == recorded["name"] and run.get("moved")
        ),
        [],
    )
    found = {row["weight"]: row["coefficient"] for row in held}
    return {
        **recorded,
        "weights": [
            {**weight, "coefficient": found.get(weight["name"])} for weight in recorded["weights"]
        ],
    }


def read_experiment_back(out: Path) -> Experiment:
    """The experiment whose runs lie in `out`, as it was resolved."""
    return from_resolved(read_yaml(out / "experiment.yaml"))


def _part(experiment: Experiment, runs: Sequence[Run]) -> str:
    """The test part once every method that was validated has ended a run on it, plain fine-tuning
    with a result.
    """
    tried = {
        run["method"] for run in runs if run["part"] == "validation" and run["status"] == "done"
    }
    tested = {run["method"] for run in runs if run["part"] == "test"}
    learned = any(
        run["part"] == "test" and run["method"] == experiment.reference and run["status"] == "done"
        for run in runs
    )
    return "test" if learned and tried <= tested else "validation"


def _compare_domain(
    experiment: Experiment, summary: dict[str, Any], runs: Sequence[Run], domain: str
) -> None:
    """Frontier, equal learning, noise and differences of one domain."""
    part = _part(experiment, runs)
    here = {
        method: [run for run in runs if run["method"] == method and run["part"] == part]
        for method in experiment.methods
    }
    plain = here[experiment.reference]
    reference = reference_learning(plain)
    summary["frontier"][domain], summary["equal_learning"][domain] = {}, {}
    if reference is None:
        return
    noise = summary["noise"][domain] = _noise(experiment, runs)
    for text in _texts_of([run for runs in here.values() for run in runs], experiment):
        frontier = summary["frontier"][domain][text] = {}
        rows = summary["equal_learning"][domain][text] = []
        at: dict[tuple[str, float], dict[str, Any]] = {}
        flat: list[tuple[float, float]] = []
        every: list[dict[str, Any]] = []
        for method, mine in here.items():
            groups = by_setting(mine)
            points = [point for group in groups for point in _points(group, text)]
            areas = [
                area([curve(group[seed], text) for group in groups], reference)
                for seed in range(min(map(len, groups), default=0))
            ]
            whole = [value for value in areas if value is not None]
            mean, error = (
                mean_and_error(whole) if whole and len(whole) == len(areas) else (None, None)
            )
            flat += [(point["learning"], point["forgetting"]) for point in points]
            every += points
            frontier[method] = {"points": points, "area": mean, "area_error": error}
            for share in experiment.shares:
                best = min(
                    groups,
                    key=lambda group: rank([curve(run, text) for run in group], share * reference),
                    default=None,
                )
                found = at_share(
                    [curve(run, text) for run in best] if best else [], share * reference
                )
                at[method, share] = found
                rows.append({"method": method, "share": share, "part": part, **found})
        for point, flag in zip(every, on_frontier(flat), strict=True):
            point["on_frontier"] = flag
        for share in experiment.shares:
            for method in experiment.methods:
                against = experiment.reference
                if (
                    method != against
                    and (
                        gap := difference(
                            at[method, share], at[against, share], noise["forgetting"].get(text)
                        )
                    )
                    is not None
                ):
                    summary["differences"].append(
                        {
                            "domain": domain,
                            "text": text,
                            "share": share,
                            "a": method,
                            "b": against,
                            **gap,
                        }
                    )


def _points(group: Sequence[Run], text: str) -> list[dict[str, Any]]:
    """The points of one setting: one per scale, mean over seeds; the standard error is over seeds,
    or over documents for one.
    """
    found = []
    for k, point in enumerate(group[0]["points"]):
        numbers: dict[str, Any] = {
            "run": group[0]["id"],
            "scale": point["scale"],
            "seeds": len(group),
        }
        for key, pick in (
            ("learning", lambda p: p["learning"]),
            ("forgetting", lambda p: p["forgetting"][text]),
        ):
            each = [pick(run["points"][k]) for run in group]
            mean, error = mean_and_error([value["nats"] for value in each])
            numbers |= {
                key: mean,
                f"{key}_error": each[0]["standard_error"] if error is None else error,
            }
        found.append(numbers)
    return found


def _texts_of(runs: Sequence[Run], experiment: Experiment) -> list[str]:
    """The general texts that all of the runs were measured on."""
    return [
        text
        for text in experiment.general
        if all(text in point["forgetting"] for run in runs for point in run["points"])
    ]


def _noise(experiment: Experiment, runs: Sequence[Run]) -> dict[str, Any]:
    """How much plain fine-tuning at one setting varies over seeds (data order, initialisation)."""
    part = _part(experiment, runs)
    group = max(
        by_setting(
            [run for run in runs if run["method"] == experiment.reference and run["part"] == part]
        ),
        key=len,
        default=[],
    )
    spread = lambda values: statistics.stdev(values) if len(values) > 1 else None
    whole = {text: [curve(run, text)[-1] for run in group] for text in _texts_of(group, experiment)}
    return {
        "learning": spread([x for x, _ in next(iter(whole.values()))]),
        "forgetting": {text: spread([y for _, y in ends]) for text, ends in whole.items()},
        "how": (
            f"standard deviation of {experiment.reference} over {len(group)} "
            f"seed{'s' * (len(group) != 1)} (data order and initialisation)"
        ),
    }


def _texts(experiment: Experiment, base: dict[str, Any]) -> list[dict[str, Any]]:
    numbers = base["test"]["general"]
    return [
        {
            "name": name,
            "kind": "recorded" if name == experiment.recorded else "other",
            "documents": numbers[name]["documents"],
            "tokens": numbers[name]["tokens"],
            "before": {key: numbers[name][key] for key in ("nats", "standard_error", "perplexity")},
        }
        for name in experiment.general
    ]


def _domains(
    experiment: Experiment, base: dict[str, Any], accuracy: dict[str, Any] | None
) -> list[dict[str, Any]]:
    numbers, known = base["test"]["domains"], (accuracy or {"tasks": {}})["tasks"]
    return [
        {
            "name": name,
            "rows": numbers[name]["documents"],
            "rows_trained": base["rows_trained"][name],
            "before": {
                **{key: numbers[name][key] for key in ("nats", "standard_error")},
                "accuracy": known[name]["acc"] if name in known else None,
            },
        }
        for name in experiment.domains
    ]


def _methods(
    experiment: Experiment, chosen: dict[tuple[str, str], dict[str, Any]]
) -> list[dict[str, Any]]:
    return [
        {
            "name": label,
            "label": label,
            "family": method.family,
            "needs": method.needs,
            "trials": len(method.settings()),
            "chosen": {
                domain: settings for (name, domain), settings in chosen.items() if name == label
            },
        }
        for label, method in experiment.methods.items()
    ]
