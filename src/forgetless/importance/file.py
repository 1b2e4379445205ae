"""Importance files: safetensors, tensors by base weight name `K`, and one JSON string in the
metadata under `forgetless`. Nothing is ever pickled.

    K (out, in)                        f32, bf16
    K.codes, K.scale                   u8, u4 (codec.py); tier and shape stand in the metadata under
                                       `coded`
    K.row (out, k), K.col (in, k)      factored
    K.out_cov (out, out)               kronecker: covariance of the output gradients,
    K.in_cov (in, in)                  and of the inputs
    K.out_cov.vectors (out, k), .values (k,), .floor (scalar)
                                       the same as rank k + constant diagonal; so for in_cov
    K.anchor_A (r, in)                 optional: the adapter at the end of recording, with the scale
    K.anchor_B (out, r)                folded into B
    K.gradient_L (out, k)              optional: of the general loss at the base, about L @ R, for a
    K.gradient_R (k, in)               calibration
    answers/...                        optional: answers of the base (kept_answers.py)

Weights that read the same input share one in_cov: it is stored once, and `shared_in_cov` in the
metadata names its place for the others. A file is written to a temporary name and renamed.

    save(stored, "model.importance.safetensors")
    load("model.importance.safetensors")          # checked (file_checks.py), or a FileError
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from forgetless.errors import UNSAFE, FileError
from forgetless.files.atomic import atomic_path
from forgetless.files.outputs import check_new_file
from forgetless.files.untrusted import JsonObject, cleaned, load_json
from forgetless.importance import codec
from forgetless.importance.calibration import Calibration
from forgetless.importance.covariance import AnyCovariance, Covariance, LowRankCovariance
from forgetless.importance.entries import (
    CodedEntry,
    DenseEntry,
    Entry,
    FactoredEntry,
    KroneckerEntry,
)
from forgetless.importance.file_checks import (
    NOT_OURS,
    check_extent,
    check_factors,
    check_info,
    check_parts,
    check_traces,
    checked_calibration,
)
from forgetless.importance.kept_answers import PREFIX, KeptAnswers, read_answers

# The version of the layout above; other ones are refused.
FORMAT = 1
ANCHOR = (".anchor_A", ".anchor_B")
GRADIENT = (".gradient_L", ".gradient_R")
COVARIANCES = tuple(
    f".{kind}_cov{part}" for kind in ("out", "in") for part in (".vectors", ".values", ".floor", "")
)
# What may follow the name of a weight in the name of a tensor.
SUFFIXES = (*ANCHOR, *GRADIENT, ".codes", ".scale", ".row", ".col", *COVARIANCES)
# Characters that the name of a weight may have.
LONGEST_NAME = 1000

Pairs = dict[str, tuple[Tensor, Tensor]]  # weight name -> two factors
Parts = dict[str, dict[str, Tensor]]  # weight name -> suffix -> tensor


@dataclass(frozen=True)
class Stored:
    """What an importance file holds, as plain parts; `Importance` is made of them."""

    entries: Mapping[str, Entry]  # weight name -> entry
    anchors: Pairs  # weight name -> (A, B) of the adapter at the end of recording
    info: JsonObject  # what the file says about itself, plain data
    calibration: Calibration | None
    answers: KeptAnswers | None = None


def save(stored: Stored, path: str | Path) -> None:
    """Write an importance file atomically.

    Raises ValueError on non-finite or negative values, naming the weight, and where another
    program's file stands at `path`.
    """
    check_new_file(path, is_importance, {})
    tensors, shared = _tensors(stored.entries, "the importance")
    gradients = stored.calibration.gradients if stored.calibration else {}
    for pairs, suffixes in ((stored.anchors, ANCHOR), (gradients, GRADIENT)):
        for name, pair in pairs.items():
            for suffix, factor in zip(suffixes, pair, strict=True):
                tensors[name + suffix] = factor.contiguous().cpu()
    tensors |= stored.answers.tensors() if stored.answers else {}
    header = json.dumps(_header(stored, shared), sort_keys=True)
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata={"forgetless": header})


def is_importance(path: str | Path) -> bool:
    """Whether a file says that it is of ours; what else is in it is not looked at."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return "forgetless" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def load(path: str | Path) -> Stored:
    """Read and check an importance file.

    Raises ValueError: missing, not safetensors, truncated, foreign, non-finite or negative values.
    """
    info, tensors = _read_file(Path(path))
    check_info(path, info)
    check_traces(path, info)
    shared = info.pop("shared_in_cov", {})
    coded = info.pop("coded", {})
    calibration = info.pop("calibration", None)
    about_answers = info.pop("answers", None)
    answers = {
        name.removeprefix(PREFIX): tensors.pop(name)
        for name in list(tensors)
        if name.startswith(PREFIX)
    }
    parts = _by_weight(path, tensors)
    anchors = _factor_pairs(path, parts, "recorded adapter", ANCHOR)
    gradients = _factor_pairs(path, parts, "gradient", GRADIENT)
    entries = _entries(path, parts, shared, coded)
    for name, entry in entries.items():
        check_extent(f"{path}: '{name}'", entry)
    anchor_factors = {name: (B, A) for name, (A, B) in anchors.items()}
    check_factors(path, entries, anchor_factors, "recorded adapter")
    check_factors(path, entries, gradients, "gradient")
    if not entries:
        raise FileError(f"{path} holds no importance; {NOT_OURS}")
    return Stored(
        entries,
        anchors,
        {**info, "path": str(path)},
        checked_calibration(path, info, calibration, entries, gradients),
        read_answers(path, answers, about_answers) if answers else None,
    )


