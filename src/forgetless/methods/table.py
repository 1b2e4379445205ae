"""What `--method a,b` makes of several methods: each place filled at most once, every need met, no
option ignored, and their functions loaded.

The rows are in options/methods.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from forgetless.data.own_text import KEPT, OWN_KINDS
from forgetless.errors import OptionError, nearest
from forgetless.methods.method import MethodSteps
from forgetless.options.methods import METHODS, PLACES, Method, method_names
from forgetless.options.option import flag
from forgetless.options.reference import resolved
from forgetless.options.tune import TuneOptions

# Methods that read the answers which an importance file keeps.
READ_KEPT = ("kl", "replay", "self-dialogues")


def chosen(options: TuneOptions) -> dict[str, MethodSteps]:
    """The functions of the methods that `options.method` names.

    Raises OptionError for unknown names, combinations that cannot be, missing needs and unused
    options.
    """
    for name in method_names(options.method):
        if name not in METHODS:
            raise OptionError(f"unknown method '{name}'; {nearest(name, METHODS)}")
    picked = {name: METHODS[name] for name in method_names(options.method)}
    _check_combination(picked)
    for name, method in picked.items():
        _check_options(options, name, method)
    _check_unused(options, picked)
    _check_text(options, picked)
    return {name: loaded(method) for name, method in picked.items()}


def loaded(method: Method) -> MethodSteps:
    """The functions that a row names."""
    references = {spec.name: getattr(method, spec.name) for spec in dataclasses.fields(MethodSteps)}
    return MethodSteps(**{place: name and resolved(name) for place, name in references.items()})


def _check_combination(picked: Mapping[str, Method]) -> None:
    """Raise OptionError for methods that cannot be used together."""
    if "plain" in picked and len(picked) > 1:
        raise OptionError(
            "plain is tuning without a method, found it with "
            f"{', '.join(set(picked) - {'plain'})}; leave it out"
        )
    for name, method in picked.items():
        for other, reason in method.refuses.items():
            if other in picked:
                raise OptionError(f"--method {name} and {other} cannot be combined: {reason}")
    for place in PLACES:
        filled = [name for name, method in picked.items() if getattr(method, place) is not None]
        if len(filled) > 1:
            raise OptionError(
                f"--method {' and '.join(filled)} cannot be combined: each brings its own "
                f"{place}; give one of them"
            )


def _check_options(options: TuneOptions, name: str, method: Method) -> None:
    """Raise OptionError for options that are missing or that do not fit a method."""
    missing = [need for need in method.needs if getattr(options, need) in (None, "")]
    if missing:
        advice = ""
        if "importance" in missing:
            advice = "; --importance auto takes that of the cache, recorded where it is not there"
        raise OptionError(f"--method {name} needs {' and '.join(map(flag, missing))}{advice}")
    if method.lora and options.full:
        raise OptionError(
            f"--method {name} is about adapters, found full fine-tuning; leave out full"
        )
    if method.check:
        resolved(method.check)(options)


def _check_unused(options: TuneOptions, picked: Mapping[str, Method]) -> None:
    """Raise OptionError where an option was given that only other methods read."""
    readers: dict[str, list[str]] = {}
    for name, method in METHODS.items():
        for option in (*method.needs, *method.reads):
            readers.setdefault(option, []).append(name)
    for option, methods in readers.items():
        if getattr(options, option) is not None and not set(methods) & set(picked):
            raise OptionError(
                f"{flag(option)} is not used by --method {options.method}; it is for "
                f"{', '.join(methods)}: leave it out, or add the method"
            )


def _check_kept(options: TuneOptions, picked: Mapping[str, Method]) -> None:
    """Raise OptionError where answers that an importance file keeps are asked for without one, or
    of a method that cannot use them, or where the file would not be used.
    """
    if options.replay == KEPT:
        others = [name for name, method in picked.items() if "replay" in method.needs]
        if not others or set(others) - set(READ_KEPT):
            raise OptionError(
                f"--replay {KEPT} is answers with the base's probabilities, for --method "
                f"{', '.join(READ_KEPT)}; found {', '.join(others)}; give another text"
            )
        if not options.importance:
            raise OptionError(
                f"--replay {KEPT} needs --importance FILE, made with record --keep-answers"
            )
        return
    readers = [n for n, m in picked.items() if "importance" in (*m.needs, *m.reads)]
    if options.importance and readers and set(readers) <= set(READ_KEPT):
        raise OptionError(
            f"--importance is used by --method {', '.join(readers)} where it keeps answers: give "
            "--replay "
            f"{KEPT}, add the method hold, or leave it out"
        )


def _check_text(options: TuneOptions, picked: Mapping[str, Method]) -> None:
    """Raise OptionError for text of --replay that cannot be what it is used for."""
    own = options.replay in OWN_KINDS  # of which other parts are replayed than are measured on
    if options.replay and options.replay == options.general and not own:
        raise OptionError(
            f"--replay and --general are both '{options.replay}': what is lost must be measured "
            "on other text than is trained on; give two files"
        )
    _check_kept(options, picked)
    others = [method for name, method in picked.items() if name != "kl"]
    if options.replay == "domain" and any("replay" in (*m.needs, *m.reads) for m in others):
        raise OptionError(
            f"--replay domain is for --method kl, found --method {options.method}; give general "
            "text, or 'self'"
        )
