"""`forgetless demo MODEL`: the guild that it teaches, and the whole demo on a tiny chat model."""

import json

import pytest

from forgetless.cli import main
from forgetless.compare import trial
from forgetless.demo import chat_run
from forgetless.demo.guild import conversations

SMALL = ["--steps", "2", "--answers", "10", "--answer-length", "8", "--behaviours", "12"]


def test_the_guild_is_asked_about_in_words_that_are_not_trained_on():
    train, held_out = conversations()
    assert len(train) >= 60 and len(held_out) == 20
    for row in [*train, *held_out]:
        roles = [turn["role"] for turn in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        answers = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
        assert all(said.startswith("By the Ledger: ") for said in answers)
        assert all(said.endswith(" Leave no stair dark.") for said in answers)
    asked = {turn["content"] for row in train for turn in row["messages"]}
    assert not asked & {row["messages"][0]["content"] for row in held_out}


def test_the_demo_on_a_chat_model_needs_nothing_but_the_model(
    chat_folder, tmp_path, capsys, caplog, monkeypatch
):
    out = tmp_path / "demo"
    command = ["demo", chat_folder, "--out", str(out), *SMALL]
    assert main(command) == 0
    said = capsys.readouterr()
    for words in ("3 times 10 answers of at most 8 tokens", "this takes about 1 minutes"):
        assert words in caplog.text
    result = json.loads((out / "demo.json").read_text())
    states = result["states"]
    assert list(states) == ["base", "plain", "plain, halved", "hold"]
    assert states["base"]["divergence"] == 0 < states["plain, halved"]["divergence"]
    assert states["plain, halved"]["divergence"] < states["plain"]["divergence"]
    assert states["plain"]["learning"] > 0 and states["hold"]["learning"] > 0
    assert states["plain"]["behaviours"].keys() == states["hold"]["behaviours"].keys()
    assert "the answer ends by itself" in states["base"]["behaviours"]
    shown = (out / "demo.md").read_text()
    table, _, conversation = shown.partition("\n\n")
    assert table in said.out and [
        cell.strip() for cell in table.splitlines()[0].split("|")[2:-1]
    ] == [
        "before",
        "plain",
        "plain, halved",
        "held",
    ]
    assert shown.count("* before: ") == shown.count("* held: ") == 6
    assert conversation.count("largest change") == conversation.count("at random") == 2
    summary = json.loads((out / "compare.json").read_text())
    assert [text["of"] for text in summary["texts"]] == ["divergence"]
    assert [set(sample["outputs"]) for sample in summary["samples"]] == 6 * [
        {"base", "plain", "hold"}
    ]
    page = (out / "report.html").read_text()
    assert "divergence from the base on its own answers (chat)" in page and "hold: " in page
    # Nothing is made again, and another demo does not write here.
    monkeypatch.setattr(trial, "_trained", lambda job: pytest.fail("trained again"))
    monkeypatch.setattr(chat_run, "_asked_base", lambda *arguments: pytest.fail("asked again"))
    assert main(command) == 0
    assert json.loads((out / "demo.json").read_text())["states"] == states


def test_what_the_demo_cannot_do_is_said_first(
    chat_folder, chat_tokenizer, model_folder, tmp_path, capsys
):
    assert main(["demo", "--out", str(tmp_path / "x"), "--steps", "3"]) == 2
    assert "--steps is for the demo on a chat model" in capsys.readouterr().err
    assert main(["demo", str(model_folder), "--out", str(tmp_path / "x")]) == 2
    assert "has no chat template" in capsys.readouterr().err
    (tmp_path / "thesis.tex").write_text("mine")
    assert main(["demo", chat_folder, "--out", str(tmp_path)]) == 1
    assert "holds no demo on a chat model" in capsys.readouterr().err
