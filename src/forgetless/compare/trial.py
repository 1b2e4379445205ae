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
from pathlib import Path
from typing import Any

import torch
from torch import nn

from forgetless.compare.experiment import Experiment, Trial
from forgetless.data.documents import load_documents
from forgetless.data.tasks import load_training_data
from forgetless.evaluate.losses import TextLoss, completion_loss, general_loss
from forgetless.evaluate.rise import Rise
from forgetless.files.atomic import discard, read_json, write_json
from forgetless.model.adapter_files import load_tuned
from forgetless.model.adapters import has_lora
from forgetless.model.loading import load_model, load_tokenizer
from forgetless.model.update import AdapterUpdate, ModelUpdate
from forgetless.options.tune import TuneOptions

logger = logging.getLogger("forgetless")
LOGGED = ("step", "loss", "energy", "pull_ratio", "strength", "kl")


def run(job: dict[str, Any]) -> None:
    """One trial: its run.json says how it ended. What it prints goes into its folder."""
    folder: Path = job["folder"]
    folder.mkdir(parents=True, exist_ok=True)
    trial: Trial = job["trial"]
    result, started = _about(job), time.perf_counter()
    try:
        with (
            open(folder / "log.txt", "w", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            result |= {"status": "done", "error": None, **_trained(job)}
    except Exception as error:
        memory = (
            isinstance(error, MemoryError | torch.OutOfMemoryError)
            or "out of memory" in str(error).lower()
        )
        result |= _ended(
            "out of memory" if memory else "failed", f"{type(error).__name__}: {error}"
        )
        logger.warning(
            "%s on %s, %s: %s", trial.method, trial.domain, result["status"], result["error"]
        )
    finally:
        shutil.rmtree(folder / "work", ignore_errors=True)
    write_json(folder / "run.json", {**result, "wall_seconds": time.perf_counter() - started})


def was_killed(job: dict[str, Any]) -> None:
    """Note the end of a run whose process was killed from outside, as the system does where memory
    runs out.
    """
    folder: Path = job["folder"]
    folder.mkdir(parents=True, exist_ok=True)
    error = (
        "killed: its process was ended from outside, as the system does where memory runs "
        "out; give fewer --jobs, or smaller batches"
    )
    logger.warning("%s on %s, %s", job["trial"].method, job["trial"].domain, error)
    shutil.rmtree(folder / "work", ignore_errors=True)
    write_json(
        folder / "run.json", {**_about(job), **_ended("failed", error), "wall_seconds": None}
    )


def _about(job: dict[str, Any]) -> dict[str, Any]:
    return {"id": job["id"], **dataclasses.asdict(job["trial"])}


def _ended(status: str, error: str) -> dict[str, Any]:
    """What is in the run.json of a run without a result."""
    return {"status": status, "error": error, "points": [], "log": [], "moved": None}


def _trained(job: dict[str, Any]) -> dict[str, Any]:
    """Train, then evaluate the finished update at every scale."""
    from forgetless.tune.tune import tune

    experiment, trial, folder, options = (
        job["experiment"],
        job["trial"],
        job["folder"],
        job["options"],
    )
    _forget_peak()
    finished = tune(options)
    discard(folder / "adapter")
    os.replace(folder / "work" / "final", folder / "adapter")
    base = read_json(job["base"])[trial.part]
    tokenizer, points = load_tokenizer(options), []
    for scale, model in _scaled(options, folder / "adapter", experiment.scales):
        after = evaluate(
            experiment,
            model,
            tokenizer,
            job["files"],
            trial.part,
            [trial.domain],
            experiment.texts(trial.part),
        )
        learned = -_rise(base["domains"][trial.domain], after["domains"][trial.domain])
        lost = {
            name: _rise(base["general"][name], numbers)
            for name, numbers in after["general"].items()
        }
        if not all(math.isfinite(change.nats) for change in (learned, *lost.values())):
            raise ValueError(
                f"the loss of the update at scale {scale:g} is not a number: training diverged; "
                "give a smaller learning rate"
            )
        points.append(
            {
                "scale": scale,
                "learning": learned.estimate(),
                "accuracy": None,
                "accuracy_general": None,
                "forgetting": {name: change.estimate() for name, change in lost.items()},
            }
        )
    extra = {"self": "text sampled from the model", "domain": "the domain text again"}.get(
        str(trial.settings.get("replay")), trial.settings.get("replay")
    )
    return {
        "points": points,
        "energy": finished["energy"],
        "seconds": finished["prepare_seconds"] + finished["train_seconds"],
        "peak_memory_bytes": _peak(),
        "extra_data": extra,
        "file_bytes": job["file_bytes"],
        "trainable_parameters": finished["trainable_parameters"],
        "moved": finished.get("moved"),
        "log": [
            {key: entry.get(key) for key in LOGGED} for entry in finished["log"] if "loss" in entry
        ],
        "environment": finished["environment"],
    }


def _rise(before: dict[str, Any], after: dict[str, Any]) -> Rise:
    """The rise of a loss from the base's numbers to those of the tuned model."""
    return TextLoss.read(before).rise(TextLoss.read(after))


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
        model = load_model(options)
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


def evaluate(
    experiment: Experiment,
    model: nn.Module,
    tokenizer: Any,
    files: dict[str, str],
    part: str,
    domains: Iterable[str],
    texts: Iterable[str] | None = None,
) -> dict[str, Any]:
    """{general: {text: numbers}, domains: {domain: numbers}} of one state of a model; `texts`:
    every general text.
    """
    limit = experiment.limit.get(part)
    found: dict[str, Any] = {"general": {}, "domains": {}}
    for name in experiment.general if texts is None else texts:
        documents = load_documents(files[f"general/{name}/{part}"], limit=limit)
        if experiment.characters:
            documents = [
                dataclasses.replace(d, text=d.text[: experiment.characters])
                if d.text is not None
                else d
                for d in documents
            ]
        found["general"][name] = general_loss(model, tokenizer, documents).numbers()
    for name in domains:
        found["domains"][name] = completion_loss(
            model, tokenizer, load_training_data(files[f"domain/{name}/{part}"], limit=limit)
        ).numbers()
    return found
