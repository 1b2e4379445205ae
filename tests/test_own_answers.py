"""What a model says itself, in the place of a general text: recorded on, measured on, kept a budget
on; from the cache, through every verb.
"""

import copy
import importlib
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import PLAIN
from forgetless.budget import open as opening
from forgetless.budget.keeper import Keeper
from forgetless.cli import main
from forgetless.data.own_text import OwnText
from forgetless.data.prompts.prompts import load_prompts, parted
from forgetless.data.selftext import read_lines
from forgetless.evaluate import own_answers as own
from forgetless.evaluate.divergence import divergence
from forgetless.evaluate.own_answers import own_answers
from forgetless.evaluate.paired_answers import paired_answers
from forgetless.importance.entries import DenseEntry
from forgetless.importance.importance import Importance
from forgetless.importance.kept_answers import keep
from forgetless.model.adapter_files import with_adapter
from forgetless.model.adapters import add_adapter, bare
from forgetless.model.fingerprint import exact_fingerprint


@pytest.fixture
def domain(tmp_path):
    """Chats about little."""
    rng = random.Random(7)
    path = tmp_path / "domain.jsonl"
    rows = [
        [
            {"role": "user", "content": f"the cat {rng.choice('abcd')} ?"},
            {"role": "assistant", "content": "a b a " + rng.choice("abcd")},
        ]
        for _ in range(32)
    ]
    path.write_text("\n".join(json.dumps({"messages": turns}) for turns in rows))
    return str(path)


def run_of(folder):
    return json.loads((folder / "run.json").read_text())


def test_answers_are_sampled_once_and_an_interrupted_sampling_goes_on(
    chat_model, chat_tokenizer, cache, monkeypatch
):
    wanted = OwnText("chat", answers=20, length=8)
    sampled = []
    whole = own.sample

    def counted(model, tokenizer, openings, **settings):
        sampled.append(len(openings))
        return whole(model, tokenizer, openings, **settings)

    monkeypatch.setattr(own, "sample", counted)
    answers = own_answers(chat_model, chat_tokenizer, wanted, "check")
    assert own_answers(chat_model, chat_tokenizer, wanted, "check") == answers
    assert sampled == [20] and len(answers) == 20
    ids = {prompt.id for prompt in parted(load_prompts())["check"]}
    assert {answer.prompt for answer in answers} <= ids
    [path] = (cache / "answers").glob("*.jsonl")
    lines = path.read_text().split("\n")
    path.write_text("\n".join(lines[:9]) + "\n" + lines[9][:20])
    assert own_answers(chat_model, chat_tokenizer, wanted, "check") == answers
    assert sampled == [20, 11] and len(read_lines(path)) == 20
    own_answers(chat_model, chat_tokenizer, OwnText("chat", answers=30, length=8), "check")
    assert sampled == [20, 11, 10]


def test_a_cache_that_somebody_changed_is_made_whole(chat_model, chat_tokenizer, cache, caplog):
    """What no answer of this model can be is sampled again, to the same answer."""
    wanted = OwnText("chat", answers=10, length=8)
    answers = own_answers(chat_model, chat_tokenizer, wanted, "check")
    [path] = (cache / "answers").glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    words = chat_model.get_input_embeddings().weight.shape[0]
    rows[0]["ids"][-1] = words  # no token of this model
    rows[1]["ids"] += [1] * 9  # longer than was asked for
    del rows[2]["start"]
    rows[3] = [1]
    lines = [json.dumps(row).encode() for row in rows]
    lines[4] = b"\xff no text"
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert own_answers(chat_model, chat_tokenizer, wanted, "check") == answers
    assert "3 of 10 lines hold no answer" in caplog.text
    assert sorted(read_lines(path), key=repr) == sorted(answers, key=repr)


def test_a_larger_number_holds_the_smaller_and_another_model_says_something_else(
    chat_model, chat_tokenizer, cache
):
    few = own_answers(chat_model, chat_tokenizer, OwnText("chat", 12, 8), "control")
    more = own_answers(chat_model, chat_tokenizer, OwnText("chat", 24, 8), "control")
    assert [answer.prompt for answer in more[:12]] == [answer.prompt for answer in few]
    before = exact_fingerprint(chat_model)
    adapted = add_adapter(copy.deepcopy(chat_model), names="all-linear", rank=2, alpha=4.0)
    assert exact_fingerprint(adapted) == before
    with bare(adapted) as base:
        assert exact_fingerprint(base) == before
    with torch.no_grad():
        chat_model.lm_head.weight.mul_(50)
    assert exact_fingerprint(chat_model) != before
    assert own_answers(chat_model, chat_tokenizer, OwnText("chat", 12, 8), "control") != few


