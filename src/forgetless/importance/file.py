"""Importance files: safetensors, tensors by base weight name `K`, one JSON string in the metadata
under `forgetless`. Never pickle.

    K (out, in)                                                 f32, bf16
    K.codes, K.scale                                            u8, u4 (codec.py); tier and shape
        stand in the metadata under `coded`
    K.row (out, k), K.col (in, k)                               factored
    K.out_cov (out, out), K.in_cov (in, in)                     kronecker
    K.out_cov.vectors (out, k), .values (k,), .floor (scalar)   the same as rank k + constant
        diagonal; so for in_cov
    K.anchor_A (r, in), K.anchor_B (out, r)                     optional: the adapter at the end of
        recording, with the scale folded into B

Weights that read the same input share one in_cov: it is stored once, and `shared_in_cov` in the
metadata names its place for the others. Written to a temporary name and renamed.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forgetless.errors import UNSAFE, FileError
from forgetless.files.atomic import atomic_path
from forgetless.files.untrusted import cleaned, load_json
from forgetless.importance import codec
from forgetless.importance.calibration import PLAUSIBLE, Calibration, MeasuredUpdate
from forgetless.importance.covariance import AnyCovariance, Covariance, LowRankCovariance
from forgetless.importance.entries import (
    CodedEntry,
    DenseEntry,
    Entry,
    FactoredEntry,
    KroneckerEntry,
)
from forgetless.options.estimators import in_nats

logger = logging.getLogger("forgetless")
FORMAT = 1
SUFFIXES = (
    ".anchor_A",
    ".anchor_B",
    ".gradient_L",
    ".gradient_R",
    ".codes",
    ".scale",
    ".row",
    ".col",
    *(
        f".{kind}_cov{part}"
        for kind in ("out", "in")
        for part in (".vectors", ".values", ".floor", "")
    ),
)
NOT_OURS = "expected an importance file of `forgetless record`"
# What the metadata may hold where we read it: more is kept, but of another type it is refused.
INFO: dict[str, type] = {
    "estimator": str,
    "unit": str,
    "tier": str,
    "model": dict,
    "data": dict,
    "settings": dict,
    "timings": dict,
    "norms": dict,
    "energy_error": dict,
    "shared_in_cov": dict,
    "coded": dict,
    "calibration": dict,
}
LARGEST = (
    1 << 36
    # elements of a weight: a few KB of factors can claim any shape; the largest known (an embedding of
    # 256,000 x 16,384) has 2^32
)


@dataclass(frozen=True)
class Stored:
    """What an importance file holds, as plain parts; `Importance` is made of them."""

    entries: Mapping[str, Entry]  # base weight name -> entry
    anchors: dict[
        str, tuple[Tensor, Tensor]
    ]  # base weight name -> (A, B) of the adapter at the end of recording
    info: dict[str, Any]  # the metadata, plain data
    calibration: Calibration | None


def save(stored: Stored, path: str | Path) -> None:
    """Write an importance file atomically.

    Raises ValueError on non-finite or negative values, naming the weight.
    """
    from safetensors.torch import save_file

    tensors, shared = _tensors(stored.entries, "the importance")
    for name, (A, B) in stored.anchors.items():
        tensors[f"{name}.anchor_A"], tensors[f"{name}.anchor_B"] = (
            A.contiguous().cpu(),
            B.contiguous().cpu(),
        )
    calibration = stored.calibration
    for name, (L, R) in calibration.gradients.items() if calibration else ():
        tensors[f"{name}.gradient_L"], tensors[f"{name}.gradient_R"] = (
            L.contiguous().cpu(),
            R.contiguous().cpu(),
        )
    coded = {
        name: [entry.tier, *entry.shape]
        for name, entry in stored.entries.items()
        if isinstance(entry, CodedEntry)
    }
    info = {
        **{key: value for key, value in stored.info.items() if key != "path"},
        "format": FORMAT,
        **({"shared_in_cov": shared} if shared else {}),
        **({"coded": coded} if coded else {}),
        **(
            {
                "calibration": {
                    "updates": [update.plain() for update in calibration.updates],
                    "data": dict(calibration.data),
                }
            }
            if calibration
            else {}
        ),
    }
    with atomic_path(path) as temporary:
        save_file(
            tensors, str(temporary), metadata={"forgetless": json.dumps(info, sort_keys=True)}
        )


def load(path: str | Path) -> Stored:
    """Read and check an importance file.

    Raises ValueError: missing, not safetensors, truncated, foreign, non-finite or negative values.
    """
    info, tensors = _read(Path(path))
    _check_info(path, info)
    parts: dict[str, dict[str, Tensor]] = {}  # base weight name -> suffix -> tensor
    for name, tensor in tensors.items():
        if not name or len(name) > 1000 or UNSAFE.search(name):
            raise FileError(f"{path}: {name[:100]!r} cannot be the name of a weight; {NOT_OURS}")
        suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
        parts.setdefault(name.removesuffix(suffix), {})[suffix] = tensor
    shared, coded, calibration = (
        info.pop("shared_in_cov", {}),
        info.pop("coded", {}),
        info.pop("calibration", None),
    )
    entries, inputs = {}, {}
    anchors: dict[str, tuple[Tensor, Tensor]] = {}
    gradients: dict[str, tuple[Tensor, Tensor]] = {}
    for name, part in parts.items():
        where = f"{path}: '{name}'"
        for found, what, suffixes in (
            (anchors, "recorded adapter", (".anchor_A", ".anchor_B")),
            (gradients, "gradient", (".gradient_L", ".gradient_R")),
        ):
            first, second = (part.pop(suffix, None) for suffix in suffixes)
            if (first is None) != (second is None):
                raise FileError(f"{where} has half a {what}; the file is damaged, record again")
            if first is not None and second is not None:
                found[name] = (first, second)
        if name not in shared:
            entries[name] = (
                _coded(where, part, coded[name]) if name in coded else _entry(where, part, None)
            )
            inputs[name] = getattr(entries[name], "in_cov", None)
    for name, owner in shared.items():
        if name not in parts or inputs.get(owner) is None:
            raise FileError(
                f"{path}: '{name}' shares the input covariance of '{owner}', which is not in the "
                "file; the file is damaged, record again"
            )
        entries[name] = _entry(f"{path}: '{name}'", parts[name], inputs[owner])
    entries = {name: entries[name] for name in parts}
    for name, entry in entries.items():
        _check_extent(f"{path}: '{name}'", entry)
    _check_factors(
        path, entries, {name: (B, A) for name, (A, B) in anchors.items()}, "recorded adapter"
    )
    _check_factors(path, entries, gradients, "gradient")
    if not entries:
        raise FileError(f"{path} holds no importance; {NOT_OURS}")
    return Stored(
        entries,
        anchors,
        {**info, "path": str(path)},
        _calibration(path, info, calibration, entries, gradients),
    )


def _check_info(path: str | Path, info: Mapping[str, Any]) -> None:
    """Raise FileError where the metadata has other types than we read: what names weights, what is
    counted, what is shown.
    """
    for key, kind in INFO.items():
        if key in info and not isinstance(info[key], kind):
            raise FileError(
                f"{path}: '{key}' in the metadata is {type(info[key]).__name__}, expected "
                f"{kind.__name__}; {NOT_OURS}"
            )
    whole = lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0
    pair = lambda value: isinstance(value, list) and len(value) == 2 and all(map(_number, value))
    errors = info.get("energy_error", {}).get("weights", {})
    coded = lambda value: (
        isinstance(value, list)
        and len(value) == 3
        and isinstance(value[0], str)
        and all(map(whole, value[1:]))
    )
    text = lambda value: isinstance(value, (str, type(None)))
    for what, values, fits in (
        ("model", {key: info.get("model", {}).get(key) for key in ("name", "fingerprint")}, text),
        ("norms", info.get("norms", {}), _number),
        ("energy_error", errors, pair),
        ("shared_in_cov", info.get("shared_in_cov", {}), lambda value: isinstance(value, str)),
        ("coded", info.get("coded", {}), coded),
    ):
        if not isinstance(values, dict) or not all(map(fits, values.values())):
            raise FileError(
                f"{path}: '{what}' in the metadata is not what forgetless writes there; the file "
                "is damaged, record again"
            )


def _check_extent(where: str, entry: Entry) -> None:
    """Raise FileError for a shape that no weight has, and where products of factors leave the range
    of f32.
    """
    out, into = entry.shape
    if not 0 < out * into <= LARGEST:
        raise FileError(
            f"{where} claims to be {out} x {into}, expected 1 to 2^36 elements; {NOT_OURS}"
        )
    if isinstance(entry, FactoredEntry):
        top = (
            entry.row.shape[1] * float(entry.row.max()) * float(entry.col.max())
            if entry.row.numel()
            else 0.0
        )
    elif isinstance(entry, KroneckerEntry):
        top = float(entry.out_cov.diagonal().max()) * float(entry.in_cov.diagonal().max())
    else:
        top = float(entry.values.max()) if isinstance(entry, DenseEntry) else 0.0
    if not top < torch.finfo(torch.float32).max:
        raise FileError(
            f"{where} has products of up to {top:.3g}, beyond the range of f32; record again "
            "with a lower learning rate"
        )


def _tensors(entries: Mapping[str, Entry], where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors of a file, weight -> weight whose in_cov it shares).

    Raises ValueError on values that are no importance.
    """
    tensors: dict[str, Tensor] = {}
    owners: dict[int, str] = {}
    shared = {}
    for name, entry in sorted(
        entries.items()
    ):  # so that the same weight owns a shared covariance whatever the order
        parts = entry.tensors()
        if isinstance(entry, CodedEntry):
            codec.check(f"{where}: '{name}'", entry.codes, entry.scale, entry.shape, entry.tier)
        else:
            _check_parts(f"{where}: '{name}'", parts)
        if (
            isinstance(entry, KroneckerEntry)
            and (owner := owners.setdefault(id(entry.in_cov), name)) != name
        ):
            shared[name] = owner
            parts = {
                suffix: tensor
                for suffix, tensor in parts.items()
                if not suffix.startswith(".in_cov")
            }
        tensors.update(
            {name + suffix: tensor.contiguous().cpu() for suffix, tensor in parts.items()}
        )
    return tensors, shared


