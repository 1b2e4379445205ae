"""tune on several domains in turn: one plain adapter in the end, the matrix, resuming from
anywhere, going on from an earlier run, a budget over all of it.
"""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from forgetless.budget import learning as budget_learning
from forgetless.budget.learning import fitting
from forgetless.budget.open import LEAST_ROWS
from forgetless.cli import main
from forgetless.data.domain import load_training_data
from forgetless.evaluate.losses import completion_loss
from forgetless.importance.importance import Importance
from forgetless.methods.table import chosen
from forgetless.model.adapters import add_adapter
from forgetless.model.stack import stack
from forgetless.model.targets import target_weights
from forgetless.options.methods import METHODS, Method
from forgetless.options.model import ModelOptions
from forgetless.options.record import RecordOptions
from forgetless.options.tune import TuneOptions
from forgetless.options.verbs import resolve
from forgetless.record import recording
from forgetless.record import training as path_training
from forgetless.record.record import record
from forgetless.sequence import importance as domain_importance
from forgetless.sequence import matrix
from forgetless.sequence import sequence as succession
from forgetless.sequence import steps as engine
from forgetless.sequence.checks import planned
from forgetless.sequence.domains import earlier_of
from forgetless.sequence.transfer import transfer
from forgetless.tune import adapted
from forgetless.tune import result as tune_result
from forgetless.tune import trainer as tune_trainer
from forgetless.tune.tune import tune

WORDS = "the cat sat on mat and dog then too yes no one two three".split()


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def general(tmp_path):
    rng = random.Random(0)
    return write(
        tmp_path / "general.jsonl",
        [{"text": " ".join(rng.choices(WORDS, k=rng.randint(8, 20)))} for _ in range(160)],
    )


@pytest.fixture
def domains(tmp_path):
    """Two of prompts and completions, and a task; each with words of its own."""
    rng, some = random.Random(7), lambda n: " ".join(rng.choices(WORDS, k=n))
    first = [
        {"prompt": f"{some(3)} ?", "completion": " a b a " + rng.choice("ab")} for _ in range(96)
    ]
    second = [
        {"prompt": f"{some(3)} :", "completion": " c d d " + rng.choice("cd")} for _ in range(96)
    ]
    third = [
        {
            "question": some(3),
            "correct_answer": "user dog",
            "distractor1": "the cat",
            "distractor2": "on mat",
            "distractor3": "too",
            "support": some(2),
        }
        for _ in range(96)
    ]
    return [
        str(write(tmp_path / "first.jsonl", first)),
        str(write(tmp_path / "second.jsonl", second)),
        f"sciq={write(tmp_path / 'third.jsonl', third)}",
    ]


@pytest.fixture
def importance(model_folder, general, tmp_path):
    """A function: options -> an importance file of the tiny model."""

    def make(**given):
        path = tmp_path / "importance.safetensors"
        options = {
            "model": str(model_folder),
            "general": str(general),
            "out": str(path),
            "batch_size": 8,
            "cov_rank": 4,
            "overwrite": True,
            **given,
        }
        record(resolve(RecordOptions, options))
        return str(path)

    return make


@pytest.fixture
def words(model_folder, general, tmp_path):
    """The command line without its data."""
    return [
        "tune",
        model_folder,
        "--general",
        general,
        "--rank",
        "2",
        "--batch-size",
        "8",
        "--accumulation",
        "1",
        "--max-steps",
        "6",
        "--learning-rate",
        "1e-2",
        "--log-steps",
        "1",
        "--device",
        "cpu",
        "--save-steps",
        "2",
    ]


def run(words, *more):
    return main([str(word) for word in (*words, *more)])


def of(domains):
    return [word for domain in domains for word in ("--data", domain)]


def result(folder):
    return json.loads((folder / "run.json").read_text())


