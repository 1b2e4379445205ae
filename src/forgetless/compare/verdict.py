"""What a comparison says in plain sentences, the most important first, and the line after each run.

Reads what summary.py has summed up.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from forgetless.compare.experiment import Experiment
from forgetless.compare.frontier import difference


def verdict(experiment: Experiment, summary: dict[str, Any]) -> list[str]:
    """Plain sentences, the most important first: for each domain, on the text of the recorded kind,
    who forgets least at 95 % of plain's learning.
    """
    share = max(experiment.shares)
    lines = []
    for domain in experiment.domains:
        rows = [
            row
            for row in summary["equal_learning"][domain].get(experiment.recorded, [])
            if row["share"] == share
        ]
        reached = sorted(
            (row for row in rows if row["forgetting"] is not None),
            key=lambda row: row["forgetting"],
        )
        if not reached:
            lines.append(
                f"{domain}: no method has reached {share:.0%} of what {experiment.reference} "
                "learns."
            )
            continue
        best, plain = (
            reached[0],
            next((row for row in reached if row["method"] == experiment.reference), None),
        )
        text = (
            f"{domain}: at {share:.0%} of what {experiment.reference} fine-tuning learns, "
            f"{best['method']} forgets least, {_nats(best)} per token of "
            f"{experiment.recorded}"
        )
        if plain is not None and best is not plain:
            gap = next(
                d
                for d in summary["differences"]
                if (d["domain"], d["text"], d["share"], d["a"])
                == (domain, experiment.recorded, share, best["method"])
            )
            noise = {
                True: "beyond the noise",
                False: "within the noise",
                None: "of unknown noise: one seed",
            }[gap["beyond_noise"]]
            times = (
                "" if gap["ratio"] is None else f"{gap['ratio']:.2f}x, "
            )  # none where plain forgets nothing
            text += f"; {experiment.reference} scaled back forgets {_nats(plain)} ({times}{noise})"
        lines.append(f"{text}{_measured_on(experiment, best['part'])}.")
        lines += _next(
            domain,
            [row for row in reached if row is best or row is not plain],
            summary["noise"][domain]["forgetting"].get(experiment.recorded),
        )
        missed = [row["method"] for row in rows if row["forgetting"] is None and row["seeds"]]
        if missed:
            lines.append(
                f"{domain}: {', '.join(missed)} did not reach that learning in every seed."
            )
    lines += _sequences(summary["sequences"] or [])
    counts = {method["name"]: method["trials"] for method in summary["methods"]}
    if len(set(counts.values())) > 1:
        lines.append(
            "Methods had unequal numbers of trials: "
            + ", ".join(f"{name} {count}" for name, count in counts.items())
            + "."
        )
    failed = summary["progress"]["failed"]
    return lines + (
        [f"{failed} run{'s' * (failed != 1)} failed or ran out of memory."] if failed else []
    )


def _measured_on(experiment: Experiment, part: str) -> str:
    if part == "test":
        return ""
    return (
        " (validation part, not yet tested)"
        if experiment.last_part == "test"
        else (" (on the part that settings were chosen by)")
    )


def _next(domain: str, reached: Sequence[dict[str, Any]], noise: float | None) -> list[str]:
    """Who cannot be told apart from the method that forgets least; where nobody, who comes next.

    `reached`: least forgetting first.
    """
    best, others = reached[0], reached[1:]
    beyond = [
        gap and gap["beyond_noise"] for gap in (difference(other, best, noise) for other in others)
    ]
    alike = [other["method"] for other, apart in zip(others, beyond, strict=True) if apart is False]
    if alike:
        return [f"{domain}: within the noise of {best['method']}: {', '.join(alike)}."]
    return (
        [f"{domain}: next comes {others[0]['method']}, {_nats(others[0])}, beyond the noise."]
        if beyond and beyond[0]
        else []
    )


def _sequences(found: Sequence[dict[str, Any]]) -> list[str]:
    """One sentence for each sequence: who ends with the lowest loss over all of its domains, and
    what happened to the earlier ones.
    """
    lines = []
    for name in dict.fromkeys(sequence["name"] for sequence in found):
        mine: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for sequence in found:
            if sequence["name"] == name:
                mine[sequence["method"]].append(sequence)
        whole = {
            method: {
                key: statistics.fmean(s[key] for s in each)
                for key in ("average", "backward_transfer")
            }
            for method, each in mine.items()
            if all(s["average"] is not None for s in each)
        }
        told = [
            f"{method} {numbers['average']:.3f} (backward transfer "
            f"{numbers['backward_transfer']:+.3f})"
            for method, numbers in sorted(whole.items(), key=lambda item: item[1]["average"])
        ]
        if told:
            domains = ", ".join(next(iter(mine.values()))[0]["domains"])
            lines.append(
                f"{name}, one after another ({domains}): mean loss of all domains at the end, in "
                f"nats per token: {'; '.join(told)}."
            )
        if missing := [method for method in mine if method not in whole]:
            lines.append(f"{name}: {', '.join(missing)} did not get to the end in every seed.")
    return lines


def _nats(row: dict[str, Any]) -> str:
    error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.4f}"
    return f"{row['forgetting']:.4f}{error} nats"


def progress_line(run: Mapping[str, Any], summary: dict[str, Any], seconds: float) -> str:
    """What is said after each run: how far, how long still, and the frontier so far in this run's
    domain.
    """
    progress = summary["progress"]
    rows: list[dict[str, Any]] = next(iter(summary["equal_learning"][run["domain"]].values()), [])
    share = max((row["share"] for row in rows), default=0.0)
    best = sorted(
        (row for row in rows if row["share"] == share and row["forgetting"] is not None),
        key=lambda row: row["forgetting"],
    )[:3]
    far = "; ".join(f"{row['method']} {row['forgetting']:.4f}" for row in best) or "not reached yet"
    whole = next((point for point in run["points"] if point["scale"] == 1.0), None)
    here = (
        run["status"]
        if whole is None
        else (
            f"learned {whole['learning']['nats']:.3f}, forgot "
            f"{next(iter(whole['forgetting'].values()))['nats']:.3f}"
        )
    )
    return (
        f"{progress['done'] + progress['failed']} of {progress['of']} runs ({progress['failed']} "
        f"failed), {seconds / 60:.0f} min left | {run['method']} on "
        f"{run['domain']}, {run['part']}: {here} | forgetting at {share:.0%}: {far}"
    )
