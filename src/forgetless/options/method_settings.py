"""Options of single methods, which stand in `tune` under the same names.

    kl_weight: float | None = same(MethodSettings, "kl_weight")

The help of each begins with the method that reads it; options/methods.py has the methods.
"""

from __future__ import annotations

from dataclasses import dataclass

from forgetless.options.option import option


@dataclass(frozen=True)
class MethodSettings:
    """What methods can be told: None is what the method's row sets, or what its help says."""

    replay_share: float | None = option(
        None,
        "replay: general tokens per domain token, 0.01 for 1 % [0.05]",
        group="method",
        at_least=0,
    )
    replay_weight: float | None = option(
        None,
        "replay: how much a general token counts beside one of the domain [1]",
        group="method",
        at_least=0,
        later=True,
    )
    masked_weight: float | None = option(
        None,
        "masked-kl: weight of the divergence of the tokens that are not there [1]",
        group="method",
        at_least=0,
        later=True,
    )
    stm_perplexity: float | None = option(
        None,
        "stm: leave out tokens that the base finds more perplexing than this [2.5]",
        group="method",
        above=1,
        later=True,
    )
    protect: float | None = option(
        None,
        "project: fraction of the curvature that the update keeps out of [0.9]",
        group="method",
        above=0,
        below=1,
        later=True,
    )
    kl_weight: float | None = option(
        None, "kl: weight of the divergence from the base [1]", group="method", at_least=0
    )
    kl_sequences: int | None = option(
        None, "kl: general sequences per optimizer step [2]", group="method", at_least=1
    )
    kl_every: int | None = option(
        None,
        "kl: add the divergence at each N-th step only, with N times the weight [1]",
        group="method",
        at_least=1,
        later=True,
    )
    kl_length: int | None = option(
        None,
        "kl: use at most so many scored tokens of each sequence, the first ones; default: all",
        group="method",
        at_least=1,
        later=True,
    )
    kl_kinds: str | None = option(
        None,
        "kl: how much answers to prompts of a kind count beside the others, which count 1: "
        "tools=3,languages=2 (docs/methods.md)",
        group="method",
        later=True,
        metavar="KINDS",
    )
    scale: float | None = option(
        None, "wise: scale the finished update by this number", group="method", at_least=0
    )
    general_steps: int | None = option(
        None,
        "general-steps: optimizer steps on --replay before tuning; default: one pass over it",
        group="method",
        at_least=0,
    )
    earlier: str | None = option(
        None,
        "o-lora: adapters merged into MODEL before, whose directions are kept free",
        group="method",
        later=True,
        metavar="DIRS",
    )
    orthogonality: float | None = option(
        None,
        "o-lora: weight of the overlap with earlier adapters [0.5]",
        group="method",
        at_least=0,
        later=True,
    )
