"""Options of every verb: one frozen dataclass each, from which the command line, the YAML files and the Python calls are made.

An option has one name everywhere (`learning_rate` in Python and YAML, `--learning-rate` on the command line), one help text and one default.
`None` as the default of an option that is not optional means "the preset decides"; presets are dict literals below that hold only what differs.
Precedence, strongest first: given on the command line, given in `--config FILE.yaml`, the preset, the default.

This file imports nothing but the standard library (and PyYAML when a file is read), so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from holdfast.options import OptionError, checked, nearest, option

Options = TypeVar("Options")


DTYPES = ("auto", "float32", "bfloat16", "float16")
PRESETS = ("default", "paper")
ESTIMATORS = ("path", "path-factored", "fisher", "kronecker", "activation", "uniform")
LAYERS = ("uniform", "softmax", "scale-free")
REPORTERS = ("none", "tensorboard", "wandb", "trackio", "mlflow", "swanlab")


@dataclass(frozen=True)
class ModelOptions:
    """What every verb that loads a model accepts."""

    model: str = option("", "model: a Hub name or a local folder", positional=True, metavar="MODEL")
    revision: str | None = option(None, "Hub revision of the model")
    dtype: str = option("auto", "dtype of the weights; auto takes what the checkpoint says", choices=DTYPES)
    device: str = option("auto", "device: auto, cpu, cuda, cuda:1, mps")
    quantize: str = option("none", "load the base in 4 or 8 bit (needs bitsandbytes)", choices=("none", "4bit", "8bit"))
    trust_remote_code: bool = option(False, "run Python code that comes with the model; only for models you trust")
    threads: int | None = option(None, "CPU threads; default: torch decides")
    seed: int = option(0, "seed of every random choice")


@dataclass(frozen=True)
class AdapterOptions:
    """LoRA as PEFT builds it."""

    targets: str = option(None, "weights to adapt: names (q_proj,v_proj), all-linear, or a regular expression; default: preset", metavar="NAMES")
    rank: int = option(None, "LoRA rank r")
    alpha: float = option(None, "LoRA alpha; the update is scaled by alpha / rank")
    dropout: float = option(None, "LoRA dropout")
    rslora: bool = option(False, "scale the update by alpha / sqrt(rank)")


@dataclass(frozen=True)
class TextOptions:
    """General text: documents or chats that stand for what the model must not lose."""

    general: str | None = option(None, "general text: .txt, .jsonl, .json, .csv, .parquet, a Hub dataset, or 'self' (sampled from the model)", metavar="TEXT")
    text_column: str | None = option(None, "column that holds the text; default: text, content or messages")
    general_split: str = option("train", "split of a Hub dataset")


@dataclass(frozen=True)
class RecordOptions(AdapterOptions, TextOptions, ModelOptions):
    """Options of `holdfast record`: once per base model, on general text, into one importance file."""

    out: str = option("", "importance file to write (.safetensors)", metavar="FILE")
    preset: str = option("default", "default: our recipe; paper: Song et al. 2025 (arXiv 2501.13669)", choices=PRESETS)
    estimator: str = option(None, "how importance is estimated; all but path make one pass over the text without training", choices=ESTIMATORS)
    labels: str = option("empirical", "labels of fisher and kronecker: the text's own tokens, or sampled from the model", choices=("empirical", "sampled"))
    cov_rank: int = option(None, "kronecker: keep covariances as this rank + constant diagonal; 0: whole")
    gradient: str = option(None, "gradient of the path integral: exact dL/dU, or the paper's effective gradient", choices=("exact", "effective"))
    clamp: str = option(None, "clamp credits at zero after every step (the paper) or at the end of an epoch", choices=("step", "end"))
    xi: float = option(None, "added to the squared movement before dividing by it")
    tier: str | None = option(None, "form of the file: f32, bf16, factored[:K], kronecker[:K]; default: as the estimator records it", metavar="TIER")
    groups: int | None = option(None, "kronecker and fisher: see the weights in this many groups, one pass over the text each, for less memory; "
                                "default: as few as fit")  # fmt: skip
    offload: bool = option(False, "path: keep credits and importance in CPU memory while training on a GPU")
    keep_anchor: bool = option(True, "store the adapter at the end of recording, for anchor: recorded")
    documents: int | None = option(None, "use at most this many documents")
    calibrate: bool = option(False, "also measure what fine-tuning costs in general loss, by nine short trainings, so that tune --budget can do without "
                             "--general (docs/budget.md)")  # fmt: skip
    length: int = option(None, "tokens per sequence; default: preset, at most the model's context")
    epochs: int = option(None, "passes over the general text")
    max_steps: int | None = option(None, "stop after this many optimizer steps")
    batch_size: int = option(None, "sequences per forward pass")
    accumulation: int = option(None, "forward passes per optimizer step")
    learning_rate: float = option(None, "AdamW learning rate")
    schedule: str = option(None, "learning-rate schedule", choices=("linear", "constant"))
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass")
    self_documents: int = option(64, "how many documents to sample with --general self")
    save_steps: int = option(100, "write a state to resume from every so many steps")
    resume: bool = option(False, "go on from the last saved state")
    push_to_hub: str | None = option(None, "also upload the file, with a model card, to this Hub repository", metavar="NAME")
    private: bool | None = option(None, "make the repository of --push-to-hub private, where it is new")


RECORD_PRESETS: dict[str, dict[str, Any]] = {
    # Song et al. 2025, section "Experiments"; the base in 8 bit is left to --quantize 8bit. Padding is masked, unlike in the released code.
    "paper": dict(estimator="path", targets="q_proj,v_proj", rank=8, alpha=32.0, dropout=0.1, gradient="effective", clamp="step", xi=1e-9, documents=2000,
                  length=800, epochs=5, batch_size=20, accumulation=4, learning_rate=8e-4, schedule="linear"),
    "default": dict(estimator="kronecker", cov_rank=64, targets="all-linear", rank=8, alpha=32.0, dropout=0.0, gradient="exact", clamp="step", xi=1e-9,
                    length=1024, epochs=1, batch_size=4, accumulation=4, learning_rate=5e-4, schedule="constant"),
}  # fmt: skip


# Options of `record` that only estimators which train an adapter use.
TRAINING_ONLY = ("rank", "alpha", "dropout", "rslora", "gradient", "clamp", "xi", "keep_anchor", "epochs", "max_steps", "accumulation", "learning_rate",
                 "schedule", "gradient_checkpointing", "offload")  # fmt: skip
LABELLED = ("fisher", "kronecker")


def check_estimator(given: Mapping[str, Any], estimator: str) -> None:
    """Raise OptionError where an option was given that the estimator would ignore."""
    trains = estimator.startswith("path")
    wrong = [] if trains else [name for name in TRAINING_ONLY if given.get(name) is not None]
    wrong += [name for name in ("labels", "groups") if estimator not in LABELLED and given.get(name) is not None]
    wrong += ["cov_rank"] if estimator != "kronecker" and given.get("cov_rank") is not None else []
    if wrong:
        flags = ", ".join("--" + name.replace("_", "-") for name in wrong)
        why = "trains an adapter" if trains else "makes one pass over the text, without training"
        advice = "leave out" if trains else "leave out, or give --estimator path"
        raise OptionError(f"{flags}: not used by --estimator {estimator}, which {why}; {advice}")
    if not trains and given.get("preset") == "paper":
        raise OptionError(f"--preset paper records the path integral, found --estimator {estimator}; leave out one of them")


@dataclass(frozen=True)
class TuneOptions(AdapterOptions, TextOptions, ModelOptions):
    """Options of `holdfast tune`: fine-tune on domain data while holding what the importance file marks."""

    data: str = option("", "domain data: a file, a Hub dataset, or a task (sciq, piqa, medmcqa, sciq=train.jsonl); given several times: one domain after "
                       "the other, each held from then on (docs/sequences.md)", metavar="DATA", repeated=True)  # fmt: skip
    data_split: str = option("train", "split of a Hub dataset")
    importance: str | None = option(None, "importance file of `holdfast record`, its folder or a Hub name; without one the run is plain fine-tuning",
                                    metavar="FILE")  # fmt: skip
    out: str = option("", "folder to write: adapter (or model), checkpoints, run.json", metavar="DIR")
    after: str | None = option(None, "go on from the result of this finished run on MODEL: its domains are held too, the final adapter has both", metavar="RUN")
    consolidate: str | None = option(None, "several domains: add the importance of each to that so far (sum), average with decay (decay:0.9), or "
                                     "hold general text alone (none) [sum]",
                                     metavar="RULE")  # fmt: skip
    final_rank: int | None = option(None, "several domains: bring the final adapter to this rank; default: the exact sum of the updates, ranks added")
    keep_all: bool = option(False, "several domains: keep the adapter of the model after each of them too")
    preset: str = option("default", "default: our recipe; paper: Song et al. 2025 (arXiv 2501.13669)", choices=PRESETS)
    method: str = option(None, "method, or several with commas: plain, rslora, full, small-lr, holdfast, kl, replay, wise, ewc-lora, la-lora, l2, shuffled, "
                         "o-lora, general-steps, oft, osf, corda, lora-fa; see docs/methods.md; default: holdfast where --importance is given, else plain",
                         metavar="NAMES")  # fmt: skip
    replay: str | None = option(None, "general text used while tuning: as --general, but other text; 'self': sampled from the model; 'domain': --data (kl)",
                                metavar="TEXT")  # fmt: skip
    replay_documents: int | None = option(None, "use at most this many documents of --replay; with 'self', how many to sample [256]")
    replay_share: float | None = option(None, "replay: general tokens per domain token, 0.01 for 1 % [0.05]")
    kl_weight: float | None = option(None, "kl: weight of the divergence from the base [1]")
    kl_sequences: int | None = option(None, "kl: general sequences per optimizer step [2]")
    scale: float | None = option(None, "wise: scale the finished update by this number")
    max_forgetting: float | None = option(None, "wise: the largest scale with at most this rise of the loss on --general", metavar="NATS")
    general_steps: int | None = option(None, "general-steps: optimizer steps on --replay before tuning; default: one pass over it")
    earlier: str | None = option(None, "o-lora: adapters merged into MODEL before, whose directions are kept free", metavar="DIRS")
    orthogonality: float | None = option(None, "o-lora: weight of the overlap with earlier adapters [0.5]")
    strength: float | None = option(None, "how hard important weights are held (lambda); 0 is plain fine-tuning; default: what suits the file's estimator")
    budget: str | None = option(None, "let perplexity on --general rise by at most this much: 1%, or 0.01nats; sets the strength. Without --general the "
                               "rise is predicted by --importance, and not checked (docs/budget.md)")  # fmt: skip
    layers: Any = option(None, "layer coefficients: uniform, softmax, scale-free; a list over depth or a map of kinds in YAML", metavar="HOW")
    per: str = option("weight", "coefficients for each weight, or shared by the weights of a block", choices=("weight", "block"))
    tau: float = option(None, "temperature of the softmax over layers")
    anchor: str = option(None, "hold towards the base model, or towards the adapter at the end of recording", choices=("base", "recorded"))
    offload_importance: bool = option(False, "keep importance in CPU memory and bring it to the GPU one weight at a time")
    full: bool = option(False, "train the target weights themselves instead of an adapter")
    learning_rate: float = option(None, "AdamW learning rate")
    schedule: str = option("linear", "learning-rate schedule", choices=("linear", "cosine", "constant"))
    warmup: float = option(0.0, "share of the steps that warm up the learning rate")
    weight_decay: float = option(0.0, "AdamW weight decay")
    max_grad_norm: float = option(1.0, "clip the gradient of the task loss to this norm; 0: never. The pull is added after clipping")
    epochs: float = option(None, "passes over the data")
    max_steps: int = option(-1, "stop after this many optimizer steps; -1: epochs decide")
    batch_size: int = option(None, "sequences per forward pass")
    accumulation: int = option(None, "forward passes per optimizer step")
    length: int = option(None, "tokens per sequence; default: preset, at most the model's context")
    packing: bool = option(False, "pack several documents into one sequence")
    completion_only: bool | None = option(None, "score only completions or assistant turns; default: yes where the data has them")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass")
    eval_data: str | None = option(None, "held-out domain data, evaluated before, during and after; with several domains one for each, in their order",
                                   metavar="DATA", repeated=True)  # fmt: skip
    eval_split: str | None = option(None, "split of a Hub dataset given by --eval-data; default: test, or the held-out split of a task")
    eval_steps: int = option(0, "evaluate on --eval-data every so many steps; 0: only before and after")
    tasks: str | None = option(None, "tasks to evaluate before and after: sciq,piqa=test.jsonl,...", metavar="NAMES")
    limit: int | None = option(None, "evaluate at most this many documents or questions")
    save_steps: int = option(200, "checkpoint every so many steps")
    log_steps: int = option(10, "log every so many steps")
    report_to: str = option("none", "where the trainer reports", choices=REPORTERS)
    push_to_hub: str | None = option(
        None, "also upload final/, with its model card, to this Hub repository; with --budget only where it is met", metavar="NAME"
    )
    private: bool | None = option(None, "make the repository of --push-to-hub private, where it is new")
    resume: bool = option(False, "go on from the last checkpoint in --out")
    overwrite: bool = option(False, "replace a finished run in --out")


TUNE_PRESETS: dict[str, dict[str, Any]] = {
    "paper": dict(targets="q_proj,v_proj", rank=8, alpha=32.0, dropout=0.1, strength=1e-3, layers="softmax", tau=1e-8, anchor="recorded",
                  learning_rate=8e-4, epochs=5.0, batch_size=20, accumulation=4, length=800),
    "default": dict(targets="all-linear", rank=8, alpha=32.0, dropout=0.0, layers="uniform", tau=1.0, anchor="base",
                    learning_rate=1e-3, epochs=1.0, batch_size=4, accumulation=4, length=1024),
}  # fmt: skip


# What a method sets where neither the command line nor a YAML file does; stronger than the preset.
METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "rslora": dict(rslora=True),
    "full": dict(full=True),
    "small-lr": dict(learning_rate=1e-4),
    "ewc-lora": dict(strength=10.0),  # as STRENGTHS has it for fisher
    "kl": dict(kl_weight=1.0, kl_sequences=2),
    "replay": dict(replay_share=0.05),
    "o-lora": dict(orthogonality=0.5),
}


def method_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The method by its default, and the settings of the methods that it names; wrong names are left to `holdfast.methods`."""
    method = given.get("method") or ("holdfast" if given.get("importance") or given.get("after") else "plain")
    settings = {"method": method}
    for name in method.split(","):
        settings.update(METHOD_SETTINGS.get(name.strip(), {}))
    return settings


