"""The pull and the energy: closed form against the specification through autograd, and what users
rely on around it.
"""

import copy

import pytest
import torch

from forgetless.errors import OptionError
from forgetless.importance.entries import DenseEntry
from forgetless.importance.importance import Importance
from forgetless.model.adapters import add_adapter
from forgetless.model.targets import target_weights
from forgetless.penalty import dense, reference
from forgetless.penalty.layers import PerKind, Softmax, Uniform
from forgetless.penalty.pull import Penalty


def make_importance(model, seed=0, anchors=True):
    g = torch.Generator().manual_seed(seed)
    weights = target_weights(model)
    entries = {w.name: DenseEntry(torch.rand(w.shape, generator=g) ** 4) for w in weights}
    kept = {
        w.name: (
            torch.randn(3, w.shape[1], generator=g) * 0.1,
            torch.randn(w.shape[0], 3, generator=g) * 0.1,
        )
        for w in weights
    }
    return Importance(entries, kept if anchors else {}, {})


@pytest.fixture
def adapted(tiny):
    model = add_adapter(tiny(), names="all-linear", rank=3, alpha=6)
    for weight in target_weights(model):
        torch.nn.init.normal_(weight.B, std=0.1)
    return model


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 3, 2), (5, 11, 8), (64, 33, 4)])
def test_dense_pull_is_the_gradient_of_the_reference_energy_in_f64(shape):
    out, into, r = shape
    torch.manual_seed(out)
    A, B = torch.randn(r, into, dtype=torch.float64), torch.randn(out, r, dtype=torch.float64)
    omega, anchor = (
        torch.rand(out, into, dtype=torch.float64) ** 6,
        torch.randn(out, into, dtype=torch.float64),
    )
    gA, gB, energy = dense.pull(A, B, 0.7, omega, anchor, 1.3)
    rA, rB = reference.pull(A, B, 0.7, omega, anchor, 1.3)
    torch.testing.assert_close(gA, rA, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gB, rB, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        energy, reference.energy(A, B, 0.7, omega, anchor), rtol=1e-10, atol=0
    )


