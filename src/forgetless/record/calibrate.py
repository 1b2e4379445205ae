"""Calibrating: fine-tuning-like updates of a base model, their energy, and what they cost in
general loss (importance/calibration.py has the law).

kept apart   general documents that importance is not recorded on, at most a third of them and about
             58,000 tokens: half to train on, half to measure on
updates      nine short trainings of a LoRA adapter: on three pieces of that text, of about 4, 8 and
             16 thousand tokens, which makes them narrow domains seen 4 to 15 times; each is held at
             two strengths and two rates, since updates that evade importance cost more per unit of
             energy
sizes        each update is scaled until it costs about 0.5, 1, 2 and 5 % of perplexity, and f s + q
             s^2 is fitted to what it did cost. f is left out of the cost of energy: text that is
             trained on here is of the kind that is measured
gradient     of the recorded text at the base, as L R of rank 32 per weight: two passes through
             adapters with U = 0, first with a random A, which gives the range of the gradient by
             B's, then with that range as B, which gives the rest by A's. No (out, in) tensor, and a
             quantised base will do

recorded, kept = apart(documents, tokenizer)
calibration = calibrated(options, model, tokenizer, importance, pieces_of(recorded), kept)
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from forgetless.data.documents import Document, fingerprint_rows
from forgetless.data.encoding import Encoded, batches
from forgetless.errors import OptionError
from forgetless.evaluate.paired import Part, content, encoded_each, measured
from forgetless.evaluate.rise import FEW_DOCUMENTS
from forgetless.importance.calibration import Calibration, usual_strength
from forgetless.importance.importance import Importance
from forgetless.model import distributed
from forgetless.model.adapters import add_adapter, without_adapter
from forgetless.model.loading import context_length
from forgetless.model.targets import target_weights
from forgetless.model.update import Update
from forgetless.model.weights import LowRankWeight
from forgetless.options.estimators import in_nats
from forgetless.options.record import RecordOptions
from forgetless.options.tune import TUNE_PRESETS
from forgetless.penalty.pull import Penalty
from forgetless.record.training import backward, scored_tokens, step

logger = logging.getLogger("forgetless")
SHARE, TOKENS = 1 / 3, 58_000  # of the general documents, kept apart at most
LEAST_DOCUMENTS, LEAST_TOKENS = 2 * FEW_DOCUMENTS, 4_000  # kept apart at least
CUT = TOKENS // (
    2 * LEAST_DOCUMENTS
)  # tokens of a document that count: the others of a long one are not used
PARTS = (1, 2, 4)  # sizes of the three pieces of text to train on
STEPS, STEP_TOKENS = 60, 1024
RATE = float(TUNE_PRESETS["default"]["learning_rate"])
HELD = (
    (1.0, 2 * RATE),
    (3.0, 2 * RATE),
    (1.0, RATE / 2),
)  # (strength as a multiple of the usual one, learning rate) of the updates on each piece
AIMS, NEAR, TRIES = (
    (0.02, 0.005, 0.01, 0.05),
    1.5,
    3,
)  # nats per token that an update is scaled to cost; as a factor, how nearly; measurements at most
BEYOND = 0.08  # nats per token: a rise larger than that of any usual budget
OFF = 0.05  # of a rise: what a parabola may be off by, beside the noise of the documents
LARGEST = 8.0  # times the update as trained
GRADIENT_RANK = 32


def apart(documents: Sequence[Document], tokenizer: Any) -> tuple[list[Document], list[Document]]:
    """(documents to record on, documents kept apart), by the hash of their text.

    Raises OptionError where there are too few.
    """
    by_text = {content(document): document for document in documents}
    ordered = sorted(by_text, key=lambda text: hashlib.sha256(text.encode()).digest())
    kept: dict[str, int] = {}  # tokens
    for text in ordered[: int(SHARE * len(ordered))]:
        if sum(kept.values()) >= TOKENS:
            break
        for ids, scored in encoded_each([by_text[text]], tokenizer)[
            0
        ]:  # none where there is nothing to predict
            if any(scored[1:CUT]):
                kept[text] = min(CUT, len(ids))
    if len(kept) < LEAST_DOCUMENTS or sum(kept.values()) < LEAST_TOKENS:
        raise OptionError(
            "--calibrate keeps a third of the general documents apart, to train and to measure "
            f"on: expected at least {LEAST_DOCUMENTS} there, "
            f"different ones of {LEAST_TOKENS:,} tokens together, found {len(kept)} of "
            f"{sum(kept.values()):,}; give more general text, or "
            "leave out --calibrate"
        )
    return [document for document in documents if content(document) not in kept], [
        by_text[text] for text in kept
    ]


def calibrated(
    options: RecordOptions,
    model: nn.Module,
    tokenizer: Any,
    importance: Importance,
    recorded: Sequence[Encoded],
    kept: Sequence[Document],
    done: Sequence[dict[str, Any]] = (),
    save: Callable[[list[dict[str, Any]]], None] = lambda updates: None,
) -> Calibration:
    """The calibration of `importance` on its base `model`, which is bare before and afterwards.

    `recorded`: the text that importance was recorded on; `kept`: the documents kept apart. `done`:
    updates that were measured before an interruption; `save` is given all so far after each. Raises
    ValueError where the updates say nothing.
    """
    updates = list(done)
    trained, part = divided(model, tokenizer, kept)
    for _, found in measured_updates(options, model, tokenizer, importance, trained, part, done):
        updates.append(found)
        save(updates)
    pieces = list(batches(recorded, batch_size=_rows(recorded), pad_id=tokenizer.pad_token_id))
    gradients = gradient(model, options.targets, pieces, rank=GRADIENT_RANK, seed=options.seed)
    tokens = int(part.tokens.sum())
    about = {
        "documents": len(part),
        "tokens": tokens,
        "sha256": fingerprint_rows([content(d) for d in kept]),
    }
    try:
        calibration = Calibration(updates, gradients, about)
    except ValueError as error:
        raise ValueError(f"{error}; {options.out} is written without it") from None
    logger.info("calibrated: %s", calibration.describe())
    return calibration


def measured_updates(
    options: RecordOptions,
    model: nn.Module,
    tokenizer: Any,
    importance: Importance,
    trained: Sequence[Sequence[Encoded]],
    part: Part,
    done: Sequence[dict[str, Any]] = (),
) -> Iterator[tuple[Update, dict[str, Any]]]:
    """Each update that is not `done`, while `model` carries it, with what a `Calibration` keeps of
    it. `model` is bare before and afterwards.
    """
    updates, length = list(done), min(options.length, 2048, context_length(model))
    plans = [(rows, *how) for rows in trained for how in HELD]
    for number, (rows, times, rate) in enumerate(
        tqdm(plans, desc="calibrating", unit="update", disable=distributed.silent())
    ):
        if number < len(done):
            continue
        costs = [
            update["second"] / update["energy"]
            for update in updates
            if update["second"] > 0 and update["energy"] > 0
        ]
        known = statistics.geometric_mean(costs) if costs else None
        nats = in_nats(importance.info.get("estimator"))
        strength = times * usual_strength(
            importance, known or 0.0
        )  # of other importance the first one is not held
        torch.manual_seed(options.seed + number)
        adapted = add_adapter(model, names=options.targets, rank=8, alpha=32.0)
        penalty = Penalty(adapted, importance, strength=strength)
        _train(
            adapted,
            penalty,
            _endless(rows, length, tokenizer.pad_token_id, options.seed + number),
            rate,
        )
        update, energy = Update(adapted), penalty.energy()
        points = _points(adapted, update, part, (known or (2.0 if nats else 0.0)) * energy)
        first, second, error = parabola(points)
        updates.append(
            {
                "documents": len(rows),
                "strength": strength,
                "learning_rate": rate,
                "steps": STEPS,
                "energy": energy,
                "first": first,
                "second": second,
                "second_error": error,
                "points": points,
            }
        )
        update.scale(1)
        yield update, updates[-1]
        without_adapter(adapted)


def divided(
    base: nn.Module, tokenizer: Any, kept: Sequence[Document]
) -> tuple[list[list[Encoded]], Part]:
    """(three pieces of text to train on; the part to measure on, with the losses of the base).

    Whole documents, cut where they are long; about half of the tokens are trained on, and at least
    ten documents measured.
    """
    encoded, documents = encoded_each(kept, tokenizer)
    encoded = [(ids[:CUT], scored[:CUT]) for ids, scored in encoded]
    ends = np.cumsum([len(ids) for ids, _ in encoded]) / sum(len(ids) for ids, _ in encoded)
    edges = [int(edge) for edge in np.searchsorted(ends, np.cumsum((0, *PARTS)) / (2 * sum(PARTS)))]
    for place in range(1, len(edges)):  # each piece has a document of its own
        edges[place] = max(edges[place], edges[place - 1] + 1)
    for place in range(1, len(edges)):
        edges[place] = min(edges[place], len(encoded) - FEW_DOCUMENTS - (len(edges) - 1 - place))
    pieces = [encoded[first:last] for first, last in itertools.pairwise(edges)]
    sources = [document.source for document in documents[edges[-1] :]]
    return pieces, measured(base, encoded[edges[-1] :], sources, min(2048, context_length(base)))


def _train(
    model: nn.Module, penalty: Penalty, data: Iterator[dict[str, Tensor]], rate: float
) -> None:
    """STEPS steps under the pull, at a rate that falls to nothing.

    Raises ValueError where they diverge.
    """
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0
    )
    model.train()
    with penalty.attach(optimizer):
        for number, batch in enumerate(itertools.islice(data, STEPS)):
            optimizer.param_groups[0]["lr"] = rate * (1 - number / STEPS)
            loss, _ = step(model, optimizer, [batch])
            if not math.isfinite(loss):
                raise ValueError(
                    f"a training that calibrates diverged at step {number + 1} of {STEPS} (rate "
                    f"{rate:g}); use --dtype float32, or leave out "
                    "--calibrate: the importance is written"
                )


def _endless(
    rows: Sequence[Encoded], length: int, pad_id: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """Batches of about STEP_TOKENS tokens, epoch after epoch."""
    pieces = [
        (ids[i : i + length], scored[i : i + length])
        for ids, scored in rows
        for i in range(0, len(ids), length)
        if any(scored[i + 1 : i + length])
    ]
    for epoch in itertools.count():
        yield from batches(
            pieces, batch_size=_rows(pieces), pad_id=pad_id, shuffle_seed=1000 * seed + epoch
        )


def _rows(pieces: Sequence[Encoded]) -> int:
    """Rows of a batch of about STEP_TOKENS tokens."""
    return max(1, round(STEP_TOKENS * len(pieces) / sum(len(ids) for ids, _ in pieces)))


def _points(model: nn.Module, update: Update, part: Part, cost: float) -> list[dict[str, float]]:
    """Measured rises at shares of an update where it costs about AIMS.

    `cost`: what all of it should, in nats per token; 0: not known.
    """
    points: list[dict[str, float]] = []
    for aim in AIMS:
        for _ in range(TRIES):
            share = _next_share(points, aim) if points else math.sqrt(aim / cost) if cost else 1.0
            share = min(LARGEST, share)
            if any(abs(share / point["share"] - 1) < 0.05 for point in points):
                break
            update.scale(share)
            rise = part.rise(model, error=0.05)
            points.append(
                {
                    "share": share,
                    "nats": rise.nats,
                    "standard_error": rise.within or rise.standard_error,
                }
            )
            if aim / NEAR < rise.nats < NEAR * aim:
                break
    return points


def _next_share(points: Sequence[dict[str, float]], aim: float) -> float:
    """Where the rise should be `aim`: between the measured shares around it, in logs; outside of
    them by its square.
    """
    below = max(
        (point for point in points if point["nats"] < aim),
        key=lambda point: point["share"],
        default=None,
    )
    above = min(
        (point for point in points if point["nats"] >= aim),
        key=lambda point: point["share"],
        default=None,
    )
    if below is None or above is None:
        known = above or below
        assert known is not None
        return known["share"] * math.sqrt(
            min(16.0, max(1 / 64, aim / max(known["nats"], aim / 16)))
        )
    way = (
        math.log(aim / below["nats"]) / math.log(above["nats"] / below["nats"])
        if 0 < below["nats"] < above["nats"]
        else 0.5
    )
    return float(below["share"] * (above["share"] / below["share"]) ** way)


def parabola(points: Sequence[dict[str, float]]) -> tuple[float, float, float]:
    """(f, q, standard error of q) of f s + q s^2 through measured rises, by least squares, weighted
    by their standard errors and 5 % of themselves.

    Rises above all budgets are left out: further out the loss rises faster than by squares. Nothing
    is known from fewer than three sizes: q is 0.
    """
    points = [point for point in points if point["nats"] <= BEYOND]
    if len(points) < 3:
        return 0.0, 0.0, 0.0
    share, nats, error = (
        np.array([point[key] for point in points]) for key in ("share", "nats", "standard_error")
    )
    weight = 1 / np.hypot(np.maximum(error, 1e-6), OFF * nats)
    X = np.stack([share, share**2], 1) * weight[:, None]
    (first, second), _, rank, _ = np.linalg.lstsq(X, nats * weight, rcond=None)
    if rank < 2:
        return 0.0, 0.0, 0.0
    scatter = max(
        1.0,
        float(((nats - first * share - second * share**2) ** 2 * weight**2).sum())
        / (len(points) - 2),
    )
    return float(first), float(second), math.sqrt(scatter * float(np.linalg.inv(X.T @ X)[1, 1]))


def gradient(
    base: nn.Module, names: str, pieces: Sequence[dict[str, Tensor]], *, rank: int, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight -> (L (out, k), R (k, in)), bf16: about dL/dW of the loss in nats per token on padded
    batches, by a randomised range of at most `rank` directions. `base` is bare before and
    afterwards.
    """
    model = add_adapter(base, names=names, rank=rank, alpha=float(rank))  # scale 1
    weights = [
        weight for weight in target_weights(model) if isinstance(weight, LowRankWeight)
    ]  # all of them: the adapter was just made
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in weights:
            weight.A.copy_(torch.randn(weight.A.shape, generator=random))
    _backward(model, pieces)
    ranges = {}
    with torch.no_grad():
        for weight in weights:
            ranges[weight.name] = torch.linalg.qr(weight.B.grad.float())[0]  # type: ignore[union-attr]
            weight.A.zero_()
            weight.B.zero_()
            weight.B[:, : ranges[weight.name].shape[1]] = ranges[weight.name].to(weight.B)
    _backward(model, pieces)
    found = {}
    for weight in weights:
        L = ranges[weight.name]
        assert weight.A.grad is not None
        found[weight.name] = (L.cpu().bfloat16(), weight.A.grad[: L.shape[1]].cpu().bfloat16())
    without_adapter(model)
    return found


def _backward(model: nn.Module, pieces: Sequence[dict[str, Tensor]]) -> None:
    """Set the gradients of what is trained to those of the mean loss of all scored tokens."""
    tokens = scored_tokens(pieces)
    model.eval()
    model.zero_grad()
    for batch in tqdm(pieces, desc="gradient", unit="batch", disable=distributed.silent()):
        backward(model, batch, 1 / tokens)
