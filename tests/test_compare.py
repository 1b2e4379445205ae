"""forgetless compare end to end on a tiny model: nothing twice, nothing lost, fair by default."""

import contextlib
import functools
import io
import json
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from conftest import PLAIN, forking, save_tiny
from forgetless.cli import main
from forgetless.compare import compare as campaign
from forgetless.compare import samples, trial
from forgetless.compare import sequences as sequence
from forgetless.compare.accuracy import gpus_to_share
from forgetless.compare.experiment import identity, validation_trials
from forgetless.compare.experiment_file import read
from forgetless.data import encoding
from forgetless.data.domain import load_training_data
from forgetless.data.duplicates import carve, groups
from forgetless.data.tasks import load_task
from forgetless.errors import OptionError
from forgetless.evaluate.accuracy import answers
from forgetless.evaluate.losses import completion_loss
from forgetless.files.compare_json import TrialRun
from forgetless.files.lock import only_writer
from forgetless.files.schema import read_record, write_record
from forgetless.importance.importance import Importance
from forgetless.model.adapter_files import with_adapter
from forgetless.model.adapters import add_adapter
from forgetless.model.loading import load_model, load_tokenizer
from forgetless.options.methods import METHODS, Method
from forgetless.options.model import ModelOptions
from forgetless.options.tune import TuneOptions
from forgetless.options.verbs import resolve
from forgetless.sequence.domains import Domain
from forgetless.sequence.steps import Step

WORDS = "the cat sat on mat and dog then too yes no one two three".split()


@pytest.fixture(scope="session")
def ground(tmp_path_factory):
    """A folder with the model, texts and domains of every experiment, which tests only read.

    The address of a run holds the path of its model. Since all experiments have the same one, a run
    that was made for one test is found by another.
    """
    folder = tmp_path_factory.mktemp("ground")
    save_tiny(folder / "model")
    rng = random.Random(0)
    texts = lambda n: [
        {"text": " ".join(rng.choices(WORDS, k=rng.randint(12, 24)))} for _ in range(n)
    ]
    rows = lambda n: [
        {
            "prompt": f"Question {i} {rng.choice('abcd')} ?",
            "completion": " a b " + rng.choice("abcd"),
        }
        for i in range(n)
    ]
    files = {"wide": texts(40), "other": texts(20), "domain": rows(40), "held": rows(8)}
    rng = random.Random(3)
    # Answers of their own: what one domain teaches does not help the other.
    for name, reply in (("second", "one two"), ("third", "dog mat")):
        files[name] = [
            {
                "prompt": f"{name} {i} {rng.choice('abcd')} ?",
                "completion": f" {reply} {rng.choice('abcd')}",
            }
            for i in range(40)
        ]
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)))
    return folder


def write_experiment(folder, ground, **change):
    """Write an experiment of two methods with two settings each; `change` is laid over it.

    Returns its path.
    """
    domain = {"data": str(ground / "domain.jsonl"), "test": str(ground / "held.jsonl")}
    given = {
        "model": str(ground / "model"),
        "device": "cpu",
        "general": {
            "wide": str(ground / "wide.jsonl"),
            "other": {"text": str(ground / "other.jsonl")},
        },
        "domains": {"domain": domain},
        "training": {
            "max_steps": 3,
            "batch_size": 4,
            "accumulation": 1,
            "rank": 2,
            "log_steps": 1,
        },
        "importance": {"default": {"batch_size": 8}},
        "methods": {
            "plain": {"grid": {"learning_rate": [1e-3, 1e-2]}},
            "hold": {
                "importance": "default",
                "learning_rate": 1e-2,
                "grid": {"strength": [1, 10]},
            },
        },
        "seeds": {"validation": [0], "test": [1, 2]},
        "scales": [0.5],
    }
    path = folder / "experiment.yaml"
    path.write_text(json.dumps({**given, **change}))  # JSON is YAML
    return path


@pytest.fixture
def experiment(ground, tmp_path):
    """`write_experiment` into this test's folder."""
    return functools.partial(write_experiment, tmp_path, ground)


def run(path, out, *more):
    return main([str(word) for word in ("compare", path, "--out", out, "--quiet", *more)])


@pytest.fixture(scope="session")
def finished(ground, tmp_path_factory):
    """The folder of `experiment()` when it is done, which tests copy, and what it has printed."""
    folder = tmp_path_factory.mktemp("finished")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run(write_experiment(folder, ground), folder / "out") == 0
    return folder / "out", printed.getvalue()


@pytest.fixture
def done(finished, tmp_path):
    """A copy of a finished comparison, for a test to go on from."""
    return shutil.copytree(finished[0], tmp_path / "out")


@pytest.fixture
def forked(monkeypatch):
    """Processes of a comparison are forked, not spawned as test_pool.py has them: that takes ten
    seconds less for each.
    """
    context = forking()
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)


def forget_runs(out, wanted):
    """Remove the runs for which `wanted(run)` holds, as if they had not been made."""
    for path in out.glob("runs/*/run.json"):
        if wanted(json.loads(path.read_text())):
            shutil.rmtree(path.parent)


