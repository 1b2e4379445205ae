"""The pull from rows and from codes: the same as the dense pull on the decoded values, with nothing
of (out, in) formed.
"""

import pytest
import torch

from forgetless.importance import codec
from forgetless.penalty import dense, reference, tiled
from forgetless.penalty.difference import thin

SHAPES = [(1, 1, 1), (7, 3, 2), (33, 131, 5), (70, 257, 8)]


def factors(out, into, r, dtype=torch.float64):
    g = torch.Generator().manual_seed(out)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)
    return (
        make(r, into),
        make(out, r),
        torch.rand(out, into, generator=g, dtype=dtype) ** 6,
        (make(3, into), make(out, 3)),
    )


def coded_rows(omega, tier):
    """(rows of the importance, decoded whole) in the tier."""
    if tier == "f64":
        return (lambda rows: omega[rows]), omega
    codes, scale = codec.encode(omega, tier)
    return (lambda rows: codec.decode(codes, scale, omega.shape, tier, rows)), codec.decode(
        codes, scale, omega.shape, tier
    ).double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tier", ["f64", "u8", "u4"])
@pytest.mark.parametrize("anchored", [False, True])
def test_tiled_pull_is_the_dense_pull_on_decoded_values(shape, tier, anchored, monkeypatch):
    monkeypatch.setitem(tiled.TILE, "cpu", 3 * shape[1] + 1)
    A, B, omega, anchor = factors(*shape)
    rows, whole = coded_rows(omega, tier)
    ours = tiled.pull(A, B, 0.7, rows, *thin(A, B, 0.7, None, anchor if anchored else None), 1.3)
    theirs = dense.pull(A, B, 0.7, whole, anchor[1] @ anchor[0] if anchored else None, 1.3)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("tier", ["f64", "u8", "u4"])
def test_full_pull_is_the_dense_full_pull_on_decoded_values(tier, monkeypatch):
    monkeypatch.setitem(tiled.TILE, "cpu", 500)
    _, _, omega, _ = factors(33, 131, 1)
    D = torch.randn(33, 131, dtype=torch.float64)
    rows, whole = coded_rows(omega, tier)
    into = torch.empty(131, 33, dtype=torch.float64).T  # as a transposed weight is seen
    energy = tiled.full_pull(lambda r: D[r], rows, into, 0.4)
    pull, expected = dense.full_pull(D, whole, 0.4)
    torch.testing.assert_close(into, pull, rtol=1e-12, atol=0)
    torch.testing.assert_close(energy, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("tier", ["f64", "u8"])
def test_full_pulls_are_the_gradient_of_the_reference_energy(tier):
    g = torch.Generator().manual_seed(0)
    W, base, anchor = torch.randn(3, 33, 131, generator=g, dtype=torch.float64)
    W.requires_grad_()
    rows, whole = coded_rows(torch.rand(33, 131, generator=g, dtype=torch.float64), tier)
    energy = reference.full_energy(W, base, whole, anchor)
    (expected,) = torch.autograd.grad(0.4 * energy, W)
    D = W.detach() - base - anchor
    tiled_pull = torch.empty_like(D)
    tiled_energy = tiled.full_pull(lambda r: D[r], rows, tiled_pull, 0.4)
    for pull, found in (dense.full_pull(D, whole, 0.4), (tiled_pull, tiled_energy)):
        torch.testing.assert_close(pull, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found, energy.detach(), rtol=1e-12, atol=0)


def test_steps_from_codes_follow_steps_from_decoded_values():
    A, B, omega, _ = factors(40, 130, 4, torch.float32)
    rows, whole = coded_rows(omega, "u8")
    A2, B2, whole = A.clone(), B.clone(), whole.float()
    for _ in range(50):
        for a, b, (gA, gB, _) in (
            (A, B, tiled.pull(A, B, 2.0, rows, 2.0 * B, A, 1e-3)),
            (A2, B2, dense.pull(A2, B2, 2.0, whole, None, 1e-3)),
        ):
            a.sub_(gA, alpha=0.1)
            b.sub_(gB, alpha=0.1)
    torch.testing.assert_close(A, A2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(B, B2, rtol=1e-4, atol=1e-5)


def test_no_whole_matrix_is_formed(monkeypatch):
    """Peak of what is allocated while pulling from codes is a few tiles, far below one (out, in)
    f32 tensor.
    """
    out, into = 512, 512
    monkeypatch.setitem(tiled.TILE, "cpu", 4096)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    A, B = torch.randn(8, into), torch.randn(out, 8)
    codes, scale = codec.encode(torch.rand(out, into), "u8")
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.is_floating_point():
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    with Watch():
        tiled.pull(
            A, B, 1.0, lambda rows: codec.decode(codes, scale, (out, into), "u8", rows), B, A, 1.0
        )
    assert 0 < largest <= 4 * tiled.TILE["cpu"] < out * into


def test_same_result_at_every_call():
    A, B, omega, _ = factors(600, 700, 4, torch.float32)
    rows, _ = coded_rows(omega, "u4")
    first, second = tiled.pull(A, B, 1.0, rows, B, A, 1.0), tiled.pull(A, B, 1.0, rows, B, A, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
