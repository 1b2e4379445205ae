"""What is in an importance file, for programs: what `record` and `inspect` print with --json."""

from __future__ import annotations

from pathlib import Path

from forgetless.files.hub import importance_path
from forgetless.files.untrusted import JsonObject
from forgetless.importance.importance import Importance
from forgetless.options.files import InspectOptions
from forgetless.options.record import RecordOptions


def file_record(path: Path) -> JsonObject:
    """The file with its size in bytes and its tier, what it says of where it comes from (`info`),
    and shape and norm of the importance of each weight.
    """
    importance = Importance.load(path)
    calibration = importance.calibration
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "tier": importance.tier,
        "calibration": None if calibration is None else calibration.describe(),
        "info": _without_traces(importance.info),
        "weights": {
            name: {"shape": list(entry.shape), "norm": float(entry.norm())}
            for name, entry in importance.entries.items()
        },
    }


def _without_traces(info: JsonObject) -> JsonObject:
    """What a file says, without the hashes of its text, which nobody reads."""
    data = {key: value for key, value in info.get("data", {}).items() if key != "traces"}
    return {**info, "data": data} if "data" in info else info


def inspected_file(options: InspectOptions, _: object) -> JsonObject:
    """The file that `inspect` shows."""
    return file_record(importance_path(options.file))


def recorded_file(options: RecordOptions, recorded: Importance) -> JsonObject:
    """The file that `record` wrote, or found in the cache."""
    return file_record(Path(options.out or recorded.info["path"]))
