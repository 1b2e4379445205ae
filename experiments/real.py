"""What fine-tuning costs a real chat model, by every way of holding it, measured on what it would
say anyway.

    make lab                                    # SmolLM2-135M-Instruct, into lab/smollm2
    # Hours; finished runs are not made again.
    python experiments/real.py ../shared lab/smollm2 out/real
    python experiments/real.py ../shared lab/smollm2 out/real --arms plain kl-1-2 --seeds 0
    python experiments/real.py ../shared lab/smollm2 out/real --arms plain --judge plain --seeds 0
    # What is there so far.
    python experiments/real.py ../shared lab/smollm2 out/real --table

Protocol: 50 steps of 8 chats of at most 192 tokens of medical questions, LoRA of rank 8 on all
linear layers, rate 1e-3, seeds 0, 1, 2. Learning is the fall of the loss on 60 held-out chats.
Forgetting is the divergence from the base on its own answers to 64 prompts that nothing was
recorded on, held to or chosen by. With --judge come the loss on held-out web text, behaviours and
tasks. The weights are
those of a file in 4 bit (Q4_1), brought to bf16.

    plain            no holding; and its update scaled by 0.75, 0.5, 0.25
    hold-web         the pull, importance recorded on web text: what 0.1.0 did by default
    hold-S           the pull at strength S, importance recorded on the base's own answers
    kl-W-N           divergence on self-sampled chats at weight W, N of them beside 8 rows
    kept-W-N         the same by what the importance file keeps of the base: no pass of the base
    both-S-W-N       the pull and kept answers together
    ...-rR           the same at R times the rate
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetless.evaluate.evaluate import evaluate
from forgetless.files.atomic import read_json, write_text
from forgetless.files.behaviours_json import BehaviourChange, Conversation, KindDivergence
from forgetless.files.measured_json import Interval, ScoreChange
from forgetless.files.run_json import Environment, Run
from forgetless.files.schema import read_record, write_record
from forgetless.options.finished import EvalOptions
from forgetless.options.record import RecordOptions
from forgetless.options.tune import TuneOptions
from forgetless.options.verbs import resolve
from forgetless.record.record import record
from forgetless.tune.tune import tune

Options = dict[str, Any]
SEEDS = (0, 1, 2)
TRAINING: Options = dict(
    max_steps=50,
    batch_size=8,
    accumulation=1,
    length=192,
    learning_rate=1e-3,
    log_steps=10,
    save_steps=1000,
    overwrite=True,
)
SCALES = (0.75, 0.5, 0.25)
# Rates of the held arms, relative to that of TRAINING: what holds well may be trained faster.
RATES = (2, 4)
# Prompts that behaviours are judged on, and questions of each task, for --judge.
JUDGED_PROMPTS, JUDGED_QUESTIONS = 100, 200
TASKS = ("arc_easy", "winogrande")
# Chats that are recorded on, kept and replayed: as many as the table of 2026-11-27 had.
ANSWERS = 64


def arms() -> dict[str, Options]:
    """Name -> what differs from plain. `importance` names a recording."""
    rows: dict[str, Options] = {
        "plain": dict(method="plain"),
        "hold-web": dict(method="hold", importance="web"),
    }
    for strength in (10, 30, 100, 300):
        rows[f"hold-{strength}"] = dict(method="hold", importance="chat", strength=float(strength))
    for weight in (1, 3, 10, 30):
        for sequences in (1, 2, 4):
            kl = dict(kl_weight=float(weight), kl_sequences=sequences)
            rows[f"kl-{weight}-{sequences}"] = dict(
                method="kl", replay="chat", replay_documents=ANSWERS, **kl
            )
            kept = dict(replay="kept", importance="chat", **kl)
            rows[f"kept-{weight}-{sequences}"] = dict(method="kl", **kept)
            for strength in (30, 100):
                rows[f"both-{strength}-{weight}-{sequences}"] = dict(
                    method="hold,kl", strength=float(strength), **kept
                )
    faster = {
        f"{name}-r{times}": {**row, "learning_rate": times * TRAINING["learning_rate"]}
        for name, row in rows.items()
        for times in RATES
        if name.startswith(("kept", "both"))
    }
    return {**rows, **faster}


# What is run where --arms says nothing: the rows of the table.
FIRST = (
    *("plain", "hold-web", "hold-10", "hold-30", "hold-300", "kl-1-1", "kl-1-2", "kl-1-4"),
    *("kl-3-2", "kl-10-2", "kl-30-2", "kept-1-2", "kept-3-2", "both-30-1-2", "both-30-3-2"),
)


class Campaign:
    """The runs of one model, in one folder."""

    def __init__(self, given: argparse.Namespace):
        self.shared, self.model, self.out = given.shared, given.model, given.out
        self.rows, self.steps, self.answers = given.rows, given.steps, given.answers
        self.dtype, self.tasks = given.dtype, given.tasks

    def recording(self, name: str) -> str:
        """The importance file recorded on web text or on the model's own chats."""
        path = self.out / f"{name}.safetensors"
        if not path.exists():
            given = {"model": self.model, "out": str(path), "answers": self.answers}
            given |= {"dtype": self.dtype}
            if name == "web":
                given |= {"general": str(self.shared / "data/general/train.jsonl")}
                given |= {"documents": 64, "length": 256}
            else:
                given |= {"general": "chat", "keep_answers": self.answers}
            record(resolve(RecordOptions, given))
        return str(path)

    def run(self, arm: str, seed: int) -> Run:
        """One training with all that is measured of it, made where it is missing."""
        folder = self.out / f"{arm}-{seed}"
        if not (folder / "run.json").exists():
            given = {**TRAINING, "max_steps": self.steps, **arms()[arm]}
            if "importance" in given:
                given["importance"] = self.recording(given["importance"])
            data = self.shared / "data"
            given |= {
                "model": self.model,
                "dtype": self.dtype,
                "data": str(data / "chat/medical-train.jsonl"),
                "eval_data": str(data / "chat/medical-test.jsonl"),
                "general": "chat",
                "answers": self.answers,
                "limit": self.rows,
                "seed": seed,
                "out": str(folder),
            }
            tune(resolve(TuneOptions, given))
        return read_record(folder / "run.json", Run)

    def scaled(self, seed: int, scale: float) -> Run:
        """The plain update times a number."""
        folder = self.out / f"plain-{seed}-x{scale:g}"
        if not (folder / "run.json").exists():
            self.run("plain", seed)
            plain = self.out / f"plain-{seed}"
            asked = read_json(plain / "run.json")["configuration"]
            options = EvalOptions(
                model=self.model,
                dtype=self.dtype,
                adapter=str(plain / "final"),
                scale=scale,
                general=asked["general"],
                data=asked["eval_data"],
                answers=self.answers,
                limit=self.rows,
                out=str(folder),
            )
            evaluate(options)
        return read_record(folder / "run.json", Run)

    def judged(self, arm: str, seed: int) -> Run:
        """Behaviours of a trained arm beside those of the bare base; with tasks also those, and the
        loss on web text, which together take an hour on one core.
        """
        folder = self.out / f"{arm}-{seed}-judged"
        if not (folder / "run.json").exists():
            self.run(arm, seed)
            web = f",{self.shared / 'data/general/test.jsonl'}" if self.tasks else ""
            options = EvalOptions(
                model=self.model,
                dtype=self.dtype,
                adapter=str(self.out / f"{arm}-{seed}" / "final"),
                general=f"chat{web}",
                # By the form of its answers it is judged whether others have taken it on.
                data=str(self.shared / "data/chat/medical-test.jsonl"),
                answers=self.answers,
                behaviours=JUDGED_PROMPTS,
                tasks=",".join(
                    f"{task}={self.shared / 'data/abilities' / task}.jsonl" for task in self.tasks
                )
                or None,
                limit=JUDGED_QUESTIONS,
                out=str(folder),
            )
            evaluate(options)
        return read_record(folder / "run.json", Run)


