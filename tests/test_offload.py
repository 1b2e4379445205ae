"""Importance and credits that stay in CPU memory: the order in which they visit the device, and the
same numbers. Copies to a GPU need one to be tested.
"""

import pytest
import torch

from forgetless.importance.covariance import Covariance
from forgetless.importance.entries import DenseEntry, FactoredEntry, KroneckerEntry
from forgetless.importance.importance import Importance
from forgetless.model.adapters import add_adapter
from forgetless.model.targets import target_weights
from forgetless.penalty.offload import ahead, in_cpu_memory
from forgetless.penalty.pull import Penalty
from forgetless.record.path import PathIntegral
from forgetless.record.path_factored import PathFactored


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_the_next_copy_starts_before_an_entry_is_handed_out_and_none_further(count):
    events = []
    start = lambda i: events.append(f"start {i}") or i
    ready = lambda i: events.append(f"wait {i}") or i
    got = []
    for i in ahead(range(count), start, ready):
        got.append(i)
        events.append(f"use {i}")
    assert got == list(range(count))
    for i in range(count):
        assert events.index(f"start {i}") < events.index(f"wait {i}") < events.index(f"use {i}")
        if i + 1 < count:
            assert events.index(f"start {i + 1}") < events.index(f"wait {i}")
        if i + 2 < count:
            assert events.index(f"start {i + 2}") > events.index(f"use {i}")


def adapted(tiny):
    torch.manual_seed(3)
    model = add_adapter(tiny(), names="all-linear", rank=3, alpha=6)
    for weight in target_weights(model):
        torch.nn.init.normal_(weight.B, std=0.3)
    return model


def importance_of(model, form):
    torch.manual_seed(4)
    weights, shared = target_weights(model), {}
    square = lambda n: (lambda m: Covariance(m @ m.T))(torch.randn(n, n))
    forms = {
        "bf16": lambda w: DenseEntry(torch.rand(w.shape).bfloat16()),
        "factored": lambda w: FactoredEntry(torch.rand(w.shape[0], 2), torch.rand(w.shape[1], 2)),
        "kronecker": lambda w: KroneckerEntry(
            square(w.shape[0]), shared.setdefault((w.layer, w.shape[1]), square(w.shape[1]))
        ),
    }
    if form in ("u8", "u4"):
        return Importance({w.name: DenseEntry(torch.rand(w.shape)) for w in weights}).to_tier(form)
    return Importance({w.name: forms[form](w) for w in weights})


@pytest.mark.parametrize("form", ["bf16", "u8", "u4", "factored", "kronecker"])
def test_offloaded_importance_pulls_the_same_bit_for_bit(tiny, form):
    model, results = adapted(tiny), []
    importance = importance_of(model, form)
    for offload in (False, True):
        penalty = Penalty(model, importance, strength=0.5, offload=offload)
        for weight in penalty.weights:
            weight.A.grad = weight.B.grad = None
        penalty.pull()
        results.append(
            (
                [p.grad.clone() for w in penalty.weights for p in w.parameters],
                penalty.energy(),
                penalty.logs(),
            )
        )
        assert bool(penalty._entries) != offload  # nothing is kept on the device
    assert results[0][1:] == results[1][1:] and results[0][1] > 0
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))


def test_only_what_is_held_stays_in_memory_and_shared_covariances_stay_one(tiny):
    importance = importance_of(adapted(tiny), "kronecker")
    names = [name for name in importance if "q_proj" in name or "k_proj" in name]
    kept = in_cpu_memory(importance, names, pin=False)
    assert list(kept) == names and len({id(entry.in_cov) for entry in kept.entries.values()}) == 2


@pytest.mark.parametrize("estimator", [PathIntegral, PathFactored])
@pytest.mark.parametrize("gradient", ["exact", "effective"])
def test_offloaded_credits_record_the_same(tiny, batch, estimator, gradient):
    found = []
    for offload in (False, True):
        model = adapted(tiny)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        recorder = estimator(model, gradient=gradient, offload=offload)
        with recorder.attach(optimizer):
            for _ in range(3):
                model(input_ids=batch, labels=batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        found.append(recorder.finish())
    assert found[0].info == found[1].info
    assert all(torch.equal(found[0][name].dense(), found[1][name].dense()) for name in found[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("form", ["bf16", "u8", "factored", "kronecker"])
def test_offloaded_importance_on_a_gpu(tiny, form):
    model = adapted(tiny).cuda()
    importance, pulls = importance_of(model, form), []
    for offload in (False, True):
        penalty = Penalty(model, importance, strength=0.5, offload=offload)
        for weight in penalty.weights:
            weight.A.grad = weight.B.grad = None
        penalty.pull()
        pulls.append([p.grad.clone() for w in penalty.weights for p in w.parameters])
    assert all(
        entry_tensor.is_pinned()
        for entry in penalty.importance.entries.values()
        for entry_tensor in entry.tensors().values()
    )
    assert all(torch.equal(a, b) for a, b in zip(*pulls, strict=True))
