"""Three domains one after another on the lab model, with holdfast and without: what each does to those before, to those after, and to general text.

    python experiments/sequence.py ../shared out/sequence out/frontier/default64.safetensors                      # finished runs are not made again
    python experiments/sequence.py ../shared out/sequence out/frontier/default64.safetensors --arms plain,sum     # some of the arms
    python experiments/sequence.py ../shared out/sequence out/frontier/default64.safetensors --table              # what is there so far, as markdown

Protocol: sciq (question -> answer), medmcqa (running text with its explanation), piqa (goal -> solution), 120 steps of 8 sequences of at most 128 tokens
each, LoRA of rank 8 on all linear layers, rate 4e-3, seeds 1, 2, 3. Held-out rows are the test files' (the first 200), general text the first 1,200
characters of 200 test documents. Arms:

    plain      no importance: what later domains do is left to chance
    general    held by the importance of general text alone, the domains before are not (--consolidate none): what consolidation adds is the difference to this
    sum        the importance of each domain is added
    decay      running average, 0.9 of what was so far
    kl         no importance; divergence from the model before the step on two general sequences per optimizer step
    budget     sum, with --budget 2%: general text and every earlier domain

An interrupted run goes on where it was. About four minutes a run on one core.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frontier import prepare

from holdfast.config import TUNE_PRESETS, TuneOptions, resolve
from holdfast.runs import read_json
from holdfast.succession import tune_in_turn

SEEDS = (1, 2, 3)
ORDER = ("sciq", "medmcqa", "piqa")
STEPS = dict(max_steps=120, batch_size=8, accumulation=1, length=128, learning_rate=4e-3, dtype="float32", log_steps=20, save_steps=40, threads=1, limit=200)
ARMS: dict[str, dict[str, Any]] = {  # importance and replay are filled in
    "plain": {},
    "general": dict(importance=None, consolidate="none"),
    "sum": dict(importance=None, consolidate="sum"),
    "decay": dict(importance=None, consolidate="decay:0.9"),
    "kl": dict(method="kl", replay=None, kl_weight=1.0),
    "budget": dict(importance=None, consolidate="sum", budget="2%"),
}
PIQA_ROWS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("importance", type=Path, help="recorded on frontier.py's general text")
    parser.add_argument("--arms", default="plain,general,sum,decay,kl")
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--order", default=",".join(ORDER))
    parser.add_argument("--steps", type=int, default=STEPS["max_steps"], help="for a smoke test")
    parser.add_argument("--limit", type=int, default=STEPS["limit"], help="documents and rows that are measured; for a smoke test")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        print(table(given.out))
        return
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
            path.write_text("\n".join((source / "piqa" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()[:count]) + "\n", encoding="utf-8")
        found[f"piqa_{part}"] = f"piqa={path}"
    return found


def run(given: argparse.Namespace, data: dict[str, str], arm: str, seed: int) -> None:
    """One sequence; skipped where it is finished, gone on with where it was begun."""
    order = given.order.split(",")
    out = given.out / "runs" / ("-".join(order)) / f"{arm}-{seed}"
    if (out / "run.json").exists():
        return
    filled = {"importance": str(given.importance), "replay": data["general_record"]}
    settings = {key: filled.get(key) if value is None else value for key, value in ARMS[arm].items()}
    options = {**STEPS, **settings, "max_steps": given.steps, "limit": given.limit,
               "model": str(given.shared / "models/lab-english-5m"), "seed": seed, "out": str(out),
               "data": [data[f"{name}_train"] for name in order], "eval_data": [data[f"{name}_test"] for name in order],
               "general": data["general_test"], "resume": (out / "config.yaml").exists()}  # fmt: skip
    tune_in_turn(resolve(TuneOptions, options, TUNE_PRESETS))


def table(out: Path) -> str:
    """The mean over seeds ± its standard error for each arm: transfer, general rise, and the loss on each domain in the end."""
    lines: list[str] = []
    for folder in sorted((out / "runs").glob("*")):
        runs: dict[str, list[dict[str, Any]]] = {}
        for path in sorted(folder.glob("*/run.json")):
            runs.setdefault(path.parent.name.rpartition("-")[0], []).append(read_json(path)["sequence"])
        if not runs:
            continue
        names = next(iter(runs.values()))[0]["domains"]
        columns = [
            "arm",
            "learned in its turn",
            "average loss in the end",
            "backward transfer",
            "forward transfer",
            "general rise",
            *(f"{name}, end" for name in names),
        ]
        lines += [f"### {', '.join(names)}", "", "Nats per token; mean over seeds ± standard error.", "", f"| {' | '.join(columns)} | seeds |",
                  "|---" * (len(names) + 7) + "|"]  # fmt: skip
        for arm in ARMS:
            if arm in runs:
                lines.append(f"| {arm} | {' | '.join(row(runs[arm]))} | {len(runs[arm])} |")
        scored = next(iter(runs.values()))[0]["accuracy_domains"]
        if scored:
            lines += ["", f"| accuracy in the end | {' | '.join(scored)} |", "|---" * (len(scored) + 1) + "|"]
            lines += [
                f"| {arm} | {' | '.join(mean([one['accuracy'][-1][j] for one in runs[arm]]) for j in range(len(scored)))} |" for arm in ARMS if arm in runs
            ]
        lines.append("")
    return "\n".join(lines)


def row(sequences: Sequence[dict[str, Any]]) -> list[str]:
    learned = [statistics.fmean(s["matrix"][0][j] - s["matrix"][j + 1][j] for j in range(len(s["domains"]))) for s in sequences]
    numbers = [
        learned,
        *([s[key] for s in sequences] for key in ("average", "backward_transfer", "forward_transfer")),
        [s["general"][-1]["nats"] for s in sequences],
    ]
    numbers += [[s["matrix"][-1][j] for s in sequences] for j in range(len(sequences[0]["domains"]))]
    return [mean(values) for values in numbers]


def mean(values: Sequence[float]) -> str:
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{error}"


if __name__ == "__main__":
    main()
