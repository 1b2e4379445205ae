"""The divergence of a tuned model from its base on what the base says, against brute force."""

import copy

import numpy as np
import pytest
import torch

from forgetless.data.selftext import Answer
from forgetless.evaluate.divergence import (
    ANSWER_TOKENS,
    divergence,
    kl,
    store,
    stored_base,
    stored_kl,
)
from forgetless.model.adapters import add_adapter


def answers(count=5):
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        start, length = int(rng.integers(2, 6)), int(rng.integers(3, 12))
        ids = tuple(int(token) for token in rng.integers(3, 48, start + length))
        made.append(Answer(str(number), "k", ids, start, False))
    return made


def moved(model, by=0.3):
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(by * torch.randn_like(parameter) * parameter.std())
    return other


def test_it_is_the_sum_over_the_vocabulary_at_the_scored_positions(tiny):
    base = tiny("llama")
    tuned = moved(base)
    sums, tokens = divergence(base, tuned, answers())
    for answer, nats, count in zip(answers(), sums, tokens, strict=True):
        ids = torch.tensor([answer.ids])
        p = base(input_ids=ids).logits[0].double().softmax(-1)
        q = tuned(input_ids=ids).logits[0].double().softmax(-1)
        each = (p * (p / q).log()).sum(-1)[answer.start - 1 : -1]
        assert count == len(each) == len(answer.scored)
        assert nats == pytest.approx(float(each.detach().sum()), rel=1e-4)
    assert divergence(base, base, answers())[0] == pytest.approx(0.0, abs=1e-6)


def test_batches_change_nothing(tiny, monkeypatch):
    base, tuned = tiny("llama"), moved(tiny("llama"))
    together = divergence(base, tuned, answers())[0]
    monkeypatch.setattr("forgetless.evaluate.divergence.ANSWER_TOKENS", 1)
    alone = divergence(base, tuned, answers())[0]
    assert ANSWER_TOKENS > 1 and alone == pytest.approx(together, rel=1e-4)


@pytest.mark.parametrize("k", [1, 8, 48])
def test_stored_log_probabilities_show_the_divergence_in_expectation_over_what_is_said(k):
    torch.manual_seed(0)
    base, tuned = 2 * torch.randn(1, 48).double(), 2 * torch.randn(1, 48).double()
    p = base.softmax(-1)[0]
    tokens = torch.arange(48)
    each = torch.cat([stored_kl(store(base, t, k), tuned, t) for t in tokens[:, None]])
    assert float((p * each).sum()) == pytest.approx(float(kl(base, tuned)), rel=1e-5)


def test_the_base_may_be_a_model_what_is_stored_of_it_or_lie_under_the_adapter(tiny):
    base = tiny("llama")
    tuned = add_adapter(tiny("llama"), names="all-linear", rank=2, alpha=4.0)
    torch.manual_seed(2)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5)
    exact, tokens = divergence(base, tuned, answers())
    assert divergence(None, tuned, answers())[0] == pytest.approx(exact, rel=1e-4)
    kept = stored_base(base, answers(), k=48)
    assert divergence(kept, tuned, answers())[0] == pytest.approx(exact, rel=1e-3)
    assert exact.sum() / tokens.sum() > 1e-3


def test_its_gradient_at_the_base_is_zero_and_its_curvature_the_fisher():
    torch.manual_seed(0)
    logits = torch.randn(1, 7)
    tuned = logits.clone().requires_grad_()
    [gradient] = torch.autograd.grad(kl(logits, tuned).sum(), tuned)
    assert gradient.abs().max() < 1e-6
    curvature = torch.autograd.functional.hessian(lambda x: kl(logits, x[None]).sum(), logits[0])
    p = logits[0].softmax(-1)
    assert torch.allclose(curvature, torch.diag(p) - torch.outer(p, p), atol=1e-5)
    said = torch.tensor([4])
    assert float(stored_kl(store(logits, said, 3), logits, said)) == pytest.approx(0, abs=1e-6)