def _entry(where: str, parts: dict[str, Tensor], in_cov: AnyCovariance | None) -> Entry:
    """The entry that a file's tensors of one weight make up, checked; `in_cov` where it is stored
    with another weight.
    """
    _check_parts(where, parts)
    found = set(parts)
    if found == {""}:
        return DenseEntry(parts[""])
    if found == {".row", ".col"}:
        if parts[".row"].shape[1] != parts[".col"].shape[1]:
            raise FileError(
                f"{where} has {parts['.row'].shape[1]} rows of factors and "
                f"{parts['.col'].shape[1]} columns; the file is damaged, record again"
            )
        return FactoredEntry(parts[".row"], parts[".col"])
    out_cov = _covariance(parts, ".out_cov")
    in_cov = in_cov if in_cov is not None else _covariance(parts, ".in_cov")
    if out_cov is None or in_cov is None:
        raise FileError(
            f"{where} is made of {', '.join(sorted(found)) or 'nothing'}, which is no whole "
            "importance; the file is damaged, or of a newer forgetless"
        )
    return KroneckerEntry(out_cov, in_cov)


def _coded(where: str, parts: dict[str, Tensor], listed: Any) -> CodedEntry:
    """The entry in codes; `listed` is [tier, out, in]."""
    if set(parts) != {".codes", ".scale"}:
        raise FileError(
            f"{where} lacks its codes or its scale; the file is damaged, convert or record again"
        )
    tier, *shape = listed
    try:
        codec.check(where, parts[".codes"], parts[".scale"], shape, tier)
    except ValueError as error:
        raise FileError(str(error)) from None
    return CodedEntry(parts[".codes"], parts[".scale"], (shape[0], shape[1]), tier)


