"""The short training that a path recorder watches:

AdamW on general text, unclipped, with states to go on from.

    spent = train(peft_model, recorder, encoded, options, total, per_epoch, pad_id, state, sha256)

A step is the mean cross-entropy of all scored tokens in its micro-batches, shared out over the
processes. Going on from a state gives what an uninterrupted training gives, bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from forgetless.data.encoding import Encoded, batches
from forgetless.model import distributed
from forgetless.options.record import RecordOptions
from forgetless.record import state as recording_state
from forgetless.record.path_recorder import PathRecorder


def train(
    model: nn.Module,
    recorder: PathRecorder,
    encoded: list[Encoded],
    options: RecordOptions,
    total: int,
    per_epoch: int,
    pad_id: int,
    state: dict[str, Any] | None,
    data: str,
) -> float:
    """Train for `total` optimizer steps under the recorder.

    Returns the seconds spent before the resumed state was saved.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    decay = (
        (lambda step: 1.0 - step / total) if options.schedule == "linear" else (lambda step: 1.0)
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
    done, spent = _restore(model, recorder, optimizer, scheduler, state)
    model.train()
    started = time.perf_counter()
    with (
        recorder.attach(optimizer),
        tqdm(
            total=total, initial=done, desc="recording", unit="step", disable=distributed.silent()
        ) as bar,
    ):
        while done < total:
            epoch, first = divmod(done, per_epoch)
            for group in _groups(encoded, options, pad_id, epoch)[first : first + total - done]:
                began = time.perf_counter()
                loss, tokens = step(model, optimizer, group)
                if not math.isfinite(loss):
                    raise ValueError(
                        f"the loss is {loss} at step {done + 1}; lower --learning-rate or use "
                        "--dtype float32; the last saved state is kept for --resume"
                    )
                scheduler.step()
                done += 1
                bar.update()
                bar.set_postfix_str(
                    f"loss {loss:.3f}, {tokens / (time.perf_counter() - began):,.0f} tokens/s",
                    refresh=False,
                )
                if done % per_epoch == 0:
                    recorder.end_epoch()
                if done % options.save_steps == 0 and done < total:
                    _save_state(
                        options,
                        model,
                        recorder,
                        optimizer,
                        scheduler,
                        done,
                        spent + time.perf_counter() - started,
                        data,
                    )
    return spent


def _groups(
    encoded: list[Encoded], options: RecordOptions, pad_id: int, epoch: int
) -> list[list[dict[str, torch.Tensor]]]:
    """The micro-batches of each optimizer step of one epoch, in the order that the seed and the
    epoch give.
    """
    micro = list(
        batches(
            encoded,
            batch_size=options.batch_size,
            pad_id=pad_id,
            shuffle_seed=options.seed * 1000 + epoch,
        )
    )
    return [micro[i : i + options.accumulation] for i in range(0, len(micro), options.accumulation)]


def _share(group: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """This process's part of a step: whole micro-batches where they go round, else some rows of
    each.
    """
    if len(group) % distributed.size() == 0:
        return distributed.shard(group)
    rows = slice(distributed.rank(), None, distributed.size())
    return [
        {key: value[rows] for key, value in batch.items()}
        for batch in group
        if len(batch["input_ids"]) > distributed.rank()
    ]


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, group: list[dict[str, torch.Tensor]]
) -> tuple[float, int]:
    """One optimizer step on the mean cross-entropy of all scored tokens in the group; (nats per
    token, tokens). None is taken where the loss is no number.
    """
    device = next(model.parameters()).device
    tokens = scored_tokens(group)
    loss, processes = 0.0, distributed.size()
    for batch in _share(group):
        nats = backward(
            model, batch, processes / max(tokens, 1)
        )  # the gradients' mean over processes is that of all tokens
        loss += nats / max(tokens, 1)
    [loss] = distributed.add_up_numbers([loss], device)
    distributed.average_gradients([p for p in model.parameters() if p.requires_grad])
    if math.isfinite(loss):
        optimizer.step()
    optimizer.zero_grad()
    return loss, tokens


def backward(model: nn.Module, batch: dict[str, torch.Tensor], scale: float) -> float:
    """Add the gradient of `scale` times the summed cross-entropy of what is scored in a padded
    batch; returns that sum, in nats.
    """
    here = {key: value.to(next(model.parameters()).device) for key, value in batch.items()}
    logits = model(input_ids=here["input_ids"], attention_mask=here["attention_mask"]).logits[
        :, :-1
    ]
    nats = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(),
        here["labels"][:, 1:].flatten(),
        ignore_index=-100,
        reduction="sum",
    )
    (nats * scale).backward()
    return float(nats.detach())


def scored_tokens(group: Sequence[dict[str, torch.Tensor]]) -> int:
    """Tokens that are scored in some batches."""
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in group)


def _save_state(
    options: RecordOptions,
    model: nn.Module,
    recorder: PathRecorder,
    optimizer: Any,
    scheduler: Any,
    done: int,
    seconds: float,
    data: str,
) -> None:
    adapter = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    state = {
        "options": recording_state.comparable(options),
        "data": data,
        "adapter": adapter,
        "recorder": recorder.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "done": done,
        "seconds": seconds,
        "rng": torch.get_rng_state(),
    }
    recording_state.write(options, state)


def _restore(
    model: nn.Module,
    recorder: PathRecorder,
    optimizer: Any,
    scheduler: Any,
    state: dict[str, Any] | None,
) -> tuple[int, float]:
    if state is None:
        return 0, 0.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state["adapter"][name])
    recorder.load_state_dict(state["recorder"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["rng"])
    return int(state["done"]), float(state["seconds"])
