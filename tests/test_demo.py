"""The embedded default: a world that reads as English, a model that knows it, and `forgetless demo`
end to end.
"""

import json
import re

import pytest

from forgetless.cli import main
from forgetless.compare import trial
from forgetless.compare.choice import curve
from forgetless.compare.experiment import validation_trials
from forgetless.compare.frontier import at_learning
from forgetless.compare.job import job_of
from forgetless.compare.parts import prepare
from forgetless.compare.recipes import Recipe
from forgetless.data.tasks import TASKS
from forgetless.demo import experiment, run
from forgetless.demo.result import STATES
from forgetless.demo.world import MODEL_FOLDER, build, documents, multiple_choice
from forgetless.evaluate.accuracy import answers
from forgetless.files.compare_json import TrialRun
from forgetless.files.schema import from_json
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
    options = ModelOptions(model=str(MODEL_FOLDER), dtype="float32", device="cpu")
    model, tokenizer = load_model(options), load_tokenizer(options)
    known = lambda facts: answers(model, tokenizer, TASKS["choices"], multiple_choice(facts))
    assert known(build().general).numbers["acc_norm"] >= 0.9
    assert known(build().domain).numbers["acc_norm"] < 0.5
    assert sum(path.stat().st_size for path in MODEL_FOLDER.iterdir()) < 10e6


@pytest.fixture
def short(monkeypatch):
    """A demo of a few steps."""
    monkeypatch.setattr(
        experiment, "TRAINING", {**experiment.TRAINING, "max_steps": 3, "batch_size": 4}
    )
    monkeypatch.setattr(run, "PROMPTS", 1)


def test_the_demo_writes_table_picture_and_everything_to_repeat_it(
    tmp_path, short, monkeypatch, capsys
):
    monkeypatch.setattr(experiment, "RATES", (2e-3,))
    monkeypatch.setattr(experiment, "HELD_RATES", (2e-3,))
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--quiet"]) == 0
    printed = capsys.readouterr().out
    for name in STATES:
        assert f"| {name} " in printed
    assert "forgetless record MODEL --general" in printed and "importance file:" in printed
    result = json.loads((out / "demo.json").read_text())
    rows = result["seeds"][0]
    base, plain = rows["base"], rows["plain"]
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
    chosen = {made["method"]: made for made in compared["runs"] if made["chosen"]}
    assert set(chosen) == {"plain", "smaller", "hold"}
    for made in chosen.values():
        assert {point["scale"] for point in made["points"]} == {0.25, 0.5, 0.75, 1.0}
    whole = chosen["plain"]["points"][0]
    assert whole["learning"]["nats"] == pytest.approx(
        base["domain_loss"] - plain["domain_loss"], abs=1e-4
    )
    assert whole["forgetting"]["world"]["nats"] == pytest.approx(
        plain["general_loss"] - base["general_loss"], abs=1e-4
    )
    assert whole["accuracy"]["after"] == plain["domain_accuracy"]
    assert all(row["movement"] > 0 and row["importance"] > 0 for row in chosen["hold"]["moved"])
    assert {weight["kind"] for weight in compared["importance"][0]["weights"]} >= {
        "q_proj",
        "down_proj",
    } and len(compared["samples"]) == 2
    assert main(["inspect", result["importance"]["path"]]) == 0
    words = ["eval", str(MODEL_FOLDER), "--general", str(out / "general-test.jsonl")]
    words += ["--adapter", str(out / "runs" / chosen["hold"]["id"] / "adapter"), "--limit", "5"]
    assert main(words) == 0
    check_equal_learning(compared, rows)
    # The same command again has nothing left to train.
    monkeypatch.setattr(trial, "_trained", lambda job: pytest.fail("trained again"))
    assert main(["demo", "--out", str(out), "--quiet"]) == 0


def check_equal_learning(compared, rows):
    """Equal learning is that of `compare`: where the curve of scales first reaches it."""
    of_plain = [
        row
        for row in compared["equal_learning"]["herbal"]["world"]
        if row["method"] == "plain" and row["share"] == 0.95
    ]
    runs = [from_json(made, TrialRun, "compare.json") for made in compared["runs"]]
    plain = next(made for made in runs if made.method == "plain")
    assert of_plain[0]["forgetting"] == pytest.approx(
        at_learning(curve(plain, "world"), of_plain[0]["learning_nats"])
    )
    back = rows["plain, scaled back"]
    assert re.fullmatch(r"update x 0\.[5-9]\d: 95% of its learning", back["setting"])
    assert rows["base"]["domain_loss"] - back["domain_loss"] == pytest.approx(
        of_plain[0]["learning_nats"], rel=0.05
    )


def test_the_demo_trains_no_rate_twice(tmp_path):
    """The smaller rate is one of those that are tried, and the model is held at rates of those."""
    asked = experiment.experiment(experiment.write_texts(tmp_path / "texts"), 2)
    files = prepare(asked, tmp_path)
    recipes = {"default": Recipe(["made up"], "i.safetensors", 1)}
    jobs = [job_of(asked, one, files, recipes, tmp_path) for one in validation_trials(asked)]
    trained = {job.id: (job.options.importance, job.options.learning_rate) for job in jobs}
    assert sorted(rate for file, rate in trained.values() if file is None) == sorted(
        2 * experiment.RATES
    )
    held = [rate for file, rate in trained.values() if file is not None]
    assert sorted(held) == sorted(2 * experiment.HELD_RATES) and set(held) < set(experiment.RATES)


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
