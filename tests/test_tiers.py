"""From one form of importance to another: what is kept exactly, what is lost, and what cannot be
had.
"""

import pytest
import torch

from forgetless.errors import OptionError
from forgetless.importance.controls import shuffled, uniform
from forgetless.importance.covariance import Covariance, leading_eigenpairs, low_rank
from forgetless.importance.entries import DenseEntry, FactoredEntry, KroneckerEntry
from forgetless.importance.importance import Importance
from forgetless.importance.tiers import factorise
from forgetless.model.adapters import add_adapter


def spectrum(n, seed=0, dtype=torch.float64):
    """A covariance (n, n) whose eigenvalues fall as 1 / i^2."""
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    return ((Q / torch.arange(1, n + 1, dtype=torch.float64) ** 2) @ Q.T).to(dtype)


@pytest.fixture
def kronecker():
    shared = Covariance(spectrum(9, 1))
    return Importance(
        {
            "q": KroneckerEntry(Covariance(spectrum(7, 2)), shared),
            "k": KroneckerEntry(Covariance(spectrum(3, 3)), shared),
        },
        {},
        {"norms": {}},
    )


def wide_range(out, into, seed=0):
    """(out, in) over eight orders of magnitude, with a row and a column of zeros."""
    g = torch.Generator().manual_seed(seed)
    omega = 10 ** (-8 * torch.rand(out, into, generator=g, dtype=torch.float64))
    omega[1], omega[:, 2] = 0, 0
    return omega


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_factoring_keeps_the_sums_of_rows_and_columns(rank):
    omega = wide_range(11, 6)
    row, col = factorise(omega, rank)
    assert (
        row.shape == (11, rank)
        and col.shape == (6, rank)
        and bool((row >= 0).all())
        and bool((col >= 0).all())
    )
    torch.testing.assert_close(
        (row @ col.T).sum(1),
        omega.sum(1),
        rtol=0.05 if rank > 1 else 1e-12,
        atol=1e-6 if rank > 1 else 0,
    )
    torch.testing.assert_close((row @ col.T).sum(0), omega.sum(0), rtol=1e-9, atol=1e-12)


def test_factoring_finds_a_product_again_and_more_columns_come_nearer():
    g = torch.Generator().manual_seed(0)
    row, col = (
        torch.rand(12, 1, generator=g, dtype=torch.float64),
        torch.rand(9, 1, generator=g, dtype=torch.float64),
    )
    a, b = factorise(row @ col.T, 1)
    torch.testing.assert_close(a @ b.T, row @ col.T, rtol=1e-12, atol=0)
    omega = wide_range(40, 30)
    divergence = lambda a, b: float(
        (torch.special.xlogy(omega, omega / (a @ b.T).clamp(min=1e-300)) - omega + a @ b.T).sum()
    )
    found = [divergence(*factorise(omega, k)) for k in (1, 2, 4, 8)]
    assert found == sorted(found, reverse=True) and found[-1] < 0.7 * found[0]
    assert all(not part.any() for part in factorise(torch.zeros(3, 4), 2))


def test_factored_entries_become_rank_one_without_a_dense_tensor():
    g = torch.Generator().manual_seed(0)
    entry = FactoredEntry(torch.rand(6, 3, generator=g), torch.rand(5, 3, generator=g))
    (found,) = Importance({"w": entry}).to_tier("factored").entries.values()
    torch.testing.assert_close(found.dense(), FactoredEntry(*factorise(entry.dense(), 1)).dense())
    assert (entry.tier, found.tier) == ("factored:3", "factored")


def test_cut_covariances_keep_the_trace_and_the_leading_directions(kronecker):
    for rank in (1, 3, 9, 20):
        cut = kronecker.to_tier(f"kronecker:{rank}")
        assert cut["q"].in_cov is cut["k"].in_cov
        for name in kronecker:
            for whole, thin in (
                (kronecker[name].out_cov, cut[name].out_cov),
                (kronecker[name].in_cov, cut[name].in_cov),
            ):
                assert thin.trace() == pytest.approx(whole.trace(), rel=1e-12)
                k, values = min(rank, whole.size), torch.linalg.eigvalsh(whole.matrix).flip(0)
                expected = (
                    torch.cat([values[:k], values[k:].mean().expand(whole.size - k)])
                    if k < whole.size
                    else values
                )
                torch.testing.assert_close(torch.linalg.eigvalsh(thin.full()).flip(0), expected)
                X = torch.randn(whole.size, 4, dtype=torch.float64)
                torch.testing.assert_close(thin.apply(X), thin.full() @ X)
                torch.testing.assert_close(thin.diagonal(), thin.full().diagonal())
                assert thin.norm() == pytest.approx(
                    float(thin.full().norm())
                ) and whole.norm() == pytest.approx(float(whole.full().norm()))
    assert kronecker.to_tier("kronecker:3").tier == "kronecker:3"
    again = kronecker.to_tier("kronecker:4").to_tier("kronecker:2")
    for name in kronecker:
        torch.testing.assert_close(
            again[name].in_cov.full(), kronecker.to_tier("kronecker:2")[name].in_cov.full()
        )


