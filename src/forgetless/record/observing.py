"""Recording by observing: passes over the general text with the bare model, nothing is trained.

There is one pass over the text, or one for each group of weights where the sums of all of them do
not fit into memory at once (`observing_recorder.py`). In several processes the batches go round.
A state is saved every `save_steps` batches.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from forgetless.data.encoding import batches
from forgetless.files.room import check_free_space, free_memory
from forgetless.importance.importance import Importance
from forgetless.model import distributed
from forgetless.options.estimators import ESTIMATORS
from forgetless.options.record import RecordOptions
from forgetless.options.reference import resolved
from forgetless.record import state as recording_state
from forgetless.record.observing_recorder import ObservingRecorder
from forgetless.record.state import ObservedState
from forgetless.record.steps import Batch
from forgetless.record.text import RecordingText
from forgetless.report.terminal import progress

logger = logging.getLogger("forgetless")


def by_observing(
    options: RecordOptions,
    model: nn.Module,
    text: RecordingText,
    pad_id: int,
    state: ObservedState | None,
) -> tuple[Importance, float]:
    """Importance by an estimator that observes `model`, going on from `state` where there is one.

    Returns it with the seconds that it took, those before an interruption included.
    """
    assert text.source is not None
    recorder = observing_recorder(options, model)
    device = next(model.parameters()).device
    pieces = list(batches(text.pieces, batch_size=options.batch_size, pad_id=pad_id))
    if state is None:
        _divide(options, recorder, pieces[0]["input_ids"].to(device))
    else:
        recorder.load_state_dict(state.recorder)
    check_free_space(options.out, _bytes_of_observing(options, recorder, len(pieces)))
    logger.info(
        "recording %s on %s: %d documents, %s tokens, %d pass(es); %d weights; %s; seed %d",
        options.model,
        options.general,
        text.source.documents,
        f"{text.source.tokens:,}",
        recorder.passes,
        len(recorder.layers),
        recorder.describe(),
        options.seed,
    )
    started = time.perf_counter()
    spent = _passes(options, recorder, pieces, state, text.source.sha256)
    importance = recorder.finish()
    return importance, spent + time.perf_counter() - started


def observing_recorder(options: RecordOptions, model: nn.Module) -> ObservingRecorder:
    """The recorder of the estimator that `options` name, with the options that it reads."""
    estimator = ESTIMATORS[options.estimator]
    given: dict[str, str | int | None] = {}
    if "labels" in estimator.reads:
        given.update(labels=options.labels, seed=options.seed)
    if "cov_rank" in estimator.reads:  # a tier is cut from whole covariances
        given["rank"] = None if options.tier else options.cov_rank or None
    recorder: ObservingRecorder = resolved(str(estimator.recorder))(model, options.targets, **given)
    return recorder


def _passes(
    options: RecordOptions,
    recorder: ObservingRecorder,
    pieces: Sequence[Batch],
    state: ObservedState | None,
    sha256: str,
) -> float:
    """Observe all batches in every pass; the seconds that an earlier run spent on some of them."""
    done = int(state.done) if state else 0
    spent = float(state.seconds) if state else 0.0
    total = recorder.passes * len(pieces)
    device = next(recorder.model.parameters()).device
    started, loss = time.perf_counter(), math.nan
    with progress(
        "recording", total, unit="observation", done=done, shown=distributed.first()
    ) as bar:
        while done < total:
            batch = pieces[done % len(pieces)]
            if done % len(pieces) % distributed.world_size() == distributed.rank():
                loss = recorder.observe(**{key: value.to(device) for key, value in batch.items()})
            else:
                recorder.skip(**batch)
            done += 1
            bar.advance(said=f"loss {loss:.3f}, {recorder.tokens:,} tokens")
            if done % len(pieces) == 0 and done < total:
                recorder.end_pass()
            if done % options.save_steps == 0 and done < total:
                seconds = spent + time.perf_counter() - started
                recording_state.write(
                    options, ObservedState(sha256, recorder.state_dict(), done, seconds)
                )
    return spent


def _divide(options: RecordOptions, recorder: ObservingRecorder, row: Tensor) -> None:
    """Split the weights into the groups asked for, or into as few as fit into half of the free
    memory: activations, and cutting what was summed, need the rest.

    `row`: some token ids on the model's device, by which weights that read the same input are
    found.
    """
    if options.groups == 1 or "groups" not in ESTIMATORS[options.estimator].reads:
        return
    recorder.look(row)
    if options.groups is not None:
        recorder.divide(options.groups)
        return
    free = _free_memory(recorder, row.device)
    if free is None or recorder.bytes() <= free // 2:
        return
    fitting = (n for n in range(2, len(recorder.layers)) if recorder.bytes(n) <= free // 2)
    passes = recorder.divide(next(fitting, len(recorder.layers)))
    logger.info(
        "--groups %d: the sums of all weights take %.1f GiB, %.1f GiB of memory are free, of "
        "which half is for them; one pass over the text for each group",
        passes,
        recorder.bytes() / 2**30,
        free / 2**30,
    )


def _free_memory(recorder: ObservingRecorder, device: torch.device) -> int | None:
    """Bytes that are free where the sums are kept; None where dividing the weights into groups
    would save nothing, or where it is not known.

    On a GPU what a finished group amounts to is moved to the CPU. On a CPU it takes less room than
    its sums only where it is cut.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory() if recorder.cuts else None


def _bytes_of_observing(
    options: RecordOptions, recorder: ObservingRecorder, batch_count: int
) -> int:
    """Bytes of the file, and of two states while one replaces the other."""
    file = 4 * _numbers_in_file(options, [layer.shape for layer in recorder.layers])
    if recorder.passes * batch_count <= options.save_steps:
        return file
    return file + 2 * recorder.bytes(recorder.passes)


def _numbers_in_file(options: RecordOptions, shapes: Sequence[tuple[int, int]]) -> int:
    """Numbers in the file at most: a covariance that weights share counts for each of them."""
    tier = ESTIMATORS[options.estimator].tier
    if tier == "f32":
        return sum(math.prod(shape) for shape in shapes)
    if tier != "kronecker":
        return sum(sum(shape) for shape in shapes)
    columns = max(max(shape) for shape in shapes)
    if options.cov_rank and not options.tier:
        columns = options.cov_rank + 1
    return sum(min(n, columns) * n for shape in shapes for n in shape)