# Strengths that kept most of the learning and lost least of the rest on the lab model and the demo (LOG.md); units differ between estimators.
STRENGTHS = {"kronecker": 10.0, "fisher": 10.0, "path": 0.01}


IN_NATS = ("kronecker", "fisher")  # estimators whose energy is a rise of the general loss in nats, up to a factor


def default_strength(estimator: str) -> float:
    """The strength for importance of this estimator where none is given. Raises OptionError for estimators without one."""
    if estimator not in STRENGTHS:
        raise OptionError(f"importance of estimator '{estimator}' has no default strength (known: {', '.join(STRENGTHS)}); give the strength")
    return STRENGTHS[estimator]


@dataclass(frozen=True)
class CompareOptions:
    """Options of `holdfast compare`: every method of an experiment on one frontier."""

    experiment: str = option("", "experiment: a YAML file (docs/compare.md)", positional=True, metavar="EXPERIMENT.yaml")
    out: str = option("", "folder to write: runs, importance, compare.json", metavar="DIR")
    jobs: int = option(1, "processes that run trials at the same time; with several GPUs each gets its own")
    part: str = option("both", "validation: only choose settings; both: then test the chosen ones with fresh seeds", choices=("validation", "both"))
    dry_run: bool = option(False, "say what would be run")


@dataclass(frozen=True)
class PlanOptions(ModelOptions):
    """Options of `holdfast plan`: bytes and time, from the model's configuration alone."""

    targets: str = option("all-linear", "weights to adapt: names (q_proj,v_proj), all-linear, or a regular expression", metavar="NAMES")
    rank: int = option(8, "LoRA rank r")
    full: bool = option(False, "train the target weights themselves instead of an adapter")
    estimator: str = option("kronecker", "how importance is estimated", choices=ESTIMATORS)
    tier: str | None = option(
        None, "form of the file that tuning reads: f32, bf16, u8, u4, factored[:K], kronecker[:K]; default: as record writes it", metavar="TIER"
    )
    cov_rank: int = option(64, "kronecker: rank of the covariances that record keeps; 0: whole")
    tokens: int = option(4096, "tokens per forward pass while tuning")
    length: int = option(1024, "tokens per sequence")
    accumulation: int = option(4, "forward passes per optimizer step")
    general_tokens: int = option(500_000, "tokens of general text to record from")
    record_tokens: int = option(4096, "tokens per forward pass while recording")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass")
    processes: int = option(1, "processes that train together, one per device")
    engine: str = option("ddp", "ddp: each has the whole model; fsdp: weights, gradients and optimizer state are sharded", choices=("ddp", "fsdp"))
    flops: float | None = option(None, "floating-point operations per second of a device, as 400e12; default: measured here", metavar="RATE")
    json: bool = option(False, "print JSON")


