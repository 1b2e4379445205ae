"""The command line: which verb, its options checked, its function run, the exit code.

Exit codes: 0 done, 1 failed, 2 wrong options, 3 a budget or check was not met, 130 interrupted, 141
nobody reads the output any more. Results go to standard output, as JSON with --json, everything
else to standard error.
Nothing heavy is imported before the options have been checked.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import select
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from forgetless.errors import OptionError, printable
from forgetless.files.run_json import EXPLODED, FAILED
from forgetless.options.command_line import program_parser, verb_parser
from forgetless.options.completion import completion
from forgetless.options.option import read_yaml
from forgetless.options.other_names import in_our_words, verb_meant
from forgetless.options.reference import resolved
from forgetless.options.verbs import VERBS
from forgetless.report.terminal import say, write_message


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    _open_closed_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = next((word for word in words if not word.startswith("-")), None)
    if name is None or words[0] == "--completion":
        return _without_verb(words)
    if name not in VERBS:
        print(f"forgetless: unknown verb '{name}'; {verb_meant(name, VERBS)}", file=sys.stderr)
        return 2
    words.remove(name)
    if "--help-all" in words:
        verb_parser(name, full=True).print_help()
        return 0
    words = in_our_words(words, VERBS[name].options.__dataclass_fields__)
    given = vars(verb_parser(name).parse_intermixed_args(words))
    debug = given.pop("debug", False)
    manner = Speech(quiet=given.pop("quiet", False), json=_takes_json(name, given))
    _quiet_hosts(bars=sys.stderr.isatty() and not manner.quiet)
    _log_to_terminal(logging.WARNING if manner.quiet else logging.INFO)
    try:
        return _performed(name, given, manner)
    except KeyboardInterrupt:
        more = VERBS[name].interrupted
        told = "interrupted; no half-written file is left" + (f"; {more}" if more else "")
        print(f"\nforgetless {name}: {told}", file=sys.stderr)
        return 130
    except Exception as error:
        return _failed(name, error, debug=debug)


def _open_closed_streams() -> None:
    """Standard output or error that was closed (`>&-`) goes nowhere: what is printed would be an
    error, or end up in the file that is opened next.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (to the very end)
            setattr(sys, name, nowhere)


@dataclass(frozen=True)
class Speech:
    """How a verb is to talk: only warnings, errors and results; results as JSON."""

    quiet: bool
    json: bool


def _without_verb(words: list[str]) -> int:
    """The exit code of a command line that names no verb."""
    parser = program_parser()
    given = parser.parse_args(words)
    if given.completion:
        print(completion(given.completion), end="")
        return 0
    parser.print_help()
    return 2 if words else 0


def _takes_json(name: str, given: dict[str, Any]) -> bool:
    """Whether the result is to be printed as JSON here; `plan` does it itself."""
    return VERBS[name].reports is not None and bool(given.pop("json", False))


def _performed(name: str, given: dict[str, Any], manner: Speech) -> int:
    """The exit code of a verb that was done, its result printed."""
    verb = VERBS[name]
    if verb.alone:
        _check_launch(name)
    config = given.pop("config", None)
    options = verb.resolve({**(read_yaml(config) if config else {}), **given})
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show blocks gets question marks, not an error.
        sys.stdout.reconfigure(errors="replace")
    if manner.json:
        with contextlib.redirect_stdout(io.StringIO() if manner.quiet else sys.stderr):
            result = verb.perform(options)
            shown = result if not verb.reports else resolved(verb.reports)(options, result)
        if _speaks():
            print(json.dumps(shown, indent=1))
    else:
        result = verb.perform(options)
        if isinstance(result, str):
            print(result)
    sys.stdout.flush()
    if verb.then is not None and _speaks() and (command := verb.then(options)):
        say(f"next: {command}")
    return exit_code(result)


def _speaks() -> bool:
    """Whether this is the process that speaks, among those that a launcher started."""
    return bool(resolved("forgetless.files.lock:first_process")())


def exit_code(result: Any) -> int:
    """3 where the result does not say that the budget was met, also where it was only predicted;
    1 where the loss exploded, and where a run of a comparison failed.
    """
    if not isinstance(result, dict):
        return 0
    if any(EXPLODED in entry for entry in result.get("log") or []):
        return 1
    if any(run.get("status") == FAILED for run in result.get("runs") or []):
        return 1
    if result.get("gate"):
        return 0 if result["gate"]["passed"] else 3
    return 3 if result.get("verdict") in ("not shown", "exceeded", "predicted") else 0


def _failed(name: str, error: Exception, *, debug: bool) -> int:
    """The exit code of a verb that failed, the reason printed."""
    if isinstance(error, BrokenPipeError) and _reader_has_gone():
        return 128 + 13  # as a shell names the end by SIGPIPE
    if debug:
        traceback.print_exc()
    told = terminal_text(error)
    if not isinstance(error, (ValueError, OSError)) and not debug:
        told += f" ({type(error).__name__}; run again with --debug for the traceback)"
    print(f"forgetless {name}: {told}", file=sys.stderr)
    return 2 if isinstance(error, OptionError) else 1


def terminal_text(text: object) -> str:
    """What goes to a terminal: lines without control characters, since they may quote what stands
    in files.
    """
    return "\n".join(printable(line, longest=4000) for line in str(text).split("\n"))


class Printable(logging.Formatter):
    """Messages as `terminal_text` makes them."""

    def format(self, record: logging.LogRecord) -> str:
        return terminal_text(super().format(record))


def _log_to_terminal(level: int) -> None:
    """What the program logs goes to standard error, from `level` on; of others only warnings."""
    logging.basicConfig(level=logging.WARNING, handlers=[AboveBars()])
    for handler in logging.getLogger().handlers:
        handler.setFormatter(Printable("%(message)s"))
    logging.getLogger("forgetless").setLevel(level)


class AboveBars(logging.Handler):
    """Messages on standard error, above the bars where some are drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            write_message(self.format(record))
        except Exception:
            self.handleError(record)


def _quiet_hosts(*, bars: bool) -> None:
    """Silence the hosts' progress bars where nobody watches, and their announcements of what they
    will rename.
    """
    if not bars:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        if "transformers" in sys.modules:  # which read the environment when it was imported
            resolved("transformers.utils.logging:disable_progress_bar")()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # On a CPU it announces a kernel that it can do without.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _check_launch(verb: str) -> None:
    """Raise OptionError where several processes would each do all of the work.

    They would write into the same files.
    """
    if "WORLD_SIZE" not in os.environ:
        return
    if resolved("forgetless.model.distributed:launched")():
        raise OptionError(
            f"{verb} works in one process, found {os.environ['WORLD_SIZE']}: start it without "
            "torchrun or accelerate launch; record and tune share their work"
        )


def _reader_has_gone() -> bool:
    """Whether nobody reads standard output any more (`forgetless inspect FILE | head`).

    It then goes nowhere, so that closing it says nothing either. A pipe that broke elsewhere, as of
    a connection, is an error like any other.
    """
    if hasattr(select, "poll"):
        watch = select.poll()
        watch.register(sys.stdout, select.POLLOUT)
        if not any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0)):
            return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True
