"""forgetless demo: the whole method on a model and a world that come with the package.

Record what matters on text about the world, teach the model a herbal of new facts twice from the
same start, plainly and with forgetless, and measure what it still knows: accuracy on questions
about the world, loss on text about it in phrasings that it never saw.

Plain fine-tuning gets the learning rate at which it learns the herbal best. Two more rivals cost no
method at all and are shown with it: plain at a smaller learning rate, and the plain update scaled
back to the domain accuracy of forgetless, or to its own best where it never gets there. Everything
is written under `--out`: texts and questions as JSON lines, the importance file, the adapters,
demo.json, demo.md (the table), demo.png, and the report: compare.json and report.html.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from forgetless.data.documents import Document
from forgetless.data.tasks import Task
from forgetless.demo import summary
from forgetless.demo.world import build, documents, multiple_choice
from forgetless.evaluate.accuracy import answers
from forgetless.evaluate.losses import TextLoss, general_loss
from forgetless.files.atomic import atomic_path, write_json
from forgetless.files.provenance import environment
from forgetless.files.room import check_output_folder
from forgetless.model.loading import load_model, load_tokenizer
from forgetless.model.update import AdapterUpdate
from forgetless.options.compare import DemoOptions
from forgetless.options.model import ModelOptions
from forgetless.options.record import RECORD_PRESETS, RecordOptions
from forgetless.options.tune import TUNE_PRESETS, TuneOptions
from forgetless.options.verbs import resolve
from forgetless.record.record import record
from forgetless.report.contents import completed
from forgetless.report.page import write_report
from forgetless.tune.tune import tune

logger = logging.getLogger("forgetless")
MODEL = Path(__file__).parent / "model"
QUESTIONS = Task(
    name="questions",
    hub="",
    held_out="",
    columns=("prompt", "choices", "gold"),
    prompt=lambda row: row["prompt"],
    choices=lambda row: row["choices"],
    gold=lambda row: row["gold"],
)
RATES = (2e-3, 4e-3, 8e-3)  # plain fine-tuning tries each
SMALLER = 0.25  # times the rate that learns best
Losses = dict[str, TextLoss]  # "general" and "domain"
SCALES = tuple(round(0.05 * i, 2) for i in range(1, 21))
TRAINING = dict(
    max_steps=150,
    batch_size=16,
    accumulation=1,
    length=128,
    dtype="float32",
    log_steps=10,
    overwrite=True,
)
PROMPTS, WORDS = 3, 14  # samples: questions of each kind, tokens of an answer
METHODS = ("base", "plain", "plain, smaller rate", "plain, scaled back", "hold")


@dataclass(frozen=True)
class Score:
    """What one state of the model knows.

    Losses in nats per token, accuracies as shares, seconds of training.
    """

    general_accuracy: float
    general_loss: float
    domain_accuracy: float
    domain_loss: float
    seconds: float | None = None
    setting: str = ""


@dataclass(frozen=True)
class Trained:
    """One training: where its adapter is, what tune() returned, its score, and its losses by the
    scale of its update (1: whole).
    """

    folder: Path
    run: Mapping[str, Any]
    score: Score
    losses: dict[float, Losses]


def demo(options: DemoOptions) -> dict[str, Any]:
    """Run the demo for each seed, print the table, write everything under `options.out`.

    Raises ValueError for a folder that is not the demo's.
    """
    out = Path(options.out)
    if out.is_dir() and any(out.iterdir()) and not (out / "general.jsonl").is_file():
        raise ValueError(f"'{out}' is not empty and holds no demo; give another --out")
    check_output_folder(out)
    started = time.perf_counter()
    exam = Exam(write_texts(out))
    importance, record_seconds = record_importance(out)
    seeds = [one_seed(exam, out, importance, seed) for seed in range(options.seeds)]
    runs, trained = [scores for scores, _ in seeds], [trainings for _, trainings in seeds]
    file: dict[str, Any] = {
        "path": str(importance),
        "mib": importance.stat().st_size / 2**20,
        "record_seconds": record_seconds,
    }
    seconds = time.perf_counter() - started
    result = {
        "environment": environment("cpu"),
        "importance": file,
        "seconds": seconds,
        "seeds": [{name: asdict(score) for name, score in run.items()} for run in runs],
    }
    write_json(out / "demo.json", result)
    shown = table(runs)
    with atomic_path(out / "demo.md") as temporary:
        temporary.write_text(shown + "\n", encoding="utf-8")
    compared = summary.comparison(
        exam.before, trained, samples(exam, trained[0]), importance, result
    )
    write_json(out / "compare.json", compared)
    print(shown)
    print(
        closing(
            out,
            file,
            seconds,
            plot(runs, out / "demo.png"),
            write_report(completed(compared), out / "report.html"),
        )
    )
    return result


def accuracy(model: nn.Module, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    """Share of multiple-choice questions whose right choice is the likeliest per byte."""
    return float(answers(model, tokenizer, QUESTIONS, rows)["acc_norm"])


def write_texts(out: Path) -> dict[str, Path]:
    """The demo's texts and questions as JSON lines, so that every step can be repeated with the
    other verbs.
    """
    world = build()
    contents: dict[str, list[dict[str, Any]]] = {
        "general": [{"text": text} for text in documents(world.general, 101, 600)],
        "general-test": [
            {"text": text} for text in documents(world.general, 102, 150, held_out=True)
        ],
        "general-questions": multiple_choice(world.general),
        "domain": [{"text": text} for text in documents(world.domain, 201, 600)],
        "domain-test": [
            {"text": text} for text in documents(world.domain, 202, 100, held_out=True)
        ],
        "domain-questions": multiple_choice(world.domain),
    }
    paths = {name: out / f"{name}.jsonl" for name in contents}
    for name, rows in contents.items():
        with atomic_path(paths[name]) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


class Exam:
    """What the demo asks of a model, and the base model's own score."""

    def __init__(self, paths: dict[str, Path]):
        self.rows = {
            name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            for name, path in paths.items()
        }
        self.paths = paths
        self.loading = ModelOptions(model=str(MODEL), dtype="float32", device="cpu")
        self.tokenizer = load_tokenizer(self.loading)
        self.model = load_model(self.loading)
        self.before = self.losses(self.model)
        self.base = self.score(self.model, self.before)

    def losses(self, model: nn.Module) -> Losses:
        """Loss on general and on domain text in phrasings that no training text has."""
        text = lambda name: general_loss(
            model, self.tokenizer, [Document(row["text"], None, name) for row in self.rows[name]]
        )
        return {"general": text("general-test"), "domain": text("domain-test")}

    def score(
        self, model: nn.Module, losses: Losses, seconds: float | None = None, setting: str = ""
    ) -> Score:
        return Score(
            accuracy(model, self.tokenizer, self.rows["general-questions"]),
            losses["general"].nats,
            accuracy(model, self.tokenizer, self.rows["domain-questions"]),
            losses["domain"].nats,
            seconds,
            setting,
        )

    def says(self, model: Any, prompt: str) -> str:
        """The likeliest continuation of a prompt, up to the end of its sentence."""
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=WORDS,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        text = self.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
        return text.partition(".")[0] + "." if "." in text else text

    def adapted(self, adapter: Path) -> nn.Module:
        from peft import PeftModel

        return PeftModel.from_pretrained(load_model(self.loading), str(adapter))

    def at_scales(self, adapter: Path) -> dict[float, Losses]:
        """Losses with the adapter's update times each of the report's scales."""
        model, found = self.adapted(adapter), {}
        update = AdapterUpdate(model)
        for scale in summary.SCALES:
            update.scale(scale)
            found[scale] = self.losses(model)
        return found

    def scaled(self, adapter: Path, domain_accuracy: float) -> Score:
        """The adapter's update times the smallest of SCALES that reaches the domain accuracy or,
        where none does, the best of them all.
        """
        model, accuracies = self.adapted(adapter), []
        update = AdapterUpdate(model)
        for scale in SCALES:
            update.scale(scale)
            accuracies.append(accuracy(model, self.tokenizer, self.rows["domain-questions"]))
        best = max(accuracies)
        chosen = SCALES[
            next(i for i, found in enumerate(accuracies) if found >= min(domain_accuracy, best))
        ]
        update.scale(chosen)
        return self.score(
            model,
            self.losses(model),
            None,
            f"update x {chosen:g}" + ("" if best >= domain_accuracy else ", its best"),
        )


