"""What is fuzzed.

For each kind of file there are a few small valid ones, how they are changed, and how forgetless
reads and uses them.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import mutate
from chat_targets import CHAT_TARGETS
from target import Target

Mutation = Callable[[bytes, random.Random], bytes]


def importance(folder: Path) -> Target:
    """Importance files in every tier, then norms, the table of `inspect`, and for some of them
    another tier.
    """
    import torch

    from forgetless.importance.calibration import Calibration, MeasuredUpdate
    from forgetless.importance.covariance import Covariance, LowRankCovariance
    from forgetless.importance.entries import CodedEntry, DenseEntry, FactoredEntry, KroneckerEntry
    from forgetless.importance.importance import Importance

    torch.manual_seed(0)
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    G, A = (torch.rand(n, 2 * n) @ torch.rand(2 * n, n) / n for n in (4, 6))
    G, A = (G + G.T) / 2, (A + A.T) / 2
    whole, thin = Covariance(A), Covariance(A).cut(2)
    dense = {name: DenseEntry(torch.rand(4, 6)) for name in names}
    info = {
        "estimator": "path",
        "unit": "nats",
        "model": {"name": "tiny", "fingerprint": "ab" * 32},
        "norms": dict.fromkeys(names, 1.0),
        "data": {"source": "general.jsonl", "documents": 3, "tokens": 99, "sha256": "cd" * 32},
        "settings": {"rank": 2, "xi": 1e-9, "seed": 0},
        "timings": {"train_seconds": 1.0},
    }
    anchors = {name: (torch.rand(2, 6), torch.rand(4, 2)) for name in names}
    updates = [
        MeasuredUpdate(
            energy=0.01 * n,
            first=-0.001,
            second=0.03 * n,
            second_error=1e-4,
            points=[{"share": 0.5, "nats": 0.01}],
        )
        for n in range(1, 7)
    ]
    calibration = Calibration(
        updates,
        {n: (torch.rand(4, 2).bfloat16(), torch.rand(2, 6).bfloat16()) for n in names},
        {"documents": 20},
    )
    made = {
        "f32": Importance(dense, anchors, info),
        "bf16": Importance(
            {n: DenseEntry(e.values.bfloat16()) for n, e in dense.items()}, {}, info
        ),
        "u8": Importance(dense, {}, info).to_tier("u8"),
        "u4": Importance(dense, {}, {**info, "estimator": "fisher"}).to_tier("u4"),
        "factored": Importance(
            {n: FactoredEntry(torch.rand(4, 2), torch.rand(6, 2)) for n in names}, {}, info
        ),
        "kronecker": Importance(
            {n: KroneckerEntry(Covariance(G.clone()), whole) for n in names},
            {},
            {**info, "estimator": "kronecker"},
        ),
        "thin": Importance(
            {n: KroneckerEntry(Covariance(G).cut(2), thin) for n in names},
            {},
            {**info, "estimator": "kronecker"},
        ),
        "calibrated": Importance(
            {n: KroneckerEntry(Covariance(G).cut(2), thin) for n in names},
            {},
            {**info, "estimator": "kronecker"},
            calibration,
        ),
        "mixed": Importance(
            {
                names[0]: FactoredEntry(torch.rand(4, 1), torch.rand(6, 1)),
                names[1]: dense[names[1]],
            },
            {},
            info,
        ),
    }
    assert isinstance(made["u4"][names[0]], CodedEntry) and isinstance(thin, LowRankCovariance)
    seeds = {}
    for name, one in made.items():
        one.save(folder / "seed")
        seeds[f"{name}.safetensors"] = (folder / "seed").read_bytes()
    (folder / "seed").unlink()
    seeds["wide.safetensors"] = _wide(folder)

    def use(path: Path) -> list[str]:
        found = Importance.load(path)
        found.norms()
        if found.calibration is not None:
            found.calibration.bound(0.0, 0.01)
        if path.stat().st_size % 16 == 0 and path.name != "wide.safetensors":
            found.to_tier(
                ("f32", "bf16", "u8", "u4", "factored", "factored:2", "kronecker", "kronecker:1")[
                    path.stat().st_size // 16 % 8
                ]
            )
        return found.describe().split("\n")

    return Target(
        seeds,
        lambda name, data, rng: mutate.safetensors(data, rng),
        use,
        rare=("wide.safetensors",),
    )


def _wide(folder: Path) -> bytes:
    """160 KB that stand for 4e8 elements."""
    import torch
    from safetensors.torch import save_file

    save_file(
        {"w.row": torch.rand(20_000, 1), "w.col": torch.rand(20_000, 1)},
        str(folder / "seed"),
        metadata={"forgetless": '{"format": 1}'},
    )
    data = (folder / "seed").read_bytes()
    (folder / "seed").unlink()
    return data


EXPERIMENT = """title: a comparison
model: tiny/model
seeds: {validation: [0], test: [1, 2]}
general:
  wiki: {text: wiki.jsonl, test: wiki-test.jsonl}
  code: code.jsonl