def _header(stored: Stored, shared: Mapping[str, str]) -> JsonObject:
    """What the metadata hold: `info`, and what is needed to read the tensors."""
    header = {key: value for key, value in stored.info.items() if key != "path"}
    header["format"] = FORMAT
    if shared:
        header["shared_in_cov"] = shared
    coded = {
        name: [entry.tier, *entry.shape]
        for name, entry in stored.entries.items()
        if isinstance(entry, CodedEntry)
    }
    if coded:
        header["coded"] = coded
    if stored.answers:
        header["answers"] = stored.answers.about()
    if stored.calibration:
        header["calibration"] = {
            "updates": [update.plain() for update in stored.calibration.updates],
            "data": dict(stored.calibration.data),
        }
    return header


def _tensors(entries: Mapping[str, Entry], where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors of a file, weight -> weight whose in_cov it shares).

    Raises ValueError on values that are no importance.
    """
    tensors: dict[str, Tensor] = {}
    owners: dict[int, str] = {}  # identity of an input covariance -> the weight that it stands with
    shared = {}
    # Sorted, so that the same weight owns a shared covariance whatever the order.
    for name, entry in sorted(entries.items()):
        parts = entry.tensors()
        if isinstance(entry, CodedEntry):
            codec.check_codes(
                f"{where}: '{name}'", entry.codes, entry.scale, entry.shape, entry.tier
            )
        else:
            check_parts(f"{where}: '{name}'", parts)
        if isinstance(entry, KroneckerEntry):
            owner = owners.setdefault(id(entry.in_cov), name)
            if owner != name:
                shared[name] = owner
                parts = {key: part for key, part in parts.items() if not key.startswith(".in_cov")}
        for suffix, tensor in parts.items():
            tensors[name + suffix] = tensor.contiguous().cpu()
    return tensors, shared


def _read_file(path: Path) -> tuple[JsonObject, dict[str, Tensor]]:
    """(metadata, tensors) of a file of ours, its entries not checked yet."""
    if not path.is_file():
        raise FileError(
            f"importance file '{path}' does not exist; make one with: forgetless record MODEL "
            f"--general TEXT --out {path}"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            info = _info(path, file.metadata() or {})
            return info, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileError:
        raise
    except (SafetensorError, ValueError) as error:
        raise FileError(
            f"{path} is not a whole safetensors file ({error}); {NOT_OURS}; copy it or record again"
        ) from None


def _info(path: Path, metadata: Mapping[str, str]) -> JsonObject:
    """Our part of a file's metadata."""
    if "forgetless" not in metadata:
        raise FileError(
            f"{path} is a safetensors file of something else (no 'forgetless' metadata); {NOT_OURS}"
        )
    info = load_json(metadata["forgetless"])
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        version = info.get("format") if isinstance(info, dict) else type(info).__name__
        raise FileError(
            f"{path} has format {version!r}, this forgetless reads {FORMAT}; update "
            "forgetless or record again"
        )
    plain: JsonObject = cleaned(info)
    return plain


