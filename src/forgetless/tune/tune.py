"""tune(): stage 2 of Song et al. 2025 (arXiv 2501.13669), from domain data and an importance file
to a plain PEFT adapter.

The story: load, refuse what cannot work, measure the bare base, add an adapter, train with TRL's
SFTTrainer while the penalty pulls, measure again, write.

    DIR/final/          the adapter (or model with --full), with the tokenizer; loads without
                        forgetless
    DIR/unscaled/       with --budget: the same as trained, before it was made to fit
    DIR/checkpoints/    the trainer's, for --resume
    DIR/config.yaml     the resolved options
    DIR/run.json        configuration, environment, data, before, after, forgetting, learning,
                        moved, log

In several processes (torchrun, DDP) a step is the same --batch-size x --accumulation sequences as
in one, each process taking its share; the first one writes.
"""

from __future__ import annotations

import functools
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import set_seed

from forgetless.budget.open import of_run, on_earlier
from forgetless.budget.predicted import check_calibrated
from forgetless.data.inputs import read_inputs
from forgetless.errors import OptionError
from forgetless.evaluate.evaluate import changes, measure, table
from forgetless.files.atomic import discard, write_json, write_text
from forgetless.files.budget_json import BudgetReport
from forgetless.files.hub import importance_path, ready
from forgetless.files.lock import only_writer
from forgetless.files.provenance import environment, sha256_file
from forgetless.files.room import check_free_space
from forgetless.files.run_json import Run
from forgetless.files.schema import as_record
from forgetless.importance.controls import uniform
from forgetless.importance.importance import Importance
from forgetless.methods.callback import add_term
from forgetless.methods.method import Setup, Steps
from forgetless.methods.replay_text import replay_text
from forgetless.model import distributed
from forgetless.model.adapters import add_adapter
from forgetless.model.linear import matching, warn_of_experts
from forgetless.model.loading import load_model, load_tokenizer, save_whole
from forgetless.model.stages import Earlier
from forgetless.model.targets import target_weights
from forgetless.model.weights import LowRankWeight
from forgetless.options.estimators import default_strength
from forgetless.options.option import as_dict, several
from forgetless.options.tune import TuneOptions
from forgetless.penalty.algebra import implementation
from forgetless.penalty.callback import add_penalty
from forgetless.penalty.layers import from_option
from forgetless.report.budget import sentences
from forgetless.report.cards import write_card
from forgetless.tune.checks import check_model, check_options, disk_needed
from forgetless.tune.moved import moved
from forgetless.tune.result import last_logged, push_result
from forgetless.tune.rows import encoded_rows, tokens_per_step
from forgetless.tune.run_folder import INPUTS, check_folder, check_inputs, last_checkpoint
from forgetless.tune.trainer import made, train

logger = logging.getLogger("forgetless")


def tune(options: TuneOptions, *, earlier: Earlier | None = None) -> dict[str, Any]:
    """Fine-tune as `options` say; writes `options.out` and returns what is in its run.json.

    Raises ValueError or OptionError before training starts.

    `earlier`: the model stands on the updates of a sequence's earlier steps (sequence/sequence.py), and
    the adapter is relative to it.
    """
    distributed.start(options.device)
    methods = check_options(options)
    if earlier is None and (options.after or len(several(options.data)) > 1):
        raise OptionError(
            "several domains, or --after, are tuned by forgetless.sequence.sequence.tune_in_turn; give "
            "tune one --data"
        )
    repo = (
        ready(options.push_to_hub, private=options.private)
        if options.push_to_hub and distributed.first()
        else None
    )
    file = importance_path(options.importance) if options.importance else None
    importance = Importance.load(file) if file else None
    if options.budget and not options.general:
        check_calibrated(importance)
    if importance is not None and options.strength is None and not options.budget:
        options = replace(options, strength=default_strength(importance.info.get("estimator", "?")))
    with only_writer(options.out):
        check_folder(options, Path(options.out))
        run = _tuned(options, Path(options.out), methods, importance, file, earlier)
    if repo and distributed.first():
        push_result(repo, Path(options.out) / "final", run)
    return run