def _covariance(parts: dict[str, Tensor], kind: str) -> AnyCovariance | None:
    if kind in parts:
        return Covariance(parts[kind])
    thin = [parts.get(kind + suffix) for suffix in (".vectors", ".values", ".floor")]
    if any(part is None for part in thin):
        return None
    return LowRankCovariance(*thin)  # type: ignore[arg-type]


def _check_parts(where: str, parts: dict[str, Tensor]) -> None:
    """Raise ValueError unless every tensor of one weight has a fitting shape and dtype and can be
    (part of) importance.
    """
    for suffix, tensor in parts.items():
        dimensions = 0 if suffix.endswith(".floor") else 1 if suffix.endswith(".values") else 2
        if tensor.ndim != dimensions or tensor.dtype not in (
            torch.float32,
            torch.bfloat16,
            torch.float64,
        ):
            raise FileError(
                f"{where}{suffix} is {tuple(tensor.shape)} {tensor.dtype}, expected {dimensions} "
                f"dimensions in f32 or bf16; {NOT_OURS}"
            )
        if not tensor.numel():
            raise FileError(f"{where}{suffix} is empty; {NOT_OURS}")
        if suffix.endswith("_cov") and tensor.shape[0] != tensor.shape[1]:
            raise FileError(
                f"{where}{suffix} is {tuple(tensor.shape)}, expected a square covariance; "
                f"{NOT_OURS}"
            )
        # Whole covariances and eigenvectors have entries of either sign; a covariance with a negative
        # diagonal has a negative eigenvalue.
        signed = suffix.endswith((".vectors", "_cov"))
        _check_values(where + suffix, tensor, signed)
        if suffix.endswith("_cov") and float(tensor.diagonal().min()) < 0:
            raise FileError(
                f"{where}{suffix} has negative variances (down to "
                f"{float(tensor.diagonal().min()):.3g}); {NOT_OURS}, record again"
            )
        if suffix.endswith("_cov") and float((tensor - tensor.T).abs().max()) > 1e-2 * float(
            tensor.diagonal().max()
        ):
            raise FileError(
                f"{where}{suffix} is not symmetric, as covariances are; the file is damaged, "
                "record again"
            )
    for kind in (".out_cov", ".in_cov"):
        if (
            f"{kind}.vectors" in parts
            and parts[f"{kind}.vectors"].shape[1:]
            != parts.get(f"{kind}.values", parts[f"{kind}.vectors"]).shape
        ):
            raise FileError(
                f"{where}{kind} has {parts[f'{kind}.vectors'].shape[1]} directions and other "
                "values; the file is damaged, record again"
            )


