"""Writes the results of budget.py as a page, as JSON and as a figure.

experiments/budget.md and docs/budget.svg show what each budget bought and whether it was kept;
experiments/budget.json has every result. Only the result files are read. Of the fixed strengths and
the small rates only the best of each domain is in the figure and the first table: the one that
learned most within the budgets with the first seed, as budget.py chooses it.

    python experiments/kept.py out/budget/results
    # Page and figure again, from the results that are kept here.
    python experiments/kept.py experiments/budget.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from drawing import INK, PALE, pyplot, save

from forgetless.report.numbers import perplexity_percent

HERE = Path(__file__).parent
Result = dict[str, Any]
Groups = dict[tuple[str, str, str], list[Result]]  # (domain, budget, method)
KINDS = {  # of a method: what it is called, its colour (Okabe and Ito's)
    "ours": ("tune --budget", "#0072b2"),
    "strength": ("best fixed strength of a sweep", "#56b4e9"),
    "shrunk": ("plain, shrunk along importance", "#e69f00"),
    "plain": ("plain, scaled down", "#8c8c8c"),
    "rate": ("small learning rate, stopped", "#cc79a7"),
}
DROPPED = ("environment", "checks", "others", "control")  # of budget.json: what no table reads


def load(place: Path) -> list[Result]:
    """Every result: of a folder, or of the one file that was made of it."""
    if place.is_file():
        found: list[Result] = json.loads(place.read_text(encoding="utf-8"))
        return found
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(place.glob("*.json"))]


def grouped(results: Iterable[Result]) -> Groups:
    groups: Groups = defaultdict(list)
    for result in results:
        groups[result["domain"], result["budget"], result["method"]].append(result)
    return groups


def kind(method: str) -> str:
    return method.partition("-")[0]


def budgets(groups: Groups) -> list[str]:
    return sorted({budget for _, budget, _ in groups}, key=percent_of)


def chosen(groups: Groups, domain: str) -> list[str]:
    """The methods of the first table: the best of each kind by what it learned within the budgets
    with the first seed.
    """
    first = min(result["seed"] for results in groups.values() for result in results)
    learned: dict[str, float] = defaultdict(float)
    for (where, _, method), results in groups.items():
        if where == domain:
            learned[method] += sum(
                learning(result)
                for result in results
                if result["seed"] == first and result["verdict"] == "met"
            )
    best = {
        one: max((m for m in learned if kind(m) == one), key=lambda m: learned[m], default=None)
        for one in KINDS
    }
    return [method for method in best.values() if method]


def learning(result: Result) -> float:
    return float(result["learning"]["nats"]) if result.get("learning") else 0.0


def attempts(result: Result) -> int:
    """How many checks it took: two with a fallback, none where the budget was refused."""
    return int(result.get("attempts") or len(result.get("checks") or ()))


def table(groups: Groups) -> list[str]:
    """Learning within each budget: a row per domain and budget, a column per kind of method."""
    lines = [
        "| domain | budget | " + " | ".join(name for name, _ in KINDS.values()) + " |",
        "|---" * (len(KINDS) + 2) + "|",
    ]
    for domain in sorted({domain for domain, _, _ in groups}):
        methods = {kind(method): method for method in chosen(groups, domain)}
        for budget in budgets(groups):
            cells = {
                one: groups.get((domain, budget, method), []) for one, method in methods.items()
            }
            shown = [
                _learned(cells.get(one, []))
                + (f" ({methods[one].partition('-')[2]})" if "-" in methods.get(one, "") else "")
                for one in KINDS
            ]
            lines.append(f"| {domain} | {budget} | {' | '.join(shown)} |")
    return lines


def ratios(groups: Groups) -> list[str]:
    """Learning of one kind of method as a multiple of another's, over the seeds that both have."""
    pairs = (("ours", "plain"), ("ours", "strength"), ("shrunk", "plain"), ("rate", "plain"))
    lines = [
        "| domain | budget | "
        + " | ".join(f"{KINDS[a][0]} / {KINDS[b][0]}" for a, b in pairs)
        + " |",
        "|---" * (len(pairs) + 2) + "|",
    ]
    for domain in sorted({domain for domain, _, _ in groups}):
        methods = {kind(method): method for method in chosen(groups, domain)}
        for budget in budgets(groups):
            cells = {
                one: groups.get((domain, budget, method), []) for one, method in methods.items()
            }
            lines.append(
                f"| {domain} | {budget} | "
                f"{' | '.join(_ratio(cells.get(a, []), cells.get(b, [])) for a, b in pairs)} |"
            )
    return lines


