"""Consolidation: one importance for all that a model has learned, from the importance so far and
that of the domain it learned last.

    sum          Omega(so far) + Omega(last): every domain counts fully, as general text does (EWC's
                 sum of penalties, arXiv 1612.00796)
    none         Omega(so far): only general text is held, the control
    decay:0.9    0.9 Omega(so far) + 0.1 Omega(last): a running average (as online EWC, arXiv
                 1805.06370): old domains fade, and strength keeps its scale

Forms stay what they are, with the relative error that this costs each weight (Frobenius norm of the
quadratic form) in `info["consolidated"]`:

    f32, bf16, u8, u4   the sum, coded again: the tier's own rounding
    factored            the columns of both: exact, and the rank adds up
    kronecker           a sum of two Kronecker products is none itself. The nearest one has G and A
                        among the weighted sums of those given (Van Loan and Pitsianis 1993), found
                        for all weights that share an input at once, so that they go on sharing it:
                        a 2 x 2 eigenproblem. Rank k stays k

Cost: a pass over the tensors; for whole covariances one product of sums, for rank k one QR of 2 k
columns.

    both = consolidated(general, sciq, "sum")
    both.info["consolidated"][-1]["error"]          # {'median': .., 'largest': ..}
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from forgetless.importance.covariance import AnyCovariance, Covariance, LowRankCovariance, low_rank
from forgetless.importance.entries import (
    DenseEntry,
    Entry,
    FactoredEntry,
    KroneckerEntry,
    tier_of,
)
from forgetless.importance.importance import Importance
from forgetless.importance.tiers import converted
from forgetless.options.option import parse_rule

Pair = tuple[Entry, Entry]
Terms = Sequence[tuple[float, AnyCovariance]]


def consolidated(before: Importance, last: Importance, rule: str = "sum") -> Importance:
    """The importance of both by `rule`, in the form of `before`, without anchors.

    Raises ValueError where they do not fit together.
    """
    factors = parse_rule(rule)
    pairs = _pairs_of(before, last)
    entries: dict[str, Entry] = {}
    errors: dict[str, float] = {}
    for group in _sharing(pairs):
        if isinstance(pairs[group[0]][0], KroneckerEntry):
            sums = _nearest({name: pairs[name] for name in group}, factors)
        else:
            sums = {name: _added(*pairs[name], factors) for name in group}
        for name, (entry, error) in sums.items():
            entries[name], errors[name] = entry, error
    entries = {name: entries[name] for name in before}
    step = {
        "rule": rule,
        "data": last.info.get("data"),
        "error": {"median": statistics.median(errors.values()), "largest": max(errors.values())},
    }
    info = {key: value for key, value in before.info.items() if key not in ("path", "energy_error")}
    info |= {
        "norms": {name: entry.norm() for name, entry in entries.items()},
        "consolidated": [*info.get("consolidated", []), step],
        "tier": tier_of(entries),
    }
    return Importance(entries, {}, info)


def _pairs_of(before: Importance, last: Importance) -> dict[str, Pair]:
    """The entries of each weight so far and in the last domain.

    Raises ValueError where they do not fit together.
    """
    missing = [name for name in before if name not in last]
    if missing:
        raise ValueError(
            f"the importance of the last domain lacks {len(missing)} weights, first "
            f"'{missing[0]}'; record it with the same --targets"
        )
    pairs = {name: (before[name], last[name]) for name in before}
    for name, (old, new) in pairs.items():
        if type(old) is not type(new) or old.shape != new.shape:
            raise ValueError(
                f"'{name}' is {old.tier} {old.shape} so far and {new.tier} {new.shape} in the "
                "last domain; record both in one tier on one base model"
            )
    return pairs


def _sharing(pairs: dict[str, Pair]) -> list[list[str]]:
    """Names in groups: weights whose inputs share their covariances, all others alone."""
    groups: dict[object, list[str]] = {}
    for name, (old, new) in pairs.items():
        key: object = name
        if isinstance(old, KroneckerEntry) and isinstance(new, KroneckerEntry):
            key = (id(old.in_cov), id(new.in_cov))
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _added(old: Entry, new: Entry, factors: tuple[float, float]) -> tuple[Entry, float]:
    """The sum in the tier of `old`, element-wise or factored, and its relative error."""
    if isinstance(old, FactoredEntry) and isinstance(new, FactoredEntry):
        row = torch.cat([factors[0] * old.row, factors[1] * new.row], 1)
        return FactoredEntry(row, torch.cat([old.col, new.col], 1)), 0.0
    exact = factors[0] * old.dense() + factors[1] * new.dense()
    entry = converted({"": DenseEntry(exact)}, old.tier)[""]
    size = exact.norm().clamp(min=torch.finfo(exact.dtype).tiny)
    return entry, float((entry.dense() - exact).norm() / size)


def _nearest(
    pairs: dict[str, Pair], factors: tuple[float, float]
) -> dict[str, tuple[Entry, float]]:
    """The nearest G (x) A of each weight with one A for all of them, and its relative error.

    A = sum_t alpha_t A_t with alpha the leading eigenvector of H K: K the inner products of the
    A_t, H those of the weighted G_t, summed over weights. The best G for each weight, given A, is
    sum_t factor_t (A_t . A) / (A . A) G_t. All of these are sums with weights above zero, so
    covariances again.
    """
    both = {
        name: [entry for entry in pair if isinstance(entry, KroneckerEntry)]
        for name, pair in pairs.items()
    }
    inputs = [entry.in_cov for entry in next(iter(both.values()))]
    K = _gram(inputs)
    weighted = torch.tensor(factors, dtype=torch.float64)
    grams = {
        name: torch.outer(weighted, weighted) * _gram([e.out_cov for e in entries])
        for name, entries in both.items()
    }
    values, vectors = torch.linalg.eig(torch.stack(list(grams.values())).sum(0) @ K)
    alpha = vectors[:, int(values.real.argmax())].real.abs()
    alpha = alpha / alpha.sum().clamp(min=torch.finfo(torch.float64).tiny)
    square = float(alpha @ K @ alpha)
    weights = (K @ alpha / square).tolist() if square > 0 else [0.0, 0.0]
    A = _sum(list(zip(alpha.tolist(), inputs, strict=True)))
    nearest: dict[str, tuple[Entry, float]] = {}
    for name, entries in both.items():
        terms = zip(factors, weights, entries, strict=True)
        G = _sum([(factor * weight, entry.out_cov) for factor, weight, entry in terms])
        exact = float((grams[name] * K).sum())
        crossed = sum(
            factor * _inner(entry.out_cov, G) * _inner(entry.in_cov, A)
            for factor, entry in zip(factors, entries, strict=True)
        )
        off = max(0.0, exact - 2 * crossed + _inner(G, G) * _inner(A, A))
        nearest[name] = KroneckerEntry(G, A), math.sqrt(off / exact) if exact > 0 else 0.0
    return nearest


def _gram(covariances: Sequence[AnyCovariance]) -> Tensor:
    """Inner products, in f64."""
    return torch.tensor(
        [[_inner(a, b) for b in covariances] for a in covariances], dtype=torch.float64
    )


def _inner(a: AnyCovariance, b: AnyCovariance) -> float:
    """The sum of the products of two matrices' elements, without expanding low rank."""
    if not (isinstance(a, LowRankCovariance) and isinstance(b, LowRankCovariance)):
        return float((a.full().double() * b.full().double()).sum())
    thin = (a.vectors.double().T @ b.vectors.double()).square()
    x, y, floors = a.values.double(), b.values.double(), (float(a.floor), float(b.floor))
    return (
        float(x @ thin @ y)
        + floors[1] * float(x.sum())
        + floors[0] * float(y.sum())
        + a.size * floors[0] * floors[1]
    )


def _sum(terms: Terms) -> AnyCovariance:
    """A weighted sum; of low rank where both are, at the larger of their ranks, from the leading
    directions within the span of both: no (n, n) matrix.
    """
    thin = [cov for _, cov in terms if isinstance(cov, LowRankCovariance)]
    if len(thin) < len(terms):
        return Covariance(torch.stack([weight * cov.full() for weight, cov in terms]).sum(0))
    Q = torch.linalg.qr(torch.cat([cov.vectors for cov in thin], 1).double())[0]
    values, turn = torch.linalg.eigh(Q.T @ sum(weight * cov.apply(Q) for weight, cov in terms))
    rank = max(cov.vectors.shape[1] for cov in thin)
    vectors = (Q @ turn.flip(1)).to(thin[0].vectors.dtype)
    return low_rank(
        values.flip(0).to(vectors.dtype),
        vectors,
        rank,
        sum(weight * cov.trace() for weight, cov in terms),
    )