def test_a_comparison_says_who_forgets_least_and_is_not_run_twice(
    experiment, finished, done, monkeypatch
):
    path, out = experiment(), done
    assert "domain: " in finished[1]
    summary = json.loads((out / "compare.json").read_text())
    assert summary["progress"] == {
        **summary["progress"],
        "done": 8,
        "of": 8,
        "failed": 0,
    }  # 4 settings, then 2 chosen x 2 seeds
    tested = [r for r in summary["runs"] if r["part"] == "test"]
    assert {(r["method"], r["seed"]) for r in tested} == {
        ("plain", 1),
        ("plain", 2),
        ("hold", 1),
        ("hold", 2),
    } and all(r["chosen"] for r in tested)
    for r in summary["runs"]:
        assert sorted(point["scale"] for point in r["points"]) == [0.5, 1.0]
        assert set(r["points"][0]["forgetting"]) == (
            {"wide", "other"} if r["part"] == "test" else {"wide"}
        )  # settings are chosen on the recorded kind
        assert (
            r["trainable_parameters"] > 0
            and r["peak_memory_bytes"] > 0
            and [entry["step"] for entry in r["log"]] == [1, 2, 3]
        )
    assert summary["noise"]["domain"]["forgetting"]["wide"] > 0 and {
        row["share"] for row in summary["equal_learning"]["domain"]["wide"]
    } == {0.5, 0.8, 0.95}
    assert [text["kind"] for text in summary["texts"]] == ["recorded", "other"]
    assert {weight["coefficient"] for weight in summary["importance"][0]["weights"]} == {
        1.0
    }  # layers: uniform, as the runs were held
    assert {"base", "plain", "hold"} == set(summary["samples"][0]["outputs"])
    monkeypatch.setattr(campaign, "run", lambda job: pytest.fail("ran again"))
    assert run(path, out) == 0
    again = json.loads((out / "compare.json").read_text())
    assert [r["id"] for r in again["runs"]] == [r["id"] for r in summary["runs"]] and again[
        "frontier"
    ] == summary["frontier"]


@pytest.mark.parametrize(
    "seeds, texts",
    [
        ({"validation": [0], "test": [1]}, {"wide"}),
        ({"validation": [0], "test": []}, {"wide", "other"}),
    ],
)
def test_other_texts_wait_for_the_test_where_there_is_one(experiment, done, seeds, texts):
    if not seeds["test"]:
        forget_runs(done, lambda made: True)
    assert run(experiment(seeds=seeds), done, "--part", "validation") == 0
    summary = json.loads((done / "compare.json").read_text())
    assert (
        set(summary["equal_learning"]["domain"])
        == set(summary["noise"]["domain"]["forgetting"])
        == texts
    )


def test_another_setting_runs_only_what_is_new(experiment, done):
    before = set((done / "runs").iterdir())
    methods = json.loads(experiment().read_text())["methods"]
    methods["hold"]["grid"]["strength"] = [10, 100]
    assert run(experiment(methods=methods), done, "--part", "validation") == 0
    assert len(set((done / "runs").iterdir()) - before) == 1


def test_interrupted_and_gone_on_with_is_the_same(experiment, done, tmp_path, monkeypatch):
    path, original, calls = experiment(), trial._trained, []

    def interrupted(job):
        calls.append(job.id)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(job)

    assert run(path, done, "--part", "validation") == 0
    monkeypatch.setattr(trial, "_trained", interrupted)
    assert run(path, tmp_path / "parted", "--part", "validation") == 130
    assert len(list((tmp_path / "parted" / "runs").glob("*/run.json"))) == 2
    assert run(path, tmp_path / "parted", "--part", "validation") == 0
    assert len(calls) == 5  # the third one twice
    whole, parted = (
        json.loads((out / "compare.json").read_text()) for out in (done, tmp_path / "parted")
    )
    assert (
        whole["frontier"] == parted["frontier"]
        and whole["equal_learning"] == parted["equal_learning"]
    )


def write_succession(
    folder, ground, *, methods=("plain", "hold"), domains=("domain", "second", "third"), **change
):
    """Write an experiment of three domains in a sequence, by three methods with one seed.

    `methods` and `domains` name those that are tried one by one at all, where a test needs fewer.
    Returns its path.
    """
    every_domain = {
        "domain": {"data": str(ground / "domain.jsonl"), "test": str(ground / "held.jsonl")},
        **{name: str(ground / f"{name}.jsonl") for name in ("second", "third")},
    }
    every_method = {
        "plain": {"learning_rate": 1e-2},
        "hold": {"importance": "default", "learning_rate": 1e-2, "strength": 1},
    }
    given = {
        "training": {
            "max_steps": 12,
            "batch_size": 4,
            "accumulation": 1,
            "rank": 2,
            "log_steps": 1,
        },
        "seeds": {"validation": [0], "test": [1]},
        "sequences": {
            "way": {
                "domains": ["domain", "second", "third"],
                "methods": {
                    "plain": None,
                    "hold": None,
                    "apart": {"like": "plain", "method": "o-lora", "orthogonality": 2},
                },
            }
        },
        "methods": {name: every_method[name] for name in methods},
        "domains": {name: every_domain[name] for name in domains},
    }
    return write_experiment(folder, ground, **{**given, **change})


