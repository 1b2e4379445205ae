"""A fingerprint of a base model, by which an importance file knows the model that it belongs to.

For example:

    fingerprint(model)          # 64 hexadecimal digits, with or without an adapter around the model
    exact_fingerprint(model)    # the same, but another one for each fine-tune of the base
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.model import distributed, shards
from forgetless.model.linear import base_shapes, unwrapped


def fingerprint(model: nn.Module, *, samples: int = 65_536) -> str:
    """sha256 over the shapes of the linear weights and signs of the input embedding.

    The signs are those of about `samples` evenly spaced elements. They survive f32, bf16, f16 and
    loading in 4 or 8 bit (which leaves embeddings alone), so the fingerprint does not depend on how
    the model was loaded. It tells base models apart, not a base from a fine-tune of it that left
    the embedding alone.
    """
    digest = hashlib.sha256()
    for name, shape in sorted(base_shapes(model).items()):
        digest.update(f"{name} {shape}\n".encode())
    base: Any = unwrapped(model)
    embedding = base.get_input_embeddings()
    table = getattr(embedding, "base_layer", embedding).weight.detach()
    digest.update(_signs(table, max(1, table.numel() // samples)))
    return digest.hexdigest()


def exact_fingerprint(model: nn.Module, *, samples: int = 1024) -> str:
    """sha256 over names, shapes, dtypes and about `samples` evenly spaced elements of every
    parameter of the base, with or without an adapter around it.

    It tells a base from each of its fine-tunes, and bf16 from f32: two models that share it say the
    same. Not for sharded models.
    """
    digest = hashlib.sha256()
    adapters = {
        id(parameter)
        for module in model.modules()
        for name in getattr(module, "adapter_layer_names", ())
        for parameter in getattr(module, name).parameters()
    }
    named = [
        (name.replace("base_layer.", ""), parameter)
        for name, parameter in unwrapped(model).named_parameters()
        if id(parameter) not in adapters
    ]
    for name, parameter in sorted(named):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        values = parameter.detach().flatten()
        some = values[:: max(1, len(values) // samples)].cpu().contiguous()
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _signs(table: Tensor, step: int) -> bytes:
    """The sign bits of every `step`th element.

    Of a table sharded by rows, together, they are each process's own, in order.
    """
    first = shards.rows_here(table)[0] * table.shape[1]
    here = shards.local(table).flatten()
    signs: bytes = torch.signbit(here[-first % step :: step]).cpu().numpy().tobytes()
    return b"".join(distributed.collect(signs)) if shards.is_sharded(table) else signs
