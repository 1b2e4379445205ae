"""record(): stage 1, from general text to an importance file.

`path` (Song et al. 2025, arXiv 2501.13669): wrap the model with LoRA, train briefly on general text without clipping while the recorder watches. The other
estimators make one pass over the text with the bare model. Everything that can be refused is refused before. A state is saved every `save_steps` steps
beside the file to write (`FILE.state`); `--resume` goes on from the last one with the same result as an uninterrupted run.

In several processes (torchrun) each takes its share of every step, or of the batches to observe; the importance is that of one process, to rounding, and the
first one writes it. Each saves a state of its own.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from holdfast import distributed
from holdfast.config import LABELLED, TRAINING_ONLY, RecordOptions
from holdfast.hub import push_importance, ready
from holdfast.importance.activation import Activation
from holdfast.importance.attachment import PathRecorder
from holdfast.importance.container import Importance
from holdfast.importance.controls import uniform
from holdfast.importance.fisher import Fisher
from holdfast.importance.kronecker import Kronecker
from holdfast.importance.observing import ObservingRecorder
from holdfast.importance.path import PathIntegral
from holdfast.importance.path_factored import PathFactored
from holdfast.importance.tiers import parse_tier
from holdfast.lock import only_writer
from holdfast.models import context_length, load_model, load_tokenizer
from holdfast.options import OptionError, as_dict
from holdfast.runs import atomic_path, check_free_space, environment, free_memory
from holdfast.texts import Encoded, batches, encode, fingerprint_rows, load_documents, sample_documents
from holdfast.weights import add_adapter, fingerprint, target_weights

# Estimators that train an adapter; the others observe.
ESTIMATORS: dict[str, type[PathRecorder]] = {"path": PathIntegral, "path-factored": PathFactored}
NOT_IN_THE_RESULT = ("groups", "offload", "push_to_hub", "private")
logger = logging.getLogger("holdfast")


def record(options: RecordOptions) -> Importance:
    """Record importance as `options` say and write it to `options.out`; also returned. Raises ValueError or OptionError before training starts."""
    distributed.start(options.device)
    if options.tier:
        _check_tier(options)
    if options.private is not None and not options.push_to_hub:
        raise OptionError("--private is for --push-to-hub NAME, which is not given")
    repo = ready(options.push_to_hub, private=options.private) if options.push_to_hub and distributed.first() else None
    with only_writer(options.out, folder=False):
        importance = _recorded(options)
    if repo:
        logger.info("pushed to %s", push_importance(importance, repo))
    return importance


def _recorded(options: RecordOptions) -> Importance:
    state = load_state(options)
    torch.manual_seed(options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
    tokenizer, model = load_tokenizer(options), load_model(options)
    encoded, source = ([], {}) if options.estimator == "uniform" else _text(options, model, tokenizer)
    return record_on(options, model, tokenizer, encoded, source, state)


def record_on(options: RecordOptions, model: nn.Module, tokenizer: Any, encoded: list[Encoded], source: dict[str, Any],
              state: dict[str, Any] | None) -> Importance:  # fmt: skip
    """Record on text that is encoded already, of the `source` that the file names, going on from `state` where there is one; writes `options.out`."""
    out, device, mark = Path(options.out), str(next(model.parameters()).device), fingerprint(model)
    if options.estimator == "uniform":
        recorded, seconds = uniform(model, options.targets), 0.0
    else:
        if state is not None and state["data"] != source["sha256"]:
            raise ValueError(f"{options.out}.state was made from other general text; give the same --general, or start again without --resume")
        if len(set(distributed.collect(source["sha256"]))) > 1:
            raise ValueError(f"--general {options.general} gave the processes different text; give a file instead, the same for all")
        torch.manual_seed(options.seed)
        job = _by_training if options.estimator in ESTIMATORS else _by_observing
        recorded, seconds = job(options, model, encoded, tokenizer.pad_token_id, state, source)
    shown = {k: v for k, v in as_dict(options).items() if k not in ("out", "resume", "model", "general", *NOT_IN_THE_RESULT) and v is not None}
    shown = {k: v for k, v in shown.items() if options.estimator in ESTIMATORS or k not in TRAINING_ONLY}
    info = {
        **recorded.info,
        "model": {"name": options.model, "revision": options.revision, "fingerprint": mark},
        "data": source,
        "settings": {**shown, **recorded.info["settings"]},
        "timings": {"train_seconds": seconds, "tokens_per_second": source["tokens"] / seconds if "tokens" in source else None},
        "versions": environment(device),
    }
    importance = Importance(recorded.entries, recorded.anchors if options.keep_anchor else {}, info)
    importance = importance.to_tier(options.tier) if options.tier else importance
    if distributed.first():
        importance.save(out)
    distributed.barrier()  # states go when the file is there,
    _state_path(options).unlink(missing_ok=True)
    distributed.barrier()  # and none is left once any process returns
    logger.info("wrote %s: %d weights, tier %s, %.2f MiB, %.1f s", out, len(importance), importance.tier, out.stat().st_size / 2**20, seconds)
    return importance


def _text(options: RecordOptions, model: nn.Module, tokenizer: Any) -> tuple[list[Encoded], dict[str, Any]]:
    """The general text as pieces of token ids, and where it came from."""
    assert options.general is not None  # the command line has checked
    longest = context_length(model)
    documents = (
        sample_documents(model, tokenizer, options.self_documents, min(options.length or 256, longest), options.seed)
        if options.general == "self"
        else load_documents(options.general, column=options.text_column, split=options.general_split, limit=options.documents)
    )
    encoded = encode(documents, tokenizer, length=min(options.length or 1024, longest))
    source = {
        "source": options.general,
        "documents": len(documents),
        "tokens": sum(len(ids) for ids, _ in encoded),
        "sha256": fingerprint_rows([dataclasses.asdict(d) for d in documents]),
    }
    return encoded, source


def _by_training(options: RecordOptions, model: nn.Module, encoded: list[Encoded], pad_id: int, state: dict[str, Any] | None,
                 source: dict[str, Any]) -> tuple[Importance, float]:  # fmt: skip
    """The path integral: train a fresh adapter. Returns importance and seconds (with those before a resume)."""
    per_epoch = math.ceil(len(encoded) / (options.batch_size * options.accumulation))
    total = per_epoch * options.epochs if options.max_steps is None else min(options.max_steps, per_epoch * options.epochs)
    peft_model = add_adapter(model, names=options.targets, rank=options.rank, alpha=options.alpha, dropout=options.dropout, rslora=options.rslora)
    if options.gradient_checkpointing:
        peft_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        peft_model.enable_input_require_grads()
    trainable = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    check_free_space(options.out, _disk_needed(options, peft_model, trainable, total))
    logger.info("recording %s on %s: %d documents, %s tokens, %d steps; %s trainable parameters; path integral, %s gradient; seed %d", options.model,
                options.general, source["documents"], f"{source['tokens']:,}", total, f"{trainable:,}", options.gradient, options.seed)  # fmt: skip
    if distributed.rank():
        torch.manual_seed(options.seed + distributed.rank())  # dropout draws masks of its own in each process
    started = time.perf_counter()
    recorder = ESTIMATORS[options.estimator](peft_model, gradient=options.gradient, xi=options.xi, clamp=options.clamp, offload=options.offload)
    spent = _train(peft_model, recorder, encoded, options, total, per_epoch, pad_id, state, source["sha256"])
    importance = recorder.finish()
    return importance, spent + time.perf_counter() - started


def _by_observing(options: RecordOptions, model: nn.Module, encoded: list[Encoded], pad_id: int, state: dict[str, Any] | None,
                  source: dict[str, Any]) -> tuple[Importance, float]:  # fmt: skip
    """Every other estimator: one pass over the text with the bare model, or one for each group of weights."""
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
    check_free_space(options.out, disk + (2 * recorder.bytes(recorder.passes) if total > options.save_steps else 0))
    logger.info("recording %s on %s: %d documents, %s tokens, %d pass(es); %d weights; %s; seed %d", options.model, options.general, source["documents"],
                f"{source['tokens']:,}", recorder.passes, len(recorder.layers), recorder.describe(), options.seed)  # fmt: skip
    started, loss = time.perf_counter(), math.nan
    with tqdm(total=total, initial=done, desc="recording", unit="batch", disable=_no_bar()) as bar:
        while done < total:
            if done % len(pieces) % distributed.size() == distributed.rank():
                loss = recorder.observe(**{key: value.to(device) for key, value in pieces[done % len(pieces)].items()})
            else:
                recorder.skip(**pieces[done % len(pieces)])
            done += 1
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", tokens=recorder.tokens, refresh=False)
            if done % len(pieces) == 0 and done < total:
                recorder.end_pass()
            if done % options.save_steps == 0 and done < total:
                rest = {"recorder": recorder.state_dict(), "done": done, "seconds": spent + time.perf_counter() - started}
                _write_state(options, {"options": _comparable(options), "data": source["sha256"], **rest})
    importance = recorder.finish()
    return importance, spent + time.perf_counter() - started


def _no_bar() -> bool:
    return not (sys.stderr.isatty() and distributed.first())


def _divide(options: RecordOptions, recorder: ObservingRecorder, row: torch.Tensor) -> None:
    """Split the weights into the groups asked for, or into as few as fit into half of the free memory (activations and cutting need the rest)."""
    if options.groups == 1 or options.estimator not in LABELLED:
        return
    recorder.look(row)
    if options.groups is not None:
        recorder.divide(options.groups)
        return
    on_gpu = row.device.type == "cuda"
    # On a CPU only a cut makes room for the next group; on a GPU what a group amounts to is moved to the CPU in any case.
    if not on_gpu and getattr(recorder, "rank", None) is None:
        return
    free = torch.cuda.mem_get_info(row.device)[0] if on_gpu else free_memory()
    if free is None or recorder.bytes() <= free // 2:
        return
    groups = next((n for n in range(2, len(recorder.layers)) if recorder.bytes(n) <= free // 2), len(recorder.layers))
    passes = recorder.divide(groups)
    logger.info("--groups %d: the sums of all weights take %.1f GiB, %.1f GiB of memory are free, of which half is for them; one pass over the text for each "
                "group", passes, recorder.bytes() / 2**30, free / 2**30)  # fmt: skip


def _numbers_kept(options: RecordOptions, shapes: list[tuple[int, int]]) -> int:
    """Numbers in the file of an observing estimator, at most: shared covariances count for each weight."""
    if options.estimator == "kronecker":
        thin = options.cov_rank + 1 if options.cov_rank and not options.tier else max(max(shape) for shape in shapes)
        return sum(min(n, thin) * n for shape in shapes for n in shape)
    return sum(math.prod(shape) if options.estimator == "fisher" else sum(shape) for shape in shapes)


def _check_tier(options: RecordOptions) -> None:
    kind, _ = parse_tier(options.tier or "")
    if kind == "kronecker" and options.estimator != "kronecker":
        raise OptionError(f"--tier {options.tier} needs --estimator kronecker, found --estimator {options.estimator}")


def _observer(options: RecordOptions, model: nn.Module) -> ObservingRecorder:
    if options.estimator == "fisher":
        return Fisher(model, options.targets, labels=options.labels, seed=options.seed)
    if options.estimator == "kronecker":
        return Kronecker(
            model, options.targets, labels=options.labels, rank=None if options.tier else options.cov_rank or None, seed=options.seed
        )  # a tier is cut from the whole
    return Activation(model, options.targets)


def _disk_needed(options: RecordOptions, model: nn.Module, trainable: int, total: int) -> int:
    """Bytes of the file with its anchor (f32), and of two states while one replaces the other: credit, Omega, adapter and AdamW's moments, all f32."""
    elements = sum(math.prod(weight.shape) for weight in target_weights(model))
    file = elements * (2 if options.tier == "bf16" else 4) + 4 * trainable
    return file + (2 * (8 * elements + 12 * trainable) if total > options.save_steps else 0)


