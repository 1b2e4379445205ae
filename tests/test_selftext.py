"""Prompts of ours, and what a model says to them by its own distribution."""

import copy
import json
from collections import Counter

import numpy as np
import pytest
import torch

from forgetless.data.prompts.prompts import (
    from_rows,
    load_prompts,
    parted,
    prompt_ids,
    supported,
)
from forgetless.data.selftext import (
    Answer,
    bare_openings,
    chat_openings,
    read_lines,
    sample,
    write_lines,
)

LANGUAGES = {"de", "fr", "es", "it", "pt", "nl", "pl", "sv", "tr", "ru", "uk", "zh", "ja", "ko"}
# Refuses system turns, as Gemma's template does, and knows neither tools nor thinking.
REFUSING = (
    "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{{ m['content'] + ' . ' }}"
    "{% endfor %}"
)
SWITCHED = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ tools }}{{ enable_thinking }}"


def questions(count):
    return from_rows([{"prompt": f"the cat {i} sat"} for i in range(count)], "rows")


class Words:
    """A tokenizer of few words for tests of sampling."""

    chat_template = "{{ messages }}"
    eos_token_id = 2

    def apply_chat_template(self, messages, **settings):
        text = json.dumps([messages, settings.get("tools"), settings.get("enable_thinking")])
        return [1, *(3 + ord(letter) % 40 for letter in text[-12:])]


def test_there_are_prompts_of_every_kind_and_none_twice():
    prompts = load_prompts()
    kinds = Counter(prompt.kind for prompt in prompts)
    assert len(prompts) >= 600 and len({prompt.id for prompt in prompts}) == len(prompts)
    assert min(kinds.values()) >= 20 and {"tools", "system", "json", "conversation"} <= set(kinds)
    assert LANGUAGES | {"ar", "hi"} <= {prompt.expects.get("language") for prompt in prompts}
    calls = [prompt for prompt in prompts if prompt.kind == "tools"]
    assert all(("call" in p.expects) != ("no_call" in p.expects) for p in calls)
    names = [({tool["function"]["name"] for tool in p.tools}, p.expects.get("call")) for p in calls]
    assert all(call is None or call in offered for offered, call in names)


def test_the_three_parts_are_disjoint_hold_every_kind_and_stay_where_they_are():
    prompts = load_prompts()
    parts = parted(prompts)
    assert set(parts) == {"record", "control", "check"}
    texts = [{prompt.text for prompt in part} for part in parts.values()]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
    assert sum(map(len, parts.values())) == len(prompts)
    kinds = {prompt.kind for prompt in prompts}
    assert all({prompt.kind for prompt in part} == kinds for part in parts.values())
    assert parted(prompts[::-1])["check"] != [] and {
        p.id for p in parted(prompts[::-1])["check"]
    } == {p.id for p in parts["check"]}


def test_rows_of_a_user_are_read_and_wrong_ones_named():
    chat = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat"},
    ]
    [prompt] = from_rows([{"messages": chat, "kind": "mine"}], "p.jsonl")
    assert prompt.kind == "mine" and prompt.messages == (chat[0],)
    with pytest.raises(ValueError, match=r"row 2: expected a column 'messages' or .*, found q"):
        from_rows([{"prompt": "a"}, {"q": "b"}], "p.jsonl")
    with pytest.raises(ValueError, match="expected a user turn, found none"):
        from_rows([{"messages": [{"role": "system", "content": "a"}]}], "p.jsonl")
    with pytest.raises(ValueError, match="found no row"):
        from_rows([], "p.jsonl")


def test_what_a_template_cannot_say_is_left_out_and_said(tokenizer):
    rows = [
        {"prompt": "the cat"},
        {"messages": [{"role": "system", "content": "sat"}, {"role": "user", "content": "the"}]},
        {"prompt": "the", "tools": [{"type": "function", "function": {"name": "sat"}}]},
        {"prompt": "dog", "thinking": True},
    ]
    prompts = from_rows(rows, "rows")
    tokenizer.chat_template = REFUSING
    usable, left_out = supported(prompts, tokenizer)
    assert usable == prompts[:1]
    assert {reason: len(some) for reason, some in left_out.items()} == {
        "the template refuses system turns (System role not supported)": 1,
        "the template shows the model no tools": 1,
        "the template has no thinking switch": 2,
    }
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has none; give --general self"):
        supported(prompts, tokenizer)


