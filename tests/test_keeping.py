"""tune --budget end to end on a tiny model: verdicts and exit codes, what is written, resuming,
refusals.
"""

import contextlib
import copy
import json
import logging
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import interrupt_after, unheld
from forgetless import hold
from forgetless.budget import keeper
from forgetless.budget import open as opening
from forgetless.budget.baseline import Baseline, measure_baseline
from forgetless.budget.budget import parse
from forgetless.budget.finish import keep_budget
from forgetless.budget.probe import Probe, plan_probes
from forgetless.cli import main
from forgetless.data import documents
from forgetless.data.documents import load_documents
from forgetless.errors import OptionError
from forgetless.files.schema import to_json
from forgetless.importance.controls import uniform
from forgetless.model.adapters import add_adapter
from forgetless.model.update import Update
from forgetless.tune import tune as training

WORDS = "the cat sat on mat and dog then too yes no one two three".split()


@pytest.fixture
def general(tmp_path):
    """240 documents of random words, in two sources."""
    rng = random.Random(0)
    path = tmp_path / "wide.jsonl"
    path.write_text(
        "\n".join(
            json.dumps({"text": " ".join(rng.choices(WORDS, k=rng.randint(8, 20)))})
            for _ in range(240)
        )
    )
    return path


@pytest.fixture
def domain(tmp_path):
    """Prompts with completions of few words."""
    rng = random.Random(7)
    path = tmp_path / "domain.jsonl"
    path.write_text(
        "\n".join(
            json.dumps(
                {
                    "prompt": f"Question {rng.choice('abcd')} ?",
                    "completion": " a b a " + rng.choice("abcd"),
                }
            )
            for _ in range(32)
        )
    )
    return path


@pytest.fixture
def words(model_folder, general, domain, tmp_path):
    """The command line of a tuning run with a budget."""
    return [
        "tune",
        model_folder,
        "--data",
        domain,
        "--general",
        general,
        "--rank",
        "2",
        "--batch-size",
        "16",
        "--accumulation",
        "1",
        "--max-steps",
        "20",
        "--learning-rate",
        "5e-2",
        "--log-steps",
        "1",
        "--device",
        "cpu",
        "--save-steps",
        "5",
        "--out",
        tmp_path / "run",
    ]


def run(words, *more):
    return main(unheld((*words, *more)))


def factors(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_a_budget_is_met_and_the_result_loads_without_forgetless(words, tmp_path, capsys, caplog):
    assert run(words, "--budget", "2%", "--learning-rate", "5e-3") == 0
    report = json.loads((tmp_path / "run" / "run.json").read_text())["budget"]
    assert (
        report["verdict"] == "met"
        and report["check"]["high"] <= report["budget_nats"]
        and 0 < report["share"] <= 1
    )
    assert report["learning"]["nats"] > 0 and [
        point["share"] for point in report["curve"]
    ] == sorted((p["share"] for p in report["curve"]), reverse=True)
    assert "uniform importance" in caplog.text  # no importance file: said
    printed = capsys.readouterr().out
    assert (
        "budget 2%" in printed
        and ": met" in printed
        and "with 5%" in printed
        and "nats for each nat of forgetting" in printed
    )
    logged = [
        entry
        for entry in json.loads((tmp_path / "run" / "run.json").read_text())["log"]
        if "loss" in entry
    ]
    assert all("budget/strength" in entry for entry in logged) and any(
        "budget/rise" in entry for entry in logged
    )
    final, whole = factors(tmp_path / "run" / "final"), factors(tmp_path / "run" / "unscaled")
    for name, value in whole.items():
        torch.testing.assert_close(
            final[name], value * report["share"] if "lora_B" in name else value
        )
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(words[1]), str(tmp_path / "run" / "final")
    )


def test_a_budget_that_the_check_refutes_exits_with_3(words, tmp_path, capsys, monkeypatch):
    """Control text that training makes easier, check text that it makes harder: the choice is made
    in good faith and the check says no.
    """
    documents = [
        json.dumps({"text": f"Question {letter} ? a b a {letter}"}) for letter in "abcd" * 30
    ] + [
        json.dumps({"text": f"the cat {letter} sat on the dog then too {letter}"})
        for letter in WORDS
        for _ in range(9)
    ]
    general = tmp_path / "two.jsonl"
    general.write_text("\n".join(documents))
    monkeypatch.setattr(
        "forgetless.budget.baseline.split",
        lambda texts, sources: (
            [i for i, t in enumerate(texts) if "Q" in t],
            [i for i, t in enumerate(texts) if "Q" not in t],
        ),
    )
    assert run(words, "--general", general, "--budget", "2%", "--max-steps", "40") == 3
    report = json.loads((tmp_path / "run" / "run.json").read_text())["budget"]
    assert report["verdict"] == "exceeded" and [check["verdict"] for check in report["checks"]] == [
        "exceeded",
        "exceeded",
    ]
    assert report["checks"][1]["share"] < report["checks"][0]["share"]  # one fallback
    assert "EXCEEDED" in capsys.readouterr().out


