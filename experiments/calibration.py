"""Does a calibration made while recording predict what fine-tuning on other data costs?

Asked of every estimator, with and without the first-order term.

    python experiments/calibration.py ../shared out/calibration \\
        --updates lab-english-5m tinystories-char-1m
    python experiments/calibration.py ../shared out/calibration --runs sciq medmcqa piqa
    # Writes calibration.json and calibration.md from what is there.
    python experiments/calibration.py ../shared out/calibration --page

Every estimator is calibrated on the same nine updates, those of `forgetless record --calibrate`
(record/updates.py), which Kronecker importance of rank 64 holds. They are tested on runs of 60
steps (as in budget.py) on sciq, medmcqa and piqa: plain, at a small rate, at five strengths, with
KL; three seeds each. Rises are those of all held-out documents. For each budget the update is
scaled to where its bound meets the budget, and what it really costs there is read off its measured
curve (interpolated between five sizes). Nothing of the tested domains was seen by a calibration."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from budget import BUDGETS, RECORDING, SEEDS, STEPS, Lab
from prediction import updates
from safetensors.torch import load_file, save_file

from forgetless.budget.budget import parse
from forgetless.evaluate.rise import paired_rise
from forgetless.files.atomic import read_json, write_json, write_text
from forgetless.importance.calibration import Calibration, MeasuredUpdate
from forgetless.options.model import ModelOptions
from forgetless.options.record import RecordOptions
from forgetless.options.verbs import resolve
from forgetless.record.cost import MeasuredPoint, parabola
from forgetless.record.gradient import gradient

HERE = Path(__file__).parent
SCALES = (0.125, 0.25, 0.5, 0.75, 1.0)
METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rate-0.001": dict(learning_rate=1e-3),
    "kl": dict(method="kl"),
    **{f"strength-{x}": dict(importance=None, strength=float(x)) for x in (1, 3, 10, 30, 100)},
}
GROUPS = {
    "held at 3 to 30": ("strength-3", "strength-10", "strength-30"),
    "plain, held at 1": ("plain", "strength-1"),
    "small rate, held at 100, KL": ("rate-0.001", "strength-100", "kl"),
}
DOMAINS = {"lab-english-5m": ("sciq", "medmcqa"), "tinystories-char-1m": ("piqa",)}
FIRST: dict[str, Callable[[float], float]] = {
    "a rise by g counted, as tune does": lambda first: max(first, 0.0),
    "a fall too": lambda first: first,
}
RECORDED: dict[str, dict[str, Any]] = {
    "fisher": dict(estimator="fisher"),
    "kronecker": dict(cov_rank=0),
    "uniform": dict(estimator="uniform"),
    "path": dict(estimator="path", max_steps=120, accumulation=1),
}
CONVERTED = {
    "kronecker:64": ("kronecker", "kronecker:64"),
    "kronecker:16": ("kronecker", "kronecker:16"),
    "fisher, u8": ("fisher", "u8"),
    "fisher, u4": ("fisher", "u4"),
    "fisher, factored": ("fisher", "factored"),
    "path, factored": ("path", "factored"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shared", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--updates", nargs="*", choices=tuple(DOMAINS), default=())
    parser.add_argument("--runs", nargs="*", choices=("sciq", "medmcqa", "piqa"), default=())
    parser.add_argument("--page", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.updates:
        short_trainings(given.shared, given.out, name)
    for seed in SEEDS if given.runs else ():
        for domain in given.runs:
            for method in METHODS:
                fine_tuning(given.shared, given.out, domain, method, seed)
    if given.page:
        found = {name: collected(given.shared, given.out, name) for name in DOMAINS}
        write_json(HERE / "calibration.json", found)
        (HERE / "calibration.md").write_text(page(found), encoding="utf-8")


def lab_of(shared: Path, out: Path, model: str) -> Lab:
    """Model, texts and importance files as budget.py has them."""
    return Lab(shared, out.parent / "budget", DOMAINS[model][0], STEPS["max_steps"])


def short_trainings(shared: Path, out: Path, name: str) -> None:
    """The updates of a calibration, each with its rise at several shares."""
    from forgetless.data.documents import load_documents
    from forgetless.model.loading import load_model, load_tokenizer
    from forgetless.record.kept_apart import apart, divided
    from forgetless.record.record import record
    from forgetless.record.updates import measured_updates

    lab = lab_of(shared, out, name)
    options = resolve(
        RecordOptions,
        {
            **RECORDING,
            "model": lab.model,
            "general": lab.recorded,
            "out": str(out / "importance" / f"{name}.safetensors"),
            "calibrate": True,
        },
    )
    base, tokenizer = load_model(options), load_tokenizer(options)
    recorded, kept = apart(load_documents(lab.recorded), tokenizer)
    text = out / "importance" / f"{name}.jsonl"
    write_text(
        text,
        "".join(
            json.dumps({"text": d.text, "source": d.source}) + "\n"
            for d in recorded[: options.documents]
        ),
    )
    importance = record(replace(options, general=str(text), calibrate=False))
    trained, part = divided(base, tokenizer, kept)
    for number, (update, found) in enumerate(
        measured_updates(options, base, tokenizer, importance, trained, part)
    ):
        place = out / "updates" / f"{name}-{number}"
        place.mkdir(parents=True, exist_ok=True)
        save_file(
            {
                f"{w.name}.{key}": t.detach().contiguous()
                for w in update.weights
                for key, t in (("A", w.A), ("B", w.scale * w.B))
            },
            place / "update.safetensors",
        )
        write_json(place / "result.json", found.plain())


def fine_tuning(shared: Path, out: Path, domain: str, method: str, seed: int) -> None:
    """One run of a domain: its rise on all held-out documents and its learning at every scale."""
    from forgetless.options.tune import TuneOptions
    from forgetless.tune.tune import tune

    place, lab = (
        out / "runs" / f"{domain}-{method}-{seed}",
        Lab(shared, out.parent / "budget", domain, STEPS["max_steps"]),
    )
    if (place / "result.json").exists():
        return
    differs = dict(METHODS[method])
    if "importance" in differs:
        differs["importance"] = lab.importance()
    if method == "kl":
        differs |= {"replay": lab.recorded, "replay_documents": 300}
    differs.setdefault("method", "hold" if "importance" in differs else "plain")
    lab.out = out
    tune(
        resolve(
            TuneOptions,
            {
                **STEPS,
                "general": None,
                "model": lab.model,
                "data": lab.data,
                "seed": seed,
                **differs,
                "out": str(out / "last" / domain),
            },
        )
    )
    model, baseline, learning, update = lab.reload()
    parts, points = (baseline.control, baseline.check), []
    for scale in SCALES:
        update.scale(scale)
        rise = paired_rise(
            *(
                np.concatenate(arrays)
                for arrays in (
                    [p.nats for p in parts],
                    [p.losses(model) for p in parts],
                    [p.tokens for p in parts],
                )
            ),
            [source for p in parts for source in p.sources],
        )
        points.append(
            {
                "scale": scale,
                "nats": rise.nats,
                "standard_error": rise.standard_error,
                "learning": learning.of(model).nats,
            }
        )
    place.mkdir(parents=True, exist_ok=True)
    shutil.copytree(out / "last" / domain / "final", place / "adapter", dirs_exist_ok=True)
    write_json(
        place / "result.json", {"domain": domain, "method": method, "seed": seed, "points": points}
    )


def importances(shared: Path, out: Path, name: str) -> dict[str, Any]:
    """Every estimator and tier of a model, recorded on the text that all are, when they are first
    needed.
    """
    from forgetless.importance.importance import Importance
    from forgetless.record.record import record

    lab, found = lab_of(shared, out, name), {}
    for label, differs in RECORDED.items():
        path = out / "importance" / f"{name}-{label}.safetensors"
        if not path.exists():
            text = (
                {}
                if label == "uniform"
                else dict(
                    batch_size=16, length=128, general=str(out / "importance" / f"{name}.jsonl")
                )
            )
            record(
                resolve(
                    RecordOptions,
                    {
                        **text,
                        "dtype": "float32",
                        "threads": 1,
                        "model": lab.model,
                        "out": str(path),
                        **differs,
                    },
                )
            )
        found[label] = Importance.load(path)
    return found | {label: found[of].to_tier(tier) for label, (of, tier) in CONVERTED.items()}


def slope(shared: Path, out: Path, name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The gradient of the recorded text, of rank 32 as record --calibrate keeps it."""
    from forgetless.data.documents import load_documents
    from forgetless.data.encoding import batches, encode_documents
    from forgetless.model.loading import load_model, load_tokenizer

    lab, place = lab_of(shared, out, name), out / "importance" / f"{name}-gradient-32.safetensors"
    if not place.exists():
        options = ModelOptions(model=lab.model, dtype="float32")
        model, tokenizer = load_model(options), load_tokenizer(options)
        rows = encode_documents(
            load_documents(str(out / "importance" / f"{name}.jsonl")), tokenizer, length=128
        )
        found = gradient(
            model,
            "all-linear",
            list(batches(rows, batch_size=8, pad_id=tokenizer.pad_token_id)),
            rank=32,
        )
        save_file(
            {
                f"{weight}.{side}": t.contiguous()
                for weight, pair in found.items()
                for side, t in zip("LR", pair, strict=True)
            },
            place,
        )
    tensors = load_file(place)
    return {
        key[:-2]: (tensors[key].float(), tensors[key[:-2] + ".R"].float())
        for key in tensors
        if key.endswith(".L")
    }