@dataclass(frozen=True)
class EvalOptions(TextOptions, ModelOptions):
    """Options of `holdfast eval`: what was learned, and what was lost."""

    adapter: str | None = option(None, "PEFT adapter to compare with the bare base model", metavar="DIR")
    tuned: str | None = option(None, "fully fine-tuned model to compare with MODEL", metavar="DIR")
    data: str | None = option(None, "held-out domain data: a file, a Hub dataset, or a task (sciq=test.jsonl)", metavar="DATA")
    data_split: str | None = option(None, "split of a Hub dataset given by --data; default: test, or the held-out split of a task")
    tasks: str | None = option(None, "tasks, by name or with a local file: sciq,piqa=test.jsonl; any lm-eval task by its name", metavar="NAMES")
    shots: int = option(0, "worked examples before each question")
    limit: int | None = option(None, "evaluate at most this many documents or questions")
    length: int | None = option(None, "window in tokens; default: the model's context, at most 2048")
    stride: int | None = option(None, "tokens that a sliding window moves by; default: half the window")
    batch_tokens: int = option(None, "tokens per forward pass; default: 4096, on a CPU 1024")
    scale: float = option(1.0, "evaluate the adapter's update times this number")
    authors_perplexity: bool = option(False, "also print 2^nats, the figure that the paper's code calls perplexity")
    out: str | None = option(None, "folder for run.json", metavar="DIR")


