"""What people type who know other libraries, and which of our names is meant.

    in_our_words(["--lr", "1e-4"], fields)        # ["--learning-rate", "1e-4"]
    option_meant("load_in_4bit", fields)          # "give --quantize 4bit"
    verb_meant("finetune", VERBS)                 # "did you mean 'tune'?"

Names of transformers, TRL and PEFT that take the same values are accepted on the command line. The
others are answered with what to type. In files and in Python an option has one name.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from forgetless.errors import nearest
from forgetless.options.option import flag

# Names of other libraries -> ours, which mean the same and take the same values.
SAME_OPTION = {
    "lr": "learning_rate",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "bs": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "grad_accum": "accumulation",
    "max_length": "length",
    "max_seq_length": "length",
    "max_seq_len": "length",
    "cutoff_len": "length",
    "context_length": "length",
    "lora_r": "rank",
    "lora_rank": "rank",
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "lora_target_modules": "targets",
    "lora_target": "targets",
    "use_rslora": "rslora",
    "lr_scheduler_type": "schedule",
    "lr_scheduler": "schedule",
    "output_dir": "out",
    "output": "out",
    "output_file": "out",
    "dataset": "data",
    "dataset_name": "data",
    "train_file": "data",
    "train_data": "data",
    "dataset_train_split": "data_split",
    "eval_dataset": "eval_data",
    "validation_file": "eval_data",
    "eval_file": "eval_data",
    "val_data": "eval_data",
    "model": "model",
    "model_name": "model",
    "model_name_or_path": "model",
    "base_model": "model",
    "pretrained_model_name_or_path": "model",
    "model_revision": "revision",
    "torch_dtype": "dtype",
    "logging_steps": "log_steps",
    "checkpoint_steps": "save_steps",
    "overwrite_output_dir": "overwrite",
    "hub_model_id": "push_to_hub",
    "dataset_text_field": "text_column",
    "text_field": "text_column",
    "completion_only_loss": "completion_only",
    "assistant_only_loss": "completion_only",
    "max_new_tokens": "max_tokens",
    "num_fewshot": "shots",
    "system_prompt": "system",
    "lambda": "strength",
    "ewc_lambda": "strength",
    "kl_coef": "kl_weight",
    "beta": "kl_weight",
    "kl_beta": "kl_weight",
    "max_samples": "limit",
}
# Names of other libraries -> our option, and what to type, where values mean something else.
INSTEAD = {
    "load_in_4bit": ("quantize", "--quantize 4bit"),
    "load_in_8bit": ("quantize", "--quantize 8bit"),
    "use_4bit": ("quantize", "--quantize 4bit"),
    "qlora": ("quantize", "--quantize 4bit"),
    "bits": ("quantize", "--quantize 4bit"),
    "bf16": ("dtype", "--dtype bfloat16"),
    "fp16": ("dtype", "--dtype float16"),
    "fp32": ("dtype", "--dtype float32"),
    "cpu": ("device", "--device cpu"),
    "use_cpu": ("device", "--device cpu"),
    "no_cuda": ("device", "--device cpu"),
    "warmup_steps": ("warmup", "--warmup with a fraction of the steps"),
    "warmup_ratio": ("warmup", "--warmup with a fraction of the steps"),
    "resume_from_checkpoint": ("resume", "--resume, which finds the last checkpoint in --out"),
    "use_peft": ("full", "nothing: an adapter is the default, and --full trains the weights"),
    "use_lora": ("full", "nothing: an adapter is the default, and --full trains the weights"),
    "lora": ("full", "nothing: an adapter is the default, and --full trains the weights"),
    "full_finetune": ("full", "--full"),
    "peft_method": ("method", "--method"),
    "ewc": ("method", "--method ewc-lora"),
    "kl": ("method", "--method kl"),
    "max_forgetting": ("budget", "--budget 1%"),
    "gpu": ("device", "--device cuda:0"),
    "force": ("overwrite", "--overwrite"),
    "verbose": ("debug", "--debug"),
}
# What people call a verb -> its name.
SAME_VERB = {
    "train": "tune",
    "finetune": "tune",
    "fine-tune": "tune",
    "sft": "tune",
    "fit": "tune",
    "learn": "tune",
    "hold": "tune",
    "evaluate": "eval",
    "test": "eval",
    "measure": "eval",
    "benchmark": "eval",
    "score": "eval",
    "fisher": "record",
    "importance": "record",
    "profile": "record",
    "estimate": "plan",
    "memory": "plan",
    "cost": "plan",
    "talk": "chat",
    "generate": "chat",
    "ask": "chat",
    "run": "chat",
    "sweep": "compare",
    "experiment": "compare",
    "bench": "compare",
    "rescue": "shrink",
    "prune": "shrink",
    "fix": "shrink",
    "page": "report",
    "html": "report",
    "show": "inspect",
    "info": "inspect",
    "describe": "inspect",
    "quantize": "convert",
    "fuse": "merge",
    "export": "merge",
    "example": "demo",
    "try": "demo",
    "gate": "check",
    "verify": "check",
}
# Words that say nothing of what an option does.
EMPTY_WORDS = frozenset("a the of to in on for and or with no use max min num per is as by".split())


def plain_name(word: str) -> str:
    """'--per-device-batch-size=4' -> 'per_device_batch_size'."""
    return word.lstrip("-").split("=", 1)[0].replace("-", "_").lower()


def in_our_words(words: Sequence[str], fields: Mapping[str, dataclasses.Field]) -> list[str]:
    """A command line with the names of other libraries replaced by ours, `--max_steps` by
    `--max-steps`, and `--packing True` by `--packing`; `fields` are the options of the verb.
    """
    said: list[str] = []
    for at, word in enumerate(words):
        option, value = _option_of(word, fields)
        before, given = _option_of(words[at - 1], fields) if at else (None, None)
        if option is None:
            taken = before is not None and _is_switch(before) and given is None
            if not (taken and _is_truth(word)):  # a truth value was said with its switch
                said.append(word)
        elif option.metadata["positional"]:
            said += [] if value is None else [value]
        elif _is_switch(option):
            following = words[at + 1] if at + 1 < len(words) else ""
            truth = following if value is None and _is_truth(following) else value
            off = plain_name(word) == f"no_{option.name}" or (truth or "true").lower() == "false"
            said.append(flag(f"no_{option.name}" if off else option.name))
        else:
            said.append(flag(option.name) + ("" if value is None else f"={value}"))
    return said


def _option_of(
    word: str, fields: Mapping[str, dataclasses.Field]
) -> tuple[dataclasses.Field | None, str | None]:
    """The option that a word of the command line names, by our name or another, and its value where
    that is in the same word; None for any other word.
    """
    if not word.startswith("--"):
        return None, None
    name = plain_name(word)
    if name not in fields:
        name = SAME_OPTION.get(name, name.removeprefix("no_"))
    if name not in fields:
        return None, None
    _, given, value = word.partition("=")
    return fields[name], value if given else None


def _is_switch(option: dataclasses.Field) -> bool:
    return str(option.type).startswith("bool")


def _is_truth(word: str) -> bool:
    return word.lower() in ("true", "false")


def on_command_line(option: dataclasses.Field) -> str:
    """How an option is written on the command line."""
    metadata = option.metadata
    return str(metadata["metavar"]) if metadata["positional"] else flag(option.name)


def option_meant(
    typed: str,
    fields: Mapping[str, dataclasses.Field],
    written: Callable[[dataclasses.Field], str] = on_command_line,
) -> str:
    """End of an error message: which option is meant by a name that is none; "" where nobody knows.
    `written` is how an option is written there.

    A name of another library counts most, then one that differs by a letter or two, then one that
    has a word in common, then one whose help has the word.
    """
    name = plain_name(typed)
    if name in INSTEAD and INSTEAD[name][0] in fields:
        return f"give {INSTEAD[name][1]}"
    if SAME_OPTION.get(name) in fields:
        return f"did you mean '{written(fields[SAME_OPTION[name]])}'?"
    for cutoff in (0.8, 0.6):
        if close := difflib.get_close_matches(name, fields, n=1, cutoff=cutoff):
            return f"did you mean '{written(fields[close[0]])}'?"
        if like := _with_words_of(name, fields):
            shown = [f"'{written(fields[each])}'" for each in like]
            return f"did you mean {' or '.join(shown)}?"
    return ""


def _with_words_of(name: str, fields: Mapping[str, dataclasses.Field]) -> list[str]:
    """At most three options with the most words of `name` in their own, or else in their help."""
    words = _words_in(name.replace("_", " "))
    in_names = {each: len(words & _words_in(each.replace("_", " "))) for each in fields}
    in_help = {each: len(words & _words_in(fields[each].metadata["help"])) for each in fields}
    for counts in (in_names, in_help):
        most = max(counts.values(), default=0)
        if most and (like := [each for each in fields if counts[each] == most]) and len(like) <= 3:
            return like
    return []


def _words_in(text: str) -> set[str]:
    """The words of a text that say something, without the s of a plural."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {word.removesuffix("s") for word in words if word not in EMPTY_WORDS and len(word) > 1}


def verb_meant(typed: str, verbs: Iterable[str]) -> str:
    """End of an error message: which verb is meant by a word that is none."""
    known = list(verbs)
    meant = SAME_VERB.get(typed.lower().replace("_", "-"))
    return f"did you mean '{meant}'?" if meant in known else nearest(typed, known)
