"""What an importance file must be before anything is made of it.

Files come from strangers, and are written by every version: metadata of the types that are read,
shapes and dtypes that fit, numbers that can be importance. What is not is refused with a FileError
that names the place and says what to do.

    check_info(path, info)              # the metadata
    check_parts(where, parts)           # the tensors of one weight, by suffix
    check_extent(where, entry)          # its size, and the range of its products
    check_factors(path, entries, pairs, "gradient")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forgetless.data.traces import read_traces
from forgetless.errors import FileError
from forgetless.files.measured_json import DIVERGENCE
from forgetless.importance.calibration import PLAUSIBLE, Calibration, MeasuredUpdate
from forgetless.importance.entries import DenseEntry, Entry, FactoredEntry, KroneckerEntry
from forgetless.options.estimators import in_nats

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
    "answers": dict,
}
# Elements of a weight, at most: a few KB of factors can claim any shape. The largest known weight,
# an embedding of 256,000 x 16,384, has 2^32.
MOST_ELEMENTS = 1 << 36
# How far a covariance may be from symmetric, as a fraction of its largest variance: rounding stays
# far below it.
ASYMMETRY = 1e-2
# How far V^T V may be from the identity along a random direction: in bf16 rounding makes .004.
NOT_ORTHONORMAL = 0.05
# The dtypes that importance is stored in, and those of factors beside it.
IMPORTANCE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
FACTOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_info(path: str | Path, info: Mapping[str, Any]) -> None:
    """Raise FileError where the metadata has other types than we read: what names weights, what is
    counted, what is shown.
    """
    for key, kind in INFO.items():
        if key in info and not isinstance(info[key], kind):
            raise FileError(
                f"{path}: '{key}' in the metadata is {type(info[key]).__name__}, expected "
                f"{kind.__name__}; {NOT_OURS}"
            )
    model = {key: info.get("model", {}).get(key) for key in ("name", "fingerprint")}
    checks: tuple[tuple[str, Any, Callable[[Any], bool]], ...] = (
        ("model", model, lambda value: isinstance(value, (str, type(None)))),
        ("norms", info.get("norms", {}), _is_number),
        ("energy_error", info.get("energy_error", {}).get("weights", {}), _is_pair),
        ("shared_in_cov", info.get("shared_in_cov", {}), lambda value: isinstance(value, str)),
        ("coded", info.get("coded", {}), _is_coded),
    )
    for what, values, fits in checks:
        if not isinstance(values, dict) or not all(map(fits, values.values())):
            raise FileError(
                f"{path}: '{what}' in the metadata is not what forgetless writes there; the file "
                "is damaged, record again"
            )


def check_traces(path: str | Path, info: Mapping[str, Any]) -> None:
    """Raise FileError where the hashes of the recorded text are none."""
    if "traces" in info.get("data", {}):
        try:
            read_traces(info["data"]["traces"])
        except ValueError as error:
            raise FileError(f"{path}: {error}; the file is damaged, record again") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_coded(value: Any) -> bool:
    """Whether it is [tier, out, in]."""
    if not isinstance(value, list) or len(value) != 3:
        return False
    return isinstance(value[0], str) and all(map(_is_size, value[1:]))


def check_parts(where: str, parts: Mapping[str, Tensor]) -> None:
    """Raise FileError unless every tensor of one weight has a fitting shape and dtype and can be
    (part of) importance.
    """
    for suffix, tensor in parts.items():
        _check_kind(where, suffix, tensor)
        if suffix.endswith("_cov") and tensor.shape[0] != tensor.shape[1]:
            raise FileError(
                f"{where}{suffix} is {tuple(tensor.shape)}, expected a square covariance; "
                f"{NOT_OURS}"
            )
        # Whole covariances and eigenvectors have entries of either sign.
        _check_values(where + suffix, tensor, signed=suffix.endswith((".vectors", "_cov")))
        if suffix.endswith("_cov"):
            _check_covariance(where + suffix, tensor)
    for kind in (".out_cov", ".in_cov"):
        vectors = parts.get(f"{kind}.vectors")
        if vectors is None:
            continue
        if vectors.shape[1:] != parts.get(f"{kind}.values", vectors).shape:
            raise FileError(
                f"{where}{kind} has {vectors.shape[1]} directions and other "
                "values; the file is damaged, record again"
            )
        _check_orthonormal(f"{where}{kind}.vectors", vectors)


def _check_orthonormal(where: str, vectors: Tensor) -> None:
    """Raise FileError unless V (n, k) keeps lengths, as the energy of V diag(values) V^T takes for
    granted. A few random directions are tried, for O(n k).
    """
    V = vectors.double() if vectors.dtype == torch.float64 else vectors.float()
    tried = torch.randn(V.shape[1], 4, generator=torch.Generator().manual_seed(0)).to(V)
    error = float((V.T @ (V @ tried) - tried).norm() / tried.norm())
    if not error < NOT_ORTHONORMAL:
        raise FileError(
            f"{where} are not orthonormal (off by {error:.3g}), as eigenvectors are; the file is "
            "damaged, record again"
        )


def _check_kind(where: str, suffix: str, tensor: Tensor) -> None:
    """Dimensions, dtype, and that there is something."""
    dimensions = 2
    if suffix.endswith(".floor"):
        dimensions = 0
    elif suffix.endswith(".values"):
        dimensions = 1
    if tensor.ndim != dimensions or tensor.dtype not in IMPORTANCE_DTYPES:
        raise FileError(
            f"{where}{suffix} is {tuple(tensor.shape)} {tensor.dtype}, expected {dimensions} "
            f"dimensions in f32 or bf16; {NOT_OURS}"
        )
    if not tensor.numel():
        raise FileError(f"{where}{suffix} is empty; {NOT_OURS}")


def _check_values(where: str, values: Tensor, *, signed: bool) -> None:
    low, high = (float(end) for end in values.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise FileError(
            f"{where} has non-finite importance; record again with a lower learning rate or in f32"
        )
    if low < 0 and not signed:
        raise FileError(
            f"{where} has negative importance (down to {low:.3g}); importance is never negative, "
            "record again"
        )


def _check_covariance(where: str, matrix: Tensor) -> None:
    """A negative variance means a negative eigenvalue, which no covariance has."""
    diagonal = matrix.diagonal()
    if float(diagonal.min()) < 0:
        raise FileError(
            f"{where} has negative variances (down to {float(diagonal.min()):.3g}); {NOT_OURS}, "
            "record again"
        )
    if float((matrix - matrix.T).abs().max()) > ASYMMETRY * float(diagonal.max()):
        raise FileError(
            f"{where} is not symmetric, as covariances are; the file is damaged, record again"
        )


def check_extent(where: str, entry: Entry) -> None:
    """Raise FileError for a shape that no weight has, and where products of factors leave the range
    of f32.
    """
    out, into = entry.shape
    if not 0 < out * into <= MOST_ELEMENTS:
        raise FileError(
            f"{where} claims to be {out} x {into}, expected 1 to 2^36 elements; {NOT_OURS}"
        )
    top = _largest_product(entry)
    if not top < torch.finfo(torch.float32).max:
        raise FileError(
            f"{where} has products of up to {top:.3g}, beyond the range of f32; record again "
            "with a lower learning rate"
        )


def _largest_product(entry: Entry) -> float:
    """A bound of the largest element, without making them."""
    if isinstance(entry, FactoredEntry):
        if not entry.row.numel():
            return 0.0
        return entry.row.shape[1] * float(entry.row.max()) * float(entry.col.max())
    if isinstance(entry, KroneckerEntry):
        return float(entry.out_cov.diagonal().max()) * float(entry.in_cov.diagonal().max())
    return float(entry.values.max()) if isinstance(entry, DenseEntry) else 0.0


def check_factors(
    path: str | Path,
    entries: Mapping[str, Entry],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    what: str,
) -> None:
    """Raise FileError unless each pair is (out, k), (k, in) of its weight, in numbers."""
    for name, (L, R) in factors.items():
        fits = name in entries and L.ndim == R.ndim == 2 and L.shape[1] == R.shape[0]
        if not fits or (L.shape[0], R.shape[1]) != entries[name].shape:
            raise FileError(
                f"{path}: the {what} of '{name}' does not fit its weight; the file is damaged, "
                "record again"
            )
        for factor in (L, R):
            if factor.dtype not in FACTOR_DTYPES:
                raise FileError(
                    f"{path}: the {what} of '{name}' is of {factor.dtype}, expected f32 or bf16; "
                    "the file is damaged, record again"
                )
            if not bool(torch.isfinite(factor).all()):
                raise FileError(
                    f"{path}: the {what} of '{name}' has non-finite values; record again"
                )


def checked_calibration(
    path: str | Path,
    info: Mapping[str, Any],
    stored: Mapping[str, Any] | None,
    entries: Mapping[str, Entry],
    gradients: dict[str, tuple[Tensor, Tensor]],
) -> Calibration | None:
    """The calibration of a file that has one.

    Raises FileError where it is not what we write, or says what no measurement does.
    """
    if stored is None and not gradients:
        return None
    updates = (stored or {}).get("updates")
    data = (stored or {}).get("data", {})
    if (
        not isinstance(updates, list)
        or not all(map(_is_update, updates))
        or not isinstance(data, dict)
    ):
        raise FileError(
            f"{path}: 'calibration' in the metadata is not what forgetless writes there; the "
            "file is damaged, record again"
        )
    missing = [name for name in entries if name not in gradients]
    if missing and data.get("of") != DIVERGENCE:
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


def _is_update(value: Any) -> bool:
    """Whether it holds the numbers that a `MeasuredUpdate` needs."""
    needed = ("energy", "first", "second", "second_error")
    return isinstance(value, dict) and all(_is_number(value.get(key)) for key in needed)
