"""The embedded default: a world that reads as English, a model that knows it, and `forgetless demo`
end to end.
"""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from forgetless.cli import main
from forgetless.demo import run as demo
from forgetless.demo import summary
from forgetless.demo.world import build, documents, multiple_choice
from forgetless.model.loading import load_model, load_tokenizer
from forgetless.options.model import ModelOptions


def test_the_world_is_the_same_at_every_build_and_its_facts_are_unambiguous():
    world = build()
    assert world == build()
    facts = world.general + world.domain
    assert len({(fact.relation.name, fact.subject) for fact in facts}) == len(facts)
    herbs, known = {fact.subject for fact in world.domain}, {fact.subject for fact in world.general}
    assert herbs < known and not {fact.relation.name for fact in world.general} & {
        fact.relation.name for fact in world.domain
    }
    for text in documents(facts, 3, 50):
        assert not re.search(r"[{}]|\s\s|\.\.", text) and text.endswith(".")


def test_held_out_text_says_each_fact_as_training_text_never_does():
    world = build()
    trained = " ".join(documents(world.domain, 201, 600)).lower()
    held = documents(world.domain, 202, 60, held_out=True)
    sentences = {
        part.strip().lower() for text in held for part in re.split(r"(?<=\.) (?=[A-Z])", text)
    }
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
    monkeypatch.setattr(demo, "PROMPTS", 1)
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--quiet"]) == 0
    printed = capsys.readouterr().out
    for name in demo.METHODS:
        assert f"| {name} " in printed
    assert "forgetless record MODEL --general" in printed and "importance file:" in printed
    result = json.loads((out / "demo.json").read_text())
    base, plain = result["seeds"][0]["base"], result["seeds"][0]["plain"]
    assert (
        base["general_accuracy"] >= 0.9
        and plain["domain_loss"] < base["domain_loss"]
        and plain["seconds"] > 0
    )
    assert (out / "demo.md").read_text().strip() in printed
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (
        str(out / "report.html") in printed
        and "questions about its world" in (out / "report.html").read_text()
    )
    compared = json.loads((out / "compare.json").read_text())
    scales = {
        (run["method"], point["scale"])
        for run in compared["runs"]
        if run["chosen"]
        for point in run["points"]
    }
    assert scales == {
        (name, scale) for name in ("plain", "hold") for scale in (0.25, 0.5, 0.75, 1.0)
    }
    whole = next(run for run in compared["runs"] if run["method"] == "plain" and run["chosen"])[
        "points"
    ][0]
    assert whole["learning"]["nats"] == pytest.approx(
        base["domain_loss"] - plain["domain_loss"], abs=1e-4
    )
    assert whole["forgetting"]["world"]["nats"] == pytest.approx(
        plain["general_loss"] - base["general_loss"], abs=1e-4
    )
    assert all(
        row["movement"] > 0 and row["importance"] > 0
        for run in compared["runs"]
        if run["method"] == "hold"
        for row in run["moved"]
    )
    assert {weight["kind"] for weight in compared["importance"][0]["weights"]} >= {
        "q_proj",
        "down_proj",
    } and len(compared["samples"]) == 2
    assert main(["inspect", str(out / "importance.safetensors")]) == 0
    assert (
        main(
            [
                "eval",
                str(demo.MODEL),
                "--adapter",
                str(out / "forgetless-0/final"),
                "--general",
                str(out / "general-test.jsonl"),
                "--limit",
                "5",
            ]
        )
        == 0
    )


def test_the_demo_trains_no_rate_twice(tmp_path, monkeypatch):
    """The smaller rate is one of those that were tried, where it is among them."""
    score = demo.Score(0.5, 4.0, 0.8, 2.0)
    exam = SimpleNamespace(
        paths={"domain": tmp_path},
        base=score,
        adapted=lambda folder: None,
        losses=lambda model: {},
        at_scales=lambda folder: {},
        score=lambda model, losses, seconds, setting: replace(
            score, setting=setting, domain_loss=1 / float(setting.split()[-1])
        ),
        scaled=lambda folder, reached: score,
    )
    tried = []
    monkeypatch.setattr(
        demo,
        "tune",
        lambda options: (
            tried.append((options.importance, options.learning_rate)) or {"train_seconds": 1.0}
        ),
    )
    scores, trained = demo.one_seed(exam, tmp_path, tmp_path / "i.safetensors", 0)
    assert tried == [
        (None, 2e-3),
        (None, 4e-3),
        (None, 8e-3),
        (str(tmp_path / "i.safetensors"), 8e-3),
    ]
    assert scores["plain, smaller rate"].setting == "rate 0.002"
    assert [one.score.setting for one in trained["plain"]] == [
        "rate 0.008",
        "rate 0.002",
        "rate 0.004",
    ]
    monkeypatch.setattr(demo, "RATES", (4e-3, 8e-3))
    tried.clear()
    demo.one_seed(exam, tmp_path, tmp_path / "i.safetensors", 0)
    assert (None, 2e-3) in tried and len(tried) == 4


def test_forgetting_at_equal_learning_is_read_off_the_frontier():
    points = [(1.0, 0.4), (0.5, 0.1), (0.8, 0.5), (0.4, 0.2)]  # the last two are bettered
    assert summary.frontier(points) == [(0.0, 0.0), (0.5, 0.1), (1.0, 0.4)]
    assert summary.at_learning(points, 0.25) == pytest.approx(0.05) and summary.at_learning(
        points, 0.75
    ) == pytest.approx(0.25)
    assert (
        summary.at_learning(points, 1.0) == pytest.approx(0.4)
        and summary.at_learning(points, 1.01) is None
    )


def test_the_demo_keeps_out_of_folders_that_are_not_its_own(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "holds no demo" in capsys.readouterr().err
    assert main(["demo", "--out", str(tmp_path / "new"), "--seeds", "0"]) == 2


@pytest.mark.slow
def test_the_training_script_starts_from_nothing(tmp_path, monkeypatch):
    from forgetless.demo import train_model

    monkeypatch.setattr("sys.argv", ["train_model", "--steps", "2", "--out", str(tmp_path)])
    train_model.main()
    assert json.loads((tmp_path / "training.json").read_text())["parameters"] < 2e6
    assert load_model(ModelOptions(model=str(tmp_path), device="cpu"))
