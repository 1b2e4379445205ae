"""Measuring: windows against brute force, standard errors, pairing, answers against lm-eval."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from holdfast.evaluation import TextLoss, answers, lm_eval_accuracy, ratio_error, rise, text_loss
from holdfast.tasks import load_task


@pytest.mark.parametrize(("window", "stride"), [(12, 6), (5, 2), (8, 1), (2, 1), (64, 32)])
def test_windows_score_every_token_once_with_enough_context(tiny, window, stride):
    model = tiny().eval()
    g = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, 48, (n,), generator=g).tolist() for n in (2, 5, 17, 30)]
    loss = text_loss(model, [(ids, [True] * len(ids)) for ids in documents], window=window, stride=stride, batch_tokens=40)
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
    assert loss.nats == 2.0 and loss.perplexity == math.exp(2) and loss.bits_per_byte == pytest.approx(10 / math.log(2) / 10)
    assert loss.standard_error == pytest.approx(0.0)
    noisy = np.array([5.0, 1.0, 9.0])
    counts = np.array([2, 2, 2])
    assert ratio_error(noisy, counts) == pytest.approx(np.std(noisy / 2, ddof=1) / math.sqrt(3))
    before, after = TextLoss(noisy, counts).numbers(), TextLoss(noisy + 0.2, counts).numbers()
    assert rise(before, after) == {"nats": pytest.approx(0.1), "standard_error": pytest.approx(0.0)}
    assert TextLoss(np.array([1.0]), np.array([1])).standard_error is None


def test_own_ranking_agrees_with_lm_eval_on_local_rows(tiny, tokenizer, tmp_path):
    words = ["the", "cat", "sat", "on", "mat", "and", "dog", "then", "too"]
    rows = [
        {"goal": f"{words[i % 9]} {words[(3 * i) % 9]}", "sol1": f"{words[(i + 1) % 9]} sat", "sol2": f"{words[(i + 4) % 9]} mat too", "label": i % 2}
        for i in range(12)
    ]
    path = tmp_path / "piqa.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    model = tiny().eval()
    task, loaded = load_task(f"piqa={path}")
    ours = answers(model, tokenizer, task, loaded)
    theirs = lm_eval_accuracy(model, tokenizer, "piqa", file=str(path))
    assert ours["acc"] == pytest.approx(theirs["acc"])
    assert ours["questions"] == 12 and ours["answer_loss"]["nats"] > 0
