"""Tiny random models, built from configurations: no network, no files."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import logging
import multiprocessing.forkserver
import os
import runpy
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from unittest import mock

os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # before any host library reads it: tests use no network
import jinja2
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # read when Triton is first imported; tests/test_fused.py needs it
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
)

# Libraries note versions with every checkpoint and trainer. They parse them each time out of files
# that do not change while tests run, which was 4 % of a comparison's time.
importlib.metadata.version = functools.cache(importlib.metadata.version)
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)

# PEFT and TRL write a model card with every checkpoint. Its template, compiled anew for each card,
# was 7 % of a comparison's time.
jinja2.Environment.compile = functools.cache(jinja2.Environment.compile)

# The files of tests that take more than ten seconds of one core, the longest first. The order need
# not be exact; `pytest --durations 0` tells.
LONGEST = (
    "test_sequences test_compare test_distributed test_examples test_demo test_browser "
    "test_training test_methods test_own_answers test_keeping test_kills test_settings "
    "test_checkpoint test_calibration test_bad_input test_behaviours test_chat test_texts "
    "test_long_runs test_estimators test_integrations test_pool test_fuzz test_trainers"
).split()

# How many modules there are to be, beyond those of the last time, before what is imported is set
# apart again: as many as torch, transformers, TRL or datasets bring, and no file of tests.
MANY_MODULES = 200
_modules_set_apart = 0


def pytest_configure():
    """What forgetless keeps between runs is made anew, and nothing of the user's is touched.

    Python collects no garbage while it imports the tests: there is none, and looking for some takes
    a seventh of the time.
    """
    os.environ["FORGETLESS_CACHE"] = tempfile.mkdtemp(prefix="forgetless-tests-")
    gc.disable()


def pytest_collection_modifyitems(items):
    """Put the files that take longest first.

    Two processes take files in this order: what is left at the end is short, so that neither waits
    long for the other.
    """
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish():
    gc.enable()


def pytest_runtest_setup():
    """Set what is imported apart from what Python's garbage collection walks through.

    Accelerate collects garbage before every training, which walks through half a million objects of
    imported libraries in half a second: 8 % of a comparison's time.
    """
    global _modules_set_apart
    if len(sys.modules) < _modules_set_apart + MANY_MODULES:
        return
    gc.collect()
    gc.freeze()
    _modules_set_apart = len(sys.modules)


def pytest_unconfigure():
    """Put back what was set apart: Triton's bindings complain at exit where it is not collected.

    The cache of the tests goes too.
    """
    gc.unfreeze()
    shutil.rmtree(os.environ["FORGETLESS_CACHE"], ignore_errors=True)


def forking():
    """A context of multiprocessing whose processes are forked from a server that has imported all
    that training takes.

    A process that is spawned imports it anew, in ten seconds; the server does it once for all files
    of tests that one process runs.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["forked"])
    # The server is not told of sys.path before Python 3.14.
    path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(path).rstrip(os.pathsep)):
        multiprocessing.forkserver.ensure_running()
    return context


def run_forked(file, *words, out):
    """(exit code, what it printed) of `python FILE WORDS` in a forked process; `out`: a file for
    what it prints.
    """
    process = forking().Process(target=_as_script, args=([str(file), *map(str, words)], out))
    process.start()
    process.join()
    return process.exitcode, out.read_text()


