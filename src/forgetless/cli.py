"""The verbs. Each is made from its options dataclass; nothing heavy is imported before an option
has been checked.

Exit codes: 0 done, 1 failed, 2 wrong options, 3 a budget or check was not met, 130 interrupted, 141
nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import logging
import os
import select
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from forgetless.errors import OptionError, nearest, printable
from forgetless.options.estimators import ESTIMATORS
from forgetless.options.option import read_yaml, several
from forgetless.options.record import RECORD_PRESETS, RecordOptions
from forgetless.options.tune import TUNE_PRESETS, TuneOptions
from forgetless.options.verbs import (
    CompareOptions,
    DemoOptions,
    EvalOptions,
    PlanOptions,
    ReportOptions,
    ShrinkOptions,
    resolve,
)

ALONE = (
    "eval",
    "compare",
    "shrink",
    "report",
    "convert",
    "merge",
    "demo",
)  # verbs that write, and don't share work between processes
VERBS: dict[str, tuple[str, str]] = {
    "record": (
        "record what matters in a base model, once, into an importance file",
        "forgetless record MODEL --general wiki.jsonl --out model.importance.safetensors",
    ),
    "plan": (
        "say what recording and tuning will take: bytes, memory, time",
        "forgetless plan MODEL --tier kronecker:16 --processes 4",
    ),
    "tune": (
        "fine-tune on domain data while holding it",
        "forgetless tune MODEL --data domain.jsonl --importance model.importance.safetensors "
        "--out run",
    ),
    "eval": (
        "measure what was learned and what was lost",
        "forgetless eval MODEL --adapter run/final --general held-out.jsonl --tasks sciq",
    ),
    "compare": (
        "run every method of an experiment and put them on one frontier",
        "forgetless compare experiment.yaml --out comparison",
    ),
    "shrink": (
        "make a finished adapter keep a forgetting budget",
        "forgetless shrink ADAPTER --importance model.importance.safetensors --budget 1% "
        "--general held-out.jsonl --out shrunk",
    ),
    "report": (
        "show a comparison or a run as one self-contained page, or as markdown",
        "forgetless report forgetless-demo",
    ),
    "convert": (
        "bring an importance file into another form",
        "forgetless convert full.safetensors --tier kronecker:16 --out small.safetensors",
    ),
    "inspect": (
        "show what is in an importance file",
        "forgetless inspect model.importance.safetensors",
    ),
    "merge": ("merge an adapter into its base model", "forgetless merge run/final --out merged"),
    "demo": (
        "run the whole method on the embedded model and world, in minutes",
        "forgetless demo --seeds 3",
    ),
}
POSITIONAL = {
    "inspect": "FILE",
    "convert": "FILE",
    "merge": "ADAPTER",
    "shrink": "ADAPTER",
    "demo": "",
    "compare": "EXPERIMENT.yaml",
    "report": "DIR",
}
NEEDED = {
    "record": ("model", "general", "out"),
    "tune": ("model", "data", "out"),
    "eval": ("model",),
    "plan": ("model",),
    "shrink": ("adapter", "out"),
    "demo": ("out",),
    "compare": ("experiment", "out"),
    "report": ("folder",),
}
OPTIONS: dict[str, tuple[Any, dict[str, dict[str, Any]] | None]] = {
    "record": (RecordOptions, RECORD_PRESETS),
    "tune": (TuneOptions, TUNE_PRESETS),
    "eval": (EvalOptions, None),
    "plan": (PlanOptions, None),
    "compare": (CompareOptions, None),
    "shrink": (ShrinkOptions, None),
    "demo": (DemoOptions, None),
    "report": (ReportOptions, None),
}


class Parser(argparse.ArgumentParser):
    """argparse that names the nearest option or verb."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments:"):
            wrong = message.split(":", 1)[1].split()[0]
            known = [
                flag
                for action in self._actions
                for flag in action.option_strings
                if flag.startswith("--")
            ]
            message = f"unknown option '{wrong}'; {nearest(wrong, known)}"
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def shown(text: object) -> str:
    """What goes to a terminal: lines without control characters, since they may quote what stands
    in files.
    """
    return "\n".join(printable(line, longest=4000) for line in str(text).split("\n"))


