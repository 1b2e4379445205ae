"""`forgetless chat`: both models are asked the same, with the same random numbers, each with its
own history; typed, one prompt, or a file of them.
"""

import io
import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import PLAIN
from forgetless.chat import pair, talk
from forgetless.chat.screen import show
from forgetless.cli import main
from forgetless.data.prompts.prompts import from_rows
from forgetless.data.selftext import chat_openings, sample
from forgetless.model.adapters import add_adapter

SHORT = ["--max-tokens", "8", "--threads", "1"]


def moved(folder, out, size):
    """An adapter for the model in a folder, whose update is of some size, at `out`."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    model = add_adapter(base, names="all-linear", rank=2, alpha=2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=size)
    model.save_pretrained(out)
    return str(out)


@pytest.fixture
def adapter(chat_folder, tmp_path):
    return moved(chat_folder, tmp_path / "adapter", 5.0)


def answers_in(text):
    """[(base, tuned), ...] of what was printed where there is no terminal."""
    blocks = text.split("base:\n")[1:]
    pairs = [block.split("tuned:\n") for block in blocks]
    return [(a.strip(), b.split("\n\n")[0].strip()) for a, b in pairs]


def typed(monkeypatch, *lines):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))


def test_one_prompt_is_answered_by_the_bare_base_and_the_tuned_model(
    chat_folder, chat_model, chat_tokenizer, adapter, capsys
):
    ask = ["chat", chat_folder, "--adapter", adapter, "--prompt", "the cat", *SHORT]
    assert main([*ask, "--temperature", "1"]) == 0
    out = capsys.readouterr().out
    [(base, tuned)] = answers_in(out)
    assert "\x1b" not in out and base != tuned
    openings = chat_openings(from_rows([{"prompt": "the cat"}], "here"), chat_tokenizer)
    [answer] = sample(chat_model, chat_tokenizer, openings, seed=0, length=8)
    assert base == chat_tokenizer.decode(answer.scored, skip_special_tokens=True).strip()
    assert main([*ask, "--temperature", "0"]) == 0
    greedy = capsys.readouterr().out
    assert main([*ask, "--temperature", "0", "--seed", "7"]) == 0
    assert capsys.readouterr().out == greedy != out


def test_an_update_of_nothing_says_the_same(chat_folder, tmp_path, capsys):
    nothing = moved(chat_folder, tmp_path / "nothing", 0.0)
    for seed in "012":
        words = ["chat", chat_folder, "--adapter", nothing, "--prompt", "a b", "--seed", seed]
        assert main([*words, *SHORT]) == 0
        [(base, tuned)] = answers_in(capsys.readouterr().out)
        assert base == tuned


def test_a_conversation_has_a_history_for_each_and_commands(
    chat_folder, adapter, monkeypatch, capsys, caplog
):
    seen = []
    whole = talk.chat_openings_of
    monkeypatch.setattr(
        talk, "chat_openings_of", lambda p, t: seen.append(p[0].messages) or whole(p, t)
    )
    typed(monkeypatch, "the cat", "the dog", "", "/nwe", "/new", "the cat", "/quit", "a b")
    words = ["chat", chat_folder, "--adapter", adapter, "--system", "a b c", *SHORT]
    assert main(words) == 0
    out = capsys.readouterr().out
    first, second, again = answers_in(out)
    assert first == again != second and "> the dog" in out and "> a b" not in out
    assert "did you mean '/new'?" in caplog.text
    for place, said in ((2, first[0]), (3, first[1])):
        roles = [turn["role"] for turn in seen[place]]
        assert roles == ["system", "user", "assistant", "user"]
        assert seen[place][2]["content"].strip() == said
    assert [turn["content"] for turn in seen[4]] == ["a b c", "the cat"]


def test_ctrl_c_stops_an_answer_and_not_the_program(
    chat_folder, adapter, monkeypatch, capsys, caplog
):
    drawn = []
    whole = talk.by_inversion

    def stopped(*given):
        drawn.append(1)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return whole(*given)

    monkeypatch.setattr(talk, "by_inversion", stopped)
    typed(monkeypatch, "the cat", "the dog")
    assert main(["chat", chat_folder, "--adapter", adapter, *SHORT]) == 0
    assert "> the dog" in capsys.readouterr().out and len(drawn) > 6
    drawn.clear()
    assert main(["chat", chat_folder, "--adapter", adapter, "--prompt", "a", *SHORT]) == 130


def test_many_prompts_are_answered_as_one_is(chat_folder, adapter, tmp_path, capsys):
    file, out = tmp_path / "p.jsonl", tmp_path / "pairs.jsonl"
    chat = [{"role": "system", "content": "yes"}, {"role": "user", "content": "the dog sat"}]
    rows = [{"prompt": "the cat"}, {"messages": chat}, {"prompt": "one two three"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    words = ["chat", chat_folder, "--adapter", adapter, *SHORT]
    assert main([*words, "--prompts", str(file), "--out", str(out)]) == 0
    pairs = [json.loads(line) for line in out.read_text().splitlines()]
    assert [pair["prompt"] for pair in pairs] == ["the cat", "the dog sat", "one two three"]
    assert pairs[1]["messages"] == chat and set(pairs[0]) == {"prompt", "before", "after"}
    capsys.readouterr()
    for row in (pairs[0], pairs[2]):
        assert main([*words, "--prompt", row["prompt"]]) == 0
        expected = (row["before"].strip(), row["after"].strip())
        assert answers_in(capsys.readouterr().out) == [expected]


@pytest.mark.parametrize("left", ["adapter", "whole model"])
def test_a_run_names_its_base_and_what_it_left(chat_folder, adapter, tmp_path, left, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"configuration": {"model": chat_folder}}))
    base = AutoModelForCausalLM.from_pretrained(chat_folder)
    if left == "adapter":
        moved(chat_folder, run / "final", 5.0)
    else:
        pair.with_adapter(base, adapter).merge_and_unload().save_pretrained(run / "final")
    ask = ["--prompt", "the cat", *SHORT]
    assert main(["chat", str(run), *ask]) == 0
    of_run = capsys.readouterr().out
    assert main(["chat", chat_folder, "--adapter", adapter, *ask]) == 0
    assert capsys.readouterr().out == of_run
    if left == "adapter":
        assert main(["chat", str(run / "final"), *ask]) == 0
        assert capsys.readouterr().out == of_run


def test_a_model_without_template_continues_texts(chat_folder, chat_tokenizer, adapter, capsys):
    chat_tokenizer.chat_template = None
    chat_tokenizer.save_pretrained(chat_folder + "-bare")
    base = AutoModelForCausalLM.from_pretrained(chat_folder)
    base.save_pretrained(chat_folder + "-bare")
    words = ["chat", chat_folder + "-bare", "--adapter", adapter, "--prompt", "the cat", *SHORT]
    assert main(words) == 2
    assert "has no chat template; --raw continues each text" in capsys.readouterr().err
    assert main([*words, "--raw"]) == 0
    assert answers_in(capsys.readouterr().out)


REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("MODEL", "is not a run"),
        ("MODEL --adapter MODEL", "is not an adapter folder"),
        ("MODEL --adapter A --tuned MODEL", "not both"),
        ("MODEL --tuned nowhere", "is not a model folder"),
        ("MODEL --adapter A --prompts P", "go together"),
        ("MODEL --adapter A --prompt x --prompts P --out O", "not both"),
        ("MODEL --adapter A --raw --system x", "which --raw leaves out"),
        ("MODEL --adapter A --prompts P --out O", "expected a column 'messages' or 'prompt'"),
        ("REFUSING --adapter A --system x --prompt x", "the template refuses system turns"),
        ("EMPTY", "holds no model"),
    ],
)
def test_what_cannot_be_is_told_before_a_model_is_loaded(
    chat_folder, chat_tokenizer, adapter, tmp_path, monkeypatch, given, told, capsys
):
    monkeypatch.setattr(pair, "load_model", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "run.json").write_text("{}")
    (tmp_path / "p.jsonl").write_text('{"question": "x"}')
    chat_tokenizer.chat_template = REFUSES + PLAIN
    chat_tokenizer.save_pretrained(tmp_path / "refusing")
    (tmp_path / "refusing" / "config.json").write_text(
        (tmp_path / "chat" / "config.json").read_text()
    )
    places = {
        "MODEL": chat_folder,
        "A": adapter,
        "P": str(tmp_path / "p.jsonl"),
        "O": str(tmp_path / "o.jsonl"),
        "EMPTY": str(tmp_path / "empty"),
        "REFUSING": str(tmp_path / "refusing"),
    }
    assert main(["chat", *(places.get(word, word) for word in given.split())]) in (1, 2)
    assert told in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_in_a_terminal_the_answers_stand_beside_each_other(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    for name, value in (("TERM", "xterm"), ("COLUMNS", "80"), ("LINES", "20")):
        monkeypatch.setenv(name, value)
    long = "\n".join(f"line {i}" for i in range(40))
    said = {}
    show({"base": iter(["one", "one two"]), "tuned": iter([long])}, said)
    assert said == {"base": "one two", "tuned": long}
    shown = terminal.getvalue()
    assert any("one two" in line and "line 0" in line for line in shown.splitlines())
    # While it grows, a long answer shows its end; in the end all of it stands there.
    assert shown.index("line 39") < shown.index("line 0 ") and "line 20" in shown
    monkeypatch.setenv("COLUMNS", "40")
    show({"base": iter(["one"]), "tuned": iter(["two"])}, said := {})
    assert terminal.getvalue().endswith("base:\none\n\ntuned:\ntwo\n\n")


def test_what_a_model_says_cannot_move_the_cursor():
    class Evil:
        def decode(self, ids, **_):
            return "a\x1b[2Jb\rc\n\td\u202e"

    assert talk.as_text(Evil(), [1]) == "a[2Jbc\n\td"


def test_a_conversation_longer_than_the_context_is_told(
    chat_folder, adapter, monkeypatch, capsys, caplog
):
    typed(monkeypatch, "the cat " * 200, "the cat")
    assert main(["chat", chat_folder, "--adapter", adapter, *SHORT]) == 0
    assert "/new begins another one" in caplog.text
    assert answers_in(capsys.readouterr().out)