def factors(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_three_domains_give_one_adapter_that_loads_without_forgetless_and_a_matrix(
    words, domains, importance, model_folder, tmp_path, capsys
):
    out = tmp_path / "run"
    assert run(words, *of(domains), "--importance", importance(), "--out", out, "--keep-all") == 0
    found = result(out)["sequence"]
    assert (
        found["domains"] == ["first", "second", "sciq"]
        and len(found["matrix"]) == 4
        and len(found["general"]) == 4
    )
    assert found["accuracy_domains"] == ["sciq"] and len(found["accuracy"]) == 4
    assert {
        key: found[key] for key in ("average", "backward_transfer", "forward_transfer")
    } == transfer(found["matrix"])
    assert all(
        found["matrix"][j + 1][j] < found["matrix"][0][j] for j in range(3)
    )  # each was learned in its turn
    said = capsys.readouterr().out
    assert (
        "after second" in said
        and "backward transfer" in said
        and f"{found['matrix'][3][0]:.4f}" in said
    )

    tokenizer = AutoTokenizer.from_pretrained(out / "final")
    for row in range(1, 4):  # the adapter of every step, and the final one, for the base itself
        folder = out / "final" if row == 3 else out / "steps" / str(row) / "adapter"
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(model_folder), folder
        ).eval()
        for j, name in enumerate(("1-first", "2-second")):
            loss = completion_loss(
                model, tokenizer, load_training_data(str(out / "data" / f"{name}.held.jsonl"))
            )
            assert loss.nats == pytest.approx(found["matrix"][row][j], abs=1e-5)
    assert next(iter(factors(out / "final").values())).shape[0] == 6  # three updates of rank 2

    held = [
        json.loads(line) for line in (out / "data" / "1-first.held.jsonl").read_text().splitlines()
    ]
    trained = [
        json.loads(line) for line in (out / "data" / "1-first.train.jsonl").read_text().splitlines()
    ]
    assert len(held) == 20 and not [row for row in held if row in trained]
    steps = found["steps"]
    assert steps[0]["consolidated"] is None and [
        len(step["consolidated"]) for step in steps[1:]
    ] == [1, 2]
    last = Importance.load(out / "importance.safetensors")
    assert last.tier == "kronecker:4" and [
        step["data"]["documents"] for step in last.info["consolidated"]
    ] == [76, 76]
    assert all(
        0 <= step["error"]["median"] <= step["error"]["largest"] < 1
        for step in last.info["consolidated"]
    )


