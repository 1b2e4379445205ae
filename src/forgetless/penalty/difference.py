"""D = U - U* of a LoRA weight as a product of thin factors, D = L R: what every pull starts from.

Differences are taken of factors, never of products, so that D is exactly zero at the anchor, and
nothing cancels near it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def thin(
    A: Tensor,
    B: Tensor,
    scale: float,
    initial: tuple[Tensor, Tensor] | None,
    anchor: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Factors L (out, q), R (q, in) of D = scale (B A - B0 A0) - B* A*.

    `initial` is (A0, B0), `anchor` is (A*, B*). Towards one of them alone, written (A2, B2) with
    its scale in B2, D is (s B - B2) A + B2 (A - A2); ranks that differ are padded with zeros. With
    both, D is the difference to `initial`, and the factors of the anchor are subtracted beside it.
    """
    if initial is not None:
        A2, B2 = initial[0], scale * initial[1]
    elif anchor is not None:
        A2, B2 = anchor
    else:
        return scale * B, A
    more = max(A2.shape[0] - A.shape[0], 0)
    wide_A = torch.nn.functional.pad(A, (0, 0, 0, more))
    wide_B = torch.nn.functional.pad(scale * B, (0, more))
    fewer = wide_A.shape[0] - A2.shape[0]
    A2, B2 = torch.nn.functional.pad(A2, (0, 0, 0, fewer)), torch.nn.functional.pad(B2, (0, fewer))
    L, R = torch.cat([wide_B - B2, B2], 1), torch.cat([wide_A, wide_A - A2], 0)
    if initial is not None and anchor is not None:
        L, R = torch.cat([L, -anchor[1]], 1), torch.cat([R, anchor[0]], 0)
    return L, R
