"""What holds after the optimizer's step: against one dense system, element by element in the
eigenvectors' basis, and on models.
"""

from types import SimpleNamespace

import pytest
import torch

from conftest import CONFIGS
from forgetless.importance.covariance import Covariance
from forgetless.importance.entries import KroneckerEntry
from forgetless.importance.importance import Importance
from forgetless.methods.after_step import AfterStep, AfterStepCallback
from forgetless.model.adapters import add_adapter
from forgetless.model.targets import target_weights
from forgetless.penalty import proximal

OUT, IN, RANK = 11, 7, 3


def drawn(rank=None, seed=0):
    """A Kronecker entry in f64, whole or cut to a rank, and factors A (r, in), B (out, r)."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    covariances = []
    for n in (OUT, IN):
        X = draw(2 * n, n) * torch.logspace(0.5, -1, n, dtype=torch.float64)
        whole = Covariance(X.T @ X / len(X))
        covariances.append(whole if rank is None else whole.cut(rank))
    return KroneckerEntry(*covariances), draw(RANK, IN), draw(OUT, RANK)


def eigen(covariance):
    """All eigenvalues and eigenvectors of the covariance as a matrix."""
    return torch.linalg.eigh(covariance.full())


@pytest.mark.parametrize("rank", [None, 4])
def test_each_factor_solves_its_quadratic(rank):
    entry, A, B = drawn(rank)
    G, C = entry.out_cov.full(), entry.in_cov.full()
    sides = proximal.sides_of(entry)
    new_A, new_B = sides.step(A, B, scale=2.0, t=0.3)
    expected_A = proximal.reference_factor(A, 2.0 * B, G, C, 0.6)
    torch.testing.assert_close(new_A, expected_A)
    expected_B = proximal.reference_factor(B.T, 2.0 * expected_A.T, C, G, 0.6).T
    torch.testing.assert_close(new_B, expected_B)
    still_A, still_B = sides.step(A, B, scale=2.0, t=0.0)
    torch.testing.assert_close((still_A, still_B), (A, B))


def test_the_solution_is_the_least_of_the_quadratic():
    """At A' the derivative of ||A' - A||^2 / 2 + t tr(G U' C U'^T) is zero, by autograd."""
    entry, A, B = drawn(4)
    new_A, _ = proximal.sides_of(entry).step(A, B, scale=2.0, t=0.3)
    new_A = new_A.requires_grad_()
    value = (new_A - A).square().sum() / 2 + 0.3 * entry.energy(2.0 * B @ new_A)
    (slope,) = torch.autograd.grad(value, new_A)
    assert float(slope.abs().max()) < 1e-10


@pytest.mark.parametrize("rank", [None, 4])
def test_in_full_fine_tuning_each_pair_of_directions_shrinks_by_its_curvature(rank):
    entry, A, B = drawn(rank)
    (g, V), (c, W) = eigen(entry.out_cov), eigen(entry.in_cov)
    U = B @ A
    sides = proximal.sides_of(entry)
    made = proximal.filtered(U, sides.outputs, sides.inputs, sides.factors(0.3))
    expected = V @ ((V.T @ U @ W) / (1 + 0.6 * torch.outer(g, c))) @ W.T
    torch.testing.assert_close(made, expected)


@pytest.mark.parametrize("fraction", [0.5, 0.9])
def test_protected_pairs_are_the_largest_that_fit(fraction):
    entry, _, _ = drawn()
    sides = proximal.sides_of(entry, fraction)
    curvature = torch.outer(sides.outputs.values, sides.inputs.values)
    protected = sides.protected[:-1, :-1]
    taken, left = curvature[protected], curvature[~protected]
    assert float(taken.min()) >= float(left.max())
    assert float(taken.sum()) <= fraction * float(curvature.sum())
    assert float(taken.sum() + left.max()) > fraction * float(curvature.sum())
    assert not sides.protected[-1].any() and not sides.protected[:, -1].any()


def test_other_directions_are_protected_together_or_not_at_all():
    """Two outputs of variance 3 and 1; inputs: 4 along the first, and 1 along each of five others.

    The pairs have curvature 12, 5 x 3, 4 and 5 x 1, of 36; floors are 1 and 1.
    """
    outputs = proximal.Directions(torch.eye(2), torch.tensor([3.0, 1.0]), torch.tensor(0.0))
    inputs = proximal.Directions(torch.eye(6)[:, :1], torch.tensor([4.0]), torch.tensor(1.0))
    for fraction, expected in (
        (0.2, [[1, 0], [0, 0], [0, 0]]),
        (0.5, [[1, 0], [1, 0], [0, 0]]),  # 12 + 4; with the five of 3 it would be 31
        (0.9, [[1, 1], [1, 0], [0, 0]]),
    ):
        made = proximal.protected_pairs(outputs, inputs, fraction)
        assert made.int().tolist() == expected, fraction


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("fraction", [0.3, 0.6])
def test_projected_factors_leave_nothing_in_the_protected_pairs(rank, fraction):
    entry, A, B = drawn(rank)
    sides = proximal.sides_of(entry, fraction)
    new_A, new_B = sides.step(A, B, scale=2.0, t=0.0)
    inside = lambda U: (sides.outputs.vectors.T @ U @ sides.inputs.vectors)[
        sides.protected[:-1, :-1]
    ]
    assert float(inside(new_B @ new_A).abs().max()) < 1e-9 < float(inside(B @ A).abs().max())
    again_A, again_B = sides.step(new_A, new_B, scale=2.0, t=0.0)
    torch.testing.assert_close((again_A, again_B), (new_A, new_B))


def test_the_projection_is_the_limit_of_the_proximal_step():
    """Where the curvature of all but the protected pairs is taken away and the strength grows.

    By the dense system, whose curvature needs not be a product: here of one protected pair, so that
    it is one.
    """
    entry, A, B = drawn()
    sides = proximal.sides_of(entry, 0.01)
    assert int(sides.protected.sum()) == 1
    (i, j) = sides.protected.nonzero()[0].tolist()
    v, w = sides.outputs.vectors[:, i], sides.inputs.vectors[:, j]
    G, C = torch.outer(v, v), torch.outer(w, w)
    new_A, _ = sides.step(A, B, scale=1.0, t=0.0)
    expected = proximal.reference_factor(A, B, G, C, 1e7)
    torch.testing.assert_close(new_A, expected, rtol=1e-5, atol=1e-5)


def importance_of(model, names, full=False, rank=4):
    """Kronecker importance of every target weight, drawn."""
    g = torch.Generator().manual_seed(3)
    entries = {}
    for weight in target_weights(model, names=names if full else None):
        covariances = []
        for n in weight.shape:
            X = torch.randn(2 * n, n, generator=g) * torch.logspace(0.5, -1, n)
            covariances.append(Covariance(X.T @ X / len(X)).cut(rank))
        entries[weight.name] = KroneckerEntry(*covariances)
    return Importance(entries, {"estimator": "kronecker"})


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("full", [False, True])
def test_on_models_the_update_shrinks_as_the_formula_says(tiny, kind, full):
    if kind not in CONFIGS:
        pytest.skip(f"no {kind} among the tiny models")
    model = tiny(kind)
    names = "c_attn" if kind == "gpt2" else "q_proj"
    if not full:
        model = add_adapter(model, names=names, rank=2, alpha=4.0)
    importance = importance_of(model, names, full)
    held = AfterStep(model, importance, strength=5.0, names=names if full else None)
    for weight in held.weights:
        for p in weight.parameters:
            p.data.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    before = {weight.name: weight.update() for weight in held.weights}
    energy = held.energy()
    penalty = sum(float(importance[name].energy(U)) for name, U in before.items())
    assert energy == pytest.approx(penalty, rel=1e-4)
    held.step(0.01)
    for weight in held.weights:
        U = before[weight.name]
        if full:
            entry = importance[weight.name]
            (g, V), (c, W) = eigen(entry.out_cov), eigen(entry.in_cov)
            expected = V @ ((V.T @ U @ W) / (1 + 0.1 * torch.outer(g, c))) @ W.T
            torch.testing.assert_close(weight.update(), expected, rtol=1e-3, atol=1e-5)
    assert held.energy() < energy
    stronger = AfterStep(model, importance, strength=1e9, names=names if full else None)
    stronger.step(0.01)
    assert stronger.energy() < 1e-3 * energy


def test_it_acts_after_each_step_by_the_rate_of_that_step():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    seen = []
    callback = AfterStepCallback(
        SimpleNamespace(step=lambda rate: seen.append((rate, float(p[0]))))
    )
    callback.on_train_begin(None, None, None, optimizer=SimpleNamespace(optimizer=optimizer))
    for _ in range(2):
        p.grad = torch.ones(2)
        optimizer.step()
        schedule.step()
    callback.on_train_end(None, None, None)
    p.grad = torch.ones(2)
    optimizer.step()
    assert seen == [pytest.approx((0.1, 0.9)), pytest.approx((0.05, 0.85))]


def test_importance_of_another_kind_is_refused(tiny):
    from forgetless.importance.controls import uniform

    model = add_adapter(tiny(), names="q_proj", rank=2, alpha=4.0)
    with pytest.raises(ValueError, match="need Kronecker importance, found 'factored'"):
        AfterStep(model, uniform(model, "q_proj"), strength=1.0)
