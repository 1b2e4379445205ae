"""What a budget that was kept on a prediction, without general text, really cost.

`tune --budget` runs with a calibrated importance file; the rise is measured afterwards.

    # Finished runs are not made again.
    python experiments/predicted.py ../shared out/predicted --domain sciq
    # Writes predicted.md from predicted.json.
    python experiments/predicted.py ../shared out/predicted --page

Models, domains, steps and budgets as in budget.py, three seeds. The importance file is the default
recipe's on the same text (300 documents), with --calibrate: a third of that text is kept apart for
it. The domains, their rows and the documents of the measurement were not seen by the calibration.
After the run all 277 held-out general documents (piqa: 347 stories) are measured, of which the run
has seen none. `ours` are the runs of budget.json, whose strength and scale were found by measuring
on half of these documents.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from budget import BUDGETS, RECORDING, SEEDS, Lab

from forgetless.evaluate.rise import paired_rise
from forgetless.files.atomic import read_json, write_json
from forgetless.files.provenance import environment
from forgetless.files.schema import to_json
from forgetless.options.record import RecordOptions
from forgetless.options.verbs import resolve
from forgetless.report.numbers import perplexity_percent

HERE = Path(__file__).parent
KEPT = (
    "budget_nats",
    "share",
    "promised",
    "predicted",
    "calibration",
    "learning",
    "trajectory",
    "curve",
)


class Predicted(Lab):
    """The runs of one domain."""

    def importance(self) -> str:
        from forgetless.record.record import record

        path = self.out / f"{Path(self.model).name}.safetensors"
        if not path.exists() or path.with_name(path.name + ".state").exists():
            given = {
                **RECORDING,
                "model": self.model,
                "general": self.recorded,
                "out": str(path),
                "calibrate": True,
                "resume": True,
            }
            record(resolve(RecordOptions, given))
        return str(path)

    def run(self, budget: str, seed: int) -> None:
        place = self.out / "results" / f"{self.domain}-{budget.rstrip('%')}-{seed}.json"
        if place.exists():
            return
        run = self.train(seed, importance=None, budget=budget, eval_data=self.held)
        model, baseline, _, _ = self.reload()
        both = (baseline.control, baseline.check)
        joined = lambda arrays: np.concatenate(list(arrays))
        measured = paired_rise(
            joined(p.nats for p in both),
            joined(p.losses(model) for p in both),
            joined(p.tokens for p in both),
            [source for p in both for source in p.sources],
        )
        report = {key: run["budget"][key] for key in KEPT}
        write_json(
            place,
            {
                "domain": self.domain,
                "budget": budget,
                "seed": seed,
                "measured": measured.numbers(),
                **report,
                "environment": to_json(environment("cpu")),
            },
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shared", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--domain", choices=("sciq", "medmcqa", "piqa"), default="sciq")
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument(
        "--page", action="store_true", help="only write the page, of the results there are"
    )
    given = parser.parse_args()
    if given.page:
        results = [read_json(path) for path in sorted((given.out / "results").glob("*.json"))]
        write_json(
            HERE / "predicted.json",
            [
                {key: value for key, value in result.items() if key not in ("environment", "curve")}
                for result in results
            ],
        )
        (HERE / "predicted.md").write_text(page(results), encoding="utf-8")
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    lab = Predicted(given.shared, given.out, given.domain, 60)
    for seed in given.seeds:
        for budget in BUDGETS:
            lab.run(budget, seed)


def page(results: list[dict[str, Any]]) -> str:
    """What was promised, what was measured, and what was learned beside the runs that measured."""
    ours = {
        (r["domain"], r["budget"], r["seed"]): r
        for r in json.loads((HERE / "budget.json").read_text(encoding="utf-8"))
        if r["method"] == "ours"
    }
    lines = ["# Budgets kept on a prediction", "", "<!-- made by experiments/predicted.py -->", ""]
    within = sum(r["measured"]["nats"] <= r["budget_nats"] for r in results)
    shown = sum(r["measured"]["high"] <= r["budget_nats"] for r in results)
    beyond = sum(r["measured"]["low"] > r["budget_nats"] for r in results)
    lines += [
        f"{len(results)} runs without general text, three seeds. The rise measured afterwards "
        f"was within the budget in {within}, with all of its 95 % "
        f"interval in {shown}; all of the interval was beyond the budget in {beyond}. Predicted, "
        "bound and measured are shares of the budget, medians "
        "over seeds (learning: means).",
        "",
        "| domain | budget | predicted | bound | measured (smallest to largest) | learning, "
        "predicted | learning, measuring | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for domain in ("sciq", "medmcqa", "piqa"):
        for budget in reversed(BUDGETS):
            runs = [r for r in results if (r["domain"], r["budget"]) == (domain, budget)]
            if not runs:
                continue
            share = lambda value, r: value / r["budget_nats"]
            measured = sorted(share(r["measured"]["nats"], r) for r in runs)
            learned = statistics.mean(r["learning"]["nats"] if r["learning"] else 0.0 for r in runs)
            other = statistics.mean(
                ours[domain, budget, r["seed"]]["learning"]["nats"] for r in runs
            )
            told = [
                statistics.median(share(value, r) for value, r in pairs)
                for pairs in (
                    [(r["predicted"]["nats"], r) for r in runs],
                    [(r["promised"], r) for r in runs],
                )
            ]
            spread = f"{statistics.median(measured):.2f} ({measured[0]:.2f} to {measured[-1]:.2f})"
            lines.append(
                f"| {domain} | {budget} | {told[0]:.2f} | {told[1]:.2f} | {spread} | "
                f"{learned:.3f} | {other:.3f} | {learned / other:.2f} |"
            )
    lines += [
        "",
        "Calibrations: "
        + "; ".join(
            sorted(
                {
                    f"{r['domain']}: a unit of energy costs {r['calibration']['cost']:.3g} nats, "
                    "off by a factor of "
                    f"{r['calibration']['error']:.2g} typically, "
                    f"{r['calibration']['factor']:.2g} at most 19 times in 20"
                    for r in results
                }
            )
        )
        + ".",
    ]
    worst = max(
        (r["measured"]["nats"] / r["budget_nats"], r["domain"], r["budget"], r["seed"])
        for r in results
    )
    lines += [
        "",
        f"The largest measured rise is {worst[0]:.2f} of its budget ({worst[1]}, {worst[2]}, "
        f"seed {worst[3]}: {percent_of(results, worst)}).",
    ]
    return "\n".join(lines) + "\n"


def percent_of(results: list[dict[str, Any]], which: tuple[float, str, str, int]) -> str:
    """The measured rise of one run in per cent of perplexity."""
    found = next(r for r in results if (r["domain"], r["budget"], r["seed"]) == which[1:])
    return f"{perplexity_percent(found['measured']['nats']):+.2f} %"


if __name__ == "__main__":
    main()
