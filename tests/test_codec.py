"""Codes of importance: what is decoded is close, ordered and the same as number by number; what
cannot be coded is refused.
"""

import itertools

import pytest
import torch

from forgetless.importance import codec

TIERS = ("u8", "u4")


def spread(out, into, seed=0, decades=2.0):
    """Positive values over many orders of magnitude, a tenth of them zero."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(out, into, generator=g) * decades).exp() * (
        torch.rand(out, into, generator=g) > 0.1
    )


def again(values, tier):
    return codec.decode(*codec.encode(values, tier), values.shape, tier)


def unpacked(codes, into, tier):
    return codes if tier == "u8" else torch.stack((codes & 15, codes >> 4), -1).flatten(1)[:, :into]


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 5), (2, 127), (4, 128), (3, 129), (5, 300), (2, 511)]
)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_tensors_and_numbers_give_the_same_codes_scales_and_values(tier, shape, size):
    values = spread(*shape, seed=shape[1]) * size
    codes, scale = codec.encode(values, tier)
    decoded = codec.decode(codes, scale, shape, tier)
    for i, row in enumerate(values.tolist()):
        expected, scales = codec.encode_reference(row, tier)
        assert unpacked(codes, shape[1], tier)[i].tolist() == expected
        assert scale[i].tolist() == scales
        assert decoded[i].tolist() == codec.decode_reference(expected, scales, tier)


@pytest.mark.parametrize("tier", TIERS)
def test_every_code_decodes_as_its_table_entry(tier):
    every = torch.arange(2 ** codec.BITS[tier], dtype=torch.uint8)
    codes = every[None] if tier == "u8" else (every[0::2] | every[1::2] << 4)[None]
    scale = torch.full((1, codec.blocks(len(every))), 0.15625, dtype=torch.bfloat16)
    assert codec.decode(codes, scale, (1, len(every)), tier)[0].tolist() == [
        codec._f32(t * 0.15625) for t in codec.TABLES[tier]
    ]


@pytest.mark.parametrize("tier", TIERS)
def test_ties_go_to_the_smaller_code_in_both(tier):
    table = codec.TABLES[tier]
    row = (
        [table[-1], *((low + high) / 2 for low, high in itertools.pairwise(table[40:160]))]
        if tier == "u8"
        else [1.0, 0.75, 0.375, 2.0**-15]
    )
    codes, _ = codec.encode(torch.tensor([row], dtype=torch.float64), tier)
    assert unpacked(codes, len(row), tier)[0].tolist() == codec.encode_reference(row, tier)[0]
    if tier == "u4":
        assert codec.encode_reference(row, tier)[0] == [15, 14, 13, 0]


@pytest.mark.parametrize("tier", TIERS)
def test_zeros_are_exact_and_blocks_of_zeros_stay_zero(tier):
    values = spread(4, 400)
    values[1] = 0
    values[2, 128:256] = 0
    decoded = again(values, tier)
    assert bool((decoded[values == 0] == 0).all()) and bool(torch.isfinite(decoded).all())


@pytest.mark.parametrize("tier", TIERS)
def test_order_within_a_block_is_kept(tier):
    values = spread(6, 128).sort(-1).values
    assert bool((again(values, tier).diff(dim=-1) >= 0).all())


@pytest.mark.parametrize("tier", TIERS)
def test_sums_of_blocks_are_kept_and_energy_is_unbiased(tier):
    values = spread(64, 512)
    decoded = again(values, tier)
    sums = decoded.view(64, 4, 128).sum(-1) / values.view(64, 4, 128).sum(-1)
    assert float((sums - 1).abs().max()) < 2**-8
    ratios = []
    for seed in range(50):
        U = torch.randn(64, 512, generator=torch.Generator().manual_seed(seed))
        ratios.append(float((decoded * U * U).sum() / (values * U * U).sum()) - 1)
    mean = torch.tensor(ratios)
    assert abs(float(mean.mean())) < 4 * float(mean.std()) / 50**0.5 + 2**-9 / 256**0.5


@pytest.mark.parametrize(("tier", "energy", "step"), [("u8", 0.01, 2 / 143), ("u4", 0.05, 1 / 3)])
def test_energy_is_kept_and_elements_are_rounded_as_promised(tier, energy, step):
    values = spread(128, 640)
    decoded = again(values, tier)
    U = torch.randn(128, 640, generator=torch.Generator().manual_seed(1))
    for update in (U, U / (1 + values), U * values.sqrt()):
        assert float((decoded * update**2).sum()) == pytest.approx(
            float((values * update**2).sum()), rel=energy
        )
    blocks, again_blocks = values.view(128, 5, 128), decoded.view(128, 5, 128)
    top, shift = (
        blocks.amax(-1, keepdim=True),
        again_blocks.amax(-1, keepdim=True) / blocks.amax(-1, keepdim=True),
    )  # the scale moves a whole block
    rounding = (again_blocks / shift / blocks - 1)[blocks > 0.1 * top].abs()
    assert float(rounding.max()) < step + 1e-5


@pytest.mark.parametrize("tier", TIERS)
def test_coding_decoded_values_again_changes_nothing_but_the_scale_rounding(tier):
    decoded = again(spread(8, 300), tier)
    torch.testing.assert_close(again(decoded, tier), decoded, rtol=2**-8, atol=0)


@pytest.mark.parametrize(("tier", "limit"), [("u8", 1.1), ("u4", 0.55)])
def test_bytes_per_weight(tier, limit):
    codes, scale = codec.encode(torch.ones(8, 4096), tier)
    size = codes.numel() + 2 * scale.numel()
    assert size == codec.stored_bytes((8, 4096), tier) and size / (8 * 4096) <= limit


@pytest.mark.parametrize("tier", TIERS)
def test_rows_decode_alone_and_layout_does_not_matter(tier):
    values = spread(9, 201)
    codes, scale = codec.encode(values.T.contiguous().T, tier)
    whole = codec.decode(codes, scale, values.shape, tier)
    assert torch.equal(whole, again(values, tier))
    assert torch.equal(codec.decode(codes, scale, values.shape, tier, slice(2, 7)), whole[2:7])
    assert codec.norm(codes, scale, values.shape, tier) == pytest.approx(
        float(whole.double().norm()), rel=1e-12
    )


def test_large_weights_are_coded_in_pieces(monkeypatch):
    values = spread(10, 130)
    whole = codec.encode(values, "u8")
    monkeypatch.setattr(codec, "CHUNK", 3 * 130)
    pieces = codec.encode(values, "u8")
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


def test_what_cannot_be_coded_is_refused():
    with pytest.raises(ValueError, match="unknown code 'u2'; known: u8, u4"):
        codec.encode(torch.ones(2, 2), "u2")
    with pytest.raises(ValueError, match=r"found shape \(2,\)"):
        codec.encode(torch.ones(2), "u8")
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite, non-negative"):
            codec.encode(torch.tensor([[1.0, bad]]), "u4")


def test_damaged_codes_are_named():
    codes, scale = codec.encode(torch.ones(3, 130), "u4")
    codec.check_codes("w", codes, scale, (3, 130), "u4")
    with pytest.raises(ValueError, match=r"w.codes is \(3, 64\).*expected \(3, 65\)"):
        codec.check_codes("w", codes[:, 1:], scale, (3, 130), "u4")
    with pytest.raises(ValueError, match=r"w.scale is .*float32, expected \(3, 2\) torch.bfloat16"):
        codec.check_codes("w", codes, scale.float(), (3, 130), "u4")
    scale[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"w.scale has negative or non-finite"):
        codec.check_codes("w", codes, scale, (3, 130), "u4")
