"""Factored and Kronecker pulls against the specification through autograd: single pulls, many
steps, anchors, adapters, dtypes, full fine-tuning.
"""

import copy

import pytest
import torch

from forgetless.importance.covariance import Covariance
from forgetless.importance.entries import FactoredEntry, KroneckerEntry
from forgetless.importance.importance import Importance
from forgetless.model.adapters import add_adapter
from forgetless.model.targets import target_weights
from forgetless.model.weights import LowRankWeight
from forgetless.penalty import factored, kronecker, reference
from forgetless.penalty.difference import thin
from forgetless.penalty.pull import Penalty

FORMS = ["factored", "factored:3", "kronecker", "kronecker:2"]
SHAPES = [(1, 1, 1), (7, 3, 2), (5, 11, 8), (64, 33, 4)]


def covariance(n, g, rank=None):
    """(n, n) with eigenvalues over two orders of magnitude, in f64."""
    X = (
        torch.randn(n, 2 * n, generator=g, dtype=torch.float64)
        * torch.logspace(0, -2, n, dtype=torch.float64)[:, None]
    )
    whole = Covariance(X @ X.T / (2 * n))
    return whole if rank is None else whole.cut(rank)


def make_entry(form, out, into, seed=0):
    g = torch.Generator().manual_seed(seed)
    kind, _, rank = form.partition(":")
    if kind == "factored":
        k = int(rank or 1)
        return FactoredEntry(
            *(torch.rand(n, k, generator=g, dtype=torch.float64) ** 4 for n in (out, into))
        )
    return KroneckerEntry(*(covariance(n, g, int(rank) if rank else None) for n in (out, into)))


def reference_energy(entry, D):
    if isinstance(entry, FactoredEntry):
        return reference.factored_energy(D, entry.row.to(D), entry.col.to(D))
    return reference.kronecker_energy(D, entry.out_cov.full().to(D), entry.in_cov.full().to(D))


