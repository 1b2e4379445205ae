"""A general text that the model says itself: forgetting is then its divergence from the base.

    general: {chat: chat}                  # in the experiment's file
    paired = own_parts(experiment, base, tokenizer, "test", ["chat"])
    paired["chat"].measured(tuned).nats    # nats per token, 0 for the base

The three parts of such a text are answers to different prompts (evaluate/own_answers.py): what is
recorded and replayed, the control part, by which settings are chosen, and the check part, which
stands for the test part. The base's own numbers are zeros, answer by answer, so that a divergence
is paired with them, scaled and drawn as the rise of a loss is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from forgetless.compare.experiment import Experiment
from forgetless.data.own_text import OwnText
from forgetless.data.prompts.prompts import load_prompts
from forgetless.evaluate.paired_answers import PairedAnswers, paired_part
from forgetless.files.provenance import sha256_file
from forgetless.model.precision import load_to_train
from forgetless.options.model import ModelOptions

# The part of the answers that stands for a part of the data.
PART_OF_ANSWERS = {"validation": "control", "test": "check"}
# The answers of each general text that is the model's own, by its name.
OwnParts = Mapping[str, PairedAnswers]


def own_parts(
    experiment: Experiment, base: nn.Module, tokenizer: Any, part: str, texts: Iterable[str]
) -> dict[str, PairedAnswers]:
    """Those of `texts` that are the model's own, with what the bare base makes of them.

    Raises ValueError for fewer answers than an interval needs.
    """
    paired = {}
    for name in texts:
        answers = paired_part(base, tokenizer, experiment.own(name), PART_OF_ANSWERS[part])
        if answers is not None:
            paired[name] = answers
    return paired


def own_of_base(
    experiment: Experiment,
    options: ModelOptions,
    tokenizer: Any,
    part: str,
    texts: Iterable[str],
) -> dict[str, PairedAnswers]:
    """The same by the base of `options`, which is loaded for it; without it where no text is own.

    A model with an adapter is then asked with the adapter off, which is exact; any other is
    measured by what is stored of the base.
    """
    if not experiment.asking:
        return {}
    return own_parts(experiment, load_to_train(options), tokenizer, part, texts)


def text_of_record(experiment: Experiment, files: Mapping[str, str]) -> str:
    """What stands for the recorded general text in the options of `record` and `tune`: a file, or
    the word for what the model says itself.
    """
    own = experiment.own(experiment.recorded)
    return own.kind if own else files[f"general/{experiment.recorded}/record"]


def held_by_text(experiment: Experiment, files: Mapping[str, str], name: str, part: str) -> Any:
    """All that decides what one part of a general text holds, for the address of a run: a hash of
    its file, or how the model is asked.
    """
    own = experiment.own(name)
    return asked(own) if own else sha256_file(files[f"general/{name}/{part}"])


def asked(own: OwnText) -> list[Any]:
    """All that decides what a given model says: how it is asked, and to which prompts."""
    ours = "".join(sorted(prompt.id for prompt in load_prompts()))
    return [
        own.kind,
        own.answers,
        own.length,
        sha256_file(own.prompts) if own.prompts else None,
        hashlib.sha256(ours.encode()).hexdigest(),
    ]