@dataclass(frozen=True)
class Result:
    """What the page needs of one run, in nats per token; kept beside the page."""

    arm: str
    seed: int
    learning: Interval | None
    divergence: Interval | None
    web_text: Interval | None
    by_kind: list[KindDivergence] | None
    seconds: float | None
    behaviours: list[BehaviourChange] | None
    tasks: dict[str, ScoreChange] | None
    conversations: list[Conversation] | None
    environment: Environment | None


@dataclass(frozen=True)
class Results:
    """All runs that are there."""

    runs: list[Result]


def collected(out: Path) -> Results:
    """The results of every run below a folder, in the order of the arms."""
    runs = []
    for name in _labels():
        for seed in SEEDS:
            file = out / name.replace("SEED", str(seed)) / "run.json"
            if file.exists():
                arm = name.replace("-SEED", "").replace("-x", " x ")
                runs.append(_result(arm, seed, file))
    return Results(runs)


def _labels() -> list[str]:
    """The folders of all arms, with SEED for the seed, the scaled ones after plain."""
    names = []
    for arm in arms():
        names.append(f"{arm}-SEED")
        if arm == "plain":
            names += [f"plain-SEED-x{scale:g}" for scale in SCALES]
    return names


def _result(arm: str, seed: int, file: Path) -> Result:
    run = read_record(file, Run)
    behaviours, conversations, tasks, web_text = None, None, None, run.general
    judged = file.parent.with_name(f"{file.parent.name}-judged") / "run.json"
    if judged.exists():
        found = read_record(judged, Run)
        behaviours, conversations = found.behaviours, found.conversations
        tasks, web_text = _task_changes(found), found.general
    seconds = None
    if run.train_seconds is not None:
        seconds = run.train_seconds + (run.prepare_seconds or 0)
    return Result(
        arm=arm,
        seed=seed,
        learning=run.learning,
        divergence=run.forgetting,
        web_text=web_text,
        by_kind=run.divergence_by_kind,
        seconds=seconds,
        behaviours=behaviours,
        tasks=tasks,
        conversations=conversations,
        environment=run.environment,
    )


