"""The demo's results in the form of compare.json, so that `forgetless report` shows them as it
shows any comparison.

Two methods: plain fine-tuning at every rate that was tried, and forgetless; both with the finished
update scaled too. The frontier of a method is what no other of its points betters; forgetting at
equal learning is read off it linearly, per seed, from the base model (nothing learned, nothing
forgotten) on.
"""

from __future__ import annotations

import datetime
import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forgetless.evaluate.losses import TextLoss
from forgetless.importance.importance import Importance

SCALES, SHARES = (0.25, 0.5, 0.75), (0.5, 0.8, 0.95)
DOMAIN, TEXT = "herbal", "world"
LABELS = {
    "plain": ("plain LoRA", "baseline", "nothing"),
    "hold": ("hold", "hold", "importance file"),
}
Point = tuple[float, float]  # learning, forgetting


def comparison(
    before: Mapping[str, TextLoss],
    seeds: Sequence[Mapping[str, Sequence[Any]]],
    samples: list[dict[str, Any]],
    importance: Path,
    result: Mapping[str, Any],
) -> dict[str, Any]:
    """compare.json of the demo.

    `seeds` holds, for each seed and method, what was trained (`run.Trained`), the one that stands
    for the method first.
    """
    runs = [
        _run(before, name, seed, one, i == 0, result)
        for seed, trained in enumerate(seeds)
        for name in trained
        for i, one in enumerate(trained[name])
    ]
    points = _on_frontier(
        {name: _points([run for run in runs if run["method"] == name]) for name in LABELS}
    )
    equal, differences = _equal_learning(runs, len(seeds))
    stored, general, domain = (
        Importance.load(importance),
        before["general"].numbers(),
        before["domain"].numbers(),
    )
    configuration = runs[0]["configuration"]
    return {
        "format": 1,
        "title": "What the demo found",
        "model": "the demo's own model",
        "environment": result["environment"],
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "experiment": {
            key: configuration[key]
            for key in ("targets", "rank", "alpha", "max_steps", "batch_size", "length", "schedule")
        },
        "settings": {
            "steps": configuration["max_steps"],
            "batch_size": configuration["batch_size"],
            "length": configuration["length"],
            "seeds": {"test": list(range(len(seeds)))},
            "shares": list(SHARES),
            "scales": [*SCALES, 1.0],
        },
        "progress": {"done": len(runs), "of": len(runs), "failed": 0, "seconds": result["seconds"]},
        "texts": [
            {
                "name": TEXT,
                "kind": "recorded",
                "documents": general["documents"],
                "tokens": general["tokens"],
                "before": _brief(general),
            }
        ],
        "domains": [
            {
                "name": DOMAIN,
                "rows": domain["documents"],
                "before": {
                    **_brief(domain),
                    "accuracy": runs[0]["points"][0]["accuracy"]["before"],
                },
            }
        ],
        "methods": [
            {
                "name": name,
                "label": label,
                "family": family,
                "needs": needs,
                "trials": len(seeds[0][name]),
                "chosen": {},
            }
            for name, (label, family, needs) in LABELS.items()
        ],
        "runs": [
            {key: value for key, value in run.items() if key != "configuration"} for run in runs
        ],
        "frontier": {
            DOMAIN: {
                TEXT: {
                    name: {"points": found, "area": None, "area_error": None}
                    for name, found in points.items()
                }
            }
        },
        "equal_learning": {DOMAIN: {TEXT: equal}},
        "differences": differences,
        "verdict": _verdict(result, differences),
        "samples": samples,
        "noise": _noise([run for run in runs if run["method"] == "plain" and run["chosen"]]),
        "importance": [_importance(stored, importance, runs, result)],
        "sequences": None,
    }


