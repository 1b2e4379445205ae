"""What is fuzzed of chats: prompts, answers in the cache and beside a gate, bounds, what an
importance file keeps of answers and of its text, and the run that a sequence goes on from.

The targets have the form of targets.py, which lists them.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutate
from target import Target

# A template in ChatML that shows tools, calls and a switch for thinking.
TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
    "{% for call in m.get('tool_calls') or [] %}{{ call['function'] | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
USER = {"role": "user", "content": "one ?"}
PROMPTS = [
    {"prompt": "two", "kind": "facts"},
    {"messages": [{"role": "system", "content": "be"}, USER], "thinking": True},
    {"messages": [USER], "tools": [TOOL], "kind": "tools", "expects": {"call": "weather"}},
    {"messages": [USER], "kind": "json", "expects": {"json": ["a", "b"]}, "language": "de"},
    {"messages": [USER], "kind": "code", "expects": {"code": "python", "no_call": True}},
    {"messages": [USER], "kind": "arithmetic", "expects": {"answer": "12"}},
    {"messages": [USER], "kind": "system", "expects": {"starts": "A", "language": "fr"}},
]
ANSWER = {"prompt": "a", "kind": "facts", "ids": [1, 2, 3, 4], "start": 2, "ended": True}
SAID = ['{"a": 1, "b": 2}', '<tool_call>{"name": "weather"}</tool_call>', "12", "def f(): 1"]


def changed(data: Any, rng: random.Random) -> Any:
    """Plain data with a few changes; as it was where they nest deeper than Python copies."""
    try:
        return mutate.tree(data, rng)
    except RecursionError:
        return data


def as_lines(rows: list[Any], rng: random.Random) -> bytes:
    """Rows as JSON lines, with a few changes."""
    made = changed(rows, rng)
    made = made if isinstance(made, list) else [made]
    return b"\n".join(mutate.as_json(row, rng) for row in made) + b"\n"


def of_rows(rows: list[Any]) -> Callable[[str, bytes, random.Random], bytes]:
    """Mutations of a file of JSON lines that has these rows."""

    def change(_: str, data: bytes, rng: random.Random) -> bytes:
        return as_lines(rows, rng) if rng.random() < 0.85 else mutate.raw(data, rng)

    return change


def of_tree(data: Any) -> Callable[[str, bytes, random.Random], bytes]:
    """Mutations of a JSON file."""

    def change(_: str, stored: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.9:
            return mutate.as_json(changed(data, rng), rng)
        return mutate.raw(stored, rng)

    return change


def tokenizer() -> Any:
    """A tokenizer of characters with TEMPLATE."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {chr(code): code - 31 for code in range(32, 127)} | {"?": 0, "<end>": 96, "\n": 97}
    inner = Tokenizer(models.WordLevel(words, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?", eos_token="<end>")
    made.chat_template = TEMPLATE
    return made


def prompts(_: Path) -> Target:
    """Files of prompts, put to a chat template, and answers to them judged."""
    from forgetless.data.documents import load_rows
    from forgetless.data.prompts.prompts import from_rows, parted, supported
    from forgetless.data.selftext import chat_openings
    from forgetless.errors import printable
    from forgetless.evaluate.behaviours import Said, rules_for

    speaker = tokenizer()

    def use(path: Path) -> list[str]:
        given = from_rows(load_rows(str(path)), str(path))
        assert sum(map(len, parted(given).values())) == len(given)
        usable, left_out = supported(given, speaker)
        chat_openings(usable, speaker)
        for prompt in given:
            for rule in rules_for(prompt).values():
                for text in SAID:
                    rule.judge(prompt, Said(text, True, 8))
        return [printable(reason) for reason in left_out]  # as what is logged is shown

    seeds = {"prompts.jsonl": "\n".join(map(json.dumps, PROMPTS)).encode()}
    return Target(seeds, of_rows(PROMPTS), use)


def chats(_: Path) -> Target:
    """Chats with tools, calls and settings of the template, encoded to be trained on."""
    # Imported by the first chat that is encoded; torch.distributed, which it brings, loads libc.
    import trl.chat_template_utils  # noqa: F401

    from forgetless.data.domain import encode_rows, load_training_data

    call = {"function": {"name": "weather", "arguments": {"city": "Bern"}}}
    turns = [
        {"role": "system", "content": "be"},
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "weather", "content": "12"},
        {"role": "assistant", "content": "It is 12.", "reasoning_content": "so"},
    ]
    rows = [
        {"messages": turns, "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": [USER, {"role": "assistant", "content": "two"}]},
    ]
    speaker = tokenizer()

    def use(path: Path) -> list[str]:
        encode_rows(load_training_data(str(path)), speaker)
        return []

    return Target({"chat.jsonl": "\n".join(map(json.dumps, rows)).encode()}, of_rows(rows), use)


def said(_: Path) -> Target:
    """Answers in the cache: what is no answer is left out, never used."""
    from forgetless.data.selftext import as_documents, read_lines, write_lines

    rows = [{**ANSWER, "prompt": name} for name in "abc"]

    def use(path: Path) -> list[str]:
        logging.disable(logging.CRITICAL)
        answers = read_lines(path)
        for answer in answers:
            assert 0 < answer.start <= len(answer.ids) and min(answer.ids) >= 0
        as_documents(answers)
        write_lines(answers)
        return [answer.prompt for answer in answers if not answer.prompt.isprintable()] and []

    return Target({"said.jsonl": "\n".join(map(json.dumps, rows)).encode()}, of_rows(rows), use)


def gate(_: Path) -> Target:
    """Bounds in YAML, and the answers of a base beside a gate."""
    from forgetless.gate.bounds import read_bounds
    from forgetless.gate.given import read_given
    from forgetless.options.check import CheckOptions
    from forgetless.options.verbs import resolve

    bounds = "budget: 5%\nbehaviours: {json: -2%, length: -20%}\ntasks: {'sciq:acc_norm': -1%}\n"
    stored = {"format": 1, "model": "m", "weights": "w", "answers": [ANSWER, ANSWER]}
    seeds = {"bounds.yaml": bounds.encode(), "answers.json": json.dumps(stored).encode()}

    def change(name: str, data: bytes, rng: random.Random) -> bytes:
        if name.endswith(".yaml"):
            return mutate.yaml_text(data.decode("utf-8", "replace"), rng)
        return of_tree(stored)(name, data, rng)

    def use(path: Path) -> list[str]:
        if path.suffix == ".json":
            read_given(path)
            return []
        options = resolve(CheckOptions, {"model": "m", "tuned": "t", "bounds": str(path)})
        return [f"{bound.name} {bound.text} {bound.metric}" for bound in read_bounds(options)]

    return Target(seeds, change, use)


def kept(folder: Path) -> Target:
    """Importance files with answers of the base and traces of the text."""
    import torch
    from targets import tiny

    from forgetless.data.selftext import Answer
    from forgetless.data.traces import traces_of
    from forgetless.evaluate.divergence import StoredBase
    from forgetless.importance.controls import uniform
    from forgetless.importance.importance import Importance
    from forgetless.importance.kept_answers import KeptAnswers

    answers = [
        Answer("a", "facts", (1, 2, 3, 4), 2, True),
        Answer("b", "json", (1, 5, 6), 1, False),
    ]
    stored = []
    for answer in answers:
        logits = torch.randn(len(answer.scored), 32).log_softmax(-1)
        log_probs, tokens = logits.topk(4)
        rest = torch.log1p(-log_probs.exp().sum(-1))
        own = logits.gather(1, torch.tensor(answer.scored)[:, None])[:, 0]
        other = ~(tokens == torch.tensor(answer.scored)[:, None]).any(-1)
        stored.append(StoredBase(tokens, log_probs, rest, own, other))
    importance = uniform(tiny(), "q_proj")
    traces = traces_of(["one two three four five six seven eight nine ten"]).plain()
    info = {**importance.info, "data": {"source": "x", "sha256": "0", "traces": traces}}
    path = folder / "seed.safetensors"
    Importance(importance.entries, {}, info, None, KeptAnswers(answers, stored)).save(path)
    seeds = {"kept.safetensors": path.read_bytes()}
    path.unlink()

    def use(path: Path) -> list[str]:
        read = Importance.load(path)
        if read.answers is not None:
            for answer, base in zip(read.answers.answers, read.answers.stored, strict=True):
                assert len(answer.scored) == len(base.tokens) > 0
            read.answers.tensors()
        return read.describe().split("\n")

    return Target(seeds, lambda _, data, rng: mutate.safetensors(data, rng), use)


def earlier(folder: Path) -> Target:
    """The run.json of a run that a sequence goes on from."""
    from forgetless.options.tune import TuneOptions
    from forgetless.options.verbs import resolve
    from forgetless.sequence.domains import earlier_of

    configuration = {
        "model": "m",
        "data": "d.jsonl",
        "data_split": "train",
        "eval_data": "h.jsonl",
        "eval_split": None,
        "importance": "auto",
    }
    held = {"name": "a", "train": "a.jsonl", "held": "h.jsonl", "held_split": None, "split": None}
    run = {
        "configuration": configuration,
        "importance": {"file": "i.safetensors", "sha256": "0"},
        "sequence": {
            "domains": ["a"],
            "matrix": [[1.0]],
            "accuracy_domains": [],
            "held": {"a": held},
        },
    }
    single = {name: value for name, value in run.items() if name != "sequence"}
    seeds = {"turns.json": json.dumps(run).encode(), "single.json": json.dumps(single).encode()}

    def change(name: str, data: bytes, rng: random.Random) -> bytes:
        return of_tree(run if name == "turns.json" else single)(name, data, rng)

    def use(path: Path) -> list[str]:
        (path.parent / "final").mkdir(exist_ok=True)
        (path.parent / "final" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        path.rename(path.with_name("run.json"))
        options = resolve(
            TuneOptions, {"model": "m", "data": "d", "out": "o", "after": str(path.parent)}
        )
        earlier_of(options)
        return []

    return Target(seeds, change, use)


CHAT_TARGETS: dict[str, Callable[[Path], Target]] = {
    "prompts": prompts,
    "chats": chats,
    "said": said,
    "gate": gate,
    "kept": kept,
    "earlier": earlier,
}
