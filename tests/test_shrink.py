"""Shrinking: fast paths against one dense system, the fit against its closed forms and against
plain truncation, and what never happens (energy comes back).
"""

import itertools

import pytest
import torch

from forgetless.budget import shrink_forms
from forgetless.budget import shrunk as shrink
from forgetless.budget.shrink_forms import prepared
from forgetless.budget.shrunk import (
    balanced,
    objective,
    refactored,
    reference,
    truncated,
    typical,
)
from forgetless.importance import codec
from forgetless.importance.covariance import Covariance, LowRankCovariance
from forgetless.importance.entries import CodedEntry, DenseEntry, FactoredEntry, KroneckerEntry

CPU = torch.device("cpu")
FORMS = ["dense", "u8", "factored", "factored:3", "kronecker", "kronecker:2"]
SHAPES = [(1, 1, 1), (7, 3, 2), (5, 11, 4), (12, 9, 3)]  # out, in, rank


def covariance(n, g, rank=None):
    """(n, n) with eigenvalues over four orders of magnitude, in f64."""
    X = (
        torch.randn(n, 2 * n, generator=g, dtype=torch.float64)
        * torch.logspace(0, -2, n, dtype=torch.float64)[:, None]
    )
    whole = Covariance(X @ X.T / (2 * n))
    return whole if rank is None else whole.cut(rank)


def make_entry(form, out, into, seed=0):
    g = torch.Generator().manual_seed(seed)
    kind, _, rank = form.partition(":")
    values = torch.rand(out, into, generator=g) ** 6
    if kind == "dense":
        return DenseEntry(values)
    if kind == "u8":
        return CodedEntry(*codec.encode(values, "u8"), (out, into), "u8")
    if kind == "factored":
        return FactoredEntry(
            *(
                torch.rand(n, int(rank or 1), generator=g, dtype=torch.float64) ** 4
                for n in (out, into)
            )
        )
    return KroneckerEntry(*(covariance(n, g, int(rank) if rank else None) for n in (out, into)))


def make(form, shape, seed=0):
    """(entry, its form, L, R)."""
    out, into, rank = shape
    g = torch.Generator().manual_seed(seed + 1)
    entry = make_entry(form, out, into, seed)
    return (
        entry,
        prepared(entry, CPU, {}),
        *(
            torch.randn(*size, generator=g, dtype=torch.float64)
            for size in ((out, rank), (rank, into))
        ),
    )


def product(P, core, Q):
    core = P @ core if P.numel() else core
    return core @ Q if Q.numel() else core


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_form_agrees_with_one_dense_system(form, shape):
    entry, fast, L, R = make(form, shape)
    U = L @ R
    torch.testing.assert_close(fast.energy(L, R), entry.energy(U))
    torch.testing.assert_close(fast.T.energy(R.T, L.T), entry.energy(U))
    for mu in (0.1, 3.0, 1e4):
        torch.testing.assert_close(product(*fast.closed(L, R, mu)), reference(entry, U, mu))
        Q = torch.linalg.qr(
            torch.randn(
                shape[1],
                min(shape[1:]),
                generator=torch.Generator().manual_seed(5),
                dtype=torch.float64,
            )
        )[0].T
        torch.testing.assert_close(fast.fit(L, R, Q, mu) @ Q, reference(entry, U, mu, Q))


@pytest.mark.parametrize("form", FORMS)
def test_both_sides_step_together_with_the_dense_system(form):
    entry, fast, L, R = make(form, (12, 9, 3))
    other = {
        "dense": lambda e: DenseEntry(e.values.T),
        "factored": lambda e: FactoredEntry(e.col, e.row),
        "kronecker": lambda e: KroneckerEntry(e.in_cov, e.out_cov),
    }
    turned = (
        other["dense"](DenseEntry(entry.dense()))
        if form == "u8"
        else other[form.partition(":")[0]](entry)
    )
    Q, slow = torch.linalg.qr(R.T)[0].T, None
    for _ in range(6):
        P = torch.linalg.qr(fast.fit(L, R, Q, 2.0))[0]
        B = torch.linalg.svd(reference(entry, L @ R, 2.0, Q if slow is None else slow))[0][:, :3]
        fitted = fast.T.fit(R.T, L.T, P.T, 2.0).T
        V = reference(turned, (L @ R).T, 2.0, B.T).T
        torch.testing.assert_close(P @ fitted, V)
        Q, slow = torch.linalg.qr(fitted.T)[0].T, torch.linalg.svd(V)[2][:3]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mu", [0.3, 10.0, 1e5])
def test_the_fit_never_rises_and_beats_truncation(form, mu):
    for seed in range(5):
        _, fast, L, R = make(form, (12, 9, 3), seed)
        values = [objective(fast, L, R, *truncated(fast, L, R, mu), mu)]
        values += [
            objective(fast, L, R, *refactored(fast, L, R, mu, sweeps=n), mu)
            for n in (1, 2, 4, 8, 50)
        ]
        assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(values)), values
        assert values[-1] < values[0]


@pytest.mark.parametrize("form", FORMS)
def test_full_rank_gives_the_closed_form(form):
    for shape in ((6, 9, 6), (9, 6, 6)):
        entry, fast, L, R = make(form, shape)
        V = torch.mm(*refactored(fast, L, R, 2.5))
        torch.testing.assert_close(V, reference(entry, L @ R, 2.5))