def test_resuming_equals_an_uninterrupted_run(words, tmp_path, monkeypatch):
    assert run(words, "--budget", "2%", "--out", tmp_path / "whole") == 0
    interrupt_after(monkeypatch, 12)
    assert run(words, "--budget", "2%", "--out", tmp_path / "parted") == 130
    assert (
        run(words, "--budget", "1%", "--out", tmp_path / "parted", "--resume") == 2
    )  # another budget is another run
    assert run(words, "--budget", "2%", "--out", tmp_path / "parted", "--resume") == 0
    whole, parted = (
        json.loads((tmp_path / name / "run.json").read_text())["budget"]
        for name in ("whole", "parted")
    )
    assert (
        whole["trajectory"] == parted["trajectory"]
        and len(whole["trajectory"]) >= 1
        and whole["checks"] == parted["checks"]
    )
    for name in ("final", "unscaled"):
        a, b = factors(tmp_path / "whole" / name), factors(tmp_path / "parted" / name)
        assert all(torch.equal(a[key], b[key]) for key in a)
    (tmp_path / "parted" / "run.json").unlink()  # interrupted in the finish, after the last step
    assert run(words, "--budget", "2%", "--out", tmp_path / "parted", "--resume") == 0
    assert (
        json.loads((tmp_path / "parted" / "run.json").read_text())["budget"]["trajectory"]
        == whole["trajectory"]
    )


def test_a_run_too_short_to_probe_that_is_interrupted_in_the_finish_keeps_its_trajectory(
    words, tmp_path
):
    path = tmp_path / "run" / "run.json"
    assert run(words, "--budget", "2%", "--max-steps", "5", "--batch-size", "4") in (0, 3)
    whole = json.loads(path.read_text())["budget"]
    path.unlink()
    assert run(words, "--budget", "2%", "--max-steps", "5", "--batch-size", "4", "--resume") in (
        0,
        3,
    )
    assert [point["step"] for point in whole["trajectory"]] == [5] and whole["probe"]["every"] > 5
    assert json.loads(path.read_text())["budget"]["trajectory"] == whole["trajectory"]