def test_prompts_of_a_user_are_asked_beside_ours(chat_model, chat_tokenizer, cache, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"the cat {i}"}) for i in range(40)))
    parts = {
        part: own_answers(chat_model, chat_tokenizer, OwnText("chat", 10, 4, str(path)), part)
        for part in ("record", "control", "check")
    }
    mine = {part: [a for a in answers if a.kind == "own"] for part, answers in parts.items()}
    assert sum(map(len, mine.values())) == 40 and all(mine.values())
    assert all(len(parts[part]) == 10 + len(mine[part]) for part in parts)
    path.write_text(json.dumps({"question": "the cat"}))
    with pytest.raises(ValueError, match="expected a column 'messages' or 'prompt', found questi"):
        own_answers(chat_model, chat_tokenizer, OwnText("chat", 10, 4, str(path)), "check")


def test_what_cannot_be_asked_or_says_nothing_is_refused(
    chat_model, chat_tokenizer, cache, monkeypatch
):
    chat_tokenizer.chat_template = None
    with pytest.raises(ValueError, match="its tokenizer has none; give --general self"):
        own_answers(chat_model, chat_tokenizer, OwnText("chat"), "check")
    chat_tokenizer.chat_template = PLAIN
    # A model that ends at once.
    monkeypatch.setattr(own, "FEWEST_TOKENS", 9)
    with pytest.raises(ValueError, match=r"next to nothing: \d+ tokens in 12 answers"):
        own_answers(chat_model, chat_tokenizer, OwnText("chat", 12, 8), "check")


def test_a_base_model_is_measured_on_what_it_writes_by_itself(chat_model, chat_tokenizer, cache):
    answers = own_answers(chat_model, chat_tokenizer, OwnText("self", 12, 8), "check")
    other = own_answers(chat_model, chat_tokenizer, OwnText("self", 12, 8), "record")
    assert all(answer.ids[0] == 1 and answer.start == 1 for answer in answers)
    assert {answer.ids for answer in answers} != {answer.ids for answer in other}
    paired = paired_answers(chat_model, answers)
    assert paired.losses(chat_model) == pytest.approx(np.zeros(12), abs=1e-6)


def test_every_verb_takes_what_the_model_says(chat_folder, domain, tmp_path, capsys):
    """record, tune with a budget, eval, and shrink of a plain run, on nothing but the model."""
    small = ["--answers", "24", "--answer-length", "12"]
    file = str(tmp_path / "i.safetensors")
    assert main(["record", chat_folder, "--out", file, *small]) == 0
    data = Importance.load(file).info["data"]
    assert data["source"] == "chat" and data["documents"] == 24

    tuning = ["tune", chat_folder, "--data", domain, "--rank", "2", "--learning-rate", "0.02"]
    tuning += ["--batch-size", "8", "--accumulation", "1", "--epochs", "3"]
    held = tmp_path / "held"
    budget = ["--importance", file, "--general", "chat", "--budget", "0.2%"]
    assert main([*tuning, *budget, *small, "--out", str(held)]) == 0
    run = run_of(held)
    assert run["verdict"] == "met" and run["forgetting"]["of"] == "divergence"
    assert 0 < run["forgetting"]["nats"] < run["forgetting"]["high"] <= np.log(1.002)
    assert run["before"]["own"]["nats"] == pytest.approx(0, abs=1e-6)
    kinds = run["after"]["own"]["kind_by_document"]
    assert len(kinds) == 24 and len(set(kinds)) > 5

    plain = tmp_path / "plain"
    assert main([*tuning, "--method", "plain", *small, "--out", str(plain)]) == 0
    lost = run_of(plain)["forgetting"]["nats"]
    assert lost > 2 * np.log(1.002)

    shrunk = ["shrink", str(plain / "final"), "--importance", file, "--general", "chat"]
    shrunk += ["--budget", "0.2%", "--data", domain, "--out", str(tmp_path / "shrunk"), *small]
    assert main(shrunk) == 0
    assert run_of(tmp_path / "shrunk")["forgetting"]["high"] <= np.log(1.002)

    capsys.readouterr()
    evaluate = ["eval", chat_folder, "--adapter", str(plain / "final"), *small]
    assert main([*evaluate, "--out", str(tmp_path / "e")]) == 0
    assert "divergence on own answers" in capsys.readouterr().out
    assert run_of(tmp_path / "e")["forgetting"]["nats"] == pytest.approx(lost, rel=1e-4)

    card = (held / "final" / "README.md").read_text()
    assert "On the base's own answers it has moved by" in card
    assert "on 24 answers that nothing was chosen on, the model moved from its base by" in card
    assert "general text rose" not in card
    assert main(["report", str(held), "--format", "markdown"]) == 0
    assert "On the base's own answers (chat) the model moved by" in capsys.readouterr().out