@pytest.fixture
def succession(ground, tmp_path):
    """`write_succession` into this test's folder."""
    return functools.partial(write_succession, tmp_path, ground)


@pytest.fixture(scope="session")
def singly(ground, tmp_path_factory):
    """The folder of `succession()` when each domain has been learned by itself."""
    folder = tmp_path_factory.mktemp("singly")
    with contextlib.redirect_stdout(io.StringIO()):
        assert run(write_succession(folder, ground, sequences={}), folder / "out") == 0
    return folder / "out"


@pytest.fixture
def learned_singly(singly, tmp_path):
    """A copy of it: what is left to do for `succession()` are the sequences."""
    return shutil.copytree(singly, tmp_path / "out")


def test_a_sequence_goes_on_from_the_merged_result_of_each_domain(
    succession, learned_singly, monkeypatch
):
    path, out = succession(), learned_singly
    assert run(path, out) == 0
    summary = json.loads((out / "compare.json").read_text())
    found = {sequence["method"]: sequence for sequence in summary["sequences"]}
    assert list(found) == ["plain", "hold", "apart"] and all(
        s["error"] is None and s["seed"] == 1 for s in found.values()
    )
    before = [domain["before"]["nats"] for domain in summary["domains"]]
    for s in found.values():
        assert (
            s["matrix"][0] == before
            and len(s["matrix"]) == 4
            and {text: len(rises) for text, rises in s["general"].items()}
            == {"wide": 3, "other": 3}
        )
        assert all(
            s["matrix"][j + 1][j] < s["matrix"][j][j] for j in range(3)
        )  # each step learns its domain, from where the last one ended
    assert (
        found["apart"]["matrix"][1] == found["plain"]["matrix"][1]
    )  # nothing to keep apart from yet
    assert found["apart"]["matrix"][2] != found["plain"]["matrix"][2]
    single = next(
        r
        for r in summary["runs"]
        if (r["method"], r["domain"], r["part"]) == ("plain", "domain", "test")
    )
    learned = next(point["learning"]["nats"] for point in single["points"] if point["scale"] == 1.0)
    assert found["plain"]["matrix"][1][0] == pytest.approx(
        before[0] - learned, abs=1e-5
    )  # the first step is the run of that domain alone, merged
    assert any(
        "way, one after another (domain, second, third)" in line for line in summary["verdict"]
    )
    assert len(list(out.glob("sequences/way/*/*/adapter"))) == 3  # of the last step alone
    kept = (out / "sequences/way/hold-1/keep-3.jsonl").read_text()
    assert all(word in kept for word in ("Question", "second", "cat")) and "third" not in kept
    held_by = Importance.load(out / "sequences/way/hold-1/3-third/importance.safetensors").info
    assert [Path(step["data"]["source"]).parent.name for step in held_by["consolidated"]] == [
        "domain",
        "second",
    ]
    assert held_by["data"]["source"].endswith("wide/record.jsonl")
    monkeypatch.setattr(sequence, "take", lambda *arguments: pytest.fail("ran again"))
    assert run(path, out) == 0
    assert json.loads((out / "compare.json").read_text())["sequences"] == summary["sequences"]


