"""Tasks of lm-eval from files of ours in the Hub's fields: asked offline, paired by question."""

import importlib.util
import json

import numpy as np
import pytest
import torch

from forgetless.cli import main
from forgetless.data.tasks import CHAT_TASKS, task_specs
from forgetless.evaluate import harness
from forgetless.evaluate.accuracy import check_tasks
from forgetless.evaluate.behaviour_change import mcnemar
from forgetless.evaluate.harness import lm_eval_accuracy
from forgetless.evaluate.paired_scores import score_change

W = "the cat sat on mat and dog then too yes no one two three".split()


def w(i):
    return W[i % len(W)]


MADE = {
    "arc_easy": lambda i: {
        "question": f"{w(i)} {w(i + 2)} ?",
        "choices": {"text": [w(i), w(i + 1), w(i + 3)], "label": ["A", "B", "C"]},
        "answerKey": "ABC"[i % 3],
    },
    "winogrande": lambda i: {
        "sentence": f"{w(i)} sat and _ {w(i + 1)} too",
        "option1": w(i + 2),
        "option2": w(i + 5),
        "answer": "12"[i % 2],
    },
    "lambada_openai": lambda i: {"text": f"{w(i)} {w(i + 1)} {w(i + 2)} {w(i + 3)}"},
    "gsm8k": lambda i: {"question": f"{w(i)} and {w(i + 1)} ?", "answer": f"{w(i)} #### {i}"},
}
MADE["arc_challenge"] = MADE["arc_easy"]


def made(folder, name, count=12):
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps(MADE[name](i)) for i in range(count)))
    return str(path)


@pytest.fixture
def sure(chat_model):
    """A model with clear preferences."""
    torch.nn.init.normal_(chat_model.lm_head.weight, std=1.0)
    return chat_model


@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("arc_easy", {"acc", "acc_norm"}),
        ("arc_challenge", {"acc", "acc_norm"}),
        ("winogrande", {"acc"}),
        ("lambada_openai", {"acc"}),
        ("gsm8k", {"exact_match,strict-match", "exact_match,flexible-extract"}),
    ],
)
def test_a_task_of_every_kind_is_asked_from_a_file(
    sure, chat_tokenizer, tmp_path, name, metrics, caplog
):
    file = made(tmp_path, name)
    check_tasks(f"{name}={file}")
    caplog.set_level("INFO", logger="forgetless")
    scores = lm_eval_accuracy(sure, chat_tokenizer, name, file=file, limit=8)
    assert set(scores.items) == metrics <= set(scores.metrics)
    for metric, items in scores.items.items():
        assert len(items) == 8 and np.mean(items) == pytest.approx(scores.numbers[metric])
        assert scores.numbers[harness.error_name(metric)] is not None
    # Written answers alone go through the chat template, and this is said.
    assert scores.chat_template == (True if name == "gsm8k" else None)
    assert ("chat template" in caplog.text) == (name == "gsm8k")
    if name == "gsm8k":
        assert "half of the model's context is 128" in caplog.text


def test_examples_come_from_the_file_but_are_never_the_question(sure, chat_tokenizer, tmp_path):
    # Of two rows the one example is always the other.
    file = made(tmp_path, "arc_easy", 2)
    asked = []
    whole = harness._by_question
    try:
        harness._by_question = lambda key, samples: asked.extend(samples) or whole(key, samples)
        lm_eval_accuracy(sure, chat_tokenizer, "arc_easy", file=file, shots=1)
    finally:
        harness._by_question = whole
    for sample in asked:
        prompt = sample["arguments"][0][0]
        assert prompt.count("Question:") == 2
        assert prompt.count(sample["doc"]["question"]) == 1


def test_eval_says_what_changed_and_how_sure_that_is(chat_folder, tmp_path, capsys, chat_tokenizer):
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(chat_folder)
    torch.nn.init.normal_(other.lm_head.weight, std=1.0)
    other.save_pretrained(tmp_path / "tuned")
    chat_tokenizer.save_pretrained(tmp_path / "tuned")
    sciq = [
        {
            "question": f"{w(i)} ?",
            "correct_answer": w(i + 1),
            "distractor1": w(i + 2),
            "distractor2": w(i + 3),
            "distractor3": w(i + 4),
            "support": f"{w(i + 5)} sat .",
        }
        for i in range(12)
    ]
    (tmp_path / "sciq.jsonl").write_text("\n".join(map(json.dumps, sciq)))
    tasks = f"arc_easy={made(tmp_path, 'arc_easy')},sciq={tmp_path / 'sciq.jsonl'}"
    words = ["eval", chat_folder, "--tuned", str(tmp_path / "tuned"), "--tasks", tasks]
    assert main([*words, "--out", str(tmp_path / "e")]) == 0
    shown = capsys.readouterr().out
    assert "low" in shown and "arc_easy acc_norm" in shown and "sciq acc" in shown
    run = json.loads((tmp_path / "e" / "run.json").read_text())
    for name in ("arc_easy", "sciq"):
        before, after = (run[state]["tasks"][name] for state in ("before", "after"))
        change = after["changes"]["acc"]
        assert change["change"] == pytest.approx(after["acc"] - before["acc"])
        pairs = list(zip(before["items"]["acc"], after["items"]["acc"], strict=True))
        lost, gained = pairs.count((1, 0)), pairs.count((0, 1))
        assert (change["lost"], change["gained"]) == (lost, gained)
        assert change["p"] == mcnemar(lost, gained)
        assert change["low"] < change["change"] < change["high"] and "changes" not in before


def test_a_change_is_paired():
    right = np.array([1.0, 0, 1, 1, 0, 1, 0, 1])
    same = score_change(right, right)
    assert same.change == same.standard_error == 0 and same.p == 1 and same.low < 0 < same.high
    shifted = score_change(right / 3, right / 3 + 0.25)
    assert (shifted.change, shifted.low, shifted.high) == pytest.approx((0.25,) * 3)
    assert shifted.p is None and shifted.questions == 8


def test_chat_stands_for_five_tasks():
    assert task_specs("chat") == list(CHAT_TASKS)
    assert task_specs("sciq, chat=d")[:2] == ["sciq", "ifeval=d/ifeval.jsonl"]
    assert len(task_specs("chat=d,piqa=x.jsonl")) == 6


def test_what_a_task_cannot_do_is_told_before_a_model_is_loaded(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="does not exist; expected a file with the fields of all"):
        check_tasks("arc_easy=nowhere.jsonl")
    (tmp_path / "a.jsonl").write_text('{"query": "x"}\n{"query": "y"}')
    with pytest.raises(
        ValueError, match="fields of allenai/ai2_arc on the Hub, found query; row 1 can"
    ):
        check_tasks(f"arc_easy={tmp_path / 'a.jsonl'}")
    (tmp_path / "b.jsonl").write_text("no json")
    with pytest.raises(ValueError, match=r"b\.jsonl"):
        check_tasks(f"arc_easy={tmp_path / 'b.jsonl'}")
    with pytest.raises(ValueError, match="'mmlu' cannot be read from a file"):
        check_tasks(f"mmlu={tmp_path / 'a.jsonl'}")
    found = importlib.util.find_spec
    missing = ("langdetect", "immutabledict")
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name in missing else found(name)
    )
    with pytest.raises(ValueError, match="pip install langdetect immutabledict, or leave the task"):
        check_tasks("chat")
