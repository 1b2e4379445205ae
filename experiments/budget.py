"""What budgets promise against what a check finds, on the lab models.

Budgets of 0.5, 1, 2 and 5 %, ours against scaling, fixed strengths and small learning rates.

    # Finished results are not made again, nor are those of budget.json.
    python experiments/budget.py ../shared out/budget --domain sciq
    # What is there so far, as markdown and as a figure.
    python experiments/kept.py out/budget/results

Protocol: 60 steps of 8 sequences of at most 128 tokens, LoRA of rank 8 on all linear layers, rate
4e-3, seeds 1, 2, 3. sciq and medmcqa as in frontier.py, on lab-english-5m; piqa (goal -> solution)
on tinystories-char-1m, whose tokens are characters. Importance is the default recipe's, on 300
documents. Every method is finished by the same code on the same documents (`finish.keep_budget`),
to the most learning that the control part allows, then checked. `ours` is `tune --budget`, trained
anew for each budget; the others are trained once a seed and finished for each budget:

    plain                  scaled
    shrunk                 plain's update made smaller along importance instead
    strength-3, -10, -30   the default recipe at fixed strengths, scaled or shrunk as ours is
    rate-0.001, -0.0003    plain with a small learning rate, stopped at the last step that keeps the
                           budget

All are run with the first seed; with the others only plain, and the strength and the rate that
learned most within the budgets. General text is the first 1,200 characters of 277 held-out
documents of six sources (piqa: the first 500 of 347 stories), half of them for the check, so that a
run costs about two minutes on one core. By `check_reach` that text can show all four budgets (of
the first 600 characters: 1 % barely, 0.5 % not). One that it cannot show is refused before
training, and the refusal is the result. Learning is measured on the rows that the finish chooses
by, for all methods alike.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from frontier import prepare
from torch.optim.optimizer import register_optimizer_step_post_hook

from forgetless.budget.budget import parse
from forgetless.evaluate.paired import PairedText
from forgetless.files.atomic import read_json, write_json, write_text
from forgetless.files.provenance import environment
from forgetless.files.schema import to_json
from forgetless.options.model import ModelOptions
from forgetless.options.record import RecordOptions
from forgetless.options.tune import TuneOptions
from forgetless.options.verbs import resolve

BUDGETS = ("5%", "2%", "1%", "0.5%")
SEEDS = (1, 2, 3)
STEPS = dict(
    max_steps=60,
    batch_size=8,
    accumulation=1,
    length=128,
    learning_rate=4e-3,
    dtype="float32",
    log_steps=10,
    save_steps=1000,
    overwrite=True,
    threads=1,
)
CHARACTERS = {"general": 1200, "tinystories": 500}
ROWS = {"sciq": 250, "medmcqa": 100, "piqa": 100}  # of the test file: about 12,000 tokens
MODELS = {"sciq": "lab-english-5m", "medmcqa": "lab-english-5m", "piqa": "tinystories-char-1m"}
RECORDING = dict(documents=300, batch_size=16, length=128, dtype="float32", threads=1)
METHODS: dict[str, dict[str, Any]] = {  # what differs from plain; None: the importance file
    "plain": {},
    "strength-3": dict(importance=None, strength=3.0),
    "strength-10": dict(importance=None, strength=10.0),
    "strength-30": dict(importance=None, strength=30.0),
    "rate-0.001": dict(learning_rate=1e-3),
    "rate-0.0003": dict(learning_rate=3e-4),
}
FINISHES = {
    "strength": ("shrink", "scale"),
    "rate": ("stop",),
}  # the ways in which a training run may be finished, by its kind; of plain's come two results
KEPT = (
    "verdict",
    "reason",
    "budget_nats",
    "way",
    "share",
    "mu",
    "each",
    "promised",
    "control",
    "check",
    "checks",
    "learning",
    "documents_to_decide",
    "others",
    "trajectory",
    "probe",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shared", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--domain", choices=tuple(ROWS), default="sciq")
    parser.add_argument("--steps", type=int, default=STEPS["max_steps"], help="for a smoke test")
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument(
        "--only",
        choices=("ours", "finished"),
        help=(
            "only runs that are trained for a budget, or only those that are finished for all "
            "of them"
        ),
    )
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    lab = Lab(given.shared, given.out, given.domain, given.steps)
    lab.restore(Path(__file__).parent / "budget.json")
    for seed in given.seeds:
        for budget in BUDGETS if given.only != "finished" else ():
            lab.ours(budget, seed)
        if given.only != "ours":
            for method in (
                METHODS if seed == SEEDS[0] else ("plain", lab.best("strength"), lab.best("rate"))
            ):
                lab.finished(method, seed)


class Lab:
    """The runs of one domain."""

    def __init__(self, shared: Path, out: Path, domain: str, steps: int):
        self.model, self.out, self.domain, self.steps = (
            str(shared / "models" / MODELS[domain]),
            out,
            domain,
            steps,
        )
        prepared = prepare(shared / "data", out / "data")
        stories = MODELS[domain].startswith("tinystories")
        general = shared / "data" / ("tinystories" if stories else "general") / "test.jsonl"
        self.recorded = (
            str(shared / "data/tinystories/train.jsonl") if stories else prepared["general_record"]
        )
        texts = [
            {**row, "text": row["text"][: CHARACTERS[general.parent.name]]}
            for row in read_lines(general)
        ]
        self.general = few(out / "data" / f"{general.parent.name}.jsonl", texts)
        train = (
            f"piqa={shared / 'data/piqa/train.jsonl'}"
            if domain == "piqa"
            else prepared[f"{domain}_train"]
        )
        held = (
            f"piqa={shared / 'data/piqa/test.jsonl'}"
            if domain == "piqa"
            else prepared[f"{domain}_test"]
        )
        task, path = held.split("=") if "=" in held else ("", held)
        kept = few(out / "data" / f"{domain}_held.jsonl", read_lines(Path(path))[: ROWS[domain]])
        self.data, self.held = train, f"{task}={kept}" if task else kept

    def importance(self) -> str:
        """The importance file of the model, recorded when it is first needed."""
        from forgetless.record.record import record

        path = self.out / f"{Path(self.model).name}.safetensors"
        if not path.exists():
            record(
                resolve(
                    RecordOptions,
                    {**RECORDING, "model": self.model, "general": self.recorded, "out": str(path)},
                )
            )
        return str(path)

    def best(self, kind: str) -> str:
        """The method of a kind that learned most within the budgets, on average, with the first
        seed.
        """
        learned = {}
        for method in METHODS:
            if method.startswith(kind):
                runs = [read_json(self.place(method, budget, SEEDS[0])) for budget in BUDGETS]
                learned[method] = sum(
                    run["learning"]["nats"]
                    for run in runs
                    if run["verdict"] == "met" and run["learning"]
                )
        return max(learned, key=lambda method: learned[method])

    def place(self, method: str, budget: str, seed: int) -> Path:
        return self.out / "results" / f"{self.domain}-{method}-{budget.rstrip('%')}-{seed}.json"

    def restore(self, known: Path) -> None:
        """Take over the results of this domain that earlier campaigns left (kept.py wrote them)."""
        for result in read_json(known) if known.exists() else ():
            place = self.place(result["method"], result["budget"], result["seed"])
            if (result["domain"], result["steps"]) == (
                self.domain,
                self.steps,
            ) and not place.exists():
                write_json(place, result)

    def train(self, seed: int, **differs: Any) -> dict[str, Any]:
        from forgetless.tune.tune import tune

        given = {
            **STEPS,
            "max_steps": self.steps,
            "model": self.model,
            "data": self.data,
            "seed": seed,
            **differs,
        }
        if "importance" in given:
            given["importance"] = self.importance()
        given.setdefault("method", "hold" if "importance" in given else "plain")
        given.setdefault("general", None)
        return tune(resolve(TuneOptions, {**given, "out": str(self.out / "last" / self.domain)}))

    def ours(self, budget: str, seed: int) -> None:
        """`tune --budget`, from the start to the verdict."""
        if self.place("ours", budget, seed).exists():
            return
        started = time.perf_counter()
        try:
            run = self.train(
                seed, importance=None, budget=budget, general=self.general, eval_data=self.held
            )
        except ValueError as error:
            if "too short to show" not in str(error):
                raise
            self.write(
                "ours",
                budget,
                seed,
                {"verdict": "refused", "reason": str(error)},
                time.perf_counter() - started,
                None,
            )
            return
        self.write(
            "ours", budget, seed, run["budget"], time.perf_counter() - started, run["train_seconds"]
        )

    def finished(self, method: str, seed: int) -> None:
        """One training run without a budget, finished for each of them."""
        from forgetless.budget.finish import keep_budget
        from forgetless.budget.ways import ways_of
        from forgetless.files.schema import to_json
        from forgetless.importance.importance import Importance

        names = (
            {"plain": ("scale",), "shrunk": ("shrink",)}
            if method == "plain"
            else {method: FINISHES[method.partition("-")[0]]}
        )
        wanted = [
            (name, budget)
            for name in names
            for budget in BUDGETS
            if not self.place(name, budget, seed).exists()
        ]
        if not wanted:
            return
        with every_step() as steps:
            train_seconds = self.train(seed, **METHODS[method])["train_seconds"]
        started = time.perf_counter()
        model, baseline, learning, update = self.reload()
        now: list[Any] = [("scale", 1.0)]
        remembered = lambda part: Remembered(
            **{f.name: getattr(part, f.name) for f in dataclasses.fields(part)}, now=now
        )
        baseline = dataclasses.replace(
            baseline, control=remembered(baseline.control), check=remembered(baseline.check)
        )
        learning = dataclasses.replace(learning, part=remembered(learning.part))
        ways = ways_of(update, Importance.load(self.importance())) | {"stop": stopped(model, steps)}
        ways = {way: self.noted(now, way, apply) for way, apply in ways.items()}
        for name, budget in wanted:
            report = keep_budget(
                dataclasses.replace(baseline, budget=parse(budget)),
                model,
                {way: ways[way] for way in names[name]},
                learning,
            )
            self.write(
                name,
                budget,
                seed,
                to_json(report),
                time.perf_counter() - started,
                train_seconds,
            )

    @staticmethod
    def noted(now: list[Any], way: str, apply: Any) -> Any:
        """`apply` that notes which share of the update, along which way, the model carries."""

        def applied(share: float) -> None:
            now[0] = (way, share)
            apply(share)

        return applied

    def reload(self) -> Any:
        """The base model measured, then the last run's adapter on it."""
        from peft import PeftModel

        from forgetless.budget.baseline import measure_baseline
        from forgetless.budget.learning import domain
        from forgetless.data.documents import load_documents
        from forgetless.data.domain import encode_rows, load_training_data
        from forgetless.model.loading import load_model, load_tokenizer
        from forgetless.model.update import Update

        options = ModelOptions(model=self.model, dtype="float32")
        model, tokenizer = load_model(options), load_tokenizer(options)
        baseline = measure_baseline(
            model, tokenizer, load_documents(self.general), parse("1%"), pieces=1
        )
        learning = domain(
            model, encode_rows(load_training_data(self.held, split="test"), tokenizer), self.held
        )
        model = PeftModel.from_pretrained(
            model, str(self.out / "last" / self.domain / "final"), is_trainable=True
        ).eval()
        return model, baseline, learning, Update(model)

    def write(
        self,
        method: str,
        budget: str,
        seed: int,
        report: dict[str, Any],
        seconds: float,
        train_seconds: float | None,
    ) -> None:
        result = {
            "domain": self.domain,
            "method": method,
            "budget": budget,
            "seed": seed,
            "steps": self.steps,
            "seconds": seconds,
            "train_seconds": train_seconds,
            **{key: report[key] for key in KEPT if key in report},
            "environment": to_json(environment("cpu")),
        }
        write_json(self.place(method, budget, seed), result)


