"""From finished runs to one table:

DIR/compare.json, all that a report needs. Reads files only; no model, no torch.

For each domain and general text: the points of every method (mean over seeds; each setting and
scale is a point), forgetting at equal learning, the area under the frontier, the noise floor, the
differences to plain fine-tuning, and a verdict in plain sentences. Numbers are of the test parts
where they were run, of the validation parts until then (said so).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from forgetless.compare.choice import Run, choose
from forgetless.compare.domain import compare_domain
from forgetless.compare.experiment import Experiment, Trial, from_resolved
from forgetless.compare.verdict import verdict
from forgetless.files.atomic import read_json, write_json
from forgetless.files.compare_json import TrialRun
from forgetless.files.schema import from_json, read_plain
from forgetless.options.option import read_yaml

# Label of a recipe -> the file that describes its importance file.
CURRENT = "current.json"


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
    chosen = choose(experiment, runs)
    accuracy = _read_or(out / "accuracy.json", None)
    for run in runs:
        _with_accuracy(run, out / "runs" / run["id"], accuracy)
        run["chosen"] = chosen.get((run["method"], run["domain"])) == run["settings"]
    sequences = _read_or(out / "sequences.json", []) if experiment.sequences else []
    summary: dict[str, Any] = {
        "format": 1,
        "title": experiment.title,
        "model": experiment.model["model"],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": base["environment"],
        "experiment": (out / "experiment.yaml").read_text(encoding="utf-8"),
        "settings": _settings(experiment),
        "progress": _progress(runs, pending),
        "reference": experiment.reference,
        "texts": _texts(experiment, base),
        "domains": _domains(experiment, base, accuracy),
        "methods": _methods(experiment, chosen),
        "runs": runs,
        "frontier": {},
        "equal_learning": {},
        "noise": {},
        "differences": [],
        "importance": _importance(out, runs),
        "samples": _read_or(out / "samples.json", []),
        "sequences": sequences or None,
    }
    for domain in experiment.domains:
        here = [run for run in runs if run["domain"] == domain]
        compare_domain(experiment, summary, here, domain)
    summary["verdict"] = verdict(experiment, summary)
    write_json(out / "compare.json", summary)
    return summary


def _read_or(path: Path, otherwise: Any) -> Any:
    return read_json(path) if path.exists() else otherwise


def _settings(experiment: Experiment) -> dict[str, Any]:
    """What all runs share."""
    return {
        **{key: experiment.training.get(key) for key in ("max_steps", "batch_size", "length")},
        "seeds": experiment.seeds,
        "shares": list(experiment.shares),
        "scales": [*experiment.scales, 1.0],
        "trials": experiment.trials,
    }


def _progress(runs: Sequence[Run], pending: int) -> dict[str, Any]:
    own = list({run["id"]: run for run in runs}.values())  # methods may share a run
    return {
        "done": sum(run["status"] == "done" for run in own),
        "of": len(own) + pending,
        "failed": sum(run["status"] != "done" for run in own),
        "seconds": sum(run.get("wall_seconds") or 0.0 for run in own),
    }


def _importance(out: Path, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The importance files of the experiment as it is now; those of recipes that were changed since
    lie there too.
    """
    names = _read_or(out / "importance" / CURRENT, {}).values()
    return [_with_coefficients(read_json(out / "importance" / name), runs) for name in names]


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
