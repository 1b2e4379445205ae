"""How much each kind of text counts in a divergence: `--kl-kinds tools=3,languages=2`.

    sequence_weights("tools=3", ["tools", "lists", "lists"])    # [1.8, 0.6, 0.6]

A kind is what a prompt of ours is of (data/prompts/), `own` for prompts of the user's, or the
source of a document. Kinds that are not named count 1. All weights are then divided by their mean
over the sequences, so that the weight of the divergence as a whole means what it did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from forgetless.data.own_text import CHAT
from forgetless.data.prompts.prompts import load_prompts
from forgetless.errors import OptionError, nearest
from forgetless.options.option import several
from forgetless.options.tune import TuneOptions

EXPECTED = "--kl-kinds expects kinds with weights of at least 0 like tools=3,languages=2"


def kind_weights(spec: str) -> dict[str, float]:
    """The weight of each named kind. Raises OptionError for anything else."""
    weights: dict[str, float] = {}
    for part in several(spec):
        name, equals, number = (piece.strip() for piece in part.partition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or not equals or not math.isfinite(weight) or weight < 0:
            raise OptionError(f"{EXPECTED}, found '{part}'")
        if name in weights:
            raise OptionError(f"{EXPECTED}, found '{name}' twice")
        weights[name] = weight
    if not weights:
        raise OptionError(f"{EXPECTED}, found '{spec}'")
    return weights


def sequence_weights(spec: str | None, kinds: Sequence[str]) -> list[float] | None:
    """The weight of each sequence by its kind, 1 on average; None where all count alike.

    Raises OptionError for kinds that no sequence is of, and where nothing would count.
    """
    if spec is None:
        return None
    asked = kind_weights(spec)
    _check_kind_names(asked, sorted(set(kinds)))
    weights = [asked.get(kind, 1.0) for kind in kinds]
    mean = sum(weights) / len(weights)
    if mean == 0:
        raise OptionError(
            f"--kl-kinds {spec} leaves nothing that counts; give a weight above 0, or leave out "
            "--method kl"
        )
    return [weight / mean for weight in weights]


def _check_kind_names(asked: dict[str, float], known: Sequence[str]) -> None:
    """Raise OptionError for a kind that is not known."""
    for name in asked:
        if name not in known:
            has = ", ".join(kind or "no name" for kind in known)
            raise OptionError(
                f"--kl-kinds names '{name}', of which nothing is replayed; {nearest(name, known)}. "
                f"There is {has}"
            )


def check_kinds(options: TuneOptions) -> None:
    """Refuse what is no list of kinds, before anything is loaded, and of our own prompts unknown
    names.
    """
    if options.kl_kinds is None:
        return
    asked = kind_weights(options.kl_kinds)
    if options.replay == CHAT and options.prompts is None:
        _check_kind_names(asked, sorted({prompt.kind for prompt in load_prompts()}))
