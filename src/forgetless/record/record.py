"""record(): stage 1, from general text to an importance file.

`path` (Song et al. 2025, arXiv 2501.13669): wrap the model with LoRA, train briefly on general text
without clipping while the recorder watches. The other estimators make one pass over the text with
the bare model. Everything that can be refused is refused before. A state is saved every
`save_steps` steps beside the file to write (`FILE.state`); `--resume` goes on from the last one
with the same result as an uninterrupted run.

In several processes (torchrun) each takes its share of every step, or of the batches to observe;
the importance is that of one process, to rounding, and the first one writes it. Each saves a state
of its own. With `calibrate` the file is written when importance is there, and again with the
calibration.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from forgetless.data.documents import Document, fingerprint_rows, load_documents
from forgetless.data.encoding import Encoded, batches, encode, sample_documents
from forgetless.errors import OptionError
from forgetless.files.hub import ready
from forgetless.files.lock import only_writer
from forgetless.files.provenance import environment
from forgetless.files.room import check_free_space, free_memory
from forgetless.importance.controls import uniform
from forgetless.importance.importance import Importance, push_importance
from forgetless.importance.tiers import parse_tier
from forgetless.model import distributed
from forgetless.model.adapters import add_adapter
from forgetless.model.fingerprint import fingerprint
from forgetless.model.loading import context_length, load_model, load_tokenizer
from forgetless.model.targets import target_weights
from forgetless.options.estimators import ESTIMATORS, TRAINING
from forgetless.options.option import RUNNING, as_dict, deciding
from forgetless.options.record import RecordOptions
from forgetless.options.reference import resolved
from forgetless.record import state as recording_state
from forgetless.record.calibrate import apart, calibrated
from forgetless.record.observing_recorder import ObservingRecorder
from forgetless.record.training import train

# Options that are not among the settings in the file: model and text stand beside them, and the
# rest is no part of the result. The last three have always stood there, and files stay as they are.
NOT_IN_THE_FILE = {"model", "general", *deciding(RecordOptions, RUNNING)} - {
    "device",
    "threads",
    "save_steps",
}
logger = logging.getLogger("forgetless")


def record(options: RecordOptions) -> Importance:
    """Record importance as `options` say and write it to `options.out`; also returned.

    Raises ValueError or OptionError before training starts.
    """
    distributed.start(options.device)
    if options.tier:
        _check_tier(options)
    if options.private is not None and not options.push_to_hub:
        raise OptionError("--private is for --push-to-hub NAME, which is not given")
    if options.calibrate and ESTIMATORS[options.estimator].constant:
        raise OptionError(
            f"--calibrate measures what energy costs, which with --estimator {options.estimator} "
            "is the size of the update alone; use another estimator"
        )
    if options.calibrate and distributed.size() > 1:
        raise OptionError(
            f"--calibrate trains in one process, found {distributed.size()}; record without "
            "torchrun"
        )
    repo = (
        ready(options.push_to_hub, private=options.private)
        if options.push_to_hub and distributed.first()
        else None
    )
    with only_writer(options.out, folder=False):
        importance = _recorded(options)
    if repo:
        logger.info("pushed to %s", push_importance(importance, repo))
    return importance


def _recorded(options: RecordOptions) -> Importance:
    state = recording_state.load(options)
    torch.manual_seed(options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
    tokenizer, model = load_tokenizer(options), load_model(options)
    encoded, source, kept = (
        ([], {}, []) if ESTIMATORS[options.estimator].constant else _text(options, model, tokenizer)
    )
    if state is None or "calibrated" not in state:
        importance = record_on(options, model, tokenizer, encoded, source, state)
        return (
            _calibrated(options, model, tokenizer, importance, encoded, kept, [])
            if options.calibrate
            else importance
        )
    if state["data"] != _apart_hash(kept):
        raise ValueError(
            f"{options.out}.state was made from other general text; give the same --general, or "
            "start again without --resume"
        )
    importance = Importance.load(options.out)
    if options.tier and importance.tier != options.tier:
        raise OptionError(
            f"--tier {options.tier}: {options.out} has tier {importance.tier}, by which it is "
            "calibrated; give the same, or no --resume"
        )
    return _calibrated(options, model, tokenizer, importance, encoded, kept, state["calibrated"])


def _calibrated(
    options: RecordOptions,
    model: nn.Module,
    tokenizer: Any,
    importance: Importance,
    encoded: list[Encoded],
    kept: list[Document],
    done: list[dict[str, Any]],
) -> Importance:
    """`importance` with its calibration, written to `options.out` again; what is done is in the
    saved state after each update.
    """

    def save(updates: list[dict[str, Any]]) -> None:
        state = {
            "options": recording_state.comparable(options),
            "data": _apart_hash(kept),
            "done": len(updates),
            "calibrated": updates,
        }
        recording_state.write(options, state)

    save(done)
    if ESTIMATORS[options.estimator].trains:  # which left their adapter in the model
        del model
        model = load_model(options)
    importance = dataclasses.replace(
        importance,
        calibration=calibrated(options, model, tokenizer, importance, encoded, kept, done, save),
    )
    importance.save(options.out)
    recording_state.place(options).unlink()
    return importance


def _apart_hash(kept: list[Document]) -> str:
    return fingerprint_rows([dataclasses.asdict(document) for document in kept])


def record_on(
    options: RecordOptions,
    model: nn.Module,
    tokenizer: Any,
    encoded: list[Encoded],
    source: dict[str, Any],
    state: dict[str, Any] | None,
) -> Importance:
    """Record on text that is encoded already, of the `source` that the file names, going on from
    `state` where there is one; writes `options.out`.
    """
    out, device, mark = Path(options.out), str(next(model.parameters()).device), fingerprint(model)
    estimator = ESTIMATORS[options.estimator]
    if estimator.constant:
        recorded, seconds = uniform(model, options.targets), 0.0
    else:
        if state is not None and state["data"] != source["sha256"]:
            raise ValueError(
                f"{options.out}.state was made from other general text; give the same --general, "
                "or start again without --resume"
            )
        if len(set(distributed.collect(source["sha256"]))) > 1:
            raise ValueError(
                f"--general {options.general} gave the processes different text; give a file "
                "instead, the same for all"
            )
        torch.manual_seed(options.seed)
        job = _by_training if estimator.trains else _by_observing
        recorded, seconds = job(options, model, encoded, tokenizer.pad_token_id, state, source)
    shown = {
        k: v for k, v in as_dict(options).items() if k not in NOT_IN_THE_FILE and v is not None
    }
    shown = {k: v for k, v in shown.items() if estimator.trains or k not in TRAINING}
    info = {
        **recorded.info,
        "model": {"name": options.model, "revision": options.revision, "fingerprint": mark},
        "data": source,
        "settings": {**shown, **recorded.info["settings"]},
        "timings": {
            "train_seconds": seconds,
            "tokens_per_second": source["tokens"] / seconds if "tokens" in source else None,
        },
        "versions": environment(device),
    }
    importance = Importance(recorded.entries, recorded.anchors if options.keep_anchor else {}, info)
    importance = importance.to_tier(options.tier) if options.tier else importance
    if distributed.first():
        importance.save(out)
    distributed.barrier()  # states go when the file is there,
    if not options.calibrate:  # which goes on from its state
        recording_state.place(options).unlink(missing_ok=True)
    distributed.barrier()  # and none is left once any process returns
    logger.info(
        "wrote %s: %d weights, tier %s, %.2f MiB, %.1f s",
        out,
        len(importance),
        importance.tier,
        out.stat().st_size / 2**20,
        seconds,
    )
    return importance


def _text(
    options: RecordOptions, model: nn.Module, tokenizer: Any
) -> tuple[list[Encoded], dict[str, Any], list[Document]]:
    """The general text as pieces of token ids, where it came from, and the documents that are kept
    apart for a calibration.
    """
    assert options.general is not None  # the command line has checked
    longest = context_length(model)
    documents = (
        sample_documents(
            model,
            tokenizer,
            options.self_documents,
            min(options.length or 256, longest),
            options.seed,
        )
        if options.general == "self"
        else load_documents(
            options.general,
            column=options.text_column,
            split=options.general_split,
            limit=None if options.calibrate else options.documents,
        )
    )
    documents, kept = apart(documents, tokenizer) if options.calibrate else (documents, [])
    documents = documents[: options.documents]
    encoded = encode(documents, tokenizer, length=min(options.length or 1024, longest))
    source = {
        "source": options.general,
        "documents": len(documents),
        "tokens": sum(len(ids) for ids, _ in encoded),
        "sha256": fingerprint_rows([dataclasses.asdict(d) for d in documents]),
    }
    return encoded, source, kept


def _by_training(
    options: RecordOptions,
    model: nn.Module,
    encoded: list[Encoded],
    pad_id: int,
    state: dict[str, Any] | None,
    source: dict[str, Any],
) -> tuple[Importance, float]:
    """The path integral: train a fresh adapter.

    Returns importance and seconds (with those before a resume).
    """
    per_epoch = math.ceil(len(encoded) / (options.batch_size * options.accumulation))
    total = (
        per_epoch * options.epochs
        if options.max_steps is None
        else min(options.max_steps, per_epoch * options.epochs)
    )
    peft_model = add_adapter(
        model,
        names=options.targets,
        rank=options.rank,
        alpha=options.alpha,
        dropout=options.dropout,
        rslora=options.rslora,
    )
    if options.gradient_checkpointing:
        peft_model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        peft_model.enable_input_require_grads()
    trainable = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    check_free_space(options.out, _disk_needed(options, peft_model, trainable, total))
    logger.info(
        "recording %s on %s: %d documents, %s tokens, %d steps; %s trainable parameters; path "
        "integral, %s gradient; seed %d",
        options.model,
        options.general,
        source["documents"],
        f"{source['tokens']:,}",
        total,
        f"{trainable:,}",
        options.gradient,
        options.seed,
    )
    if distributed.rank():
        torch.manual_seed(
            options.seed + distributed.rank()
        )  # dropout draws masks of its own in each process
    started = time.perf_counter()
    recorder = resolved(str(ESTIMATORS[options.estimator].recorder))(
        peft_model,
        gradient=options.gradient,
        xi=options.xi,
        clamp=options.clamp,
        offload=options.offload,
    )
    spent = train(
        peft_model, recorder, encoded, options, total, per_epoch, pad_id, state, source["sha256"]
    )
    importance = recorder.finish()
    return importance, spent + time.perf_counter() - started


def _by_observing(
    options: RecordOptions,
    model: nn.Module,
    encoded: list[Encoded],
    pad_id: int,
    state: dict[str, Any] | None,
    source: dict[str, Any],
) -> tuple[Importance, float]:
    """Every other estimator: one pass over the text with the bare model, or one for each group of
    weights.
    """
    recorder = _observer(options, model)
    device = next(model.parameters()).device
    pieces = list(batches(encoded, batch_size=options.batch_size, pad_id=pad_id))
    done, spent = 0, 0.0
    if state is not None:
        recorder.load_state_dict(state["recorder"])
        done, spent = int(state["done"]), float(state["seconds"])
    else:
        _divide(options, recorder, pieces[0]["input_ids"].to(device))
    total = recorder.passes * len(pieces)
    disk = 4 * _numbers_kept(options, [layer.shape for layer in recorder.layers])
    check_free_space(
        options.out,
        disk + (2 * recorder.bytes(recorder.passes) if total > options.save_steps else 0),
    )
    logger.info(
        "recording %s on %s: %d documents, %s tokens, %d pass(es); %d weights; %s; seed %d",
        options.model,
        options.general,
        source["documents"],
        f"{source['tokens']:,}",
        recorder.passes,
        len(recorder.layers),
        recorder.describe(),
        options.seed,
    )
    started, loss = time.perf_counter(), math.nan
    with tqdm(
        total=total, initial=done, desc="recording", unit="batch", disable=distributed.silent()
    ) as bar:
        while done < total:
            if done % len(pieces) % distributed.size() == distributed.rank():
                loss = recorder.observe(
                    **{key: value.to(device) for key, value in pieces[done % len(pieces)].items()}
                )
            else:
                recorder.skip(**pieces[done % len(pieces)])
            done += 1
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", tokens=recorder.tokens, refresh=False)
            if done % len(pieces) == 0 and done < total:
                recorder.end_pass()
            if done % options.save_steps == 0 and done < total:
                rest = {
                    "recorder": recorder.state_dict(),
                    "done": done,
                    "seconds": spent + time.perf_counter() - started,
                }
                recording_state.write(
                    options,
                    {
                        "options": recording_state.comparable(options),
                        "data": source["sha256"],
                        **rest,
                    },
                )
    importance = recorder.finish()
    return importance, spent + time.perf_counter() - started


def _divide(options: RecordOptions, recorder: ObservingRecorder, row: torch.Tensor) -> None:
    """Split the weights into the groups asked for, or into as few as fit into half of the free
    memory (activations and cutting need the rest).
    """
    if options.groups == 1 or "groups" not in ESTIMATORS[options.estimator].reads:
        return
    recorder.look(row)
    if options.groups is not None:
        recorder.divide(options.groups)
        return
    on_gpu = row.device.type == "cuda"
    # On a CPU only a cut makes room for the next group; on a GPU what a group amounts to is moved to the
    # CPU in any case.
    if not on_gpu and getattr(recorder, "rank", None) is None:
        return
    free = torch.cuda.mem_get_info(row.device)[0] if on_gpu else free_memory()
    if free is None or recorder.bytes() <= free // 2:
        return
    groups = next(
        (n for n in range(2, len(recorder.layers)) if recorder.bytes(n) <= free // 2),
        len(recorder.layers),
    )
    passes = recorder.divide(groups)
    logger.info(
        "--groups %d: the sums of all weights take %.1f GiB, %.1f GiB of memory are free, of "
        "which half is for them; one pass over the text for each "
        "group",
        passes,
        recorder.bytes() / 2**30,
        free / 2**30,
    )


def _numbers_kept(options: RecordOptions, shapes: list[tuple[int, int]]) -> int:
    """Numbers in the file of an observing estimator, at most: shared covariances count for each
    weight.
    """
    tier = ESTIMATORS[options.estimator].tier
    if tier == "kronecker":
        thin = (
            options.cov_rank + 1
            if options.cov_rank and not options.tier
            else max(max(shape) for shape in shapes)
        )
        return sum(min(n, thin) * n for shape in shapes for n in shape)
    return sum(math.prod(shape) if tier == "f32" else sum(shape) for shape in shapes)


def _check_tier(options: RecordOptions) -> None:
    kind, _ = parse_tier(options.tier or "")
    if kind == "kronecker" and ESTIMATORS[options.estimator].tier != kind:
        raise OptionError(
            f"--tier {options.tier} needs --estimator kronecker, found --estimator "
            f"{options.estimator}"
        )


def _observer(options: RecordOptions, model: nn.Module) -> ObservingRecorder:
    """The recorder of an estimator that observes, with the options that it reads."""
    estimator = ESTIMATORS[options.estimator]
    given: dict[str, Any] = {}
    if "labels" in estimator.reads:
        given.update(labels=options.labels, seed=options.seed)
    if "cov_rank" in estimator.reads:  # a tier is cut from whole covariances
        given["rank"] = None if options.tier else options.cov_rank or None
    recorder: ObservingRecorder = resolved(str(estimator.recorder))(model, options.targets, **given)
    return recorder


def _disk_needed(options: RecordOptions, model: nn.Module, trainable: int, total: int) -> int:
    """Bytes of the file with its anchor (f32), and of two states while one replaces the other:
    credit, Omega, adapter and AdamW's moments, all f32.
    """
    elements = sum(math.prod(weight.shape) for weight in target_weights(model))
    file = elements * (2 if options.tier == "bf16" else 4) + 4 * trainable
    return file + (2 * (8 * elements + 12 * trainable) if total > options.save_steps else 0)
