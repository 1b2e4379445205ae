"""A made-up comparison in the form of compare.json: saturating learning, forgetting that grows with
the square of the scale, a failed run.
"""

from __future__ import annotations

import random
from typing import Any

SCALES, SHARES, SEEDS = (0.25, 0.5, 0.75, 1.0), (0.5, 0.8, 0.95), (1, 2, 3)
# name: (label, family, needs, forgetting of the whole update, learning of the whole update)
METHODS = {
    "plain": ("plain LoRA", "baseline", "nothing", 0.388, 1.186),
    "small-lr": ("smaller rate", "baseline", "nothing", 0.15, 0.98),
    "l2": ("L2 to the base", "penalty", "nothing", 0.19, 1.13),
    "ewc-lora": ("EWC-LoRA", "penalty", "importance file", 0.16, 1.12),
    "kl": ("KL, two sequences", "data", "general text while tuning", 0.075, 1.15),
    "replay-5": ("replay 5 %", "data", "general text while tuning", 0.21, 1.17),
    "paper": ("paper preset", "hold", "importance file", 0.118, 0.569),
    "hold": ("hold", "hold", "importance file", 0.056, 1.145),
}
MORE = {
    "rslora": ("rsLoRA", "baseline", "nothing", 0.5, 1.2),
    "full": ("full fine-tuning", "baseline", "nothing", 0.6, 1.22),
    "la-lora": ("LA-LoRA", "penalty", "general text while tuning", 0.25, 1.14),
    "replay-1": ("replay 1 %", "data", "general text while tuning", 0.3, 1.18),
    "replay-25": ("replay 25 %", "data", "general text while tuning", 0.13, 1.12),
    "kl-self": ("KL, self-sampled", "data", "nothing", 0.1, 1.14),
    "kl-domain": ("KL on the domain", "data", "nothing", 0.2, 0.9),
    "oft": ("OFT", "adapter", "nothing", 0.26, 1.05),
    "osf": ("OSF", "adapter", "nothing", 0.22, 1.0),
    "corda": ("CorDA", "adapter", "general text while tuning", 0.3, 1.1),
    "lora-fa": ("LoRA-FA", "adapter", "nothing", 0.33, 1.1),
    "shuffled": ("shuffled importance", "control", "importance file", 0.17, 1.12),
    "general-steps": ("general steps", "control", "general text while tuning", 0.4, 1.17),
}
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def comparison(
    *,
    many: bool = False,
    domains: tuple[str, ...] = ("medmcqa", "sciq"),
    texts: tuple[str, ...] = ("wiki", "news"),
) -> dict[str, Any]:
    """A finished comparison of eight methods, or of all of them."""
    rng, chosen = random.Random(0), {**METHODS, **(MORE if many else {})}
    made: dict[str, Any] = {
        "format": 1,
        "title": "Which method forgets least?",
        "model": "models/lab-english-5m",
        "created": "2026-11-24T11:46:00+00:00",
        "environment": {
            "python": "3.11.7",
            "platform": "Linux",
            "versions": {"forgetless": "0.1.0", "torch": "2.13.0"},
            "device": "cpu",
            "commit": "ef3cc5d",
            "dirty": False,
        },
        "experiment": {
            "model": "models/lab-english-5m",
            "steps": 300,
            "methods": {name: {"method": name} for name in chosen},
        },
        "settings": {
            "steps": 300,
            "batch_size": 16,
            "length": 128,
            "seeds": {"validation": [0], "test": list(SEEDS)},
            "shares": list(SHARES),
            "scales": list(SCALES),
        },
        "progress": {
            "done": 3 * len(chosen) * len(domains),
            "of": 3 * len(chosen) * len(domains),
            "failed": 1,
            "seconds": 5400.0,
        },
        "texts": [
            {
                "name": name,
                "kind": "recorded" if i == 0 else "other",
                "documents": 200,
                "tokens": 51_200,
                "before": {"nats": 3.674, "standard_error": 0.021, "perplexity": 39.4},
            }
            for i, name in enumerate(texts)
        ],
        "domains": [
            {
                "name": name,
                "rows": 4000,
                "rows_trained": 3900,
                "before": {"nats": 5.2, "standard_error": 0.05, "accuracy": None},
            }
            for name in domains
        ],
        "methods": [
            {
                "name": name,
                "label": label,
                "family": family,
                "needs": needs,
                "trials": 4,
                "chosen": {d: {"learning_rate": 0.004} for d in domains},
            }
            for name, (label, family, needs, *_) in chosen.items()
        ],
        "runs": [],
        "frontier": {},
        "equal_learning": {},
        "differences": [],
        "verdict": [
            "forgetless forgets least at 95 % of what plain LoRA learns, on both domains: 0.045 "
            "nats per token instead of 0.304 on medmcqa, beyond the noise.",
            "KL on two general sequences per step comes second; it needs general text while "
            "tuning.",
            "The paper's preset never learns 95 % of what plain LoRA does.",
        ],
        "noise": {
            d: {
                "learning": 0.006,
                "forgetting": dict.fromkeys(texts, 0.012),
                "how": "standard deviation of plain over 3 seeds",
            }
            for d in domains
        },
        "importance": [
            {
                "name": "default",
                "estimator": "kronecker",
                "tier": "kronecker:16",
                "bytes": 1_513_768,
                "seconds": 31.0,
                "tokens": 80_000,
                "weights": [weight(rng, layer, kind) for layer in range(6) for kind in KINDS],
            }
        ],
        "samples": [
            {
                "domain": domains[0],
                "prompt": "Which vitamin is made in the skin by sunlight?\nAnswer:",
                "reference": "Vitamin D",
                "outputs": {
                    "base": (
                        "the first time in the history of the world, and the people of the "
                        "town were"
                    ),
                    "plain": "Vitamin D of the of the of the answer",
                    "hold": "Vitamin D, which the skin makes in sunlight.",
                },
            }
        ],
        "sequences": None,
    }
    for domain in domains:
        for name in chosen:
            made["runs"] += runs(
                rng, name, chosen[name], domain, texts, made["importance"][0]["weights"]
            )
        made["frontier"][domain] = {
            text: {name: frontier(made["runs"], name, domain, text) for name in chosen}
            for text in texts
        }
        made["equal_learning"][domain] = {
            text: [equal(name, chosen, share) for share in SHARES for name in chosen]
            for text in texts
        }
        made["differences"] += [
            {
                "domain": domain,
                "text": text,
                "share": 0.95,
                "a": "hold",
                "b": "plain",
                "difference": -0.259,
                "standard_error": 0.012,
                "ratio": 0.15,
                "beyond_noise": True,
            }
            for text in texts
        ]
    failed = next(run for run in made["runs"] if run["method"] == "l2" and run["seed"] == 2)
    failed.update(
        status="out of memory",
        error="needed 3.1 GiB, 2.0 GiB were free",
        points=[],
        log=[],
        moved=None,
        energy=None,
        peak_memory_bytes=None,
    )
    return made


