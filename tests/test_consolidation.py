"""Consolidated importance: sums and running averages in every form, and the stated error."""

import pytest
import torch

from forgetless.errors import OptionError
from forgetless.importance.consolidate import consolidated
from forgetless.importance.covariance import Covariance
from forgetless.importance.entries import DenseEntry, FactoredEntry, KroneckerEntry
from forgetless.importance.importance import Importance
from forgetless.options.option import parse_rule


def covariance(n, seed, scale=1.0):
    X = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Covariance(
        scale
        * (X * torch.logspace(0, -2, n, dtype=torch.float64))
        @ (X * torch.logspace(0, -2, n, dtype=torch.float64)).T
    )


def kronecker(seed, scale=1.0, rank=None):
    """Two weights, (5, 6) and (4, 6), that read the same input."""
    A = covariance(6, seed)
    entries = {
        name: KroneckerEntry(covariance(n, seed + n, scale), A) for name, n in (("q", 5), ("k", 4))
    }
    made = Importance(entries, {}, {"estimator": "kronecker", "data": {"source": f"{seed}"}})
    return made.to_tier(f"kronecker:{rank}") if rank else made


def form(entry):
    return torch.kron(entry.out_cov.full(), entry.in_cov.full())


@pytest.mark.parametrize("rule, shares", [("sum", (1, 1)), ("decay:0.9", (0.9, 0.1))])
def test_elements_and_factors_add_up(rule, shares):
    g = torch.Generator().manual_seed(0)
    old, new = torch.rand(5, 6, generator=g), torch.rand(5, 6, generator=g)
    dense = consolidated(
        Importance({"w": DenseEntry(old)}), Importance({"w": DenseEntry(new)}), rule
    )
    torch.testing.assert_close(dense["w"].dense(), shares[0] * old + shares[1] * new)
    factored = [Importance({"w": FactoredEntry(x[:, :2], x[:3, 2:4])}) for x in (old, new)]
    together = consolidated(*factored, rule)
    torch.testing.assert_close(
        together["w"].dense(),
        shares[0] * factored[0]["w"].dense() + shares[1] * factored[1]["w"].dense(),
    )
    assert (
        together.tier == "factored:4" and together.info["consolidated"][0]["error"]["largest"] == 0
    )


@pytest.mark.parametrize("tier", ["bf16", "u8", "u4"])
def test_coded_tiers_stay_and_state_their_rounding(tier):
    g = torch.Generator().manual_seed(0)
    old, new = (
        Importance({"w": DenseEntry(torch.rand(8, 128, generator=g))}).to_tier(tier)
        for _ in range(2)
    )
    both = consolidated(old, new)
    exact = old["w"].dense() + new["w"].dense()
    error = both.info["consolidated"][0]["error"]["largest"]
    assert both.tier == tier and error == pytest.approx(
        float((both["w"].dense() - exact).norm() / exact.norm()), abs=1e-7
    )
    assert 0 < error < {"bf16": 0.01, "u8": 0.1, "u4": 0.5}[tier]


def test_the_sum_of_kronecker_forms_is_the_nearest_one_with_a_shared_input():
    old, new = kronecker(0), kronecker(1, scale=0.5)
    both = consolidated(old, new)
    assert both["q"].in_cov is both["k"].in_cov and both.tier == "kronecker"
    exact = {name: form(old[name]) + form(new[name]) for name in old}
    off = {name: float((form(both[name]) - exact[name]).norm()) for name in old}
    assert both.info["consolidated"][0]["error"]["largest"] == pytest.approx(
        max(off[name] / float(exact[name].norm()) for name in old), rel=1e-6
    )
    total = sum(value**2 for value in off.values())
    for share in torch.linspace(
        0, 1, 21
    ):  # no other mixture of the inputs is nearer, each with the best outputs for it
        A = share * old["q"].in_cov.matrix + (1 - share) * new["q"].in_cov.matrix
        other = 0.0
        for name in old:
            n, m = old[name].shape
            blocks = exact[name].reshape(n, m, n, m)
            G = (
                torch.einsum("imjk,mk->ij", blocks, A) / (A * A).sum()
            )  # the least-squares output covariance of any kind
            other += float((torch.kron(G, A) - exact[name]).norm()) ** 2
        assert total <= other * (1 + 1e-9)
    assert all(
        float(torch.linalg.eigvalsh(part).min()) > -1e-12
        for part in (both["q"].out_cov.matrix, both["q"].in_cov.matrix)
    )


def test_kronecker_forms_with_one_input_in_common_add_up_exactly():
    old = kronecker(0)
    new = Importance(
        {
            name: KroneckerEntry(covariance(entry.shape[0], 9), entry.in_cov)
            for name, entry in old.entries.items()
        },
        {},
        {},
    )
    both = consolidated(old, new, "decay:0.9")
    for name in old:
        torch.testing.assert_close(form(both[name]), 0.9 * form(old[name]) + 0.1 * form(new[name]))
    assert both.info["consolidated"][0]["error"]["largest"] < 1e-6


def test_thin_kronecker_forms_keep_their_rank_and_trace_and_state_the_error():
    thin, whole = (
        consolidated(kronecker(0, rank=rank), kronecker(1, rank=rank)) for rank in (2, 6)
    )
    assert thin.tier == "kronecker:2"
    for both, rank in ((thin, 2), (whole, 6)):
        old, new = (kronecker(seed, rank=rank) for seed in (0, 1))
        off = [
            float(
                (form(both[name]) - form(old[name]) - form(new[name])).norm()
                / (form(old[name]) + form(new[name])).norm()
            )
            for name in old
        ]
        assert both.info["consolidated"][0]["error"]["largest"] == pytest.approx(max(off), rel=1e-5)


def test_a_file_tells_all_of_its_steps(tmp_path):
    three = consolidated(consolidated(kronecker(0), kronecker(1)), kronecker(2))
    three.save(tmp_path / "i.safetensors")
    loaded = Importance.load(tmp_path / "i.safetensors")
    assert [step["data"]["source"] for step in loaded.info["consolidated"]] == ["1", "2"]
    assert loaded.info["norms"] == {
        name: pytest.approx(entry.norm()) for name, entry in three.entries.items()
    }


def test_what_does_not_fit_is_refused():
    for rule in ("mean", "decay:1", "decay:0", "decay:2"):
        with pytest.raises(OptionError, match="--consolidate"):
            parse_rule(rule)
    dense = Importance({"q": DenseEntry(torch.ones(5, 6))})
    with pytest.raises(ValueError, match="lacks 1 weights, first 'k'"):
        consolidated(kronecker(0), dense)
    with pytest.raises(ValueError, match="one tier"):
        consolidated(dense, Importance({"q": FactoredEntry(torch.ones(5, 1), torch.ones(6, 1))}))
