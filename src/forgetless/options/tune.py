"""Options of `forgetless tune`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from forgetless.options.holding import HOLDING
from forgetless.options.method_settings import MethodSettings
from forgetless.options.methods import METHODS
from forgetless.options.model import AdapterOptions, BudgetOptions, ModelOptions, TextOptions
from forgetless.options.option import MEASURED, RUNNING, option, same
from forgetless.options.record import PRESETS, RecordOptions

# How the coefficients of the layers are made (penalty/layers.py).
LAYERS = ("uniform", "softmax", "scale-free")
# Where the trainer of transformers may report to.
REPORTERS = ("none", "tensorboard", "wandb", "trackio", "mlflow", "swanlab")


@dataclass(frozen=True)
class TuneOptions(AdapterOptions, BudgetOptions, TextOptions, ModelOptions):
    """Options of `forgetless tune`: fine-tune on domain data while holding what the model knows."""

    data: str = option(
        "",
        "domain data: a file, a Hub dataset, or a task (sciq, piqa, medmcqa, sciq=train.jsonl); "
        "given several times: one domain after the other, each held from then on "
        "(docs/sequences.md)",
        group="data",
        metavar="DATA",
        repeated=True,
        reads=True,
    )
    data_split: str = option("train", "split of a Hub dataset", group="data")
    columns: str | None = option(
        None,
        "columns of --data and --eval-data under names of their own: "
        "prompt=question,completion=answer, messages=dialog or text=body (docs/data.md)",
        group="data",
        later=True,
        metavar="OURS=YOURS",
    )
    general: str | None = option(
        None,
        "what must not be lost, to measure it: 'chat' (the model's own answers to prompts of "
        "ours), 'self' (text that it writes by itself), a file (.txt, .jsonl, .json, .csv, "
        ".parquet) or a Hub dataset; one of the first two and a text with a comma; 'none' "
        "measures nothing; default: chat for a model with a chat template, else self",
        group="data",
        decides=MEASURED,
        metavar="TEXT",
        nothing="none",
        reads=True,
    )
    importance: str | None = option(
        None,
        "importance file of `forgetless record`, its folder or a Hub name; auto: the one in the "
        "cache, recorded where there is none. Default: auto, unless --method says otherwise",
        group="holding",
        metavar="FILE",
        reads=True,
    )
    out: str = option(
        "",
        "folder to write: adapter (or model), checkpoints, run.json",
        group="output",
        decides=RUNNING,
        metavar="DIR",
    )
    after: str | None = option(
        None,
        "go on from the result of this finished run on MODEL: its domains are held too, the "
        "final adapter has both",
        group="sequence",
        later=True,
        metavar="RUN",
        reads=True,
    )
    consolidate: str | None = option(
        None,
        "several domains: add the importance of each to that so far (sum), average with decay "
        "(decay:0.9), or hold general text alone (none) [sum]",
        group="sequence",
        later=True,
        metavar="RULE",
    )
    final_rank: int | None = option(
        None,
        "several domains: bring the final adapter to this rank; default: the exact sum of the "
        "updates, ranks added",
        group="sequence",
        at_least=1,
        later=True,
    )
    keep_all: bool = option(
        False,
        "several domains: keep the adapter of the model after each of them too",
        group="sequence",
        decides=RUNNING,
        later=True,
    )
    preset: str = option(
        "default",
        "default: our recipe; paper: Song et al. 2025 (arXiv 2501.13669)",
        group="training",
        choices=PRESETS,
    )
    method: str = option(
        None,
        "method, or several with commas: "
        + "; ".join(f"{name} ({row.help})" for name, row in METHODS.items())
        + f". See docs/methods.md; default: {HOLDING['method']} by what --importance auto has, or "
        "hold by the file that --importance names",
        group="method",
        metavar="NAMES",
    )
    replay: str | None = option(
        None,
        "general text used while tuning: as --general, but other text; 'chat' and 'self' are other "
        "answers than are measured on; 'domain': --data (kl); 'kept': the answers in the "
        "importance file (kl)",
        group="method",
        metavar="TEXT",
        reads=True,
    )
    replay_documents: int | None = option(
        None,
        "use at most this many documents of --replay; with 'self', how many to sample [256]",
        group="method",
        at_least=1,
    )
    replay_share: float | None = same(MethodSettings, "replay_share")
    replay_weight: float | None = same(MethodSettings, "replay_weight")
    masked_weight: float | None = same(MethodSettings, "masked_weight")
    stm_perplexity: float | None = same(MethodSettings, "stm_perplexity")
    protect: float | None = same(MethodSettings, "protect")
    kl_weight: float | None = same(MethodSettings, "kl_weight")
    kl_sequences: int | None = same(MethodSettings, "kl_sequences")
    kl_every: int | None = same(MethodSettings, "kl_every")
    kl_length: int | None = same(MethodSettings, "kl_length")
    kl_kinds: str | None = same(MethodSettings, "kl_kinds")
    scale: float | None = same(MethodSettings, "scale")
    general_steps: int | None = same(MethodSettings, "general_steps")
    earlier: str | None = same(MethodSettings, "earlier")
    orthogonality: float | None = same(MethodSettings, "orthogonality")
    strength: float | None = option(
        None,
        "how hard important weights are held (lambda); 0 is plain fine-tuning; default: what "
        "suits the file's estimator",
        group="holding",
        at_least=0,
    )
    budget: str | None = option(
        None,
        "let perplexity on --general rise by at most this much: 1%, or 0.01nats; sets the "
        "strength. With --general none the rise is predicted by --importance, and not checked "
        "(docs/budget.md)",
        group="budget",
    )
    layers: Any = option(
        None,
        "layer coefficients: uniform, softmax, scale-free; a list over depth or a map of kinds "
        "in YAML",
        group="holding",
        metavar="HOW",
    )
    per: str = option(
        "weight",
        "coefficients for each weight, or shared by the weights of a block",
        group="holding",
        choices=("weight", "block"),
    )
    tau: float = option(None, "temperature of the softmax over layers", group="holding")
    anchor: str = option(
        None,
        "hold towards the base model, or towards the adapter at the end of recording",
        group="holding",
        choices=("base", "recorded"),
    )
    offload_importance: bool = option(
        False,
        "keep importance in CPU memory and bring it to the GPU one weight at a time",
        group="holding",
        decides=RUNNING,
    )
    full: bool = option(
        False, "train the target weights themselves instead of an adapter", group="adapter"
    )
    learning_rate: float = same(RecordOptions, "learning_rate")
    schedule: str = option(
        "linear",
        "learning-rate schedule",
        group="training",
        choices=("linear", "cosine", "constant"),
    )
    warmup: float = option(
        0.0,
        "fraction of the steps that warm up the learning rate",
        group="training",
        at_least=0,
    )
    weight_decay: float = option(0.0, "AdamW weight decay", group="training", at_least=0)
    max_grad_norm: float = option(
        1.0,
        "clip the gradient of the task loss to this norm; 0: never. The pull is added after "
        "clipping",
        group="training",
        at_least=0,
    )
    epochs: float = option(None, "passes over the data", group="training", above=0)
    max_steps: int = option(
        -1, "stop after this many optimizer steps; -1: epochs decide", group="training"
    )
    batch_size: int = same(RecordOptions, "batch_size")
    accumulation: int = same(RecordOptions, "accumulation")
    length: int = same(RecordOptions, "length")
    packing: bool = option(False, "pack several documents into one sequence", group="data")
    completion_only: bool | None = option(
        None,
        "score only completions or assistant turns; default: yes where the data has them",
        group="data",
    )
    gradient_checkpointing: bool = same(RecordOptions, "gradient_checkpointing")
    eval_data: str | None = option(
        None,
        "held-out domain data, evaluated before, during and after; with several domains one for "
        "each, in their order",
        group="measuring",
        decides=MEASURED,
        metavar="DATA",
        repeated=True,
        reads=True,
    )
    eval_split: str | None = option(
        None,
        "split of a Hub dataset given by --eval-data; default: test, or the held-out split of a "
        "task",
        group="measuring",
        decides=MEASURED,
    )
    eval_steps: int = option(
        0,
        "evaluate on --eval-data every so many steps; 0: only before and after",
        group="measuring",
        at_least=0,
        decides=RUNNING,
    )
    tasks: str | None = option(
        None,
        "tasks to evaluate before and after: sciq,piqa=test.jsonl,...",
        group="measuring",
        decides=MEASURED,
        metavar="NAMES",
        reads=True,
    )
    behaviours: int | None = option(
        None,
        "also compare how the base and the tuned model behave, on so many prompts of ours (and all "
        "of --prompts): do answers end, repeat, obey, parse (docs/behaviours.md); 200 say much",
        group="measuring",
        at_least=2,
        decides=MEASURED,
        later=True,
    )
    limit: int | None = option(
        None,
        "evaluate at most this many documents or questions",
        group="measuring",
        at_least=1,
        decides=MEASURED,
    )
    against_plain: bool = option(
        False,
        "also make a run of --method plain in DIR/plain, which the report shows beside this one",
        group="output",
        decides=RUNNING,
        later=True,
    )
    save_steps: int = option(
        200,
        "checkpoint every so many steps",
        group="output",
        at_least=1,
        decides=RUNNING,
    )
    log_steps: int = option(
        10, "log every so many steps", group="output", at_least=1, decides=RUNNING
    )
    report_to: str = option(
        "none",
        "where the trainer reports",
        group="output",
        choices=REPORTERS,
        decides=RUNNING,
    )
    push_to_hub: str | None = option(
        None,
        "also upload final/, with its model card, to this Hub repository; with --budget only "
        "where it is met",
        group="output",
        decides=RUNNING,
        metavar="NAME",
    )
    private: bool | None = same(RecordOptions, "private")
    resume: bool = option(
        False,
        "go on from the last checkpoint in --out",
        group="output",
        decides=RUNNING,
    )
    overwrite: bool = option(
        False, "replace a finished run in --out", group="output", decides=RUNNING
    )
