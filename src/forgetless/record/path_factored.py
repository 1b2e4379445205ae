"""Path-integral importance from sums of rows and columns: the same idea as path.py without any
(out, in) tensor.

Per weight only two vectors of credits are kept. With g the gradient of U and d the movement of one
optimizer step,

    row_i <- max(0, row_i - sum_j g_ij d_ij)        col_j <- max(0, col_j - sum_i g_ij d_ij)

and at the end of each epoch, with u, v the sums of rows and columns of U^2, S and T those of all
U^2 and all credit,

    Omega_ij += [row_i / (u_i + xi in)] [col_j / (v_j + xi out)] (S + xi in out) / T

which is the path integral's w / (U^2 + xi) with numerator and denominator replaced by their rank-1
forms. Credits of either sign cancel within a row or a column before they are clamped, so this is an
estimator of its own. Epochs add up as sums of rows and columns again: the importance is factored,
rank 1.

d is a product of thin factors under LoRA, and so is g: output gradients times inputs, both (tokens,
width), or the paper's effective gradient. The sums follow from products with those. Cost: 4 r (in +
out) operations per token instead of in out; inputs and output gradients of a step's tokens are held
until the step has been made (with gradient="effective", nothing).

    recorder = PathFactored(peft_model)      # used as PathIntegral is
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from forgetless.importance.entries import Entry, FactoredEntry
from forgetless.importance.tiers import factors_of_sums
from forgetless.model.weights import LowRankWeight, TargetWeight
from forgetless.record.movement import Gradient, Products, movement
from forgetless.record.path_recorder import PathRecorder


def product_sums(g: tuple[Tensor, Tensor], d: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Sums of rows (out,) and columns (in,) of the element-wise product of two matrices, each given
    as a product (out, q) @ (q, in).
    """
    (gL, gR), (dL, dR) = g, d
    return ((gL @ (gR @ dR.T)) * dL).sum(1), (((dL.T @ gL) @ gR) * dR).sum(0)


def normalise_sums(
    row: Tensor, col: Tensor, u: Tensor, v: Tensor, xi: float
) -> tuple[Tensor, Tensor]:
    """What one epoch adds to Omega, as a row (out,) and a column (in,).

    u, v are the sums of U^2 over columns and over rows.
    """
    total = math.sqrt(float(row.sum()) * float(col.sum()))
    if not total > 0:
        return torch.zeros_like(row), torch.zeros_like(col)
    whole = (float(u.sum()) + xi * len(row) * len(col)) / total
    return row / (u + xi * len(col)), col / (v + xi * len(row)) * whole


class PathFactored(PathRecorder):
    """Recorder of path-integral importance in sums of rows and columns; see the module, and
    `PathRecorder` for the arguments.
    """

    estimator = "path-factored"

    def _zeros(self, weight: TargetWeight) -> tuple[Tensor, ...]:
        return tuple(self._new(weight, n) for n in weight.shape)

    def gather(
        self, weight: LowRankWeight, before: Gradient | None, x: Tensor, d: Tensor
    ) -> Products:
        assert not isinstance(before, Tensor)
        return [*(before or []), (d.T, x)]

    def from_factors(self, left: Tensor, right: Tensor) -> Products:
        return [(left, right)]

    def _earned_by(
        self, weight: TargetWeight, gradient: Gradient, before: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        move = movement(weight, before)
        if isinstance(gradient, Tensor):
            product = gradient.to(move[0]) * move[0]  # full fine-tuning: both are there anyway
            return -product.sum(1), -product.sum(0)
        sums = [product_sums(g, (move[0], move[1])) for g in gradient]
        row = torch.stack([row for row, _ in sums]).sum(0)
        col = torch.stack([col for _, col in sums]).sum(0)
        return -row, -col

    def _normalised(self, weight: TargetWeight, credit: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if isinstance(weight, LowRankWeight):
            L, R = weight.factors()
            u, v = product_sums((L, R), (L, R))
        else:
            squares = weight.update().square()
            u, v = squares.sum(1), squares.sum(0)
        row, col = credit
        return normalise_sums(row, col, u.to(row).clamp(min=0), v.to(row).clamp(min=0), self.xi)

    def _add(self, omega: tuple[Tensor, ...], more: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows = torch.stack([omega[0], more[0]], 1)
        columns = torch.stack([omega[1], more[1]], 1)
        row, col = factors_of_sums(rows, columns)
        return row[:, 0], col[:, 0]

    def _entry(self, omega: tuple[Tensor, ...]) -> Entry:
        return FactoredEntry(omega[0][:, None], omega[1][:, None])
