"""`dg-hard`: the finished update without what looks like noise in its singular values (DG-Hard,
arXiv 2605.20296).

A weight's update U (m, n) is taken for a low-rank signal in white noise. Of the singular values of
noise the median is sigma sqrt(max(m, n)) times the root of the Marchenko-Pastur median of
b = min(m, n) / max(m, n), so that the median of U's tells sigma. What is not above

    w(b) sigma sqrt(max(m, n)),   w(b) = sqrt(2 (b + 1) + 8 b / (b + 1 + sqrt(b^2 + 14 b + 1)))

is set to zero: the best hard threshold by Gavish and Donoho (arXiv 1305.5870); w(1) = 4 / sqrt(3).

It is for full fine-tuning. Most singular values of LoRA's update are zero, so their median is, and
nothing would be left out. It costs a singular value decomposition per target weight at the end.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from forgetless.errors import OptionError
from forgetless.methods.method import Setup
from forgetless.model.targets import target_weights
from forgetless.model.weights import FullWeight
from forgetless.options.tune import TuneOptions

# Points at which the density is summed: the median then holds to seven digits.
POINTS = 20_001


@functools.cache
def noise_median(ratio: float) -> float:
    """The median of the Marchenko-Pastur law of eigenvalues, at the ratio of the sides in (0, 1].

    Its density is sqrt((high - x)(x - low)) / (2 pi ratio x) between (1 -+ sqrt(ratio))^2. With
    x = low + (high - low) sin^2(angle) it has no edge.
    """
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    angles = torch.linspace(0, math.pi / 2, POINTS, dtype=torch.float64)
    x = low + (high - low) * angles.sin().square()
    # At ratio 1 the density over angles is finite where x is 0: sin^2 / x is 1 / high.
    sines = torch.where(x > 0, angles.sin().square() / x.clamp(min=1e-300), 1 / high)
    density = angles.cos().square() * sines
    mass = torch.cumulative_trapezoid(density, angles)
    at = int(torch.searchsorted(mass, mass[-1] / 2))
    before = float(mass[at - 1])
    part = (float(mass[-1]) / 2 - before) / (float(mass[at]) - before)
    return float(torch.lerp(x[at], x[at + 1], part))


def hard_threshold(values: Tensor, shape: tuple[int, int]) -> float:
    """Below what singular values of a matrix of a shape are taken for noise."""
    ratio = min(shape) / max(shape)
    root = math.sqrt(ratio**2 + 14 * ratio + 1)
    times = math.sqrt(2 * (ratio + 1) + 8 * ratio / (ratio + 1 + root))
    return times * float(values.quantile(0.5)) / math.sqrt(noise_median(ratio))


def without_noise(U: Tensor) -> tuple[Tensor, int]:
    """(U without what looks like noise, how many of its singular values are left)."""
    left, values, right = torch.linalg.svd(U, full_matrices=False)
    above = values > hard_threshold(values, (U.shape[0], U.shape[1]))
    return (left[:, above] * values[above]) @ right[above], int(above.sum())


def check_full(options: TuneOptions) -> None:
    """Refuse LoRA, whose update has no bulk of noise."""
    if not options.full:
        raise OptionError(
            "--method dg-hard is for full fine-tuning: most singular values of LoRA's update are "
            "zero, so that no noise can be told from them; give --method full,dg-hard, or wise"
        )


@torch.no_grad()
def dg_hard(setup: Setup, model: nn.Module) -> dict[str, float]:
    """Leave noise out of the trained update in place; returns what fraction of the singular values,
    and of the update's squared norm, is left.
    """
    left = rank = 0
    before = after = 0.0
    for weight in target_weights(model, names=setup.options.targets):
        assert isinstance(weight, FullWeight)
        U = weight.update()
        kept, count = without_noise(U)
        weight.W.copy_(weight.oriented(weight.base_rows(slice(None)) + kept))
        left, rank = left + count, rank + min(U.shape)
        before, after = before + float(U.square().sum()), after + float(kept.square().sum())
    return {"values_left": left / rank, "norm_left": after / before if before else 1.0}
