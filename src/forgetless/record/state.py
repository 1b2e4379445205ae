"""The saved states of a recording, beside the file to write:

FILE.state, in several processes FILE.state.1 and so on too.

    write(options, {"options": comparable(options), "data": sha256, ...})      # atomic, all
        processes at about the same moment
    state = load(options)                                                      # None without
        --resume or where there is none

Read with weights_only, so that no code in a file can run.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from forgetless.errors import OptionError
from forgetless.files.atomic import atomic_path
from forgetless.model import distributed
from forgetless.options.option import RUNNING, as_dict, deciding
from forgetless.options.record import RecordOptions

# What is applied when the recording has ended, and so does not decide what a state holds.
ONLY_WRITTEN = ("tier", "keep_anchor")
logger = logging.getLogger("forgetless")


def place(options: RecordOptions) -> Path:
    """Where this process saves its state."""
    return Path(f"{options.out}.state" + (f".{distributed.rank()}" if distributed.rank() else ""))


def comparable(options: RecordOptions) -> dict[str, Any]:
    """The options that decide what is recorded, as they must be again to go on."""
    free = (*deciding(RecordOptions, RUNNING), *ONLY_WRITTEN)
    return {name: value for name, value in as_dict(options).items() if name not in free}


def write(options: RecordOptions, state: dict[str, Any]) -> None:
    """Save `state`, whole or not at all."""
    with atomic_path(place(options)) as temporary:
        torch.save({**state, "processes": distributed.size()}, temporary)
        distributed.barrier()  # all states are renamed at about the same moment


def load(options: RecordOptions) -> dict[str, Any] | None:
    """The saved state to go on from, or None. Read with weights_only, so no code in it can run."""
    if not options.resume:
        return None
    path = place(options)
    if not any(distributed.collect(path.is_file())):
        logger.info("no saved state beside %s: starting from the beginning", options.out)
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{path} is not a whole saved state ({first}); remove it, or start again without "
            "--resume"
        ) from error
    if not isinstance(state, dict) or not isinstance(state.get("options"), dict):
        raise ValueError(
            f"{path} is not a saved state of forgetless record; remove it, or start again "
            "without --resume"
        )
    then_many = state.get("processes", 1)
    if then_many != distributed.size():
        raise OptionError(
            f"{path} was made by {then_many} process(es), found {distributed.size()}; use as "
            "many, or no --resume"
        )
    if len(set(distributed.collect(state["done"]))) > 1:
        raise ValueError(
            f"the processes' states beside {options.out} are of different steps, as when "
            "interrupted while writing; start again without --resume"
        )
    now, then = comparable(options), state["options"]
    different = sorted(key for key in now if now[key] != then.get(key))
    if different:
        raise OptionError(
            f"{path} was made with other options: "
            f"{', '.join(f'{k}={then.get(k)!r} (now {now[k]!r})' for k in different)}; use the "
            "same, or no --resume"
        )
    return state
