"""Measuring: windows against brute force, standard errors, pairing, answers against lm-eval."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from forgetless.data.tasks import load_task
from forgetless.errors import OptionError
from forgetless.evaluate.accuracy import answers, check_tasks
from forgetless.evaluate.evaluate import evaluate
from forgetless.evaluate.harness import lm_eval_accuracy
from forgetless.evaluate.losses import TextLoss, ratio_error, text_loss
from forgetless.files.atomic import read_json
from forgetless.options.finished import EvalOptions
from forgetless.options.verbs import resolve


@pytest.mark.parametrize(("window", "stride"), [(12, 6), (5, 2), (8, 1), (2, 1), (64, 32)])
def test_windows_score_every_token_once_with_enough_context(tiny, window, stride):
    model = tiny().eval()
    g = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, 48, (n,), generator=g).tolist() for n in (2, 5, 17, 30)]
    loss = text_loss(
        model,
        [(ids, [True] * len(ids)) for ids in documents],
        window=window,
        stride=stride,
        batch_tokens=40,
    )
    assert loss.tokens_by_document.tolist() == [1, 4, 16, 29]
    for ids, nats in zip(documents, loss.nats_by_document, strict=True):
        assert nats == pytest.approx(brute_force(model, ids, window, stride), rel=1e-5)


def brute_force(model, ids, window, stride):
    """Token by token: the context is what the window that first reaches it holds."""
    total, end = 0.0, 1
    while end < len(ids):
        stop = min(len(ids), end + (window - 1 if end == 1 else stride))
        for position in range(end, stop):
            context = ids[max(0, stop - window) : position]
            assert len(context) >= min(position, window - stride)
            with torch.no_grad():
                logits = model(torch.tensor([context])).logits[0, -1]
            total += float(nn.functional.cross_entropy(logits[None], torch.tensor([ids[position]])))
        end = stop
    return total


def test_the_model_is_left_as_it_was(tiny):
    model = tiny().train()
    text_loss(model, [([3, 4, 5], [True] * 3)], window=8)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_numbers_and_pairing():
    loss = TextLoss(np.array([4.0, 6.0]), np.array([2, 3]), utf8_bytes=10)
    assert (
        loss.nats == 2.0
        and loss.perplexity == math.exp(2)
        and loss.bits_per_byte == pytest.approx(10 / math.log(2) / 10)
    )
    assert loss.standard_error == pytest.approx(0.0)
    noisy = np.array([5.0, 1.0, 9.0])
    counts = np.array([2, 2, 2])
    assert ratio_error(noisy, counts) == pytest.approx(np.std(noisy / 2, ddof=1) / math.sqrt(3))
    before, after = TextLoss(noisy, counts).numbers(), TextLoss(noisy + 0.2, counts).numbers()
    rise = TextLoss.read(before).rise(TextLoss.read(after))
    assert rise.estimate() == {
        "nats": pytest.approx(0.1),
        "standard_error": pytest.approx(0.0, abs=1e-12),
    }
    assert TextLoss(np.array([1.0]), np.array([1])).standard_error is None


def test_a_rise_is_told_with_its_interval_by_source_and_by_document_where_there_is_one_source():
    """The interval leaves out one source in turn, also when the losses were read from a file; a
    single document has none, which is null.
    """
    rng = np.random.default_rng(0)
    counts, before = rng.integers(5, 50, 24), rng.normal(90, 5, 24)
    sources = ["web"] * 8 + ["code"] * 4 + ["books"] * 12
    each = np.repeat(
        [0.1, 0.5, 0.2], [8, 4, 12]
    )  # nats per token; nothing else differs in a source
    first, then = (
        TextLoss(before, counts, sources=sources),
        TextLoss(before + each * counts, counts),
    )
    assert first.numbers()["source_by_document"] == [0] * 8 + [1] * 4 + [2] * 12
    assert then.numbers()["source_by_document"] is None
    rise = first.rise(then)
    assert TextLoss.read(first.numbers()).rise(TextLoss.read(then.numbers())) == rise
    numbers = rise.numbers()
    assert (numbers["by"], numbers["clusters"], numbers["documents"]) == ("source", 3, 24)
    sizes, sums = (
        np.bincount(first.numbers()["source_by_document"], v) for v in (counts, each * counts)
    )
    without = [(sums.sum() - sums[g]) / (sizes.sum() - sizes[g]) for g in range(3)]
    error = math.sqrt(2 / 3 * sum((value - rise.nats) ** 2 for value in without))
    assert numbers["standard_error"] == pytest.approx(error)
    assert numbers["low"] < rise.nats - 2 * error and numbers["high"] > rise.nats + 2 * error
    assert numbers["level"] == 0.95 and numbers["percent"] == pytest.approx(
        100 * math.expm1(rise.nats)
    )
    by_document = then.rise(first)  # the losses that pair decide what is left out: one source here
    assert by_document.by == "document" and by_document.clusters == 24
    assert by_document.standard_error < rise.standard_error
    fall = -rise
    assert (fall.nats, fall.low, fall.high) == (-rise.nats, -rise.high, -rise.low)
    assert fall.standard_error == rise.standard_error and "percent" not in fall.numbers(
        percent=False
    )
    one = TextLoss(np.array([1.0]), np.array([2])).rise(TextLoss(np.array([2.0]), np.array([2])))
    assert one.estimate() == {"nats": 0.5, "standard_error": None}
    assert one.numbers()["low"] is None and one.numbers()["high"] is None


WORDS = ["the", "cat", "sat", "on", "mat", "and", "dog", "then", "too"]
MADE = {
    "piqa": lambda i, w: {
        "goal": f"{w(i)} {w(3 * i)}",
        "sol1": f"{w(i + 1)} sat",
        "sol2": f"{w(i + 4)} mat too",
        "label": i % 2,
    },
    "sciq": lambda i, w: {
        "question": f"{w(i)} {w(2 * i)} {w(5 * i)} ?",
        "correct_answer": w(i + 1),
        "distractor1": w(i + 2),
        "distractor2": f"{w(i + 3)} on",
        "distractor3": w(i + 5),
        "support": f" {w(i + 4)} sat .",
    },
    "medmcqa": lambda i, w: {
        "question": f"{w(i)} {w(2 * i)} ?",
        "opa": w(i + 1),
        "opb": w(i + 2),
        "opc": w(i + 3),
        "opd": w(i + 5),
        "cop": i % 4,
    },
}


@pytest.mark.parametrize("name", sorted(MADE))
def test_own_ranking_and_prompts_agree_with_lm_eval_on_local_rows(tiny, tokenizer, tmp_path, name):
    rows = [MADE[name](i, lambda k: WORDS[k % 9]) for i in range(12)]
    path = tmp_path / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    model = tiny().eval()
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)  # clear preferences: no ties
    task, loaded = load_task(f"{name}={path}")
    scores = answers(model, tokenizer, task, loaded)
    ours = scores.numbers
    theirs = lm_eval_accuracy(model, tokenizer, name, file=str(path)).numbers
    assert ours["acc"] == pytest.approx(theirs["acc"]) and ours["acc_norm"] == pytest.approx(
        theirs["acc_norm"]
    )
    assert ours["questions"] == 12 and scores.answer_loss.nats > 0


def test_unknown_tasks_and_broken_task_files_are_named_before_a_model_is_loaded(tmp_path):
    with pytest.raises(OptionError, match="did you mean 'sciq'"):
        check_tasks("piqa,sciqq")
    check_tasks("sciq,hellaswag")
    path = tmp_path / "t.jsonl"
    path.write_text('{"goal": "x"}\n')
    with pytest.raises(ValueError, match="missing sol1, sol2, label"):
        evaluate(resolve(EvalOptions, {"model": "./no-model", "tasks": f"piqa={path}"}))


@pytest.mark.parametrize(("tasks", "shots"), [("sciq,hellaswag", 0), ("hellaswag", 0), ("sciq", 2)])
def test_without_lm_eval_other_tasks_are_refused_before_a_model_is_loaded(
    monkeypatch, tasks, shots
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_tasks("sciq,piqa,medmcqa")
    options = {"model": "./no-model", "tasks": tasks, "shots": shots}
    with pytest.raises(OptionError, match=r"pip install 'forgetless\[tasks\]'"):
        evaluate(resolve(EvalOptions, options))


def test_eval_writes_its_run_and_prints_before_after_change_and_error(
    model_folder, text_file, tmp_path, capsys
):
    """The adapter at scale 0 is the base: no change.

    Perplexity is exp of nats; the authors' figure is labelled.
    """
    from forgetless.model.adapters import add_adapter
    from forgetless.model.loading import load_model
    from forgetless.model.targets import target_weights

    options = {
        "model": str(model_folder),
        "general": str(text_file),
        "data": str(text_file),
        "device": "cpu",
        "out": str(tmp_path / "seen"),
    }
    adapted = add_adapter(
        load_model(resolve(EvalOptions, options)), names="all-linear", rank=2, alpha=4
    )
    for weight in target_weights(adapted):
        torch.nn.init.normal_(weight.B)
    adapted.save_pretrained(tmp_path / "adapter")
    options["adapter"] = str(tmp_path / "adapter")
    still = evaluate(resolve(EvalOptions, {**options, "scale": 0.0}))
    assert still["forgetting"]["nats"] == pytest.approx(0.0, abs=1e-6)
    run = evaluate(resolve(EvalOptions, {**options, "authors_perplexity": True}))
    printed = capsys.readouterr().out
    written = read_json(tmp_path / "seen" / "run.json")
    before, after = written["before"]["general"], written["after"]["general"]
    assert written["forgetting"]["nats"] == pytest.approx(after["nats"] - before["nats"]) != 0
    assert written["learning"]["nats"] == pytest.approx(
        written["before"]["domain"]["nats"] - written["after"]["domain"]["nats"]
    )
    assert (
        after["perplexity"] == pytest.approx(math.exp(after["nats"])) and after["bits_per_byte"] > 0
    )
    assert "2^nats (as the paper's code)" in printed and f"{2 ** before['nats']:.4f}" in printed
    assert (
        f"{before['nats']:.4f}" in printed
        and f"{run['forgetting']['nats']:+.4f}" in printed
        and all(word in printed for word in ("before", "after", "change", "std.err."))
        and all(f"{what} loss (nats/token)" in printed for what in ("general", "domain"))
        and f"{run['forgetting']['standard_error']:.4f}" in printed
    )
    lost, learned = written["forgetting"], written["learning"]
    assert lost["low"] < lost["nats"] < lost["high"] and learned["low"] < learned["high"]
    assert lost["by"] == learned["by"] == "document" and lost["documents"] > 1
    assert lost["percent"] == pytest.approx(100 * (after["perplexity"] / before["perplexity"] - 1))