def test_each_step_trains_on_the_merged_model_and_is_held_by_the_consolidated_importance(
    words, domains, importance, tmp_path, monkeypatch
):
    seen = []
    original = adapted.model_to_train

    def prepared(setup, methods, model):
        seen.append(
            (model.model.layers[0].self_attn.q_proj.weight.detach().clone(), setup.importance)
        )
        return original(setup, methods, model)

    monkeypatch.setattr(adapted, "model_to_train", prepared)
    file = importance(estimator="fisher", cov_rank=None)
    assert (
        run(
            words,
            *of(domains[:2]),
            "--importance",
            file,
            "--out",
            tmp_path / "run",
            "--keep-all",
            "--consolidate",
            "decay:0.75",
        )
        == 0
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    A, B = (
        factors(tmp_path / "run" / "steps" / "1" / "adapter")[
            f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight"
        ]
        for side in "AB"
    )
    torch.testing.assert_close(seen[1][0] - seen[0][0], 16 * B @ A, atol=1e-6, rtol=1e-4)
    general, both = Importance.load(file), seen[1][1]
    first = (both[name].dense() - 0.75 * general[name].dense()) / 0.25
    assert (
        float(first.min()) > -1e-9 and float(first.max()) > 0
    )  # a running average with what was recorded on the first domain


@pytest.mark.parametrize(
    "estimator",
    ["fisher", *(pytest.param(name, marks=pytest.mark.slow) for name in ("path", "uniform"))],
)
def test_every_estimator_and_tier_is_recorded_again_as_it_was(
    words, domains, importance, tmp_path, estimator
):
    more = {"estimator": estimator, "cov_rank": None} | (
        {"rank": 2, "accumulation": 1, "epochs": 1} if estimator == "path" else {}
    )
    more |= {"tier": "factored"} if estimator == "fisher" else {}
    strength = ["--strength", "0.1"] if estimator == "uniform" else []
    assert (
        run(
            words,
            *of(domains[:2]),
            "--importance",
            importance(**more),
            "--out",
            tmp_path / "run",
            *strength,
        )
        == 0
    )
    last = Importance.load(tmp_path / "run" / "importance.safetensors")
    assert (
        last.info["estimator"] == estimator
        and last.tier == {"path": "f32", "fisher": "factored:2", "uniform": "factored"}[estimator]
    )


PHASES = {
    "training": (tune_trainer.StopOnNonFinite, "on_pre_optimizer_step", 7),
    "training the first": (tune_trainer.StopOnNonFinite, "on_pre_optimizer_step", 3),
    "recording a domain": (recording, "by_observing", 1),
    "consolidating": (domain_importance, "consolidated", 1),
    "saving a step": (tune_result, "save_whole", 2),
    "stacking": (engine, "stack", 2),
    "measuring": (matrix, "measure", 2),
    "at the end": (succession, "_finish", 1),
    "copying the end": (succession, "write_record", 1),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Where the run stands that nothing interrupts: the first phase's test makes it for all."""
    return tmp_path_factory.mktemp("uninterrupted") / "whole"


@pytest.mark.parametrize("phase", PHASES)
def test_interrupted_in_any_phase_it_resumes_to_the_same_bits(
    words, domains, importance, whole, tmp_path, monkeypatch, phase
):
    words = [*words, *of(domains[:2]), "--importance", importance(), "--max-steps", "4"]
    if not whole.exists():
        assert run(words, "--out", whole) == 0
    place, name, stop = PHASES[phase]
    out, calls, original = tmp_path / "parted", 0, getattr(place, name)

    def interrupted(*arguments, **more):
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt
        return original(*arguments, **more)

    monkeypatch.setattr(place, name, interrupted)
    assert run(words, "--out", out) == 130
    monkeypatch.setattr(place, name, original)
    assert not (out / "run.json").exists()
    assert (
        run(words, "--out", out, "--resume", "--rank", "4")
        == run(words, "--out", out, "--resume", "--limit", "4")
        == 2
    )
    assert run(words, "--out", out, "--resume") == 0
    assert same(factors(whole / "final"), factors(out / "final"))
    assert same(
        load_file(whole / "importance.safetensors"),
        load_file(out / "importance.safetensors"),
    )
    expected, parted = (result(folder)["sequence"] for folder in (whole, out))
    assert all(parted[key] == expected[key] for key in ("matrix", "accuracy", "general", "average"))


@pytest.mark.slow
def test_a_recording_resumes_in_its_middle(words, domains, importance, tmp_path, monkeypatch):
    words = [
        *words,
        *of(domains[:2]),
        "--importance",
        importance(
            estimator="path", cov_rank=None, rank=2, accumulation=1, batch_size=4, save_steps=2
        ),
    ]
    assert run(words, "--out", tmp_path / "whole") == 0
    calls, original = 0, path_training.step

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(path_training, "step", interrupted)
    assert run(words, "--out", tmp_path / "parted") == 130
    assert (tmp_path / "parted" / "steps" / "2" / "domain.safetensors.state").exists()
    assert run(words, "--out", tmp_path / "parted", "--resume") == 0
    assert calls == 6 + 19 - 4  # 76 rows in steps of 4, of which 4 were saved
    assert same(factors(tmp_path / "whole" / "final"), factors(tmp_path / "parted" / "final"))


def test_a_later_run_goes_on_from_an_earlier_one(
    words, domains, importance, model_folder, tmp_path
):
    base, held = ["--importance", importance()], tmp_path / "held.jsonl"
    held.write_text("\n".join(Path(domains[0]).read_text().splitlines()[:24]))
    assert (
        run(words, "--data", domains[0], "--eval-data", held, *base, "--out", tmp_path / "one") == 0
    )
    assert (
        run(words, "--data", domains[1], "--after", tmp_path / "one", "--out", tmp_path / "two")
        == 0
    )
    assert (
        run(words, "--data", domains[2], "--after", tmp_path / "two", "--out", tmp_path / "three")
        == 0
    )
    two, three = result(tmp_path / "two"), result(tmp_path / "three")
    assert two["sequence"]["domains"] == ["first", "second"] and two["sequence"]["learned"] == [
        1,
        2,
    ]
    assert two["sequence"]["matrix"][1][0] == pytest.approx(
        result(tmp_path / "one")["after"]["domain"]["nats"], abs=1e-5
    )
    assert three["sequence"]["learned"] == [1, 1, 2] and three["sequence"]["matrix"][1][
        :2
    ] == pytest.approx(two["sequence"]["matrix"][2], abs=1e-5)
    assert next(iter(factors(tmp_path / "three" / "final").values())).shape[0] == 6
    assert (
        len(Importance.load(tmp_path / "three" / "importance.safetensors").info["consolidated"])
        == 2
    )


def test_a_budget_covers_general_text_and_every_earlier_domain(
    words, domains, importance, tmp_path, capsys
):
    code = run(
        words,
        *of(domains),
        "--importance",
        importance(),
        "--budget",
        "4%",
        "--allow-recorded-text",
        "--max-steps",
        "10",
        "--out",
        tmp_path / "run",
        "--keep-all",
    )
    found = result(tmp_path / "run")
    budgets = [step["budget"] for step in found["sequence"]["steps"]]
    assert [budget["budget_nats"] for budget in budgets] == [
        pytest.approx(share * math.log(1.04)) for share in (1 / 3, 2 / 3, 1)
    ]
    assert budgets[0]["check"]["each"] is None and set(budgets[2]["check"]["each"]) == {
        "general text",
        "first",
        "second",
    }
    assert (
        code == (0 if found["verdict"] == "met" else 3)
        and found["verdict"] == budgets[2]["verdict"] == "met"
    )
    worst = max(budgets[2]["check"]["each"].values(), key=lambda one: one["high"])
    assert budgets[2]["check"]["high"] == worst["high"] <= math.log(1.04)
    assert all(point["bound"] >= point["rise"]["nats"] for point in budgets[2]["curve"])
    matrix, general = found["sequence"]["matrix"], found["sequence"]["general"]
    assert all(matrix[3][j] < matrix[0][j] for j in range(2)) and general[3]["nats"] < math.log(
        1.04
    )


@pytest.mark.slow
def test_a_budget_resumes_with_what_it_knows_of_earlier_domains(
    words, domains, importance, tmp_path, monkeypatch
):
    words = [
        *words,
        *of(domains[:2]),
        "--importance",
        importance(),
        "--budget",
        "8%",
        "--max-steps",
        "14",
        "--batch-size",
        "24",
    ]
    assert run(words, "--out", tmp_path / "whole") in (0, 3)
    original, calls = tune_trainer.StopOnNonFinite.on_pre_optimizer_step, 0

    def interrupted(self, *arguments, **more):
        nonlocal calls
        calls += 1
        if (
            calls == 14 + 10
        ):  # in the second domain, two steps after a checkpoint that holds a probe
            raise KeyboardInterrupt
        return original(self, *arguments, **more)

    monkeypatch.setattr(tune_trainer.StopOnNonFinite, "on_pre_optimizer_step", interrupted)
    assert run(words, "--out", tmp_path / "parted") == 130
    assert run(words, "--out", tmp_path / "parted", "--resume") in (0, 3)
    whole, parted = (result(tmp_path / name) for name in ("whole", "parted"))
    assert (
        whole["budget"]["trajectory"] == parted["budget"]["trajectory"]
        and len(whole["budget"]["trajectory"]) >= 2
    )
    assert same(factors(tmp_path / "whole" / "final"), factors(tmp_path / "parted" / "final"))


def test_stacked_adapters_are_the_sum_whatever_their_ranks_scales_and_targets(
    tiny, model_folder, tokenizer, tmp_path
):
    total = {}
    for number, (names, rank, alpha, rslora) in enumerate(
        (("all-linear", 3, 7.0, False), ("q_proj,v_proj", 2, 5.0, True))
    ):
        torch.manual_seed(number)
        model = add_adapter(
            AutoModelForCausalLM.from_pretrained(model_folder),
            names=names,
            rank=rank,
            alpha=alpha,
            rslora=rslora,
        )
        for weight in target_weights(model):
            weight.B.data.normal_()
            total[weight.name] = total.get(weight.name, 0) + weight.update()
        model.save_pretrained(tmp_path / str(number))
    stack(
        resolve(ModelOptions, {"model": str(model_folder)}),
        [str(tmp_path / "0"), str(tmp_path / "1")],
        tmp_path / "both",
    )
    both = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "both"
    )
    found = {weight.name: weight.update() for weight in target_weights(both)}
    assert found.keys() == total.keys()
    for name in total:
        torch.testing.assert_close(found[name], total[name])


def test_a_smaller_final_rank_is_the_nearest_and_measured(
    words, domains, model_folder, tmp_path, capsys
):
    assert (
        run(words, *of(domains[:2]), "--out", tmp_path / "run", "--keep-all", "--final-rank", "3")
        == 0
    )
    updates = []
    for place in ("steps/2/adapter", "final"):
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "run" / place
        )
        updates.append({weight.name: weight.update() for weight in target_weights(model)})
    whole = torch.stack(
        [values.square().sum() for values in (torch.linalg.svdvals(U) for U in updates[0].values())]
    ).sum()
    lost = torch.stack(
        [torch.linalg.svdvals(U)[3:].square().sum() for U in updates[0].values()]
    ).sum()
    found = result(tmp_path / "run")["sequence"]["refactored"]
    assert (
        found["rank"] == 3
        and found["error"] == pytest.approx(float((lost / whole).sqrt()), rel=1e-3)
        and 0 < found["error"] < 1
    )
    off = sum(float((updates[0][name] - updates[1][name]).square().sum()) for name in updates[0])
    assert (off / float(whole)) ** 0.5 == pytest.approx(found["error"], rel=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    loss = completion_loss(
        model.eval(),
        tokenizer,
        load_training_data(str(tmp_path / "run" / "data" / "1-first.held.jsonl")),
    )
    assert (
        loss.nats == pytest.approx(found["losses"]["first"], abs=1e-5)
        and "at rank 3: relative error" in capsys.readouterr().out
    )


def test_transfer_where_domains_are_learned_together():
    losses = [[4.0, 5.0, 6.0], [3.0, 4.0, 5.5], [3.5, 4.1, 2.0]]
    found = transfer(losses, [1, 1, 2])
    assert (
        found["average"] == pytest.approx(3.2)
        and found["backward_transfer"] == pytest.approx(-0.3)
        and found["forward_transfer"] == pytest.approx(0.5)
    )


@pytest.mark.slow
def test_without_consolidation_the_file_as_given_holds_every_step(
    words, domains, importance, tmp_path
):
    file = importance()
    assert (
        run(
            words,
            *of(domains[:2]),
            "--importance",
            file,
            "--consolidate",
            "none",
            "--out",
            tmp_path / "run",
        )
        == 0
    )
    assert [
        step["importance"]["file"] for step in result(tmp_path / "run")["sequence"]["steps"]
    ] == [file, file]


def test_the_example_runs_on_a_tiny_model(words, domains, importance, tmp_path):
    example = Path(__file__).parents[1] / "examples" / "sequence" / "tune-sequence.yaml"
    third = domains[2]
    code = run(
        words,
        "--config",
        example,
        "--data",
        third,
        "--data",
        domains[0],
        "--eval-data",
        third,
        "--eval-data",
        domains[0],
        "--importance",
        importance(),
        "--budget",
        "5%",
        "--allow-recorded-text",
        "--out",
        tmp_path / "run",
    )
    found = result(tmp_path / "run")
    assert found["sequence"]["domains"] == ["sciq", "first"] and (code == 0) == (
        found["verdict"] == "met"
    )


@pytest.mark.slow
def test_the_report_of_a_sequence_shows_its_matrix(words, domains, importance, tmp_path):
    assert (
        run(words, *of(domains[1:]), "--importance", importance(), "--out", tmp_path / "run") == 0
    )
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert (
        "One domain after another" in page and "backward transfer" in page and "base model" in page
    )


def test_what_cannot_be_is_refused_before_anything_is_written(
    words, domains, importance, model_folder, tmp_path, capsys
):
    def fails(code, message, *more):
        assert run(words, "--out", tmp_path / "bad", *more) == code
        assert message in capsys.readouterr().err
        assert not (tmp_path / "bad" / "run.json").exists()

    two = of(domains[:2])
    fails(2, "--full cannot be used with several domains", *two, "--full")
    fails(2, "--consolidate expects sum", *two, "--consolidate", "mean")
    fails(2, "expected 2 of it, found 1", *two, "--eval-data", domains[0])
    fails(2, "--method oft cannot be used", *two, "--method", "oft")
    fails(
        1,
        "expected a finished run of forgetless tune",
        "--data",
        domains[0],
        "--after",
        tmp_path / "nothing",
        "--method",
        "plain",
    )
    with pytest.raises(ValueError, match="tune_in_turn"):
        tune(
            resolve(
                TuneOptions,
                {"model": str(model_folder), "data": domains[:2], "out": str(tmp_path / "bad")},
            )
        )
    own = (
        Path(importance()).rename(tmp_path / "bad" / "importance.safetensors")
        if (tmp_path / "bad").is_dir()
        else None
    )
    assert own is not None
    fails(2, "lies where this run writes", *two, "--importance", own, "--overwrite")
    assert own.exists()
    own.unlink()  # no run of ours wrote it there
    few = write(tmp_path / "few.jsonl", [{"text": f"{word} dog"} for word in WORDS])
    fails(
        1,
        "at least 20 are needed",
        "--data",
        few,
        "--data",
        domains[0],
        "--budget",
        "50%",
        "--importance",
        importance(),
    )
    fails(
        1,
        "at least 20 are needed",
        *two,
        "--eval-data",
        domains[0],
        "--eval-data",
        domains[1],
        "--limit",
        "12",
        "--budget",
        "50%",
        "--importance",
        importance(),
    )
    assert not (tmp_path / "bad" / "steps").exists()


def test_a_method_that_needs_earlier_adapters_is_refused_by_its_row(
    words, domains, tmp_path, capsys, monkeypatch
):
    """Whatever its name is; on one domain it is not refused for that."""
    monkeypatch.setitem(METHODS, "toy", Method(help="a toy", needs=("earlier",)))
    toy = ("--method", "toy", "--earlier", tmp_path / "adapter", "--out", tmp_path / "bad")
    assert run(words, *of(domains[:2]), *toy) == 2
    assert "--method toy cannot be used with several domains" in capsys.readouterr().err
    assert not list((tmp_path / "bad").glob("steps"))  # nothing was tuned
    assert not (tmp_path / "bad" / "run.json").exists()
    assert list(chosen(TuneOptions(method="toy", earlier="adapter"))) == ["toy"]


def test_only_a_run_of_tune_with_lora_is_gone_on_with(
    words, domains, importance, model_folder, general, tmp_path, capsys, caplog
):
    after = lambda name, *more: run(
        words,
        "--data",
        domains[1],
        "--after",
        tmp_path / name,
        "--out",
        tmp_path / f"{name}-2",
        *more,
    )
    assert run(words, "--data", domains[0], "--method", "oft", "--out", tmp_path / "oft") == 0
    assert after("oft") == 1 and "of type OFT, expected LORA" in capsys.readouterr().err
    plain = [words, "--data", domains[0], "--method", "plain"]
    assert run(*plain, "--out", tmp_path / "plain") == 0
    file = importance()
    shrink = [
        "shrink",
        tmp_path / "plain" / "final",
        "--model",
        model_folder,
        "--importance",
        file,
        "--mu",
        "0.1",
        "--out",
        tmp_path / "shrunk",
    ]
    assert run(shrink) == 0
    assert after("shrunk") == 1 and "was not written by forgetless tune" in capsys.readouterr().err
    assert not list(tmp_path.glob("*-2/steps"))
    assert after("plain") == 0 and result(tmp_path / "plain-2")["method"] == [
        "plain"
    ]  # of a run without importance, nothing is held, and this is said
    assert "was tuned without importance" in caplog.text


def test_an_earlier_sequence_in_the_same_folder_holds_nothing(words, domains, importance, tmp_path):
    """A run that overwrites a sequence is held by its own importance, and so is what goes on from
    it.
    """
    file, out = importance(), tmp_path / "run"
    assert (
        run(words, *of(domains[:2]), "--importance", file, "--out", out) == 0
        and (out / "importance.safetensors").exists()
    )
    assert run(words, "--data", domains[0], "--importance", file, "--out", out, "--overwrite") == 0
    options = resolve(
        TuneOptions, {"model": words[1], "data": [domains[1]], "after": str(out), "out": "x"}
    )
    assert earlier_of(options)[2] == file


def test_rows_of_an_earlier_domain_are_enough_however_long_they_are(tiny, monkeypatch):
    monkeypatch.setattr(budget_learning, "LEARNING_TOKENS", 1000)
    rows = [([1] * 30, [True] * 30) for _ in range(400)]
    assert len(fitting(tiny(), rows, "long", least=LEAST_ROWS)[0]) >= LEAST_ROWS
    assert (
        30 <= len(fitting(tiny(), rows, "long")[0]) <= 34
    )  # of the domain that is learned, as many tokens as asked for


def test_a_sequence_whose_data_changed_is_not_gone_on_with(
    words, domains, tmp_path, monkeypatch, capsys
):
    held = [
        str(
            write(
                tmp_path / f"held-{i}.jsonl",
                [{"prompt": f"dog {word} ?", "completion": " a b"} for word in WORDS],
            )
        )
        for i in range(2)
    ]
    made = (
        *words,
        *of(domains[:2]),
        "--eval-data",
        held[0],
        "--eval-data",
        held[1],
        "--out",
        tmp_path / "run",
    )

    def interrupted(*arguments, **more):
        raise KeyboardInterrupt

    original = engine.tune
    monkeypatch.setattr(engine, "tune", interrupted)
    assert run(made) == 130
    before = Path(held[1]).read_text()
    Path(held[1]).write_text(before.replace("dog", "cat"))
    assert (
        run(made, "--resume") == 1
        and "changed are the held-out rows of second" in capsys.readouterr().err
    )
    Path(held[1]).write_text(before)
    monkeypatch.setattr(engine, "tune", original)
    assert run(made, "--resume") == 0


def test_a_finished_sequence_is_gone_on_with_too(words, domains, importance, tmp_path, capsys):
    """Also where it was ended while it cleared up: what the steps left is no longer whole then."""
    made = (*words, *of(domains[:2]), "--importance", importance(), "--out", tmp_path / "run")
    assert run(made) == 0
    whole, adapter = result(tmp_path / "run"), factors(tmp_path / "run" / "final")
    capsys.readouterr()
    assert run(made, "--resume") == 0 and "backward transfer" in capsys.readouterr().out
    assert result(tmp_path / "run") == whole and same(factors(tmp_path / "run" / "final"), adapter)


def test_a_refused_budget_does_not_block_the_corrected_command(words, domains, tmp_path, capsys):
    few = write(tmp_path / "few.jsonl", [{"text": "the cat sat on the mat"}] * 3)
    out = tmp_path / "refused"
    command = [*words, "--data", domains[0], "--data", domains[1], "--out", out, "--budget", "1%"]
    assert main([*map(str, command), "--general", str(few)]) == 1
    assert "too short for a budget" in capsys.readouterr().err
    given = {"model": words[1], "data": ",".join(domains[:2]), "out": str(out), "budget": "1%"}
    corrected = planned(resolve(TuneOptions, {**given, "general": words[3]}))
    assert corrected.out == out and not (out / "steps").exists()
