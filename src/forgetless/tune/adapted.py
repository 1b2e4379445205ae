"""The model to train: the base with a method's adapter, and what methods add to its training.

    adapted = adapt(start, methods)
    trainer = make_trainer(options, adapted, rows)
    held_by = attach(trainer, adapted, start)

Everything that can still be refused is refused by `adapt`, before the trainer makes its folder, so
that it leaves no trace.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from forgetless.budget.held import HeldDivergence, Holding
from forgetless.data.own_text import KEPT, OWN_KINDS
from forgetless.files.room import check_free_space
from forgetless.importance.importance import Importance
from forgetless.methods.after_step import AfterStep, add_after_step
from forgetless.methods.callback import add_term
from forgetless.methods.kl import KL
from forgetless.methods.learning import learn_by
from forgetless.methods.method import MethodSteps, Setup, Term
from forgetless.methods.objectives import Objective
from forgetless.model.adapters import adapter_of
from forgetless.model.linear import matching, warn_of_experts
from forgetless.model.targets import target_weights
from forgetless.model.weights import LowRankWeight
from forgetless.options.methods import budget_pulls
from forgetless.options.tune import TuneOptions
from forgetless.penalty.algebra import implementation
from forgetless.penalty.callback import add_penalty
from forgetless.tune.base import LoadedBase, Start, importance_name
from forgetless.tune.checks import disk_needed
from forgetless.tune.rows import Rows

logger = logging.getLogger("forgetless")


@dataclass(frozen=True)
class Adapted:
    """The model to train, and what the methods add: terms of the loss, penalties, what holds after
    each step, an optimizer.

    `optimizer` is None where the trainer makes its AdamW, `objective` where the rows are learned by
    their cross-entropy.
    """

    model: nn.Module
    objective: Objective | None
    terms: list[Term]
    penalties: list[Any]
    after_steps: list[AfterStep]
    optimizer: torch.optim.Optimizer | None


def rows_to_train(start: Start, methods: Mapping[str, MethodSteps], rows: Rows) -> Rows:
    """The rows as the methods change them, by what the bare model makes of them."""
    training = rows.training
    for method in methods.values():
        if method.rows:
            training = method.rows(start.setup, start.model, training)
    return replace(rows, training=training)


def adapt(start: Start, methods: Mapping[str, MethodSteps]) -> Adapted:
    """Make the model to train, and all that the methods need of it.

    With a budget no method brings a penalty: the keeper brings its own.
    """
    setup = start.setup
    model = model_to_train(setup, methods, start.model)
    check_free_space(Path(setup.options.out), disk_needed(setup.options, model))
    terms = [method.loss(setup, model) for method in methods.values() if method.loss]
    penalties = []
    if start.keeper is None:
        penalties = [method.pull(setup, model) for method in methods.values() if method.pull]
    optimizers = [method.optimizer(setup, model) for method in methods.values() if method.optimizer]
    objectives = [method.objective(setup, model) for method in methods.values() if method.objective]
    after = [method.after_step(setup, model) for method in methods.values() if method.after_step]
    return Adapted(
        model,
        objective=objectives[0] if objectives else None,
        # A term or a penalty of weight 0 is None, and costs nothing.
        terms=[term for term in terms if term is not None],
        penalties=[penalty for penalty in penalties if penalty is not None],
        after_steps=[held for held in after if held is not None],
        optimizer=optimizers[0] if optimizers else None,
    )


def model_to_train(setup: Setup, methods: Mapping[str, MethodSteps], model: nn.Module) -> nn.Module:
    """The model with a method's adapter, a fresh LoRA adapter or the recorded one, or with its
    target weights unfrozen; then whatever methods do to it before tuning.
    """
    set_seed(setup.options.seed)
    own = [method.adapter for method in methods.values() if method.adapter]
    if own:
        model = own[0](setup, model)
    elif setup.options.full:
        _unfreeze_targets(setup.options, model)
    else:
        model = _with_lora(setup, model)
    for method in methods.values():
        if method.start:
            method.start(setup, model)
    return model


def _unfreeze_targets(options: TuneOptions, model: nn.Module) -> None:
    warn_of_experts(model, options.targets)
    model.requires_grad_(False)
    for _, module in matching(model, options.targets):
        module.weight.requires_grad_(True)


def _with_lora(setup: Setup, model: nn.Module) -> nn.Module:
    """`model` with a LoRA adapter, fresh or as it was at the end of recording."""
    options, importance = setup.options, setup.importance
    model = adapter_of(model, options)
    if options.anchor == "recorded" and importance is not None:
        for weight in target_weights(model):
            assert isinstance(weight, LowRankWeight)
            A, B = importance.anchors[weight.name]
            weight.A.data.copy_(A)
            weight.B.data.copy_(B / weight.scale)
    return model


def attach(trainer: Any, adapted: Adapted, start: Start) -> Importance | None:
    """Add terms and penalties to the trainer, or with a budget the keeper's penalty and probe.

    Returns the importance that holds the model from here on. A penalty may have moved it to CPU
    memory, or kept this process's shard of it; nothing else needs the first copy.
    """
    options, importance = start.setup.options, start.setup.importance
    if adapted.objective is not None:
        learn_by(trainer, adapted.objective)
    for term in adapted.terms:
        add_term(trainer, term)
    for penalty in adapted.penalties:
        add_penalty(trainer, penalty)
        importance = getattr(penalty, "importance", importance)
    for held in adapted.after_steps:
        add_after_step(trainer, held)
    if start.keeper is not None:
        holding = Holding(
            layers=start.setup.layers,
            anchor=options.anchor,
            names=options.targets if options.full else None,
            offload=options.offload_importance,
        )
        grip = start.keeper.bind(
            trainer,
            importance,
            holding,
            start=options.strength,
            divergence=_divergence_of(adapted.terms, options),
            pulls=budget_pulls(options.method),
        )
        importance = grip.held.penalty.importance if grip.held else importance
    return importance


def _divergence_of(terms: Sequence[Term], options: TuneOptions) -> HeldDivergence | None:
    """The divergence whose weight a budget sets, where the methods have one."""
    own = options.replay in (*OWN_KINDS, KEPT)
    return next((HeldDivergence(term, own) for term in terms if isinstance(term, KL)), None)


def let_go(
    base: LoadedBase, start: Start, importance: Importance | None
) -> tuple[LoadedBase, Start]:
    """Base and start as the rest of a run sees them: with the importance that holds the model.

    Where a penalty has moved it to CPU memory, nothing of `tune` keeps the first copy alive.
    """
    setup = replace(start.setup, importance=importance)
    return replace(base, importance=importance), replace(start, setup=setup)


def announce(
    options: TuneOptions,
    model: nn.Module,
    importance: Importance | None,
    file: Path | None,
    rows: int,
) -> None:
    """Say what is about to be trained, and how it is held; `file` is where the importance lies."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info(
        "tuning %s on %s (%d rows): %s trainable parameters, %s; seed %d",
        options.model,
        options.data,
        rows,
        f"{trainable:,}",
        _how_held(options, importance, file),
        options.seed,
    )


def _how_held(options: TuneOptions, importance: Importance | None, file: Path | None) -> str:
    if options.method == "plain":
        method = "plain fine-tuning (no penalty)"
    else:
        method = f"method {options.method}"
    holding = f"layers {options.layers}, anchor {options.anchor}"
    if options.budget:
        kept = f"on {options.general}" if options.general else "predicted"
        if not budget_pulls(options.method):
            weight = f"weight of the divergence from {options.kl_weight:g} on"
            return f"{method}, budget {options.budget} {kept}, {weight}"
        source = importance_name(options, file) or "uniform"
        return f"{method}, budget {options.budget} {kept}, {holding}, importance {source}"
    if importance is not None and options.strength:
        source = f"{implementation(importance)} from {importance_name(options, file)}"
        return f"{method}, strength {options.strength:g}, {holding}, {source}"
    return method