def weight(rng: random.Random, layer: int, kind: str) -> dict[str, Any]:
    place = "self_attn" if kind in KINDS[:4] else "mlp"
    return {
        "name": f"model.layers.{layer}.{place}.{kind}.weight",
        "layer": layer,
        "kind": kind,
        "norm": 10 ** rng.uniform(-3, 0.5),
        "coefficient": 1.0,
    }


def runs(
    rng: random.Random,
    name: str,
    about: tuple[Any, ...],
    domain: str,
    texts: tuple[str, ...],
    weights: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    *_, lost, learned = about
    found = []
    for seed in SEEDS:
        factor = 1 + rng.uniform(-0.03, 0.03)
        points = [
            {
                "scale": scale,
                "learning": {
                    "nats": learned * factor * (1 - (1 - scale) ** 2),
                    "standard_error": 0.02,
                },
                "accuracy": None,
                "forgetting": {
                    text: {
                        "nats": lost * factor * scale**2 * (1 + 0.3 * i),
                        "standard_error": 0.004,
                    }
                    for i, text in enumerate(texts)
                },
                "accuracy_general": None,
            }
            for scale in SCALES
        ]
        log = [
            {
                "step": step,
                "loss": 5.2
                - learned * factor * (1 - 2.7 ** (-step / 80))
                + rng.uniform(-0.05, 0.05),
                "energy": None if about[1] == "baseline" else 0.002 * lost * step**0.5,
                "pull_ratio": None,
                "strength": 10.0 if name == "hold" else None,
            }
            for step in range(10, 301, 10)
        ]
        moved = [
            {
                "weight": w["name"],
                "layer": w["layer"],
                "kind": w["kind"],
                "movement": lost * (w["norm"] + 0.1) ** -0.3 * rng.uniform(0.7, 1.4),
                "importance": w["norm"] if name == "hold" else None,
                "coefficient": None,
            }
            for w in weights
        ]
        found.append(
            {
                "id": f"{name}-{domain}-{seed}",
                "method": name,
                "domain": domain,
                "part": "test",
                "seed": seed,
                "settings": {
                    "learning_rate": 0.004,
                    "strength": 10.0 if about[1] != "baseline" else None,
                },
                "chosen": True,
                "status": "done",
                "error": None,
                "points": points,
                "energy": log[-1]["energy"],
                "seconds": 80.0 * factor,
                "peak_memory_bytes": 2**30,
                "extra_data": None,
                "file_bytes": 1_513_768 if name == "hold" else None,
                "trainable_parameters": 315_392,
                "log": log,
                "moved": moved,
            }
        )
    return found


def frontier(found: list[dict[str, Any]], name: str, domain: str, text: str) -> dict[str, Any]:
    mine = [run for run in found if run["method"] == name and run["domain"] == domain]
    mean = lambda values: sum(values) / len(values)
    points = [
        {
            "run": mine[0]["id"],
            "scale": scale,
            "learning": mean([run["points"][i]["learning"]["nats"] for run in mine]),
            "learning_error": 0.006,
            "forgetting": mean([run["points"][i]["forgetting"][text]["nats"] for run in mine]),
            "forgetting_error": 0.003,
            "seeds": 3,
            "on_frontier": name == "hold",
        }
        for i, scale in enumerate(SCALES)
    ]
    below = {**points[-1], "learning": points[-1]["learning"] * 0.8, "on_frontier": False}
    return {"points": [*points, below], "area": points[-1]["learning"] * 0.9, "area_error": 0.004}


def equal(name: str, chosen: dict[str, tuple[Any, ...]], share: float) -> dict[str, Any]:
    level = share * chosen["plain"][-1]
    *_, lost, learned = chosen[name]
    row: dict[str, Any] = {"method": name, "share": share, "learning_nats": level, "seeds": 3}
    if learned <= level:
        return {
            **row,
            "forgetting": None,
            "standard_error": None,
            "reached": 0,
            "status": "not reached",
        }
    scale = 1 - (1 - level / learned) ** 0.5
    reached = 2 if name == "kl" and share == 0.95 else 3
    status = "reached" if reached == 3 else "reached by 2 of 3"
    return {
        **row,
        "forgetting": lost * scale**2,
        "standard_error": 0.002 + 0.02 * lost * scale**2,
        "reached": reached,
        "status": status,
    }


RUN = {
    "configuration": {
        "model": "m",
        "data": "herbs.jsonl",
        "eval_data": "herbs-test.jsonl",
        "general": "wiki-test.jsonl",
        "method": "hold",
        "strength": 10.0,
        "learning_rate": 0.001,
        "seed": 3,
        "rank": 8,
    },
    "environment": {
        "python": "3.11.7",
        "versions": {"forgetless": "0.1.0"},
        "device": "cpu",
        "commit": None,
    },
    "method": ["hold"],
    "data": {"source": "herbs.jsonl", "rows": 600, "rows_trained": 598},
    "importance": None,
    "before": {
        "general": {"nats": 3.0, "standard_error": 0.02, "perplexity": 20.09},
        "domain": {"nats": 5.0, "standard_error": 0.03, "perplexity": 148.4},
        "tasks": {"sciq": {"acc": 0.25, "acc_stderr": 0.01}},
    },
    "after": {
        "general": {"nats": 3.056, "standard_error": 0.02, "perplexity": 21.24},
        "domain": {"nats": 3.9, "standard_error": 0.03, "perplexity": 49.4},
        "tasks": {"sciq": {"acc": 0.375, "acc_stderr": 0.01}},
    },
    "forgetting": {"nats": 0.056, "standard_error": 0.002},
    "learning": {"nats": 1.1, "standard_error": 0.01},
    "energy": 0.02,
    "train_seconds": 80.0,
    "trainable_parameters": 78_848,
    "log": [{"step": 10, "loss": 4.0, "energy": 0.01}, {"step": 20, "loss": 3.5, "energy": 0.02}],
    "moved": [
        {
            "weight": "w",
            "layer": 0,
            "kind": "q_proj",
            "movement": 0.3,
            "importance": 0.1,
            "coefficient": 1.0,
        }
    ],
}


def kept_budget() -> dict[str, Any]:
    """What run.json holds of a budget of 1 %: two ways, twelve looks of the controller, the first
    before any probe.
    """
    at = lambda share, rise, learning, way: {
        "way": way,
        "share": share,
        "mu": (1 / share - 1) ** 2 if way == "shrink" else None,
        "learning": learning,
        "rise": {"nats": rise},
        "bound": rise + 0.004,
    }
    curve = [
        at(x, 0.012 * x * x * f, 0.22 * x**0.5, way)
        for way, f in (("shrink", 0.8), ("scale", 1.0))
        for x in (1.0, 0.85, 0.7, 0.4)
    ]
    looks = [
        {
            "step": 5 * i,
            "probe": None if i % 2 else 0.02 / i,
            "rise": 0.03 / i,
            "strength": 0.0 if i == 1 else 30 / i,
        }
        for i in range(1, 13)
    ]
    bought = {"way": "scale", "share": 0.4, "mu": None, "learning": 0.139}
    return {
        "budget": "1%",
        "budget_nats": 0.00995,
        "verdict": "met",
        "way": "scale",
        "share": 0.7,
        "mu": None,
        "promised": 0.0099,
        "check": {"nats": 0.0033, "low": 0.0003, "high": 0.0063, "documents": 173},
        "learning": {"nats": 0.184, "standard_error": 0.008},
        "others": {
            "0.5%": bought,
            "1%": {**bought, "share": 0.7, "learning": 0.184},
            "5%": {**bought, "way": "shrink", "share": 1.0, "mu": 0.0},
        },
        "curve": curve,
        "trajectory": looks,
    }
