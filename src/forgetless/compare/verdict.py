"""What a comparison says in plain sentences, the most important first, and the line after each run.

Reads what summary.py has summed up.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

from forgetless.compare.choice import nats_of
from forgetless.compare.experiment import Experiment
from forgetless.compare.frontier import difference
from forgetless.files.compare_json import ComparedSequence, Comparison, EqualLearning, TrialRun

# How a difference to plain fine-tuning is told, by whether it is beyond the noise.
NOISE_WORDS = {
    True: "beyond the noise",
    False: "within the noise",
    None: "of unknown noise: one seed",
}


def verdict(experiment: Experiment, comparison: Comparison) -> list[str]:
    """Plain sentences, the most important first: for each domain, on the text of the recorded kind,
    who forgets least at 95 % of plain's learning.
    """
    lines = []
    for domain in experiment.domains:
        lines += _of_one_domain(experiment, comparison, domain)
    lines += _of_sequences(comparison.sequences or [])
    counts = {method.name: method.trials for method in comparison.methods}
    if len(set(counts.values())) > 1:
        each = ", ".join(f"{name} {count}" for name, count in counts.items())
        lines.append(f"Methods had unequal numbers of trials: {each}.")
    failed = comparison.progress.failed
    if failed:
        lines.append(f"{failed} run{'s' * (failed != 1)} failed or ran out of memory.")
    return lines


def _of_one_domain(experiment: Experiment, comparison: Comparison, domain: str) -> list[str]:
    """Who forgets least on a domain, who comes next, and who did not get as far."""
    level = max(experiment.shares)
    learned = (comparison.equal_learning[domain] or {}).get(experiment.recorded) or []
    rows = [row for row in learned if row.level == level]
    reached = _least_first(rows)
    if not reached:
        return [
            f"{domain}: no method has reached {level:.0%} of what {experiment.reference} learns."
        ]
    best = reached[0]
    plain = next((row for row in reached if row.method == experiment.reference), None)
    text = (
        f"{domain}: at {level:.0%} of what {experiment.reference} fine-tuning learns, "
        f"{best.method} {_forgets_least(experiment, best)}"
    )
    if plain is not None and best is not plain:
        text += _what_plain_forgets(experiment, comparison, domain, best, plain)
    noise = comparison.noise[domain]
    lines = [f"{text}{_measured_on(experiment, best.part)}."]
    lines += _next(
        domain,
        [row for row in reached if row is best or row is not plain],
        noise.forgetting.get(experiment.recorded) if noise else None,
    )
    missed = [row.method for row in rows if row.forgetting is None and row.seeds]
    if missed:
        lines.append(f"{domain}: {', '.join(missed)} did not reach that learning in every seed.")
    return lines


def _forgets_least(experiment: Experiment, best: EqualLearning) -> str:
    """How little the best method forgets of the recorded text, and in what that is measured."""
    text = experiment.recorded
    if experiment.own(text):
        return f"moves least from the base, {_nats(best)} of divergence per token of {text}"
    return f"forgets least, {_nats(best)} per token of {text}"


def _least_first(rows: Sequence[EqualLearning]) -> list[EqualLearning]:
    """The rows of the methods that have reached the learning; least forgetting first."""
    reached = [(row.forgetting, row) for row in rows if row.forgetting is not None]
    return [row for _, row in sorted(reached, key=lambda pair: pair[0])]


def _what_plain_forgets(
    experiment: Experiment,
    comparison: Comparison,
    domain: str,
    best: EqualLearning,
    plain: EqualLearning,
) -> str:
    """What plain fine-tuning forgets at the same learning, and how sure the difference is."""
    wanted = (domain, experiment.recorded, best.level, best.method)
    gap = next(d for d in comparison.differences if (d.domain, d.text, d.level, d.a) == wanted)
    forgets = "moves" if experiment.own(experiment.recorded) else "forgets"
    times = "" if gap.ratio is None else f"{gap.ratio:.2f}x, "  # none where plain forgets nothing
    return (
        f"; {experiment.reference} scaled back {forgets} {_nats(plain)} "
        f"({times}{NOISE_WORDS[gap.beyond_noise]})"
    )


def _measured_on(experiment: Experiment, part: object) -> str:
    if part == "test":
        return ""
    if experiment.last_part == "test":
        return " (validation part, not yet tested)"
    return " (on the part that settings were chosen by)"


def _next(domain: str, reached: Sequence[EqualLearning], noise: float | None) -> list[str]:
    """Who cannot be told apart from the method that forgets least; where nobody, who comes next.

    `reached`: least forgetting first.
    """
    best, others = reached[0], reached[1:]
    gaps = [difference(other, best, noise) for other in others]
    beyond = [None if gap is None else gap.beyond_noise for gap in gaps]
    alike = [other.method for other, apart in zip(others, beyond, strict=True) if apart is False]
    if alike:
        return [f"{domain}: within the noise of {best.method}: {', '.join(alike)}."]
    if beyond and beyond[0]:
        return [f"{domain}: next comes {others[0].method}, {_nats(others[0])}, beyond the noise."]
    return []


def _of_sequences(sequences: Sequence[ComparedSequence]) -> list[str]:
    """One sentence for each sequence: who ends with the lowest loss over all of its domains, and
    what happened to the earlier ones.
    """
    lines = []
    for name in dict.fromkeys(sequence.name for sequence in sequences):
        mine: dict[str, list[ComparedSequence]] = defaultdict(list)
        for sequence in sequences:
            if sequence.name == name:
                mine[str(sequence.method)].append(sequence)
        ends = {method: end for method, each in mine.items() if (end := _end_of(each)) is not None}
        told = [
            f"{method} {average:.3f} (backward transfer {transfer:+.3f})"
            for method, (average, transfer) in sorted(ends.items(), key=lambda item: item[1][0])
        ]
        if told:
            domains = ", ".join(map(str, next(iter(mine.values()))[0].domains))
            lines.append(
                f"{name}, one after another ({domains}): mean loss of all domains at the end, in "
                f"nats per token: {'; '.join(told)}."
            )
        if missing := [method for method in mine if method not in ends]:
            lines.append(f"{name}: {', '.join(missing)} did not get to the end in every seed.")
    return lines


def _end_of(seeds: Sequence[ComparedSequence]) -> tuple[float, float] | None:
    """(mean loss at the end, backward transfer), mean over seeds; None unless each got there."""
    averages = [each.average for each in seeds if each.average is not None]
    transfers = [each.backward_transfer for each in seeds if each.backward_transfer is not None]
    if len(averages) < len(seeds):
        return None
    return statistics.fmean(averages), statistics.fmean(transfers)


def _nats(row: EqualLearning) -> str:
    error = "" if row.standard_error is None else f" ± {row.standard_error:.4f}"
    return f"{row.forgetting:.4f}{error} nats"


def progress_line(run: TrialRun, comparison: Comparison, seconds: float) -> str:
    """What is said after each run: how far, how long still, and the frontier so far in this run's
    domain.
    """
    progress = comparison.progress
    learned = comparison.equal_learning[str(run.domain)] or {}
    rows = next(iter(learned.values()), None) or []
    level = max((row.level for row in rows), default=0.0)
    best = _least_first([row for row in rows if row.level == level])[:3]
    far = "; ".join(f"{row.method} {row.forgetting:.4f}" for row in best) or "not reached yet"
    over = (progress.done or 0) + (progress.failed or 0)
    return (
        f"{over} of {progress.of} runs ({progress.failed} failed), {seconds / 60:.0f} min left | "
        f"{run.method} on {run.domain}, {run.part}: {_outcome(run)} | "
        f"forgetting at {level:.0%}: {far}"
    )


def _outcome(run: TrialRun) -> str:
    """What the whole update of a run has learned and forgotten, or how the run ended."""
    point = next((point for point in run.points if point.scale == 1.0), None)
    if point is None:
        return str(run.status)
    forgot = nats_of(next(iter(point.forgetting.values())))
    return f"learned {nats_of(point.learning):.3f}, forgot {forgot:.3f}"
