"""One run of a comparison: train by `tune`, then evaluate the finished update at every scale on
every text.

    DIR/runs/ID/run.json    how it ended, with a point for each scale; written last
    DIR/runs/ID/adapter/    its finished adapter
    DIR/runs/ID/log.txt     what it printed

Out of memory is a result; another failure is noted, and tried again the next time. Costs a
training, and an evaluation for each scale.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from forgetless.compare.base import losses_on
from forgetless.compare.experiment import RECORDED
from forgetless.compare.job import Job
from forgetless.compare.own import OwnParts, own_of_base
from forgetless.data.own_text import CHAT, KEPT, SELF
from forgetless.evaluate.losses import TextLoss
from forgetless.evaluate.rise import Rise
from forgetless.files.atomic import discard
from forgetless.files.campaign_json import BaseMeasured, PartLosses
from forgetless.files.compare_json import TrialPoint, TrialRun
from forgetless.files.measured_json import Change, Loss
from forgetless.files.run_json import Run
from forgetless.files.schema import as_record, read_record, write_record
from forgetless.model.adapter_files import load_tuned
from forgetless.model.adapters import has_lora
from forgetless.model.loading import load_tokenizer
from forgetless.model.precision import load_to_train
from forgetless.model.update import AdapterUpdate, ModelUpdate
from forgetless.options.tune import TuneOptions
from forgetless.tune.tune import tune

logger = logging.getLogger("forgetless")
# What is kept of each entry of the trainer's log: what a report draws.
LOGGED = ("step", "loss", "energy", "pull_ratio", "strength", "kl")
# What the words of --replay stand for, as tables say it.
EXTRA_DATA = {
    CHAT: "the model's own answers",
    SELF: "text sampled from the model",
    KEPT: "answers in the importance file",
    "domain": "the domain text again",
}


def run(job: Job) -> None:
    """One trial: its run.json says how it ended. What it prints goes into its folder."""
    job.folder.mkdir(parents=True, exist_ok=True)
    trial = job.trial
    result = _about(job)
    started = time.perf_counter()
    try:
        with (
            open(job.folder / "log.txt", "w", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            result = _trained(job)
    except Exception as error:
        status = "out of memory" if _of_memory(error) else "failed"
        result = replace(result, status=status, error=f"{type(error).__name__}: {error}")
        logger.warning("%s on %s, %s: %s", trial.method, trial.domain, status, result.error)
    finally:
        shutil.rmtree(job.folder / "work", ignore_errors=True)
    result = replace(result, wall_seconds=time.perf_counter() - started)
    write_record(job.folder / "run.json", result)


def _of_memory(error: Exception) -> bool:
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "out of memory" in str(error).lower()


def was_killed(job: Job) -> None:
    """Note the end of a run whose process was killed from outside, as the system does where memory
    runs out.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    error = (
        "killed: its process was ended from outside, as the system does where memory runs "
        "out; give fewer --jobs, or smaller batches"
    )
    logger.warning("%s on %s, %s", job.trial.method, job.trial.domain, error)
    shutil.rmtree(job.folder / "work", ignore_errors=True)
    write_record(job.folder / "run.json", replace(_about(job), status="failed", error=error))


def _about(job: Job) -> TrialRun:
    return TrialRun(id=job.id, **dataclasses.asdict(job.trial))


def _trained(job: Job) -> TrialRun:
    """Train, then evaluate the finished update at every scale."""
    _forget_peak()
    finished = tune(job.options)
    adapter = job.folder / "adapter"
    discard(adapter)
    os.replace(job.folder / "work" / "final", adapter)
    base = read_record(job.base, BaseMeasured).on(job.trial.part)
    tokenizer = load_tokenizer(job.options)
    texts = job.experiment.texts(job.trial.part)
    own = own_of_base(job.experiment, job.options, tokenizer, job.trial.part, texts)
    points = []
    for scale, model in _scaled(job.options, adapter, job.experiment.scales):
        points.append(_point(job, base, scale, model, tokenizer, own))
    replay = job.trial.settings.get("replay")
    if replay == RECORDED and job.experiment.own(job.experiment.recorded):
        replay = job.options.replay
    logged = [entry for entry in finished["log"] if "loss" in entry]
    known = as_record(finished, Run)
    return replace(
        _about(job),
        status="done",
        points=points,
        energy=finished["energy"],
        seconds=finished["prepare_seconds"] + finished["train_seconds"],
        peak_memory_bytes=_peak(),
        extra_data=EXTRA_DATA.get(str(replay), replay),
        file_bytes=job.file_bytes,
        trainable_parameters=finished["trainable_parameters"],
        moved=known.moved,
        log=[{key: entry.get(key) for key in LOGGED} for entry in logged],
        environment=known.environment,
    )


def _point(
    job: Job, base: PartLosses, scale: float, model: nn.Module, tokenizer: Any, own: OwnParts
) -> TrialPoint:
    """What the update has learned and lost at one scale.

    Raises ValueError where a loss is not a number.
    """
    trial, texts = job.trial, job.experiment.texts(job.trial.part)
    after = losses_on(
        job.experiment, model, tokenizer, job.files, trial.part, [trial.domain], texts, own
    )
    learned = -_rise(base.domains[trial.domain], after.domains[trial.domain])
    lost = {name: _rise(base.general[name], numbers) for name, numbers in after.general.items()}
    if not all(math.isfinite(change.nats) for change in (learned, *lost.values())):
        raise ValueError(
            f"the loss of the update at scale {scale:g} is not a number: training diverged; "
            "give a smaller learning rate"
        )
    return TrialPoint(
        scale=scale,
        learning=Change(**learned.estimate()),
        forgetting={name: Change(**change.estimate()) for name, change in lost.items()},
    )


def _rise(before: Loss, after: Loss) -> Rise:
    """The rise of a loss from the base to the tuned model."""
    return TextLoss.of(before).rise(TextLoss.of(after))


def _scaled(
    options: TuneOptions, adapter: Path, scales: Iterable[float]
) -> Iterator[tuple[float, nn.Module]]:
    """The base with the finished update at 1 and at each smaller scale.

    An update that is not LoRA's is scaled as a difference of all weights; on a quantised base,
    whose weights are codes, it is there at 1 alone.
    """
    tuned = load_tuned(options, adapter, full=options.full)
    update: AdapterUpdate | ModelUpdate
    if has_lora(tuned):
        model, update = tuned, AdapterUpdate(tuned)
    elif options.quantize != "none":
        yield 1.0, tuned
        return
    else:
        model = load_to_train(options)
        update = ModelUpdate(model, tuned if options.full else tuned.merge_and_unload())
    for scale in (1.0, *sorted(scales, reverse=True)):
        update.scale(scale)
        yield scale, model


def _forget_peak() -> None:
    """Start counting the peak of memory anew, where the system lets us."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int | None:
    """Bytes at the peak: of the GPU, or of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None