def test_a_sequence_answers_the_questions_of_its_domains_after_each_step(
    succession, learned_singly, tmp_path
):
    questions = [
        {
            "goal": f"second {i} {'abcd'[i % 4]} ?",
            "sol1": "one two a",
            "sol2": "dog mat b",
            "label": 0,
        }
        for i in range(12)
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    spec = f"piqa={tmp_path / 'questions.jsonl'}"
    domains = json.loads(succession().read_text())["domains"]
    asked = {**domains, "second": {"data": domains["second"], "task": spec}}
    way = {"domains": ["domain", "second", "third"], "methods": ["plain"]}
    path, out = succession(methods=["plain"], sequences={"way": way}), learned_singly
    path.write_text(json.dumps({**json.loads(path.read_text()), "domains": asked}))
    assert run(path, out) == 0
    summary = json.loads((out / "compare.json").read_text())
    found = summary["sequences"][0]
    scores = [row[1] for row in found["accuracy"]]
    assert [row[::2] for row in found["accuracy"]] == [[None, None]] * 4 and scores[0] == summary[
        "domains"
    ][1]["before"]["accuracy"]
    assert scores[2] == 1.0 and found["accuracy_transfer"] == {
        "average": scores[3],
        "backward_transfer": scores[3] - 1.0,
        "forward_transfer": scores[1] - scores[0],
    }
    last = out / "sequences/way/plain-1/3-third/adapter"
    task, rows = load_task(spec, split=None)
    options = resolve(ModelOptions, {"model": summary["model"]})
    whole = with_adapter(load_model(options), last)  # as anybody would load it
    whole_scores = answers(whole, load_tokenizer(options), task, rows)
    assert whole_scores.numbers["acc"] == pytest.approx(scores[3])


@pytest.mark.parametrize("method", ["full", "oft"])
def test_a_sequence_of_updates_that_are_not_loras_is_what_anybody_would_load(
    succession, learned_singly, method
):
    names = ["domain", "second"]
    tuned = {"like": "plain", "method": method, "max_steps": 4, "learning_rate": 1e-3}
    way = {"domains": names, "methods": {"other": tuned}}
    path = succession(methods=["plain"], domains=names, sequences={"way": way})
    out = learned_singly
    assert run(path, out) == 0
    summary = json.loads((out / "compare.json").read_text())
    sequence_told = summary["sequences"][0]
    assert sequence_told["error"] is None
    folders = [out / f"sequences/way/other-1/{step}/final" for step in ("1-domain", "2-second")]
    if method == "full":
        model = AutoModelForCausalLM.from_pretrained(folders[1])  # the whole model
    else:
        model = AutoModelForCausalLM.from_pretrained(summary["model"])
        for folder in folders:  # each is relative to the model with those before it merged
            model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    options = resolve(ModelOptions, {"model": summary["model"]})
    rows = load_training_data(str(out / "data/domain/second/test.jsonl"))
    loss = completion_loss(model.eval(), load_tokenizer(options), rows).record()
    matrix = sequence_told["matrix"]
    assert matrix[2][1] != matrix[1][1] and matrix[1][0] != matrix[0][0]  # both steps moved it
    assert loss.nats == pytest.approx(matrix[2][1], abs=1e-6)


def test_any_method_that_needs_earlier_adapters_gets_those_of_the_steps_before(
    monkeypatch, tmp_path
):
    """By its row alone: a method that only this test knows, with an option of its own."""
    toy = Method(help="a toy", needs=("earlier",), reads=("orthogonality",))
    monkeypatch.setitem(METHODS, "toy", toy)
    assert toy.needs_earlier and not METHODS["plain"].needs_earlier
    given = {"method": "hold,toy", "strength": 1, "orthogonality": 2}
    before = [
        Step(Domain(name, "rows", "held"), TuneOptions(), tmp_path / name)
        for name in ("1-a", "2-b")
    ]
    finals = f"{tmp_path / '1-a' / 'final'},{tmp_path / '2-b' / 'final'}"
    with_earlier = sequence._with_earlier
    assert with_earlier(given, before) == {**given, "earlier": finals}
    assert with_earlier(given, []) == {"method": "hold", "strength": 1}
    assert with_earlier({"method": "toy", "orthogonality": 2}, []) == {"method": "plain"}
    for alone in ([], before):  # nobody asks
        assert with_earlier({"method": "hold", "strength": 1}, alone) == {
            "method": "hold",
            "strength": 1,
        }


def test_a_sequence_is_held_by_the_domains_before_by_a_rule(succession, learned_singly):
    """`consolidate: none` holds general text alone, the first step apart: there is nothing before
    it.
    """
    like = {"like": "hold", "strength": 30}
    way = {
        "domains": ["domain", "second"],
        "methods": {"sum": like, "none": {**like, "consolidate": "none"}},
    }
    out = learned_singly
    assert run(succession(domains=way["domains"], sequences={"way": way}), out) == 0
    added, alone = json.loads((out / "compare.json").read_text())["sequences"]
    assert added["error"] is None and alone["error"] is None
    assert added["matrix"][:2] == alone["matrix"][:2]
    assert added["backward_transfer"] > alone["backward_transfer"]  # the domain before is held too
    assert not (out / "sequences/way/none-1/2-second/importance.safetensors").exists()


def test_an_interrupted_sequence_goes_on_and_a_changed_step_finds_the_model_before_it(
    succession, learned_singly, monkeypatch
):
    spec = {"way": {"domains": ["domain", "second", "third"], "methods": ["plain"]}}
    path, out = succession(methods=["plain"], sequences=spec), learned_singly
    original, calls = sequence.take, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(sequence, "take", interrupted)
    assert run(path, out) == 130 and run(path, out) == 0
    assert len(calls) == 4  # the second step twice
    whole = json.loads((out / "sequences.json").read_text())
    last = out / "sequences/way/plain-1/3-third/step.json"
    last.write_text(json.dumps({**json.loads(last.read_text()), "id": "of other data"}))
    assert run(path, out) == 0 and len(calls) == 5  # that step alone, from models merged again
    assert json.loads((out / "sequences.json").read_text())[0]["matrix"] == [
        pytest.approx(row, abs=1e-5) for row in whole[0]["matrix"]
    ]


def test_the_verdict_names_no_ratio_where_plain_forgets_nothing(experiment, done, monkeypatch):
    """Plain may even gain on general text; the ratio to that says nothing and is null."""
    original = trial._trained

    def gaining(result):
        points = []
        for point in result.points:
            lost = -0.01 * point.scale * (2 if result.method == "hold" else 1)
            learning = replace(point.learning, nats=point.scale)
            wide = replace(point.forgetting["wide"], nats=lost)
            forgetting = {**point.forgetting, "wide": wide}
            points.append(replace(point, learning=learning, forgetting=forgetting))
        return replace(result, points=points)

    monkeypatch.setattr(trial, "_trained", lambda job: gaining(original(job)))
    for path in done.glob("runs/*/run.json"):
        write_record(path, gaining(read_record(path, TrialRun)))
    assert run(experiment(), done) == 0
    summary = json.loads((done / "compare.json").read_text())
    assert all(gap["ratio"] is None for gap in summary["differences"] if gap["text"] == "wide")
    assert (
        "plain scaled back forgets -0.0095" in summary["verdict"][0]
        and "x," not in summary["verdict"][0]
    )


def test_a_sequence_that_fails_is_told(succession, learned_singly, monkeypatch):
    original = sequence.take

    def failing(steps, number):
        if steps.each[number - 1].options.method == "o-lora":
            raise RuntimeError("broken")
        return original(steps, number)

    monkeypatch.setattr(sequence, "take", failing)
    apart = {"like": "plain", "method": "o-lora", "orthogonality": 2}
    way = {"domains": ["domain", "second"], "methods": {"plain": None, "apart": apart}}
    path = succession(methods=["plain"], domains=way["domains"], sequences={"way": way})
    assert run(path, learned_singly) == 0
    summary = json.loads((learned_singly / "compare.json").read_text())
    apart = next(s for s in summary["sequences"] if s["method"] == "apart")
    assert (
        apart["error"] == "RuntimeError: broken"
        and len(apart["matrix"]) == 2
        and apart["average"] is None
    )
    assert "way: apart did not get to the end in every seed." in summary["verdict"]


def test_runs_made_before_an_option_came_are_still_found():
    """The address of a run must not change when tune gets a new option: a campaign of days would
    start again.
    """
    given = {"model": "m", "data": "d", "out": "o", "importance": "i", "strength": 3, "seed": 2}
    given["general"] = None  # as a comparison gives it, which measures by itself

    def address(**more):
        return identity(resolve(TuneOptions, {**given, **more}), more=["x", [1]])

    assert address() == "83d9c16ba459881f"
    assert address(method="kl", replay="self") == "4fc548ebb8660d7e"
    assert address(preset="paper") == "1c8a18fc6811a2b3"
    assert address(earlier="e") == "f428cad140719e1d"
    assert address(device="cpu", threads=2, log_steps=1, keep_all=True) == address()
    assert address(data="other", replay="other", importance="other") == address()


@pytest.mark.parametrize("method", ["oft", "osf", "full"])
def test_updates_that_are_not_loras_are_scaled_too(experiment, tmp_path, method):
    """By the difference of the weights: half of it lies between the base and all of it."""
    options = {"method": method, "learning_rate": 1e-3}
    out = tmp_path / "out"
    assert (
        run(
            experiment(
                methods={"plain": {}, "other": options},
                seeds={"validation": [0], "test": []},
                scales=[0.5, 0.01],
            ),
            out,
        )
        == 0
    )
    found = next(
        r for r in json.loads((out / "compare.json").read_text())["runs"] if r["method"] == "other"
    )
    learned = {point["scale"]: point["learning"]["nats"] for point in found["points"]}
    assert set(learned) == {1.0, 0.5, 0.01} and abs(learned[0.01]) < 0.1 * abs(learned[1.0])
    assert learned[0.5] == pytest.approx(learned[1.0] / 2, rel=0.5)
    assert learned[1.0] != 0


def test_what_is_answered_is_of_the_chosen_settings(experiment, done, monkeypatch):
    """Also where nothing is tested."""
    loaded, original = [], samples.load_tuned

    def noted(options, folder, **more):
        loaded.append(Path(folder).parent.name)
        return original(options, folder, **more)

    monkeypatch.setattr(samples, "load_tuned", noted)
    for part in ("validation", "both"):
        loaded.clear()
        assert run(experiment(), done, "--part", part) == 0
        runs = json.loads((done / "compare.json").read_text())["runs"]
        wanted = {
            r["id"]
            for r in runs
            if r["chosen"] and r["part"] == ("test" if part == "both" else "validation")
        }
        assert len(loaded) == 2 and set(loaded) <= wanted


def test_updates_on_a_quantised_base_that_are_not_loras_are_measured_whole(
    model_folder, tmp_path, monkeypatch
):
    """By the adapter itself: the weights are codes, of which there are no differences."""
    given = {"model": str(model_folder), "data": "d", "out": "o"}
    quantised = resolve(TuneOptions, {**given, "quantize": "4bit", "method": "oft"})
    live = torch.nn.Linear(2, 2)
    monkeypatch.setattr(trial, "load_tuned", lambda *arguments, **more: live)
    assert list(trial._scaled(quantised, tmp_path, [0.5])) == [(1.0, live)]
    lora = add_adapter(
        load_model(resolve(TuneOptions, given)), names="all-linear", rank=2, alpha=4.0
    )
    monkeypatch.setattr(trial, "load_tuned", lambda *arguments, **more: lora)
    assert [scale for scale, _ in trial._scaled(quantised, tmp_path, [0.5, 0.25])] == [
        1.0,
        0.5,
        0.25,
    ]


def test_methods_may_share_a_run_and_be_renamed(experiment, done, monkeypatch):
    """What a run is decides its address, not what it is called."""
    out, rates = done, {"learning_rate": [1e-3, 1e-2]}
    named = lambda **methods: experiment(
        methods={"plain": {"grid": rates}, **methods}, seeds={"validation": [0], "test": [1]}
    )
    assert run(named(twin={"grid": {"learning_rate": [1e-2, 2e-2]}}), out) == 0
    summary = json.loads((out / "compare.json").read_text())
    ran = lambda label: [r for r in summary["runs"] if r["method"] == label]
    assert len(ran("plain")) == len(ran("twin")) == 3 and {r["id"] for r in ran("plain")} & {
        r["id"] for r in ran("twin")
    }
    monkeypatch.setattr(trial, "_trained", lambda job: pytest.fail("ran again"))
    assert run(named(brother={"grid": {"learning_rate": [1e-2, 2e-2]}}), out) == 0
    renamed = json.loads((out / "compare.json").read_text())
    assert {r["method"] for r in renamed["runs"]} == {"plain", "brother"}
    numbers = lambda found, label: [
        {**row, "method": None}
        for row in found["equal_learning"]["domain"]["wide"]
        if row["method"] == label
    ]
    assert numbers(renamed, "brother") == numbers(summary, "twin")
    assert (
        renamed["progress"]["done"]
        == renamed["progress"]["of"]
        == len({r["id"] for r in renamed["runs"]})
        < len(renamed["runs"])
    )


def test_until_every_method_is_tested_the_verdict_is_of_the_validation_part(
    experiment, done, monkeypatch
):
    path, out, original = experiment(), done, trial._trained
    # One run of plain is left to be made, after which the summary is written.
    left = lambda made: made["part"] == "test" and (made["method"], made["seed"]) != ("plain", 1)
    forget_runs(out, left)

    def interrupted(job):
        if job.trial.part == "test" and job.trial.method == "hold":
            raise KeyboardInterrupt
        return original(job)

    monkeypatch.setattr(trial, "_trained", interrupted)
    assert run(path, out) == 130
    summary = json.loads((out / "compare.json").read_text())
    assert [r["method"] for r in summary["runs"] if r["part"] == "test"] == ["plain", "plain"]
    assert {row["part"] for row in summary["equal_learning"]["domain"]["wide"]} == {
        "validation"
    } and "not yet tested" in summary["verdict"][0]
    assert summary["progress"] == {**summary["progress"], "done": 6, "of": 8}


def test_a_sequence_adds_up_one_kind_of_importance(succession, learned_singly):
    """Where another recipe was chosen for a later domain, the sum would be of neither."""
    kinds = {"default": {"batch_size": 8}, "fisher": {"estimator": "fisher", "batch_size": 8}}
    way = {"domains": ["domain", "second"], "methods": {"hold": None}}
    path = succession(domains=way["domains"], importance=kinds, sequences={"way": way})
    out = learned_singly
    original = sequence.SequenceSpec.settings

    def other(self, label, domain, chosen):
        return original(self, label, domain, chosen) | (
            {"importance": "fisher"} if domain == "second" else {}
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequence.SequenceSpec, "settings", other)
        assert run(path, out) == 0
    assert (
        "a sequence adds one kind up"
        in json.loads((out / "compare.json").read_text())["sequences"][0]["error"]
    )


def test_a_changed_recipe_leaves_only_its_own_file_in_the_report(experiment, done):
    smaller = {"default": {"batch_size": 4}}
    assert run(experiment(importance=smaller), done, "--part", "validation") == 0
    found = json.loads((done / "compare.json").read_text())["importance"]
    assert len(found) == 1 and len(list((done / "importance").glob("*.safetensors"))) == 2


def test_answers_to_chats_come_through_the_chat_template(
    experiment, model_folder, tokenizer, tmp_path
):
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(model_folder)
    turns = lambda i: [
        {"role": "user", "content": f"Question {i} ?"},
        {"role": "assistant", "content": " a b c"},
    ]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("\n".join(json.dumps({"messages": turns(i)}) for i in range(40)))
    seen = []

    def noted(tokenizer, chat, *, prompt=False):
        seen.append((chat.messages, prompt))
        return encoding.templated(tokenizer, chat, prompt=prompt)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "templated", noted)
        assert (
            run(
                experiment(
                    model=str(model_folder),
                    domains={"domain": str(chats)},
                    seeds={"validation": [0], "test": []},
                ),
                tmp_path / "out",
            )
            == 0
        )
    assert seen and all(
        prompt and [turn["role"] for turn in messages] == ["user"] for messages, prompt in seen
    )


