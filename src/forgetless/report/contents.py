"""What a report shows, as a comparison, whichever folder it comes from.

    load_contents("out/lab")    # of `forgetless compare` or `demo`: its compare.json
    load_contents("run")        # of `forgetless tune`, `eval` or `shrink`: its run.json as a
                                # comparison of one run, whose kind is "run"

Nothing is computed here that a writer measured; what a folder does not have is empty, so that the
page leaves its section out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from forgetless.errors import FileError, brief
from forgetless.files.compare_json import ComparedMethod, Comparison
from forgetless.files.run_json import Run
from forgetless.files.schema import from_json, read_plain
from forgetless.report.one_run import as_comparison

# The format of compare.json that this version writes and reads.
COMPARISON_FORMAT = 1


def load_contents(folder: str | Path) -> Comparison:
    """The contents of a folder.

    Raises ValueError where it holds nothing to report, or something of another format.
    """
    folder = Path(folder)
    if (folder / "compare.json").is_file():
        return _from_comparison(folder / "compare.json")
    if (folder / "run.json").is_file():
        return _from_run(folder / "run.json")
    what = "does not exist" if not folder.exists() else "holds no compare.json and no run.json"
    raise FileError(
        f"'{folder}' {what}; give a folder that forgetless compare, demo or tune has written"
    )


def _from_comparison(path: Path) -> Comparison:
    data = read_plain(path)
    if not isinstance(data, dict) or data.get("format") != COMPARISON_FORMAT:
        version = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise FileError(
            f"{path}: expected format {COMPARISON_FORMAT}, found {brief(version)}; make it again "
            "with this version of forgetless"
        )
    return completed(from_json(data, Comparison, str(path)))


def _from_run(path: Path) -> Comparison:
    """A run.json of any verb. Raises ValueError for one that none of them wrote."""
    data = read_plain(path)
    if (
        not isinstance(data, Mapping)
        or not isinstance(data.get("configuration"), Mapping)
        or "before" not in data
    ):
        raise FileError(
            f"{path}: expected a run of forgetless tune or eval, found other contents; run it "
            "again with this version"
        )
    return completed(as_comparison(from_json(data, Run, str(path)), path))


def completed(comparison: Comparison | Mapping[str, Any]) -> Comparison:
    """A comparison, or the data of one, with the methods that only its runs name added, so that no
    run is left out.
    """
    if not isinstance(comparison, Comparison):
        comparison = from_json(comparison, Comparison, "compare.json")
    named = {method.name for method in comparison.methods}
    names = dict.fromkeys(run.method for run in comparison.runs if run.method not in named)
    return replace(comparison, methods=[*comparison.methods, *map(ComparedMethod, names)])


def label(contents: Comparison, method: str) -> str:
    """A method's name for people."""
    labels = (str(each.label or each.name) for each in contents.methods if each.name == method)
    return next(labels, method)


def recorded_text(contents: Comparison) -> str | None:
    """The general text of the kind that importance was recorded on: the one that verdicts are
    about. None where none was measured.
    """
    texts = sorted(contents.texts, key=lambda text: text.kind != "recorded")
    return texts[0].name if texts else None


def diverges(contents: Comparison, text: str) -> bool:
    """Whether forgetting on a general text is the divergence on what the base says itself."""
    return any(each.name == text and each.diverges for each in contents.texts)


def measure_of(contents: Comparison, text: str, shown: str) -> str:
    """What forgetting on a general text is, in words; `shown` is its name as it may be shown."""
    if diverges(contents, text):
        return f"divergence from the base on its own answers ({shown})"
    return f"rise of the loss on {shown}"


def reported_part(contents: Comparison) -> str:
    """'test' where any run was measured there, else 'validation'."""
    return "test" if any(run.part == "test" for run in contents.runs) else "validation"
