"""Options of the verbs that take a finished adapter: eval, shrink and merge."""

from __future__ import annotations

from dataclasses import dataclass

from forgetless.options.model import DTYPES, BudgetOptions, ModelOptions, TextOptions
from forgetless.options.option import MEASURED, RUNNING, option, same
from forgetless.options.tune import TuneOptions


@dataclass(frozen=True)
class EvalOptions(TextOptions, ModelOptions):
    """Options of `forgetless eval`: what was learned, and what was lost."""

    adapter: str | None = option(
        None,
        "PEFT adapter to compare with the bare base model",
        group="model",
        metavar="DIR",
        reads=True,
    )
    tuned: str | None = option(
        None,
        "fully fine-tuned model to compare with MODEL",
        group="model",
        metavar="DIR",
        reads=True,
    )
    data: str | None = option(
        None,
        "held-out domain data: a file, a Hub dataset, or a task (sciq=test.jsonl)",
        group="data",
        decides=MEASURED,
        metavar="DATA",
        reads=True,
    )
    data_split: str | None = option(
        None,
        "split of a Hub dataset given by --data; default: test, or the held-out split of a task",
        group="data",
        decides=MEASURED,
    )
    columns: str | None = option(
        None,
        "columns of --data under names of their own: prompt=question,completion=answer "
        "(docs/data.md)",
        group="data",
        decides=MEASURED,
        metavar="OURS=YOURS",
    )
    tasks: str | None = option(
        None,
        "tasks, by name or with a local file: sciq,arc_easy=test.jsonl; any lm-eval task; 'chat' "
        "or chat=FOLDER for five that suit chat models",
        group="measuring",
        decides=MEASURED,
        metavar="NAMES",
        reads=True,
    )
    shots: int = option(
        0,
        "worked examples before each question",
        group="measuring",
        at_least=0,
        decides=MEASURED,
    )
    behaviours: int | None = same(TuneOptions, "behaviours")
    limit: int | None = same(TuneOptions, "limit")
    length: int | None = option(
        None,
        "window in tokens; default: the model's context, at most 2048",
        group="measuring",
        at_least=2,
        decides=MEASURED,
    )
    stride: int | None = option(
        None,
        "tokens that a sliding window moves by; default: half the window",
        group="measuring",
        at_least=1,
        decides=MEASURED,
    )
    batch_tokens: int = option(
        None,
        "tokens per forward pass; default: 4096, on a CPU 1024",
        group="measuring",
        at_least=1,
        decides=RUNNING,
    )
    scale: float = option(
        1.0, "evaluate the adapter's update times this number", group="model", at_least=0
    )
    authors_perplexity: bool = option(
        False,
        "also print 2^nats, the figure that the paper's code calls perplexity",
        group="output",
        decides=RUNNING,
    )
    out: str | None = option(
        None, "folder for run.json", group="output", decides=RUNNING, metavar="DIR"
    )


@dataclass(frozen=True)
class ShrinkOptions(BudgetOptions, TextOptions, ModelOptions):
    """Options of `forgetless shrink`: a finished adapter made to keep a forgetting budget."""

    model: str = option(
        "",
        "base model; default: the one that the adapter names",
        group="model",
        metavar="MODEL",
        reads=True,
    )
    adapter: str = option(
        "",
        "PEFT adapter (LoRA, rsLoRA), whoever trained it: a local folder",
        group="model",
        positional=True,
        metavar="ADAPTER",
        reads=True,
    )
    importance: str | None = option(
        None,
        "importance file of `forgetless record` for the base model, its folder or a Hub name",
        group="holding",
        metavar="FILE",
        reads=True,
    )
    budget: str | None = option(
        None,
        "let perplexity on --general rise by at most this much: 1%, or 0.01nats; without "
        "--general and with --method scale the rise is predicted by --importance, and not checked",
        group="budget",
    )
    data: str | None = option(
        None,
        "held-out domain data, on which learning is measured: a file, a Hub dataset, or a task "
        "(sciq=test.jsonl)",
        group="data",
        decides=MEASURED,
        metavar="DATA",
        reads=True,
    )
    data_split: str | None = same(EvalOptions, "data_split")
    columns: str | None = same(EvalOptions, "columns")
    method: str = option(
        "shrink",
        "shrink along importance, or scale all of the update",
        group="method",
        choices=("shrink", "scale"),
    )
    mu: float | None = option(
        None,
        "shrink by 1 / (1 + mu importance), importance in units of what the update meets on "
        "average; instead of --budget",
        group="method",
        at_least=0,
    )
    limit: int | None = option(
        None,
        "use at most this many documents of --general and rows of --data",
        group="measuring",
        at_least=1,
        decides=MEASURED,
    )
    out: str = option(
        "",
        "folder to write, new or empty: final/ (the adapter), run.json",
        group="output",
        decides=RUNNING,
        metavar="DIR",
    )


@dataclass(frozen=True)
class MergeOptions:
    """Options of `forgetless merge`: an adapter made part of its base model."""

    adapter: str = option(
        "",
        "adapter folder, or the folder of a run",
        group="model",
        positional=True,
        metavar="ADAPTER",
        reads=True,
    )
    model: str | None = option(
        None,
        "base model; default: the one that the adapter names",
        group="model",
        metavar="MODEL",
        reads=True,
    )
    out: str = option("", "folder to write", group="output", decides=RUNNING, metavar="DIR")
    dtype: str | None = option(
        None,
        "dtype of the merged weights; default: the base's",
        group="output",
        choices=DTYPES,
    )
