"""A fingerprint of a base model, by which an importance file knows the model that it belongs to.

For example:

    fingerprint(model)          # 64 hexadecimal digits, with or without an adapter around the model
    exact_fingerprint(model)    # the same, but another one for each fine-tune of the base
    files_fingerprint(options)  # of the files that a model is loaded from, without loading it
"""

from __future__ import annotations

import hashlib
import re
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forgetless.model import distributed, shards
from forgetless.model.base_values import base_biases
from forgetless.model.linear import base_shapes, below_adapters, unwrapped
from forgetless.model.loading import model_folder
from forgetless.options.model import ModelOptions

# What PEFT's wrappers put into the name of a tensor of the base.
NAMES_OF_WRAPPERS = re.compile(r"(?:token_adapter\.)?base_layer\.|original_module\.")
# What decides how a model's folder is loaded, by the endings of the names: weights, configuration
# and tokenizer, a chat template, code.
DECIDING = (".safetensors", ".json", ".model", ".txt", ".jinja", ".py")
# Rows by which embeddings may have grown: added tokens are a few, and padding goes up to a multiple
# of 64 or 128.
MOST_NEW_ROWS = 1024
# Bytes of a file that is read whole for `files_fingerprint`; of a larger one so many blocks of so
# many bytes: 16 MiB, which take a disk less time than loading takes by far.
WHOLE_UP_TO = 1 << 26
READ_PLACES = 4096
READ_AT_A_PLACE = 4096


def fingerprint(model: nn.Module, *, samples: int = 65_536, rows: int | None = None) -> str:
    """sha256 over the shapes of the linear weights and signs of the input embedding.

    The signs are those of about `samples` evenly spaced elements. They survive f32, bf16, f16 and
    loading in 4 or 8 bit (which leaves embeddings alone), so the fingerprint does not depend on how
    the model was loaded. It tells base models apart, not a base from a fine-tune of it that left
    the embedding alone. `rows`: as it would be had the embeddings only their first rows.
    """
    digest = hashlib.sha256()
    base: Any = unwrapped(model)
    table = below_adapters(base.get_input_embeddings()).weight.detach()
    now = table.shape[0]
    head = _path_of_head(base)
    for name, shape in sorted(base_shapes(model).items()):
        if rows is not None and name == head and shape[0] == now:
            shape = (rows, shape[1])
        digest.update(f"{name} {shape}\n".encode())
    table = table[:rows]
    digest.update(_signs(table, max(1, table.numel() // samples)))
    return digest.hexdigest()


def rows_before_resizing(model: nn.Module, expected: str) -> int | None:
    """How many rows the embeddings had when the model had the fingerprint `expected`; None where
    that is another model's, or of embeddings with more rows.

    Costs a fingerprint for each number of rows that is tried.
    """
    base: Any = unwrapped(model)
    table = below_adapters(base.get_input_embeddings()).weight
    if shards.is_sharded(table):
        return None
    now = int(table.shape[0])
    tried = range(now - 1, max(now - MOST_NEW_ROWS, 1), -1)
    return next((rows for rows in tried if fingerprint(model, rows=rows) == expected), None)


def _path_of_head(base: Any) -> str | None:
    """The name of the output embeddings' weight in the bare base."""
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    paths = (path for path, module in base.named_modules() if head is not None and module is head)
    path = next(paths, None)
    return None if path is None else path + ".weight"


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
        for parameter in attrgetter(name)(module).parameters()
    }
    before = base_biases(model)
    named = [
        (NAMES_OF_WRAPPERS.sub("", name), parameter)
        for name, parameter in unwrapped(model).named_parameters()
        if id(parameter) not in adapters
    ]
    for name, now in sorted(named):
        parameter = before.get(name, now)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        values = parameter.detach().flatten()
        some = values[:: max(1, len(values) // samples)].cpu().contiguous()
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def files_fingerprint(options: ModelOptions) -> str:
    """What lies where a model is loaded from: of a local folder a sha256 over configuration,
    tokenizer and weights, of a name on the Hub the commit.

    It is how a resumed run and a comparison see that a model was replaced at the same place. Files
    above WHOLE_UP_TO are read at READ_PLACES places alone, evenly spaced, and at both ends.
    """
    folder = model_folder(options.model)
    if folder is None:
        return _commit_on_the_hub(options)
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in DECIDING and not path.name.startswith(".") and path.is_file():
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            _add_content(digest, path)
    return digest.hexdigest()


def _commit_on_the_hub(options: ModelOptions) -> str:
    """The commit of a model that is not a folder here; its name where that cannot be had, as
    loading it then says.
    """
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(options.model, "config.json", revision=options.revision)
    except (OSError, ValueError):
        return options.model
    return Path(path).parent.name


def _add_content(digest: Any, path: Path) -> None:
    """Add a file's bytes, or some of them where there are many."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= WHOLE_UP_TO:
            digest.update(file.read())
            return
        for number in range(READ_PLACES + 1):
            file.seek((size - READ_AT_A_PLACE) * number // READ_PLACES)
            digest.update(file.read(READ_AT_A_PLACE))


def _signs(table: Tensor, step: int) -> bytes:
    """The sign bits of every `step`th element.

    Of a table sharded by rows, together, they are each process's own, in order.
    """
    first = shards.rows_here(table)[0] * table.shape[1]
    here = shards.local(table).flatten()
    signs: bytes = torch.signbit(here[-first % step :: step]).cpu().numpy().tobytes()
    return b"".join(distributed.collect(signs)) if shards.is_sharded(table) else signs
