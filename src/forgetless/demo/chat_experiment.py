"""The demo on a chat model as an experiment that `compare` runs.

    OUT/guild.jsonl, guild-test.jsonl        what is taught, and the same facts asked otherwise

What must not be lost is what the model says itself: importance is recorded on its answers, some of
them are kept in the file, and forgetting is the divergence on its answers to other prompts. One
setting of each method is trained, so that nothing is chosen. A comparison that is to be believed
tries several and keeps a test part apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from forgetless.compare.experiment import Experiment
from forgetless.compare.experiment_file import MODEL, experiment_of
from forgetless.demo.guild import conversations
from forgetless.files.atomic import write_text
from forgetless.options.compare import DemoOptions

# The names of the domain and of the text that must not be lost, as the report shows them.
GUILD, ANSWERS = "guild", "chat"
# The names of the files that the demo writes its conversations to.
GUILD_FILES = ("guild", "guild-test")
# Conversations of a step: 30 steps read each of them about twice.
ROWS = 4
# Tokens of a conversation at most; the longest has about 110.
ROW_TOKENS = 128
# The learning rate of both methods, which is that of `tune`.
GUILD_RATE = 1e-3
# The fraction of the update that stands beside the whole one, for plain fine-tuning scaled back.
HALF = 0.5
# Held by the recorded importance, and by the divergence on the answers that its file keeps.
HELD = {"importance": "default", "method": "hold,kl", "replay": "kept", "learning_rate": GUILD_RATE}


def write_guild(out: Path) -> dict[str, str]:
    """The conversations as JSON lines, so that every step can be repeated with the other verbs:
    name -> file.
    """
    paths = {}
    for name, rows in zip(GUILD_FILES, conversations(), strict=True):
        path = out / f"{name}.jsonl"
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        paths[name] = str(path)
    return paths


def chat_experiment(options: DemoOptions, paths: Mapping[str, str]) -> Experiment:
    """The experiment on what `write_guild` wrote."""
    model = {key: getattr(options, key) for key in MODEL if getattr(options, key) is not None}
    held_out = {"validation": paths["guild-test"], "test": paths["guild-test"]}
    given = {
        "title": f"What the demo found on {Path(options.model).name}",
        **model,
        "general": {ANSWERS: "chat"},
        "answers": options.answers,
        "answer_length": options.answer_length,
        "domains": {GUILD: {"data": paths["guild"], **held_out}},
        "training": {
            "max_steps": options.steps,
            "batch_size": ROWS,
            "accumulation": 1,
            "length": ROW_TOKENS,
            "log_steps": 5,
        },
        "importance": {"default": {"keep_answers": options.answers}},
        "methods": {"plain": {"learning_rate": GUILD_RATE}, "hold": dict(HELD)},
        "seeds": {
            "validation": list(range(options.seed, options.seed + options.seeds)),
            "test": [],
        },
        "scales": [HALF],
    }
    return experiment_of(given, "the demo")