def record_importance(out: Path) -> tuple[Path, float]:
    """The importance file of the demo's model, recorded by the default recipe, and the seconds it
    took.
    """
    path, started = out / "importance.safetensors", time.perf_counter()
    given = dict(
        model=str(MODEL),
        general=str(out / "general.jsonl"),
        out=str(path),
        dtype="float32",
        device="cpu",
        length=128,
    )
    record(resolve(RecordOptions, given, RECORD_PRESETS))
    return path, time.perf_counter() - started


def one_seed(
    exam: Exam, out: Path, importance: Path, seed: int
) -> tuple[dict[str, Score], dict[str, list[Trained]]]:
    """Every row of the table for one seed, and what was trained for it: plain at each rate, the
    best first, and forgetless.
    """

    def trained(name: str, rate: float, **held: Any) -> Trained:
        folder = out / f"{name}-{seed}"
        given = {
            **TRAINING,
            "model": str(MODEL),
            "data": str(exam.paths["domain"]),
            "out": str(folder),
            "device": "cpu",
            "seed": seed,
            "learning_rate": rate,
        }
        run = tune(resolve(TuneOptions, {**given, **held}, TUNE_PRESETS))
        model = exam.adapted(folder / "final")
        losses = exam.losses(model)
        return Trained(
            folder / "final",
            run,
            exam.score(model, losses, run["train_seconds"], f"rate {rate:g}"),
            {1.0: losses},
        )

    plain = {rate: trained(f"plain-{rate:g}", rate) for rate in RATES}
    rate = min(plain, key=lambda tried: plain[tried].score.domain_loss)
    small = rate * SMALLER
    smaller = plain[small] if small in plain else trained("smaller", small)
    held = trained("hold", rate, importance=str(importance))
    for one in (plain[rate], held):
        one.losses.update(exam.at_scales(one.folder))
    scores = {
        "base": exam.base,
        "plain": plain[rate].score,
        "plain, smaller rate": smaller.score,
        "plain, scaled back": exam.scaled(plain[rate].folder, held.score.domain_accuracy),
        "hold": held.score,
    }
    others = [
        one
        for one in {id(one): one for one in (smaller, *plain.values())}.values()
        if one is not plain[rate]
    ]
    return scores, {"plain": [plain[rate], *others], "hold": [held]}


