"""TODO options.model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from forgetless.options.option import option

Options = TypeVar("Options")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelOptions:
    """What every verb that loads a model accepts."""

    model: str = option("", "model: a Hub name or a local folder", positional=True, metavar="MODEL")
    revision: str | None = option(None, "Hub revision of the model")
    dtype: str = option(
        "auto", "dtype of the weights; auto takes what the checkpoint says", choices=DTYPES
    )
    device: str = option("auto", "device: auto, cpu, cuda, cuda:1, mps")
    quantize: str = option(
        "none", "load the base in 4 or 8 bit (needs bitsandbytes)", choices=("none", "4bit", "8bit")
    )
    trust_remote_code: bool = option(
        False, "run Python code that comes with the model; only for models you trust"
    )
    threads: int | None = option(None, "CPU threads; default: torch decides")
    seed: int = option(0, "seed of every random choice")


@dataclass(frozen=True)
class AdapterOptions:
    """LoRA as PEFT builds it."""

    targets: str = option(
        None,
        "weights to adapt: names (q_proj,v_proj), all-linear, or a regular expression; default: "
        "preset",
        metavar="NAMES",
    )
    rank: int = option(None, "LoRA rank r")
    alpha: float = option(None, "LoRA alpha; the update is scaled by alpha / rank")
    dropout: float = option(None, "LoRA dropout")
    rslora: bool = option(False, "scale the update by alpha / sqrt(rank)")


@dataclass(frozen=True)
class TextOptions:
    """General text: documents or chats that stand for what the model must not lose."""

    general: str | None = option(
        None,
        "general text: .txt, .jsonl, .json, .csv, .parquet, a Hub dataset, or 'self' (sampled "
        "from the model)",
        metavar="TEXT",
    )
    text_column: str | None = option(
        None, "column that holds the text; default: text, content or messages"
    )
    general_split: str = option("train", "split of a Hub dataset")
