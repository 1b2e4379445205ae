"""The whole method on the lab model: plain fine-tuning, its scaled variants, the paper preset over strengths, and the default recipe.

    python experiments/whole_method.py ../shared out/whole_method           # hours on two cores; finished runs are not run again
    python experiments/whole_method.py ../shared out/whole_method --table   # what is there so far, as markdown

Protocol: 120 steps of 16 sequences of 128 tokens; settings are chosen on parts of the train files (every fifth domain row; general documents that were
not recorded on) with seed 0; the test files are used at the chosen points with seeds 1, 2, 3. sciq is learned as question -> answer (loss on the
answer), medmcqa as running text of question, right answer and explanation.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from holdfast.config import RECORD_PRESETS, TUNE_PRESETS, ModelOptions, RecordOptions, TuneOptions, resolve
from holdfast.runs import read_json, write_json

SCALES = (0.25, 0.5, 0.75)
PLAIN_RATES = (4e-4, 1e-3, 2e-3, 4e-3)
PAPER_STRENGTHS = (1e-3, 1e-1, 1e1, 1e3, 1e5)
DEFAULT_STRENGTHS = (1e-2, 1e-1, 1.0, 1e1, 1e2)
STEPS = dict(max_steps=120, batch_size=16, accumulation=1, length=128, dtype="float32", log_steps=20, save_steps=1000, overwrite=True, limit=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        print(table(given.out))
        return
    model = str(given.shared / "models/lab-english-5m")
    data = prepare(given.shared / "data", given.out / "data")
    record_all(model, data, given.out)
    for domain in ("medmcqa", "sciq"):
        explore(model, data, given.out, domain)
    for domain in ("medmcqa", "sciq"):
        confirm(model, data, given.out, domain)


def prepare(source: Path, target: Path) -> dict[str, str]:
    """Carve train and validation parts; returns name -> specification for `tune`."""
    target.mkdir(parents=True, exist_ok=True)
    rows = lambda name: [json.loads(line) for line in (source / name).read_text().splitlines()]
    paths = {}

    def write(name: str, part: list[dict[str, Any]]) -> None:
        (target / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        paths[name] = str(target / f"{name}.jsonl")

    general = rows("general/train.jsonl")
    write("general_record", [row for i, row in enumerate(general) if i % 5])
    write("general_validation", [row for i, row in enumerate(general) if i % 5 == 0])
    write("general_test", rows("general/test.jsonl"))
    for domain, shape in (("medmcqa", as_text), ("sciq", dict)):
        train = [shape(row) for row in rows(f"{domain}/train.jsonl")]
        write(f"{domain}_train", [row for i, row in enumerate(train) if i % 5])
        write(f"{domain}_validation", [row for i, row in enumerate(train) if i % 5 == 0])
        write(f"{domain}_test", [shape(row) for row in rows(f"{domain}/test.jsonl")])
    return {name: f"sciq={path}" if name.startswith("sciq") else path for name, path in paths.items()}


def as_text(row: dict[str, Any]) -> dict[str, str]:
    answer = row[("opa", "opb", "opc", "opd")[row["cop"]]]
    return {"text": f"{row['question']} {answer}. {row['exp'] or ''}".strip()}


def record_all(model: str, data: dict[str, str], out: Path) -> None:
    """The default file, and the paper's with its lengths cut to the lab's protocol (300 steps of 2,048 tokens in 5 epochs)."""
    from holdfast.recording import record

    common = dict(model=model, general=data["general_record"], dtype="float32", length=128)
    for name, settings in (
        ("default", dict(preset="default", documents=300, batch_size=16, accumulation=1, max_steps=120)),
        ("paper", dict(preset="paper", documents=120, batch_size=16, accumulation=1, max_steps=300)),
    ):
        if not (out / f"{name}.safetensors").exists():
            record(resolve(RecordOptions, {**common, **settings, "out": str(out / f"{name}.safetensors")}, RECORD_PRESETS))


def settings_of(method: str, value: float, out: Path) -> dict[str, Any]:
    if method == "plain":
        return dict(learning_rate=value)
    if method == "paper":
        return dict(preset="paper", importance=str(out / "paper.safetensors"), strength=value)
    return dict(importance=str(out / "default.safetensors"), strength=value)


def explore(model: str, data: dict[str, str], out: Path, domain: str) -> None:
    for method, values in (("plain", PLAIN_RATES), ("paper", PAPER_STRENGTHS), ("default", DEFAULT_STRENGTHS)):
        for value in values:
            run(model, data, out, domain, method, value, "validation", 0)


def confirm(model: str, data: dict[str, str], out: Path, domain: str) -> None:
    """Fresh seeds on the test files: plain at the rate that learns best, the paper's own strength and its best, the default at its best."""
    best = lambda method, values: max(values, key=lambda value: trade(read_json(place(out, domain, method, value, "validation", 0)), 0.9 * top(out, domain)))
    chosen = [("plain", max(PLAIN_RATES, key=lambda rate: learned(read_json(place(out, domain, "plain", rate, "validation", 0)))))]
    chosen += [("paper", 1e-3), ("paper", best("paper", PAPER_STRENGTHS[1:])), ("default", best("default", DEFAULT_STRENGTHS))]
    for method, value in chosen:
        for seed in (1, 2, 3):
            run(model, data, out, domain, method, value, "test", seed)