def test_the_measure_is_the_exact_divergence_from_the_model_without_adapter(
    chat_folder, chat_model, chat_tokenizer, domain, tmp_path
):
    out = tmp_path / "run"
    words = ["tune", chat_folder, "--data", domain, "--out", str(out), "--general", "chat"]
    words += ["--answers", "16", "--answer-length", "12", "--rank", "2", "--max-steps", "3"]
    assert main([*words, "--learning-rate", "0.02", "--method", "plain"]) == 0
    answers = own_answers(chat_model, chat_tokenizer, OwnText("chat", 16, 12), "check")
    base = AutoModelForCausalLM.from_pretrained(chat_folder)
    tuned = with_adapter(AutoModelForCausalLM.from_pretrained(chat_folder), str(out / "final"))
    sums, tokens = divergence(base, tuned, answers)
    assert run_of(out)["forgetting"]["nats"] == pytest.approx(sums.sum() / tokens.sum(), rel=1e-4)


def test_replayed_answers_are_of_another_part_than_the_measured(chat_folder, domain, tmp_path):
    out = tmp_path / "kl"
    words = ["tune", chat_folder, "--data", domain, "--out", str(out), "--method", "kl"]
    words += ["--replay", "chat", "--general", "chat", "--replay-documents", "16", "--rank", "2"]
    assert main([*words, "--answers", "12", "--answer-length", "8", "--max-steps", "2"]) == 0
    assert run_of(out)["replay"]["sequences"] == 16
    prompts = {answer.prompt for answer in read_lines(out / "self.jsonl")}
    assert prompts <= {prompt.id for prompt in parted(load_prompts())["record"]}


def test_answers_kept_in_the_importance_file_hold_without_a_text_and_without_the_base(
    chat_folder, domain, tmp_path, capsys
):
    """What is kept is read back as it was, and holds as the base itself does."""
    file = str(tmp_path / "i.safetensors")
    words = ["record", chat_folder, "--out", file, "--answers", "20", "--answer-length", "12"]
    assert main([*words, "--keep-answers", "12"]) == 0
    kept = Importance.load(file).answers
    assert len(kept) == 12 and all(base.tokens.shape[1] == 48 for base in kept.stored)

    tuning = ["tune", chat_folder, "--data", domain, "--rank", "2", "--learning-rate", "0.02"]
    tuning += ["--batch-size", "8", "--accumulation", "1", "--epochs", "3", "--method", "kl"]
    tuning += ["--general", "chat", "--answers", "20", "--answer-length", "12", "--kl-weight", "9"]
    stored = [*tuning, "--replay", "kept", "--importance", file, "--out", str(tmp_path / "s")]
    assert main(stored) == 0
    asked = [*tuning, "--replay", "chat", "--replay-documents", "12", "--out", str(tmp_path / "a")]
    assert main(asked) == 0
    by_stored, by_base = run_of(tmp_path / "s"), run_of(tmp_path / "a")
    # Of 48 tokens all are among the 64 likeliest, so that what is stored is exact.
    assert by_stored["forgetting"]["nats"] == pytest.approx(by_base["forgetting"]["nats"], rel=1e-2)
    assert by_stored["replay"]["sequences"] == 12
    logged = [entry["kl"] for entry in by_stored["log"] if "kl" in entry]
    assert logged == pytest.approx([e["kl"] for e in by_base["log"] if "kl" in e], rel=1e-2)

    capsys.readouterr()
    for words, expected in (
        ([*tuning, "--replay", "kept"], "needs --importance FILE, made with record --keep-answers"),
        ([*tuning, "--replay", "chat", "--importance", file], "is used by --method kl where it"),
    ):
        assert main([*words, "--out", str(tmp_path / "no")]) == 2
        assert expected in capsys.readouterr().err
    bare = str(tmp_path / "bare.safetensors")
    assert main(["record", chat_folder, "--out", bare, "--answers", "12"]) == 0
    assert main([*tuning, "--replay", "kept", "--importance", bare, "--out", str(tmp_path)]) == 1
    assert "keeps no answers; record with --keep-answers 64" in capsys.readouterr().err
    text = ["record", chat_folder, "--general", domain, "--keep-answers", "4", "--out", bare]
    assert main(text) == 2
    assert "keeps answers of the model that are recorded on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("answers/ids", lambda tensor: tensor[:-1]),
        ("answers/starts", lambda tensor: tensor * 0),
        ("answers/tokens", lambda tensor: -tensor),
        ("answers/log_probs", lambda tensor: -tensor),
        ("answers/rest", lambda tensor: tensor[:, None]),
        ("answers/log_probs", lambda tensor: tensor * 0),
        ("answers/said", None),
        ("answers/lengths", lambda tensor: tensor.float()),
    ],
)
def test_kept_answers_that_cannot_be_are_refused(
    chat_model, chat_tokenizer, cache, tmp_path, name, change
):
    answers = own_answers(chat_model, chat_tokenizer, OwnText("chat", 6, 8), "record")
    entries = {"model.layers.0.mlp.up_proj.weight": DenseEntry(torch.ones(24, 16))}
    path = tmp_path / "i.safetensors"
    Importance(entries, answers=keep(chat_model, answers)).save(path)
    assert len(Importance.load(path).answers) == 6
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, str(path), metadata=metadata)
    with pytest.raises(ValueError, match=r"answers.*; the file is damaged, record again"):
        Importance.load(path)