class Printable(logging.Formatter):
    """Messages as `shown` makes them."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    verb = next((word for word in words if not word.startswith("-")), None)
    if verb is not None and verb not in VERBS:
        print(f"forgetless: unknown verb '{verb}'; {nearest(verb, VERBS)}", file=sys.stderr)
        return 2
    parser = _parser()
    if verb is None:
        parser.parse_args(words)
        parser.print_help()
        return 2 if words else 0
    place = words.index(verb)
    given = vars(_verb_parser(verb).parse_args(words[:place] + words[place + 1 :]))
    debug, quiet = given.pop("debug", False), given.pop("quiet", False)
    _quiet_hosts()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    for handler in logging.getLogger().handlers:
        handler.setFormatter(Printable("%(message)s"))
    logging.getLogger("forgetless").setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        _check_launch(verb)
        status = _status(_action(verb, given)())
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        more = (
            "; --resume goes on from the last saved state"
            if verb in ("record", "tune")
            else "; the same command goes on"
            if verb == "compare"
            else ""
        )
        print(
            f"\nforgetless {verb}: interrupted; no half-written file is left{more}", file=sys.stderr
        )
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            return 128 + 13  # as a shell names the end by SIGPIPE
        if debug:
            traceback.print_exc()
        expected = isinstance(error, (ValueError, OSError))
        hint = (
            ""
            if expected or debug
            else f" ({type(error).__name__}; run again with --debug for the traceback)"
        )
        print(f"forgetless {verb}: {shown(error)}{hint}", file=sys.stderr)
        return 2 if isinstance(error, OptionError) else 1


def _check_launch(verb: str) -> None:
    """Raise OptionError where several processes would each do all of the work, into the same files."""
    if verb not in ALONE or "WORLD_SIZE" not in os.environ:
        return
    from forgetless.model.distributed import launched

    if launched():
        raise OptionError(
            f"{verb} works in one process, found {os.environ['WORLD_SIZE']}: start it without "
            "torchrun or accelerate launch; "
            "record and tune share their work"
        )


def _reader_has_gone() -> bool:
    """Whether nobody reads standard output any more (`forgetless inspect FILE | head`); it then
    goes nowhere, so that closing it says nothing either.
    """
    if hasattr(
        select, "poll"
    ):  # a pipe that broke elsewhere, as of a connection, is an error like any other
        watch = select.poll()
        watch.register(sys.stdout, select.POLLOUT)
        if not any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0)):
            return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _quiet_hosts() -> None:
    """Silence the hosts' progress bars where nobody watches, and their announcements of what they
    will rename.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # on a CPU it announces a kernel that it can do without


def _status(result: Any) -> int:
    """3 where the result does not say that the budget was met, also where it was only predicted."""
    return (
        3
        if isinstance(result, dict)
        and result.get("verdict") in ("not shown", "exceeded", "predicted")
        else 0
    )


def _action(verb: str, given: dict[str, Any]) -> Callable[[], Any]:
    """What the verb does, with its options checked."""
    if verb == "inspect":
        from forgetless.importance.importance import describe_file

        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(
                errors="replace"
            )  # a terminal that cannot show blocks gets question marks, not an error
        from forgetless.files.hub import importance_path

        return lambda: print(describe_file(importance_path(given["file"])))
    if verb == "convert":
        from forgetless.files.hub import importance_path
        from forgetless.importance.importance import convert

        return lambda: convert(importance_path(given["file"]), given["tier"], given["out"])
    if verb == "merge":
        from forgetless.tune.merge import merge

        return lambda: merge(given["adapter"], given["out"], dtype=given.get("dtype"))
    kind, presets = OPTIONS[verb]
    config = given.pop("config", None)
    options = resolve(kind, {**(read_yaml(config) if config else {}), **given}, presets)
    needed = [
        name
        for name in NEEDED[verb]
        if name != "general" or not ESTIMATORS[options.estimator].constant
    ]
    missing = [name for name in needed if not getattr(options, name)]
    if missing:
        names = [
            POSITIONAL.get(verb, "MODEL")
            if name in ("model", "adapter", "experiment", "folder")
            else "--" + name
            for name in missing
        ]
        raise OptionError(f"missing {', '.join(names)}; for example: {VERBS[verb][1]}")
    if verb == "eval" and not (options.general or options.data or options.tasks):
        raise OptionError("nothing to measure: give --general TEXT, --data DATA or --tasks NAMES")
    if verb == "record":
        from forgetless.record.record import record

        return lambda: record(options)
    if verb == "tune" and (options.after or len(several(options.data)) > 1):
        from forgetless.sequence.sequence import tune_in_turn

        return lambda: tune_in_turn(options)
    if verb == "tune":
        from forgetless.tune.tune import tune

        return lambda: tune(options)
    if verb == "compare":
        from forgetless.compare.compare import compare

        return lambda: compare(options)
    if verb == "shrink":
        from forgetless.budget.shrink import shrink

        return lambda: shrink(options)
    if verb == "plan":
        from forgetless.plan import plan

        return lambda: plan(options)
    if verb == "demo":
        from forgetless.demo.run import demo

        return lambda: demo(options)
    if verb == "report":
        from forgetless.report.page import report

        return lambda: report(options)
    from forgetless.evaluate.evaluate import evaluate

    return lambda: evaluate(options)