def learned(result: dict[str, Any], scale: str = "1.0") -> float:
    return float(result["scales"][scale]["learning"]["nats"])


def top(out: Path, domain: str) -> float:
    return max(learned(read_json(place(out, domain, "plain", rate, "validation", 0))) for rate in PLAIN_RATES)


def trade(result: dict[str, Any], wanted: float) -> float:
    """Minus the forgetting where the wanted learning is reached; far below where it is not."""
    point = result["scales"]["1.0"]
    return -float(point["forgetting"]["nats"]) if point["learning"]["nats"] >= wanted else -1e3 + float(point["learning"]["nats"])


def place(out: Path, domain: str, method: str, value: float, part: str, seed: int) -> Path:
    return out / "results" / f"{domain}-{method}-{value:g}-{part}-{seed}.json"


def run(model: str, data: dict[str, str], out: Path, domain: str, method: str, value: float, part: str, seed: int) -> None:
    """One training run, evaluated at full size and scaled; skipped when its result exists."""
    from peft import PeftModel

    from holdfast.evaluation import changes, measure
    from holdfast.models import load_model, load_tokenizer
    from holdfast.training import tune
    from holdfast.weights import scale_update

    target = place(out, domain, method, value, part, seed)
    if target.exists():
        return
    folder = out / "last"
    held = dict(general=data[f"general_{part}"], eval_data=data[f"{domain}_{part}"])
    rate = {} if method == "plain" or method == "paper" else {"learning_rate": 2e-3}
    options = {**STEPS, **rate, **settings_of(method, value, out), **held, "model": model, "data": data[f"{domain}_train"], "out": str(folder), "seed": seed}
    finished = tune(resolve(TuneOptions, options, TUNE_PRESETS))
    scales = {"1.0": {**changes(finished["before"], finished["after"])}}
    loading = ModelOptions(model=model, dtype="float32")
    for scale in SCALES:
        adapted = PeftModel.from_pretrained(load_model(loading), str(folder / "final"))
        scale_update(adapted, scale)
        after = measure(adapted, load_tokenizer(loading), general=held["general"], data=held["eval_data"], limit=STEPS["limit"])
        scales[str(scale)] = changes(finished["before"], after)
    before = {key: finished["before"][key]["nats"] for key in ("general", "domain")}
    write_json(target, {"domain": domain, "method": method, "value": value, "part": part, "seed": seed, "before": before, "scales": scales,
                        "energy": finished["energy"], "train_seconds": finished["train_seconds"], "environment": finished["environment"]})  # fmt: skip


def table(out: Path) -> str:
    """Every point, mean over seeds, as learning and forgetting in nats per token (standard error: over seeds, or over documents for one seed)."""
    groups: dict[tuple[str, str, str, float, str], list[dict[str, Any]]] = {}
    for path in sorted((out / "results").glob("*.json")):
        result = read_json(path)
        for scale, point in result["scales"].items():
            groups.setdefault((result["part"], result["domain"], result["method"], result["value"], scale), []).append(point)
    lines = ["| part | domain | method | setting | scale | learning | forgetting | seeds |", "|---|---|---|---|---|---|---|---|"]
    for (part, domain, method, value, scale), points in sorted(groups.items()):
        cells = [mean_and_error([point[key] for point in points]) for key in ("learning", "forgetting")]
        lines.append(f"| {part} | {domain} | {method} | {value:g} | {scale} | {cells[0]} | {cells[1]} | {len(points)} |")
    return "\n".join(lines)


def mean_and_error(values: list[dict[str, float]]) -> str:
    nats = [value["nats"] for value in values]
    error = statistics.stdev(nats) / len(nats) ** 0.5 if len(nats) > 1 else values[0]["standard_error"]
    return f"{statistics.mean(nats):.3f} ± {error:.3f}"


if __name__ == "__main__":
    main()