@pytest.mark.parametrize("form", FORMS)
def test_energy_falls_with_mu_and_never_comes_back(form):
    _, fast, L, R = make(form, (12, 9, 3))
    whole = float(fast.energy(L, R))
    unit = typical([(fast, L, R)])
    energies = [
        float(fast.energy(*refactored(fast, L, R, mu / unit, sweeps=200)))
        for mu in (0.0, 0.1, 1.0, 10.0, 1e3)
    ]
    assert energies[0] == pytest.approx(whole)
    assert all(b < a for a, b in itertools.pairwise(energies)), energies


def test_truncation_alone_can_bring_energy_back():
    entry = DenseEntry(
        torch.tensor([[1e4, 0.0], [0.0, 0.0]])
    )  # the closed form empties one element, its rank-1 truncation fills it again
    fast, L, R = (
        prepared(entry, CPU, {}),
        torch.tensor([[1.0], [1.0]], dtype=torch.float64),
        torch.tensor([[1.0, 1.0]], dtype=torch.float64),
    )
    closed, cut = (
        float(fast.energy(torch.eye(2, dtype=torch.float64), reference(entry, L @ R, 1.0))),
        float(fast.energy(*truncated(fast, L, R, 1.0))),
    )
    fitted = float(fast.energy(*refactored(fast, L, R, 1.0, sweeps=100)))
    assert closed < 1e-3 and cut > 100 and fitted < 1e-3


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_uniform_importance_scales_whatever_its_unit(unit):
    _, _, L, R = make("factored", (12, 9, 3))
    fast = prepared(FactoredEntry(torch.full((12, 1), unit), torch.ones(9, 1)), CPU, {})
    for mu in (0.5, 1.0, 9.0):
        torch.testing.assert_close(
            torch.mm(*refactored(fast, L, R, mu / typical([(fast, L, R)]))), L @ R / (1 + mu)
        )


def test_mu_zero_and_a_zero_update_are_left_alone():
    _, fast, L, R = make("kronecker", (12, 9, 3))
    assert all(torch.equal(a, b) for a, b in zip(refactored(fast, L, R, 0.0), (L, R), strict=True))
    assert not torch.mm(*refactored(fast, torch.zeros_like(L), R, 1.0)).any()
    with pytest.raises(ValueError, match="nothing to shrink: the update is zero"):
        typical([(fast, torch.zeros_like(L), R)])


def test_stored_directions_that_are_not_quite_orthonormal_are_taken_as_they_are():
    g = torch.Generator().manual_seed(0)
    rough = [covariance(n, g, 2) for n in (7, 5)]
    entry = KroneckerEntry(
        *(
            LowRankCovariance(c.vectors.bfloat16(), c.values.bfloat16(), c.floor.bfloat16())
            for c in rough
        )
    )
    fast, L, R = (
        prepared(entry, CPU, {}),
        *(torch.randn(*size, generator=g, dtype=torch.float64) for size in ((7, 2), (2, 5))),
    )
    torch.testing.assert_close(
        product(*fast.closed(L, R, 2.0)), reference(entry, L @ R, 2.0), rtol=1e-5, atol=1e-6
    )  # the twin reads them in f32


def test_weights_that_read_one_input_decompose_its_covariance_once():
    g, made = torch.Generator().manual_seed(0), {}
    shared = covariance(6, g)
    forms = [prepared(KroneckerEntry(covariance(n, g), shared), CPU, made) for n in (4, 5)]
    assert forms[0].into is forms[1].into and len(made) == 3


@pytest.mark.parametrize("form", ["dense", "kronecker", "kronecker:4"])
def test_large_weights_start_where_a_whole_decomposition_would(form, monkeypatch):
    _, fast, L, R = make(form, (40, 60, 4))
    whole = truncated(fast, L, R, 2.0)
    monkeypatch.setattr(shrink, "EXACT_BELOW", 0)
    torch.testing.assert_close(
        torch.mm(*truncated(fast, L, R, 2.0)), torch.mm(*whole), rtol=1e-3, atol=1e-4
    )


def test_elements_read_a_few_rows_at_a_time(monkeypatch):
    for form in ("dense", "u8"):
        entry, fast, *_ = make(form, (12, 9, 3))
        X, Y = torch.randn(9, 2, dtype=torch.float64), torch.randn(12, 2, dtype=torch.float64)
        monkeypatch.setattr(shrink_forms, "WIDENED_AT_ONCE", 27)  # three rows
        torch.testing.assert_close(fast.times(X), entry.dense().double() @ X)
        torch.testing.assert_close(fast.T.times(Y), entry.dense().double().T @ Y)


def test_balanced_factors_keep_the_product():
    _, _, L, R = make("dense", (12, 9, 3))
    A, B = balanced(1e3 * L, R, rank=3)
    torch.testing.assert_close(A @ B, 1e3 * L @ R)
    torch.testing.assert_close(A.norm(dim=0), B.norm(dim=1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(3, 9, 5), (9, 3, 5), (1, 1, 4)])
def test_a_rank_beyond_the_weight_keeps_its_factors_in_shape(form, shape):
    entry, fast, L, R = make(form, shape)
    A, B = refactored(fast, L, R, 2.0)
    assert A.shape == L.shape and B.shape == R.shape
    torch.testing.assert_close(A @ B, reference(entry, L @ R, 2.0))