@contextlib.contextmanager
def every_step() -> Iterator[list[list[torch.Tensor]]]:
    """What is trained, after each optimizer step that is taken meanwhile."""
    taken: list[list[torch.Tensor]] = []
    note = lambda optimizer, *_: taken.append(
        [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    )
    handle = register_optimizer_step_post_hook(note)
    try:
        yield taken
    finally:
        handle.remove()


def stopped(
    model: torch.nn.Module, steps: Sequence[Sequence[torch.Tensor]]
) -> Callable[[float], None]:
    """A function: share -> the model as it was after that share of the steps, 0 for the base.

    `model` carries the last one.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(torch.equal(p, last) for p, last in zip(trained, steps[-1], strict=True)), (
        "the model that was loaded is not the one that was trained"
    )

    @torch.no_grad()
    def apply(share: float) -> None:
        step = max(1, round(share * len(steps)))
        for p, then in zip(trained, steps[step - 1], strict=True):
            p.copy_(then if share else torch.zeros_like(p))

    return apply


@dataclasses.dataclass(frozen=True)
class Remembered(PairedText):
    """A part that measures each fraction of the update once: four budgets scan the same ones."""

    now: list[Any] = dataclasses.field(default_factory=list)  # (way, share) that the model carries
    known: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def losses(self, model: Any) -> Any:
        if self.now[0] not in self.known:
            self.known[self.now[0]] = super().losses(model)
        return self.known[self.now[0]]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def few(path: Path, rows: list[dict[str, Any]]) -> str:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


if __name__ == "__main__":
    main()