@dataclass(frozen=True)
class ShrinkOptions(TextOptions, ModelOptions):
    """Options of `holdfast shrink`: a finished adapter made to keep a forgetting budget."""

    model: str = option("", "base model; default: the one that the adapter names", metavar="MODEL")
    adapter: str = option("", "PEFT adapter (LoRA, rsLoRA), whoever trained it: a local folder", positional=True, metavar="ADAPTER")
    importance: str | None = option(None, "importance file of `holdfast record` for the base model, its folder or a Hub name", metavar="FILE")
    budget: str | None = option(None, "let perplexity on --general rise by at most this much: 1%, or 0.01nats; without --general and with --method scale "
                                      "the rise is predicted by --importance, and not checked")  # fmt: skip
    data: str | None = option(None, "held-out domain data, on which learning is measured: a file, a Hub dataset, or a task (sciq=test.jsonl)", metavar="DATA")
    data_split: str | None = option(None, "split of a Hub dataset given by --data; default: test, or the held-out split of a task")
    method: str = option("shrink", "shrink along importance, or scale all of the update", choices=("shrink", "scale"))
    mu: float | None = option(None, "shrink by 1 / (1 + mu importance), importance in units of what the update meets on average; instead of --budget")
    limit: int | None = option(None, "use at most this many documents of --general and rows of --data")
    out: str = option("", "folder to write, new or empty: final/ (the adapter), run.json", metavar="DIR")