def test_out_of_memory_is_a_result_and_a_failure_is_tried_again(
    experiment, done, tmp_path, monkeypatch
):
    path, out, original = experiment(), done, trial._trained
    forget_runs(out, lambda made: made["method"] == "hold")
    failing = {"hold": MemoryError("no room"), "plain": None}

    def trained(job):
        if (error := failing[job.trial.method]) is not None:
            raise error
        return original(job)

    monkeypatch.setattr(trial, "_trained", trained)
    assert run(path, out, "--part", "validation") == 0
    summary = json.loads((out / "compare.json").read_text())
    assert [r["status"] for r in summary["runs"]] == [
        "done",
        "done",
        "out of memory",
        "out of memory",
    ] and "2 runs failed" in summary["verdict"][-1]
    shutil.copytree(done, tmp_path / "other", ignore=shutil.ignore_patterns("runs"))
    failing["plain"] = RuntimeError("broken")
    assert run(path, tmp_path / "other", "--part", "validation") == 1  # nothing succeeded
    failing["plain"] = None
    assert (
        run(path, tmp_path / "other", "--part", "validation") == 0
    )  # what failed was tried again, what had no room was not
    assert (
        sorted(
            r["status"]
            for r in json.loads((tmp_path / "other" / "compare.json").read_text())["runs"]
        )
        == ["done", "done"] + ["out of memory"] * 2
    )


