"""TODO model.fingerprint."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from forgetless.model import distributed, shards
from forgetless.model.linear import base_shapes, unwrapped


def fingerprint(model: nn.Module, *, samples: int = 65_536) -> str:
    """sha256 over the shapes of the linear weights and the sign bits of evenly spaced elements of
    the input embedding.

    Signs survive f32, bf16, f16 and loading in 4 or 8 bit (which leaves embeddings alone), so the
    fingerprint does not depend on how the model was loaded. It tells base models apart, not a base
    from a fine-tune of it that left the embedding alone.
    """
    digest = hashlib.sha256()
    for name, shape in sorted(base_shapes(model).items()):
        digest.update(f"{name} {shape}\n".encode())
    embedding = unwrapped(model).get_input_embeddings()
    table = getattr(embedding, "base_layer", embedding).weight.detach()
    digest.update(_signs(table, max(1, table.numel() // samples)))
    return digest.hexdigest()


def _signs(table: Tensor, step: int) -> bytes:
    """The sign bits of every `step`th element; of a table sharded by rows, together, each process's
    own in order.
    """
    first, here = (
        shards.rows_here(table)[0] * table.shape[1],
        shards.local(table).flatten(),
    )
    signs: bytes = torch.signbit(here[-first % step :: step]).cpu().numpy().tobytes()
    return b"".join(distributed.collect(signs)) if shards.is_sharded(table) else signs
