"""Options that several verbs share: which model, which general text, which adapter.

The options of a verb are a frozen dataclass that inherits from these, so that `--device` means the
same everywhere, and a function that only loads a model takes a ModelOptions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from forgetless.options.option import MEASURED, RUNNING, option

Options = TypeVar("Options")
# The dtypes that weights can be loaded in.
DTYPES = ("auto", "float32", "bfloat16", "float16")
# The options below that say what is asked of a model whose own answers are the general text.
OWN_TEXT_OPTIONS = ("prompts", "answers", "answer_length")


@dataclass(frozen=True)
class ModelOptions:
    """What every verb that loads a model accepts."""

    model: str = option(
        "",
        "model: a Hub name or a local folder",
        group="model",
        positional=True,
        metavar="MODEL",
        reads=True,
    )
    revision: str | None = option(None, "Hub revision of the model", group="model")
    dtype: str = option(
        "auto",
        "dtype of the weights; auto takes what the checkpoint says",
        group="model",
        choices=DTYPES,
    )
    device: str = option(
        "auto", "device: auto, cpu, cuda, cuda:1, mps", group="model", decides=RUNNING
    )
    quantize: str = option(
        "none",
        "load the base in 4 or 8 bit (needs bitsandbytes)",
        group="model",
        choices=("none", "4bit", "8bit"),
    )
    trust_remote_code: bool = option(
        False,
        "run Python code that comes with the model; only for models you trust",
        group="model",
    )
    threads: int | None = option(
        None,
        "CPU threads; default: torch decides",
        group="model",
        at_least=1,
        decides=RUNNING,
    )
    seed: int = option(0, "seed of every random choice", group="model", at_least=0)


@dataclass(frozen=True)
class AdapterOptions:
    """LoRA as PEFT builds it."""

    targets: str = option(
        None,
        "weights to adapt: names (q_proj,v_proj), all-linear, or a regular expression; default: "
        "preset",
        group="adapter",
        metavar="NAMES",
    )
    rank: int = option(None, "LoRA rank r", group="adapter", at_least=1)
    alpha: float = option(
        None, "LoRA alpha; the update is scaled by alpha / rank", group="adapter", above=0
    )
    dropout: float = option(None, "LoRA dropout", group="adapter", at_least=0, below=1)
    rslora: bool = option(False, "scale the update by alpha / sqrt(rank)", group="adapter")


@dataclass(frozen=True)
class BudgetOptions:
    """What a budget may be kept on."""

    allow_recorded_text: bool = option(
        False,
        "keep --budget also on a --general text that the importance was recorded on, where its "
        "interval promises too much (docs/budget.md)",
        group="budget",
        decides=RUNNING,
        later=True,
    )


@dataclass(frozen=True)
class TextOptions:
    """General text: documents or chats that stand for what the model must not lose.

    `record` reads it to find what matters; for every other verb it is what forgetting is measured
    on.
    """

    general: str | None = option(
        None,
        "what must not be lost: 'chat' (the model's own answers to prompts of ours), 'self' (text "
        "that it writes by itself), a file (.txt, .jsonl, .json, .csv, .parquet) or a Hub "
        "dataset; one of the first two and a text with a comma",
        group="data",
        decides=MEASURED,
        metavar="TEXT",
        reads=True,
    )
    text_column: str | None = option(
        None,
        "column that holds the text; default: text, content or messages",
        group="data",
        decides=MEASURED,
    )
    general_split: str = option("train", "split of a Hub dataset", group="data", decides=MEASURED)
    prompts: str | None = option(
        None,
        "with 'chat': a file with prompts of yours (columns prompt or messages), asked beside ours",
        group="data",
        later=True,
        metavar="FILE",
        reads=True,
    )
    answers: int = option(
        64,
        "with 'chat' and 'self': how many answers of the model make a part (recorded on, held to, "
        "checked)",
        group="data",
        at_least=2,
        later=True,
    )
    answer_length: int = option(
        256,
        "with 'chat' and 'self': tokens of an answer at most",
        group="data",
        at_least=2,
        later=True,
    )
