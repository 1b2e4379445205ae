"""The command line of the program and of each verb, made from the rows in verbs.py.

`--help` shows options in groups, with their defaults. A mistyped verb or option is answered with
the nearest name that there is.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from forgetless import __version__
from forgetless.errors import nearest
from forgetless.options.option import GROUPS, Given, flag
from forgetless.options.verbs import VERBS, Verb


class Parser(argparse.ArgumentParser):
    """argparse that names the nearest option."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments:"):
            wrong = message.split(":", 1)[1].split()[0]
            flags = [name for action in self._actions for name in action.option_strings]
            known = [name for name in flags if name.startswith("--")]
            message = f"unknown option '{wrong}'; {nearest(wrong, known)}"
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


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
    return parser


def verb_parser(name: str) -> argparse.ArgumentParser:
    """What reads the command line of one verb: every value that was given, as text."""
    verb = VERBS[name]
    specs = dataclasses.fields(verb.options)
    first = [str(spec.metadata["metavar"]) for spec in specs if spec.metadata["positional"]]
    parser = Parser(
        prog=f"forgetless {name}",
        usage=" ".join(["forgetless", name, *first, "[options]"]),
        argument_default=argparse.SUPPRESS,
        description=verb.help[0].upper() + verb.help[1:] + ".",
        epilog=f"example: {verb.example}",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="options from a YAML file; the command line wins"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--quiet", action="store_true", help="only warnings, errors and results")
    for group in GROUPS:
        mine = [spec for spec in specs if spec.metadata["group"] == group]
        if mine:
            section = parser.add_argument_group(group)
            for spec in mine:
                _add(section, spec, _help(verb, spec))
    return parser


def _add(section: Any, spec: dataclasses.Field, help: str) -> None:
    """Add one option. Values stay text here: `resolve` checks and converts them."""
    meta, kind = spec.metadata, str(spec.type)
    if meta["positional"]:
        section.add_argument(spec.name, nargs="?", metavar=meta["metavar"], help=help)
    elif kind.startswith("bool"):
        section.add_argument(flag(spec.name), action=argparse.BooleanOptionalAction, help=help)
    else:
        choices = "{" + ",".join(meta["choices"]) + "}" if meta["choices"] else "X"
        section.add_argument(
            flag(spec.name),
            action="append" if meta["repeated"] else "store",
            metavar=meta["metavar"] or choices,
            help=help,
        )


def _help(verb: Verb, spec: dataclasses.Field) -> str:
    """The help of an option with its default, or with what each preset sets."""
    presets: Mapping[str, Given] = verb.presets or {}
    decided = {name: values[spec.name] for name, values in presets.items() if spec.name in values}
    default = spec.default
    if decided:
        default = ", ".join(f"{name}: {value}" for name, value in decided.items())
    unsaid = default is None or default is False or default == ""
    text = spec.metadata["help"] if unsaid else f"{spec.metadata['help']} [{default}]"
    return str(text).replace("%", "%%")
