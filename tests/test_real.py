"""On a real chat model (SmolLM2-135M-Instruct, which `make lab` prepares): its template, what it
says, and that holding holds. `make test-real` runs these; FORGETLESS_REAL names another folder.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from forgetless.cli import main
from forgetless.data.own_text import OwnText
from forgetless.data.prompts.prompts import load_prompts, prompt_ids, supported
from forgetless.demo.guild import conversations
from forgetless.evaluate.own_answers import own_answers
from forgetless.evaluate.paired_answers import paired_answers
from forgetless.model.adapters import add_adapter
from forgetless.model.loading import load_model, load_tokenizer
from forgetless.options.model import ModelOptions

FOLDER = Path(os.environ.get("FORGETLESS_REAL", Path(__file__).parents[1] / "lab/smollm2"))
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no model in {FOLDER}; make lab prepares it"),
]
ASKED = OwnText("chat", answers=12, length=48)


@pytest.fixture(scope="module")
def options():
    return ModelOptions(model=str(FOLDER), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def model(options):
    return load_model(options).eval()


@pytest.fixture(scope="module")
def tokenizer(options):
    return load_tokenizer(options)


@pytest.fixture(scope="module")
def answers(model, tokenizer):
    return own_answers(model, tokenizer, ASKED, "check")


def test_the_template_puts_most_prompts_and_the_answer_follows(tokenizer):
    usable, left_out = supported(load_prompts(), tokenizer)
    assert len(usable) >= 600 and all(left_out.values())
    assert {"system", "conversation", "json"} <= {prompt.kind for prompt in usable}
    for prompt in usable[::50]:
        text = tokenizer.decode(prompt_ids(prompt, tokenizer))
        assert text.endswith("<|im_start|>assistant\n")
        assert all(str(turn.get("content") or "").strip() in text for turn in prompt.messages)
        names = [tool.get("function", tool)["name"] for tool in prompt.tools]
        assert all(name in text for name in names)


def test_sampling_ends_where_the_model_does(answers, tokenizer):
    ended = [answer for answer in answers if answer.ended]
    cut = [answer for answer in answers if not answer.ended]
    assert ended and all(answer.scored[-1] == tokenizer.eos_token_id for answer in ended)
    assert all(len(answer.scored) == ASKED.length for answer in cut)
    assert all(tokenizer.eos_token_id not in answer.scored[:-1] for answer in answers)


def test_the_bare_base_has_not_moved(answers, model, tokenizer):
    part = paired_answers(model, answers)
    assert np.abs(part.losses(model) / part.tokens).max() < 1e-5
    adapted = add_adapter(model, names="all-linear", rank=2, alpha=4.0)
    # Both by the base under the adapter and by what was stored of it: a new adapter adds nothing.
    assert np.abs(part.losses(adapted) / part.tokens).max() < 1e-5
    assert np.abs(part.by_stored().losses(adapted) / part.tokens).max() < 1e-5


def test_two_steps_held_by_kept_answers_move_less_than_plain_ones(tmp_path):
    data = tmp_path / "guild.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in conversations()[0]))
    loading = [str(FOLDER), "--dtype", "float32", "--device", "cpu", "--answers", "12"]
    loading += ["--answer-length", "48"]
    file = str(tmp_path / "i.safetensors")
    assert main(["record", *loading, "--keep-answers", "12", "--out", file]) == 0
    tuning = ["tune", *loading, "--data", str(data), "--general", "chat", "--max-steps", "2"]
    tuning += ["--batch-size", "4", "--accumulation", "1", "--length", "96", "--schedule"]
    tuning += ["constant", "--learning-rate", "3e-3"]
    held = ["--method", "kl", "--replay", "kept", "--importance", file, "--kl-weight", "30"]
    moved = {}
    for name, more in (("plain", ["--method", "plain"]), ("held", held)):
        assert main([*tuning, *more, "--out", str(tmp_path / name)]) == 0
        run = json.loads((tmp_path / name / "run.json").read_text())
        moved[name] = run["forgetting"]["nats"]
    assert 0 < moved["held"] < moved["plain"]
