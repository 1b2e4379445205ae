"""Counts what can be counted of the form of the code; tests/test_form.py holds the bounds.

    python tests/form.py [REPOSITORY]

prints the counts of the package under src/, and of the lines beside it. Lengths are in lines, a
function's from its `def` to its end; a line's is in characters, blank lines left out.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The folders whose Python files keep to the columns.
FOLDERS = ("src", "tests", "experiments", "benchmarks", "fuzz", "examples")
COLUMNS = 100

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Length:
    """How many lines something has, and where it stands."""

    lines: int
    where: str


def package(root: Path = ROOT) -> Path:
    """The one package under src/, whatever its name."""
    return next(path.parent for path in sorted((root / "src").glob("*/__init__.py")))


def modules(root: Path = ROOT) -> dict[str, str]:
    """Path within the package -> source."""
    folder = package(root)
    files = sorted(folder.rglob("*.py"))
    return {path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in files}


def file_lengths(root: Path = ROOT) -> list[Length]:
    """The files of the package, without the `__init__.py` that are empty."""
    sources = {name: source for name, source in modules(root).items() if source.strip()}
    return [Length(len(source.splitlines()), name) for name, source in sources.items()]


def functions(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """Every function and method with its name, classes before it: `Penalty.pull`."""

    def inside(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
        for child in ast.iter_child_nodes(node):
            name = f"{prefix}{getattr(child, 'name', '')}"
            if isinstance(child, Function):
                yield name, child
            named = isinstance(child, (ast.ClassDef, Function))
            yield from inside(child, f"{name}." if named else prefix)

    yield from inside(tree, "")


def function_lengths(root: Path = ROOT) -> list[Length]:
    lengths = []
    for file, source in modules(root).items():
        for name, node in functions(ast.parse(source)):
            assert node.end_lineno is not None
            lengths.append(Length(node.end_lineno - node.lineno + 1, f"{file}: {name}"))
    return lengths


def names(tree: ast.Module) -> set[str]:
    """What a module defines at its top level: functions, classes and constants, private ones too;
    not `__all__` and its like.
    """
    defined = set()
    for node in tree.body:
        if isinstance(node, (Function, ast.ClassDef)):
            defined.add(node.name)
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            for part in ast.walk(target):
                if isinstance(part, ast.Name):
                    defined.add(part.id)
    return {name for name in defined if not name.startswith("__")}


def repeated_names(root: Path = ROOT) -> dict[str, list[str]]:
    """Name -> the modules that define it, where more than one does."""
    where = defaultdict(list)
    for file, source in modules(root).items():
        for name in names(ast.parse(source)):
            where[name].append(file)
    return {name: files for name, files in sorted(where.items()) if len(files) > 1}


def late_imports(root: Path = ROOT) -> list[tuple[str, str]]:
    """(file, imported module) of every import inside a function."""
    found = set()
    for file, source in modules(root).items():
        for _, function in functions(ast.parse(source)):
            for node in ast.walk(function):
                if isinstance(node, ast.Import):
                    found |= {(file, alias.name) for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    found.add((file, node.module))
    return sorted(found)


def python_files(root: Path = ROOT) -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))


def long_lines(root: Path = ROOT) -> list[str]:
    """`file:number` of every line that is longer than the columns."""
    return [
        f"{path.relative_to(root).as_posix()}:{number}"
        for path in python_files(root)
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        if len(line) > COLUMNS
    ]


def counts(root: Path) -> Iterator[tuple[str, str]]:
    """What is printed: what is counted, and the count."""
    files, pieces = file_lengths(root), function_lengths(root)
    text = "\n".join(modules(root).values())
    widths = [len(line) for line in text.splitlines() if line.strip()]
    own = package(root).name
    late = [file for file, module in late_imports(root) if module.split(".")[0] == own]
    for kind, lengths, habit in (("file", files, 300), ("function", pieces, 45)):
        longest = max(lengths, key=lambda length: length.lines)
        yield f"{kind}s", str(len(lengths))
        yield f"median {kind}", f"{statistics.median(length.lines for length in lengths):g} lines"
        yield f"longest {kind}", f"{longest.lines} lines, {longest.where}"
        yield f"{kind}s over {habit} lines", str(sum(part.lines > habit for part in lengths))
    yield "lines", str(sum(length.lines for length in files))
    yield "mean line", f"{statistics.mean(widths):.1f} columns"
    yield f"lines over {COLUMNS} columns in src", str(sum(width > COLUMNS for width in widths))
    yield f"lines over {COLUMNS} columns anywhere", str(len(long_lines(root)))
    yield "dict[str, Any]", str(text.count("dict[str, Any]"))
    yield "names defined in several modules", str(len(repeated_names(root)))
    yield "imports of our own inside functions", f"{len(late)} in {len(set(late))} files"
    yield "fmt: skip", str(text.count("fmt: skip"))


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    for what, count in counts(root):
        print(f"{what:36} {count}")


if __name__ == "__main__":
    main()
