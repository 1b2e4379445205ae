"""Three domains one after another on the lab model, held in several ways and not at all.

What does each do to those before, to those after, and to general text?

    # Finished runs are not made again.
    python experiments/sequence.py ../shared out/sequence out/budget/lab-english-5m.safetensors
    # Some of the arms.
    python experiments/sequence.py ../shared out/sequence out/budget/lab-english-5m.safetensors \\
        --arms plain,sum
    # Writes sequence.json and sequence.md from what is there.
    python experiments/sequence.py ../shared out/sequence --page

Protocol: sciq (question -> answer), medmcqa (running text with its explanation), piqa (goal ->
solution), 120 steps of 8 sequences of at most 128 tokens each, LoRA of rank 8 on all linear layers,
rate 4e-3, seeds 1, 2, 3. Held-out rows are the test files' (the first 200), general text the first
1,200 characters of 200 test documents. Arms:

    plain      no importance: what later domains do is left to chance
    general    held by the importance of general text alone, the domains before are not
               (--consolidate none): what consolidation adds is the difference to this
    sum        the importance of each domain is added
    decay      running average, 0.9 of what was so far
    kl         no importance; divergence from the model before the step on two general sequences per
               optimizer step
    budget-2   sum, with --budget 2%: general text and every earlier domain; a text that cannot show
               a third of it is refused, which is a result
    budget-5   the same with 5%

The importance file is the default recipe's, recorded on frontier.py's general text (budget.py makes
it). An interrupted run goes on where it was. Five to six minutes a run on one core, with a budget
twelve.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frontier import prepare

from forgetless.files.atomic import read_json, write_json, write_text
from forgetless.options.tune import TuneOptions
from forgetless.options.verbs import resolve
from forgetless.sequence.sequence import tune_in_turn

SEEDS = (1, 2, 3)
ORDER = ("sciq", "medmcqa", "piqa")
STEPS = dict(
    max_steps=120,
    batch_size=8,
    accumulation=1,
    length=128,
    learning_rate=4e-3,
    dtype="float32",
    log_steps=20,
    save_steps=40,
    threads=1,
    limit=200,
)
ARMS: dict[str, dict[str, Any]] = {  # importance and replay are filled in
    "plain": {},
    "general": dict(importance=None, consolidate="none"),
    "sum": dict(importance=None, consolidate="sum"),
    "decay": dict(importance=None, consolidate="decay:0.9"),
    "kl": dict(method="kl", replay=None, kl_weight=1.0),
    "budget-2": dict(importance=None, consolidate="sum", budget="2%"),
    "budget-5": dict(importance=None, consolidate="sum", budget="5%"),
}
PIQA_ROWS = 2000
REFUSED = "refused.json"
NUMBERS = (
    "matrix",
    "average",
    "backward_transfer",
    "forward_transfer",
    "accuracy_domains",
    "accuracy",
    "accuracy_transfer",
    "general",
)  # that are kept


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shared", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "importance", type=Path, nargs="?", help="recorded on frontier.py's general text"
    )
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--order", default=",".join(ORDER))
    parser.add_argument("--steps", type=int, default=STEPS["max_steps"], help="for a smoke test")
    parser.add_argument(
        "--limit",
        type=int,
        default=STEPS["limit"],
        help="documents and rows that are measured; for a smoke test",
    )
    parser.add_argument("--page", action="store_true")
    given = parser.parse_args()
    if given.page:
        write_page(given.out)
        return
    if given.importance is None:
        parser.error(
            "an importance file is needed, recorded on frontier.py's general text (budget.py "
            "makes one)"
        )
    data = domains(given.shared / "data", given.out / "data")
    for seed in given.seeds:
        for arm in given.arms.split(","):
            run(given, data, arm, seed)


def domains(source: Path, target: Path) -> dict[str, str]:
    """frontier.py's parts, and piqa's: name -> specification for `tune`."""
    found = prepare(source, target)
    for part, count in (("train", PIQA_ROWS), ("test", None)):
        path = target / f"piqa_{part}.jsonl"
        if not path.exists():
            path.write_text(
                "\n".join(
                    (source / "piqa" / f"{part}.jsonl")
                    .read_text(encoding="utf-8")
                    .splitlines()[:count]
                )
                + "\n",
                encoding="utf-8",
            )
        found[f"piqa_{part}"] = f"piqa={path}"
    return found


def run(given: argparse.Namespace, data: dict[str, str], arm: str, seed: int) -> None:
    """One sequence; skipped where it is finished, gone on with where it was begun."""
    order = given.order.split(",")
    out = given.out / "runs" / ("-".join(order)) / f"{arm}-{seed}"
    if (out / "run.json").exists() or (out / REFUSED).exists():
        return
    filled = {"importance": str(given.importance), "replay": data["general_record"]}
    settings = {
        key: filled.get(key) if value is None else value for key, value in ARMS[arm].items()
    }
    options = {
        **STEPS,
        **settings,
        "max_steps": given.steps,
        "limit": given.limit,
        "model": str(given.shared / "models/lab-english-5m"),
        "seed": seed,
        "out": str(out),
        "data": [data[f"{name}_train"] for name in order],
        "eval_data": [data[f"{name}_test"] for name in order],
        "general": data["general_test"],
        "resume": (out / "resolved.yaml").exists(),
    }
    try:
        tune_in_turn(resolve(TuneOptions, options))
    except ValueError as error:
        if "too short to show" not in str(error):
            raise
        write_json(out / REFUSED, {"refused": str(error)})


def write_page(out: Path) -> None:
    """experiments/sequence.json: what each run's run.json says of its sequence, with those of
    earlier campaigns; experiments/sequence.md: the tables.
    """
    here = Path(__file__).parent
    kept = read_json(here / "sequence.json") if (here / "sequence.json").exists() else {}
    for path in sorted((out / "runs").glob(f"*/*/{REFUSED}")):
        kept[f"{path.parent.parent.name}/{path.parent.name}"] = read_json(path)
    for path in sorted((out / "runs").glob("*/*/run.json")):
        found = read_json(path)["sequence"]
        steps = [
            {
                "domain": step["domain"].removesuffix("_train"),
                "verdict": step["verdict"],
                "seconds": step["train_seconds"],
                "consolidated": step["consolidated"] and step["consolidated"][-1]["error"],
                "budget": promise(step["budget"]),
            }
            for step in found["steps"]
        ]
        named = [domain.removesuffix("_train") for domain in found["domains"]]
        kept[f"{path.parent.parent.name}/{path.parent.name}"] = {
            **{key: found[key] for key in NUMBERS},
            "domains": named,
            "steps": steps,
        }
    write_text(here / "sequence.json", json.dumps(kept, separators=(",", ":")) + "\n")
    write_text(here / "sequence.md", page(kept))


def promise(budget: dict[str, Any] | None) -> dict[str, Any] | None:
    """What a step's budget allowed, and the rise and its upper end that were found on each source's
    check part.
    """
    if budget is None:
        return None
    check = budget["check"]
    each = check["each"] or {"general text": check}
    return {
        "nats": budget["budget_nats"],
        "share": budget["share"],
        "learning": budget["learning"]["nats"],
        "sources": {
            name.removesuffix("_train"): [found["nats"], found["high"]]
            for name, found in each.items()
        },
    }


def page(kept: dict[str, dict[str, Any]]) -> str:
    """The mean over seeds ± its standard error for each arm: transfer, general rise, and the loss
    on each domain in the end; and what the budget promised.
    """
    lines = [
        "# One domain after another",
        "",
        "<!-- made by experiments/sequence.py --page -->",
        "",
        "The protocol and what each arm is are in [sequence.py](sequence.py), every run in "
        "[sequence.json](sequence.json), what it says in "
        "[docs/sequences.md](../docs/sequences.md).",
    ]
    for order in dict.fromkeys(name.partition("/")[0] for name in kept):
        runs: dict[str, list[dict[str, Any]]] = {}
        budgets = {
            name.partition("/")[2]: one
            for name, one in kept.items()
            if name.startswith(f"{order}/budget-")
        }
        for name, found in kept.items():
            if name.startswith(f"{order}/") and "refused" not in found:
                runs.setdefault(name.partition("/")[2].rpartition("-")[0], []).append(found)
        runs = {arm: runs[arm] for arm in ARMS if arm in runs}
        domains = next(iter(runs.values()))[0]["domains"]
        lines += [
            "",
            f"## {', '.join(domains)}",
            "",
            "Nats per token; mean over seeds ± standard error. Learned: the fall of each "
            "domain's loss from the bare "
            "base to the end of its own step, averaged.",
            "",
        ]
        head = [
            "arm",
            "seeds",
            "learned",
            "average loss in the end",
            "backward transfer",
            "forward transfer",
            "general rise",
            *(f"{n}, end" for n in domains),
        ]
        lines += rows(head, [[arm, str(len(found)), *row(found)] for arm, found in runs.items()])
        scored = next(iter(runs.values()))[0]["accuracy_domains"]
        if scored:
            ends = [
                [
                    arm,
                    *(mean([one["accuracy"][-1][j] for one in found]) for j in range(len(scored))),
                ]
                for arm, found in runs.items()
            ]
            lines += ["", *rows(["accuracy in the end", *scored], ends)]
        if promised := [
            (name, step) for name, one in budgets.items() for step in one.get("steps", ())
        ]:
            lines += [
                "",
                "What the budget allowed by the end of each step, and on the check parts the "
                "rise of each source with the upper end of its interval:",
                "",
            ]
            lines += rows(
                [
                    "run",
                    "step",
                    "verdict",
                    "allowed",
                    "share kept",
                    "learned",
                    "rise of each source (at most)",
                ],
                [
                    [name, step["domain"], step["verdict"], *kept_to(step["budget"])]
                    for name, step in promised
                ],
            )
        lines += [
            "",
            *(
                f"{name} was refused before training: {one['refused']}."
                for name, one in budgets.items()
                if "refused" in one
            ),
        ]
    return "\n".join(lines).rstrip("\n") + "\n"


def rows(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)]


def kept_to(budget: dict[str, Any]) -> list[str]:
    sources = "; ".join(
        f"{name} {rise:+.4f} ({high:+.4f})" for name, (rise, high) in budget["sources"].items()
    )
    return [f"{budget['nats']:.4f}", f"{budget['share']:.2f}", f"{budget['learning']:.3f}", sources]


def row(runs: Sequence[dict[str, Any]]) -> list[str]:
    learned = [
        statistics.fmean(
            run["matrix"][0][j] - run["matrix"][j + 1][j] for j in range(len(run["domains"]))
        )
        for run in runs
    ]
    numbers = [
        learned,
        *(
            [run[key] for run in runs]
            for key in ("average", "backward_transfer", "forward_transfer")
        ),
        [run["general"][-1]["nats"] for run in runs],
    ]
    numbers += [[run["matrix"][-1][j] for run in runs] for j in range(len(runs[0]["domains"]))]
    return [mean(values) for values in numbers]


def mean(values: Sequence[float]) -> str:
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{error}"


if __name__ == "__main__":
    main()