def _as_script(words, out):
    with open(out, "w", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


SMALL = dict(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "mistral": MistralConfig(**SMALL),
    "qwen": Qwen2Config(**SMALL),
    "gemma": GemmaConfig(**SMALL, head_dim=8),
    "phi3": Phi3Config(**SMALL),
    "gpt2": GPT2Config(
        vocab_size=48,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gptj": GPTJConfig(
        vocab_size=48,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        rotary_dim=4,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
# A chat template without {% generation %} markers.
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' . ' }}{% endfor %}{% if "
    "add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)


def tiny_model(kind: str = "llama", dtype: torch.dtype = torch.float32):
    """A tiny random model of an architecture, the same at every call."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[kind]).to(dtype)


def unheld(given):
    """The options of `tune` (a mapping, or the words of a command line) with plain fine-tuning,
    measured on nothing, where they do not say otherwise.
    """
    if isinstance(given, dict):
        plain = {} if {"importance", "method", "after"} & set(given) else {"method": "plain"}
        return {**plain, "general": None, **given}
    words = [str(word) for word in given]
    held = {"--importance", "--method", "--after"} & set(words)
    plain = [] if held else ["--method", "plain"]
    return [*words, *plain, *([] if "--general" in words else ["--general", "none"])]


@torch.no_grad()
def move_adapter(adapted):
    """Move all that an adapter trains a little, at random."""
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.fixture(autouse=True)
def speaking():
    """Every test begins as a command without --quiet does, whatever the one before it asked for."""
    logging.getLogger("forgetless").setLevel(logging.INFO)


@pytest.fixture
def tiny():
    """The function `tiny_model`."""
    return tiny_model


@pytest.fixture
def batch():
    """Token ids (4, 12)."""
    return torch.randint(3, 48, (4, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tokenizer():
    return words_tokenizer()


def words_tokenizer():
    """A word-level tokenizer of 48 tokens over a few English words, with <pad>, <s> and </s> as 0,
    1 and 2.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = "the cat sat on mat and dog then too user assistant : . Question Answer ?".split()
    words += "yes no one two three a b c d".split()
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=32,
    )


def interrupt_after(monkeypatch, step):
    """Ctrl-C before the optimizer's step number `step` + 1."""
    from forgetless.tune import trainer

    original = trainer.StopOnNonFinite.on_pre_optimizer_step

    def interrupted(self, args, state, control, **kwargs):
        if state.global_step == step:
            monkeypatch.setattr(trainer.StopOnNonFinite, "on_pre_optimizer_step", original)
            raise KeyboardInterrupt
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(trainer.StopOnNonFinite, "on_pre_optimizer_step", interrupted)


def save_tiny(folder):
    """Write a tiny Llama with its tokenizer into a folder, and return it."""
    tiny_model().save_pretrained(folder)
    words_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def model_folder(tmp_path):
    """A tiny Llama with its tokenizer on disk."""
    return save_tiny(tmp_path / "model")


@pytest.fixture
def run_script(monkeypatch, capsys):
    """A function: does what `python FILE WORDS` does, and returns what it printed.

    It runs in this process, which has imported what takes a new one ten seconds.
    """

    def run(file, *words):
        monkeypatch.setattr(sys, "argv", [str(file), *map(str, words)])
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are errors for tests, but not for who runs it
            runpy.run_path(str(file), run_name="__main__")
        return "".join(capsys.readouterr())

    return run


@pytest.fixture
def text_file(tmp_path):
    """A small .jsonl of general text."""
    import json
    import random

    words = [
        "the",
        "cat",
        "sat",
        "on",
        "mat",
        "and",
        "dog",
        "then",
        "too",
        "yes",
        "no",
        "one",
        "two",
        "three",
    ]
    rng = random.Random(0)
    path = tmp_path / "general.jsonl"
    path.write_text(
        "\n".join(
            json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(5, 20)))})
            for _ in range(24)
        )
    )
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of this test alone."""
    monkeypatch.setenv("FORGETLESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def chat_model():
    """A tiny random model with room for a conversation."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(**{**SMALL, "max_position_embeddings": 256})
    ).eval()


@pytest.fixture
def chat_tokenizer():
    """The words with a chat template."""
    tokenizer = words_tokenizer()
    tokenizer.chat_template, tokenizer.model_max_length = PLAIN, 256
    return tokenizer


@pytest.fixture
def chat_folder(chat_model, chat_tokenizer, tmp_path, cache):
    """The tiny chat model with its tokenizer on disk."""
    chat_model.save_pretrained(tmp_path / "chat")
    chat_tokenizer.save_pretrained(tmp_path / "chat")
    return str(tmp_path / "chat")