def _train(model: nn.Module, recorder: PathRecorder, encoded: list[Encoded], options: RecordOptions, total: int, per_epoch: int, pad_id: int,
           state: dict[str, Any] | None, data: str) -> float:  # fmt: skip
    """Train for `total` optimizer steps under the recorder. Returns the seconds spent before the resumed state was saved."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    decay = (lambda step: 1.0 - step / total) if options.schedule == "linear" else (lambda step: 1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
    done, spent = _restore(model, recorder, optimizer, scheduler, state)
    model.train()
    started = time.perf_counter()
    with recorder.attach(optimizer), tqdm(total=total, initial=done, desc="recording", unit="step", disable=_no_bar()) as bar:
        while done < total:
            epoch, first = divmod(done, per_epoch)
            for group in _groups(encoded, options, pad_id, epoch)[first : first + total - done]:
                began = time.perf_counter()
                loss, tokens = _step(model, optimizer, group, done)
                scheduler.step()
                done += 1
                bar.update()
                bar.set_postfix_str(f"loss {loss:.3f}, {tokens / (time.perf_counter() - began):,.0f} tokens/s", refresh=False)
                if done % per_epoch == 0:
                    recorder.end_epoch()
                if done % options.save_steps == 0 and done < total:
                    _save_state(options, model, recorder, optimizer, scheduler, done, spent + time.perf_counter() - started, data)
    return spent


def _groups(encoded: list[Encoded], options: RecordOptions, pad_id: int, epoch: int) -> list[list[dict[str, torch.Tensor]]]:
    """The micro-batches of each optimizer step of one epoch, in the order that the seed and the epoch give."""
    micro = list(batches(encoded, batch_size=options.batch_size, pad_id=pad_id, shuffle_seed=options.seed * 1000 + epoch))
    return [micro[i : i + options.accumulation] for i in range(0, len(micro), options.accumulation)]


def _share(group: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """This process's part of a step: whole micro-batches where they go round, else some rows of each."""
    if len(group) % distributed.size() == 0:
        return distributed.share(group)
    rows = slice(distributed.rank(), None, distributed.size())
    return [{key: value[rows] for key, value in batch.items()} for batch in group if len(batch["input_ids"]) > distributed.rank()]


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, group: list[dict[str, torch.Tensor]], step: int) -> tuple[float, int]:
    """One optimizer step on the mean cross-entropy of all scored tokens in the group; (nats per token, tokens)."""
    device = next(model.parameters()).device
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in group)
    loss, processes = 0.0, distributed.size()
    for batch in _share(group):
        here = {key: value.to(device) for key, value in batch.items()}
        logits = model(input_ids=here["input_ids"], attention_mask=here["attention_mask"]).logits[:, :-1]
        nats = nn.functional.cross_entropy(logits.flatten(0, 1).float(), here["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum")
        (nats * (processes / max(tokens, 1))).backward()  # the gradients' mean over processes is that of all tokens
        loss += float(nats.detach()) / max(tokens, 1)
    [loss] = distributed.add_up_numbers([loss], device)
    distributed.average_gradients([p for p in model.parameters() if p.requires_grad])
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss} at step {step + 1}; lower --learning-rate or use --dtype float32; the last saved state is kept for --resume")
    optimizer.step()
    optimizer.zero_grad()
    return loss, tokens


