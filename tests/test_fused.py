"""The Triton kernel against the dense pull.

On a CPU it runs in Triton's interpreter (see conftest.py), which checks what it computes, not how
fast.
"""

import os
import subprocess
import sys

import pytest
import torch

from forgetless.importance import codec
from forgetless.penalty import dense, fused

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def case(out, into, rank, tier, dtype=torch.float32, anchor_rank=3):
    g = torch.Generator().manual_seed(out + into)
    make = lambda *shape: (torch.randn(*shape, generator=g) * 0.3).to(dtype).to(DEVICE)
    omega = (
        (torch.randn(out, into, generator=g) * 2).exp() * (torch.rand(out, into, generator=g) > 0.1)
    ).to(DEVICE)
    A, B, anchor = (
        make(rank, into),
        make(out, rank),
        (make(anchor_rank, into), make(out, anchor_rank)),
    )
    if tier in codec.BITS:
        codes, scale = codec.encode(omega, tier)
        return A, B, anchor, codes, scale, codec.decode(codes, scale, omega.shape, tier)
    stored = omega.to({"f32": torch.float32, "bf16": torch.bfloat16}[tier])
    return A, B, anchor, stored, None, stored.float()


def assert_like_dense(A, B, anchor, stored, scale, whole, tier):
    ours = fused.pull(A, B, 0.7, stored, scale, tier, anchor, 1.3)
    star = None if anchor is None else anchor[1].double() @ anchor[0].double()
    theirs = dense.pull(A.double(), B.double(), 0.7, whole.double(), star, 1.3)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.float32
        assert float((mine - other).norm()) <= 2e-6 * float(other.norm())


@pytest.mark.parametrize("tier", ["f32", "bf16", "u8", "u4"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (5, 7, 2), (65, 131, 5), (64, 256, 16), (33, 129, 17), (33, 70, 40)]
)
@pytest.mark.parametrize("anchored", [False, True])
def test_kernel_is_the_dense_pull_on_what_the_importance_decodes_to(tier, shape, anchored):
    A, B, anchor, stored, scale, whole = case(*shape, tier)
    assert_like_dense(A, B, anchor if anchored else None, stored, scale, whole, tier)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_are_widened_first(dtype):
    assert_like_dense(*case(40, 70, 4, "u8", dtype), "u8")


def test_several_tiles_per_program_and_anchors_of_a_higher_rank(monkeypatch):
    monkeypatch.setattr(fused, "PROGRAMS", 2)
    assert_like_dense(*case(70, 400, 4, "u8", anchor_rank=20), "u8")


def test_transposed_views_are_read_right():
    A, B, anchor, stored, scale, whole = case(20, 30, 4, "f32")
    assert_like_dense(
        A.T.contiguous().T, B.T.contiguous().T, anchor, stored.T.contiguous().T, scale, whole, "f32"
    )


def test_same_bits_at_every_call():
    A, B, anchor, stored, scale, _ = case(65, 131, 5, "u4")
    first, second = (fused.pull(A, B, 0.7, stored, scale, "u4", anchor, 1.3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_steps_with_the_kernel_follow_steps_with_the_dense_pull():
    A, B, _, stored, scale, whole = case(40, 130, 4, "u8")
    A2, B2 = A.clone(), B.clone()
    for _ in range(20):
        for a, b, (gA, gB, _) in (
            (A, B, fused.pull(A, B, 2.0, stored, scale, "u8", None, 1e-4)),
            (A2, B2, dense.pull(A2, B2, 2.0, whole, None, 1e-4)),
        ):
            a.sub_(gA)
            b.sub_(gB)
    torch.testing.assert_close(A, A2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(B, B2, rtol=1e-4, atol=1e-6)


def test_the_kernel_is_not_offered_on_a_cpu_or_in_the_interpreter(monkeypatch):
    assert fused.available("cpu") == (False, "the kernel needs a GPU, found cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert fused.available("cuda")[0] is False and "interpreter" in fused.available("cuda")[1]
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: None)
    assert fused.available("cuda") == (False, "Triton is not installed")


def test_what_the_kernel_does_not_do_is_refused(monkeypatch):
    A, B, anchor, stored, scale, _ = case(5, 7, 2, "u8")
    with pytest.raises(ValueError, match=r"f32, bf16 or f16 factors.*float64"):
        fused.pull(A.double(), B, 1.0, stored, scale, "u8", None, 1.0)
    with pytest.raises(ValueError, match=r"tier 'f32' as torch.uint8"):
        fused.pull(A, B, 1.0, stored, None, "f32", None, 1.0)
    with pytest.raises(ValueError, match=r"importance.codes is \(5, 7\)"):
        fused.pull(A, B, 1.0, stored, scale, "u4", None, 1.0)
    with pytest.raises(ValueError, match="ranks up to 128, found 200"):
        fused.pull(A.new_zeros(200, 7), B.new_zeros(5, 200), 1.0, stored, scale, "u8", None, 1.0)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="needs a GPU"):
            fused.pull(A, B, 1.0, stored, scale, "u8", anchor, 1.0)


COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from forgetless.penalty.kernel import pull_kernel
cases = ((90, "u8", "*u8"), (90, "u4", "*u8"), (80, "f32", "*fp32"), (80, "bf16", "*bf16"))
for arch, tier, stored in cases:
    constants = dict(
        TIER=tier, CODED=stored == "*u8", BLOCK=128, ANCHORED=tier != "u8",
        BM=64, BN=64, R=16, R0=16, PRECISION="ieee",
    )
    pointers = dict(
        omega=stored, scale="*bf16", A="*bf16", B="*bf16", A0="*fp32", B0="*fp32",
        partial_A="*fp32", partial_B="*fp32", partial_energy="*fp32",
    )
    numbers = dict(
        out="i32", into="i32", width="i32", rank="i32", rank0="i32", s="fp32", steps="i32"
    )
    signature = {**pointers, **numbers, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(pull_kernel, signature, constants)
    target = GPUTarget("cuda", arch, 32)
    ptx = triton.compile(source, target=target, options={"num_warps": 8}).asm["ptx"]
    assert "fma" in ptx and not re.search(r"tf32|\\b(atom|red)\\.", ptx), tier
"""


def test_kernel_compiles_for_gpus_without_atomics_or_tf32(tmp_path):
    """The interpreter accepts more than the compiler does; no GPU is needed to compile."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