domains:
  medicine: {data: medicine.jsonl, test: medicine-test.jsonl}
  science:
    data: sciq=train.jsonl
training: {max_steps: 300, batch_size: 8, length: 512}
importance:
  default: {documents: 500, estimator: kronecker, cov_rank: 16}
  path: {estimator: path, preset: paper}
methods:
  plain: {grid: {learning_rate: [3.0e-4, 1.0e-3, 3.0e-3]}}
  forgetless:
    importance: default
    learning_rate: 3.0e-3
    grid: {strength: [3, 10, 30]}
  kl: {method: kl, replay: recorded, learning-rate: 1.0e-3, grid: {kl_weight: [0.3, 1, 3]}}
scales: [0.25, 0.5]
shares: [0.5, 0.95]
limit: {validation: 100, test: 300}
sequences:
  both: {domains: [medicine, science], methods: [plain, kl]}
"""
OPTIONS = """data: sciq=train.jsonl
importance: model.safetensors
out: run
preset: default
targets: [q_proj, v_proj]
learning-rate: 1e-3
strength: 10
layers:
  q_proj: 2
method: forgetless
max_steps: 100
dropout: 0.1
packing: false
seed: 0
"""


def config(folder: Path) -> Target:
    """Experiments and options of tune and record in YAML, resolved, with every trial addressed."""
    from forgetless.compare.experiment import identity, tune_options, validation_trials
    from forgetless.compare.experiment_file import read
    from forgetless.compare.plan import plan_text
    from forgetless.options.option import as_dict, read_yaml
    from forgetless.options.record import RecordOptions
    from forgetless.options.tune import TuneOptions
    from forgetless.options.verbs import resolve

    (folder / "base.yaml").write_text(EXPERIMENT, encoding="utf-8")
    record = (
        "general: wiki.jsonl\nout: i.safetensors\nestimator: path\nrank: 8\nepochs: 2\nxi: 1e-9\n"
    )
    seeds = {
        "experiment.yaml": EXPERIMENT,
        "tune.yaml": OPTIONS,
        "record.yaml": record,
        "based.yaml": "base: base.yaml\nmethods:\n  kl: null\n",
    }

    def use(path: Path) -> list[str]:
        if path.name in ("tune.yaml", "record.yaml"):
            kind = TuneOptions if path.name == "tune.yaml" else RecordOptions
            json.dumps(as_dict(resolve(kind, {"model": "m", **read_yaml(path)})))
            return []
        experiment = read(path)
        for trial in validation_trials(experiment):
            options = tune_options(
                experiment,
                trial.settings,
                data="x",
                replay="x",
                importance="x",
                out=str(Path("runs") / trial.domain),
                seed=trial.seed,
            )
            identity(options, more=[])
        names = [
            *experiment.methods,
            *experiment.domains,
            *experiment.general,
            *experiment.importance,
            *experiment.sequences,
        ]
        assert all((folder / name).resolve().parent == folder.resolve() for name in names), (
            f"a name leaves its folder: {names}"
        )
        return plan_text(experiment, "both").split("\n")

    return Target(
        {name: text.encode() for name, text in seeds.items()},
        lambda name, data, rng: mutate.yaml_text(data.decode("utf-8", "replace"), rng),
        use,
    )


def data(folder: Path) -> Target:
    """Text, chats and tasks in every format, as documents and as rows to train on."""
    import pyarrow
    import pyarrow.parquet as parquet

    from forgetless.data.documents import fingerprint_rows, load_documents
    from forgetless.data.domain import load_training_data

    texts = [{"text": f"the cat sat on the mat {i}", "source": "a"} for i in range(3)]
    chat = [
        {"messages": [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}]}
    ] * 2
    pairs = [{"prompt": "one", "completion": " two"}] * 2
    sciq = [
        {
            "question": "q",
            "correct_answer": "a",
            "distractor1": "b",
            "distractor2": "c",
            "distractor3": "d",
            "support": "s",
        }
    ]
    piqa = [{"goal": "g", "sol1": "a", "sol2": "b", "label": 1}]
    lines = lambda rows: "\n".join(map(json.dumps, rows)).encode()
    parquet.write_table(pyarrow.Table.from_pylist(texts), folder / "seed")
    seeds = {
        "text.jsonl": lines(texts),
        "chat.jsonl": lines(chat),
        "pairs.jsonl": lines(pairs),
        "sciq.jsonl": lines(sciq),
        "piqa.jsonl": lines(piqa),
        "list.json": json.dumps(texts).encode(),
        "rows.csv": b'text,source\n"a cat, sat",a\nthe dog,b\n',
        "plain.txt": b"one two\n\nthree four\r\n\r\nfive",
        "text.parquet": (folder / "seed").read_bytes(),
    }
    (folder / "seed").unlink()

    def change(name: str, data: bytes, rng: random.Random) -> bytes:
        if name.endswith(".jsonl") and rng.random() < 0.8:
            rows = [json.loads(line) for line in seeds[name].splitlines()]
            return b"\n".join(
                as_line for row in tree_rows(rows, rng) if (as_line := mutate.as_json(row, rng))
            )
        if name.endswith(".json") and rng.random() < 0.8:
            return mutate.as_json(mutate.tree(json.loads(seeds[name]), rng), rng)
        return mutate.raw(data, rng)

    def tree_rows(rows: list[Any], rng: random.Random) -> list[Any]:
        found = mutate.tree(rows, rng)
        return found if isinstance(found, list) else [found]

    def use(path: Path) -> list[str]:
        errors: list[ValueError] = []
        for read in (load_documents, load_training_data):
            spec = (
                f"{path.stem}={path}"
                if path.stem in ("sciq", "piqa") and read is load_training_data
                else str(path)
            )
            try:
                fingerprint_rows(
                    [
                        dict(row) if isinstance(row, dict) else repr(row)
                        for row in read(spec, limit=50)
                    ]
                )
            except ValueError as error:
                errors.append(error)
        if len(errors) == 2:
            raise errors[len(str(errors[0])) % 2]
        return [str(error) for error in errors]

    return Target(seeds, change, use)


def report(folder: Path) -> Target:
    """compare.json and run.json, shown as a page and as markdown."""
    from forgetless.report import page as pages
    from forgetless.report.contents import load_contents
    from forgetless.report.markdown import markdown

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from comparisons import comparison

    loss = {"nats": 2.0, "perplexity": 7.4, "standard_error": 0.1, "documents": 3, "tokens": 50}
    run = {
        "configuration": {
            "model": "tiny",
            "data": "d.jsonl",
            "general": "g.jsonl",
            "learning_rate": 1e-3,
            "strength": 1.0,
            "rank": 8,
            "seed": 0,
            "budget": "1%",
        },
        "environment": {
            "python": "3.11",
            "versions": {"torch": "2"},
            "device": "cpu",
            "commit": None,
        },
        "data": {"rows": 3, "rows_trained": 3},
        "method": ["hold"],
        "before": {
            "general": loss,
            "domain": loss,
            "tasks": {"sciq": {"answer_loss": loss, "acc": 0.5, "acc_stderr": 0.1}},
        },
        "after": {
            "general": loss,
            "domain": loss,
            "tasks": {"sciq": {"answer_loss": loss, "acc": 0.6, "acc_stderr": 0.1}},
        },
        "forgetting": {"nats": 0.1, "standard_error": 0.01},
        "learning": {"nats": 0.2, "standard_error": 0.01},
        "energy": 0.1,
        "verdict": "kept",
        "train_seconds": 1.0,
        "log": [{"step": 1, "loss": 2.0, "energy": 0.1}],
        "moved": [{"weight": "w", "movement": 0.1, "importance": 1.0}],
    }
    small = comparison(domains=("sciq",), texts=("wiki", "news"))
    few = ("plain", "hold", "l2")
    small["methods"] = [method for method in small["methods"] if method["name"] in few]
    small["runs"] = [
        {**run, "log": run["log"][:2], "moved": (run["moved"] or [])[:2]}
        for run in small["runs"]
        if run["method"] in few and run["seed"] < 3
    ]
    small["importance"][0]["weights"] = small["importance"][0]["weights"][:3]
    small["sequences"] = [
        {
            "name": "both",
            "method": "plain",
            "seed": 1,
            "domains": ["sciq", "medmcqa"],
            "average": 2.0,
            "backward_transfer": 0.1,
            "matrix": [[3.0, 3.0], [2.0, 3.0], [2.1, 2.5]],
            "accuracy": [[0.2, 0.2], [0.5, 0.2], [0.4, 0.5]],
            "general": {"wiki": [0.1, 0.2], "news": [0.0, 0.1, 0.2]},
        }
    ]
    for point in small["runs"][0]["points"]:
        point["accuracy"] = {"before": 0.2, "after": 0.5, "standard_error": None}
        point["accuracy_general"] = {
            "questions": {"before": 0.9, "after": 0.8, "standard_error": 0.1}
        }
    trees = {"compare.json": small, "run.json": run}
    seeds = {name: json.dumps(one).encode() for name, one in trees.items()}

    def change(name: str, data: bytes, rng: random.Random) -> bytes:
        return (
            mutate.raw(data, rng)
            if rng.random() < 0.1
            else mutate.as_json(mutate.tree(trees[name], rng), rng)
        )

    def use(path: Path) -> list[str]:
        for other in path.parent.glob("*.json"):
            if other != path:
                other.unlink()
        contents = load_contents(path.parent)
        html = pages.page(contents)
        assert html.count("<script") == 3 and "<script>alert" not in html, "data became a tag"
        return markdown(contents).split("\n")

    return Target(seeds, change, use)


def adapter(folder: Path) -> Target:
    """An adapter's configuration or its tensors, loaded onto a tiny model, scaled and merged."""
    import copy

    from peft import LoraConfig, OFTConfig, get_peft_model

    from forgetless.budget.shrinkable import adapter_config
    from forgetless.model.adapter_files import CONFIG, WEIGHTS, with_adapter
    from forgetless.model.adapters import adapter_inputs
    from forgetless.model.update import AdapterUpdate

    base = tiny()
    kinds = {
        "lora": LoraConfig(
            r=2,
            target_modules=["q_proj", "v_proj"],
            rank_pattern={"v_proj": 1},
            task_type="CAUSAL_LM",
        ),
        "rslora": LoraConfig(
            r=2, target_modules=r".*\.(q|k)_proj", use_rslora=True, task_type="CAUSAL_LM"
        ),
        "oft": OFTConfig(oft_block_size=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    }
    seeds = {}
    for name, config in kinds.items():
        get_peft_model(copy.deepcopy(base), config).save_pretrained(folder / "seed")
        seeds[f"{name}.json"], seeds[f"{name}.safetensors"] = (
            (folder / "seed" / file).read_bytes() for file in (CONFIG, WEIGHTS)
        )
    shutil.rmtree(folder / "seed")

    def change(name: str, data: bytes, rng: random.Random) -> bytes:
        if name.endswith(".safetensors"):
            return mutate.safetensors(data, rng)
        if rng.random() < 0.1:
            return mutate.raw(data, rng)
        config = json.loads(seeds[name])
        for _ in range(rng.choice((0, 1, 2))):
            config[rng.choice(list(config))] = rng.choice(
                (
                    "(a+)+$",
                    r".*.*.*.*.*.*x",
                    "(",
                    "pissa",
                    "eva",
                    ["q_proj"],
                    {"q_proj": 10**9},
                    *mutate.VALUES,
                )
            )
        return mutate.as_json(mutate.tree(config, rng), rng)

    def use(path: Path) -> list[str]:
        place = path.parent / "adapter"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for ending, file in ((".json", CONFIG), (".safetensors", WEIGHTS)):
            (place / file).write_bytes(
                path.read_bytes() if path.suffix == ending else seeds[path.stem + ending]
            )
        errors: list[ValueError] = []
        try:
            adapter_config(str(place))
            adapter_inputs(place)
        except ValueError as error:
            errors.append(error)
        model = with_adapter(copy.deepcopy(base), place)
        if not errors:
            AdapterUpdate(model).scale(0.5)
        model.merge_and_unload()
        return [str(error) for error in errors]

    return Target(seeds, change, use)


def tiny() -> Any:
    """A Llama of two layers and 16 features."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
        )
    )


def quietly(use: Callable[[Path], list[str]], path: Path) -> list[str]:
    """What `use` says, with what it prints."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        lines = use(path)
    return [*lines, *shown.getvalue().split("\n")]


TARGETS: dict[str, Callable[[Path], Target]] = {
    "importance": importance,
    "config": config,
    "data": data,
    "adapter": adapter,
    "report": report,
    **CHAT_TARGETS,
}
