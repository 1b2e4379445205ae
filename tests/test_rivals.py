"""Starts and finishes of rivals, against printed numbers, planted signals and brute force."""

import math
from types import SimpleNamespace

import pytest
import torch
from peft import OFTConfig, get_peft_model

from forgetless.errors import OptionError
from forgetless.importance.covariance import Covariance
from forgetless.importance.entries import KroneckerEntry
from forgetless.importance.importance import Importance
from forgetless.methods.noise import hard_threshold, noise_median, without_noise
from forgetless.methods.null_start import leading_vectors, null_start
from forgetless.methods.scaling import wise
from forgetless.methods.table import chosen
from forgetless.model.adapters import add_adapter
from forgetless.model.targets import target_weights
from forgetless.options.tune import TuneOptions
from forgetless.options.verbs import resolve


def noise(m, n, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_threshold_is_that_of_gavish_and_donoho():
    """4 / sqrt(3) where sigma is known; by the median 2.858 and 2.171, as in their table."""
    one = torch.ones(5, dtype=torch.float64)
    assert hard_threshold(one, (5, 5)) == pytest.approx(2.8582, abs=2e-4)
    root = math.sqrt(noise_median(1.0))
    assert hard_threshold(one, (5, 5)) * root == pytest.approx(4 / math.sqrt(3), rel=1e-6)
    assert hard_threshold(one, (5, 10)) == pytest.approx(2.1711, abs=2e-4)  # ratio 0.5


@pytest.mark.parametrize(("m", "n"), [(400, 400), (100, 400)])
def test_the_median_of_noise_is_that_of_noise(m, n):
    values = torch.linalg.svdvals(noise(m, n)) / math.sqrt(max(m, n))
    expected = math.sqrt(noise_median(min(m, n) / max(m, n)))
    assert float(values.quantile(0.5)) == pytest.approx(expected, rel=0.02)


def test_a_planted_signal_is_left_and_noise_is_not():
    """A signal of one direction at five times the edge of the noise, of a known closed form."""
    m, n = 60, 90
    u, v = (torch.linalg.qr(noise(size, 1, seed=2))[0] for size in (m, n))
    U = noise(m, n) + 90.0 * u @ v.T
    kept, count = without_noise(U)
    assert count == 1 and without_noise(noise(m, n))[1] == 0
    left, values, right = torch.linalg.svd(U)
    torch.testing.assert_close(kept, values[0] * torch.outer(left[:, 0], right[0]))
    assert float((kept - 90.0 * u @ v.T).norm()) < 0.3 * float(noise(m, n).norm())


@pytest.mark.parametrize("rank", [None, 3])
def test_a_null_start_reads_nothing_of_the_leading_inputs(tiny, rank):
    model = add_adapter(tiny(), names="q_proj", rank=2, alpha=4.0)
    entries = {}
    for weight in target_weights(model):
        whole = [Covariance((X := noise(2 * n, n).float()).T @ X) for n in weight.shape]
        entries[weight.name] = KroneckerEntry(
            *(whole if rank is None else [covariance.cut(rank) for covariance in whole])
        )
    before = {weight.name: weight.A.detach().clone() for weight in target_weights(model)}
    null_start(SimpleNamespace(importance=Importance(entries, {})), model)
    for weight in target_weights(model):
        values, vectors = torch.linalg.eigh(entries[weight.name].in_cov.full())
        most = 8 if rank is None else 3  # of 16 inputs
        leading = vectors[:, values.argsort(descending=True)[:most]]
        assert float((weight.A @ leading).abs().max()) < 1e-5
        A = before[weight.name]
        assert float(weight.A.norm()) == pytest.approx(float(A.norm()), rel=1e-5)
        part = A - A @ leading @ leading.T
        torch.testing.assert_close(weight.A.data, part * A.norm() / part.norm())
        assert leading_vectors(entries[weight.name].in_cov).shape == (16, most)


def test_wise_scales_rotations_by_their_generators(tiny):
    """The rotation of S Q, by (I + S Q)(I - S Q)^-1 with Q written out."""
    config = OFTConfig(
        oft_block_size=4, target_modules=["q_proj"], task_type="CAUSAL_LM", use_cayley_neumann=False
    )
    model = get_peft_model(tiny(), config)
    generators = [p for name, p in model.named_parameters() if ".oft_R." in name]
    assert len(generators) == 2
    with torch.no_grad():
        for generator in generators:
            generator.add_(0.3)
    layer = next(module for name, module in model.named_modules() if name.endswith("q_proj"))
    wise(SimpleNamespace(options=SimpleNamespace(scale=0.4, full=False)), model)
    Q = torch.zeros(4, 4)
    rows, columns = torch.triu_indices(4, 4, 1)
    Q[rows, columns], Q[columns, rows] = 0.3, -0.3
    rotation = (torch.eye(4) + 0.4 * Q) @ torch.linalg.inv(torch.eye(4) - 0.4 * Q)
    whole = torch.block_diag(*[rotation] * 4)
    made = layer.oft_R["default"].get_weight()
    expected = min(float((made - of).abs().max()) for of in (whole, whole.T))
    assert expected < 1e-5
    torch.testing.assert_close(made @ made.T, torch.eye(16), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"method": "dg-hard"}, "dg-hard is for full fine-tuning"),
        ({"method": "full,dg-hard,wise", "scale": 0.5}, "each brings its own finish"),
        ({"method": "null-start,full", "importance": "i"}, "null-start is about adapters"),
        ({"method": "osf,wise", "scale": 0.5}, "osf and wise cannot be combined"),
        ({"method": "hold,proximal", "importance": "i", "strength": 1.0}, "both hold the same"),
        ({"method": "proximal", "importance": "i"}, "--method proximal needs --strength"),
        ({"method": "project", "importance": "i", "protect": 1.0}, "--protect must be below 1"),
        (
            {"method": "project", "importance": "i", "anchor": "recorded"},
            "holds towards the base, found --anchor recorded",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(given, expected):
    with pytest.raises(OptionError, match=expected):
        chosen(resolve(TuneOptions, {"model": "m", "data": "d", "out": "o", **given}))