def _task_changes(run: Run) -> dict[str, ScoreChange]:
    """Task and metric -> how its accuracy changed."""
    rows = {}
    for task, scores in (run.after.tasks if run.after else {}).items():
        for metric, change in ((scores and scores.changes) or {}).items():
            rows[f"{task} {metric}"] = change
    return rows


def table(results: Results) -> str:
    """What is there so far, as markdown: the mean over seeds, and the standard error over them
    where there are several.
    """
    lines = [
        "| | learning | divergence on own answers | loss on web text | seconds | seeds |",
        "|---|---|---|---|---|---|",
    ]
    by_arm: dict[str, list[Result]] = {}
    for run in results.runs:
        by_arm.setdefault(run.arm, []).append(run)
    for arm, runs in by_arm.items():
        seconds = [run.seconds for run in runs if run.seconds is not None]
        cells = [
            arm,
            _mean([_nats(run.learning) for run in runs], ".3f"),
            _mean([_nats(run.divergence) for run in runs], ".4f"),
            _mean([_nats(run.web_text) for run in runs if run.web_text], "+.4f"),
            _mean(seconds, ".0f"),
            str(len(runs)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _nats(interval: Interval | None) -> float:
    assert interval is not None and interval.nats is not None
    return interval.nats


def _mean(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    mean = format(statistics.mean(values), form)
    if len(values) < 2:
        return mean
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{mean} ± {format(error, form.lstrip('+'))}"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("shared", type=Path)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--arms", nargs="+", choices=list(arms()), default=list(FIRST))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--rows", type=int, default=60, help="documents and rows to measure on")
    parser.add_argument("--steps", type=int, default=TRAINING["max_steps"])
    parser.add_argument("--answers", type=int, default=ANSWERS, help="of each part")
    # Processors without bf16 arithmetic are six times faster in float32.
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--judge", nargs="*", default=[], help="arms whose behaviour is judged")
    parser.add_argument("--tasks", nargs="*", default=TASKS, help="of --judge; none: behaviours")
    parser.add_argument("--table", action="store_true", help="run nothing")
    given = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    campaign = Campaign(given)
    if not given.table:
        for seed in given.seeds:
            for arm in given.arms:
                campaign.run(arm, seed)
                for scale in SCALES if arm == "plain" else ():
                    campaign.scaled(seed, scale)
        for arm in given.judge:
            for seed in given.seeds:
                campaign.judged(arm, seed)
    results = collected(given.out)
    print(table(results))
    write_record(given.out / "results.json", results)
    write_text(given.out / "table.md", table(results))


if __name__ == "__main__":
    main()