def _ratio(a: Sequence[Result], b: Sequence[Result]) -> str:
    """What `a` learned as a multiple of `b`, over the seeds that both have."""
    first, second = ({result["seed"]: learning(result) for result in some} for some in (a, b))
    both = sorted(first.keys() & second.keys())
    below = sum(second[seed] for seed in both)
    return f"{sum(first[seed] for seed in both) / below:.2f}x" if below > 0 else ""


def _learned(results: Sequence[Result]) -> str:
    values = [learning(result) for result in results]
    if not values:
        return ""
    return f"{statistics.mean(values):.3f}" + (
        f" ± {_error(values):.3f}" if len(values) > 1 else " (one seed)"
    )


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def verdicts(groups: Groups) -> list[str]:
    """How often each kind of method was met, not shown, exceeded, and how many were not met at the
    first check.
    """
    lines = [
        "| method | results | met | not shown | exceeded | met at the first check |",
        "|---|---|---|---|---|---|",
    ]
    for one, (name, _) in KINDS.items():
        results = [
            result
            for (_, _, method), some in groups.items()
            if kind(method) == one
            for result in some
        ]
        if results:
            count = Counter(result["verdict"] for result in results)
            first = sum(attempts(result) == 1 and result["verdict"] == "met" for result in results)
            lines.append(
                f"| {name} | {len(results)} | {count['met']} | {count['not shown']} | "
                f"{count['exceeded']} | {first} |"
            )
    return lines


def promises(groups: Groups) -> list[str]:
    """Ours, and every other method: promised against checked."""
    lines = [
        "| domain | budget | method | promised at most | checked rise | its upper end | learning "
        "| share | seeds |",
        "|---" * 9 + "|",
    ]
    order = lambda item: (
        item[0][0],
        percent_of(item[0][1]),
        list(KINDS).index(kind(item[0][2])),
        item[0][2],
    )
    for (domain, budget, method), results in sorted(groups.items(), key=order):
        rises = [
            f"{perplexity_percent(value):.2f} %"
            for value in (
                statistics.mean(r["promised"] for r in results),
                statistics.mean(r["check"]["nats"] for r in results),
                statistics.mean(r["check"]["high"] for r in results),
            )
        ]
        shares = ", ".join(f"{result['share']:.2f}" for result in results)
        lines.append(
            f"| {domain} | {budget} | {method} | {' | '.join(rises)} | {_learned(results)} | "
            f"{shares} | {len(results)} |"
        )
    return lines


def used(groups: Groups) -> str:
    """How much of the budget ours came to on the check part."""
    ours = [
        result
        for (_, _, method), results in groups.items()
        if method == "ours"
        for result in results
    ]
    rises, ends = (
        [result["check"][key] / result["budget_nats"] for result in ours]
        for key in ("nats", "high")
    )
    return (
        f"Of the budget, `tune --budget` came to {statistics.median(rises):.2f} in the middle "
        f"and {max(rises):.2f} at most on the check part, "
        f"the upper end of the interval to {statistics.median(ends):.2f} and {max(ends):.2f}."
    )


def probing(groups: Groups) -> str:
    """What probing took, over all runs of ours."""
    probes = [
        result["probe"] for results in groups.values() for result in results if result.get("probe")
    ]
    each = [
        100 * probe["seconds"] / probe["train_seconds"]
        for probe in probes
        if probe["train_seconds"]
    ]
    return (
        f"Probing took {min(each):.1f} to {max(each):.1f} % of the training time, "
        f"{statistics.median(each):.1f} % in the middle ({len(each)} runs)."
    )


