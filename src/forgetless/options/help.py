"""What `--help` shows of a verb: the options that most people need, a line each, or with
`--help-all` every option with all that is to be said of it.

OFTEN names the first for the verbs that have many options; of a verb that is not named there all
options are shown. A text stands in the place of the option's own where that is too long for a line.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping

from forgetless.options.option import Given, flag
from forgetless.options.verbs import Verb

# Columns before the help of an option.
HELP_FROM = 23
# Groups of options that stand under the heading of another one.
UNDER = {"method": "holding"}
GENERAL_TEXT = "chat (answers of the model itself), self, a file or a Hub dataset"
MODEL_OPTIONS = {
    "model": "a Hub name or a local folder",
    "dtype": "auto, float32, bfloat16 or float16",
    "device": "auto, cpu, cuda, cuda:1 or mps",
    "quantize": "load the base in 4bit or 8bit",
}
# Verb -> the options that most people need -> a text in the place of the option's own, or "".
OFTEN: dict[str, dict[str, str]] = {
    "record": {
        **MODEL_OPTIONS,
        "general": GENERAL_TEXT,
        "prompts": "chat: a file with prompts of yours, asked beside ours",
        "answers": "chat, self: how many answers to record on",
        "documents": "",
        "length": "tokens per sequence",
        "estimator": "how importance is estimated; --help-all says how",
        "tier": "form of the file: f32, bf16, factored, kronecker:16",
        "keep_answers": "chat, self: keep so many answers in the file, for kl",
        "targets": "weights to look at: names, all-linear or an expression",
        "calibrate": "measure what tuning costs, to budget without a text",
        "preset": "paper: Song et al. 2025 (arXiv 2501.13669)",
        "batch_size": "",
        "gradient_checkpointing": "recompute activations, for less memory",
        "out": "",
        "resume": "",
        "push_to_hub": "also upload to this Hub repository",
    },
    "plan": {
        **MODEL_OPTIONS,
        "targets": "weights to adapt: names or all-linear",
        "rank": "",
        "full": "train the weights themselves, without an adapter",
        "estimator": "how importance is estimated",
        "tier": "form of the file that tuning reads: u8, kronecker:16",
        "tokens": "",
        "length": "",
        "general_tokens": "",
        "gradient_checkpointing": "recompute activations, for less memory",
        "processes": "",
        "engine": "ddp, or fsdp: weights and states are sharded",
        "flops": "operations per second of a device, as 400e12",
        "json": "",
    },
    "tune": {
        **MODEL_OPTIONS,
        "data": "what to learn: file, Hub dataset or task",
        "general": "what must not be lost: " + GENERAL_TEXT,
        "length": "tokens per sequence",
        "targets": "weights to adapt: names or all-linear",
        "rank": "",
        "alpha": "the update is scaled by alpha / rank",
        "full": "train the weights themselves, without an adapter",
        "importance": "importance file of record, or its Hub name",
        "method": "hold, kl, replay, plain and others (--help-all)",
        "replay": "kl, replay: text used while tuning, as --general",
        "strength": "how hard to hold; default: what suits the file",
        "budget": "let perplexity on --general rise by at most this: 1%",
        "after": "go on from this finished run, and hold it too",
        "preset": "paper: Song et al. 2025 (arXiv 2501.13669)",
        "learning_rate": "",
        "epochs": "",
        "max_steps": "at most so many steps; -1: epochs decide",
        "batch_size": "",
        "accumulation": "",
        "gradient_checkpointing": "recompute activations, for less memory",
        "eval_data": "held-out domain data: what was learned",
        "tasks": "tasks before and after: sciq, piqa=test.jsonl, chat",
        "behaviours": "compare behaviour on so many prompts; 200 say much",
        "out": "folder to write",
        "report_to": "none, tensorboard, wandb, trackio or others",
        "push_to_hub": "also upload to this Hub repository",
        "resume": "",
        "overwrite": "",
    },
    "check": {
        "model": MODEL_OPTIONS["model"],
        "tuned": "an adapter, a merged model or a run",
        **MODEL_OPTIONS,
        "general": GENERAL_TEXT,
        "own_answers": "answers of the base that an earlier check wrote",
        "prompts": "chat: a file with prompts of yours, asked beside ours",
        "answers": "chat, self: how many answers are measured on",
        "answer_length": "chat, self: tokens of an answer at most",
        "data": "domain data, for the behaviour 'domain leak'",
        "budget": "perplexity may rise by at most this much: 5%",
        "behaviour": "json=-2%, repeats=+1%; may be given several times",
        "task": "arc_easy=-1%; may be given several times",
        "bounds": "YAML with budget, behaviours and tasks",
        "strict": "exit code 3 also where a bound is not shown to be kept",
        "tasks": "files of the tasks: arc_easy=test.jsonl,sciq",
        "shots": "",
        "limit": "ask at most so many questions of a task",
        "behaviours": "ask at most so many prompts for the behaviours",
        "fast": "sample nothing: cached answers, and tasks that rank",
        "out": "folder for run.json, page, summary.md, junit.xml",
    },
    "eval": {
        **MODEL_OPTIONS,
        "adapter": "adapter to compare with the bare model",
        "tuned": "fully fine-tuned model to compare with MODEL",
        "general": "what must not be lost: " + GENERAL_TEXT,
        "prompts": "chat: a file with prompts of yours, asked beside ours",
        "data": "held-out domain data: what was learned",
        "tasks": "sciq, arc_easy=test.jsonl, any of lm-eval, or chat",
        "behaviours": "compare behaviour on so many prompts; 200 say much",
        "limit": "use at most so many documents or questions",
        "length": "",
        "scale": "evaluate the adapter's update times this number",
        "out": "",
    },
    "shrink": {
        "adapter": "adapter, whoever trained it: a local folder",
        "model": "base model; default: as the adapter names it",
        "device": "auto, cpu, cuda, cuda:1 or mps",
        "general": "what must not be lost: " + GENERAL_TEXT,
        "data": "held-out domain data: what was learned",
        "importance": "importance file of record for the base model",
        "method": "shrink along importance, or scale all of the update",
        "budget": "let perplexity on --general rise by at most this: 1%",
        "mu": "instead of --budget: how hard to shrink",
        "limit": "use at most so many documents and rows",
        "out": "",
    },
}


class OneName(argparse.RawDescriptionHelpFormatter):
    """Shows an option under one name, where argparse repeats what a switch is turned off by."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=HELP_FROM)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0]
        return super()._format_action_invocation(action)


def help_of(verb: Verb, spec: dataclasses.Field, brief: str, *, full: bool) -> str:
    """The help of an option, whether it must be given, and its default, with `full` also what other
    presets set; `brief` stands in the place of its own text.
    """
    text = brief or str(spec.metadata["help"])
    if spec.name in verb.needed:
        text += " (required)"
    if default := _default_of(verb, spec, full=full):
        text += f" [{default}]"
    return text.replace("%", "%%")


def _default_of(verb: Verb, spec: dataclasses.Field, *, full: bool) -> str:
    """The default of an option; "" where there is nothing to say."""
    presets: Mapping[str, Given] = verb.presets or {}
    decided = {name: values[spec.name] for name, values in presets.items() if spec.name in values}
    if spec.default is True:
        return f"on; {flag('no_' + spec.name)} turns it off"
    if not decided:
        unsaid = spec.default is None or spec.default is False or spec.default == ""
        return "" if unsaid else str(spec.default)
    usual = decided.pop("default", None)
    others = [f"{name}: {value}" for name, value in decided.items() if full and value != usual]
    return "; ".join([*([] if usual is None else [str(usual)]), *others])