def _brief(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {key: numbers[key] for key in ("nats", "standard_error", "perplexity")}


def _run(
    before: Mapping[str, TextLoss],
    name: str,
    seed: int,
    one: Any,
    chosen: bool,
    result: Mapping[str, Any],
) -> dict[str, Any]:
    base, options, points = result["seeds"][seed]["base"], one.run["configuration"], []
    for scale, losses in sorted(one.losses.items(), reverse=True):
        learned, whole = losses["domain"].rise(before["domain"]).estimate(), scale == 1.0
        points.append(
            {
                "scale": scale,
                "learning": learned,
                "forgetting": {TEXT: before["general"].rise(losses["general"]).estimate()},
                "accuracy": {
                    "before": base["domain_accuracy"],
                    "after": one.score.domain_accuracy,
                    "standard_error": None,
                }
                if whole
                else None,
                "accuracy_general": {
                    "questions": {
                        "before": base["general_accuracy"],
                        "after": one.score.general_accuracy,
                        "standard_error": None,
                    }
                }
                if whole
                else None,
            }
        )
    log = [
        {key: entry.get(key) for key in ("step", "loss", "energy", "pull_ratio")}
        for entry in one.run["log"]
        if "loss" in entry
    ]
    return {
        "id": one.folder.parent.name,
        "method": name,
        "domain": DOMAIN,
        "part": "test",
        "seed": seed,
        "chosen": chosen,
        "status": "done",
        "error": None,
        "settings": {"learning_rate": options["learning_rate"], "strength": options["strength"]},
        "points": points,
        "energy": one.run["energy"],
        "seconds": one.run["train_seconds"],
        "peak_memory_bytes": None,
        "extra_data": None,
        "trainable_parameters": one.run["trainable_parameters"],
        "file_bytes": int(result["importance"]["mib"] * 2**20) if name == "hold" else None,
        "log": log,
        "moved": one.run["moved"],
        "configuration": options,
    }


def pairs(runs: Sequence[Mapping[str, Any]]) -> list[Point]:
    """(learning, forgetting) of every point of some runs."""
    return [
        (point["learning"]["nats"], point["forgetting"][TEXT]["nats"])
        for run in runs
        for point in run["points"]
    ]


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other betters, by rising learning; the base model (0, 0) is always there."""
    kept: list[Point] = []
    for learned, lost in sorted({(0.0, 0.0), *points}, key=lambda p: (-p[0], p[1])):
        if not kept or lost < kept[-1][1]:
            kept.append((learned, lost))
    return kept[::-1]


def at_learning(points: Sequence[Point], level: float) -> float | None:
    """Forgetting where the frontier has learned `level`, between its points linearly; None where it
    never does.
    """
    line = frontier(points)
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        if x0 <= level <= x1:
            return y0 + (y1 - y0) * (level - x0) / (x1 - x0)
    return None


def _points(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A point per rate and scale, as means over seeds."""
    groups: dict[tuple[float, float], list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for run in runs:
        for point in run["points"]:
            groups.setdefault((run["settings"]["learning_rate"], point["scale"]), []).append(
                (run, point)
            )
    found = []
    for (_, scale), members in groups.items():
        learned, lost = (
            [p["learning"]["nats"] for _, p in members],
            [p["forgetting"][TEXT]["nats"] for _, p in members],
        )
        found.append(
            {
                "run": members[0][0]["id"],
                "scale": scale,
                "learning": statistics.mean(learned),
                "forgetting": statistics.mean(lost),
                "learning_error": error(learned),
                "forgetting_error": error(lost),
                "seeds": len(members),
            }
        )
    return found


def _on_frontier(methods: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The points marked where no point of any method betters them."""
    line = set(
        frontier(
            [
                (point["learning"], point["forgetting"])
                for points in methods.values()
                for point in points
            ]
        )
    )
    return {
        name: [
            {**point, "on_frontier": (point["learning"], point["forgetting"]) in line}
            for point in points
        ]
        for name, points in methods.items()
    }


def error(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def _equal_learning(
    runs: Sequence[Mapping[str, Any]], seeds: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Forgetting of each method at shares of what plain's chosen run learns, and forgetless against
    plain, seed by seed.
    """
    rows, differences = [], []
    for share in SHARES:
        levels = [
            share * run["points"][0]["learning"]["nats"]
            for run in runs
            if run["method"] == "plain" and run["chosen"]
        ]
        found = {
            name: [
                at_learning(
                    pairs([run for run in runs if (run["method"], run["seed"]) == (name, seed)]),
                    levels[seed],
                )
                for seed in range(seeds)
            ]
            for name in LABELS
        }
        for name, values in found.items():
            known = [value for value in values if value is not None]
            status = (
                "reached"
                if len(known) == seeds
                else f"reached by {len(known)} of {seeds}"
                if known
                else "not reached"
            )
            rows.append(
                {
                    "method": name,
                    "share": share,
                    "learning_nats": statistics.mean(levels),
                    "forgetting": statistics.mean(known) if known else None,
                    "standard_error": error(known),
                    "seeds": seeds,
                    "reached": len(known),
                    "status": status,
                }
            )
        both = [
            (a, b)
            for a, b in zip(found["hold"], found["plain"], strict=True)
            if a is not None and b is not None
        ]
        if both:
            gaps = [a - b for a, b in both]
            spread, mean, plain = (
                error(gaps),
                statistics.mean(gaps),
                statistics.mean(b for _, b in both),
            )
            differences.append(
                {
                    "domain": DOMAIN,
                    "text": TEXT,
                    "share": share,
                    "a": "hold",
                    "b": "plain",
                    "difference": mean,
                    "standard_error": spread,
                    "ratio": (mean + plain) / plain if plain > 0 else None,
                    "beyond_noise": None if spread is None else abs(mean) > 2 * spread,
                }
            )
    return rows, differences


def _noise(plain: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    whole = [run["points"][0] for run in plain]
    spread = lambda values: statistics.stdev(values) if len(values) > 1 else None
    return {
        DOMAIN: {
            "learning": spread([p["learning"]["nats"] for p in whole]),
            "forgetting": {TEXT: spread([p["forgetting"][TEXT]["nats"] for p in whole])},
            "how": f"standard deviation of plain over {len(whole)} seeds"
            if len(whole) > 1
            else "not measured: one seed",
        }
    }


def _verdict(result: Mapping[str, Any], differences: Sequence[Mapping[str, Any]]) -> list[str]:
    mean = lambda name, field: statistics.mean(scores[name][field] for scores in result["seeds"])
    percent = lambda name, field: f"{100 * mean(name, field):.0f} %"
    first = (
        f"Taught the herbal plainly, the model answers {percent('plain', 'general_accuracy')} of "
        "the questions about its world, before it was "
        f"{percent('base', 'general_accuracy')}; held, it answers "
        f"{percent('hold', 'general_accuracy')}."
    )
    second = (
        f"Of the herbal it then knows {percent('plain', 'domain_accuracy')} (plain) and "
        f"{percent('hold', 'domain_accuracy')} (held)."
    )
    third = (
        f"The importance file took {result['importance']['record_seconds']:.0f} s and "
        f"{result['importance']['mib']:.2f} MiB."
    )
    unsure = any(row["beyond_noise"] is None for row in differences)
    return [
        first,
        second,
        third,
        *(["One seed says nothing about noise; forgetless demo --seeds 3 does."] if unsure else []),
    ]


def _importance(
    stored: Importance, path: Path, runs: Sequence[Mapping[str, Any]], result: Mapping[str, Any]
) -> dict[str, Any]:
    held = next(run for run in runs if run["method"] == "hold")
    weights = [
        {
            "name": row["weight"],
            "layer": row["layer"],
            "kind": row["kind"],
            "norm": row["importance"],
            "coefficient": row["coefficient"],
        }
        for row in held["moved"] or []
    ]
    return {
        "name": path.stem,
        "estimator": stored.info.get("estimator"),
        "tier": stored.tier,
        "bytes": path.stat().st_size,
        "seconds": result["importance"]["record_seconds"],
        "tokens": stored.info.get("data", {}).get("tokens"),
        "weights": weights,
    }
