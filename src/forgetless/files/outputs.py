"""What a run may write over: nothing that it reads, and nothing that we did not write.

    claim(Path("run"), "tune", ("run.json", "final"), inputs)    # a folder: the names in it
    check_new_file(Path("i.safetensors"), is_importance, inputs) # a file

In every folder that we write lies a mark, MARK, that lists what is ours there:

    {"wrote": {"run.json": "tune", "final": "tune"}}

So a folder of somebody else is never taken for a run, whatever files it holds, and what stands
under a name of ours without being listed is refused and stays, with --overwrite too. A single file
is ours where its content says so. `inputs` are the files that the options name (`local_inputs`):
an output that is one of them, or that one lies in, is refused before any work.
"""

from __future__ import annotations

import dataclasses
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from forgetless.errors import FileError, OptionError
from forgetless.files.atomic import read_json, write_json
from forgetless.files.room import check_output_file

# The file that lists what is ours in a folder: name -> the verb that wrote it.
MARK = ".forgetless.json"
# The options of a run, or the experiment of a comparison, as they were filled up: valid as --config
# and as EXPERIMENT. No file that people write by hand is called so.
RESOLVED = "resolved.yaml"
# Commas that the name of an input may have, where several names stand in one value.
MOST_COMMAS = 8
# What an output must not be: how an input is given on the command line -> where it lies.
ReadPlaces = Mapping[str, Path]


def local_inputs(options: Any) -> dict[str, Path]:
    """The files and folders of this machine that a verb's options say it will read.

    Which options name inputs stands in their rows (`reads`); a value may have several, with commas
    and as name=file. Names of the Hub and of tasks are left out.
    """
    given = {}
    for spec in dataclasses.fields(options):
        value = getattr(options, spec.name)
        if spec.metadata.get("reads") and value:
            positional = spec.metadata.get("positional")
            given[str(value)] = "" if positional else "--" + spec.name.replace("_", "-") + " "
    return local_paths(given)


def local_paths(given: Mapping[str, str]) -> dict[str, Path]:
    """The files and folders of this machine among values of options (value -> what stands before it
    on the command line), as `claim` takes them.
    """
    there = {}
    for value, flag in given.items():
        for text in _stretches_of(value):
            for name in (text.strip(), text.strip().partition("=")[2]):
                if name and (path := Path(name).expanduser()).exists():
                    there[f"{flag}'{name}'"] = path.resolve()
    return there


def _stretches_of(value: str) -> Iterator[str]:
    """What a value may name: all of it, and each stretch between two commas, since the name of a
    file may have commas itself.
    """
    yield value
    parts = value.split(",")
    for first in range(len(parts)):
        for last in range(first + 1, min(len(parts), first + MOST_COMMAS) + 1):
            yield ",".join(parts[first:last])


def claim(folder: str | Path, verb: str, names: Collection[str], inputs: ReadPlaces) -> None:
    """Check that `verb` may write `names` in `folder`, and mark them as ours.

    Raises OptionError where an input would be written over, ValueError where something that `verb`
    did not write stands under one of the names.
    """
    folder = Path(folder)
    check_claim(folder, verb, names, inputs)
    known = ours_in(folder)
    ours = {**known, **dict.fromkeys(names, verb)}
    if ours != known:
        write_json(folder / MARK, {"wrote": ours})


def check_claim(folder: str | Path, verb: str, names: Collection[str], inputs: ReadPlaces) -> None:
    """The checks of `claim`, without writing anything."""
    folder = Path(folder)
    for name in names:
        _check_no_input(folder / name, inputs)
    for said, place in inputs.items():
        if place == folder.resolve():
            raise OptionError(
                f"{said} is the folder that --out names, and an input is never written to; give "
                "another --out"
            )
    known = ours_in(folder)
    for name in sorted(names):
        if not _stands(folder / name) or known.get(name) == verb:
            continue
        wrote = f"forgetless {known[name]}" if name in known else "not forgetless"
        raise ValueError(
            f"'{folder / name}' is there, and {wrote} wrote it, while {verb} would write over it "
            f"(what is ours is listed in {MARK}); give another --out, or move it away"
        )


def ours_in(folder: str | Path) -> dict[str, str]:
    """What is ours in a folder: name -> the verb that wrote it. Raises FileError for a broken
    mark.
    """
    path = Path(folder) / MARK
    if not path.is_file():
        return {}
    content = read_json(path)
    wrote = content.get("wrote") if isinstance(content, dict) else None
    if not isinstance(wrote, dict) or not all(map(_is_entry, wrote.items())):
        raise FileError(
            f"{path}: expected a list of what forgetless wrote there, found something else; remove "
            "it, and nothing in the folder is taken for ours"
        )
    return dict(wrote)


def _is_entry(entry: tuple[Any, Any]) -> bool:
    """Whether a mark's entry is the name of something in its folder, and a verb."""
    name, verb = entry
    return isinstance(verb, str) and name not in ("", ".", "..") and Path(name).name == name


def check_new_file(path: str | Path, is_ours: Callable[[Path], bool], inputs: ReadPlaces) -> None:
    """Check that a file may be written at `path`: nothing stands there, or an empty file, or one
    that `is_ours`.

    Raises OptionError where it is an input, ValueError where it is foreign or cannot be written.
    """
    path = Path(path)
    check_output_file(path)
    _check_no_input(path, inputs)
    if not _stands(path):
        return
    status = path.lstat() if not path.exists() else path.stat()
    regular = stat.S_ISREG(status.st_mode)
    if not regular or (status.st_size > 0 and not is_ours(path)):
        kind = "is a file that forgetless did not write" if regular else "is no regular file"
        raise ValueError(f"'{path}' {kind}, and would be lost; give another --out, or move it away")


def _check_no_input(output: Path, inputs: ReadPlaces) -> None:
    """Raise OptionError where an input is what would be written, or lies in it."""
    place = output.resolve()
    for said, path in inputs.items():
        if path == place or place in path.parents:
            raise OptionError(
                f"{said} lies where this run writes ('{output}'), and an input is never written "
                "to; give another --out, or move the input"
            )


def _stands(path: Path) -> bool:
    """Whether anything is there, a dangling link too."""
    return path.exists() or path.is_symlink()
