"""How `tune` holds a model, and what it measures, where it is not told.

    default_settings({"model": "m", "data": "d.jsonl"})
    # {"method": "hold,kl", "importance": "auto", "replay": "kept", ..., "general": "auto"}

This is the one place to change the default method. Nothing heavy is imported.
"""

from __future__ import annotations

from forgetless.options.option import Given, several

# As --importance: the file in the cache that was recorded for this base by the defaults of
# `record`, recorded now where there is none. As --general: what the model says itself.
AUTO = "auto"
# How `tune` holds where neither --method nor --importance is given: by the pull of importance that
# is recorded on the model's own answers, and by the divergence from the base on those answers.
# Measured on SmolLM2-135M-Instruct, 50 steps of 8 x 192 tokens of medical questions (learning in
# nats, divergence on answers to other prompts): plain .622, .387; the pull alone at strength 10
# .605, .253; the divergence alone, weight 1 on 2 answers a step, .575, .064; both, the pull at
# strength 30, .566, .044. So the two together keep most. Energy is in nats, so that the strength
# carries over to other models.
HOLDING: Given = {
    "method": "hold,kl",
    "importance": AUTO,
    "replay": "kept",
    "kl_weight": 1.0,
    "kl_sequences": 2,
    "strength": 30.0,
}
# How it holds then where the result is bounded by --budget, which sets the strength itself.
HOLDING_TO_A_BUDGET: Given = {name: HOLDING[name] for name in HOLDING if name != "strength"}

# What the recording that is made for it is asked, beyond the defaults of `record`: to keep all of
# the answers that are recorded on, unless somebody asks for more than so many. 64 of them took
# 8,826 tokens on that model, half a KiB each.
RECORDING: Given = {"keep_answers": 256}


def default_settings(given: Given) -> Given:
    """What `tune` sets by itself, from what was given: the method with what it needs, and what
    forgetting is measured on.

    Several domains in turn, and the recipe of the paper, are held only by a file that is given.
    """
    by_itself = not _is_a_sequence(given) and not _goes_on_from_recording(given)
    settings = dict(_default_method(given, by_itself=by_itself))
    if "general" not in given and not _is_a_sequence(given):
        settings["general"] = AUTO
    return settings


def _default_method(given: Given, *, by_itself: bool) -> Given:
    if given.get("method"):
        return {"method": given["method"]}
    if given.get("importance") or given.get("after"):
        return {"method": "hold"}
    if not by_itself:
        return {"method": "plain"}
    return HOLDING_TO_A_BUDGET if given.get("budget") else HOLDING


def _is_a_sequence(given: Given) -> bool:
    return bool(given.get("after")) or len(several(given.get("data"))) > 1


def _goes_on_from_recording(given: Given) -> bool:
    """Whether training starts from the adapter at the end of a recording, which only a file has."""
    return given.get("preset") == "paper" or given.get("anchor") == "recorded"