def test_two_processes_give_what_one_gives_also_where_one_is_killed(
    experiment, done, forked, tmp_path
):
    """As the system does to a process that takes too much memory: its run is noted as failed, the
    others go on, and the same command makes up for it.
    """
    path, killed = experiment(), []

    def kill_one():
        while not list((tmp_path / "two").glob("runs/*/log.txt")):
            time.sleep(0.01)
        killed.append(
            next(process for process in multiprocessing.active_children() if process.is_alive())
        )
        killed[0].kill()

    assert run(path, done, "--part", "validation") == 0
    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    assert run(path, tmp_path / "two", "--part", "validation", "--jobs", "2") == 1
    killer.join()
    failed = [
        r
        for r in json.loads((tmp_path / "two" / "compare.json").read_text())["runs"]
        if r["status"] != "done"
    ]
    assert [r["status"] for r in failed] == ["failed"] and failed[0]["error"].startswith("killed: ")
    assert run(path, tmp_path / "two", "--part", "validation") == 0
    one, two = (json.loads((out / "compare.json").read_text()) for out in (done, tmp_path / "two"))
    assert [r["points"] for r in one["runs"]] == [r["points"] for r in two["runs"]] and two[
        "progress"
    ]["failed"] == 0


def test_one_campaign_at_a_time(experiment, tmp_path, capsys):
    with only_writer(tmp_path / "out"):
        assert run(experiment(), tmp_path / "out") == 1
    assert (
        f"process {os.getpid()} on {socket.gethostname()} (since "
        in (said := capsys.readouterr().err)
        and "give another --out" in said
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": {}}, "unknown key 'method'; did you mean 'methods'?"),
        ({"general": {"wide": "wide.jsonl"}}, "at least two texts"),
        (
            {"methods": {"hold": {"importance": "default", "strength": 1}}},
            "none is plain fine-tuning",
        ),
        (
            {
                "methods": {
                    "plain": {"grid": {"rank": [1, 2]}},
                    "kl": {"method": "kl", "replay": "recorded"},
                }
            },
            "unequal numbers of trials (plain 2, kl 1)",
        ),
        (
            {"methods": {"plain": {}, "x": {"importance": "defualt"}}},
            "unknown importance 'defualt'; did you mean 'default'?",
        ),
        ({"methods": {"plain": {"learnign_rate": 1}}}, "methods: plain: "),
        ({"methods": {"plain": {"seed": 1}}}, "'seed' is set by the experiment itself"),
        ({"seeds": {"validation": [1], "test": [1]}}, "fresh seeds"),
        ({"seeds": {"test": [1]}}, "validation part, which needs at least one seed"),
        ({"scales": [0.5, 2]}, "scales lie between 0 and 1"),
        ({"shares": []}, "expected some between 0 and 1"),
        ({"training": {"seed": 5}}, "training: 'seed' is set by the experiment itself"),
        ({"training": {"importance": "default"}}, "training: 'importance' is set by the methods"),
        (
            {"methods": {"plain": {}, "x": {"method": "klx"}}},
            "methods: x: unknown method 'klx'; did you mean 'kl'?",
        ),
        (
            {"methods": {"plain": {}, "x": {"method": "kl"}}},
            "methods: x: --method kl needs --replay",
        ),
        (
            {
                "methods": {
                    "plain": {"grid": {"rank": [1]}},
                    "x": {"grid": {"importance": ["nope"]}},
                }
            },
            "methods: x: unknown importance 'nope'",
        ),
        ({"domains": {"domain": {"test": "x"}}}, "domains: domain expects data"),
        (
            {"sequences": {"way": {"domains": ["domain"], "methods": ["plain"]}}},
            "two or more different domains, found domain",
        ),
        (
            {"sequences": {"way": {"domains": ["domain", "domian"], "methods": ["plain"]}}},
            "unknown domain 'domian'; did you mean 'domain'?",
        ),
        (
            {
                "sequences": {
                    "way": {
                        "domains": ["domain", "domain2"],
                        "methods": {"plain": {"consolidate": "mean"}},
                    }
                },
                "domains": {"domain": "a.jsonl", "domain2": "b.jsonl"},
            },
            "way: plain: --consolidate expects sum, none, or decay:0.9",
        ),
        ({"sequences": {"way": ["domain", "other"]}}, "way expects domains (a list) and methods"),
        (
            {
                "sequences": {"way": {"domains": ["domain", "domain2"], "methods": ["o-lora"]}},
                "domains": {"domain": "a.jsonl", "domain2": "b.jsonl"},
            },
            "unknown method 'o-lora'",
        ),
    ],
)
def test_wrong_experiments_are_refused_before_anything_is_loaded(
    experiment, tmp_path, capsys, change, message
):
    assert run(experiment(**change), tmp_path / "out") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_experiment_may_differ_from_another_one(experiment, tmp_path):
    path = experiment()
    other = tmp_path / "other.yaml"
    other.write_text(
        "base: experiment.yaml\nmethods: {hold: null}\ntraining: {max_steps: 5}\nseeds: "
        "{validation: [0, 7]}\n"
    )
    found = read(other)
    assert (
        list(found.methods) == ["plain"]
        and found.training["max_steps"] == 5
        and found.training["rank"] == 2
    )
    assert [trial.seed for trial in validation_trials(found)] == [0, 7, 0, 7] and found.seeds[
        "test"
    ] == read(path).seeds["test"]
    other.write_text(
        "base: experiment.yaml\ntitle: null\nsequences: {way: {domains: [domain, two], methods: "
        "{plain: , hold: }}}\n"
        "domains: {two: second.jsonl}\n"
    )
    assert list(read(other).sequences["way"].methods) == [
        "plain",
        "hold",
    ]  # null removes what is there, and means no options where nothing is
    other.write_text("base: experiment.yaml\nmethods: {hodlfast: null}\ntraining: {warmup: null}\n")
    assert (
        list(read(other).methods) == ["plain", "hold"] and "warmup" not in read(other).training
    )  # nothing to remove
    other.write_text("base: other.yaml\n")
    with pytest.raises(OptionError, match="leads back to itself"):
        read(other)