def _state_path(options: RecordOptions) -> Path:
    """Where this process saves its state."""
    return Path(f"{options.out}.state" + (f".{distributed.rank()}" if distributed.rank() else ""))


def _comparable(options: RecordOptions) -> dict[str, Any]:
    """The options that decide the result, as they must be again to go on."""
    return {k: v for k, v in as_dict(options).items() if k not in ("resume", "save_steps", "device", "threads", "tier", "keep_anchor", *NOT_IN_THE_RESULT)}


def _save_state(options: RecordOptions, model: nn.Module, recorder: PathRecorder, optimizer: Any, scheduler: Any, done: int, seconds: float, data: str) -> None:
    adapter = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    state = {"options": _comparable(options), "data": data, "adapter": adapter, "recorder": recorder.state_dict(), "optimizer": optimizer.state_dict(),
             "scheduler": scheduler.state_dict(), "done": done, "seconds": seconds, "rng": torch.get_rng_state()}  # fmt: skip
    _write_state(options, state)


def _write_state(options: RecordOptions, state: dict[str, Any]) -> None:
    with atomic_path(_state_path(options)) as temporary:
        torch.save({**state, "processes": distributed.size()}, temporary)
        distributed.barrier()  # all states are renamed at about the same moment


def load_state(options: RecordOptions) -> dict[str, Any] | None:
    """The saved state to go on from, or None. Read with weights_only, so no code in it can run."""
    if not options.resume:
        return None
    path = _state_path(options)
    if not any(distributed.collect(path.is_file())):
        logger.info("no saved state beside %s: starting from the beginning", options.out)
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} is not a whole saved state ({first}); remove it, or start again without --resume") from error
    if not isinstance(state, dict) or not isinstance(state.get("options"), dict):
        raise ValueError(f"{path} is not a saved state of holdfast record; remove it, or start again without --resume")
    then_many = state.get("processes", 1)
    if then_many != distributed.size():
        raise OptionError(f"{path} was made by {then_many} process(es), found {distributed.size()}; use as many, or no --resume")
    if len(set(distributed.collect(state["done"]))) > 1:
        raise ValueError(f"the processes' states beside {options.out} are of different steps, as when interrupted while writing; start again without --resume")
    now, then = _comparable(options), state["options"]
    different = sorted(key for key in now if now[key] != then.get(key))
    if different:
        raise OptionError(
            f"{path} was made with other options: {', '.join(f'{k}={then.get(k)!r} (now {now[k]!r})' for k in different)}; use the same, or no --resume"
        )
    return state


def _restore(model: nn.Module, recorder: PathRecorder, optimizer: Any, scheduler: Any, state: dict[str, Any] | None) -> tuple[int, float]:
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