def _check_factors(
    path: str | Path,
    entries: Mapping[str, Entry],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    what: str,
) -> None:
    """Raise FileError unless each pair is (out, k), (k, in) of its weight, in numbers."""
    for name, (L, R) in factors.items():
        if (
            name not in entries
            or L.ndim != 2
            or R.ndim != 2
            or (L.shape[0], R.shape[1]) != entries[name].shape
            or L.shape[1] != R.shape[0]
        ):
            raise FileError(
                f"{path}: the {what} of '{name}' does not fit its weight; the file is damaged, "
                "record again"
            )
        for part in (L, R):
            if part.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                raise FileError(
                    f"{path}: the {what} of '{name}' is of {part.dtype}, expected f32 or bf16; "
                    "the file is damaged, record again"
                )
            if not bool(torch.isfinite(part).all()):
                raise FileError(
                    f"{path}: the {what} of '{name}' has non-finite values; record again"
                )


def _calibration(
    path: str | Path,
    info: Mapping[str, Any],
    stored: dict[str, Any] | None,
    entries: Mapping[str, Entry],
    gradients: dict[str, tuple[Tensor, Tensor]],
) -> Calibration | None:
    """The calibration of a file that has one.

    Raises FileError where it is not what we write, or says what no measurement does.
    """
    if stored is None and not gradients:
        return None
    updates, data = (stored or {}).get("updates"), (stored or {}).get("data", {})
    numbers = lambda update: (
        isinstance(update, dict)
        and all(_number(update.get(key)) for key in ("energy", "first", "second", "second_error"))
    )
    if (
        not isinstance(updates, list)
        or not all(map(numbers, updates))
        or not isinstance(data, dict)
    ):
        raise FileError(
            f"{path}: 'calibration' in the metadata is not what forgetless writes there; the "
            "file is damaged, record again"
        )
    if missing := [name for name in entries if name not in gradients]:
        raise FileError(
            f"{path}: the calibration has no gradient of '{missing[0]}'; the file is damaged, "
            "record again"
        )
    try:
        calibration = Calibration([MeasuredUpdate.of(each) for each in updates], gradients, data)
    except ValueError as error:
        raise FileError(f"{path}: {error}") from None
    if in_nats(info.get("estimator")) and not 1 / PLAUSIBLE < calibration.cost < PLAUSIBLE:
        raise FileError(
            f"{path}: the calibration claims that a unit of energy costs {calibration.cost:.3g} "
            f"nats, expected about 1; {NOT_OURS}, record again"
        )
    return calibration


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileError(
            f"importance file '{path}' does not exist; make one with: forgetless record MODEL "
            f"--general TEXT --out {path}"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if "forgetless" not in metadata:
                raise FileError(
                    f"{path} is a safetensors file of something else (no 'forgetless' metadata); "
                    f"{NOT_OURS}"
                )
            info = load_json(metadata["forgetless"])
            if not isinstance(info, dict) or info.get("format") != FORMAT:
                found = info.get("format") if isinstance(info, dict) else type(info).__name__
                raise FileError(
                    f"{path} has format {found!r}, this forgetless reads {FORMAT}; update "
                    "forgetless or record again"
                )
            return cleaned(info), {name: file.get_tensor(name) for name in file.keys()}
    except FileError:
        raise
    except (SafetensorError, ValueError) as error:
        raise FileError(
            f"{path} is not a whole safetensors file ({error}); {NOT_OURS}; copy it or record again"
        ) from None


def _check_values(where: str, values: Tensor, signed: bool) -> None:
    low, high = (float(v) for v in values.aminmax()) if values.numel() else (0.0, 0.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise FileError(
            f"{where} has non-finite importance; record again with a lower learning rate or in f32"
        )
    if low < 0 and not signed:
        raise FileError(
            f"{where} has negative importance (down to {low:.3g}); importance is never negative, "
            "record again"
        )