@pytest.mark.parametrize(
    ("file", "trials"),
    [
        ("examples/compare/methods.yaml", 3),
        ("experiments/lab.yaml", 3),
        ("experiments/lab-sequence.yaml", 3),
        ("experiments/lab-rivals.yaml", 6),
    ],
)
def test_the_experiments_that_are_shipped_are_whole(file, trials):
    found = read(Path(__file__).parents[1] / file)
    assert len(found.methods) >= 5 and len(validation_trials(found)) == trials * len(
        found.methods
    ) * len(found.domains)


def test_dry_run_says_what_would_be_run(experiment, tmp_path, capsys):
    assert run(experiment(), tmp_path / "out", "--dry-run") == 0
    assert (
        "4 validation runs and 4 test runs" in capsys.readouterr().out
        and not (tmp_path / "out").exists()
    )


def test_near_duplicates_fall_into_one_part_whatever_the_order():
    rng = random.Random(1)
    texts = [" ".join(rng.choices(WORDS, k=30)) + f" {i}" for i in range(60)]
    near = [text.replace("cat", "cow", 1) + " at the end" for text in texts[:20]]
    both = [*texts, *near, texts[5].upper()]
    found = groups(both)
    assert (
        all(found[i] == found[60 + i] for i in range(20))
        and found[80] == found[5]
        and len(set(found)) == 60
    )
    parts = carve(both, (0.7, 0.3))
    assert sorted(parts[0] + parts[1]) == list(range(81)) and 10 < len(parts[1]) < 40
    assert all((i in parts[0]) == (60 + i in parts[0]) for i in range(20))
    order = list(range(81))
    rng.shuffle(order)
    assert [
        [both[order[i]] for i in part] for part in carve([both[i] for i in order], (0.7, 0.3))
    ] == [[both[i] for i in part] for part in parts]