def algebra(entry):
    return factored if isinstance(entry, FactoredEntry) else kronecker


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("start", ["none", "initial", "anchor", "both"])
def test_pull_is_the_gradient_of_the_reference_energy(form, shape, start):
    out, into, r = shape
    g = torch.Generator().manual_seed(out)
    new = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)
    A, B, s, k = new(r, into).requires_grad_(), new(out, r).requires_grad_(), 0.7, 1.3
    initial = (new(r, into), new(out, r)) if start in ("initial", "both") else None
    anchor = (new(3, into), new(out, 3)) if start in ("anchor", "both") else None
    entry = make_entry(form, out, into)
    D = s * (B @ A)
    D = D if initial is None else D - s * (initial[1] @ initial[0])
    D = D if anchor is None else D - anchor[1] @ anchor[0]
    energy = reference_energy(entry, D)
    gA, gB = torch.autograd.grad(k * energy, (A, B))
    pull_A, pull_B, found = algebra(entry).pull(
        A.detach(), B.detach(), s, entry, *thin(A.detach(), B.detach(), s, initial, anchor), k
    )
    for mine, theirs in ((pull_A, gA), (pull_B, gB), (found, energy.detach())):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9 * float(theirs.abs().max()))
    torch.testing.assert_close(entry.energy(D.detach()), energy.detach(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_full_pull_is_the_gradient_of_the_reference_energy(form, shape):
    out, into, _ = shape
    entry = make_entry(form, out, into)
    D = torch.randn(
        out, into, dtype=torch.float64, generator=torch.Generator().manual_seed(out)
    ).requires_grad_()
    energy = reference_energy(entry, D)
    (expected,) = torch.autograd.grad(0.3 * energy, D)
    found, e = algebra(entry).full_pull(D.detach(), entry, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9 * float(expected.abs().max()))
    torch.testing.assert_close(e, energy.detach(), rtol=1e-9, atol=0)


def of_form(form, weights, dtype, anchors=False):
    """Importance in f32 (f64 for f64) and anchors for the weights of a model."""
    entries = {
        w.name: make_entry(form, *w.shape, seed=i).to(torch.device("cpu"), dtype, {})
        for i, w in enumerate(weights)
    }
    g = torch.Generator().manual_seed(9)
    kept = {
        w.name: (
            torch.randn(2, w.shape[1], generator=g) * 0.1,
            torch.randn(w.shape[0], 2, generator=g) * 0.1,
        )
        for w in weights
    }
    return Importance(entries, kept if anchors else {}, {})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("anchor", ["base", "recorded"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_pull_steps_like_a_loss_term_over_many_steps(tiny, form, anchor, dtype, tolerance):
    ours = add_adapter(tiny(dtype=dtype), names="q_proj,down_proj", rank=3, alpha=6).to(dtype)
    for weight in target_weights(ours):
        torch.nn.init.normal_(weight.B, std=0.1)
    theirs = copy.deepcopy(ours)
    importance = of_form(form, target_weights(ours), dtype, anchors=True)
    penalty = Penalty(ours, importance, strength=0.3, anchor=anchor)
    assert form.split(":")[0] in penalty.implementation
    a = torch.optim.Adam([p for w in penalty.weights for p in w.parameters], lr=0.01)
    b = torch.optim.Adam([p for w in target_weights(theirs) for p in w.parameters], lr=0.01)
    with penalty.attach(a):
        for _ in range(30):
            for w in penalty.weights:
                w.A.grad, w.B.grad = 0.01 * w.A.detach(), 0.01 * w.B.detach()
            a.step()
            b.zero_grad()
            loss = 0
            for w in target_weights(theirs):
                A0, B0 = importance.anchors[w.name]
                D = w.scale * (w.B @ w.A) - (
                    B0.to(dtype) @ A0.to(dtype) if anchor == "recorded" else 0
                )
                loss = (
                    loss
                    + 0.3 * reference_energy(importance[w.name], D)
                    + 0.005 * (w.A.square().sum() + w.B.square().sum())
                )
            loss.backward()
            b.step()
    for x, y in zip(penalty.weights, target_weights(theirs), strict=True):
        torch.testing.assert_close(x.A, y.A, rtol=tolerance, atol=tolerance * 0.1)
        torch.testing.assert_close(x.B, y.B, rtol=tolerance, atol=tolerance * 0.1)


@pytest.mark.parametrize("form", FORMS)
def test_bf16_factors_are_pulled_in_f32(tiny, form):
    model = add_adapter(tiny(), names="q_proj", rank=3, alpha=6).to(torch.bfloat16)
    for weight in target_weights(model):
        torch.nn.init.normal_(weight.B, std=0.1)
    importance = of_form(form, target_weights(model), torch.float32)
    penalty = Penalty(model, importance, strength=1.0)
    exact = sum(
        float(reference_energy(importance[w.name], w.scale * (w.B.double() @ w.A.double())))
        for w in penalty.weights
    )
    assert penalty.energy() == pytest.approx(exact, rel=1e-5)
    penalty.pull()
    assert all(w.A.grad.dtype == torch.bfloat16 and bool(w.B.grad.any()) for w in penalty.weights)


@pytest.mark.parametrize("form", FORMS)
def test_energy_is_zero_at_the_recorded_anchor(tiny, form):
    """Differences of factors, not of products: what cancels, cancels exactly."""
    model = add_adapter(tiny(), names="q_proj", rank=2, alpha=2)
    weights = target_weights(model)
    importance = of_form(form, weights, torch.float32, anchors=True)
    for w in weights:
        assert isinstance(w, LowRankWeight)
        w.A.data.copy_(importance.anchors[w.name][0])
        w.B.data.copy_(importance.anchors[w.name][1])
    penalty = Penalty(model, importance, strength=1.0, anchor="recorded")
    assert penalty.energy() == 0.0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_pull_on_full_weights(tiny, form, kind):
    model = tiny(kind)
    weights = target_weights(model, names="all-linear")
    importance = of_form(form, weights, torch.float32, anchors=True)
    for anchor in ("base", "recorded"):
        penalty = Penalty(model, importance, strength=0.5, names="all-linear", anchor=anchor)
        with torch.no_grad():
            for w in penalty.weights:
                w.W.add_(torch.randn_like(w.W), alpha=0.1)
                w.W.grad = None
        penalty.pull()
        for w in penalty.weights:
            A0, B0 = importance.anchors[w.name]
            D = (w.update() - (B0 @ A0 if anchor == "recorded" else 0)).requires_grad_()
            (expected,) = torch.autograd.grad(0.5 * reference_energy(importance[w.name], D), D)
            torch.testing.assert_close(
                w.oriented(w.W.grad), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
            )