def _by_weight(path: str | Path, tensors: Mapping[str, Tensor]) -> Parts:
    """The tensors of each weight by suffix."""
    parts: Parts = {}
    for name, tensor in tensors.items():
        if not name or len(name) > LONGEST_NAME or UNSAFE.search(name):
            raise FileError(f"{path}: {name[:100]!r} cannot be the name of a weight; {NOT_OURS}")
        suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
        parts.setdefault(name.removesuffix(suffix), {})[suffix] = tensor
    return parts


def _factor_pairs(path: str | Path, parts: Parts, what: str, suffixes: tuple[str, str]) -> Pairs:
    """Take two factors of each weight that has them out of `parts`."""
    pairs: Pairs = {}
    for name, part in parts.items():
        first, second = (part.pop(suffix, None) for suffix in suffixes)
        if first is not None and second is not None:
            pairs[name] = (first, second)
        elif first is not None or second is not None:
            raise FileError(
                f"{path}: '{name}' has half a {what}; the file is damaged, record again"
            )
    return pairs


def _entries(
    path: str | Path, parts: Parts, shared: Mapping[str, str], coded: Mapping[str, list[Any]]
) -> dict[str, Entry]:
    """The entry of each weight; `shared` and `coded` as the metadata have them."""
    entries: dict[str, Entry] = {}
    for name, part in parts.items():
        where = f"{path}: '{name}'"
        if name in coded and name not in shared:
            entries[name] = _coded_entry(where, part, coded[name])
        elif name not in shared:
            entries[name] = _entry(where, part, None)
    inputs = {name: getattr(entry, "in_cov", None) for name, entry in entries.items()}
    for name, owner in shared.items():
        if name not in parts or inputs.get(owner) is None:
            raise FileError(
                f"{path}: '{name}' shares the input covariance of '{owner}', which is not in the "
                "file; the file is damaged, record again"
            )
        entries[name] = _entry(f"{path}: '{name}'", parts[name], inputs[owner])
    return {name: entries[name] for name in parts}


def _entry(where: str, parts: dict[str, Tensor], in_cov: AnyCovariance | None) -> Entry:
    """The entry that a file's tensors of one weight make up, checked; `in_cov` where it is stored
    with another weight.
    """
    check_parts(where, parts)
    if set(parts) == {""}:
        return DenseEntry(parts[""])
    if set(parts) == {".row", ".col"}:
        return _factored_entry(where, parts[".row"], parts[".col"])
    out_cov = _stored_covariance(parts, ".out_cov")
    in_cov = in_cov if in_cov is not None else _stored_covariance(parts, ".in_cov")
    if out_cov is None or in_cov is None:
        raise FileError(
            f"{where} is made of {', '.join(sorted(parts)) or 'nothing'}, which is no whole "
            "importance; the file is damaged, or of a newer forgetless"
        )
    return KroneckerEntry(out_cov, in_cov)


def _factored_entry(where: str, row: Tensor, col: Tensor) -> FactoredEntry:
    if row.shape[1] != col.shape[1]:
        raise FileError(
            f"{where} has {row.shape[1]} rows of factors and {col.shape[1]} columns; the file is "
            "damaged, record again"
        )
    return FactoredEntry(row, col)


def _coded_entry(where: str, parts: dict[str, Tensor], listed: list[Any]) -> CodedEntry:
    """The entry in codes; `listed` is [tier, out, in]."""
    if set(parts) != {".codes", ".scale"}:
        raise FileError(
            f"{where} lacks its codes or its scale; the file is damaged, convert or record again"
        )
    tier, *shape = listed
    try:
        codec.check_codes(where, parts[".codes"], parts[".scale"], shape, tier)
    except ValueError as error:
        raise FileError(str(error)) from None
    return CodedEntry(parts[".codes"], parts[".scale"], (shape[0], shape[1]), tier)


def _stored_covariance(parts: dict[str, Tensor], kind: str) -> AnyCovariance | None:
    """The covariance of this kind, whole or of low rank; None where it is not all there."""
    if kind in parts:
        return Covariance(parts[kind])
    names = [kind + suffix for suffix in (".vectors", ".values", ".floor")]
    if not all(name in parts for name in names):
        return None
    return LowRankCovariance(*(parts[name] for name in names))