@pytest.mark.parametrize("anchor", ["base", "recorded"])
def test_pull_steps_like_the_loss_term_of_the_paper_over_many_steps(adapted, anchor):
    """The pull and the same penalty added to the loss give the same factors, step after step."""
    other = copy.deepcopy(adapted)
    importance = make_importance(adapted)
    penalty = Penalty(adapted, importance, strength=0.3, layers=Softmax(tau=0.5), anchor=anchor)
    ours, theirs = target_weights(adapted), target_weights(other)
    a = torch.optim.SGD([p for w in ours for p in w.parameters], lr=0.05)
    b = torch.optim.SGD([p for w in theirs for p in w.parameters], lr=0.05)
    with penalty.attach(a):
        for _ in range(20):
            for w in ours:
                w.A.grad, w.B.grad = 0.01 * w.A.detach(), 0.01 * w.B.detach()
            a.step()
            b.zero_grad()
            loss = 0
            for w in theirs:
                A0, B0 = importance.anchors[w.name]
                star = B0 @ A0 if anchor == "recorded" else torch.zeros(w.shape)
                c = penalty.coefficients[w.name]
                loss = (
                    loss
                    + 0.3
                    * c
                    * reference.energy(w.A, w.B, w.scale, importance[w.name].dense(), star)
                    + 0.005 * (w.A.square().sum() + w.B.square().sum())
                )
            loss.backward()
            b.step()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.A, y.A, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(x.B, y.B, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tier", ["bf16", "u8", "u4"])
@pytest.mark.parametrize("anchor", ["base", "recorded"])
def test_every_tier_pulls_as_its_decoded_values_do(adapted, tier, anchor):
    stored = make_importance(adapted).to_tier(tier)
    decoded = Importance(
        {name: DenseEntry(stored[name].dense()) for name in stored},
        stored.anchors,
        {"norms": stored.norms()},
    )
    penalty, plain = (
        Penalty(adapted, importance, strength=0.3, layers=Softmax(tau=0.5), anchor=anchor)
        for importance in (stored, decoded)
    )
    pulls = []
    for each in (penalty, plain):
        each.pull()
        pulls.append([p.grad.clone() for w in each.weights for p in w.parameters])
        adapted.zero_grad()
    for ours, theirs in zip(*pulls, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert penalty.energy() == pytest.approx(plain.energy(), rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_full_fine_tuning_pulls_from_codes(kind, tiny):
    model = tiny(kind)
    weights = target_weights(model, names="all-linear")
    importance = Importance(
        {w.name: DenseEntry(torch.rand(w.shape) ** 4) for w in weights}
    ).to_tier("u8")
    penalty = Penalty(model, importance, strength=0.5, names="all-linear")
    with torch.no_grad():
        for w in penalty.weights:
            w.W.add_(0.1)
    penalty.pull()
    for w in penalty.weights:
        torch.testing.assert_close(
            w.oriented(w.W.grad), 2 * 0.5 * importance[w.name].dense() * 0.1, rtol=1e-4, atol=1e-6
        )


def test_energy_and_value(adapted):
    importance = make_importance(adapted)
    penalty = Penalty(adapted, importance, strength=2.0)
    expected = sum(float(importance[w.name].energy(w.update())) for w in target_weights(adapted))
    assert penalty.energy() == pytest.approx(expected, rel=1e-5)
    assert penalty.value() == pytest.approx(2 * expected, rel=1e-5)


def test_pull_on_full_weights_is_elementwise(tiny):
    for kind in ("llama", "gpt2"):
        model = tiny(kind)
        weights = target_weights(model, names="all-linear")
        importance = Importance({w.name: DenseEntry(torch.rand(w.shape)) for w in weights})
        penalty = Penalty(model, importance, strength=0.5, names="all-linear")
        with torch.no_grad():
            for w in penalty.weights:
                w.W.add_(0.1)
        penalty.pull()
        for w in penalty.weights:
            torch.testing.assert_close(
                w.oriented(w.W.grad),
                2 * 0.5 * importance[w.name].dense() * 0.1,
                rtol=1e-4,
                atol=1e-6,
            )


def test_strength_zero_leaves_gradients_and_memory_alone(adapted):
    penalty = Penalty(adapted, make_importance(adapted), strength=0.0)
    penalty.pull()
    assert all(p.grad is None for w in penalty.weights for p in w.parameters)


def test_uniform_coefficients_equal_none_and_per_kind_averages_to_one(adapted):
    importance = make_importance(adapted)
    plain, uniform = (
        Penalty(adapted, importance, strength=1.0),
        Penalty(adapted, importance, strength=1.0, layers=Uniform()),
    )
    assert plain.coefficients == uniform.coefficients == {w.name: 1.0 for w in plain.weights}
    kinds = Penalty(adapted, importance, strength=1.0, layers=PerKind({"q_proj": 5.0})).coefficients
    assert sum(kinds.values()) == pytest.approx(len(kinds))


def test_pull_follows_the_fused_scale_and_sits_out_skipped_steps(adapted):
    penalty = Penalty(adapted, make_importance(adapted), strength=1.0)
    optimizer = torch.optim.SGD(
        [p for w in penalty.weights for p in w.parameters], lr=0.0, fused=True
    )
    with penalty.attach(optimizer):
        optimizer.step()
        plain = penalty.weights[0].A.grad.clone()
        optimizer.zero_grad()
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
        optimizer.step()
        torch.testing.assert_close(
            penalty.weights[0].A.grad, plain
        )  # the step has unscaled it in place
        optimizer.zero_grad()
        optimizer.found_inf = torch.tensor(1.0)
        optimizer.step()
        assert penalty.weights[0].A.grad is None


def test_closing_removes_the_hook(adapted):
    penalty = Penalty(adapted, make_importance(adapted), strength=1.0)
    optimizer = torch.optim.SGD([p for w in penalty.weights for p in w.parameters], lr=0.1)
    with pytest.raises(RuntimeError, match="inside"), penalty.attach(optimizer):
        raise RuntimeError("inside")
    assert not optimizer._optimizer_step_pre_hooks
    optimizer.step()
    assert penalty.pull_norm is None


def test_misfits_are_refused_with_names(adapted, tiny):
    importance = make_importance(adapted, anchors=False)
    name = next(iter(importance))
    wrong = Importance(
        {**importance.entries, name: DenseEntry(torch.ones(3, 3))},
        {},
        {"model": {"name": "other/model"}},
    )
    with pytest.raises(ValueError, match=r"\(3, 3\) in the file and \(16, 16\).*other/model"):
        Penalty(adapted, wrong, strength=1.0)
    with pytest.raises(ValueError, match="does not cover 1 of 14"):
        Penalty(
            adapted,
            Importance({k: v for k, v in importance.entries.items() if k != name}),
            strength=1.0,
        )
    with pytest.raises(ValueError, match="another base model"):
        Penalty(
            adapted,
            Importance(importance.entries, {}, {"model": {"fingerprint": "0" * 64}}),
            strength=1.0,
        )
    with pytest.raises(ValueError, match="no recorded adapter"):
        Penalty(adapted, importance, strength=1.0, anchor="recorded")
    with pytest.raises(OptionError, match=r"'fused' cannot be used: .*use 'tiled'"):
        Penalty(adapted, importance, strength=1.0, kernel="fused")
    with pytest.raises(OptionError, match="strength"):
        Penalty(adapted, importance, strength=float("nan"))


def test_different_learning_rates_and_a_frozen_factor(adapted):
    """The pull is a gradient: each factor moves by its own rate, and a frozen one stays."""
    penalty = Penalty(adapted, make_importance(adapted), strength=1.0)
    frozen, weights = penalty.weights[0], penalty.weights[1:]
    frozen.A.requires_grad_(False)
    optimizer = torch.optim.SGD(
        [
            {"params": [frozen.B, *(w.A for w in weights)], "lr": 1e-3},
            {"params": [w.B for w in weights], "lr": 1e-2},
        ]
    )
    before = {w.name: (w.A.detach().clone(), w.B.detach().clone()) for w in penalty.weights}
    with penalty.attach(optimizer):
        optimizer.step()
    assert (
        torch.equal(frozen.A, before[frozen.name][0])
        and frozen.A.grad is None
        and not torch.equal(frozen.B, before[frozen.name][1])
    )
    for w in weights:
        torch.testing.assert_close(w.A, before[w.name][0] - 1e-3 * w.A.grad)
        torch.testing.assert_close(w.B, before[w.name][1] - 1e-2 * w.B.grad)


def test_frozen_adapters_and_foreign_optimizers_are_refused(adapted):
    penalty = Penalty(adapted, make_importance(adapted), strength=1.0)
    with pytest.raises(ValueError, match="not among this optimizer"):
        penalty.attach(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
    with pytest.raises(ValueError, match="expected a torch optimizer"):
        penalty.attach(object())
    everything = [p for w in penalty.weights for p in w.parameters]
    for p in everything:
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable=True"):
        penalty.attach(torch.optim.SGD(everything, lr=0.1))


def test_bf16_factors_are_pulled_in_f32(adapted):
    exact = copy.deepcopy(adapted)
    for model in (adapted, exact):
        for w in target_weights(model):
            for p in w.parameters:
                p.data = p.data.bfloat16()
    for w in target_weights(exact):
        for p in w.parameters:
            p.data = p.data.float()
    importance = make_importance(adapted)
    low, high = Penalty(adapted, importance, strength=1.0), Penalty(exact, importance, strength=1.0)
    low.pull(), high.pull()
    assert low.energy() == pytest.approx(high.energy(), rel=1e-6)
    for a, b in zip(low.weights, high.weights, strict=True):
        torch.testing.assert_close(a.A.grad, b.A.grad.bfloat16())


def test_a_non_finite_pull_stops_before_anything_moves(adapted):
    penalty = Penalty(adapted, make_importance(adapted), strength=1e38)
    optimizer = torch.optim.SGD([p for w in penalty.weights for p in w.parameters], lr=0.1)
    before = [p.detach().clone() for w in penalty.weights for p in w.parameters]
    with pytest.raises(ValueError, match="lower the strength"), penalty.attach(optimizer):
        optimizer.step()
    assert all(
        torch.equal(a, b)
        for a, b in zip(before, (p for w in penalty.weights for p in w.parameters), strict=True)
    )
