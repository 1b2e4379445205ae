"""The command line: which verb, its options checked, its function run, the exit code.

Exit codes: 0 done, 1 failed, 2 wrong options, 3 a budget or check was not met, 130 interrupted, 141
nobody reads the output any more. Results go to standard output, everything else to standard error.
Nothing heavy is imported before the options have been checked.
"""

from __future__ import annotations

import io
import logging
import os
import select
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from forgetless.errors import OptionError, nearest, printable
from forgetless.options.command_line import program_parser, verb_parser
from forgetless.options.option import read_yaml
from forgetless.options.reference import resolved
from forgetless.options.verbs import VERBS
from forgetless.report.terminal import write_message


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = next((word for word in words if not word.startswith("-")), None)
    if name is None:
        parser = program_parser()
        parser.parse_args(words)
        parser.print_help()
        return 2 if words else 0
    if name not in VERBS:
        print(f"forgetless: unknown verb '{name}'; {nearest(name, VERBS)}", file=sys.stderr)
        return 2
    words.remove(name)
    given = vars(verb_parser(name).parse_args(words))
    debug, quiet = given.pop("debug", False), given.pop("quiet", False)
    _quiet_hosts(bars=sys.stderr.isatty() and not quiet)
    _log_to_terminal(logging.WARNING if quiet else logging.INFO)
    try:
        return _performed(name, given)
    except KeyboardInterrupt:
        more = VERBS[name].interrupted
        told = "interrupted; no half-written file is left" + (f"; {more}" if more else "")
        print(f"\nforgetless {name}: {told}", file=sys.stderr)
        return 130
    except Exception as error:
        return _failed(name, error, debug=debug)


def _performed(name: str, given: dict[str, Any]) -> int:
    """The exit code of a verb that was done, its result printed where it is text."""
    verb = VERBS[name]
    if verb.alone:
        _check_launch(name)
    config = given.pop("config", None)
    options = verb.resolve({**(read_yaml(config) if config else {}), **given})
    result = verb.perform(options)
    if isinstance(result, str):
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A terminal that cannot show blocks gets question marks, not an error.
            sys.stdout.reconfigure(errors="replace")
        print(result)
    sys.stdout.flush()
    # 3 where the result does not say that the budget was met, also where it was only predicted.
    unmet = ("not shown", "exceeded", "predicted")
    return 3 if isinstance(result, dict) and result.get("verdict") in unmet else 0


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
