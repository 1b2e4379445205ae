"""Options of `forgetless record`, and its presets."""

from __future__ import annotations

from dataclasses import dataclass

from forgetless.options.estimators import ESTIMATORS
from forgetless.options.model import AdapterOptions, ModelOptions, TextOptions
from forgetless.options.option import RUNNING, Given, option

# The presets of `record` and of `tune`.
PRESETS = ("default", "paper")


@dataclass(frozen=True)
class RecordOptions(AdapterOptions, TextOptions, ModelOptions):
    """Options of `forgetless record`: once per base model, on general text, into one importance
    file.
    """

    out: str = option(
        "",
        "importance file to write (.safetensors); without it the file goes into the cache, where "
        "tune finds it",
        group="output",
        decides=RUNNING,
        metavar="FILE",
    )
    preset: str = option(
        "default",
        "default: our recipe; paper: Song et al. 2025 (arXiv 2501.13669)",
        group="importance",
        choices=PRESETS,
    )
    estimator: str = option(
        None,
        "how importance is estimated; all but path make one pass over the text without training: "
        + "; ".join(f"{name}: {row.help}" for name, row in ESTIMATORS.items()),
        group="importance",
        choices=ESTIMATORS,
    )
    labels: str = option(
        "empirical",
        "labels of fisher and kronecker: the text's own tokens, or sampled from the model",
        group="importance",
        choices=("empirical", "sampled"),
    )
    cov_rank: int = option(
        None,
        "kronecker: keep covariances as this rank + constant diagonal; 0: whole",
        group="importance",
        at_least=0,
    )
    gradient: str = option(
        None,
        "gradient of the path integral: exact dL/dU, or the paper's effective gradient",
        group="importance",
        choices=("exact", "effective"),
    )
    clamp: str = option(
        None,
        "clamp credits at zero after every step (the paper) or at the end of an epoch",
        group="importance",
        choices=("step", "end"),
    )
    xi: float = option(
        None, "added to the squared movement before dividing by it", group="importance", above=0
    )
    tier: str | None = option(
        None,
        "form of the file: f32, bf16, factored[:K], kronecker[:K]; default: as the estimator "
        "records it",
        group="importance",
        metavar="TIER",
    )
    groups: int | None = option(
        None,
        "kronecker and fisher: see the weights in this many groups, one pass over the text each, "
        "for less memory; default: as few as fit",
        group="training",
        at_least=1,
        decides=RUNNING,
    )
    offload: bool = option(
        False,
        "path: keep credits and importance in CPU memory while training on a GPU",
        group="training",
        decides=RUNNING,
    )
    keep_anchor: bool = option(
        True,
        "store the adapter at the end of recording, for anchor: recorded",
        group="importance",
    )
    keep_answers: int | None = option(
        None,
        "with --general chat or self: also keep this many of the answers in the file, with the "
        "base's probabilities, for tune --method kl --replay kept",
        group="importance",
        at_least=1,
    )
    documents: int | None = option(
        None, "use at most this many documents", group="data", at_least=1
    )
    calibrate: bool = option(
        False,
        "also measure what fine-tuning costs in general loss, by nine short trainings, so that "
        "tune --budget can do without --general (docs/budget.md)",
        group="budget",
    )
    length: int = option(
        None,
        "tokens per sequence; default: preset, at most the model's context",
        group="data",
        at_least=2,
    )
    epochs: int = option(None, "passes over the general text", group="training", above=0)
    max_steps: int | None = option(None, "stop after this many optimizer steps", group="training")
    batch_size: int = option(None, "sequences per forward pass", group="training", at_least=1)
    accumulation: int = option(
        None, "forward passes per optimizer step", group="training", at_least=1
    )
    learning_rate: float = option(None, "AdamW learning rate", group="training", above=0)
    schedule: str = option(
        None, "learning-rate schedule", group="training", choices=("linear", "constant")
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass", group="training"
    )
    save_steps: int = option(
        100,
        "write a state to resume from every so many steps",
        group="output",
        at_least=1,
        decides=RUNNING,
    )
    resume: bool = option(False, "go on from the last saved state", group="output", decides=RUNNING)
    overwrite: bool = option(
        False, "replace a finished file in --out", group="output", decides=RUNNING, later=True
    )
    push_to_hub: str | None = option(
        None,
        "also upload the file, with a model card, to this Hub repository",
        group="output",
        decides=RUNNING,
        metavar="NAME",
    )
    private: bool | None = option(
        None,
        "make the repository of --push-to-hub private, where it is new",
        group="output",
        decides=RUNNING,
    )


RECORD_PRESETS: dict[str, Given] = {
    # Song et al. 2025, section "Experiments". Their base in 8 bit is left to --quantize 8bit, and
    # padding is masked, unlike in their released code.
    "paper": dict(
        estimator="path",
        targets="q_proj,v_proj",
        rank=8,
        alpha=32.0,
        dropout=0.1,
        gradient="effective",
        clamp="step",
        xi=1e-9,
        documents=2000,
        length=800,
        epochs=5,
        batch_size=20,
        accumulation=4,
        learning_rate=8e-4,
        schedule="linear",
    ),
    "default": dict(
        estimator="kronecker",
        cov_rank=64,
        targets="all-linear",
        rank=8,
        alpha=32.0,
        dropout=0.0,
        gradient="exact",
        clamp="step",
        xi=1e-9,
        length=1024,
        epochs=1,
        batch_size=4,
        accumulation=4,
        learning_rate=5e-4,
        schedule="constant",
    ),
}
