"""Covariances that are tracked by their leading directions, beside the whole matrices cut to the
same rank, which are their slow twin.
"""

import itertools

import pytest
import torch

from forgetless.importance.covariance import Covariance
from forgetless.record import sums as summing
from forgetless.record.kronecker import Kronecker
from forgetless.record.sums import CovarianceSums, Sums, summed_numbers
from forgetless.record.tracked import Tracked

N, RANK, WIDTH = 96, 8, 16


def rows_of(count, seed=0, falling=1.0, n=N):
    """Rows whose covariance has a spectrum that falls like 1 / i^falling."""
    g = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(9)))[0]
    roots = torch.arange(1, n + 1.0) ** (-falling / 2)
    return torch.randn(count, n, generator=g) * roots @ axes.T


def tracked(rows, sizes=(40,), width=WIDTH):
    found, start = Tracked.start(rows, width), 0
    for size in itertools.cycle(sizes):
        found.add(rows[start : start + size])
        start += size
        if start >= len(rows):
            return found


def energy(covariance, seed):
    X = torch.randn(covariance.size, 4, generator=torch.Generator().manual_seed(seed))
    return float((X * covariance.apply(X.to(covariance.full().dtype))).sum())


def captured(covariance, whole):
    """The fraction of the whole's energy along the directions that are kept."""
    V = covariance.vectors
    return float((V * whole.apply(V)).sum()) / whole.trace()


@pytest.mark.parametrize("count", [5, 15, 400])
def test_a_sum_of_few_directions_is_tracked_exactly(count):
    rows = rows_of(count, n=64) @ torch.diag((torch.arange(64) < 12).float())
    whole = Covariance(rows.T @ rows / count)
    close = tracked(rows).cut(WIDTH, count)
    torch.testing.assert_close(close.full(), whole.full(), atol=2e-4, rtol=1e-3)
    V = close.vectors
    torch.testing.assert_close(V.T @ V, torch.eye(V.shape[1]), atol=1e-5, rtol=0)


def test_nothing_is_tracked_of_rows_of_nothing():
    cut = tracked(torch.zeros(100, N)).cut(RANK, 100)
    assert torch.isfinite(cut.vectors).all() and not cut.values.any() and float(cut.floor) == 0


@pytest.mark.parametrize("falling", [0.5, 1.0, 2.0])
def test_tracked_directions_hold_nearly_what_the_exact_ones_do(falling):
    rows = rows_of(3000, falling=falling)
    whole = Covariance(rows.T @ rows / len(rows))
    exact, found = whole.cut(RANK), tracked(rows).cut(RANK, len(rows))
    assert found.trace() == pytest.approx(whole.trace(), rel=1e-5)
    assert captured(found, whole) > 0.93 * captured(exact, whole)
    fixed = Tracked.start(rows, WIDTH)
    fixed.turn_at = 10**9  # a sketch in one pass, whose basis never turns
    fixed.add(rows)
    assert captured(fixed.cut(RANK, len(rows)), whole) < captured(found, whole)
    for seed in range(3):
        assert energy(found, seed) == pytest.approx(energy(exact, seed), rel=0.05)


def test_rows_may_come_in_any_batches_and_a_saved_state_goes_on():
    rows = rows_of(700).double()
    once = tracked(rows, sizes=(700,))
    parts = tracked(rows, sizes=(1, 50, 333))
    torch.testing.assert_close(once.product, parts.product)
    assert once.rows == parts.rows == 700 and once.turn_at == parts.turn_at == 1024
    half = tracked(rows[:300])
    again = Tracked.of(half.tensors(), rows.device)
    for one in (half, again):
        one.add(rows[300:])
    assert torch.equal(half.product, again.product) and torch.equal(half.trace, again.trace)


def test_what_several_have_seen_is_merged():
    rows = rows_of(3000)
    whole = Covariance(rows.T @ rows / len(rows))
    merged = Tracked.merged([tracked(part) for part in rows.split(1000)])
    assert merged.rows == 3000
    assert float(merged.trace) == pytest.approx(float(rows.square().sum()))
    exact = captured(whole.cut(RANK), whole)
    assert captured(merged.cut(RANK, 3000), whole) > 0.93 * exact


def test_only_wide_covariances_that_are_cut_are_tracked(monkeypatch):
    monkeypatch.setattr(summing, "TRACKED_FROM", 32)
    assert summed_numbers(64, 8) == 2 * 64 * 16 and summed_numbers(31, 2) == 31 * 31
    assert summed_numbers(64, 9) == summed_numbers(64, None) == 64 * 64
    for rank, whole in ((8, False), (9, True), (None, True)):
        sums = CovarianceSums(rank)
        sums.add("a", rows_of(50, n=64))
        assert ("a" in sums.whole) == whole and "a" in sums and sums.names() == ["a"]
        assert sum(t.numel() for t in sums.state().values()) <= summed_numbers(64, rank) + 3
        sums.clear()
        assert not sums
    # A state of before, with a whole matrix, goes on with it.
    sums, state = CovarianceSums(8), Sums(a=torch.zeros(64, 64))
    sums.restore(state.state(), {"a": torch.device("cpu")})
    sums.add("a", rows_of(50, n=64))
    assert not sums.tracked and sums.whole["a"].any() and not state["a"].any()


def batches_of(count):
    g = torch.Generator().manual_seed(1)
    return [torch.randint(3, 48, (4, 24), generator=g) for _ in range(count)]


def test_a_recording_that_tracks_has_the_energy_of_the_exact_cut(tiny, monkeypatch):
    whole = Kronecker(tiny())
    monkeypatch.setattr(summing, "TRACKED_FROM", 16)
    recorder = Kronecker(tiny(), rank=2)
    for ids in batches_of(12):
        for each in (whole, recorder):
            each.observe(ids)
    assert recorder._in.tracked and recorder.bytes() < whole.bytes()
    exact, found = whole.finish().to_tier("kronecker:2"), recorder.finish()
    ratios = []
    for name, entry in found.entries.items():
        U = torch.randn(entry.shape, generator=torch.Generator().manual_seed(0))
        ratios.append(float(entry.energy(U)) / float(exact[name].energy(U)))
    assert min(ratios) > 0.8 and max(ratios) < 1.25
    # Of what was tracked there is no whole matrix to compare with.
    wide = {name for name, entry in found.entries.items() if max(entry.shape) >= 16}
    assert not wide & set(found.info.get("energy_error", {}).get("weights", {}))


def test_an_interrupted_recording_that_tracks_goes_on_the_same(tiny, monkeypatch):
    monkeypatch.setattr(summing, "TRACKED_FROM", 16)
    batches = batches_of(6)
    straight, first, second = (Kronecker(tiny(), rank=2) for _ in range(3))
    for ids in batches:
        straight.observe(ids)
    for ids in batches[:3]:
        first.observe(ids)
    second.load_state_dict(first.state_dict())
    for ids in batches[3:]:
        second.observe(ids)
    one, other = straight.finish(), second.finish()
    for name in one:
        for key, tensor in one[name].tensors().items():
            assert torch.equal(tensor, other[name].tensors()[key])