def _tuned(
    options: TuneOptions,
    out: Path,
    methods: dict[str, Steps],
    importance: Importance | None,
    file: Path | None,
    earlier: Earlier | None,
) -> dict[str, Any]:
    inputs = read_inputs(options)
    if options.resume:
        check_inputs(inputs.hashes, out)
    how = from_option(options.layers, tau=options.tau, per=options.per)
    set_seed(options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
    tokenizer, model = load_tokenizer(options), load_model(options)
    if options.budget and importance is None:
        logger.warning(
            "no --importance file: the budget is kept with uniform importance, which holds all "
            "weights alike"
        )
        importance = uniform(model, options.targets)
    check_model(options, model, importance, how)
    if (
        options.quantize != "none"
        # before measuring: it turns norms and embeddings to f32, which must not look like forgetting
    ):
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=options.gradient_checkpointing
        )
    encoded = encoded_rows(options, inputs.training, tokenizer, model)
    held = inputs.held_out.domain if options.eval_steps else None
    model, ledger = (
        on_earlier(options, earlier, model, tokenizer, inputs.held_out, encoded)
        if earlier
        else (model, None)
    )
    started = time.perf_counter()
    text, source = replay_text(options, inputs.replay, model, tokenizer, encoded)
    preparing = time.perf_counter() - started
    before = measure(model, tokenizer, inputs.held_out)
    keeper = (
        of_run(options, model, tokenizer, inputs, encoded, importance, ledger)
        if options.budget
        else None
    )
    setup = Setup(
        options, tokenizer, text, tokens_per_step(options, encoded), importance, how, before
    )
    started = time.perf_counter()
    model = _prepared(setup, methods, model)
    check_free_space(out, disk_needed(options, model))
    # Before the trainer, which makes its folder: what they refuse must leave no trace.
    terms = [
        term
        for method in methods.values()
        if method.loss and (term := method.loss(setup, model)) is not None
    ]
    pulls = (
        [] if keeper else [method.pull for method in methods.values() if method.pull]
    )  # the keeper brings its own
    penalties = [penalty for pull in pulls if (penalty := pull(setup, model)) is not None]
    trainer = made(
        options,
        model,
        tokenizer,
        encoded,
        None if held is None else encoded_rows(options, held, tokenizer, model),
        next(
            (method.optimizer(setup, model) for method in methods.values() if method.optimizer),
            None,
        ),
    )
    preparing += time.perf_counter() - started
    for term in terms:
        add_term(trainer, term)
    for penalty in penalties:
        add_penalty(trainer, penalty)
        importance = getattr(
            penalty, "importance", importance
        )  # offloaded, or this process's share: not a second one beside it
    setup = replace(setup, importance=importance)
    if keeper is not None and importance is not None:
        keeper.bind(
            trainer,
            importance,
            start=options.strength,
            layers=how,
            anchor=options.anchor,
            names=options.targets if options.full else None,
            offload=options.offload_importance,
        )
    _announce(options, model, importance, len(encoded))
    if distributed.first():
        if not options.resume:
            discard(
                out / "run.json"
            )  # of the run that is overwritten: it must not stand for this one
        write_json(out / INPUTS, inputs.hashes)
        write_text(out / "config.yaml", yaml.safe_dump(as_dict(options), sort_keys=False))
    started = time.perf_counter()
    train(trainer, last_checkpoint(out) if options.resume else None)
    seconds = time.perf_counter() - started
    finished = {
        name: method.finish(setup, model) for name, method in methods.items() if method.finish
    }
    kept = None
    if keeper is not None:
        if distributed.first():
            save_whole(model, tokenizer, out / "unscaled")
        kept = keeper.finish(trainer)
    save = next(
        (functools.partial(method.save, setup) for method in methods.values() if method.save), None
    )
    if distributed.first():
        save_whole(model, tokenizer, out / "final", save)
    after = measure(model, tokenizer, inputs.held_out)
    run = {
        "configuration": as_dict(options),
        "environment": environment(str(next(model.parameters()).device)),
        "data": {
            "source": options.data,
            "rows": len(inputs.training),
            "rows_trained": len(encoded),
            "sha256": inputs.hashes["training data"],
        },
        "processes": distributed.size(),
        "method": list(methods),
        "finished": finished,
        "budget": kept,
        "verdict": None if kept is None else kept["verdict"],
        "replay": source,
        "importance": {"file": options.importance, "sha256": sha256_file(file)} if file else None,
        "before": before,
        "after": after,
        **changes(before, after),
        "energy": last_logged(trainer.state.log_history, "energy"),
        "moved": moved(model, importance, how),
        "train_seconds": seconds,
        # what the methods did before: text sampled, curvature, decompositions, steps on general
        # text
        "prepare_seconds": preparing,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "log": trainer.state.log_history,
    }
    if not distributed.first():
        distributed.barrier()
        return run
    what = "model" if options.full else "adapter"
    write_card(out / "final", "tune", as_record(run, Run), what=what)
    write_json(out / "run.json", run)
    distributed.barrier()
    if inputs.held_out.anything:
        print(table(before, after))
    if kept is not None:
        print("\n".join(sentences(as_record(kept, BudgetReport))))
    logger.info("wrote %s in %.0f s", out / "final", seconds)
    return run


def _prepared(setup: Setup, methods: dict[str, Steps], model: nn.Module) -> nn.Module:
    """The model to train: with a method's adapter, a fresh LoRA adapter or the recorded one, or
    with its target weights unfrozen.
    """
    set_seed(setup.options.seed)
    own = next((method.adapter for method in methods.values() if method.adapter), _trained)
    model = own(setup, model)
    for method in methods.values():
        if method.start:
            method.start(setup, model)
    return model


def _trained(setup: Setup, model: nn.Module) -> nn.Module:
    options, importance = setup.options, setup.importance
    if options.full:
        warn_of_experts(model, options.targets)
        model.requires_grad_(False)
        for _, module in matching(model, options.targets):
            module.weight.requires_grad_(True)
        return model
    model = add_adapter(
        model,
        names=options.targets,
        rank=options.rank,
        alpha=options.alpha,
        dropout=options.dropout,
        rslora=options.rslora,
    )
    if options.anchor == "recorded" and importance is not None:
        for weight in target_weights(model):
            assert isinstance(weight, LowRankWeight)
            A, B = importance.anchors[weight.name]
            weight.A.data.copy_(A)
            weight.B.data.copy_(B / weight.scale)
    return model


def _announce(
    options: TuneOptions, model: nn.Module, importance: Importance | None, rows: int
) -> None:
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = (
        "plain fine-tuning (no penalty)"
        if options.method == "plain"
        else f"method {options.method}"
    )
    if options.budget:
        kept_on = f"on {options.general}" if options.general else "predicted"
        held += (
            f", budget {options.budget} {kept_on}, layers {options.layers}, anchor "
            f"{options.anchor}, importance {options.importance or 'uniform'}"
        )
    elif importance is not None and options.strength:
        held += (
            f", strength {options.strength:g}, layers {options.layers}, anchor "
            f"{options.anchor}, {implementation(importance)} from {options.importance}"
        )
    logger.info(
        "tuning %s on %s (%d rows): %s trainable parameters, %s; seed %d",
        options.model,
        options.data,
        rows,
        f"{trainable:,}",
        held,
        options.seed,
    )
