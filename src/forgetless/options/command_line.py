"""The command line of the program and of each verb, made from the rows in verbs.py.

`--help` shows options in groups, with their defaults. A mistyped option is answered with the one
that is meant.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import textwrap
from collections.abc import Mapping
from typing import Any, NoReturn

from forgetless import __version__
from forgetless.options.completion import SHELLS
from forgetless.options.help import OFTEN, UNDER, OneName, help_of
from forgetless.options.option import GROUPS, flag
from forgetless.options.other_names import option_meant, plain_name
from forgetless.options.verbs import VERBS, Verb

# What every verb takes beside its own options, and what is said of it.
EVERY_VERB = {
    "config": "options from a YAML file; the command line wins",
    "json": "print the result as JSON; everything else goes to standard error",
    "quiet": "only warnings, errors and results",
    "debug": "show the traceback of an error",
    "help": "show this message",
    "help_all": "show every option, with all that is to be said of it",
}


class Parser(argparse.ArgumentParser):
    """argparse that names the option that is meant."""

    def __init__(self, *args: Any, verb: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.verb = verb

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments:"):
            wrong = message.split(":", 1)[1].split()[0]
            message = unknown_option(wrong, self.verb)
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def unknown_option(wrong: str, verb: str) -> str:
    """What is said of a word that is no option of a verb."""
    if not wrong.startswith("-"):
        return f"'{wrong}' is one word too many; options begin with --"
    fields = VERBS[verb].options.__dataclass_fields__ if verb else {}
    known = difflib.get_close_matches(plain_name(wrong), EVERY_VERB, n=1, cutoff=0.8)
    meant = f"did you mean '{flag(known[0])}'?" if known else option_meant(wrong, fields)
    others = [each for each, row in VERBS.items() if plain_name(wrong) in _names_of(row)]
    said = f"unknown option '{wrong}'"
    if others:
        said += f", which {' and '.join(others)} {'has' if len(others) == 1 else 'have'}"
    return f"{said}; {meant or f'forgetless {verb} --help-all shows all'.replace('  ', ' ')}"


def _names_of(verb: Verb) -> set[str]:
    return set(verb.options.__dataclass_fields__)


def program_parser() -> argparse.ArgumentParser:
    """What reads a command line without a verb."""
    lines = "\n".join(f"  {name:<9} {verb.help}" for name, verb in VERBS.items())
    parser = Parser(
        prog="forgetless",
        description="Fine-tune language models without forgetting what they know.",
        epilog=f"verbs:\n{lines}\n\nforgetless VERB --help says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="forgetless VERB ...",
    )
    parser.add_argument("--version", action="version", version=f"forgetless {__version__}")
    parser.add_argument(
        "--completion",
        choices=SHELLS,
        metavar="SHELL",
        help=f"print what completes verbs and options in {', '.join(SHELLS)}",
    )
    return parser


def verb_parser(name: str, *, full: bool = False) -> argparse.ArgumentParser:
    """What reads the command line of one verb: every value that was given, as text.

    With `full` its help shows every option, else those that most people need.
    """
    verb = VERBS[name]
    specs = dataclasses.fields(verb.options)
    often = {spec.name: "" for spec in specs} if full else OFTEN.get(name)
    first = [str(spec.metadata["metavar"]) for spec in specs if spec.metadata["positional"]]
    parser = Parser(
        verb=name,
        prog=f"forgetless {name}",
        usage=" ".join(["forgetless", name, *first, "[options]"]),
        argument_default=argparse.SUPPRESS,
        description=verb.help[0].upper() + verb.help[1:] + ".",
        epilog=_epilog(name, full=often is None or full),
        allow_abbrev=False,
        add_help=False,
        formatter_class=OneName,
    )
    for heading in dict.fromkeys(map(_heading, GROUPS)):
        mine = [spec for spec in specs if _heading(spec.metadata["group"]) == heading]
        section = parser.add_argument_group(heading)
        for spec in sorted(mine, key=lambda spec: _order(often, spec.name)):
            shown = often is None or spec.name in often
            brief = (often or {}).get(spec.name, "")
            text = help_of(verb, spec, brief, full=full) if shown else argparse.SUPPRESS
            _add(section, spec, text, choices=not brief)
    _add_common(parser, verb, shown=often is None or full)
    return parser


def _epilog(name: str, *, full: bool) -> str:
    """What stands under the options."""
    verb = VERBS[name]
    example = textwrap.fill(f"example: {verb.example}", 78, subsequent_indent="  ")
    if full:
        return example
    common = ["--config FILE.yaml", *(["--json"] if verb.reports is not None else [])]
    common = [*common, "--quiet", "--debug"]
    count = len(dataclasses.fields(verb.options))
    return f"{example}\nalso: {', '.join(common)}; all {count}: --help-all"


def _heading(group: str) -> str:
    """Under which heading a group of options stands."""
    return UNDER.get(group, group)


def _order(often: Mapping[str, str] | None, name: str) -> int:
    """Where an option stands in its group: those of a short help as they are named there."""
    names = list(often or ())
    return names.index(name) if name in names else len(names)


def _add_common(parser: argparse.ArgumentParser, verb: Verb, *, shown: bool) -> None:
    """Add what every verb takes; a short help says it in a line of its own."""
    said = {name: text if shown else argparse.SUPPRESS for name, text in EVERY_VERB.items()}
    section = parser.add_argument_group("every verb")
    section.add_argument("--config", metavar="FILE.yaml", help=said["config"])
    if verb.reports is not None:
        section.add_argument("--json", action="store_true", help=said["json"])
    for name in ("quiet", "debug"):
        section.add_argument(flag(name), action="store_true", help=said[name])
    section.add_argument("-h", "--help", action="help", help=said["help"])
    section.add_argument("--help-all", action="store_true", help=said["help_all"])


def _add(section: Any, spec: dataclasses.Field, help: str, *, choices: bool) -> None:
    """Add one option, with its choices where its help does not say them.

    Values stay text here: `resolve` checks and converts them.
    """
    meta, kind = spec.metadata, str(spec.type)
    if meta["positional"]:
        section.add_argument(spec.name, nargs="?", metavar=meta["metavar"], help=help)
    elif kind.startswith("bool"):
        section.add_argument(flag(spec.name), action=argparse.BooleanOptionalAction, help=help)
    else:
        value = "N" if kind.startswith("int") else "X"
        if choices and meta["choices"]:
            value = "{" + ",".join(meta["choices"]) + "}"
        section.add_argument(
            flag(spec.name),
            action="append" if meta["repeated"] else "store",
            metavar=meta["metavar"] or value,
            help=help,
        )
