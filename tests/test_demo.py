"""The embedded default: a world that reads as English, a model that knows it, and `holdfast demo` end to end."""

import json
import re

import pytest

from holdfast.cli import main
from holdfast.config import ModelOptions
from holdfast.demo import run as demo
from holdfast.demo.world import build, documents, multiple_choice
from holdfast.models import load_model, load_tokenizer


def test_the_world_is_the_same_at_every_build_and_its_facts_are_unambiguous():
    world = build()
    assert world == build()
    facts = world.general + world.domain
    assert len({(fact.relation.name, fact.subject) for fact in facts}) == len(facts)
    herbs, known = {fact.subject for fact in world.domain}, {fact.subject for fact in world.general}
    assert herbs < known and not {fact.relation.name for fact in world.general} & {fact.relation.name for fact in world.domain}
    for text in documents(facts, 3, 50):
        assert not re.search(r"[{}]|\s\s|\.\.", text) and text.endswith(".")


def test_held_out_text_says_each_fact_as_training_text_never_does():
    world = build()
    trained = " ".join(documents(world.domain, 201, 600)).lower()
    held = documents(world.domain, 202, 60, held_out=True)
    sentences = {part.strip().lower() for text in held for part in re.split(r"(?<=\.) (?=[A-Z])", text)}
    assert len(sentences) > 60 and not [sentence for sentence in sentences if sentence in trained]


def test_questions_have_four_different_choices_and_the_right_one_is_the_fact():
    facts = build().general
    for fact, row in zip(facts, multiple_choice(facts), strict=True):
        assert len(set(row["choices"])) == 4 and row["choices"][row["gold"]] == fact.value
        assert fact.subject in row["prompt"]


def test_the_embedded_model_knows_its_world_and_not_the_herbal():
    options = ModelOptions(model=str(demo.MODEL), dtype="float32", device="cpu")
    model, tokenizer = load_model(options), load_tokenizer(options)
    assert demo.accuracy(model, tokenizer, multiple_choice(build().general)) >= 0.9
    assert demo.accuracy(model, tokenizer, multiple_choice(build().domain)) < 0.5
    assert sum(path.stat().st_size for path in demo.MODEL.iterdir()) < 10e6


def test_the_demo_writes_table_picture_and_everything_to_repeat_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "TRAINING", {**demo.TRAINING, "max_steps": 3, "batch_size": 4})
    monkeypatch.setattr(demo, "RATES", (2e-3,))
    monkeypatch.setattr(demo, "SCALES", (0.5, 1.0))
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--quiet"]) == 0
    printed = capsys.readouterr().out
    for name in demo.METHODS:
        assert f"| {name} " in printed
    assert "holdfast record MODEL --general" in printed and "importance file:" in printed
    result = json.loads((out / "demo.json").read_text())
    base, plain = result["seeds"][0]["base"], result["seeds"][0]["plain"]
    assert base["general_accuracy"] >= 0.9 and plain["domain_loss"] < base["domain_loss"] and plain["seconds"] > 0
    assert (out / "demo.md").read_text().strip() in printed
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert main(["inspect", str(out / "importance.safetensors")]) == 0
    assert main(["eval", str(demo.MODEL), "--adapter", str(out / "holdfast-0/final"), "--general", str(out / "general-test.jsonl"), "--limit", "5"]) == 0


def test_the_demo_keeps_out_of_folders_that_are_not_its_own(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "holds no demo" in capsys.readouterr().err
    assert main(["demo", "--out", str(tmp_path / "new"), "--seeds", "0"]) == 2


@pytest.mark.slow
def test_the_training_script_starts_from_nothing(tmp_path, monkeypatch):
    from holdfast.demo import train_model

    monkeypatch.setattr("sys.argv", ["train_model", "--steps", "2", "--out", str(tmp_path)])
    train_model.main()
    assert json.loads((tmp_path / "training.json").read_text())["parameters"] < 2e6
    assert load_model(ModelOptions(model=str(tmp_path), device="cpu"))