def trajectories(groups: Groups) -> list[str]:
    """Ours at the first seed: the rise by energy as a share of the budget, and the strength that
    followed, at each look.
    """
    lines = ["| domain | budget | | at each look |", "|---|---|---|---|"]
    for (domain, budget, method), results in sorted(
        groups.items(), key=lambda item: (item[0][0], percent_of(item[0][1]))
    ):
        if method != "ours":
            continue
        first = min(results, key=lambda result: result["seed"])
        rises = " ".join(
            f"{(look['rise'] or 0.0) / first['budget_nats']:.2f}" for look in first["trajectory"]
        )
        strengths = " ".join(f"{look['strength']:.2g}" for look in first["trajectory"])
        lines += [
            f"| {domain} | {budget} | rise / budget | {rises} |",
            f"| | | strength | {strengths} |",
        ]
    return lines


def draw(groups: Groups, path: Path) -> None:
    """Learning within each budget, a panel per domain."""
    domains = sorted({domain for domain, _, _ in groups})
    figure, axes = pyplot("kept").subplots(
        1, len(domains), figsize=(4.1 * len(domains), 3.7), squeeze=False
    )
    for axis, domain in zip(axes[0], domains, strict=True):
        for method in chosen(groups, domain):
            name, colour = KINDS[kind(method)]
            measured = [budget for budget in budgets(groups) if (domain, budget, method) in groups]
            found = [
                (
                    percent_of(budget),
                    [learning(result) for result in groups[domain, budget, method]],
                )
                for budget in measured
            ]
            means, errors = (
                [of(values) for _, values in found] for of in (statistics.mean, _error)
            )
            axis.errorbar(
                [x for x, _ in found],
                means,
                yerr=errors,
                color=colour,
                label=name,
                marker="o",
                markersize=5 if method != "ours" else 6,
                linewidth=2.4 if method == "ours" else 1.4,
                capsize=2,
            )
        axis.set(
            xscale="log", title=domain, xlabel="budget, per cent of perplexity", ylim=(0, None)
        )
        axis.set_xticks(
            [percent_of(budget) for budget in budgets(groups)],
            [budget[:-1] for budget in budgets(groups)],
        )
        axis.minorticks_off()
        axis.grid(axis="y", color=PALE, linewidth=0.8)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0][0].set_ylabel("learning within it, nats per token")
    found = {
        name: handle
        for axis in axes[0]
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(found.values()),
        list(found),
        loc="lower center",
        ncols=len(found),
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
    )
    figure.tight_layout(rect=(0, 0.07, 1, 1), w_pad=1.5)
    save(figure, path)


def percent_of(budget: str) -> float:
    return float(budget[:-1])


def page(groups: Groups, refused: Sequence[str]) -> str:
    """experiments/budget.md. `refused`: what the general text could not show."""
    parts = [
        "# Budgets, promised against checked",
        "<!-- made by experiments/kept.py -->",
        "The protocol is in [budget.py](budget.py), what it says in "
        "[docs/budget.md](../docs/budget.md), every result in [budget.json](budget.json). "
        "Learning is in nats per token, mean over seeds ± standard error, of the update that the "
        "finish left; rises are in per cent of perplexity.",
        "## What each budget buys",
        "\n".join(table(groups)),
        "## As multiples, over the same seeds",
        "\n".join(ratios(groups)),
        "## Whether it was kept",
        "\n".join(verdicts(groups)),
        used(groups),
        probing(groups),
        *([f"Refused, since the text cannot show it: {', '.join(refused)}."] if refused else []),
        "## What the controller did",
        "\n".join(trajectories(groups)),
        "## Every method",
        "\n".join(promises(groups)),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    given = parser.parse_args()
    results = load(given.results)
    groups = grouped(result for result in results if result["verdict"] != "refused")
    refused = sorted(
        {
            f"{result['domain']} at {result['budget']}"
            for result in results
            if result["verdict"] == "refused"
        }
    )
    (HERE / "budget.md").write_text(page(groups, refused), encoding="utf-8")
    draw(groups, HERE.parent / "docs" / "budget.svg")
    if given.results.is_dir():
        kept = [
            {
                **{key: value for key, value in r.items() if key not in DROPPED},
                "attempts": attempts(r),
            }
            for r in results
        ]
        (HERE / "budget.json").write_text(
            "[\n" + ",\n".join(json.dumps(result) for result in kept) + "\n]\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
