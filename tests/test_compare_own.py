"""A comparison on what the base says itself: forgetting is the divergence from it, in every number
and in every word.
"""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from forgetless.cli import main
from forgetless.compare import compare as campaign
from forgetless.compare.experiment_file import read
from forgetless.data.own_text import OwnText
from forgetless.errors import OptionError
from forgetless.evaluate.divergence import divergence
from forgetless.evaluate.own_answers import own_answers
from forgetless.importance.importance import Importance
from forgetless.model.adapter_files import with_adapter

ASKED = {"answers": 12, "answer_length": 8}
METHODS = {
    "plain": {"learning_rate": 2e-2},
    "hold": {"importance": "default", "learning_rate": 2e-2, "strength": 30},
    "kl": {"method": "kl", "replay": "recorded", "learning_rate": 2e-2, "kl_weight": 3},
}


@pytest.fixture
def experiment(chat_folder, tmp_path):
    """Writes an experiment on the tiny chat model; `change` is laid over it. Returns its path."""
    rng = random.Random(5)
    for name, reply in (("domain", "a b a"), ("second", "one two")):
        rows = [
            [
                {"role": "user", "content": f"the {name} {i} cat {rng.choice('abcd')} ?"},
                {"role": "assistant", "content": f"{reply} {rng.choice('abcd')}"},
            ]
            for i in range(40)
        ]
        text = "\n".join(json.dumps({"messages": turns}) for turns in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    texts = [" ".join(rng.choices("the cat sat on mat".split(), k=12)) for _ in range(24)]
    web = "\n".join(json.dumps({"text": text}) for text in texts)
    (tmp_path / "web.jsonl").write_text(web)

    def write(**change):
        given = {
            "model": chat_folder,
            "device": "cpu",
            "general": {"chat": f"chat,{tmp_path / 'web.jsonl'}"},
            "domains": {"domain": str(tmp_path / "domain.jsonl")},
            "training": {"max_steps": 4, "batch_size": 4, "accumulation": 1, "rank": 2},
            "importance": {"default": {"batch_size": 8}},
            "methods": {name: METHODS[name] for name in ("plain", "hold")},
            "seeds": {"validation": [0], "test": [1]},
            "scales": [0.5],
            **ASKED,
        }
        path = tmp_path / "experiment.yaml"
        path.write_text(json.dumps({**given, **change}))  # JSON is YAML
        return path

    return write


def run(path, out, *more):
    return main([str(word) for word in ("compare", path, "--out", out, "--quiet", *more)])


def test_forgetting_is_the_exact_divergence_on_answers_that_nothing_was_held_to(
    experiment, chat_folder, chat_model, chat_tokenizer, tmp_path, capsys, monkeypatch
):
    path, out = experiment(), tmp_path / "out"
    assert run(path, out) == 0
    said = capsys.readouterr().out
    assert "moves least from the base" in said and "of divergence per token of chat" in said
    summary = json.loads((out / "compare.json").read_text())
    assert [text.get("of") for text in summary["texts"]] == ["divergence", None]
    assert [text["name"] for text in summary["texts"]] == ["chat", "chat-text"]
    tested = {r["method"]: r for r in summary["runs"] if r["part"] == "test"}
    chosen = {r["method"]: r for r in summary["runs"] if r["part"] == "validation"}
    # Settings are chosen on the answers alone, to other prompts than those of the test.
    assert set(chosen["plain"]["points"][0]["forgetting"]) == {"chat"}
    for r, part in ((tested["plain"], "check"), (chosen["plain"], "control")):
        answers = own_answers(chat_model, chat_tokenizer, OwnText("chat", 12, 8), part)
        base = AutoModelForCausalLM.from_pretrained(chat_folder)
        folder = out / "runs" / r["id"] / "adapter"
        tuned = with_adapter(AutoModelForCausalLM.from_pretrained(chat_folder), folder)
        nats, tokens = divergence(base, tuned, answers)
        whole = r["points"][0]["forgetting"]["chat"]
        assert whole["nats"] == pytest.approx(nats.sum() / tokens.sum(), rel=1e-4)
        assert 0 < whole["standard_error"] < whole["nats"]
        half = r["points"][1]["forgetting"]["chat"]["nats"]
        assert 0 < half < whole["nats"]
    lost = {m: r["points"][0]["forgetting"]["chat"]["nats"] for m, r in tested.items()}
    assert lost["hold"] < lost["plain"]
    [file] = (out / "importance").glob("*.safetensors")
    assert Importance.load(file).info["data"]["source"] == "chat"
    assert main(["report", str(out), "--format", "markdown"]) == 0
    shown = capsys.readouterr().out
    assert "Divergence from the base on its own answers (chat) at equal learning" in shown
    assert "Forgetting on chat-text, which importance was not recorded on" in shown
    assert main(["report", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert "forgetting: divergence from the base on its own answers (chat)" in page
    assert "the base's own answers (recorded)" in page.replace("&#39;", "'")
    monkeypatch.setattr(campaign, "run", lambda job: pytest.fail("ran again"))
    assert run(path, out) == 0


def test_where_an_update_is_no_adapter_the_divergence_is_by_what_was_stored(
    experiment, chat_folder, chat_model, chat_tokenizer, tmp_path
):
    """Of 48 tokens all are among the 64 likeliest, so that what is stored is exact."""
    methods = {"plain": {"full": True, "learning_rate": 2e-2}}
    path = experiment(methods=methods, general={"chat": "chat"}, seeds={"validation": [0]})
    assert run(path, tmp_path / "out", "--part", "validation") == 0
    summary = json.loads((tmp_path / "out" / "compare.json").read_text())
    [r] = summary["runs"]
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "out/runs" / r["id"] / "adapter")
    answers = own_answers(chat_model, chat_tokenizer, OwnText("chat", 12, 8), "control")
    nats, tokens = divergence(chat_model, tuned, answers)
    lost = r["points"][0]["forgetting"]["chat"]["nats"]
    assert lost == pytest.approx(nats.sum() / tokens.sum(), rel=1e-3) and lost > 0


def test_a_sequence_counts_the_divergence_from_the_base_after_each_step(
    experiment, chat_folder, chat_model, chat_tokenizer, tmp_path
):
    domains = {name: str(tmp_path / f"{name}.jsonl") for name in ("domain", "second")}
    methods = {name: METHODS[name] for name in ("plain", "kl")}
    way = {"domains": list(domains), "methods": list(methods)}
    path, out = experiment(domains=domains, methods=methods, sequences={"way": way}), tmp_path / "o"
    assert run(path, out) == 0
    summary = json.loads((out / "compare.json").read_text())
    assert {m["name"]: m["needs"] for m in summary["methods"]}["kl"] == "nothing"
    of_kl = {r["extra_data"] for r in summary["runs"] if r["method"] == "kl"}
    assert of_kl == {"the model's own answers"}
    ends = {s["method"]: s for s in summary["sequences"]}
    assert [s["error"] for s in ends.values()] == [None, None]
    answers = own_answers(chat_model, chat_tokenizer, OwnText("chat", 12, 8), "check")
    base = AutoModelForCausalLM.from_pretrained(chat_folder)
    both = out / "sequences/way/plain-1/2-second/adapter"
    tuned = with_adapter(AutoModelForCausalLM.from_pretrained(chat_folder), both)
    nats, tokens = divergence(base, tuned, answers)
    lost = ends["plain"]["general"]["chat"]
    assert len(lost) == 2 and lost[1] == pytest.approx(nats.sum() / tokens.sum(), rel=1e-2)
    # What a method that replays reads in the second step: the base's answers, and the first domain.
    kept = (out / "sequences/way/kl-1/keep-2.jsonl").read_text().splitlines()
    rows = [json.loads(line)["messages"] for line in kept]
    of_first = [turns for turns in rows if turns[0]["content"].startswith("the domain")]
    assert 0 < len(of_first) < len(rows) == len(of_first) + 12
    assert not list((out / "sequences/way/plain-1").glob("keep*"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"general": {"chat": {"text": "chat", "test": "web.jsonl"}}}, "leave out test"),
        ({"general": {"chat": "chat,self"}}, "expects chat or self, a text, or one of each"),
        ({"answers": 0}, "answers expects a whole number above 0, found 0"),
        ({"answer_length": "long"}, "answer_length expects a whole number above 0, found 'long'"),
        ({"general": {"web": "web.jsonl"}}, "at least two texts"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_trained(experiment, change, expected):
    with pytest.raises(OptionError, match=expected):
        read(experiment(**change))


def test_few_answers_say_how_many_are_needed(experiment, tmp_path, capsys):
    assert run(experiment(answers=4), tmp_path / "out") == 1
    assert "expected at least 10; give a larger --answers" in capsys.readouterr().err


def test_how_the_model_is_asked_decides_a_run(experiment, tmp_path):
    """Another number of answers, other prompts: another measurement. A text's are as they were."""
    path = experiment(answers=13)
    assert read(path).own("chat") == OwnText("chat", 13, 8)
    assert read(path).own("chat-text") is None
    given = read(experiment(general={"one": "1.jsonl", "two": "2.jsonl"}))
    assert given.asking == {} and np.all([given.own(name) is None for name in given.general])
    assert Path(given.general["one"]["text"]).name == "1.jsonl"
