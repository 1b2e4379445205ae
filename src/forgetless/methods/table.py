"""Every method by its name, and what `--method a,b` makes of several: each place filled at most
once, every need met, no option ignored.

docs/methods.md has a card for each: formula, paper, cost, what it needs, when to use it.
"""

from __future__ import annotations

from collections.abc import Mapping

from forgetless.errors import OptionError, nearest
from forgetless.methods import adapters, control, laplace, orthogonal, pulls, scaling, terms
from forgetless.methods.method import Method
from forgetless.options.tune import TuneOptions

PLACES = ("adapter", "optimizer", "pull", "finish")  # at most one method fills each; terms add up
PULLS = ("hold", "ewc-lora", "la-lora", "l2", "shuffled")
NOT_LORA = {
    **dict.fromkeys(
        (*PULLS, "lora-fa", "o-lora", "rslora", "wise"),
        "its update is not the product of two LoRA factors",
    ),
    "full": "it is an adapter",
}
ALONE = dict.fromkeys(
    (*PULLS, "kl", "replay"),
    "it is the control without a penalty and without general text while tuning",
)
MOVES = dict.fromkeys(
    (*PULLS, "kl", "wise", "lora-fa", "o-lora"),
    "corda starts by taking directions out of the base weight, so its factors are not the update",
)
METHODS: dict[str, Method] = {
    "plain": Method(),
    "rslora": Method(check=adapters.needs_lora("rslora")),  # config.METHOD_SETTINGS
    "full": Method(),  # likewise
    "small-lr": Method(),  # likewise
    "hold": Method(needs=("importance",), reads=("strength",), pull=pulls.from_file),
    "kl": Method(
        needs=("replay",),
        reads=("replay_documents", "kl_weight", "kl_sequences"),
        loss=terms.kl_term,
    ),
    "replay": Method(
        needs=("replay",), reads=("replay_documents", "replay_share"), loss=terms.replay_term
    ),
    "wise": Method(reads=("scale", "max_forgetting"), check=scaling.check, finish=scaling.wise),
    "ewc-lora": Method(
        reads=("importance", "replay", "replay_documents", "strength"),
        check=pulls.needs_fisher,
        pull=pulls.ewc_lora,
    ),
    "la-lora": Method(
        needs=("replay", "strength"),
        reads=("replay_documents",),
        check=adapters.needs_lora("la-lora"),
        pull=laplace.la_lora,
    ),
    "l2": Method(needs=("strength",), check=pulls.no_file, pull=pulls.l2),
    "shuffled": Method(needs=("importance",), reads=("strength",), pull=pulls.of_shuffled),
    "o-lora": Method(
        needs=("earlier",),
        reads=("orthogonality",),
        check=orthogonal.check,
        loss=orthogonal.o_lora,
        refuses={"lora-fa": "it freezes A, the factor that o-lora turns"},
    ),
    "general-steps": Method(
        needs=("replay",),
        reads=("replay_documents", "general_steps"),
        start=control.general_steps,
        refuses=ALONE,
    ),
    "oft": Method(check=adapters.needs_lora("oft"), adapter=adapters.oft, refuses=NOT_LORA),
    "osf": Method(
        check=adapters.needs_whole_weights("osf"), adapter=adapters.osf, refuses=NOT_LORA
    ),
    "corda": Method(
        needs=("replay",),
        reads=("replay_documents",),
        check=adapters.needs_whole_weights("corda"),
        adapter=adapters.corda,
        save=adapters.save_as_lora,
        refuses=MOVES,
    ),
    "lora-fa": Method(check=adapters.needs_lora("lora-fa"), optimizer=adapters.lora_fa),
}


def chosen(options: TuneOptions) -> dict[str, Method]:
    """The methods that `options.method` names.

    Raises OptionError for unknown names, combinations that cannot be, missing needs and unused
    options.
    """
    names = [name.strip() for name in (options.method or "").split(",") if name.strip()]
    for name in names:
        if name not in METHODS:
            raise OptionError(f"unknown method '{name}'; {nearest(name, METHODS)}")
    picked = {name: METHODS[name] for name in names}
    _check_combination(picked)
    for name, method in picked.items():
        missing = [need for need in method.needs if getattr(options, need) in (None, "")]
        if missing:
            raise OptionError(f"--method {name} needs {' and '.join(map(_flag, missing))}")
        if method.check:
            method.check(options)
    _check_unused(options, picked)
    if options.replay and options.replay == options.general:
        raise OptionError(
            f"--replay and --general are both '{options.replay}': what is lost must be measured "
            "on other text than is trained on; give two files"
        )
    if options.replay == "domain" and any(
        "replay" in (*method.needs, *method.reads)
        for name, method in picked.items()
        if name != "kl"
    ):
        raise OptionError(
            f"--replay domain is for --method kl, found --method {options.method}; give general "
            "text, or 'self'"
        )
    return picked


def _check_combination(picked: Mapping[str, Method]) -> None:
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


def _check_unused(options: TuneOptions, picked: Mapping[str, Method]) -> None:
    """Raise OptionError where an option was given that only other methods read."""
    readers = {
        option: [name for name, m in METHODS.items() if option in (*m.needs, *m.reads)]
        for m in METHODS.values()
        for option in (*m.needs, *m.reads)
    }
    for option, methods in readers.items():
        if getattr(options, option) is not None and not set(methods) & set(picked):
            raise OptionError(
                f"{_flag(option)} is not used by --method {options.method}; it is for "
                f"{', '.join(methods)}: leave it out, or add the method"
            )


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")