def test_large_covariances_are_cut_by_subspace_iteration():
    matrix = spectrum(300)
    exact, fast = leading_eigenpairs(matrix, 8), leading_eigenpairs(matrix, 8, exact_below=10)
    a, b = (low_rank(*pairs, 8, float(matrix.trace())) for pairs in (exact, fast))
    torch.testing.assert_close(b.full(), a.full(), rtol=0, atol=1e-8)


def test_an_overestimated_trace_never_makes_a_negative_floor():
    cov = low_rank(torch.tensor([2.0, 1.0]), torch.eye(4)[:, :2], 2, trace=2.5)
    assert float(cov.floor) == 0.0 and cov.trace() == pytest.approx(3.0)
    flat = low_rank(
        torch.tensor([1.0, 1.0]), torch.eye(4)[:, :2], 2, trace=8.0
    )  # what is left is larger than the top
    assert flat.trace() == pytest.approx(8.0) and float(flat.values.min()) >= 0


def test_kronecker_to_element_wise_forms_takes_the_diagonal(kronecker):
    for tier in ("f32", "factored"):
        found = kronecker.to_tier(tier)
        for name, entry in kronecker.entries.items():
            torch.testing.assert_close(found[name].dense(), entry.dense().to(found[name].dense()))
    U = torch.zeros(7, 9, dtype=torch.float64)
    U[2, 5] = 3.0  # for an update of one element the diagonal is all there is
    torch.testing.assert_close(
        kronecker.to_tier("factored")["q"].energy(U), kronecker["q"].energy(U)
    )


def test_norms_are_those_of_the_quadratic_form(kronecker):
    entry = kronecker["q"]
    form = torch.kron(entry.out_cov.full(), entry.in_cov.full())
    assert entry.norm() == pytest.approx(float(form.norm()))
    factored = FactoredEntry(torch.rand(5, 2), torch.rand(4, 2))
    assert factored.norm() == pytest.approx(float(factored.dense().norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("tier", "message"),
    [
        ("f23", "did you mean 'f32'"),
        ("factored:0", "unknown tier"),
        ("f32:2", "has no rank"),
        ("kroneker", "did you mean 'kronecker'"),
    ],
)
def test_unknown_tiers_name_the_nearest(tier, message):
    with pytest.raises(OptionError, match=message):
        Importance({"w": DenseEntry(torch.ones(2, 2))}).to_tier(tier)


def test_what_was_cut_or_never_recorded_cannot_be_had(kronecker):
    with pytest.raises(ValueError, match="record with --estimator kronecker"):
        Importance({"w": DenseEntry(torch.ones(2, 2))}).to_tier("kronecker:4")
    cut = kronecker.to_tier("kronecker:2")
    with pytest.raises(ValueError, match="rank 2, expected at least 3"):
        cut.to_tier("kronecker:3")
    with pytest.raises(ValueError, match="what was cut"):
        cut.to_tier("kronecker")


def test_shuffling_keeps_the_values_and_loses_their_places(kronecker):
    dense = Importance(
        {"w": DenseEntry(wide_range(8, 9)), "v": DenseEntry(wide_range(8, 9))},
        {},
        {"estimator": "path", "path": "x"},
    )
    once, again, other = shuffled(dense, 1), shuffled(dense, 1), shuffled(dense, 2)
    for name in dense:
        assert torch.equal(
            once[name].values.flatten().sort()[0], dense[name].values.flatten().sort()[0]
        )
        assert torch.equal(once[name].values, again[name].values) and not torch.equal(
            once[name].values, other[name].values
        )
    assert not torch.equal(once["w"].values, once["v"].values)
    assert once.info["settings"]["shuffled_seed"] == 1 and "path" not in once.info
    turned = shuffled(kronecker, 1)
    assert turned["q"].in_cov is turned["k"].in_cov
    torch.testing.assert_close(
        torch.linalg.eigvalsh(turned["q"].in_cov.matrix),
        torch.linalg.eigvalsh(kronecker["q"].in_cov.matrix),
    )
    thin = kronecker.to_tier("kronecker:2")
    assert shuffled(thin, 1)["q"].norm() == pytest.approx(thin["q"].norm())
    factored = dense.to_tier("factored")
    assert shuffled(factored, 1)["w"].norm() == pytest.approx(factored["w"].norm())


def test_uniform_is_one_everywhere_under_any_adapter(tiny):
    plain = uniform(tiny(), "q_proj,down_proj")
    adapted = uniform(add_adapter(tiny(), names="q_proj", rank=2, alpha=2), "q_proj,down_proj")
    assert list(plain) == list(adapted) and len(plain) == 4
    assert all(bool((entry.dense() == 1).all()) for entry in plain.entries.values())