def samples(exam: Exam, trained: Mapping[str, list[Trained]]) -> list[dict[str, Any]]:
    """What the base model and the two tuned ones answer to a few questions of the domain and of the
    world.
    """
    models = {
        "base": exam.model,
        **{name: exam.adapted(trainings[0].folder) for name, trainings in trained.items()},
    }
    asked = [
        (kind, row)
        for kind in ("domain", "general")
        for row in exam.rows[f"{kind}-questions"][:PROMPTS]
    ]
    return [
        {
            "domain": "herbal: new" if kind == "domain" else "world: known before",
            "prompt": row["prompt"],
            "reference": row["choices"][row["gold"]],
            "outputs": {name: exam.says(model, row["prompt"]) for name, model in models.items()},
        }
        for kind, row in asked
    ]


def table(runs: list[dict[str, Score]]) -> str:
    """A markdown table, mean over seeds ± standard error where there are several."""
    head = (
        "",
        "general accuracy",
        "general loss",
        "domain accuracy",
        "domain loss",
        "seconds",
        "setting",
    )
    rows = [head]
    for name in METHODS:
        scores = [run[name] for run in runs]
        settings = sorted({score.setting for score in scores})
        rows.append(
            (
                name,
                cell([s.general_accuracy for s in scores], "%"),
                cell([s.general_loss for s in scores]),
                cell([s.domain_accuracy for s in scores], "%"),
                cell([s.domain_loss for s in scores]),
                cell([s.seconds for s in scores], "s"),
                "; ".join(settings),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join(
        [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
    )


def cell(values: list[float | None], unit: str = "") -> str:
    """Mean ± standard error; '-' where there is no number."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    show = {"%": "{:.1%}", "s": "{:.0f}"}.get(unit, "{:.3f}").format
    error = (
        f" ± {show(statistics.stdev(known) / len(known) ** 0.5)}"
        if len(known) > 1 and unit != "s"
        else ""
    )
    return show(statistics.mean(known)) + error


def closing(
    out: Path, file: dict[str, Any], seconds: float, picture: Path | None, report: Path
) -> str:
    """What was written, and the same three steps for the user's own model and data."""
    lines = [
        "",
        f"general: {len(multiple_choice(build().general))} questions about the world that the "
        "model was trained on; domain: a herbal of new facts. "
        "Losses in nats per token, on phrasings that no training text has.",
        f"importance file: {file['mib']:.2f} MiB, recorded in {file['record_seconds']:.0f} s; "
        f"all of the demo took {seconds:.0f} s",
        f"written to {out}/: demo.json, demo.md"
        + (f", {picture.name}" if picture else " (pip install 'forgetless[plot]' for a picture)"),
        f"the report, to open in a browser: {report}",
        "",
        "With your own model and data:",
        "  forgetless record MODEL --general general.jsonl --out model.importance.safetensors",
        "  forgetless tune MODEL --data domain.jsonl --importance model.importance.safetensors "
        "--out run --general held-out.jsonl",
    ]
    return "\n".join(lines)


def plot(runs: list[dict[str, Score]], path: Path) -> Path | None:
    """Bars of general and domain accuracy and of general loss, one group per row of the table.

    None where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = (
        ("general accuracy: what it still knows", "general_accuracy"),
        ("domain accuracy: what it learned", "domain_accuracy"),
        ("general loss (nats per token)", "general_loss"),
    )
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained", sharey=True)
    colours = ["#9aa5b1", "#d1495b", "#e8a87c", "#edae49", "#2e86ab"]
    for axis, (title, field) in zip(axes, panels, strict=True):
        values = [statistics.mean(getattr(run[name], field) for run in runs) for name in METHODS]
        bars = axis.barh(METHODS, values, color=colours)
        axis.bar_label(
            bars, [f"{v:.2f}" if field == "general_loss" else f"{v:.0%}" for v in values], padding=3
        )
        axis.set_title(title, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
    axes[0].invert_yaxis()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    pyplot.close(figure)
    return path