def featured(folder: Path, known: dict[str, Any], gradients: dict[str, Any]) -> dict[str, Any]:
    """A result with the update's energy by every estimator, and its first-order term."""
    if (folder / "update.safetensors").exists():
        tensors = load_file(folder / "update.safetensors")
        U = {
            key[:-2]: tensors[key[:-2] + ".B"] @ tensors[key]
            for key in tensors
            if key.endswith(".A")
        }
    else:
        U = updates(folder / "adapter") or {}
    energies = {
        label: sum(float(importance[weight].energy(u)) for weight, u in U.items())
        for label, importance in known.items()
    }
    first = sum(
        float(((gradients[weight][0].T @ u) * gradients[weight][1]).sum())
        for weight, u in U.items()
    )
    return {**read_json(folder / "result.json"), "energies": energies, "first": first}


def fitted(points: Sequence[dict[str, float]]) -> tuple[float, float, float]:
    """The parabola through a run's points."""
    return parabola([MeasuredPoint(p["scale"], p["nats"], p["standard_error"]) for p in points])


def calibration_of(results: Sequence[dict[str, Any]], label: str) -> Calibration:
    plain = [{**result, "energy": result["energies"][label]} for result in results]
    return Calibration([MeasuredUpdate.of(each) for each in plain])


def largest(bound: Any, limit: float) -> float:
    """The largest share up to 1 whose bound, a parabola from 0, is within the limit."""
    low, high = 0.0, 1.0
    for _ in range(50 if bound(1.0) > limit else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if bound(middle) <= limit else (low, middle)
    return low if bound(1.0) > limit else 1.0


def costs(result: dict[str, Any], share: float) -> float:
    """The rise at a share, from the measured points: rise / share is interpolated linearly, and
    goes on linearly below the first.
    """
    scales, slopes = SCALES, [p["nats"] / p["scale"] for p in result["points"]]
    if share < scales[0]:
        return share * (
            slopes[0] + (slopes[1] - slopes[0]) / (scales[1] - scales[0]) * (share - scales[0])
        )
    return share * float(np.interp(share, scales, slopes))


def most_learning(result: dict[str, Any], share: float) -> float:
    """The most learning at any share up to this one."""
    scales, learned = (0.0, *SCALES), [0.0, *(p["learning"] for p in result["points"])]
    return max(float(np.interp(share * part / 20, scales, learned)) for part in range(21))


def tested(
    known: Calibration,
    runs: Sequence[dict[str, Any]],
    label: str,
    counted: Callable[[float], float],
) -> str:
    """Cells of the table: how often the budget was kept, at what share of it, the largest, and
    learning beside the exact scale's.
    """
    shares, kept = [], []
    for run in runs:
        first, energy = counted(run["first"]), run["energies"][label]
        for budget in BUDGETS:
            limit = parse(budget).nats
            share = largest(lambda s, f=first, e=energy: s * f + known.bound(0.0, s * s * e), limit)
            shares.append(costs(run, share) / limit)
            kept.append(
                most_learning(run, share)
                / most_learning(run, largest(lambda s, run=run: costs(run, s), limit))
            )
    within = sum(share <= 1 for share in shares)
    return (
        f"{within} of {len(shares)} | {statistics.median(shares):.2f} | {max(shares):.2f} | "
        f"{statistics.median(kept):.2f}"
    )


def collected(shared: Path, out: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    """The updates that calibrate and the runs that test, with their energies by every estimator."""
    known, gradients = importances(shared, out, name), slope(shared, out, name)
    made = [path.parent for path in sorted((out / "updates").glob(f"{name}-*/result.json"))]
    runs = [
        path.parent
        for domain in DOMAINS[name]
        for path in sorted((out / "runs").glob(f"{domain}-*/result.json"))
    ]
    return {
        "updates": [featured(folder, known, gradients) for folder in made],
        "runs": [featured(folder, known, gradients) for folder in runs],
    }


def page(found: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    lines = [
        "# Calibrations made while recording, tested on other domains",
        "",
        "<!-- made by experiments/calibration.py -->",
        "",
        "Kept: how often an update that was scaled to a bound of .5, 1, 2 or 5 % cost no more "
        "than that. Cost: its measured rise as a share of the "
        "budget. Learning: beside that of the largest scale that really keeps the budget. g: the "
        "first-order term of rank 32, not counted where it is not "
        "named.",
    ]
    for name, domains in DOMAINS.items():
        made, runs = found[name]["updates"], found[name]["runs"]
        lines += [
            "",
            f"## {name}: {len(made)} updates calibrate, {len(runs)} runs on "
            f"{' and '.join(domains)} test",
            "",
        ]
        lines += [
            "| estimator | nats per unit of energy | typical factor | bound's factor | tested on "
            "| kept | cost, median | largest | learning, median |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for label in made[0]["energies"]:
            calibration = calibration_of(made, label)
            about = (
                f"| {label} | {calibration.cost:.3g} | {calibration.error:.2f} | "
                f"{calibration.factor:.2f} |"
            )
            for group, methods in GROUPS.items():
                chosen = [run for run in runs if run["method"] in methods]
                lines.append(
                    f"{about} {group} | {tested(calibration, chosen, label, lambda first: 0.0)} |"
                )
                for how, counted in FIRST.items() if label == "kronecker:64" else ():
                    lines.append(
                        f"| {label}, {how} | | | | {group} | "
                        f"{tested(calibration, chosen, label, counted)} |"
                    )
                about = "| | | | |"
        lines += [
            "",
            "First-order term against the f of f s + q s^2 fitted to the measured rise, and q / "
            "E by `kronecker:64`; means over seeds:",
            "",
            "| domain | method | f measured | g of rank 32 | q / E |",
            "|---|---|---|---|---|",
        ]
        for domain in domains:
            for method in METHODS:
                some = [run for run in runs if (run["domain"], run["method"]) == (domain, method)]
                fits = [fitted(run["points"]) for run in some]
                g = statistics.mean(run["first"] for run in some) if some else 0.0
                if some and all(second > 0 for _, second, _ in fits):
                    ratio = statistics.geometric_mean(
                        [
                            second / run["energies"]["kronecker:64"]
                            for (_, second, _), run in zip(fits, some, strict=True)
                        ]
                    )
                    lines.append(
                        f"| {domain} | {method} | "
                        f"{statistics.mean(first for first, _, _ in fits):+.4f} | {g:+.4f} | "
                        f"{ratio:.2f} |"
                    )
                elif some:
                    lines.append(
                        f"| {domain} | {method} | fewer than three sizes below .08 nats | "
                        f"{g:+.4f} | |"
                    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