def _parser() -> argparse.ArgumentParser:
    lines = "\n".join(f"  {verb:<9} {text}" for verb, (text, _) in VERBS.items())
    parser = Parser(
        prog="forgetless",
        description="Fine-tune language models without forgetting what they know.",
        epilog=f"verbs:\n{lines}\n\nforgetless VERB --help says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="forgetless VERB ...",
    )
    parser.add_argument("--version", action="version", version=_version())
    return parser


def _version() -> str:
    from forgetless import __version__

    return f"forgetless {__version__}"


def _verb_parser(verb: str) -> argparse.ArgumentParser:
    text, example = VERBS[verb]
    usage = " ".join(f"forgetless {verb} {POSITIONAL.get(verb, 'MODEL')} [options]".split())
    parser = Parser(
        prog=f"forgetless {verb}",
        usage=usage,
        argument_default=argparse.SUPPRESS,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example: {example}",
        allow_abbrev=False,
    )
    if verb == "inspect":
        parser.add_argument(
            "file", metavar="FILE", help="importance file, its folder or a Hub name"
        )
    elif verb == "convert":
        parser.add_argument(
            "file", metavar="FILE", help="importance file, its folder or a Hub name"
        )
        parser.add_argument(
            "--tier",
            required=True,
            metavar="TIER",
            help="f32, bf16, u8, u4, factored[:K], kronecker[:K]",
        )
        parser.add_argument("--out", required=True, metavar="FILE", help="importance file to write")
    elif verb == "merge":
        parser.add_argument("adapter", metavar="ADAPTER", help="adapter folder")
        parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
        parser.add_argument("--dtype", help="dtype of the merged weights; default: the base's")
    else:
        kind, presets = OPTIONS[verb]
        for spec in dataclasses.fields(kind):
            _add(parser, spec, presets)
        parser.add_argument(
            "--config", metavar="FILE.yaml", help="options from a YAML file; the command line wins"
        )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--quiet", action="store_true", help="only warnings, errors and results")
    return parser


def _add(
    parser: argparse.ArgumentParser, spec: Any, presets: dict[str, dict[str, Any]] | None
) -> None:
    meta, flag, kind = spec.metadata, "--" + spec.name.replace("_", "-"), str(spec.type)
    decided = {
        name: values[spec.name] for name, values in (presets or {}).items() if spec.name in values
    }
    shown = (
        ", ".join(f"{name}: {value}" for name, value in decided.items())
        if decided
        else spec.default
    )
    text = meta["help"] + ("" if shown in (None, "", False) else f" [{shown}]")
    if meta["positional"]:
        parser.add_argument(spec.name, nargs="?", metavar=meta["metavar"], help=text)
    elif kind.startswith("bool"):
        parser.add_argument(
            flag, action=argparse.BooleanOptionalAction, help=text.replace("%", "%%")
        )
    else:
        # Values stay text here: `config.resolve` checks and converts them, whether they come from a flag or
        # from YAML.
        named = meta["metavar"] or (
            "{" + ",".join(meta["choices"]) + "}" if meta["choices"] else "X"
        )
        parser.add_argument(
            flag,
            action="append" if meta["repeated"] else "store",
            metavar=named,
            help=text.replace("%", "%%"),
        )


if __name__ == "__main__":
    sys.exit(main())