def test_in_a_sequence_the_divergence_counts_from_the_base_and_not_from_the_step_before(
    chat_folder, tmp_path, monkeypatch
):
    """What lies under the adapter of the second step has moved already."""
    files = []
    letters = itertools.product("abcd", repeat=3)
    for name, answer in (("first", "yes no"), ("second", "no two")):
        rows = [
            [
                {"role": "user", "content": f"the {' '.join(some)} ?"},
                {"role": "assistant", "content": f"{answer} {some[0]}"},
            ]
            for some in itertools.islice(letters, 30)
        ]
        files.append(str(tmp_path / f"{name}.jsonl"))
        Path(files[-1]).write_text("\n".join(json.dumps({"messages": turns}) for turns in rows))
    baselines = []

    class Noted(Keeper):
        def __init__(self, baseline, *others):
            baselines.append(baseline)
            super().__init__(baseline, *others)

    monkeypatch.setattr(opening, "Keeper", Noted)
    words = ["tune", chat_folder, "--data", files[0], "--data", files[1], "--rank", "2"]
    words += ["--learning-rate", "0.02", "--batch-size", "8", "--accumulation", "1", "--seed", "0"]
    words += ["--general", "chat", "--answers", "16", "--answer-length", "12", "--budget", "5%"]
    words += ["--eval-data", files[0], "--eval-data", files[1]]
    assert main([*words, "--out", str(tmp_path / "both")]) == 0
    first, later = baselines
    assert not first.moved and first.control.under_adapter and first.check.under_adapter
    assert later.moved and not later.control.under_adapter and not later.check.under_adapter
    # From the base to the end, by the adapter that adds up both steps.
    run = run_of(tmp_path / "both")
    assert 0 < run["after"]["own"]["nats"] <= np.log(1.05)
    assert run["forgetting"]["nats"] == pytest.approx(run["after"]["own"]["nats"], rel=1e-6)


def test_the_experiment_on_a_real_model_runs_on_a_tiny_one(
    chat_folder, domain, tmp_path, monkeypatch
):
    """Learning, divergence and loss on web text of each run, and nothing is trained twice."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "experiments")
    real = importlib.import_module("real")
    shared, out = tmp_path / "shared", tmp_path / "real"
    chats = Path(domain).read_text()
    for name in ("chat/medical-train", "chat/medical-test"):
        (shared / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (shared / "data" / f"{name}.jsonl").write_text(chats)
    (shared / "data/general").mkdir()
    text = "\n".join(json.dumps({"text": f"the cat sat on {word}"}) for word in "abcd" * 4)
    (shared / "data/general/test.jsonl").write_text(text)
    words = [
        str(shared),
        chat_folder,
        str(out),
        "--seeds",
        "0",
        "--rows",
        "12",
        "--steps",
        "2",
        "--answers",
        "12",
    ]
    words += ["--arms", "plain", "kept-1-2"]
    real.main(words)
    table = (out / "table.md").read_text()
    rows = {line.split(" | ")[0].strip("| "): line for line in table.splitlines()[2:]}
    assert list(rows) == ["plain", "plain x 0.75", "plain x 0.5", "plain x 0.25", "kept-1-2"]
    made = {path: path.stat().st_mtime_ns for path in out.glob("*/run.json")}
    real.main(words)
    assert made == {path: path.stat().st_mtime_ns for path in out.glob("*/run.json")}
    assert (out / "table.md").read_text() == table
