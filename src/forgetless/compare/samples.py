"""What models say to a few held-out prompts of each domain, for people to read.

DIR/samples.json      the base, plain fine-tuning, and each method that holds by importance
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from forgetless.compare.experiment import Experiment
from forgetless.compare.job import Job
from forgetless.data.chats import Chat, fitted, templated
from forgetless.data.documents import Row
from forgetless.data.domain import chat_of, load_training_data
from forgetless.data.turns import turn_text
from forgetless.files.compare_json import Sample
from forgetless.files.schema import write_record
from forgetless.model.adapter_files import load_tuned
from forgetless.model.linear import unwrapped
from forgetless.model.loading import context_length, load_tokenizer
from forgetless.model.precision import load_to_train
from forgetless.options.model import ModelOptions
from forgetless.options.verbs import resolve

# Prompts of each domain that are answered: as many as a page can show.
SAMPLES = 3
# Tokens of an answer: as long as can be read beside the others.
SAMPLE_TOKENS = 40


def answer(
    experiment: Experiment, jobs: Sequence[Job], files: Mapping[str, str], out: Path
) -> None:
    """Greedy answers to a few held-out prompts by the base, plain and each method of the family
    `hold`. `jobs` are the runs that stand for their methods.
    """
    samples: list[Sample] = []
    options = resolve(ModelOptions, experiment.model)
    tokenizer = load_tokenizer(options)
    for domain in experiment.domains:
        rows = load_training_data(files[f"domain/{domain}/test"], limit=SAMPLES)
        prompts = [_prompt_of(row) for row in rows]
        answered = [Sample(domain, said, reference) for said, reference, _ in prompts]
        shown = _runs_shown(experiment, jobs, domain)
        for method in ("base", *shown):
            if method == "base":
                model = load_to_train(options)
            else:
                model = load_tuned(options, shown[method].folder / "adapter")
            for sample, (said, _, chat) in zip(answered, prompts, strict=True):
                sample.outputs[method] = _continued(model, tokenizer, said, chat)
        samples += answered
    write_record(out / "samples.json", samples)


def _runs_shown(experiment: Experiment, jobs: Sequence[Job], domain: str) -> dict[str, Job]:
    """The run of each method whose answers are shown: the last of its seeds."""
    wanted = {experiment.reference}
    wanted |= {label for label, method in experiment.methods.items() if method.family == "hold"}
    return {
        job.trial.method: job
        for job in jobs
        if job.trial.domain == domain
        and job.trial.method in wanted
        and not job.options.full
        and (job.folder / "adapter").is_dir()
    }


def _prompt_of(row: Row) -> tuple[str, str, Chat | None]:
    """(prompt, what should follow, the chat up to there) of a row of domain data; running text is
    cut in the middle, a chat before its last turn.
    """
    if "prompt" in row:
        return row["prompt"], row["completion"], None
    if "text" in row:
        words = row["text"].split(" ")
        middle = max(1, len(words) // 2)
        return " ".join(words[:middle]), " ".join(words[middle:]), None
    *before, last = row["messages"]
    chat = chat_of(row).upto(len(before))
    return "\n".join(map(turn_text, before)), turn_text(last), chat


def _continued(model: nn.Module, tokenizer: Any, prompt: str, chat: Chat | None) -> str:
    """What the model says next: after a chat, as its template has it, or after `prompt`."""
    context = context_length(unwrapped(model))
    new = min(SAMPLE_TOKENS, context // 2)
    if chat is not None and chat.messages:
        given = templated(tokenizer, fitted(chat, tokenizer), prompt=True)
    else:
        given = tokenizer(prompt)["input_ids"]
    if not given:
        return ""
    ids = torch.tensor([given[new - context :]], device=next(model.parameters()).device)
    generate: Any = model.generate
    with torch.no_grad():
        answered = generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    return str(tokenizer.decode(answered[0, ids.shape[1] :], skip_special_tokens=True))