def test_full_fine_tuning_keeps_a_budget(words, tmp_path):
    assert run(words, "--budget", "2%", "--full", "--learning-rate", "1e-3") == 0
    report = json.loads((tmp_path / "run" / "run.json").read_text())["budget"]
    base, whole, final = (
        load_file(f / "model.safetensors")
        for f in (words[1], tmp_path / "run" / "unscaled", tmp_path / "run" / "final")
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(
        final[name] - base[name], report["share"] * (whole[name] - base[name]), atol=1e-7, rtol=1e-3
    )


def test_wrong_budgets_and_texts_are_refused_before_training(
    words, domain, general, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(training, "train_from", lambda *a: pytest.fail("trained"))

    def fails(code, message, *more):
        capsys.readouterr()
        assert run(words, *more) == code
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error, error

    fails(2, "--budget expects a rise of perplexity like 1%", "--budget", "1")
    fails(2, "--budget must be above 0", "--budget", "0%")
    short = tmp_path / "short.jsonl"
    short.write_text("\n".join(general.read_text().split("\n")[:12]))
    fails(1, "too short for a budget: 12 documents", "--budget", "1%", "--general", short)
    short.write_text("")
    fails(1, "is empty", "--budget", "1%", "--general", short)
    short.write_text("\n".join(general.read_text().split("\n")[:24]))
    fails(1, "too short to show a budget of 0.0001%", "--budget", "0.0001%", "--general", short)
    assert not (tmp_path / "run" / "final").exists()


def test_general_text_that_is_trained_on_is_warned_of(
    words, domain, general, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(
        keeper.Keeper, "bind", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert run([general if word is domain else word for word in words], "--budget", "2%") == 130
    assert "240 of 240 documents are in it word for word" in caplog.text


def test_general_chats_that_are_trained_on_are_warned_of(tokenizer, tmp_path):
    """By their words: neither roles nor the file's own signs are what is compared."""
    from forgetless.budget.open import trained_on as found

    chats = [
        [
            {"role": "user", "content": f"the cat {word}\\nsat on mat and dog then too {word}"},
            {"role": "assistant", "content": f"yes {word} no one two"},
        ]
        for word in WORDS
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    rows = [{"messages": chat} for chat in chats[:3]] + [
        {"messages": [*chats[3], {"role": "user", "content": "and then the dog sat"}]}
    ]
    assert (
        found(load_documents(str(path)), rows).exact,
        found(load_documents(str(path)), rows).near,
    ) == ([0, 1, 2], [3])


def test_resuming_with_other_data_is_refused(words, domain, general, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train_from", interrupted)
    held = tmp_path / "held.jsonl"
    held.write_text(domain.read_text())
    made = (*words, "--budget", "5%", "--eval-data", held)
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(general.read_text().splitlines()[:6]))
    assert (
        run(made, "--general", few, "--resume") == 1 and "too short" in capsys.readouterr().err
    )  # nothing was started by that:
    assert run(made, "--resume") == 130
    for path, what in (
        (general, "general text"),
        (domain, "training data"),
        (held, "held-out rows"),
    ):
        before = path.read_text()
        path.write_text("\n".join(before.splitlines()[:-1]))
        assert run(made, "--resume") == 1
        assert (
            f"was started with other data or files: changed are the {what};"
            in capsys.readouterr().err
        )
        path.write_text(before)
    assert run(words, "--budget", "5%", "--resume") == 2  # the share is chosen on --eval-data
    assert run(made, "--resume") == 130


def test_everything_is_read_once(words, domain, general, tmp_path, monkeypatch):
    """One reading serves all measurements, the budget's parts, the search for training rows and the
    hashes.
    """
    read, original = [], documents.file_rows

    def counted(path):
        read.append(path.name)
        return original(path)

    monkeypatch.setattr(documents, "file_rows", counted)
    held = tmp_path / "held.jsonl"
    held.write_text(domain.read_text())
    replay = tmp_path / "replay.jsonl"
    replay.write_text("\n".join(reversed(general.read_text().splitlines())))
    assert run(
        words,
        *("--budget", "50%", "--eval-data", held, "--eval-steps", "2"),
        *("--replay", replay, "--method", "replay"),
    ) in (0, 3)
    assert sorted(read) == sorted([domain.name, general.name, held.name, replay.name])


def test_a_single_held_out_row_is_refused_before_training(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "train_from", lambda *a: pytest.fail("trained"))
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "a ?", "completion": " b"}))
    assert run(words, "--budget", "5%", "--eval-data", tmp_path / "one.jsonl") == 1
    assert "at least two rows of domain data, found 1" in capsys.readouterr().err


def test_what_a_trainer_does_not_score_is_no_learning():
    """TRL's masks of completions and of assistant turns."""
    rows = [
        {"input_ids": [1, 2, 3, 4], "assistant_masks": [0, 0, 1, 1]},
        {"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 0]},
        {"input_ids": [1, 2]},
    ]
    scored = [opening._token_rows([row])[0][1] for row in rows]
    assert scored == [[False, False, True, True], [False, True, False], [True, True]]


def test_the_probe_stays_within_its_share_of_tokens():
    for per_step in (10, 64, 1024, 50_000):
        for piece in (8, 60, 128):
            every, count = plan_probes(per_step, piece)
            assert every >= 5 and 1 <= count <= 64
            assert count * piece <= 0.0801 * per_step * every
            assert count >= 2 or per_step * 0.08 * every >= piece


def test_the_baseline_measures_what_changed_and_leaves_no_trace(tiny, tokenizer, general):
    model = tiny()
    baseline = measure_baseline(model, tokenizer, load_documents(str(general)), parse("2%"))
    assert len(baseline.control) == len(baseline.check) == 120
    torch.manual_seed(0)
    model = add_adapter(model, names="all-linear", rank=2, alpha=4.0)
    update = Update(model)
    assert baseline.control.rise(model, error=0.05).nats == pytest.approx(0, abs=1e-7)
    spread, _ = baseline.spread(model, update, error=0.05)
    assert (
        0.3 * baseline.budget.nats < spread.nats < 3 * baseline.budget.nats
        and spread.standard_error > 0
    )
    assert all(not weight.update().any() for weight in update.weights)


def test_the_spread_is_that_of_an_update_which_costs_the_budget_where_pieces_mislead(
    tiny, tokenizer, general, monkeypatch
):
    """Pieces that rise three times as much as whole documents do: the update must cost the budget
    on documents, since they are what the check measures.
    """
    model = tiny()
    baseline = measure_baseline(model, tokenizer, load_documents(str(general)), parse("2%"))
    torch.manual_seed(0)
    model = add_adapter(model, names="all-linear", rank=2, alpha=4.0)
    update, randomised, size = Update(model), Update.randomise, []
    monkeypatch.setattr(
        Update, "randomise", lambda self, x, seed=0: (size.append(x), randomised(self, x, seed))
    )
    noise = np.random.default_rng(0).normal(1, 0.3, len(baseline.control))
    rise = lambda part: 1e3 * size[-1] ** 2 * (noise if part is baseline.control else 3.0)
    monkeypatch.setattr(
        "forgetless.evaluate.paired.PairedText.losses",
        lambda part, model: part.nats + part.tokens * rise(part),
    )
    found, at = baseline.spread(model, update, error=0.05)
    assert (
        found.nats == pytest.approx(baseline.budget.nats, rel=0.25) and at in size
    )  # the size that it was measured at
    assert not any(weight.update().any() for weight in update.weights)


def test_the_scan_finds_the_budget_where_the_loss_is_not_monotone(
    tiny, tokenizer, general, monkeypatch
):
    """A rise that is within the budget up to 0.2, above it, and within it again from 0.6 to 0.75 of
    the update.
    """
    baseline = measure_baseline(tiny(), tokenizer, load_documents(str(general)), parse("0.01nats"))
    share, noise = (
        [1.0],
        {
            id(p): np.random.default_rng(i).normal(0, 1e-4, len(p))
            for i, p in enumerate((baseline.control, baseline.check))
        },
    )
    rise = lambda x: 0.002 if 0.6 <= x <= 0.75 else 0.2 * x * x
    monkeypatch.setattr(
        "forgetless.evaluate.paired.PairedText.losses",
        lambda part, model: part.nats + part.tokens * (rise(share[0]) + noise[id(part)]),
    )
    report = to_json(
        keep_budget(baseline, tiny(), {"scale": lambda x: share.__setitem__(0, x)}, None)
    )
    assert (
        report["verdict"] == "met"
        and 0.7 <= report["share"] <= 0.75
        and share[0] == report["share"]
    )
    assert report["others"]["5%"]["share"] == report["share"] and report["check"][
        "nats"
    ] == pytest.approx(0.002, abs=1e-4)


def test_where_nothing_fits_any_way_leads_to_the_base(tiny, tokenizer, general, monkeypatch):
    """A way of one's own, not scaling: none of the update is what is left of it at 0."""
    baseline, tried = (
        measure_baseline(tiny(), tokenizer, load_documents(str(general)), parse("0.01nats")),
        [1.0],
    )
    monkeypatch.setattr(
        "forgetless.evaluate.paired.PairedText.losses",
        lambda part, model: (
            part.nats + part.tokens * (tried[-1] > 0) * np.linspace(0.5, 1.5, len(part))
        ),
    )
    report = to_json(keep_budget(baseline, tiny(), {"stop": tried.append}, None))
    assert (report["way"], report["share"], report["verdict"], tried[-1]) == (
        "stop",
        0.0,
        "met",
        0.0,
    )


@pytest.mark.parametrize("worse, checked", [(0.5, [1.0]), (15.0, [1.0, 0.55])])
def test_the_scan_ends_where_less_buys_nothing_and_the_fallback_goes_below_its_end(
    tiny, tokenizer, general, monkeypatch, worse, checked
):
    """A rise within every budget on the control part; on the check part `worse` times as large."""
    baseline, tried = (
        measure_baseline(tiny(), tokenizer, load_documents(str(general)), parse("0.01nats")),
        [1.0],
    )
    noise = lambda part: np.random.default_rng(0).normal(0, 1e-5, len(part))
    rise = lambda part: 0.004 * tried[-1] ** 2 * (worse if part is baseline.check else 1.0)
    monkeypatch.setattr(
        "forgetless.evaluate.paired.PairedText.losses",
        lambda part, model: part.nats + part.tokens * (rise(part) + noise(part)),
    )
    report = to_json(keep_budget(baseline, tiny(), {"scale": tried.append}, None))
    assert tried[1:4] == [1.0, 0.85, 1.0]  # two of nine measured, then the check
    assert [check["share"] for check in report["checks"]] == checked and report["verdict"] == (
        "met" if worse < 1 else "exceeded"
    )


def held_trainer(kind, tiny, tokenizer, folder):
    """A trainer with a fresh adapter on the tiny model, as a reader would make it, on prompts that
    it can learn.
    """
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    settings = dict(
        output_dir=str(folder),
        per_device_train_batch_size=16,
        max_steps=20,
        learning_rate=2e-2,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    model, texts = (
        add_adapter(tiny(), names="all-linear", rank=2, alpha=4),
        [f"Question {letter} ? a b a {letter}" for letter in "abcd" * 8],
    )
    if kind == "sft":
        args = SFTConfig(**settings, gradient_checkpointing=False)
        return SFTTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_list([{"text": text} for text in texts]),
            processing_class=tokenizer,
        )
    rows = Dataset.from_list(
        [{"input_ids": ids, "labels": ids} for ids in tokenizer(texts)["input_ids"]]
    )
    return Trainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )


def saved(trainer, folder, caplog):
    """What is said while a trainer's model is saved."""
    caplog.clear()
    copy.deepcopy(trainer.model).state_dict()  # a copy is not watched
    assert not caplog.text
    trainer.save_model(folder)
    return caplog.text


@pytest.mark.parametrize("kind", ["transformers", "sft"])
def test_hold_keeps_a_budget_under_anybodys_trainer(
    kind, tiny, tokenizer, general, tmp_path, caplog
):
    """By finish(), without which ending and saving are warned of, or by itself in a block."""
    caplog.set_level(logging.WARNING, "forgetless")
    trainer = held_trainer(kind, tiny, tokenizer, tmp_path)
    held = hold(
        trainer,
        uniform(trainer.model.base_model.model, "all-linear"),
        budget="2%",
        general=str(general),
    )
    assert held.penalty.energy() == 0  # measuring left nothing behind
    with held if kind == "sft" else contextlib.nullcontext():
        trainer.train()
        before = Update(trainer.model)
        trained = [weight.update().clone() for weight in before.weights]
    unkept = "the budget of 2% is not kept yet: call finish()"
    assert (f"training has ended, and {unkept}" in caplog.text) == (kind == "transformers")
    if kind == "transformers":
        assert f"being saved, and {unkept}" in saved(trainer, tmp_path / "early", caplog)
    report = held.finish()
    assert not saved(trainer, tmp_path / "kept", caplog)
    assert held.verdict == report["verdict"] and held.finish() is held.report == report
    assert (
        report["verdict"] == "met"
        and report["check"]["high"] <= report["budget_nats"]
        and report["learning"]["nats"] > 0
        and report["trajectory"]
    )
    for weight, whole in zip(before.weights, trained, strict=True):
        torch.testing.assert_close(weight.update(), report["share"] * whole)
    assert any("budget/strength" in entry for entry in trainer.state.log_history)


def test_hold_refuses_half_a_budget_and_a_trainer_without_a_tokenizer(
    tiny, tokenizer, general, tmp_path
):
    trainer = held_trainer("transformers", tiny, tokenizer, tmp_path)
    importance = uniform(trainer.model.base_model.model, "all-linear")
    with pytest.raises(OptionError, match="holds no calibration"):
        hold(trainer, importance, budget="2%")
    with pytest.raises(OptionError, match="and no budget"):
        hold(trainer, importance, general=str(general))
    with pytest.raises(ValueError, match="no budget"):
        hold(trainer, importance, strength=1.0).finish()
    trainer.processing_class = None
    with pytest.raises(OptionError, match="processing_class"):
        hold(trainer, importance, budget="2%", general=str(general))


def test_without_importance_in_nats_the_random_update_says_what_energy_costs(
    tiny, tokenizer, general, tmp_path, monkeypatch
):
    """The first steps are the wildest: with uniform importance too, they are held by a strength
    that is known before them.
    """
    original, spreads = Baseline.spread, []
    monkeypatch.setattr(
        Baseline,
        "spread",
        lambda *arguments, **more: spreads.append(original(*arguments, **more)) or spreads[0],
    )
    trainer = held_trainer("transformers", tiny, tokenizer, tmp_path)
    held = hold(
        trainer,
        uniform(trainer.model.base_model.model, "all-linear"),
        budget="2%",
        general=str(general),
    )
    controller = next(
        one.controller for one in trainer.callback_handler.callbacks if isinstance(one, Probe)
    )
    assert (
        held.penalty.energy() == 0
        and held.penalty.strength == 2 * controller.price * controller.unit > 0
    )  # measuring left nothing behind
    [(rise, size)] = spreads
    Update(trainer.model).randomise(size)
    assert controller.unit * held.penalty.energy() == pytest.approx(rise.nats, rel=1e-5)