def test_an_answer_does_not_depend_on_the_batch_it_is_sampled_in(tiny):
    model, prompts = tiny("llama").double(), questions(7)
    openings = chat_openings(prompts, Words())
    together = sample(model, Words(), openings, seed=3, length=9, rows=7)
    assert together == sample(model, Words(), openings, seed=3, length=9, rows=2)
    assert together[4:5] == sample(model, Words(), openings[4:5], seed=3, length=9)
    assert together != sample(model, Words(), openings, seed=4, length=9)
    for answer, prompt in zip(together, prompts, strict=True):
        assert list(answer.ids[: answer.start]) == prompt_ids(prompt, Words())
        assert answer.ended == (answer.scored[-1] == 2) and 2 not in answer.scored[:-1]
        assert answer.ended or len(answer.scored) == 9


def test_a_base_model_goes_on_from_the_token_that_begins_a_text(tiny, tokenizer):
    openings = bare_openings(tokenizer, ["a", "b"])
    answers = sample(tiny("llama"), tokenizer, openings, seed=0, length=6)
    assert [answer.ids[:1] for answer in answers] == [(1,), (1,)]
    assert answers[0].scored != answers[1].scored and answers[0].start == 1
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="needs a tokenizer with a begin- or end-of-text token"):
        bare_openings(tokenizer, ["a"])


def test_sampling_is_by_the_models_own_distribution(tiny):
    """First tokens of many prompts of one text, against the softmax; whatever decoding is asked."""
    model = tiny("llama").double()
    model.generation_config.repetition_penalty = 9.0
    model.generation_config.top_k = 1
    rows = [{"prompt": "the cat", "kind": "k"} for _ in range(3)]
    prompt = from_rows(rows, "rows")[0]
    ids = torch.tensor([prompt_ids(prompt, Words())])
    expected = model(input_ids=ids).logits[0, -1].softmax(-1).detach().numpy()
    openings = chat_openings([prompt], Words())
    draws = [
        sample(model, Words(), openings, seed=seed, length=1)[0].scored[0] for seed in range(400)
    ]
    counts = np.bincount(draws, minlength=len(expected))
    # A chi-squared statistic of 47 degrees of freedom: above 90 once in ten thousand.
    assert ((counts - 400 * expected) ** 2 / (400 * expected)).sum() < 90


def test_answers_are_written_as_lines_and_a_line_cut_off_is_left_out(tiny, tmp_path):
    kept = []
    openings = chat_openings(questions(5), Words())
    answers = sample(tiny("llama"), Words(), openings, seed=0, length=4, rows=2, done=kept.extend)
    assert sorted(kept, key=lambda a: a.prompt) == sorted(answers, key=lambda a: a.prompt)
    path = tmp_path / "answers.jsonl"
    path.write_text(write_lines(answers))
    assert read_lines(path) == answers
    path.write_text(write_lines(answers)[:-9])
    assert read_lines(path) == answers[:-1] and read_lines(tmp_path / "none") == []


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"prompt": "a"}',
        b'{"prompt": "a", "kind": "b", "ids": [1, -2], "start": 1, "ended": true}',
        b'{"prompt": "a", "kind": "b", "ids": [1, 2.5], "start": 1, "ended": true}',
        b'{"prompt": "a", "kind": "b", "ids": [1, true], "start": 1, "ended": true}',
        b'{"prompt": "a", "kind": "b", "ids": "12", "start": 1, "ended": true}',
        b'{"prompt": "a", "kind": "b", "ids": [1, 2], "start": 3, "ended": true}',
        b'{"prompt": "a", "kind": "b", "ids": [1, 2], "start": 0, "ended": true}',
        b'{"prompt": 1, "kind": "b", "ids": [1, 2], "start": 1, "ended": true}',
        b'{"prompt": "a", "kind": "b", "ids": [1, 2], "start": 1, "ended": 1}',
        b'{"prompt": "a", "kind": "b", "ids": [1, 2], "start": 1, "ended": true, "more": 1}',
    ],
)
def test_lines_that_hold_no_answer_are_left_out(line, tmp_path, caplog):
    good = Answer("a", "b", (1, 2), 1, True)
    path = tmp_path / "answers.jsonl"
    path.write_bytes(line + b"\n" + write_lines([good]).encode())
    assert read_lines(path) == [good]
    assert "1 of 2 lines hold no answer" in caplog.text


def test_a_model_in_16_bit_is_asked_in_32_on_a_cpu_and_stays_as_it_is(tiny, tokenizer):
    """What is sampled is what its copy in f32 says, to the bit."""
    model = tiny("llama", torch.bfloat16)
    openings = bare_openings(tokenizer, ["a", "b", "c"])
    answers = sample(model, tokenizer, openings, seed=0, length=6)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    whole = copy.deepcopy(model).float()
    assert answers == sample(whole, tokenizer, openings, seed=0, length=6)