def test_gpus_are_shared_out_unless_the_experiment_names_one(experiment, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [gpus_to_share(read(experiment(device=name))) for name in ("cuda", "cuda:1")] == [2, 0]


def test_reading_results_needs_no_torch():
    code = (
        "import sys, forgetless.compare.summary, forgetless.compare.frontier, "
        "forgetless.compare.experiment_file; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_questions_are_answered_after_the_runs_and_train_nothing_again(
    experiment, ground, done, forked, tmp_path, monkeypatch, capsys
):
    out = done
    questions = "\n".join(
        json.dumps({"goal": f"Question {i}", "sol1": " a b", "sol2": " c d", "label": i % 2})
        for i in range(12)
    )
    (tmp_path / "questions.jsonl").write_text(questions)
    spec = f"piqa={tmp_path / 'questions.jsonl'}"
    monkeypatch.setattr(trial, "_trained", lambda job: pytest.fail("trained again"))
    domain = {
        "data": str(ground / "domain.jsonl"),
        "test": str(ground / "held.jsonl"),
        "task": spec,
    }
    assert (
        run(
            experiment(
                domains={"domain": domain},
                tasks={"other": spec},
                limit={"validation": 100, "test": 300},
            ),
            out,
            "--jobs",
            "2",
        )
        == 0
    )
    summary = json.loads((out / "compare.json").read_text())
    whole = [
        r["points"][i]
        for r in summary["runs"]
        if r["part"] == "test"
        for i in range(2)
        if r["points"][i]["scale"] == 1.0
    ]
    assert (
        len(whole) == 4 and summary["domains"][0]["before"]["accuracy"] == 0.5
    )  # the same two answers everywhere: one of them is always preferred
    for point in whole:
        assert (
            point["accuracy"]["questions"] == 12
            and point["accuracy"]["after"] == 0.5
            and point["accuracy_general"]["other"]["after"] == 0.5
        )
    assert (
        run(experiment(tasks={"domain": spec}), out) == 2
        and "put its questions there" in capsys.readouterr().err
    )
    assert (
        run(experiment(tasks={"other": "pika=x.jsonl"}), out) == 2
        and "did you mean 'piqa'?" in capsys.readouterr().err
    )
