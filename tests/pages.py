"""What stands in README and docs to be typed, and whether it is valid."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from forgetless.options.command_line import verb_parser
from forgetless.options.option import read_yaml
from forgetless.options.verbs import VERBS

ROOT = Path(__file__).parents[1]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)


def shell_lines(page: Path) -> list[str]:
    """The command lines of a page, those that go on after a backslash as one."""
    shell = [*blocks(page, "sh"), *blocks(page, "bash")]
    return [line for block in shell for line in block.replace("\\\n", " ").splitlines()]


def check_shell(line: str) -> None:
    """A line of forgetless resolves to options; a script that is run exists."""
    words = shlex.split(line, comments=True)
    if not words or words[:2] == ["python", "-m"]:
        return
    if words[0] == "forgetless":
        verb, *given = words[1:]
        options = vars(verb_parser(verb).parse_args(given))
        file = options.pop("config", None)
        VERBS[verb].resolve({**(read_yaml(ROOT / file) if file else {}), **options})
    if words[0] == "python":
        assert (ROOT / words[1]).is_file(), line