@dataclass(frozen=True)
class DemoOptions:
    """Options of `holdfast demo`: the whole method on the embedded world and model."""

    out: str = option("holdfast-demo", "folder to write: texts, importance, adapters, demo.json, demo.md, demo.png, compare.json, report.html", metavar="DIR")
    seeds: int = option(1, "how many seeds; the table shows mean and standard error over them")


@dataclass(frozen=True)
class ReportOptions:
    """Options of `holdfast report`: what was measured, as a page or as markdown."""

    folder: str = option("", "folder of holdfast compare, demo or tune", positional=True, metavar="DIR")
    format: str = option("html", "html: one self-contained page; markdown: for a model card or a pull request", choices=("html", "markdown"))
    out: str | None = option(None, "file to write; default: DIR/report.html, and standard output for markdown", metavar="FILE")
    title: str | None = option(None, "title; default: the comparison's or the run's", metavar="TEXT")


def resolve(kind: type[Options], given: Mapping[str, Any], presets: Mapping[str, Mapping[str, Any]] | None = None) -> Options:
    """The frozen options of one verb from what was given, filled up from the preset. Raises OptionError for unknown names and wrong types."""
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            raise OptionError(f"unknown option '{name}' for {kind.__name__}; {nearest(name, known)}")
    values = {name: checked(known[name], value) for name, value in given.items()}
    if kind is RecordOptions:
        check_estimator(values, str(values.get("estimator") or RECORD_PRESETS[str(values.get("preset") or "default")]["estimator"]))
    if presets is not None:
        preset = str(values.get("preset") or known["preset"].default)
        decided = method_settings(values) if kind is TuneOptions else {}
        values = {**presets[preset], **decided, **{name: value for name, value in values.items() if value is not None or known[name].default is not None}}
    return kind(**values)
