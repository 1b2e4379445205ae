"""Whether importance fits a model: recorded on this base, and covering what is trained.

For example:

    check_fit(model, importance, [weight.name for weight in target_weights(model)], "base")
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from forgetless.importance.importance import Importance
from forgetless.model.beside import names_beside
from forgetless.model.fingerprint import fingerprint, rows_before_resizing
from forgetless.model.linear import base_shapes
from forgetless.model.weights import TargetWeight

logger = logging.getLogger("forgetless")


def check_fit(
    model: nn.Module, importance: Importance, targets: Sequence[str], anchor: str
) -> None:
    """Raise ValueError unless `importance` fits: shapes, targets, base model, anchors.

    `targets` names the weights that are trained; with anchor "recorded" each of them must have its
    adapter in the file.
    """
    source = importance.info.get("path", "the importance")
    recorded_on = importance.info.get("model", {}).get("name")
    advice = "Record again on this model."
    if recorded_on:
        advice = f"It was recorded on {recorded_on}; record again on this model."
    _check_shapes(model, importance, source, advice)
    _check_covered(importance, targets, source, advice)
    expected = importance.info.get("model", {}).get("fingerprint")
    present = fingerprint(model)
    if expected and expected != present and not _is_resized(model, expected):
        raise ValueError(
            f"{source} was recorded on another base model: fingerprint {expected[:12]} in the "
            f"file, {present[:12]} here. {advice}"
        )
    if anchor == "recorded":
        without = [name for name in targets if name not in importance.anchors]
        if without:
            raise ValueError(
                f"{source} has no recorded adapter for '{without[0]}'; use anchor 'base', or "
                "record with --keep-anchor"
            )


def _is_resized(model: nn.Module, expected: str) -> bool:
    """Whether only the embeddings have got more rows since the recording, which is then said."""
    rows = rows_before_resizing(model, expected)
    if rows is None:
        return False
    logger.info(
        "the embeddings have more rows than the %d that they were recorded with; the weights that "
        "are held are the same",
        rows,
    )
    return True


def say_what_is_not_held(model: nn.Module, weights: Sequence[TargetWeight]) -> None:
    """Warn of what is trained beside the weights that are held: no importance belongs to it."""
    others = names_beside(model, weights)
    if others:
        logger.warning(
            "%d trained parameters are not held, first '%s' (biases, whole modules, embeddings and "
            "norms have no importance): leave them out of the training, or keep a budget, which "
            "scales them with the rest and measures what was lost",
            len(others),
            others[0],
        )


def _check_shapes(model: nn.Module, importance: Importance, source: str, advice: str) -> None:
    shapes = base_shapes(model)
    wrong = [
        name for name in importance if name in shapes and importance[name].shape != shapes[name]
    ]
    if wrong:
        first = wrong[0]
        more = f" ({len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(
            f"{source} does not fit the model: '{first}' is {importance[first].shape} in the "
            f"file and {shapes[first]} in the model{more}. {advice}"
        )


def _check_covered(
    importance: Importance, targets: Sequence[str], source: str, advice: str
) -> None:
    missing = [name for name in targets if name not in importance]
    if missing:
        raise ValueError(
            f"{source} does not cover {len(missing)} of {len(targets)} target weights, first "
            f"'{missing[0]}'; it holds {len(importance)} weights. Record with these targets, or "
            f"tune fewer. {advice}"
        )
